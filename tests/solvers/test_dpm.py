"""DPM-Solver and DPM-Solver++: orders, the noise of the SDEs, the evaluations of a step, and the ends."""

from __future__ import annotations

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from diffalign.errors import UserError
from diffalign.solvers import (
    DDIMScheduler,
    DPMSolverPPScheduler,
    DPMSolverScheduler,
    GaussianMixture,
    NoiseSchedule,
    sample,
)
from diffalign.solvers.exponential import RULES, interpolation, singlestep_orders, split_ends
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.phi import phis
from diffalign.solvers.plan import compile_plan, execute

BOTH = pytest.mark.parametrize("cls", [DPMSolverScheduler, DPMSolverPPScheduler])
METHODS = ("multistep", "singlestep")
SDE = "sde-dpmsolver++"


def network(x, t):
    """A smooth stand-in for a network, in the dtype of x."""
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


# ---------------------------------------------------------------- orders


@pytest.fixture(scope="module")
def smooth():
    """A mixture of wide components, whose solvers are in their asymptotic range from 100 steps on."""
    means = 0.5 * np.random.default_rng(0).standard_normal((3, 6))
    return GaussianMixture(means, np.array([0.5, 0.6, 0.7]), np.array([0.3, 0.3, 0.4]), np.arange(3), (6,))


@pytest.fixture(scope="module")
def start():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module")
def drifts(smooth, start, sd_betas):
    """By the rate of the noise: the solution of the SDE's drift, what is left of it when no noise is added.

    ``dx/dlambda = -(alpha^2 + eta) x + (1 + eta) alpha x0(x)``; eta = 0 is the probability-flow ODE.
    """
    schedule = NoiseSchedule.from_config(sd_betas)

    def solve(eta):
        def slope(lambda_, y):
            alpha, sigma = (float(v) for v in schedule.alpha_sigma(schedule.t_of_lambda(lambda_)))
            data, _ = smooth.posterior(torch.from_numpy(y.reshape(start.shape)), alpha, sigma)
            return -(alpha**2 + eta) * y + (1 + eta) * alpha * data.numpy().reshape(-1)

        span = schedule.lambda_([schedule.t_max, schedule.t_min])
        solution = solve_ivp(slope, span, start.numpy().reshape(-1), method="DOP853", rtol=1e-11, atol=1e-11)
        return torch.from_numpy(solution.y[:, -1].reshape(start.shape))

    return {eta: solve(eta) for eta in (0.0, 1.0)}


def lambda_grid(schedule, count, extra):
    """Uniform in lambda; `extra` short steps first, because the warm-up of low order would show later."""
    first, last = schedule.lambda_([schedule.t_max, schedule.t_min])
    lambdas = np.linspace(first, last, count + 1)
    short = 0.05 * (lambdas[1] - first) ** 2
    return schedule.t_of_lambda(np.insert(lambdas, 1, [first + short * (i + 1) for i in range(extra)]))


def run_plan(scheduler, times, model, x, noises=None):
    """The plan at `times` to the last bit, which the network usually gets rounded to float32."""
    plan = scheduler._plan(times)
    instructions, size = compile_plan(plan)
    slots = [None] * size
    for e, (time, instruction) in enumerate(zip(plan.times, instructions, strict=True)):
        x = execute(instruction, model(x, time), x, slots, None if noises is None else noises[e])
    return x


@BOTH
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]
)
def test_order_of_every_form(smooth, start, drifts, sd_betas, cls, eta, method, order, kind):
    scheduler = cls(
        **sd_betas,
        solver_order=order,
        solver_type=kind,
        solver_method=method,
        algorithm_type=SDE,
        sde_eta=eta,
        s_noise=0.0,
        lower_order_final=False,
    )
    model = smooth.model(scheduler.schedule)
    errors = []
    for count in (120, 240):
        times = lambda_grid(scheduler.schedule, count, order - 1 if method == "multistep" else 0)
        errors.append(relative_error(run_plan(scheduler, times, model, start), drifts[eta]))
    assert math.log2(errors[0] / errors[1]) >= order - 0.15


@BOTH
def test_published_third_order_is_of_second(smooth, start, drifts, sd_betas, cls):
    scheduler = cls(**sd_betas, solver_order=3, third_order="published", lower_order_final=False)
    model = smooth.model(scheduler.schedule)
    errors = [
        relative_error(run_plan(scheduler, lambda_grid(scheduler.schedule, n, 2), model, start), drifts[0.0])
        for n in (120, 240)
    ]
    assert 1.8 <= math.log2(errors[0] / errors[1]) <= 2.3


