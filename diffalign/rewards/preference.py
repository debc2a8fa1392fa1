"""The losses that reward models learn preferences with. Nothing is reduced.

Scores are tensors of any float type; which of two images is better is a probability, a tie 0.5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Loss ``(B,)`` of two scores under the probability `label` that the first image is the better one.

    Cross-entropy of ``softmax(first, second)``; for a tie (0.5) ``log 2`` is taken off, so that scores that
    tie perfectly cost nothing (PickScore, SPO). Scores carry their temperature, ``exp(logit_scale) cos``.
    """
    loss = -label * F.logsigmoid(first - second) - (1 - label) * F.logsigmoid(second - first)
    return loss - (label == 0.5).to(loss) * math.log(2)


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
