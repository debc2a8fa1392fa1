"""Models with the noise of EDM, in the coordinates that their networks see: against diffusers and exact
solutions."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS, GaussianMixture, sample
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import convert, training_target

NAMES = [name for name in SOLVERS if name != "time-shift"]
PLAYGROUND = diffusers.EDMDPMSolverMultistepScheduler()
COSXL = diffusers.EDMEulerScheduler(
    sigma_data=1.0, sigma_max=120.0, prediction_type="v_prediction", sigma_schedule="exponential"
)
VIDEO = diffusers.EulerDiscreteScheduler(
    timestep_type="continuous",
    sigma_min=0.002,
    sigma_max=700.0,
    prediction_type="v_prediction",
    use_karras_sigmas=True,
)
MODELS = {"playground-v2.5": PLAYGROUND, "cosxl": COSXL, "stable-video": VIDEO}


@pytest.fixture(scope="module")
def mixture():
    return GaussianMixture.random((2, 4, 4), spread=0.5, seed=1)


def theirs_on(scheduler, network, noise, steps):
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(shown, t), t, x, return_dict=False)[0]
    return x


# ---------------------------------------------------------------- noise and predictions


@given(level=st.floats(0.002, 80.0), data=st.floats(0.1, 2.0), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_state_is_what_the_network_is_shown(level, data, seed):
    schedule = NoiseSchedule.edm(sigma_data=data)
    theirs = diffusers.EDMEulerScheduler(sigma_data=data)
    x0, z, output = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 1, 2, 3)))
    noisy = x0 + level * z
    t = theirs.precondition_noise(torch.tensor(level, dtype=torch.float64)).item()
    alpha, sigma = schedule.alpha_sigma(t)
    shown = alpha * x0 + sigma * z
    torch.testing.assert_close(shown, theirs.precondition_inputs(noisy, torch.tensor(level)))
    denoised = theirs.precondition_outputs(noisy, output, torch.tensor(level, dtype=torch.float64))
    ours = convert(output, shown, alpha, sigma, source="edm", to="sample")
    torch.testing.assert_close(ours, denoised, rtol=1e-8, atol=1e-8)
    # The target is the output of which the preconditioning makes the clean image.
    target = training_target("edm", x0, z, alpha, sigma)
    torch.testing.assert_close(
        theirs.precondition_outputs(noisy, target, torch.tensor(level, dtype=torch.float64)),
        x0,
        rtol=1e-8,
        atol=1e-8,
    )
    assert schedule.sigma_diffusers(t) == pytest.approx(level)


def test_float32_tensors_keep_the_noisy_end_exact():
    """There ``1 - sigma^2`` is 4e-5, of which float32 levels would leave three digits."""
    schedule = NoiseSchedule.edm()
    alpha, sigma = (torch.as_tensor(v).reshape(1) for v in schedule.alpha_sigma(schedule.t_max))
    x0, z = torch.randn(2, 1, 64, dtype=torch.float64)
    exact = training_target("edm", x0, z, alpha, sigma)
    single = training_target("edm", x0.float(), z.float(), alpha, sigma)
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)


def test_with_unit_data_the_output_is_the_velocity_turned_round():
    schedule = NoiseSchedule.edm(sigma_data=1.0)
    alpha, sigma = schedule.alpha_sigma(np.linspace(schedule.t_min, schedule.t_max, 50))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    x0, z = np.random.default_rng(0).standard_normal((2, 50))
    v = training_target("v_prediction", x0, z, alpha, sigma)
    np.testing.assert_allclose(training_target("edm", x0, z, alpha, sigma), -v, atol=1e-10)


# ---------------------------------------------------------------- schedulers


@pytest.mark.parametrize("model", MODELS)
def test_the_first_order_solver_on_their_grid_is_euler(model, mixture):
    """EDM's Euler method is DDIM, as a step along the ODE between two noise levels."""
    theirs = MODELS[model]
    if model == "playground-v2.5":
        theirs = diffusers.EDMEulerScheduler.from_config(theirs.config)
    ours = SOLVERS["dpm-solver++"].from_config(theirs.config, solver_order=1, grid="diffusers")
    network = mixture.model(ours.schedule, prediction_type=ours.prediction)
    noise = torch.randn(4, 2, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    expected = theirs_on(theirs, network, noise, 8)
    found = sample(network, noise, ours, num_inference_steps=8)
    # Theirs starts a ten-thousandth louder than the model's noise is, and has its levels in float32.
    assert relative_error(found, expected) < 1e-3
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=1e-4)


