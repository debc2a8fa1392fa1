"""The ODE followed upwards: the noise that an image comes from, and the way back."""

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from diffalign.errors import UserError
from diffalign.solvers import (
    DPMSolverPPScheduler,
    DPMSolverScheduler,
    GaussianMixture,
    NoiseSchedule,
    sample,
)
from diffalign.solvers.inversion import follow
from diffalign.solvers.mixture import relative_error


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "flow_prediction"])
def problem(request, sd_betas):
    """Kind, schedule, its ideal network, and the images and noise that belong together from time 5 to 900."""
    kind = request.param
    schedule = NoiseSchedule.flow() if kind == "flow_prediction" else NoiseSchedule.from_config(sd_betas)
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    network = mixture.model(schedule, prediction_type=kind)
    noisy = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images = mixture.solve(noisy, schedule, t_start=900.0, t_end=5.0, tolerance=1e-10)
    return kind, schedule, network, images, noisy


def grid(steps):
    return 5 + 895 * np.linspace(0, 1, steps + 1) ** 2


@pytest.mark.parametrize("order", [1, 2])
def test_an_image_leads_to_its_noise_and_back_at_the_order_of_the_solver(problem, order):
    kind, schedule, network, images, noisy = problem
    there, back = [], []
    for steps in (30, 60, 120):
        up = follow(network, images, schedule, grid(steps), prediction_type=kind, order=order)
        down = follow(network, up, schedule, grid(steps)[::-1], prediction_type=kind, order=order)
        there.append(relative_error(up, noisy))
        back.append(relative_error(down, images))
    for errors in (there, back):
        assert np.log2(errors[0] / errors[2]) / 2 > order - 0.35, errors


def test_a_step_of_first_order_is_diffusers_ddim_inversion(sd_betas):
    inverse = DDIMInverseScheduler(**{**sd_betas, "clip_sample": False, "timestep_spacing": "leading"})
    inverse.set_timesteps(10)
    x, output = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = int(inverse.timesteps[3])
    expected = inverse.step(output, t, x).prev_sample  # from 100 training steps below
    ours = follow(lambda y, _: output, x, NoiseSchedule.from_config(sd_betas), [t - 100, t], order=1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("third_order", ["taylor", "published"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("cls", [DPMSolverScheduler, DPMSolverPPScheduler])
def test_downwards_it_is_the_multistep_scheduler(sd_betas, cls, solver_type, third_order):
    options = {"solver_type": solver_type, "third_order": third_order, "lower_order_final": True}
    scheduler = cls(**sd_betas, solver_order=3, final_sigmas_type="sigma_min", grid="time_uniform", **options)
    network = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1).model(scheduler.schedule)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    expected = sample(network, x, scheduler, num_inference_steps=7)
    times = [*scheduler.timesteps.tolist(), 0.0]
    result = follow(network, x, scheduler.schedule, times, order=3, form=cls.form, **options)
    assert relative_error(result, expected) < 1e-12


@pytest.mark.parametrize("form", ["epsilon", "sample"])
def test_third_order_leads_to_the_noise_too(problem, form):
    kind, schedule, network, images, noisy = problem
    grid = schedule.t_of_lambda(np.linspace(schedule.lambda_(5.0), schedule.lambda_(900.0), 81))
    errors = [
        relative_error(
            follow(network, images, schedule, grid, prediction_type=kind, order=order, form=form), noisy
        )
        for order in (1, 2, 3)
    ]
    assert errors[0] > 3 * errors[1] > 6 * errors[2], errors


def test_each_time_but_the_last_is_asked_once(problem):
    kind, schedule, network, images, _ = problem
    asked, ends = [], []

    def counted(x, t):
        asked.append(float(t))
        return network(x, t)

    follow(counted, images, schedule, grid(4), prediction_type=kind, callback=lambda: ends.append(len(asked)))
    assert asked == pytest.approx(grid(4)[:-1].tolist())
    assert ends == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("times", "options", "match"),
    [
        ([5.0], {}, "two or more times"),
        ([5.0, 9.0, 7.0], {}, "rise, or fall, all the way"),
        ([5.0, 9.0], {"order": 4}, "order must be 1, 2 or 3"),
        ([5.0, 9.0], {"form": "v_prediction"}, "unknown form"),
        ([5.0, 9.0], {"solver_type": "huen"}, "did you mean 'heun'"),
        ([5.0, 9.0], {"third_order": "halved"}, "unknown third_order"),
        ([0.0, 500.0], {}, "pure noise or to the clean image"),
        ([500.0, 1000.0], {}, "pure noise or to the clean image"),
    ],
)
def test_ways_that_cannot_be_gone_are_refused(times, options, match):
    with pytest.raises(UserError, match=match):
        follow(lambda x, t: x, torch.zeros(1, 2), NoiseSchedule.flow(), times, **options)
