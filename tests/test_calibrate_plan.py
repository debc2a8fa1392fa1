"""``diffalign calibrate plan`` on a tiny pipeline."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign import cli
from diffalign.calibrate.plan import CalibratePlanConfig
from diffalign.calibrate.tables import problem_of
from diffalign.models import load_adapter
from diffalign.pipelines.generate import generate
from diffalign.solvers import CalibratedScheduler, UniPCScheduler
from diffalign.solvers.fitting import solve


@pytest.fixture(autouse=True)
def one_solver(monkeypatch):
    """To start from and to compare with, where there are twenty."""
    monkeypatch.setattr("diffalign.calibrate.tables.GRIDS", ("logsnr",))
    monkeypatch.setattr("diffalign.calibrate.tables.SOLVERS", ("dpm-solver++",))


def calibrate(tiny_folder, out, *more):
    base = ["calibrate", "plan", "--model", tiny_folder, "--output_dir", str(out), "--device", "cpu"]
    base += ["--samples", "4", "--reference_steps", "10", "--iterations", "2", "--resolution", "16"]
    return cli.main([*base, "--prompts", "a", "b", *more])


def test_tables_are_fitted_stored_loaded_and_sampled_with(tiny_folder, tmp_path, capsys):
    out = tmp_path / "plan"
    options = ["--guidance_scale", "3", "--save_pipeline"]
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", *options) == 0
    shown = capsys.readouterr().out
    assert "best known solver" in shown
    assert 'subfolder="scheduler"' in shown
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe.scheduler, CalibratedScheduler)
    assert pipe.scheduler.tables.info["guidance_scale"] == 3.0
    drawn = generate(pipe, ["a", "b"], [0, 1], steps=3, guidance=3.0, height=16, width=16)
    assert drawn.nfe == 3
    # Another number of steps is added to what is there; other settings are refused.
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", "4", *options) == 0
    assert sorted(CalibratedScheduler.from_pretrained(out, subfolder="scheduler").tables.tables) == [3, 4]
    record = json.loads((out / "calibration.json").read_text())
    for result in record["results"].values():
        assert result["held_out_error"] <= result["best_known_error"] or not result["fitted"]
    assert calibrate(tiny_folder, out, "--num_inference_steps", "5", "--guidance_scale", "4") == 2
    assert "calibrated with another guidance_scale" in capsys.readouterr().err


def test_a_pipeline_folder_carries_it_into_a_fresh_process(tiny_folder, tmp_path):
    """Diffusers opens the folder once the class is imported, and draws the same."""
    out = tmp_path / "plan"
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", "--save_pipeline") == 0
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.scheduler.tables.info["prediction_type"] == "epsilon"
    pipe.save_pretrained(tmp_path / "again")
    code = (
        "import sys, numpy, torch; from diffusers import DiffusionPipeline\n"
        "from diffalign.solvers import CalibratedScheduler\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "assert type(pipe.scheduler) is CalibratedScheduler, pipe.scheduler\n"
        "draw = dict(num_inference_steps=3, height=16, width=16, output_type='np')\n"
        "images = pipe('a', generator=torch.Generator().manual_seed(5), **draw).images\n"
        "numpy.save(sys.argv[2], images)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    draw = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np"}
    wanted = pipe("a", generator=torch.Generator().manual_seed(5), **draw).images
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), wanted)


def test_the_guidance_of_a_calibration_is_compared(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "plan"
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", "--save_pipeline") == 0
    pipe = StableDiffusionPipeline.from_pretrained(out)
    asked = []
    monkeypatch.setattr(type(pipe.scheduler), "check_guidance", lambda self, scale: asked.append(scale))
    generate(pipe, ["a"], [0], steps=3, guidance=1.0, height=16, width=16)
    own = CalibratedScheduler.from_config(pipe.scheduler.config, tables=pipe.scheduler.tables)
    generate(pipe, ["a"], [0], steps=3, guidance=9.0, scheduler=own, height=16, width=16)
    plain = UniPCScheduler.from_config(pipe.scheduler.config)
    generate(pipe, ["a"], [0], steps=3, guidance=2.0, scheduler=plain, height=16, width=16)
    assert asked == [1.0, 9.0]


def test_an_interrupted_fit_goes_on(tiny_folder, tmp_path, monkeypatch):
    from diffalign.solvers import selection

    done, whole = [], selection.calibrate

    def interrupted(problem, truth, starts, count, **options):
        if done:
            raise KeyboardInterrupt
        done.append(count)
        return whole(problem, truth, starts, count, **options)

    monkeypatch.setattr(selection, "calibrate", interrupted)
    out = tmp_path / "parts"
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", "4") == 130
    assert done == [3]
    first = CalibratedScheduler.from_pretrained(out, subfolder="scheduler").tables.of(3)
    monkeypatch.setattr(selection, "calibrate", whole)
    assert calibrate(tiny_folder, out, "--num_inference_steps", "3", "4") == 0
    tables = CalibratedScheduler.from_pretrained(out, subfolder="scheduler").tables
    assert (tables.of(3).weights == first.weights).all()
    assert 4 in tables.tables


def test_the_problem_is_the_pipelines_own(tiny_folder):
    """The converged solution, prompts and guidance are those of the pipeline, its times differentiable."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    config = CalibratePlanConfig(
        model=tiny_folder, samples=4, guidance_scale=3.0, resolution=16, prompts=["a", "b"]
    )
    problem = problem_of(load_adapter(pipe), ["a", "b"], config)
    truth = solve(problem, 30)
    from diffalign.pipelines.load import make_scheduler

    fine = make_scheduler("dpm-solver++", pipe.scheduler.config, solver_order=2, grid="logsnr")
    drawn = generate(
        pipe, ["a", "b", "a", "b"], [0, 1, 2, 3], steps=60, guidance=3.0, scheduler=fine, height=16, width=16
    )
    error = (drawn.latents - truth.end).norm() / truth.end.norm()
    assert error < 0.05
    x, t = problem.noise.clone(), torch.tensor(500.5, dtype=torch.float64, requires_grad=True)
    alpha, sigma = (torch.tensor(float(v)) for v in problem.schedule.alpha_sigma(500.5))
    problem.predict(x, t, alpha, sigma, slice(0, 4)).sum().backward()
    assert t.grad is not None
    assert t.grad != 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_inference_steps", "5", "5"], "different numbers"),
        (["--guidance_scale", "0.5"], "must be 1 or more"),
        (["--samples", "2"], "samples must be at least 4"),
        (["--trajectory", "-1"], "numbers from 0"),
    ],
)
def test_wrong_options_are_refused(tiny_folder, tmp_path, capsys, options, words):
    assert calibrate(tiny_folder, tmp_path / "x", *options) == 2
    assert words in capsys.readouterr().err
