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
from diffalign.solvers.exponential import RULE_OF_TYPE, Equation, Points, multistep
from diffalign.solvers.integration import Network
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice
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
    form: str = "epsilon",
    solver_type: str = "heun",
    third_order: str = "taylor",
    lower_order_final: bool = False,
    callback: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample at ``times[-1]`` of the ODE that passes through `x` at ``times[0]``.

    The multistep exponential integrator (DPM-Solver's, or DPM-Solver++'s; order 1 is DDIM, or DDIM
    inversion), whose derivation does not ask for the sign of its steps. Followed to the end of a grid and
    back along it, x returns up to an error of that order. The published ``inverse`` and ``sample`` between
    any two times are this with ``solver_type="midpoint"``, ``third_order="published"`` and, below 10 steps,
    ``lower_order_final``.

    Args:
        model_fn: ``(x, t) -> output`` of kind `prediction_type`; t is a 0-d tensor.
        x: (B, ...). The network is given its dtype; the arithmetic is float64 for float64 and else float32.
        times: (n + 1,) rising or falling, of which the network is asked at the first n. Neither pure noise
            nor the clean image may be among them: there half the log-SNR is infinite.
        order: 1, 2 or 3.
        form: the prediction that is integrated, ``epsilon`` (DPM-Solver) or ``sample`` (DPM-Solver++).
        solver_type, third_order: as in :class:`~diffalign.solvers.dpm_solver_pp.DPMSolverPPScheduler`.
        lower_order_final: lower the order of the last steps, however many there are.
        callback: called after each of the n evaluations.

    Raises:
        UserError: times that do not rise or fall all the way, or go too far; other options than these.
    """
    grid = np.asarray(times, np.float64)
    steps = np.diff(grid)
    if not len(steps) or not (np.all(steps > 0) or np.all(steps < 0)):
        raise UserError("the ODE is followed along two or more times that rise, or fall, all the way")
    if order not in (1, 2, 3):
        raise UserError(f"order must be 1, 2 or 3, but is {order}")
    check_choice("form", form, ("epsilon", "sample"))
    check_choice("solver_type", solver_type, tuple(RULE_OF_TYPE))
    check_choice("third_order", third_order, ("taylor", "published"))
    points = Points.at(schedule, grid)
    if not np.all(np.isfinite(points.lambda_)):
        raise UserError(
            "the ODE cannot be followed to pure noise or to the clean image: choose times above "
            f"{schedule.t_clean:g} whose alpha is not 0"
        )
    count = len(steps)
    orders = [min(order, k + 1, count - k if lower_order_final else order) for k in range(count)]
    rule = RULE_OF_TYPE[solver_type]
    updates = multistep(points, Equation(form), orders, solver_type=rule, third_order=third_order)
    dtype = working_dtype(x)
    network = Network(model_fn, schedule, prediction_type, x.dtype, False, count)
    at: dict[int, Tensor] = {}
    y = x.to(dtype)
    for step, (time, update) in enumerate(zip(grid[:-1], updates, strict=True)):
        at[step] = network(y, [float(time)], form)
        y = linear([(update.x[step], y), *((c, at[j]) for j, c in update.m.items())], dtype)
        at.pop(step + 1 - order, None)
        callback()
    return y.to(x.dtype)
