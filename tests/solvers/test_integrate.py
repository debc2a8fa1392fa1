"""Integration with error control: published runs, tolerances that hold, and the ways out of a loop."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.errors import RunFailed, UserError
from diffalign.solvers import DPMSolverPPScheduler, GaussianMixture, NoiseSchedule, integrate, sample
from diffalign.solvers.exponential import Equation, Points, singlestep
from diffalign.solvers.integration import ADAPTIVE
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.prediction import convert


@pytest.fixture(scope="module")
def small(sd_betas):
    """A mixture of 32 coordinates, its schedule, three noises, and the exact solution at the first step."""
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    schedule = NoiseSchedule.from_config(sd_betas)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return mixture, schedule, noise, mixture.solve(noise, schedule, t_end=0.0, tolerance=1e-10)


def per_image(mixture, schedule, **options):
    """The ideal network for one time per image."""
    network = mixture.model(schedule, **options)
    return lambda x, t: torch.cat([network(x[i : i + 1], t[i]) for i in range(len(x))])


class Counted:
    def __init__(self, network):
        self.network, self.times = network, []

    def __call__(self, x, t):
        self.times.append(float(t))
        return self.network(x, t)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_smaller_tolerances_give_smaller_errors(small, method, control):
    mixture, schedule, noise, exact = small
    network = mixture.model(schedule) if control == "batch" else per_image(mixture, schedule)
    errors, costs = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        result = integrate(
            network,
            noise,
            schedule,
            method=method,
            t_end=0.0,
            atol=tolerance,
            rtol=tolerance,
            control=control,
        )
        errors.append(relative_error(result.sample, exact))
        costs.append(result.evaluations)
    assert errors[0] < 0.1
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_cost_is_counted_and_a_rejected_step_keeps_its_first_evaluation(small, method):
    mixture, schedule, noise, _ = small
    network = Counted(mixture.model(schedule))
    result = integrate(network, noise, schedule, method=method)
    order = ADAPTIVE[method].order
    (accepted,), (rejected,) = result.accepted, result.rejected
    assert rejected > 0
    # One more at the end, for the clean image.
    assert result.evaluations == len(network.times) == order * accepted + (order - 1) * rejected + 1
    assert network.times[0] == schedule.t_max
    assert network.times[-1] == schedule.t_min
    assert result.error is None


def test_images_with_their_own_steps_do_not_depend_on_the_batch(small):
    mixture, schedule, noise, _ = small
    network = per_image(mixture, schedule)
    together = integrate(network, noise, schedule, control="sample")
    for i in range(3):
        alone = integrate(network, noise[i : i + 1], schedule, control="sample")
        torch.testing.assert_close(together.sample[i : i + 1], alone.sample, rtol=1e-12, atol=1e-12)
        assert together.accepted[i] == alone.accepted[0]
        assert together.rejected[i] == alone.rejected[0]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_reference_knows_its_error(small, prediction):
    mixture, schedule, noise, exact = small
    network = mixture.model(schedule, prediction_type=prediction)
    result = integrate(
        network,
        noise,
        schedule,
        method="reference",
        prediction_type=prediction,
        t_end=0.0,
        rtol=1e-6,
        atol=1e-6,
    )
    actual = [relative_error(a, b) for a, b in zip(result.sample, exact, strict=True)]
    assert max(actual) < 1e-5
    for truth, estimate in zip(actual, result.error, strict=True):
        assert truth < estimate < 1e-3


def test_reference_at_the_clean_image_is_the_limit_of_a_scheduler(small, sd_betas):
    mixture, schedule, noise, _ = small
    result = integrate(mixture.model(schedule), noise, schedule, method="reference", rtol=1e-6, atol=1e-6)
    scheduler = DPMSolverPPScheduler(**sd_betas, solver_order=3, grid="logsnr")
    fine = sample(mixture.model(schedule), noise, scheduler, num_inference_steps=300)
    assert relative_error(fine, result.sample) < 1e-5


def test_flow_models_start_where_alpha_is_zero():
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    schedule = NoiseSchedule.flow()
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"prediction_type": "flow_prediction"}
    network = mixture.model(schedule, **options)
    begin = float(schedule.t_of_lambda(-12.0))
    exact = mixture.solve(noise, schedule, t_start=begin, t_end=1.0, tolerance=1e-9)
    reference = integrate(network, noise, schedule, method="reference", t_end=1.0, **options)
    assert relative_error(reference.sample, exact) < 1e-4  # they start e^-12 apart
    for method in ADAPTIVE:
        result = integrate(
            network, noise, schedule, method=method, t_end=1.0, rtol=1e-3, atol=1e-3, **options
        )
        assert relative_error(result.sample, exact) < 0.02
    own = per_image(mixture, schedule, **options)
    assert torch.isfinite(integrate(own, noise, schedule, control="sample", **options).sample).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_network_sees_the_dtype_of_the_noise(small, dtype):
    mixture, schedule, noise, _ = small
    seen = set()

    def network(x, t):
        seen.add(x.dtype)
        return mixture.model(schedule)(x, t)

    result = integrate(network, noise.to(dtype), schedule)
    assert seen == {result.sample.dtype} == {dtype}
    double = integrate(mixture.model(schedule), noise, schedule)
    assert relative_error(result.sample, double.sample) < 0.05


def test_learned_variance_is_left_out(small):
    mixture, schedule, noise, _ = small
    network = mixture.model(schedule)
    plain = integrate(network, noise, schedule)
    both = integrate(lambda x, t: torch.cat([network(x, t), x], 1), noise, schedule)
    assert torch.equal(plain.sample, both.sample)


def test_a_constant_data_prediction_is_one_long_step(small):
    """Both orders are exact then: the error is 0, and the steps grow as fast as they may."""
    _, schedule, noise, _ = small
    constant = torch.full_like(noise, 0.3)
    for published, steps in ((False, 5), (True, 3)):
        result = integrate(
            lambda x, t: constant, noise, schedule, prediction_type="sample", published=published
        )
        torch.testing.assert_close(result.sample, constant)
        assert result.accepted[0] <= steps
        assert result.rejected == (0,)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_one_step_is_that_of_the_singlestep_method(small, method, solver_type):
    """Over less than the first step's length, with both orders agreeing, the higher one is the result."""
    mixture, schedule, noise, _ = small
    model, pair = mixture.model(schedule), ADAPTIVE[method]
    start, end = 700.0, 690.0
    low, high = (float(schedule.lambda_(t)) for t in (start, end))
    assert 0.03 < high - low < 0.05
    stages = schedule.t_of_lambda([low + (high - low) * u for u in pair.stages])
    points = Points.at(schedule, [start, *stages, end])
    equation = Equation(pair.form)
    rule = {"midpoint": "midpoint", "heun": "taylor"}[solver_type]
    updates = singlestep(points, equation, [pair.order], solver_type=rule)
    x, xs, ms = noise, [], []
    for time, update in zip([start, *stages], updates, strict=True):
        xs.append(x)
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(time))
        ms.append(convert(model(x, time), x, alpha, sigma, source="epsilon", to=pair.form))
        x = sum(c * xs[j] for j, c in update.x.items()) + sum(c * ms[j] for j, c in update.m.items())
    options = {"method": method, "t_start": start, "t_end": end, "solver_type": solver_type}
    result = integrate(model, noise, schedule, **options)
    assert (result.accepted, result.rejected) == ((1,), (0,))
    assert relative_error(result.sample, x) < 1e-12
    other = integrate(model, noise, schedule, **options | {"solver_type": "heun"})
    assert (relative_error(other.sample, x) > 1e-9) == (solver_type == "midpoint")