@settings(max_examples=60, deadline=None)
@given(
    step=st.floats(-4, 4).filter(lambda h: abs(h) > 1e-3),
    r=st.lists(st.sampled_from([-2.5, -1.1, -0.4, 0.3, 0.5, 0.9]), min_size=0, max_size=2, unique=True),
)
def test_weights_integrate_polynomials_exactly(step, r):
    """``int_0^1 H e^{(1-u) H} D(u) du`` for every polynomial D through that many points."""
    fractions = [0.0, *r]
    weights = interpolation(fractions, RULES["taylor"](*phis(step, 3)))
    nodes, quadrature = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) / 2
    for power in range(len(fractions)):
        integral = np.sum(quadrature / 2 * step * np.exp((1 - u) * step) * u**power)
        value = sum(w * f**power for w, f in zip(weights, fractions, strict=True))
        assert value == pytest.approx(integral, rel=1e-9, abs=1e-12)


def test_first_order_is_ddim_in_every_form(sd_betas):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ddim = sample(network, x, DDIMScheduler(**sd_betas, grid="karras"), num_inference_steps=9)
    for cls, method in itertools.product((DPMSolverScheduler, DPMSolverPPScheduler), METHODS):
        scheduler = cls(**sd_betas, grid="karras", solver_order=1, solver_method=method)
        result = sample(network, x, scheduler, num_inference_steps=9)
        torch.testing.assert_close(result, ddim, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- noise


def propagated(plan, first, prediction):
    """(n + 1, 1 + 1 + n) weights of start noise, constant and drawn noises in the samples of a linear run.

    `prediction` makes ``m_e`` of ``x_e``.
    """
    count = len(plan.rows)
    x, m = [first], []
    for e, row in enumerate(plan.rows):
        m.append(prediction(e, x[e]))
        after = sum(c * x[j] for j, c in row.x.items()) + sum(c * m[j] for j, c in row.m.items())
        for j, c in row.z.items():
            after = after + c * np.eye(count + 2)[2 + j]
        x.append(after)
    return np.array(x)


options_of_sde = given(
    eta=st.floats(0.05, 2.0),
    order=st.integers(1, 3),
    method=st.sampled_from(METHODS),
    count=st.integers(1, 9),
    final=st.sampled_from(["zero", "sigma_min"]),
)


@settings(max_examples=60, deadline=None)
@options_of_sde
def test_data_form_noise_is_exact_for_one_image(eta, order, method, count, final):
    """For data that is one point c the marginals are N(alpha c, sigma^2) at every evaluation, and the
    correlation of any two, stages included, is that of the process: ``e^{-eta |lambda - lambda'|}``."""
    scheduler = DPMSolverPPScheduler(
        algorithm_type=SDE, sde_eta=eta, solver_order=order, solver_method=method, final_sigmas_type=final
    )
    scheduler.set_timesteps(count)
    alpha, sigma = scheduler.schedule.alpha_sigma(scheduler._times)
    lambda_ = scheduler.schedule.lambda_(scheduler._times)
    constant = np.eye(count + 2)[1]
    first = sigma[0] * np.eye(count + 2)[0] + alpha[0] * constant
    x = propagated(scheduler.plan, first, lambda e, x: constant)
    np.testing.assert_allclose(x[:, 1], alpha, rtol=1e-10)
    noise = np.delete(x, 1, axis=1)
    with np.errstate(invalid="ignore"):
        expected = np.outer(sigma, sigma) * np.exp(-eta * np.abs(lambda_[:, None] - lambda_))
    expected[np.isnan(expected)] = 0.0  # the clean end
    np.testing.assert_allclose(noise @ noise.T, expected, rtol=1e-9, atol=1e-14)


@settings(max_examples=60, deadline=None)
@options_of_sde
def test_noise_form_noise_is_exact_for_a_constant_prediction(eta, order, method, count, final):
    """``x / alpha`` is then a Brownian motion in ``e^{-2 lambda}``: increments are independent, with variance
    ``eta (e^{-2 lambda} - e^{-2 lambda'})``."""
    scheduler = DPMSolverScheduler(
        algorithm_type=SDE, sde_eta=eta, solver_order=order, solver_method=method, final_sigmas_type=final
    )
    scheduler.set_timesteps(count)
    alpha = scheduler.schedule.alpha(scheduler._times)
    lambda_ = scheduler.schedule.lambda_(scheduler._times)
    constant = np.eye(count + 2)[1]
    x = propagated(scheduler.plan, np.zeros(count + 2), lambda e, x: constant)
    steps = count if final == "sigma_min" else count - 1  # the step to the clean image adds no noise
    noise = (x[: steps + 1] / alpha[: steps + 1, None])[:, 2:]
    increments = np.diff(noise, axis=0)
    variance = eta * -np.diff(np.exp(-2 * lambda_[: steps + 1]))
    np.testing.assert_allclose(
        increments @ increments.T, np.diag(variance), rtol=1e-8, atol=1e-9 * noise.size
    )
    if final == "zero":
        assert not scheduler.plan.rows[-1].z


@BOTH
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_variance_of_gaussian_data_is_reached(sd_betas, cls, method, order):
    """Data N(0, 1/4) and its ideal network: the variance of the samples tends to alpha^2/4 + sigma^2."""
    scheduler = cls(
        **sd_betas,
        algorithm_type=SDE,
        solver_order=order,
        solver_method=method,
        grid="logsnr",
        final_sigmas_type="sigma_min",
    )
    errors = []
    for count in (30, 240):
        scheduler.set_timesteps(count)
        alpha, sigma = scheduler.schedule.alpha_sigma(scheduler._times)
        variance = 0.25 * alpha**2 + sigma**2
        gain = sigma / variance if scheduler.form == "epsilon" else 0.25 * alpha / variance
        first = math.sqrt(variance[0]) * np.eye(count + 2)[0]
        x = propagated(scheduler.plan, first, lambda e, x, gain=gain: gain[e] * x)
        errors.append(abs(float(x[-1] @ x[-1]) / variance[-1] - 1))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 6


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_noise_of_image_i_does_not_depend_on_the_batch(cls, method):
    x = torch.randn(3, 4, 4, 4)
    scheduler = cls(algorithm_type=SDE, solver_method=method)

    def run(x, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return sample(network, x, scheduler, num_inference_steps=7, generator=generators)

    together = run(x, [5, 6, 7])
    torch.testing.assert_close(together[1:2], run(x[1:2], [6]))
    assert not torch.equal(together, run(x, [8, 9, 10]))


@BOTH
@pytest.mark.parametrize("options", [{"sde_eta": 0.0}, {"s_noise": 0.0}])
def test_no_noise_is_drawn_where_none_is_used(cls, options):
    scheduler = cls(algorithm_type=SDE, **options)
    scheduler.set_timesteps(6)
    assert not any(row.z for row in scheduler.plan.rows)
    if "sde_eta" in options:
        x = torch.randn(1, 4, 4, 4)
        runs = [sample(network, x, s, num_inference_steps=6) for s in (scheduler, cls())]
        assert torch.equal(*runs)


@pytest.mark.parametrize("cls", [DPMSolverScheduler, DPMSolverPPScheduler])
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_sde_steps_are_those_of_diffusers(sd_betas, cls, order, kind):
    """At the orders that are right there: its third order has a wrong sign, or no branch."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        **sd_betas,
        solver_order=order,
        solver_type=kind,
        algorithm_type="sde-dpmsolver++" if cls is DPMSolverPPScheduler else "sde-dpmsolver",
        final_sigmas_type="sigma_min",
    )
    ours = cls.from_config(theirs.config, grid="diffusers")
    assert ours.config.algorithm_type == theirs.config.algorithm_type
    x = y = torch.randn(2, 4, 8, 8)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
    for t in theirs.timesteps[:10]:
        noise = torch.randn(2, 4, 8, 8)
        x = theirs.step(network(x, t), t, x, variance_noise=noise, return_dict=False)[0]
        y = ours.step(network(y, t), t, y, variance_noise=noise, return_dict=False)[0]
        assert relative_error(y, x) < 1e-4


# ---------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    ("count", "order", "final", "expected"),
    [
        (3, 3, True, [2, 1]),
        (9, 3, True, [3, 3, 2, 1]),
        (10, 3, True, [3, 3, 3, 1]),
        (11, 3, True, [3, 3, 3, 2]),
        (9, 3, False, [3, 3, 3]),
        (10, 3, False, [3, 3, 3, 1]),
        (1, 3, True, [1]),
        (2, 3, True, [2]),
        (10, 2, True, [2] * 5),
        (11, 2, True, [2, 2, 2, 2, 2, 1]),
        (4, 1, True, [1] * 4),
    ],
)
def test_evaluations_are_shared_out_as_published(count, order, final, expected):
    assert singlestep_orders(count, order, lower_order_final=final) == expected


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_infinite_steps_have_order_one(orders, first, last):
    split = split_ends(orders, first=first, last=last)
    assert sum(split) == sum(orders)
    assert not first or split[0] == 1
    assert not last or split[-1] == 1
    assert min(split) >= 1


@BOTH
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["auto", "diffusers", "time_uniform"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"rescale_betas_zero_snr": True}, {"prediction_type": "flow_prediction"}],
    ids=["vp", "zero-snr", "flow"],
)
def test_every_combination_has_finite_plans_of_exact_length(cls, method, grid, kind):
    """All orders, ends, ODE and SDE, from every place to begin; a plan refuses what is not finite."""
    for order, final, denoise, name in itertools.product(
        (1, 2, 3), ("zero", "sigma_min"), (False, True), ("dpmsolver++", SDE)
    ):
        scheduler = cls(
            **kind,
            solver_order=order,
            solver_method=method,
            grid=grid,
            final_sigmas_type=final,
            denoise_to_zero=denoise,
            algorithm_type=name,
        )
        for count in (1, 2, 3, 7):
            scheduler.set_timesteps(count)
            assert scheduler.num_inference_steps == len(scheduler.timesteps) == count
            for begin in range(count % 2, count, 2):
                scheduler.set_begin_index(begin)
                assert len(scheduler.plan.rows) == count - begin
            # A denoising last evaluation, and any step to the clean image, returns the data prediction.
            assert (float(scheduler.sigmas[-1]) == 0.0) >= (denoise or final == "zero")


@BOTH
@pytest.mark.parametrize("begin", range(8))
def test_a_singlestep_run_may_begin_anywhere(sd_betas, cls, begin):
    """What is left is shared out anew; the same as a run over those times alone."""
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    scheduler = cls(**sd_betas, solver_method="singlestep", solver_order=3)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(begin)
    times = scheduler.timesteps[begin:].tolist()
    y = x
    for t in times:
        y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
    assert torch.equal(y, sample(network, x, scheduler, timesteps=times))


def test_stages_lie_evenly_in_log_snr(sd_betas):
    for grid in ("logsnr", "karras"):
        scheduler = DPMSolverPPScheduler(
            **sd_betas, solver_method="singlestep", solver_order=3, grid=grid, final_sigmas_type="sigma_min"
        )
        scheduler.set_timesteps(11)
        lambda_ = scheduler.schedule.lambda_(scheduler._times)
        gaps = np.diff(lambda_)
        for step in (gaps[0:3], gaps[3:6], gaps[6:9], gaps[9:11]):
            np.testing.assert_allclose(step, step[0], rtol=1e-3)
    # The steps, not the evaluations, are uniform.
    scheduler = DPMSolverPPScheduler(
        **sd_betas, solver_method="singlestep", solver_order=3, grid="logsnr", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(9)
    lambda_ = scheduler.schedule.lambda_(scheduler._times)
    steps = np.diff(lambda_[[0, 3, 6, 8, 9]])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


def test_a_stage_keeps_no_more_than_the_step_needs():
    scheduler = DPMSolverPPScheduler(solver_method="singlestep", solver_order=2)
    scheduler.set_timesteps(20)
    instructions, size = compile_plan(scheduler.plan)
    assert size == 2  # the step's start and the prediction there
    assert [i.keep_x is not None for i in instructions[:4]] == [True, False, True, False]


@BOTH
def test_denoise_to_zero_is_one_of_the_evaluations(sd_betas, cls):
    seen = []

    def counted(x, t):
        seen.append(float(t))
        return network(x, t)

    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    denoised = cls(**sd_betas, grid="logsnr", denoise_to_zero=True, lower_order_final=False)
    result = sample(counted, x, denoised, num_inference_steps=8)
    assert len(seen) == 8
    assert seen[-1] == denoised.schedule.t_min
    # On this grid the clean end has its last evaluation there anyway.
    plain = cls(**sd_betas, grid="logsnr", lower_order_final=False)
    torch.testing.assert_close(result, sample(network, x, plain, num_inference_steps=8), rtol=1e-9, atol=1e-9)
    # The last of times that are passed is the one that denoises.
    denoised.set_timesteps(timesteps=[900, 500, 20])
    assert denoised.timesteps.tolist() == [900, 500, 20]
    assert float(denoised.sigmas[-1]) == 0.0


# ---------------------------------------------------------------- ends, thresholding, options


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_the_step_to_the_clean_image_returns_the_data_prediction(cls, method):
    scheduler = cls(prediction_type="sample", solver_method=method, solver_order=3)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    for t in scheduler.timesteps:
        output = torch.randn_like(x)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("maximum", [1.0, 3.0, math.inf])
def test_thresholding_of_noise_predictions_is_that_of_data(sd_betas, method, maximum):
    """At first order, where both forms are the same method, they are the same thresholded too."""
    options = {
        **sd_betas,
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": maximum,
        "solver_order": 1,
        "solver_method": method,
    }
    x = 2 * torch.randn(2, 4, 8, 8, dtype=torch.float64)
    a, b = (
        sample(network, x, cls(**options), num_inference_steps=6)
        for cls in (DPMSolverScheduler, DPMSolverPPScheduler)
    )
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert a.abs().max() <= 1.0
    for order in (2, 3):
        scheduler = DPMSolverScheduler(**{**options, "solver_order": order})
        assert torch.isfinite(sample(network, x, scheduler, num_inference_steps=6)).all()


def test_both_bounds_of_dynamic_thresholding():
    x = torch.linspace(-4.8, 4.8, 101).reshape(1, 1, -1)

    def thresholded(**bounds):
        scheduler = DPMSolverPPScheduler(thresholding=True, dynamic_thresholding_ratio=1.0, **bounds)
        return float(scheduler._transform(x, x).max())

    # The published code's max_val is a lower bound of the divisor; diffusers' sample_max_value an upper one.
    assert thresholded(sample_min_value=20.0, sample_max_value=math.inf) == pytest.approx(0.24)
    assert thresholded(sample_max_value=math.inf) == pytest.approx(1.0)
    assert thresholded() == thresholded(sample_max_value=2.0) == 1.0
    for bad in ({"sample_min_value": 20.0}, {"sample_min_value": 0.0}):
        with pytest.raises(UserError, match="sample_max_value=inf"):
            DPMSolverPPScheduler(**bad)


@BOTH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver_order": 4}, "solver_order must be 1, 2 or 3"),
        ({"solver_type": "taylor"}, "midpoint, heun"),
        ({"solver_method": "single"}, "did you mean 'singlestep'"),
        ({"third_order": "fixed"}, "unknown third_order"),
        ({"final_sigmas_type": "one"}, "unknown final_sigmas_type"),
        ({"algorithm_type": "deis"}, "unknown algorithm_type"),
        ({"sde_eta": -0.1}, "sde_eta must be"),
        ({"s_noise": math.nan}, "s_noise must be"),
    ],
)
def test_bad_options_are_refused(cls, options, words):
    with pytest.raises(UserError, match=words):
        cls(**options)


@BOTH
@pytest.mark.parametrize(
    ("name", "options", "stochastic"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            False,
        ),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, False),
        ("DEISMultistepScheduler", {}, False),
        ("UniPCMultistepScheduler", {"solver_order": 4}, False),
    ],
)
def test_configs_of_the_family(cls, name, options, stochastic):
    """The class says which prediction is integrated; a config, whether noise is added."""
    theirs = getattr(diffusers, name)(**options)
    ours = cls.from_config(theirs.config)
    assert ours.config.algorithm_type.startswith("sde-") == stochastic
    assert ours.config.solver_order == min(theirs.config.solver_order, 3)
    ours.set_timesteps(5)
    assert any(row.z for row in ours.plan.rows) == stochastic
    assert type(theirs).from_config(ours.config).config.solver_order == ours.config.solver_order


def test_noise_form_configs_load_in_diffusers():
    """Theirs refuses its own name of the noise form at the clean end, so there the config has the other."""
    for final in ("zero", "sigma_min"):
        ours = DPMSolverScheduler(algorithm_type="dpmsolver", final_sigmas_type=final)
        theirs = diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
        assert theirs.config.algorithm_type == ("dpmsolver++" if final == "zero" else "dpmsolver")
        again = DPMSolverScheduler.from_config(theirs.config)
        again.set_timesteps(5)
        ours.set_timesteps(5)
        np.testing.assert_array_equal(again.plan.table(), ours.plan.table())