def test_second_order_on_their_grid_is_their_solver(mixture):
    ours = SOLVERS["dpm-solver++"].from_config(PLAYGROUND.config, grid="diffusers")
    network = mixture.model(ours.schedule, prediction_type="edm")
    noise = torch.randn(4, 2, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    expected = theirs_on(PLAYGROUND, network, noise, 15)
    found = sample(network, noise, ours, num_inference_steps=15)
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_solver_reaches_the_solution(name, model, mixture):
    ours = SOLVERS[name].from_config(MODELS[model].config)
    network = mixture.model(ours.schedule, prediction_type=ours.prediction)
    noise = torch.randn(4, 2, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    exact = mixture.solve(noise, ours.schedule, tolerance=1e-9)
    errors = [
        relative_error(sample(network, noise, ours, num_inference_steps=steps), exact) for steps in (15, 120)
    ]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < (0.03 if name == "ddim" else 0.005)


def test_the_default_grid_beats_theirs(mixture):
    ours = SOLVERS["dpm-solver++"].from_config(PLAYGROUND.config)
    network = mixture.model(ours.schedule, prediction_type="edm")
    noise = torch.randn(16, 2, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    exact = mixture.solve(noise, ours.schedule, tolerance=1e-9)
    error = relative_error(sample(network, noise, ours, num_inference_steps=20), exact)
    assert error < 0.7 * relative_error(theirs_on(PLAYGROUND, network, noise, 20), exact)


@pytest.mark.parametrize("name", NAMES)
def test_configs_come_in_are_saved_and_go_back(name, tmp_path):
    ours = SOLVERS[name].from_config(PLAYGROUND.config)
    ours.save_pretrained(tmp_path)
    again = SOLVERS[name].from_pretrained(tmp_path)
    assert again.schedule == ours.schedule == NoiseSchedule.edm()
    assert again.prediction == "edm"
    assert SOLVERS["unipc"].from_config(again.config).schedule == ours.schedule
    back = diffusers.EDMDPMSolverMultistepScheduler.from_config(again.config)
    for option in ("sigma_min", "sigma_max", "sigma_data", "prediction_type"):
        assert back.config[option] == PLAYGROUND.config[option]


def test_noising_is_in_the_units_of_the_pipeline():
    ours = SOLVERS["unipc"].from_config(PLAYGROUND.config)
    ours.set_timesteps(10)
    x0, z = torch.randn(2, 1, 4, 4, 4)
    level = math.exp(4 * float(ours.timesteps[3]))
    noisy = ours.add_noise(x0, z, ours.timesteps[3:4])
    torch.testing.assert_close(noisy, (x0 + level * z) / math.hypot(level, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sigma_data": 0.5}, "noise levels that are neither"),
        ({"sigma_data": 0.5, "sigma_min": 1.0, "sigma_max": 0.1}, "sigma_min < sigma_max"),
        ({"sigma_data": -1.0, "sigma_min": 0.1, "sigma_max": 1.0}, "sigma_data must be above 0"),
    ],
)
def test_bad_levels_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        NoiseSchedule.from_config(config)


def test_what_no_edm_model_has_is_refused():
    config = dict(PLAYGROUND.config)
    with pytest.raises(UserError, match="needs sigma_data = 1"):
        SOLVERS["unipc"].from_config(config, prediction_type="v_prediction")
    with pytest.raises(UserError, match="counts in training steps"):
        SOLVERS["time-shift"].from_config(config)
    with pytest.raises(UserError, match="ends at the clean image"):
        SOLVERS["unipc"].from_config(config, final_sigmas_type="sigma_min").set_timesteps(5)
