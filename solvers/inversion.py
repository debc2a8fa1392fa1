"""The probability-flow ODE along a given grid, in either direction: from an image to noise, and back.

Samplers go from noise to an image and are planned for that. The ODE itself can be followed the other way as
well, and then says from which noise an image comes (DDIM inversion is its first order, Song et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.exponential import Equation, Points, multistep
from diffalign.solvers.integration import Network
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.plan import linear, working_dtype
from diffalign.solvers.sampling import ModelFn


def follow(
    model_fn: ModelFn,
    x: Tensor,
    schedule: NoiseSchedule,
    times: ArrayLike,
    *,
    prediction_type: str = "epsilon",
    order: int = 2,
    callback: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample at ``times[-1]`` of the ODE that passes through `x` at ``times[0]``.

    The multistep exponential integrator in the noise prediction (DPM-Solver's; order 1 is DDIM, or DDIM
    inversion), whose derivation does not ask for the sign of its steps. Followed to the end of a grid and
    back along it, x returns up to an error of that order.

    Args:
        model_fn: ``(x, t) -> output`` of kind `prediction_type`; t is a 0-d tensor.
        x: (B, ...). The network is given its dtype; the arithmetic is float64 for float64 and else float32.
        times: (n + 1,) rising or falling, of which the network is asked at the first n. Neither pure noise
            nor the clean image may be among them: there half the log-SNR is infinite.
        order: 1 or 2.
        callback: called after each of the n evaluations.

    Raises:
        UserError: times that do not rise or fall all the way, or go too far; another order.
    """
    grid = np.asarray(times, np.float64)
    steps = np.diff(grid)
    if not len(steps) or not (np.all(steps > 0) or np.all(steps < 0)):
        raise UserError("the ODE is followed along two or more times that rise, or fall, all the way")
    if order not in (1, 2):
        raise UserError(f"order must be 1 or 2, but is {order}")
    points = Points.at(schedule, grid)
    if not np.all(np.isfinite(points.lambda_)):
        raise UserError(
            "the ODE cannot be followed to pure noise or to the clean image: choose times above "
            f"{schedule.t_clean:g} whose alpha is not 0"
        )
    orders = [min(order, step + 1) for step in range(len(steps))]
    updates = multistep(points, Equation("epsilon"), orders, solver_type="taylor", third_order="taylor")
    dtype = working_dtype(x)
    network = Network(model_fn, schedule, prediction_type, x.dtype, False, len(steps))
    at: dict[int, Tensor] = {}
    y = x.to(dtype)
    for step, (time, update) in enumerate(zip(grid[:-1], updates, strict=True)):
        at[step] = network(y, [float(time)], "epsilon")
        y = linear([(update.x[step], y), *((c, at[j]) for j, c in update.m.items())], dtype)
        at.pop(step + 1 - order, None)
        callback()
    return y.to(x.dtype)
