"""``diffalign calibrate ems`` on the shipped model, in its smallest form."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.calibrate.ems import CalibrateEMSConfig, run
from diffalign.errors import UserError
from diffalign.solvers import DPMSolverV3Scheduler

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
