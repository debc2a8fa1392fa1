"""Orders of accuracy on the analytic problem, and what the default grid is worth there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffalign.solvers import DDIMScheduler, DPMSolverPPScheduler, GaussianMixture, sample
from diffalign.solvers.mixture import relative_error

STEPS = (40, 80, 160)


@pytest.fixture(scope="module")
def small(sd_betas):
    """A mixture of 32 coordinates, four noises, and the exact solution down to the first training step."""
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    schedule = DPMSolverPPScheduler(**sd_betas).schedule
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return mixture, noise, mixture.solve(noise, schedule, t_end=0.0, tolerance=1e-9)


def slope(scheduler, mixture, noise, exact, **model):
    network = mixture.model(scheduler.schedule, **model)
    errors = [relative_error(sample(network, noise, scheduler, num_inference_steps=n), exact) for n in STEPS]
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("order", "options", "least", "most"),
    [
        (1, {}, 0.95, 1.1),
        (2, {}, 1.9, 2.3),
        (2, {"solver_type": "heun"}, 1.9, 2.4),
        (3, {}, 2.8, 3.4),
        (3, {"third_order": "published"}, 1.6, 2.4),
    ],
)
def test_order_on_the_lambda_grid(small, sd_betas, order, options, least, most):
    scheduler = DPMSolverPPScheduler(
        **sd_betas, solver_order=order, grid="logsnr", final_sigmas_type="sigma_min", **options
    )
    assert least <= slope(scheduler, *small) <= most


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_order_does_not_depend_on_what_the_network_predicts(small, sd_betas, kind):
    scheduler = DPMSolverPPScheduler(**sd_betas, solver_order=2, grid="logsnr", final_sigmas_type="sigma_min")
    scheduler.register_to_config(prediction_type=kind)
    assert slope(scheduler, *small, prediction_type=kind) > 1.9


def test_ddim_is_the_first_order_solver(small, sd_betas):
    mixture, noise, exact = small
    ddim = DDIMScheduler(**sd_betas, grid="logsnr", set_alpha_to_one=False)
    assert 0.95 <= slope(ddim, mixture, noise, exact) <= 1.1
    first = DPMSolverPPScheduler(**sd_betas, solver_order=1, grid="logsnr", final_sigmas_type="sigma_min")
    model = mixture.model(ddim.schedule)
    a, b = (sample(model, noise, s, num_inference_steps=12) for s in (ddim, first))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_flow_schedule_converges(small):
    """Second order on a flow schedule as well; it starts where alpha is 0, at x = noise."""
    mixture, noise, _ = small
    scheduler = DPMSolverPPScheduler(prediction_type="flow_prediction", final_sigmas_type="sigma_min")
    start = 990.0
    exact = mixture.solve(noise, scheduler.schedule, t_start=start, t_end=1.0, tolerance=1e-8)
    network = mixture.model(scheduler.schedule, prediction_type="flow_prediction")
    lambdas = scheduler.schedule.lambda_([start, 1.0])
    errors = []
    for n in STEPS:
        times = scheduler.schedule.t_of_lambda(np.linspace(*lambdas, n + 1))[:-1]
        errors.append(relative_error(sample(network, noise, scheduler, timesteps=times), exact))
    assert -np.polyfit(np.log(STEPS), np.log(errors), 1)[0] > 1.9


@pytest.mark.parametrize("guidance", [None, 7.5])
@pytest.mark.parametrize(("steps", "factor"), [(6, 2.0), (10, 4.0), (20, 6.0)])
def test_default_options_beat_the_defaults_of_diffusers(sd_betas, guidance, steps, factor):
    mixture = GaussianMixture.random((4, 8, 8))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = DPMSolverMultistepScheduler(**sd_betas)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    arguments = {} if guidance is None else {"guidance_scale": guidance, "classes": [1] * 4}
    exact = mixture.solve(noise, ours.schedule, tolerance=1e-7, **arguments)
    model = mixture.model(ours.schedule, **arguments)
    error, other = (
        relative_error(sample(model, noise, s, num_inference_steps=steps), exact) for s in (ours, theirs)
    )
    assert error * factor < other


def test_zero_terminal_snr_and_cosine_schedules_reach_the_solution(small):
    """Schedules that start at alpha = 0 or nearly so: the error falls with the number of steps."""
    mixture, noise, _ = small
    for options in ({"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}):
        scheduler = DPMSolverPPScheduler(prediction_type="v_prediction", **options)
        model = mixture.model(scheduler.schedule, prediction_type="v_prediction")
        fine = sample(model, noise, scheduler, num_inference_steps=160)
        coarse = [sample(model, noise, scheduler, num_inference_steps=n) for n in (10, 40)]
        errors = [relative_error(x, fine) for x in coarse]
        assert errors[1] < 0.02
        assert errors[1] < errors[0] / 3
