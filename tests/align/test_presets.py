"""The presets are complete: their first line names them, and their options are accepted."""

from pathlib import Path

import pytest

from diffalign.cli import parse
from diffalign.trainers import DiffusionDPOConfig

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_is_accepted_and_says_how_it_is_run(path):
    config = parse(DiffusionDPOConfig, [f"--config={path}"], prog="train", example="")
    config.check()
    assert config.learning_rate == float(path.read_text().split("learning_rate: ")[1].split()[0])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert f"diffalign train diffusion-dpo --config configs/train/{path.name}" in first
