"""``diffalign calibrate ems`` on the shipped model, in its smallest form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffalign import solvers
from diffalign.calibrate.ems import CalibrateEMSConfig, run
from diffalign.errors import UserError
from diffalign.solvers import DPMSolverV3Scheduler
from diffalign.solvers.ems import Sums

TINY = {
    "guidance_scale": 2.0,
    "intervals": 2,
    "samples": 2,
    "sample_steps": 2,
    "batch_size": 2,
    "derivative": "difference",
    "device": "cpu",
}


def test_shards_make_the_scheduler_of_one_run(tmp_path):
    run(CalibrateEMSConfig(**TINY, output_dir=str(tmp_path / "one")))
    for k in range(2):
        assert not (tmp_path / "two" / "scheduler").exists()
        run(CalibrateEMSConfig(**TINY, output_dir=str(tmp_path / "two"), shard=f"{k}/2"))
    one, two = (
        DPMSolverV3Scheduler.from_pretrained(tmp_path / name, subfolder="scheduler").statistics
        for name in ("one", "two")
    )
    assert one.shape[1:] == (1, 1)
    assert one.info["guidance_scale"] == 2.0
    np.testing.assert_allclose(one.l, two.l, atol=1e-4)
    # Done before: nothing is computed, other settings are refused.
    run(CalibrateEMSConfig(**TINY, output_dir=str(tmp_path / "one")))
    with pytest.raises(UserError, match="other settings"):
        run(CalibrateEMSConfig(**{**TINY, "seed": 5}, output_dir=str(tmp_path / "one")))


def test_an_interrupted_estimate_goes_on(tiny_folder, tmp_path, monkeypatch):
    options = {**TINY, "model": tiny_folder, "prompts": ["a", "b"], "samples": 6}
    run(CalibrateEMSConfig(**options, output_dir=str(tmp_path / "whole")))

    save = Sums.save

    def interrupted(sums, path):
        save(sums, path)
        if sums.count == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sums, "save", interrupted)
    config = CalibrateEMSConfig(**options, output_dir=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Sums, "save", save)
    drawn, draw = [], solvers.sample

    def counted(model, noise, *args, **kwargs):
        drawn.append(len(noise))
        return draw(model, noise, *args, **kwargs)

    monkeypatch.setattr(solvers, "sample", counted)
    run(config)
    assert drawn == [2, 2]  # the batch that forward mode is tried on, and the one that is left
    whole, parts = (
        DPMSolverV3Scheduler.from_pretrained(tmp_path / name, subfolder="scheduler").statistics
        for name in ("whole", "parts")
    )
    assert whole.sha256 == parts.sha256 or np.array_equal(whole.l, parts.l)
    run(replace(config, pooled="all"))  # from the sums that are there
    assert drawn == [2, 2]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "scheduler").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        run(CalibrateEMSConfig(**TINY, output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 1}, "--samples"),
        ({"guidance_scale": 0.5}, "--guidance_scale"),
        ({"shard": "1"}, "k/n"),
        ({"shard": "3/3"}, "--shard"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        CalibrateEMSConfig(**options)
