"""The scheduler that DPM-Solver and DPM-Solver++ share; they differ in the prediction that they integrate."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers import grids
from diffalign.solvers.exponential import (
    RULE_OF_TYPE,
    Equation,
    Points,
    Update,
    multistep,
    multistep_orders,
    singlestep,
    singlestep_orders,
    split_ends,
)
from diffalign.solvers.options import check_choice
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler

# solver_type of other diffusers classes, which their configs carry over.
_SOLVER_TYPES = {
    "midpoint": "midpoint",
    "heun": "heun",
    "logrho": "midpoint",
    "bh1": "midpoint",
    "bh2": "midpoint",
}


def dpm_options(
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_method: str = "multistep",
    solver_type: str = "midpoint",
    third_order: str = "taylor",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_type: str = "zero",
    denoise_to_zero: bool = False,
    sde_eta: float = 1.0,
    s_noise: float = 1.0,
) -> None:
    """The options that both classes have; :class:`DPMSolverPPScheduler` explains them."""


class DPMScheduler(PlanScheduler):
    """Base of the two classes, which list the options; see :class:`DPMSolverPPScheduler`."""

    #: What ``algorithm_type`` may be; names that begin with ``sde-`` add noise.
    algorithms: ClassVar[tuple[str, ...]]

    def _check(self) -> None:
        """Refuse bad values of the options that both classes have."""
        config = self.config
        if config.solver_order not in (1, 2, 3):
            raise UserError(f"solver_order must be 1, 2 or 3, but is {config.solver_order!r}")
        check_choice("algorithm_type", config.algorithm_type, self.algorithms)
        check_choice("solver_method", config.solver_method, ("multistep", "singlestep"))
        check_choice("solver_type", config.solver_type, tuple(RULE_OF_TYPE))
        check_choice("third_order", config.third_order, ("taylor", "published"))
        check_choice("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        for name in ("sde_eta", "s_noise"):
            if not 0.0 <= config[name] < math.inf:
                raise UserError(f"{name} must be a number of at least 0, but is {config[name]}")

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        config = super()._translated(config)
        if "solver_type" in config:
            config["solver_type"] = _SOLVER_TYPES.get(config["solver_type"], config["solver_type"])
        name = config.get("algorithm_type")
        if name is not None and name not in cls.algorithms:
            # The class says which prediction is integrated, the config whether noise is added.
            config["algorithm_type"] = "sde-dpmsolver++" if str(name).startswith("sde-") else "dpmsolver++"
        if isinstance(config.get("solver_order"), int):
            config["solver_order"] = min(config["solver_order"], 3)
        return config

    # ------------------------------------------------------------ the plan

    def _plan(self, times: Array) -> Plan:
        points = Points.at(self.schedule, times)
        return Plan(
            tuple(
                Row(float(t), self._conversion(t, u.form), x=u.x, m=u.m, z=u.z)
                for t, u in zip(times[:-1], self._updates(points), strict=True)
            )
        )

    def _updates(self, points: Points) -> list[Update]:
        config = self.config
        eta = config.sde_eta if config.algorithm_type.startswith("sde-") else 0.0
        equation = Equation(self.form, eta, config.s_noise)
        count = len(points.lambda_) - 1
        orders = self._orders(count)
        rule = RULE_OF_TYPE[config.solver_type]
        if config.solver_method == "multistep":
            return multistep(points, equation, orders, solver_type=rule, third_order=config.third_order)
        orders = split_ends(orders, first=points.alpha[0] == 0.0, last=points.sigma[-1] == 0.0)
        return singlestep(points, equation, orders, solver_type=rule)

    def _orders(self, count: int) -> list[int]:
        """The order of each step for `count` evaluations, the last to be split if it ends at sigma = 0."""
        config = self.config
        if config.denoise_to_zero and count > 1:
            return [*self._solver_orders(count - 1), 1]
        return self._solver_orders(count)

    def _solver_orders(self, count: int) -> list[int]:
        config = self.config
        if config.solver_method == "multistep":
            return multistep_orders(
                count,
                config.solver_order,
                lower_order_final=config.lower_order_final,
                euler_at_final=config.euler_at_final,
            )
        orders = singlestep_orders(count, config.solver_order, lower_order_final=config.lower_order_final)
        return split_ends(orders, first=False, last=config.euler_at_final)

    # ------------------------------------------------------------ the grid

    def _final(self) -> str:
        return "sigma_min" if self.config.denoise_to_zero else self.config.final_sigmas_type

    def _evaluations(self, times: Array) -> Array:
        if not self.config.denoise_to_zero:
            return times
        return np.append(times[:-1], self.schedule.t_clean)

    def _grid_times(self, count: int, shift: float | None) -> Array:
        extra = int(self.config.denoise_to_zero and count > 1)
        times = self._solver_times(count - extra, shift)
        return np.append(times, self.schedule.t_clean) if extra else times

    def _solver_times(self, count: int, shift: float | None) -> Array:
        """`count` evaluations and the end.

        Grids in log-SNR place the steps of a singlestep method, and its stages evenly inside each in
        log-SNR; on the others each evaluation takes the next point. This is what the published code does.
        The default grid is of the second kind: up to 12 evaluations that halves the error of second order on
        the mixture.
        """
        name = self.config.grid if self.config.grid != "auto" else grids.flagged_grid(self.config)
        by_steps = self.config.solver_method == "singlestep" and name in grids.LOG_GRIDS
        if not by_steps or self.schedule.is_flow:
            return super()._grid_times(count, shift)
        from_noise = bool(self.schedule.alpha(self._start_time()) == 0.0)
        orders = split_ends(self._solver_orders(count), first=from_noise, last=self._final() == "zero")
        steps = super()._grid_times(len(orders), shift)
        lambda_ = self.schedule.lambda_(steps)
        stages = [
            [start, *(self.schedule.t_of_lambda(a + (b - a) * j / p) for j in range(1, p))]
            for start, (a, b), p in zip(steps[:-1], itertools.pairwise(lambda_), orders, strict=True)
        ]
        return np.array([*itertools.chain.from_iterable(stages), steps[-1]])

    # ------------------------------------------------------------ thresholding

    def _transform(self, m: Tensor, sample: Tensor) -> Tensor:
        """As in the base class; a noise prediction is changed through the data prediction that it implies."""
        if self.form == "sample":
            return super()._transform(m, sample)
        assert self._times is not None
        assert self._step_index is not None
        here, after = self._times[self._step_index : self._step_index + 2]
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(here))
        if alpha == 0.0 or self.schedule.sigma(after) == 0.0:  # steps in data form
            return super()._transform(m, sample)
        x0 = super()._transform((sample - sigma * m) / alpha, sample)
        return (sample - alpha * x0) / sigma
