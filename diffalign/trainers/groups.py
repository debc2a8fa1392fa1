"""What rewards say about a group of samples of one prompt: who beats whom, and by how much each stands out.

Pure functions of arrays: rewards ``(K,)`` or, of several rewards, ``(K, R)``, higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[int, int]  # (winner, loser)


def dominates(one: Array, other: Array) -> bool:
    """At least as good by every reward and better by one (Pareto)."""
    return bool(np.all(one >= other) and np.any(one > other))


def all_pairs(rewards: Array, _: np.random.Generator | None = None) -> list[Pair]:
    """Every pair of which one dominates the other: D3PO (Yang et al. 2024). Ties teach nothing."""
    rows = rewards.reshape(len(rewards), -1)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    won = [(i, j) if dominates(rows[i], rows[j]) else (j, i) for i, j in pairs]
    return [(w, l) for w, l in won if dominates(rows[w], rows[l])]  # noqa: E741


def best_and_worst(rewards: Array, _: np.random.Generator | None = None) -> list[Pair]:
    """The best against the worst by the sum of rewards; none if all are equal."""
    total = rewards.reshape(len(rewards), -1).sum(1)
    best, worst = int(total.argmax()), int(total.argmin())
    return [(best, worst)] if total[best] > total[worst] else []


def matched(rewards: Array, _: np.random.Generator | None = None) -> list[Pair]:
    """The best against the worst by the sum of rewards, the second best against the second worst, and so on
    while they differ: no image is in two pairs. Of yes/no rewards, as many pairs as there can be."""
    total = rewards.reshape(len(rewards), -1).sum(1)
    half = len(total) // 2
    best, worst = np.argsort(-total, kind="stable")[:half], np.argsort(total, kind="stable")[:half]
    return [(int(w), int(l)) for w, l in zip(best, worst, strict=True) if total[w] > total[l]]  # noqa: E741


def random_reward(rewards: Array, numbers: np.random.Generator | None = None) -> list[Pair]:
    """The first two by one reward drawn at random, the second winning ties: PSO's published Turbo script."""
    rows = rewards.reshape(len(rewards), -1)
    column = 0 if numbers is None else int(numbers.integers(rows.shape[1]))
    return [(0, 1) if rows[0, column] > rows[1, column] else (1, 0)]


#: name -> who beats whom in a group
COMPARISONS: dict[str, Callable[[Array, np.random.Generator | None], list[Pair]]] = {
    "all": all_pairs,
    "best_worst": best_and_worst,
    "matched": matched,
    "random_reward": random_reward,
}


def advantages(
    rewards: Array, groups: Any, *, scale: Literal["group", "global"] = "group", epsilon: float = 1e-4
) -> Array:
    """``(r - mean of its group) / (std + epsilon)``: how much a sample stands out.

    Args:
        rewards: ``(N,)``.
        groups: ``(N,)`` labels; samples of one prompt share one.
        scale: the std of its ``group`` (DDPO's per-prompt statistics) or of all samples (``global``,
            Flow-GRPO).
        epsilon: keeps a group of equals at 0.
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    counts = np.bincount(labels)
    mean = (np.bincount(labels, rewards) / counts)[labels]
    centred = rewards - mean
    if scale == "global":
        return centred / (rewards.std() + epsilon)
    return centred / (np.sqrt(np.bincount(labels, centred**2) / counts)[labels] + epsilon)
