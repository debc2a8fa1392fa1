"""From rewards to preferences, and the losses that reward models learn preferences with. Nothing is reduced.

Scores are tensors of any float type; which of two images is better is a probability, a tie 0.5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pareto(first: Tensor, second: Tensor) -> Tensor:
    """Who wins when several rewards judge: better or equal in all of them, and better in one (D3PO).

    Args:
        first, second: ``(B, K)`` scores of both images by K rewards.

    Returns:
        ``(B, 2)``: (1, -1), (-1, 1), or (0, 0) where they are equal or each is better in something.
    """
    wins = ((first >= second).all(-1) & (first > second).any(-1)).to(first.dtype)
    losses = ((second >= first).all(-1) & (second > first).any(-1)).to(first.dtype)
    return torch.stack([wins - losses, losses - wins], -1)


def equal_goes_to_second(first: Tensor, second: Tensor) -> Tensor:
    """As :func:`pareto` for one reward, ``(B, 1)``, but a tie is a win for the second image: published
    behaviour of online PSO, for parity only."""
    sign = torch.where(first[:, 0] > second[:, 0], 1.0, -1.0).to(first.dtype)
    return torch.stack([sign, -sign], -1)


def soft_cross_entropy(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Loss ``(B,)`` of two scores under the probability `label` that the first image is the better one.

    Cross-entropy of ``softmax(first, second)``; for a tie (0.5) ``log 2`` is taken off, so that scores that
    tie perfectly cost nothing (PickScore, SPO). Scores carry their temperature, ``exp(logit_scale) cos``.
    """
    loss = -label * F.logsigmoid(first - second) - (1 - label) * F.logsigmoid(second - first)
    return loss - (label == 0.5).to(loss) * math.log(2)


def prompt_weights(examples: Tensor) -> Tensor:
    """Weights ``(B,)`` that sum to 1, ``(1/n_i) / sum(1/n)``: a prompt with many pairs counts no more than
    others. `examples` is how many pairs the prompt of each row has."""
    return (1 / examples) / (1 / examples).sum()


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0) -> Tensor:
    """``-log s(chosen - rejected - margin)``, elementwise."""
    return -F.logsigmoid(chosen - rejected - margin)


def bradley_terry_ties(chosen: Tensor, rejected: Tensor, tied: Tensor, *, theta: float = 5.0) -> Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967), elementwise; `theta` above 1 says how wide a tie is.

    With ``d = chosen - rejected`` a decided pair costs ``-log s(d - log theta)``, a tie
    ``-log s(d - log theta) - log s(-d - log theta) - log(theta^2 - 1)``.

    Args:
        tied: 1 where neither is better, else 0.
    """
    wide = math.log(theta)
    won, lost = bradley_terry(chosen, rejected, margin=wide), bradley_terry(rejected, chosen, margin=wide)
    return torch.where(tied.bool(), won + lost - math.log(theta * theta - 1), won)
