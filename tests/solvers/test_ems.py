"""The estimator of l, s and b: recorded values, a Gaussian in closed form, sums that add and resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.solvers import NoiseSchedule
from diffalign.solvers.ems import Derivatives, Sums, _row_moments, estimate

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_v3_dc_ts"
PROBLEM = np.load(FOLDER / "problem.npz")
SCHEDULE = NoiseSchedule.vp_linear()


def levels(t):
    """alpha and sigma of SCHEDULE, differentiable in t."""
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))


def mixture_network(scale):
    means, stds, weights, labels = (
        torch.from_numpy(PROBLEM[k]) for k in ("means", "stds", "weights", "labels")
    )

    def eps(x, t, classes):
        alpha, sigma = levels(t)
        variance = alpha**2 * stds**2 + sigma**2
        centred = x.reshape(len(x), 1, -1) - alpha * means
        logits = weights.log() - 32 * variance.log() - centred.square().sum(-1) / (2 * variance)
        if classes is not None:
            logits = logits.masked_fill(labels != classes[:, None], -torch.inf)
        return (sigma * ((logits.softmax(-1) / variance)[..., None] * centred).sum(1)).reshape(x.shape)

    def network(x, t, items):
        free = eps(x, t, None)
        return free if scale is None else free + scale * (eps(x, t, items % 3) - free)

    return network


@pytest.mark.parametrize(("case", "scale"), [(0, None), (1, 7.5)])
def test_recorded_estimates(case, scale):
    """Given points and probes; the recording is of float64."""
    recorded = np.load(FOLDER / f"ems_est_{case}.npz")
    rule = Derivatives(mixture_network(scale), SCHEDULE, "epsilon", 0.1)
    items = torch.arange(24)
    moments = []
    for j, lambda_ in enumerate(recorded["lambdas"]):
        x, probe = (torch.from_numpy(recorded[k][j]).double() for k in ("x", "probes"))
        _, _, rate = rule(x, float(lambda_), probe, items)
        np.testing.assert_allclose(rate, recorded["eps_dot"][j], rtol=1e-8, atol=1e-8)
        moments.append(_row_moments(rule, x, float(lambda_), probe, items))
    found = Sums(recorded["lambdas"], np.stack(moments, axis=1), 24).statistics(None, np.float64)
    for name in "lsb":
        expected = recorded[name]
        assert np.abs(getattr(found, name) - expected).max() < 1e-8 * np.abs(expected).max(), name


STD = 0.5
MEAN = 0.3


def gaussian(kind="epsilon", differentiable=True):
    """The ideal network of x0 ~ N(MEAN, STD^2): affine in x."""

    def network(x, t, items):
        alpha, sigma = levels(t if differentiable else torch.tensor(float(t), dtype=x.dtype))
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return eps if kind == "epsilon" else (alpha * eps - sigma * (x - sigma * eps) / alpha)

    return network


def data(count=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return MEAN + STD * torch.randn(count, 2, 3, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_gaussian_in_closed_form(kind):
    """eps is affine in x, so l = sigma^2 / (alpha^2 c^2 + sigma^2) for every probe, whatever the output."""
    sums = estimate(gaussian(kind), data(), SCHEDULE, prediction_type=kind, intervals=40, derivative="jvp")
    found = sums.statistics(None, np.float64)
    ratio = np.exp(2 * found.lambdas) * STD**2
    np.testing.assert_allclose(
        found.l, np.broadcast_to((1 / (1 + ratio))[:, None, None, None], found.l.shape)
    )
    assert found.info["samples"] == 12


def test_shards_add_up_and_runs_resume(tmp_path):
    arguments = {"schedule": SCHEDULE, "intervals": 6, "derivative": "jvp"}
    x0, network = data(), gaussian()
    saved = []
    whole = estimate(network, x0, batch_size=4, checkpoint=saved.append, **arguments)
    assert [s.count for s in saved] == [4, 8, 12]
    path = saved[0].save(tmp_path / "sums.safetensors")
    resumed = estimate(network, x0, batch_size=4, resume=Sums.load(path), **arguments)
    assert np.array_equal(resumed.moments, whole.moments)
    parts = [estimate(network, x0, batch_size=5, shard=(k, 3), **arguments) for k in range(3)]
    total = parts[0] + parts[1] + parts[2]
    assert total.count == 12
    np.testing.assert_allclose(total.moments, whole.moments, rtol=1e-11, atol=1e-11)
    with pytest.raises(UserError, match="other settings"):
        estimate(network, x0, resume=whole, seed=1, **arguments)
    with pytest.raises(UserError, match="cannot be added"):
        whole + parts[0]


def test_forward_mode_and_differences_agree():
    x0 = data()
    sums = [
        estimate(mixture_like, x0, SCHEDULE, intervals=40, derivative=kind) for kind in ("jvp", "difference")
    ]
    a, b = (s.statistics() for s in sums)
    np.testing.assert_allclose(a.l, b.l, atol=1e-4)
    # The first and last row have one-sided differences.
    np.testing.assert_allclose(a.s[1:-1], b.s[1:-1], rtol=0.05, atol=0.05)


def mixture_like(x, t, items):
    alpha, sigma = levels(t)
    return sigma * (x - alpha * 0.4 * torch.tanh(3 * x)) / (0.2 * alpha**2 + sigma**2)


def test_the_probe_sees_what_cannot_be_differentiated():
    x0 = data(4)
    x, probe = x0, torch.ones_like(x0)
    items = torch.arange(4)

    def chosen(network):
        return Derivatives(network, SCHEDULE, "epsilon", 0.05).chosen(x, -0.5, probe, items).forward

    def opaque(x, t, items):
        raise_if_traced = x.numpy()
        return torch.from_numpy(raise_if_traced) * 0.5

    assert chosen(gaussian()) == (True, True)
    assert chosen(opaque) == (False, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"derivative": "auto-diff"}, "derivative"),
        ({"intervals": 1}, "intervals"),
        ({"shard": (2, 2)}, "shard"),
        ({"prediction_type": "noise"}, "prediction type"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError, match=words):
        estimate(gaussian(), data(), SCHEDULE, **options)


def test_bad_networks_and_too_few_points():
    with pytest.raises(UserError, match="not finite"):
        estimate(lambda x, t, i: x * float("nan"), data(), SCHEDULE, intervals=2, derivative="difference")
    with pytest.raises(UserError, match="two points"):
        estimate(gaussian(), data(1), SCHEDULE, intervals=2, derivative="jvp").statistics()
