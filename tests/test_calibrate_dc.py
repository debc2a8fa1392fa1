"""``diffalign calibrate dc`` on a tiny pipeline, and the network it searches with."""

from __future__ import annotations

import json

import pytest
import torch

from diffalign import cli
from diffalign.bench.networks import tiny_pipeline
from diffalign.calibrate.guided import guided_model, guided_network, starting_noise
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.pipelines.generate import generate
from diffalign.solvers import DCSolverScheduler, UniPCScheduler, sample
from diffalign.solvers.dc_search import DCRatios, search_dc_ratios
from diffalign.solvers.dc_solver import cascade_ratios


@pytest.fixture
def sd_schedule():
    return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def calibrate(tiny_folder, out, *more):
    base = ["calibrate", "dc", "--model", tiny_folder, "--output_dir", str(out), "--device", "cpu"]
    base += ["--samples", "4", "--reference_steps", "10", "--evaluations", "3", "--resolution", "16"]
    return cli.main([*base, *more])


def test_ratios_are_found_stored_and_loaded(tiny_folder, tmp_path, capsys):
    out = tmp_path / "dc"
    options = ["--prompts", "a", "b", "--num_inference_steps", "4", "5", "--grid", "time_uniform"]
    assert calibrate(tiny_folder, out, *options, "--guidance_scale", "3", "--solver_order", "3") == 0
    shown = capsys.readouterr().out
    assert "held-out loss" in shown
    assert 'subfolder="scheduler"' in shown
    record = json.loads((out / "calibration.json").read_text())
    scheduler = DCSolverScheduler.from_pretrained(out, subfolder="scheduler")
    assert (scheduler.config.solver_order, scheduler.config.grid) == (3, "time_uniform")
    assert scheduler.config.guidance_scale == 3.0
    for n, result in zip((4, 5), record["results"], strict=True):
        assert result["num_inference_steps"] == n
        assert result["held_out_after"] <= result["held_out_before"]
        scheduler.set_timesteps(n)
        assert scheduler.ratios == result["ratios"]
    assert calibrate(tiny_folder, out, *options, "--guidance_scale", "3") == 2  # in use
    assert "is not empty" in capsys.readouterr().err


def test_an_interrupted_search_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    from diffalign.calibrate import dc
    from diffalign.solvers import dc_search

    options = ["--prompts", "a", "--num_inference_steps", "3", "4", "--guidance_scale", "1"]
    assert calibrate(tiny_folder, tmp_path / "whole", *options) == 0
    searched, search = [], dc_search.search_dc_ratios

    def interrupted(*args, num_inference_steps, **kwargs):
        if len(searched) == 1:
            raise KeyboardInterrupt
        searched.append(num_inference_steps)
        return search(*args, num_inference_steps=num_inference_steps, **kwargs)

    monkeypatch.setattr(dc_search, "search_dc_ratios", interrupted)
    assert calibrate(tiny_folder, tmp_path / "parts", *options) == 130
    assert not (tmp_path / "parts" / "scheduler").exists()
    monkeypatch.setattr(
        dc_search,
        "search_dc_ratios",
        lambda *a, **k: searched.append(k["num_inference_steps"]) or search(*a, **k),
    )
    assert calibrate(tiny_folder, tmp_path / "parts", *options) == 0
    assert searched == [3, 4]
    whole, parts = (
        json.loads((tmp_path / name / dc.RECORD).read_text())["results"] for name in ("whole", "parts")
    )
    assert whole == parts
    assert calibrate(tiny_folder, tmp_path / "parts", *options, "--samples", "6") == 2
    assert "other settings" in capsys.readouterr().err


def test_a_network_that_overflows_is_refused(sd_schedule):
    scheduler = DCSolverScheduler(**sd_schedule)
    with pytest.raises(UserError, match="converged solution of this network is not finite"):
        search_dc_ratios(
            lambda x, t: x * (float("nan") if t < 300 else 1.0),
            scheduler,
            torch.randn(2, 4, 8, 8),
            num_inference_steps=4,
        )


