"""Grids: their points, and the ones of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.solvers import DPMSolverPPScheduler, GaussianMixture, grids, integrate, sample
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.noise import NoiseSchedule

SD = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
FLOW = NoiseSchedule.flow()
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


def points(name, schedule=SD, count=9, final="sigma_min"):
    return grids.named_times(schedule, name, count, final=final, start=schedule.t_max)


@pytest.mark.parametrize("schedule", [SD, FLOW, COSINE], ids=["sd", "flow", "cosine"])
@pytest.mark.parametrize("name", [*grids.LOG_GRIDS, *grids.TIME_GRIDS])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_ends_and_order(schedule, name, final):
    times = points(name, schedule, final=final)
    assert len(times) == 10
    assert times[0] == schedule.t_max
    assert times[-1] == (schedule.t_clean if final == "zero" else schedule.t_min)
    assert (np.diff(times) < 0).all()


def test_what_each_grid_is_uniform_in():
    def even(values):
        return np.ptp(np.diff(values)) < 1e-9 * np.ptp(values)

    assert even(SD.lambda_(points("logsnr")))
    assert even(points("time_uniform"))
    assert even(np.sqrt(points("time_quadratic") + 1))
    assert even(SD.sigma_diffusers(points("karras")) ** (1 / 7))
    assert even(np.log(SD.sigma_diffusers(points("exponential"))))
    np.testing.assert_allclose(points("exponential"), points("logsnr"), atol=1e-7)
    np.testing.assert_array_equal(points("edm"), points("karras"))
    beta = points("beta")
    np.testing.assert_allclose(beta, 999 - beta[::-1], atol=1e-8)  # symmetric, dense at both ends
    assert beta[0] - beta[1] < 999 / 9


def test_flow_shift():
    times = grids.flow_times(FLOW, 4, final="zero", shift=3.0)
    np.testing.assert_allclose(times / 1000, [1, 0.9, 0.75, 0.5, 0])
    stretched = grids.flow_times(FLOW, 4, final="zero", shift=3.0, shift_terminal=0.1)
    assert stretched[-2] / 1000 == pytest.approx(0.1)
    assert stretched[0] == 1000


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 13, 14, 18, 50, 200])
@pytest.mark.parametrize("schedule", [SD, COSINE], ids=["sd", "cosine"])
def test_auto(schedule, count, order):
    for final in ("zero", "sigma_min"):
        times = grids.auto_times(schedule, count, order=order, final=final, start=schedule.t_max)
        assert len(times) == count + 1
        assert times[0] == schedule.t_max
        assert (np.diff(times) < 0).all()
    if count >= 18:  # log-SNR throughout, up to log n plus the order's constant
        last = schedule.lambda_(times[-1])
        assert last == pytest.approx(schedule.lambda_(schedule.t_min))


def test_auto_ends_closer_to_the_image_with_more_steps():
    last = [grids.auto_times(SD, n, order=2, final="zero", start=SD.t_max)[-2] for n in (5, 8, 12, 20, 30)]
    assert (np.diff(last) < 0).all()
    assert last[-1] == 0  # 3.8 lies beyond the last training step
    np.testing.assert_allclose(SD.lambda_(last[:4]), [1.36, 2.2, 3.08, 3.4], atol=1e-6)


def test_power_lies_between_uniform_log_snr_and_uniform_sigma():
    flat = grids.power(SD, SD.t_max, 9, 3.0, 0.0)
    np.testing.assert_allclose(flat, grids.logsnr(SD, SD.t_max, 9, 3.0))
    middle = [grids.power(SD, SD.t_max, 9, 3.0, bend)[4] for bend in (0.0, 1 / 14, 1 / 7, 1.0)]
    assert (np.diff(middle) > 0).all()


@pytest.mark.parametrize(
    ("steps", "guidance", "against_default", "against_best"),
    [
        (8, None, 2.0, 2.5),
        (10, None, 3.0, 1.5),
        (10, 7.5, 1.5, 1.5),
        (20, None, 5.0, 2.0),
        (20, 7.5, 3.0, 2.0),
    ],
)
def test_auto_against_diffusers_grids(steps, guidance, against_default, against_best):
    """One mixture that the tables were not fitted to; ``docs/grids.md`` has the whole matrix."""
    mixture = GaussianMixture.random((4, 8, 8), seed=11)
    classes = [i % 3 for i in range(48)]
    noise = torch.randn(48, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = mixture.model(SD, guidance_scale=guidance, classes=classes if guidance else None)
    exact = integrate(model, noise, SD, method="reference", rtol=1e-6, atol=1e-6).sample

    def error(**options):
        scheduler = DPMSolverPPScheduler.from_config(SD_SCHEDULER, **options)
        return relative_error(sample(model, noise, scheduler, num_inference_steps=steps), exact)

    ours = error()
    theirs = [
        error(grid="diffusers"),
        *(error(grid="diffusers", **{flag: True}) for flag in ("use_karras_sigmas", "use_lu_lambdas")),
    ]
    assert theirs[0] / ours > against_default
    assert ours / min(theirs) < against_best
