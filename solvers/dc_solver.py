"""DC-Solver (Zhao et al. 2024): dynamic compensation of the newest prediction before each step.

The ratios are found for a model by :func:`diffalign.solvers.dc_search.search_dc_ratios`, on the command line
``diffalign calibrate dc``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from diffalign.errors import UserError
from diffalign.solvers.exponential import Equation, Points, multistep, multistep_orders
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice, check_number, check_numbers, scheduler_options
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin
from diffalign.solvers.unipc import (
    Corrected,
    Weights,
    check_unipc_options,
    folded,
    translated,
    unipc_orders,
    unipc_steps,
)

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DCSolverScheduler", "SchedulerMixin", "cascade_ratios", "compensated", "compensation"]

logger = logging.get_logger(__name__)

_DC_ORDERS = (1, 2, 3)
#: Powers of i/n, of guidance/12 and of n/50 in the cascade polynomial of the paper. The published file for
#: Stable Diffusion 2.1 has four of the first, so other numbers of them are read as well.
CASCADE_SHAPE = (5, 3, 3)
_PER_POWER = math.prod(CASCADE_SHAPE[1:])


class DCSolverScheduler(PlanScheduler):
    """A multistep solver whose newest data prediction is moved in time before each step.

    Before the step that leaves ``t_i``, the newest prediction is replaced by the Lagrange interpolant through
    the newest ``dc_order + 1`` of the history, taken at ``rho_i t_i + (1 - rho_i) t_{i-1}`` (equation 8 of
    the paper); later steps find the replaced one in the history. All ratios 1 leave the solver as it is. The
    first ``dc_order`` steps of a run have too little history and are never compensated.

    The ratios of a run are, in this order: those stored for its number of steps, those of the cascade
    polynomial, ``last_step_ratio``, else 1 with a warning. They belong to the steps of the whole grid, so
    image-to-image uses those of the steps that it takes.

    Args:
        solver_order: 1 to 4 (3 with ``dpm-solver++``); 2 is the robust choice for guided sampling.
        predictor: ``unipc``, ``dpm-solver++`` or ``ddim``.
        solver_type, lower_order_final, use_corrector, disable_corrector: of UniPC, see
            :class:`~diffalign.solvers.unipc.UniPCScheduler`.
        dc_order: degree of the interpolant, 1 to 3.
        dc_ratios: one ratio per step for runs of that many steps, or several such lists by number of steps,
            ``{"5": [...], "10": [...]}``.
        last_step_ratio: ratio of the last step alone. On grids uniform in time, whose last step is huge in
            log-SNR, about 1.85 has most of the gain at no cost.
        cpr_coefficients: numbers of :func:`cascade_ratios`, 45 or other multiples of 9; needs the guidance
            scale.
        cpr_last, cpr_hull: its `last` and `hull`.
        guidance_scale: of the runs, for the cascade polynomial, where ``set_timesteps`` isn't told.
        final_sigmas_type: end at the clean image (``zero``) or at the first training step (``sigma_min``).
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`). Ratios belong to the grid on
            which they were found.

    The other options are diffusers'.
    """

    @scheduler_options
    def __init__(
        self,
        solver_order: int = 2,
        predictor: str = "unipc",
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        use_corrector: bool = True,
        disable_corrector: list[int] = [0, 1],  # noqa: B006  only read; diffusers needs a list
        dc_order: int = 2,
        dc_ratios: list[float] | dict[str, list[float]] | None = None,
        last_step_ratio: float | None = None,
        cpr_coefficients: list[float] | None = None,
        cpr_last: list[float] | None = None,
        cpr_hull: list[float] | None = None,
        guidance_scale: float | None = None,
        final_sigmas_type: str = "zero",
        **shared: Any,
    ) -> None:
        check_unipc_options(solver_order, solver_type, final_sigmas_type, disable_corrector)
        check_choice("predictor", predictor, tuple(_PREDICTORS))
        if predictor == "dpm-solver++" and solver_order > 3:
            raise UserError(f"solver_order of dpm-solver++ must be 1, 2 or 3, but is {solver_order}")
        if dc_order not in _DC_ORDERS:
            raise UserError(f"dc_order must be 1, 2 or 3, but is {dc_order}")
        for name, value in (("last_step_ratio", last_step_ratio), ("guidance_scale", guidance_scale)):
            if value is not None:
                check_number(name, value)
        for name, values, count in (
            ("cpr_coefficients", cpr_coefficients, None),
            ("cpr_last", cpr_last, 9),
            ("cpr_hull", cpr_hull, 4),
        ):
            if values is not None:
                check_numbers(name, values, count)
        if cpr_coefficients is not None:
            check_cascade("cpr_coefficients", cpr_coefficients)
        if cpr_hull is not None and not (cpr_hull[0] <= cpr_hull[1] and cpr_hull[2] <= cpr_hull[3]):
            raise UserError(
                f"cpr_hull must be least and greatest number of steps and guidance scale, but is {cpr_hull}"
            )
        if cpr_last is not None and cpr_coefficients is None:
            raise UserError("cpr_last belongs to cpr_coefficients; pass both")
        self._stored = _by_steps(dc_ratios)
        self._guidance = guidance_scale
        self._warned = False

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        return super()._translated(translated(config))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """As :meth:`PlanScheduler.set_timesteps`; `guidance_scale` is for the cascade polynomial."""
        given = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self._guidance = None if given is None else check_number("guidance_scale", given)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    @property
    def ratios(self) -> list[float]:
        """One ratio per step of the grid; raises UserError before ``set_timesteps``."""
        if self._times is None:
            raise UserError("call set_timesteps first: the ratios depend on the number of steps")
        count = len(self._times) - 1
        config = self.config
        if count in self._stored:
            return list(self._stored[count])
        if config.cpr_coefficients is not None:
            if self._guidance is None:
                raise UserError(
                    "cpr_coefficients need the guidance scale; set the option guidance_scale or pass it to "
                    "set_timesteps"
                )
            return cascade_ratios(
                config.cpr_coefficients,
                count,
                self._guidance,
                order=config.dc_order,
                last=config.cpr_last,
                hull=config.cpr_hull,
            )
        last = config.last_step_ratio
        if last is None and not self._warned:
            self._warned = True
            stored = f" (stored: {', '.join(map(str, sorted(self._stored)))})" if self._stored else ""
            logger.warning(
                f"no compensation ratios for {count} steps{stored}: the plain {config.predictor} runs; "
                "'diffalign calibrate dc' finds ratios"
            )
        return [1.0] * (count - 1) + [1.0 if last is None else float(last)]

    def steps(self, times: Array) -> list[Corrected]:
        """The uncompensated solver between `times`, (n + 1,): a begun run's evaluations and the end."""
        return _PREDICTORS[self.config.predictor](
            self.config,
            self.schedule,
            times,
            lambda k: self.config.use_corrector and self._origin + k not in self.config.disable_corrector,
        )

    def _plan(self, times: Array) -> Plan:
        steps = self.steps(times)
        buffered = compensated(times[:-1], self.ratios[self._origin :], self.config.dc_order)
        return Plan(
            tuple(
                Row(time=float(t), convert=self._conversion(t), x={e: step.x}, m=m)
                for e, (t, step, m) in enumerate(zip(times[:-1], steps, folded(steps, buffered), strict=True))
            )
        )


def _unipc(
    config: Any, schedule: NoiseSchedule, times: Array, corrected: Callable[[int], bool]
) -> list[Corrected]:
    orders = unipc_orders(len(times) - 1, config.solver_order, lower_order_final=config.lower_order_final)
    return unipc_steps(
        schedule, times, orders, form="sample", solver_type=config.solver_type, corrected=corrected
    )


def _dpm_solver_pp(
    config: Any, schedule: NoiseSchedule, times: Array, corrected: Callable[[int], bool]
) -> list[Corrected]:
    orders = multistep_orders(len(times) - 1, config.solver_order, lower_order_final=config.lower_order_final)
    updates = multistep(
        Points.at(schedule, times),
        Equation("sample"),
        orders,
        solver_type="midpoint",
        third_order="taylor",
    )
    return [Corrected(u.x[k], u.m) for k, u in enumerate(updates)]


def _ddim(
    config: Any, schedule: NoiseSchedule, times: Array, corrected: Callable[[int], bool]
) -> list[Corrected]:
    orders = [1] * (len(times) - 1)
    return unipc_steps(schedule, times, orders, form="sample", solver_type="bh2", corrected=lambda k: False)


_PREDICTORS = {"unipc": _unipc, "dpm-solver++": _dpm_solver_pp, "ddim": _ddim}


# ------------------------------------------------------- compensation


def lagrange_weights(points: Sequence[float], at: Any) -> list[Any]:
    """Weights of values at distinct `points` in their interpolating polynomial's value at `at`."""
    return [
        math.prod((at - other) / (p - other) for j, other in enumerate(points) if j != i)
        for i, p in enumerate(points)
    ]


def compensation(times: Sequence[float], ratio: Any) -> list[Any]:
    """Weights of the history made at `times`, newest last, in the place of the newest.

    `ratio` may be a tensor; the weights then carry its gradient.
    """
    return lagrange_weights(times, ratio * times[-1] + (1.0 - ratio) * times[-2])


def compensated(times: Array, ratios: Sequence[float], order: int) -> list[Weights]:
    """What the history holds in the place of each prediction, as weights of the predictions themselves.

    Args:
        times: (n,) of the evaluations.
        ratios: (n,).
        order: degree of the interpolant.
    """
    buffered: list[Weights] = []
    for i, ratio in enumerate(ratios):
        held: Weights = {i: 1.0}
        if i >= order and ratio != 1.0:
            *older, newest = compensation(times[i - order : i + 1].tolist(), ratio)
            held = {i: newest}
            for j, w in enumerate(older, i - order):
                for k, b in buffered[j].items():
                    held[k] = held.get(k, 0.0) + w * b
        buffered.append(held)
    return buffered


def cascade_ratios(
    coefficients: Sequence[float],
    steps: int,
    guidance_scale: float,
    *,
    order: int = 2,
    last: Sequence[float] | None = None,
    hull: Sequence[float] | None = None,
) -> list[float]:
    """Cascade polynomial regression (section 3.3 of the paper): ratios for any steps n and guidance g.

    ``rho_i = sum_q c_q (i/n)^q`` for i = 1..n; each of the ``c_q``, five in the paper, is a quadratic in
    g/12, whose three coefficients are quadratics in n/50. The first `order` ratios are 1.

    Args:
        coefficients: nine numbers per q (of the paper 45), by q, then by power of g (squared first), then by
            power of n (likewise).
        steps, guidance_scale: n and g.
        order: degree of the compensation.
        last: 9 numbers of a quadratic of quadratics for the last ratio alone, which the steps before it say
            little about.
        hull: smallest and largest n, smallest and largest g of the fit, to which n and g are clamped.
    """
    n, g = float(steps), float(guidance_scale)
    if hull is not None:
        n, g = min(max(n, hull[0]), hull[1]), min(max(g, hull[2]), hull[3])
    powers = np.outer(quadratic(g / 12), quadratic(n / 50))
    c = np.tensordot(np.reshape(coefficients, (-1, *CASCADE_SHAPE[1:])), powers, 2)
    ratios = np.polynomial.polynomial.polyval(np.arange(1, steps + 1) / steps, c)
    if last is not None:
        ratios[-1] = float((np.reshape(last, (3, 3)) * powers).sum())
    ratios[:order] = 1.0
    return ratios.tolist()


def check_cascade(name: str, numbers: Sequence[float]) -> None:
    """UserError unless there are nine `numbers` per power of i/n."""
    if not len(numbers) or len(numbers) % _PER_POWER:
        raise UserError(
            f"{name} must have {_PER_POWER} numbers for each power of i/n, for the paper's five "
            f"{math.prod(CASCADE_SHAPE)}, but has {len(numbers)}"
        )


def quadratic(x: float) -> Array:
    """``x^2, x, 1``, the order in which the cascade keeps its coefficients."""
    return np.array([x * x, x, 1.0])


# ------------------------------------------------------- what a user passes


def _by_steps(ratios: Sequence[float] | Mapping[str, Sequence[float]] | None) -> dict[int, list[float]]:
    """Number of steps -> ratios."""
    if ratios is None:
        return {}
    if not isinstance(ratios, Mapping):
        numbers = check_numbers("dc_ratios", ratios)
        return {len(numbers): numbers}
    stored = {}
    for steps, values in ratios.items():
        if not str(steps).isdigit():
            raise UserError(f"dc_ratios by number of steps must have whole numbers as keys, not {steps!r}")
        stored[int(steps)] = check_numbers(f"dc_ratios of {steps} steps", values, int(steps))
    return stored