def test_a_polynomial_through_three_scales_and_a_whole_pipeline(tiny_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "dc"
    options = ["--prompts", "a", "--num_inference_steps", "3", "4", "5", "--guidance_scale", "1", "2", "4"]
    assert calibrate(tiny_folder, out, *options, "--save_pipeline", "--predictor", "ddim") == 0
    record = json.loads((out / "calibration.json").read_text())
    assert len(record["results"]) == 9
    scheduler = StableDiffusionPipeline.from_pretrained(out).scheduler
    assert type(scheduler) is DCSolverScheduler
    scheduler.set_timesteps(6, guidance_scale=3.0)
    cascade = record["cascade"]
    expected = cascade_ratios(cascade["coefficients"], 6, 3.0, last=cascade["last"], hull=cascade["hull"])
    assert scheduler.ratios == pytest.approx(expected)
    assert cascade["hull"] == [3.0, 5.0, 1.0, 4.0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_search_sees_what_the_pipeline_runs(scale):
    """Same prompts, seeds and scheduler: the pipeline's latents, whatever the batch."""
    pipe = tiny_pipeline()
    adapter = load_adapter(pipe)
    prompts, seeds = ["a", "b", "c"], [5, 6, 7]
    scheduler = UniPCScheduler.from_config(pipe.scheduler.config)
    model = guided_model(guided_network(adapter, prompts, guidance_scale=scale), range(3), batch_size=2)
    with torch.no_grad():
        ours = sample(model, starting_noise(adapter, seeds), scheduler, num_inference_steps=4)
    theirs = generate(pipe, prompts, seeds, steps=4, guidance=scale, scheduler=scheduler).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_loss_in_the_record_is_that_of_the_pipeline():
    """What the search calls better brings the pipeline nearer to its converged image."""
    pipe = tiny_pipeline()
    adapter = load_adapter(pipe)
    scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, grid="time_uniform")
    model = guided_model(guided_network(adapter, ["a"] * 4, guidance_scale=2.0), range(4))
    found: DCRatios = search_dc_ratios(
        model, scheduler, starting_noise(adapter, range(4)), num_inference_steps=5, reference_steps=60
    )
    compensated = DCSolverScheduler.from_config(scheduler.config, dc_ratios=found.ratios)
    exact = UniPCScheduler.from_config(pipe.scheduler.config, solver_order=3, grid="logsnr")
    drawn = {
        name: generate(pipe, ["a"] * 4, range(4), steps=n, guidance=2.0, scheduler=s).latents
        for name, s, n in (("exact", exact, 60), ("dc", compensated, 5), ("plain", scheduler, 5))
    }
    losses = {
        name: float((drawn[name] - drawn["exact"])[2:].double().square().mean()) for name in ("dc", "plain")
    }
    assert losses["plain"] == pytest.approx(found.held_out_before, rel=0.05)
    assert losses["dc"] == pytest.approx(found.held_out_after, rel=0.05)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--num_inference_steps", "2"], "must be above --dc_order 2"),
        (["--num_inference_steps", "5", "5"], "different numbers"),
        (["--guidance_scale", "1", "2"], "give at least 3 of --guidance_scale"),
        (["--guidance_scale", "0.5"], "--guidance_scale must be 1 or more"),
        (["--resolution", "21"], "the resolution must be a multiple of"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--reference_steps", "9"], "is no yardstick for 5 steps"),
        (["--solver_order", "9"], "solver_order must be 1, 2, 3 or 4"),
        (["--grid", "karas"], "did you mean 'karras'"),
        (["--predictor", "euler"], "--predictor takes one of unipc"),
        (["--model", "./nowhere"], "no model at './nowhere'"),
    ],
)
def test_bad_input_is_refused(tiny_folder, tmp_path, capsys, args, part):
    base = ["--prompts", "a", "--num_inference_steps", "4", "5"]
    assert calibrate(tiny_folder, tmp_path / "out", *base, *args) == 2
    assert part in capsys.readouterr().err


def test_models_other_than_the_playgrounds_need_prompts(tiny_folder, tmp_path, capsys):
    assert calibrate(tiny_folder, tmp_path / "out", "--num_inference_steps", "4") == 2
    assert "no prompts" in capsys.readouterr().err
