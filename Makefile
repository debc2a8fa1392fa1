# `make demo` and `make test` do everything on a fresh machine; the environment is built once into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
UV := $(shell command -v uv 2>/dev/null || echo $(BIN)/uv)
DEMO_OUT ?= outputs/demo

.PHONY: help setup demo test lint format lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(UV) || command -v uv >/dev/null || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --python $(BIN)/python -r requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

setup: $(STAMP) ## build .venv from requirements.lock

demo: $(STAMP) ## the main job on the embedded playground; leaves outputs/demo/report.html
	$(BIN)/diffalign demo --output_dir $(DEMO_OUT) --overwrite true

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## renew requirements.lock (needs uv)
	uv pip compile --universal --quiet --upgrade --extra dev --no-emit-index-url --no-header \
	    --python-version 3.11 -o requirements.lock pyproject.toml

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis outputs