def test_a_network_that_is_not_finite_ends_the_run(small):
    _, schedule, noise, _ = small

    def network(x, t):
        return x * (math.nan if float(t) < 500 else 0.1)

    for method in ("dpm-solver++-12", "dpm-solver-23", "reference"):
        with pytest.raises(RunFailed, match="not finite near t = "):
            integrate(network, noise, schedule, method=method)


def test_a_network_without_a_derivative_ends_the_run(small):
    _, schedule, noise, _ = small
    generator = torch.Generator().manual_seed(0)

    def network(x, t):
        return 100 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    with pytest.raises(RunFailed, match=r"no step meets the tolerance near t = 999"):
        integrate(network, noise, schedule, rtol=1e-12, atol=1e-12)


def test_too_many_evaluations_end_the_run(small):
    mixture, schedule, noise, _ = small
    with pytest.raises(RunFailed, match="20 evaluations led to"):
        integrate(mixture.model(schedule), noise, schedule, rtol=1e-8, atol=1e-8, max_evaluations=20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "dpm-solver-13"}, "did you mean"),
        ({"control": "image"}, "unknown control"),
        ({"prediction_type": "noise"}, "unknown prediction type"),
        ({"method": "reference", "control": "sample"}, "one step for the batch"),
        ({"atol": 0.0}, "atol must be at least"),
        ({"rtol": math.nan}, "rtol at least"),
        ({"t_end": -1.0}, "t_start and t_end must fall"),
        ({"t_start": 5.0, "t_end": 10.0}, "t_start and t_end must fall"),
        ({"t_start": 2000.0}, "at most 999"),
    ],
)
def test_bad_arguments_are_refused(small, arguments, words):
    mixture, schedule, noise, _ = small
    with pytest.raises(UserError, match=words):
        integrate(mixture.model(schedule), noise, schedule, **arguments)


def test_float32_tolerances_are_those_of_float32(small):
    mixture, schedule, noise, exact = small
    with pytest.raises(UserError, match="for float32 samples"):
        integrate(mixture.model(schedule), noise.float(), schedule, atol=1e-9)
    result = integrate(mixture.model(schedule), noise.float(), schedule, method="reference", t_end=0.0)
    assert relative_error(result.sample, exact) < 1e-3
    assert result.sample.dtype == torch.float32


def test_gradients_reach_the_noise(small):
    mixture, schedule, noise, _ = small
    x = noise[:1].clone().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    network = mixture.model(schedule)
    options = {"method": "reference", "rtol": 1e-6, "atol": 1e-6}
    integrate(network, x, schedule, **options).sample.sum().backward()
    with torch.no_grad():
        ends = [integrate(network, noise[:1] + s * direction, schedule, **options) for s in (1e-4, -1e-4)]
    difference = float((ends[0].sample.sum() - ends[1].sample.sum()) / 2e-4)
    assert float((x.grad * direction).sum()) == pytest.approx(difference, rel=2e-3)


def test_times_stay_between_the_start_and_the_end(small):
    mixture, schedule, noise, _ = small
    network = Counted(mixture.model(schedule))
    integrate(network, noise, schedule, method="dpm-solver++-12", t_start=700.0, t_end=50.0)
    assert network.times[0] == max(network.times) == 700.0
    assert min(network.times) > 50.0
