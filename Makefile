# `make demo` and `make test` do everything on a fresh machine; the environment is built once into .venv.
# Needed: Python 3.11 or newer (or uv, which brings one) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
OUT ?= outputs
# uv where it works (a pyenv shim may exist without it), else the one that pip puts into the environment.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv)

.PHONY: help setup demo test lint format lock bench gpu-check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python \
	    || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && $(PYTHON) -m venv $(VENV); } \
	    || { rm -rf $(VENV) && uv venv --quiet --seed --python '>=3.11' $(VENV); } \
	    || { rm -rf $(VENV); echo 'Needed: Python 3.11 or newer with venv (make setup PYTHON=...), or uv'; exit 1; }
	test $(UV) = uv || test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

setup: $(STAMP) ## build .venv from requirements.lock

demo: $(STAMP) ## the main job on the embedded playground; leaves outputs/demo/report.html
	$(BIN)/diffalign demo --output_dir $(OUT)/demo --overwrite

# A process per core, with one thread each: the networks of the tests are too small to share one.
test: $(STAMP) ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## samplers, cost of steps, training and rollouts on this machine; leaves outputs/bench
	$(BIN)/diffalign bench samplers --output_dir $(OUT)/bench/samplers --overwrite
	$(BIN)/diffalign bench step --output_dir $(OUT)/bench/step --overwrite
	$(BIN)/diffalign bench train --output_dir $(OUT)/bench/train --overwrite
	$(BIN)/diffalign bench rollout --output_dir $(OUT)/bench/rollout --overwrite

gpu-check: $(STAMP) ## the tests and benchmarks that need a GPU; writes docs/benchmarks/gpu.md
	$(BIN)/python -m diffalign.bench.gpu

lock: ## renew requirements.lock (needs uv)
	uv pip compile --universal --quiet --upgrade --extra dev --no-emit-index-url --no-header \
	    --python-version 3.11 -o requirements.lock pyproject.toml

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis outputs
