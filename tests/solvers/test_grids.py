"""Grids: their points, and the ones of diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.solvers import grids
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
    last = [grids.auto_times(SD, n, order=2, final="zero", start=SD.t_max)[-2] for n in (5, 8, 12, 20, 60)]
    assert (np.diff(last) < 0).all()
    assert last[-1] == 0
    offsets = np.array([-0.25, -0.25, -0.25 + 0.55 * 4 / 7, 0.3])
    np.testing.assert_allclose(SD.lambda_(last[:4]), np.log([5, 8, 12, 20]) + offsets, atol=1e-6)
