"""The discrete noise schedules that diffusers configs name, as betas in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError, suggestion

Array = NDArray[np.float64]


def _squaredcos(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    log_snr = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1.0 / (1.0 + math.exp(-log_snr)))


def _exponential(t: float) -> float:
    return math.exp(-12.0 * t)


def _from_alpha_bar(alpha_bar: Callable[[float], float], count: int) -> Array:
    grid = [alpha_bar(i / count) for i in range(count + 1)]
    return np.array([min(1.0 - after / before, 0.999) for before, after in itertools.pairwise(grid)])


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Array]] = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "scaled_linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
    "sigmoid": lambda n, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6.0, 6.0, n))),
    "squaredcos_cap_v2": lambda n, start, end: _from_alpha_bar(_squaredcos, n),
    "laplace": lambda n, start, end: _from_alpha_bar(_laplace, n),
    "exp": lambda n, start, end: _from_alpha_bar(_exponential, n),
}


def named_betas(name: str, count: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """(count,) betas of a diffusers ``beta_schedule`` name, in float64.

    Raises:
        UserError: for an unknown name.
    """
    if name not in BETA_SCHEDULES:
        raise UserError(
            f"unknown beta_schedule {name!r}{suggestion(name, list(BETA_SCHEDULES))}; "
            f"it may be one of {', '.join(BETA_SCHEDULES)}, or pass trained_betas"
        )
    return BETA_SCHEDULES[name](count, start, end)


def zero_terminal_snr(alphas_cumprod: ArrayLike) -> Array:
    """Shift and scale sqrt(alphas_cumprod): last one 0, first one kept (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.asarray(alphas_cumprod, dtype=np.float64))
    if len(root) < 2 or root[0] == root[-1]:
        raise UserError("rescale_betas_zero_snr needs a schedule of at least two different noise levels")
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
