"""Randomness without a state: every number of a run is a function of the seed and of what it is for.

The noise of a pair depends on (seed, step, place in the global batch), never on the process that computes
it, on the micro-batch it falls into, or on what was drawn before. So a resumed run needs no generator states
and replays nothing, and two processes draw what one would.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np

from diffalign.solvers.noise import NoiseSchedule

TimeSampling = Literal["uniform", "logit_normal"]

_FINE = 2**24  # numbers within a part of (0, 1): float64 keeps them off its ends


def generator(*purpose: int | str) -> np.random.Generator:
    """An independent generator for each purpose, e.g. ``generator(seed, "noise", step, slot)``."""
    key = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key)))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(length)


def rows_at(positions: range, *, seed: int, length: int) -> list[int]:
    """Rows at ``positions`` of the endless sequence: one permutation of ``length`` rows after another."""
    return [int(_epoch(seed, p // length, length)[p % length]) for p in positions]


def number(*purpose: int | str) -> int:
    """A seed below 2^63 for generators of other libraries."""
    return int(generator(*purpose).integers(2**63))


def time(
    numbers: np.random.Generator,
    schedule: NoiseSchedule,
    sampling: TimeSampling,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> float:
    """A training time, in the network's unit: uniform, or logit-normal (Esser et al. 2024), which for EDM
    models is its log-normal noise level, ``log s ~ N(logit_mean, logit_std^2)`` (Karras et al. 2022)."""
    if sampling == "uniform" and schedule.is_discrete:
        return int(numbers.integers(schedule.num_train_timesteps))
    if sampling == "uniform":
        return time_at(schedule, 1.0 - numbers.random())
    return _time_of_logit(schedule, numbers.normal(logit_mean, logit_std))


def quantile(purpose: tuple[int | str, ...], place: int, places: int) -> float:
    """A number in (0, 1): `places` of the same `purpose` have one each in every ``1 / places`` of it.

    Each place's own is uniform, since which part is whose is a random permutation.
    """
    part = generator(*purpose, "order").permutation(places)[place]
    within = (generator(*purpose, place).integers(_FINE) + 0.5) / _FINE
    return float((part + within) / places)


def time_of(
    u: float,
    schedule: NoiseSchedule,
    sampling: TimeSampling,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> float:
    """The quantile `u`, in (0, 1), of what :func:`time` draws: distributed like it if `u` is uniform."""
    if sampling == "uniform":
        return time_at(schedule, u)
    return _time_of_logit(schedule, NormalDist(logit_mean, logit_std).inv_cdf(u))


def time_at(schedule: NoiseSchedule, fraction: float) -> float:
    """The time at `fraction` of the schedule: a training step if it is discrete; of a flow model any time but
    0, shifted; of an EDM model even in log sigma."""
    if schedule.is_flow:
        return float(schedule.shifted(fraction))
    if schedule.is_discrete:
        return min(int(fraction * schedule.num_train_timesteps), schedule.num_train_timesteps - 1)
    return schedule.t_min + fraction * (schedule.t_max - schedule.t_min)


def _time_of_logit(schedule: NoiseSchedule, logit: float) -> float:
    """Where sigma, or an EDM model's log sigma, is at a normal number."""
    if schedule.kind == "edm":
        lowest, highest = schedule.lambda_((schedule.t_max, schedule.t_min))
        return float(schedule.t_of_lambda(np.clip(-logit, lowest, highest)))
    return time_at(schedule, 1.0 / (1.0 + math.exp(-logit)))
