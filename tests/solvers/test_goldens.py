"""Recorded outputs of the published implementations, and the exact solution of their test problem."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.solvers import (
    DDIMScheduler,
    DPMSolverPPScheduler,
    DPMSolverScheduler,
    GaussianMixture,
    NoiseSchedule,
    integrate,
    sample,
)
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.plan import compile_plan, execute

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_dpm_pndm"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "goldens.npz")
GRIDS = {"time_uniform": "time_uniform", "logSNR": "logsnr", "time_quadratic": "time_quadratic"}
SCHEDULERS = {"DPM-Solver": DPMSolverScheduler, "DPM-Solver++": DPMSolverPPScheduler}
ADAPTIVE = [c for c in INDEX["cases"] if c["method"] == "adaptive"]
FIXED = [c for c in INDEX["cases"] if c["family"] == "dpm" and c["method"] != "adaptive"]


def problem(name):
    """Mixture, guidance arguments, start noise, and scheduler options of a recorded problem."""
    spec = INDEX["problems"][name]
    mixture = GaussianMixture.random(spec["shape"], spread=spec["spread"], seed=spec["gmm_seed"])
    for field, array in (("means", mixture.means), ("stds", mixture.stds), ("weights", mixture.weights)):
        np.testing.assert_allclose(array, ARRAYS[f"{spec['gmm']}_{field}"], rtol=1e-14)
    guidance = spec["guidance"]
    arguments = {}
    if guidance:
        arguments = {"guidance_scale": guidance["scale"], "classes": guidance["class_per_sample"]}
    return (
        mixture,
        arguments,
        torch.from_numpy(ARRAYS[spec["x_T"]]),
        {"trained_betas": ARRAYS[spec["betas_array"]].tolist()},
    )


@pytest.mark.parametrize("case", FIXED, ids=lambda c: c["id"])
def test_dpm_solver(case):
    mixture, guidance, noise, betas = problem(case["problem"])
    thresholding = case["dynamic_thresholding"]
    multistep = case["method"] == "multistep"
    scheduler = SCHEDULERS[case["solver"]](
        **betas,
        solver_order=case["order"],
        solver_method="multistep" if multistep else "singlestep",
        solver_type={"dpmsolver": "midpoint", "taylor": "heun"}[case["solver_type"]],
        third_order="published",
        final_sigmas_type="sigma_min",
        denoise_to_zero=case["denoise_to_zero"],
        grid=GRIDS[case["skip_type"]],
        # The published multistep code lowers the order at the end below 10 steps; this class, like diffusers,
        # below 15.
        lower_order_final=case["lower_order_final"] and case["steps"] < 10
        if multistep
        else case["method"] == "singlestep",
        thresholding=thresholding is not None,
        dynamic_thresholding_ratio=thresholding["ratio"] if thresholding else 0.995,
        sample_min_value=thresholding["max_val"] if thresholding else 1.0,
        sample_max_value=math.inf,
    )
    model = mixture.model(scheduler.schedule, **guidance)
    expected = torch.from_numpy(ARRAYS[case["x0"]])
    evaluations = []

    def counted(x, t):
        evaluations.append(float(t))
        return model(x, t)

    result = sample(counted, noise, scheduler, timesteps=case["model_time_inputs"])
    assert result.dtype == torch.float64
    assert relative_error(result, expected) < 1e-6
    assert len(evaluations) == case["nfe"]
    np.testing.assert_allclose(evaluations, case["model_time_inputs"], rtol=1e-6)
    if case["t_start"] == 1.0:  # the named grid is the one of the recording
        scheduler.set_timesteps(case["nfe"])
        np.testing.assert_allclose(scheduler.timesteps, case["model_time_inputs"], rtol=1e-5, atol=1e-4)
    # What is left is the rounding of times to float32, in which networks are given them.
    exact = unrounded(scheduler, model, noise, case)
    assert relative_error(exact, expected) < 1e-11


def unrounded(scheduler, model, noise, case):
    """The plan at the recorded times to the last bit."""
    end = scheduler.schedule.t_clean if case["denoise_to_zero"] else 1000 * case["t_end"] - 1
    plan = scheduler._plan(np.append(case["model_time_inputs"], end))
    instructions, size = compile_plan(plan, scaled=False)
    slots = [None] * size
    transform = scheduler._transform if scheduler.config.thresholding else None
    x = noise
    for time, instruction in zip(plan.times, instructions, strict=True):
        x = execute(instruction, model(x, time), x, slots, transform=transform)
    return x


@pytest.mark.parametrize("case", ADAPTIVE, ids=lambda c: c["id"])
def test_adaptive(case):
    mixture, guidance, noise, betas = problem(case["problem"])
    schedule = NoiseSchedule.from_config(betas)
    name = {"DPM-Solver": "dpm-solver", "DPM-Solver++": "dpm-solver++"}[case["solver"]]
    method = {2: f"{name}-12", 3: f"{name}-23"}[case["order"]]
    evaluations = []

    def model(x, t):
        evaluations.append(float(t))
        return mixture.model(schedule, **guidance)(x, t)

    options = {"atol": case["atol"], "rtol": case["rtol"], "published": True, "t_end": 0.0}
    result = integrate(model, noise, schedule, method=method, **options)
    # The recording rounds the ratio of steps to float32.
    assert relative_error(result.sample, torch.from_numpy(ARRAYS[case["x0"]])) < 1e-8
    trials = result.accepted[0] + result.rejected[0]
    assert trials * case["order"] == case["nfe"]
    # It evaluates the start again after a rejection; here that is remembered.
    repeated = np.flatnonzero(np.diff(case["model_time_inputs"][:: case["order"]]) == 0) + 1
    assert len(repeated) == result.rejected[0]
    recorded = np.delete(case["model_time_inputs"], repeated * case["order"])
    np.testing.assert_allclose(evaluations, recorded, rtol=1e-6, atol=1e-6)


def test_ddim_of_the_pndm_code():
    """The recording evaluates the model one index below the state; the wrapper does likewise."""
    case = next(c for c in INDEX["cases"] if c["method"] == "DDIM")
    mixture, guidance, noise, betas = problem(case["problem"])
    scheduler = DDIMScheduler(**betas, set_alpha_to_one=False)
    model = mixture.model(scheduler.schedule, **guidance)
    states = [t + 1 for t in case["step_times"][:-1]]
    assert case["step_times"][-1] == -1  # whose state index is 0, the end for set_alpha_to_one=False
    offset = 1 - case["model_time_offset"]
    result = sample(lambda x, t: model(x, float(t) - offset), noise, scheduler, timesteps=states)
    assert relative_error(result, torch.from_numpy(ARRAYS[case["x0"]])) < 1e-6


@pytest.mark.parametrize("name", ["ddpm_u", "ddpm_cfg"])
def test_exact_solution(name):
    mixture, guidance, noise, betas = problem(name)
    schedule = NoiseSchedule.from_config(betas)
    exact = mixture.solve(noise, schedule, t_end=0.0, tolerance=1e-8, **guidance)
    assert relative_error(exact, torch.from_numpy(ARRAYS[INDEX["problems"][name]["reference"]])) < 1e-6
