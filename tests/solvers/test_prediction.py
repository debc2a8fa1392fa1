"""The conversion table: round trips, identities and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers.prediction import PREDICTIONS, coefficients, convert, training_target

KINDS = sorted(PREDICTIONS)


@settings(max_examples=40, deadline=None)
@given(
    source=st.sampled_from(KINDS),
    to=st.sampled_from(KINDS),
    angle=st.floats(0.05, 1.5),
    flow=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_prediction_becomes_every_other(source, to, angle, flow, seed):
    sigma = angle / 1.6 if flow else np.sin(angle)
    alpha = 1 - sigma if flow else np.cos(angle)
    x0, noise = np.random.default_rng(seed).standard_normal((2, 3, 4))
    x = alpha * x0 + sigma * noise
    value = training_target(source, x0, noise, alpha, sigma)
    expected = training_target(to, x0, noise, alpha, sigma)
    np.testing.assert_allclose(convert(value, x, alpha, sigma, source=source, to=to), expected, atol=1e-10)
    # Plain floats and tensors go the same way.
    number = convert(value[0, 0], x[0, 0], alpha, sigma, source=source, to=to)
    assert number == pytest.approx(expected[0, 0], abs=1e-10)
    tensor = convert(torch.from_numpy(value), torch.from_numpy(x), alpha, sigma, source=source, to=to)
    np.testing.assert_allclose(tensor, expected, atol=1e-10)


def test_definitions():
    x0, z, alpha, sigma = 2.0, 3.0, 0.8, 0.6
    assert training_target("epsilon", x0, z, alpha, sigma) == z
    assert training_target("sample", x0, z, alpha, sigma) == x0
    assert training_target("v_prediction", x0, z, alpha, sigma) == pytest.approx(alpha * z - sigma * x0)
    assert training_target("flow_prediction", x0, z, 0.4, 0.6) == z - x0


@pytest.mark.parametrize(("source", "to"), list(itertools.product(KINDS, KINDS)))
def test_levels_per_sample(source, to):
    alpha = torch.tensor([0.3, 0.9])
    sigma = (1 - alpha**2).sqrt()
    value, x = torch.randn(2, 2, 3, 5)[:, :, None]
    both = convert(value, x, alpha, sigma, source=source, to=to)
    for i in range(2):
        one = convert(value[i : i + 1], x[i : i + 1], float(alpha[i]), float(sigma[i]), source=source, to=to)
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_in_float32(dtype):
    value, x = torch.randn(2, 4, 8).to(dtype).split(2)[0]
    result = convert(value, x, 0.068, 0.998, source="epsilon", to="sample")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (x.float() - 0.998 * value.float()) / 0.068, rtol=1e-5, atol=1e-5)
    assert convert(value.double(), x.double(), 0.5, 0.5, source="epsilon", to="sample").dtype == torch.float64


def test_the_same_kind_is_returned_exactly():
    value = torch.randn(3, 4)
    huge = torch.full_like(value, 1e30)
    assert torch.equal(convert(value, huge, 0.1, 0.9, source="sample", to="sample"), value)


def test_gradients_flow_through_both_inputs():
    value, x = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda v, s: convert(v, s, 0.6, 0.8, source="v_prediction", to="sample"), (value, x)
    )


def test_impossible_and_unknown_conversions_are_refused():
    with pytest.raises(UserError, match="no sample can be had from epsilon"):
        coefficients("epsilon", "sample", 0.0, 1.0)
    with pytest.raises(UserError, match="no epsilon can be had from sample"):
        convert(1.0, 1.0, 1.0, 0.0, source="sample", to="epsilon")
    with pytest.raises(UserError, match="did you mean 'v_prediction'"):
        coefficients("v_predicton", "sample", 0.5, 0.5)
    with pytest.raises(UserError, match="unknown prediction type"):
        training_target("noise", 1.0, 1.0, 0.5, 0.5)
