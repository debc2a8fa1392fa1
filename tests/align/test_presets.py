"""The presets are complete: their first line names them, and their options are accepted."""

import shlex
from pathlib import Path

import pytest

from diffalign import cli

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_is_accepted_and_says_how_it_is_run(path):
    first = path.read_text().splitlines()[0]
    mark, diffalign, train, method, *rest = shlex.split(first, comments=False)
    assert (mark, diffalign, train) == ("#", "diffalign", "train")
    assert rest[:2] == ["--config", f"configs/train/{path.name}"]
    config = cli.parse(
        cli._load(cli.COMMANDS[f"train {method}"].config),
        [f"--config={path}", *rest[2:]],
        prog="train",
        example="",
    )
    config.check()
    assert config.learning_rate == float(path.read_text().split("learning_rate: ")[1].split()[0])
    assert path.stem in config.output_dir
