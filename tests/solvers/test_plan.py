"""The kernel against the formula it stands for, with every kind of row that the methods need."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.solvers import DDIMScheduler, DPMSolverPPScheduler
from diffalign.solvers.phi import phis
from diffalign.solvers.plan import Plan, Row, bind, compile_plan, execute

SHAPE = (2, 3, 4)


def straightforward(plan, start, outputs, noises):
    """The module's formula, with everything kept."""
    x, m = [start], []
    for e, row in enumerate(plan.rows):
        m.append(row.convert[0] * x[e] + row.convert[1] * outputs[e])
        total = sum(c * x[j] for j, c in row.x.items()) + sum(c * m[j] for j, c in row.m.items())
        total = total + sum(c * noises[j] for j, c in row.z.items())
        x.append(total if row.bias is None else total + row.bias)
    return x[-1]


def kernel(plan, start, outputs, noises, **options):
    instructions, size = compile_plan(plan, **options)
    bound = bind(instructions, torch.from_numpy(start))
    slots: list = [None] * size
    x = torch.from_numpy(start)
    for i, output, noise in zip(bound, outputs, noises, strict=True):
        x = execute(i, torch.from_numpy(output), x, slots, torch.from_numpy(noise) if i.draws else None)
    return x.numpy(), size


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), arrays=st.booleans(), scaled=st.booleans())
def test_any_plan(seed, rows, arrays, scaled):
    """Random tables: skipped history, re-read anchors and noises, per-coordinate weights, bias."""
    rng = np.random.default_rng(seed)

    def weight():
        if arrays and rng.random() < 0.4:
            return rng.standard_normal(SHAPE[1:])
        return float(rng.standard_normal())

    def terms(e, chance):
        return {j: weight() for j in range(e + 1) if rng.random() < chance}

    plan = Plan(
        tuple(
            Row(
                time=float(rows - e),
                convert=(weight(), weight()),
                x={e: weight(), **terms(e, 0.3)},
                m=terms(e, 0.5),
                z=terms(e, 0.3),
                bias=rng.standard_normal(SHAPE[1:]) if arrays and rng.random() < 0.5 else None,
            )
            for e in range(rows)
        )
    )
    start = rng.standard_normal(SHAPE)
    outputs, noises = rng.standard_normal((2, rows, *SHAPE))
    result, _ = kernel(plan, start, outputs, noises, scaled=scaled)
    np.testing.assert_allclose(result, straightforward(plan, start, outputs, noises), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("order", "slots"), [(1, 0), (2, 2), (3, 3)])
def test_history_is_no_longer_than_needed(order, slots):
    scheduler = DPMSolverPPScheduler(solver_order=order)
    scheduler.set_timesteps(20)
    instructions, size = compile_plan(scheduler.plan)
    assert size == slots
    # The step to the clean image is of first order, so the last but one prediction isn't kept either.
    assert all((i.keep_m is None) == (order == 1 or e >= 18) for e, i in enumerate(instructions))
    # Nothing but multiply-adds of the sample, the output and the history.
    assert not any(i.draws or i.keep_x is not None for i in instructions)


def test_row_sums_make_constant_data_exact():
    """sigma_t/sigma_s and the weights of the data predictions keep x = alpha c + sigma z for a constant c."""
    for order in (1, 2, 3):
        scheduler = DPMSolverPPScheduler(solver_order=order, prediction_type="sample")
        scheduler.set_timesteps(11)
        alpha, sigma = scheduler.schedule.alpha_sigma(scheduler._times)
        sums = scheduler.plan.table().sum(1)
        x = np.array([row.x[e] for e, row in enumerate(scheduler.plan.rows)])
        np.testing.assert_allclose(x * alpha[:-1] + sums, alpha[1:], atol=1e-14)
        np.testing.assert_allclose(x * sigma[:-1], sigma[1:], atol=1e-14)


def test_bad_plans_are_refused():
    good = {"time": 1.0, "convert": (1.0, -1.0), "x": {0: 1.0}, "m": {}}
    with pytest.raises(ValueError, match="cannot know"):
        Plan((Row(**{**good, "m": {1: 1.0}}),))
    with pytest.raises(ValueError, match="not finite"):
        Plan((Row(**{**good, "m": {0: math.nan}}),))
    with pytest.raises(ValueError, match="cannot convert"):
        Plan((Row(**{**good, "convert": (math.inf, 0.0)}),))


@settings(max_examples=100, deadline=None)
@given(step=st.floats(-30, 5).filter(lambda h: abs(h) > 1e-12))
def test_phi_functions(step):
    """phi_{k}/H = int_0^1 e^{(1-u) H} u^{k-1}/(k-1)! du, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, w = (nodes + 1) / 2, weights / 2
    for k, value in enumerate(phis(step, 4), start=1):
        integral = np.sum(w * np.exp((1 - u) * step) * u ** (k - 1)) / math.factorial(k - 1)
        assert value == pytest.approx(step * integral, rel=1e-9)


def test_phi_at_the_clean_end():
    assert phis(-math.inf, 3) == (-1.0, -1.0, -0.5)
    np.testing.assert_allclose(phis(-1e9, 3), phis(-math.inf, 3), atol=1e-8)


def test_history_in_float32_around_half_precision():
    """The kept prediction is float32 even when samples and outputs are half."""
    scheduler = DPMSolverPPScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 2, 3).half()
    scheduler.step(x, scheduler.timesteps[0], x)
    assert [s.dtype for s in scheduler._slots if s is not None] == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "make", [lambda: DPMSolverPPScheduler(solver_order=3), lambda: DDIMScheduler(eta=1.0)]
)
def test_large_tensors_in_blocks_give_the_same_numbers(make, dtype):
    """Block by block, the last one short, or all at once (with gradients on): not a bit differs."""
    x, output, z = torch.randn(3, 1, 2**18 + 77).to(dtype)
    results = []
    for gradients in (False, True):
        scheduler = make()
        scheduler.set_timesteps(5)
        y = x
        with torch.set_grad_enabled(gradients):
            for t in scheduler.timesteps:
                before = y.clone()
                made = scheduler.step(output, t, y, variance_noise=z, return_dict=False)[0]
                assert torch.equal(y, before)
                y = made
        results.append(y)
    assert results[0].dtype == dtype
    assert torch.equal(*results)
