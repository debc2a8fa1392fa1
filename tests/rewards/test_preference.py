"""The losses of reward models: published numbers, and what must hold."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.rewards import preference
from tests.align.goldens import load_online


def test_step_aware_loss_is_the_published_one():
    case = load_online("spm", "spm_loss", short=True)
    images = [case[f"image_{i}"].requires_grad_() for i in (0, 1)]
    scores = [20.0 * (case["text"] * image).sum(-1) for image in images]
    weights = 1 / case["examples_per_prompt"]  # a prompt with many pairs counts no more than others
    loss = (weights / weights.sum() * preference.soft_cross_entropy(*scores, case["label_0"])).sum()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-4, atol=1e-6)
    for image, gradient in zip(
        torch.autograd.grad(loss, images), ("grad_image_0", "grad_image_1"), strict=True
    ):
        torch.testing.assert_close(image, case[gradient], rtol=1e-4, atol=1e-6)


def test_soft_cross_entropy_is_the_two_way_one_and_free_for_a_perfect_tie():
    first, second = torch.randn(2, 50, dtype=torch.float64)
    label = torch.rand(50, dtype=torch.float64)
    wanted = F.cross_entropy(
        torch.stack([first, second], 1), torch.stack([label, 1 - label], 1), reduction="none"
    )
    torch.testing.assert_close(preference.soft_cross_entropy(first, second, label), wanted)
    tie = torch.full((1,), 0.5)
    assert float(preference.soft_cross_entropy(torch.ones(1), torch.ones(1), tie)) == pytest.approx(
        0, abs=1e-7
    )
    assert float(preference.soft_cross_entropy(torch.tensor([300.0]), torch.zeros(1), torch.zeros(1))) == 300


@pytest.mark.parametrize("kind", ["bt", "margin", "constant_margin", "scaled", "btt"])
def test_head_losses_are_the_published_ones(kind):
    case = load_online("video_reward", f"videoreward_loss/{kind}", short=True)
    chosen, rejected = (case[name].requires_grad_() for name in ("chosen", "rejected"))
    decided, valid = case["nontied"], case["valid"]
    if kind == "btt":
        losses = valid * preference.bradley_terry_ties(chosen, rejected, 1 - decided, theta=5.0)
    elif kind == "scaled":
        losses = decided * case["margin"] * preference.bradley_terry(chosen, rejected)
    else:
        margin = {"bt": 0.0, "margin": case["margin"], "constant_margin": 0.57}[kind]
        losses = decided * preference.bradley_terry(chosen, rejected, margin=margin)
    loss = losses.mean()  # over all entries, masked ones too
    torch.testing.assert_close(loss, case["loss"], rtol=1e-4, atol=1e-6)
    for own, name in zip(torch.autograd.grad(loss, (chosen, rejected)), ("chosen", "rejected"), strict=True):
        torch.testing.assert_close(own, case[f"grad_{name}"], rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(st.floats(-8, 8), st.floats(1.1, 20))
def test_won_lost_and_tied_are_a_distribution(difference, theta):
    d = torch.tensor([difference], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    costs = [
        preference.bradley_terry_ties(d, zero, torch.zeros(1), theta=theta),
        preference.bradley_terry_ties(zero, d, torch.zeros(1), theta=theta),
        preference.bradley_terry_ties(d, zero, torch.ones(1), theta=theta),
    ]
    assert sum(float(torch.exp(-cost)) for cost in costs) == pytest.approx(1)
