"""The exponential-integrator functions that all lambda-space solvers share, accurate for every step size."""

from __future__ import annotations

import math

_SERIES_BELOW = 1.0
_SERIES_TERMS = 22


def phis(step: float, count: int) -> tuple[float, ...]:
    """``phi_1 .. phi_count`` at a signed step H: ``phi_1 = e^H - 1``, ``phi_{k+1} = phi_k / H - 1/k!``.

    The recursion cancels for small H, so below |H| = 1 each is its series ``sum_{j>=1} H^j / (j+k-1)!``
    instead (for ``phi_1`` the exact ``expm1``). An infinite H gives the limits at -inf: ``-1, -1, -1/2, ...,
    -1/(k-1)!``.

    Args:
        step: H, a step in half log-SNR: ``-h`` for updates in data form, ``h`` in noise form.
        count: how many, at least 1.
    """
    if math.isinf(step):
        return (-1.0, *(-1.0 / math.factorial(k - 1) for k in range(2, count + 1)))
    values = [math.expm1(step)]
    for k in range(2, count + 1):
        if abs(step) < _SERIES_BELOW:
            values.append(sum(step**j / math.factorial(j + k - 1) for j in range(1, _SERIES_TERMS)))
        else:
            values.append(values[-1] / step - 1.0 / math.factorial(k - 1))
    return tuple(values)
