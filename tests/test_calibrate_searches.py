"""``diffalign calibrate timesteps`` and ``schedule`` on a tiny pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign import cli
from diffalign.pipelines.generate import generate
from diffalign.pipelines.load import make_scheduler
from diffalign.solvers import CalibratedScheduler


@pytest.fixture(autouse=True)
def two_solvers(monkeypatch):
    """To start from and to compare with, where there are twenty."""
    monkeypatch.setattr("diffalign.calibrate.tables.GRIDS", ("logsnr", "time_uniform"))
    monkeypatch.setattr("diffalign.calibrate.tables.SOLVERS", ("dpm-solver++",))


def search(tiny_folder, out, method, *more):
    base = ["calibrate", method, "--model", tiny_folder, "--output_dir", str(out), "--device", "cpu"]
    base += ["--samples", "4", "--reference_steps", "10", "--resolution", "16", "--num_inference_steps", "3"]
    return cli.main([*base, "--guidance_scale", "3", "--prompts", "a", "b", *more])


SMALL = ("--population", "6", "--generations", "2")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("timesteps", SMALL),
        ("timesteps", ("--method", "gradient", "--iterations", "2")),
        ("schedule", SMALL),
    ],
)
def test_what_is_found_is_stored_and_no_worse_than_known_solvers(
    tiny_folder, tmp_path, capsys, method, options
):
    out = tmp_path / "found"
    assert search(tiny_folder, out, method, "--save_pipeline", *options) == 0
    assert "what does not beat the best known solver there is not kept" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe.scheduler, CalibratedScheduler)
    assert pipe.scheduler.tables.info["method"] == method
    assert generate(pipe, ["a", "b"], [0, 1], steps=3, guidance=3.0, height=16, width=16).nfe == 3
    found = json.loads((out / "calibration.json").read_text())["results"]["3"]
    assert found["held_out_error"] <= found["best_known_error"] or not found["fitted"]
    # A folder of another command is not mixed with this one's.
    assert (
        cli.main(["calibrate", "plan", "--model", tiny_folder, "--output_dir", str(out), "--prompts", "a"])
        == 2
    )
    assert "calibrated with another method" in capsys.readouterr().err


def test_times_run_with_the_solver_itself(tiny_folder, tmp_path):
    """The table of found times is the solver that is told these times."""
    out = tmp_path / "times"
    assert (
        search(
            tiny_folder, out, "timesteps", "--solver", "unipc", "--solver_options.solver_order", "3", *SMALL
        )
        == 0
    )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    made = CalibratedScheduler.from_pretrained(out, subfolder="scheduler")
    times = json.loads((out / "calibration.json").read_text())["results"]["3"]["timesteps"]
    own = make_scheduler("unipc", pipe.scheduler.config, solver_order=3)
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler, options in ((made, {"num_inference_steps": 3}), (own, {"timesteps": times})):
        scheduler.set_timesteps(**options)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(torch.sin(state + t / 300), t, state).prev_sample
        ends.append(state)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("timesteps", ["--solver", "EulerDiscreteScheduler"], "must be one of ours"),
        ("timesteps", ["--solver", "unipc", "--solver_options.order", "3"], "has no option 'order'"),
        ("timesteps", ["--solver", "ddim", "--solver_options.eta", "1"], "no linear multistep method"),
        ("timesteps", ["--solver_options.final_sigmas_type", "sigma_min"], "tables end at the clean image"),
        ("timesteps", ["--population", "2"], "population must be at least 4"),
        ("schedule", ["--generations", "0"], "generations must be at least 1"),
    ],
)
def test_wrong_options_are_refused(tiny_folder, tmp_path, capsys, method, options, words):
    assert search(tiny_folder, tmp_path / "x", method, *options) == 2
    assert words in capsys.readouterr().err
