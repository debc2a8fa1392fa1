"""DPM-Solver++ (Lu et al. 2022b): exponential integration of the data prediction in half log-SNR."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from diffusers.utils import logging

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.phi import phis
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin, check_choice, scheduler_options

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DPMSolverPPScheduler", "SchedulerMixin", "multistep_orders", "multistep_weights"]

logger = logging.get_logger(__name__)

# solver_type of other diffusers classes, which their configs carry over.
_SOLVER_TYPES = {
    "midpoint": "midpoint",
    "heun": "heun",
    "logrho": "midpoint",
    "bh1": "midpoint",
    "bh2": "midpoint",
}


class DPMSolverPPScheduler(PlanScheduler):
    """Multistep DPM-Solver++ of order 1 to 3. Order 1 is DDIM.

    With ``h`` the step in half log-SNR, ``phi_k`` at ``-h`` and ``D1, D2`` divided differences of the newest
    data predictions (fractions of the step):

        x_t = (sigma_t / sigma_s) x - alpha_t [phi_1 m + phi_2 D1 + phi_3 D2]

    Args:
        solver_order: 1, 2 or 3; 2 is the robust choice for guided sampling.
        solver_type: at order 2, ``midpoint`` (phi_2 replaced by phi_1 / 2, the paper's 2M) or ``heun``
            (phi_2).
        third_order: ``taylor``, which is of third order, or ``published``, whose D2 is half as large: the
            published code has it, and diffusers too, and is of second order.
        lower_order_final: lower the order of the last steps when there are fewer than 15.
        euler_at_final: always take the last step at first order.
        final_sigmas_type: end at the clean image (``zero``; the last step is then exact at first order) or at
            the first training step (``sigma_min``).
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`); ``auto`` unless you compare
            with diffusers, whose grids ``diffusers`` reproduces. A ``use_*_sigmas`` flag set in the config
            wins over ``auto``.

    The other options are diffusers'.
    """

    @scheduler_options
    def __init__(
        self,
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        third_order: str = "taylor",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
        **shared: Any,
    ) -> None:
        if solver_order not in (1, 2, 3):
            raise UserError(f"solver_order must be 1, 2 or 3, but is {solver_order}")
        check_choice("solver_type", solver_type, ("midpoint", "heun"))
        check_choice("third_order", third_order, ("taylor", "published"))
        check_choice("algorithm_type", algorithm_type, ("dpmsolver++",))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        config = super()._translated(config)
        if "solver_type" in config:
            config["solver_type"] = _SOLVER_TYPES.get(config["solver_type"], config["solver_type"])
        if config.get("algorithm_type") in ("dpmsolver", "deis"):
            logger.warning("algorithm_type %r becomes 'dpmsolver++'", config["algorithm_type"])
            config["algorithm_type"] = "dpmsolver++"
        if isinstance(config.get("solver_order"), int):
            config["solver_order"] = min(config["solver_order"], 3)
        return config

    def _plan(self, times: Array) -> Plan:
        config = self.config
        orders = multistep_orders(
            len(times) - 1,
            config.solver_order,
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
        )
        weights = multistep_weights(
            self.schedule, times, orders, solver_type=config.solver_type, third_order=config.third_order
        )
        return Plan(
            tuple(
                Row(time=float(t), convert=self._conversion(t), x={e: a}, m=m)
                for e, (t, (a, m)) in enumerate(zip(times[:-1], weights, strict=True))
            )
        )


def multistep_orders(
    count: int, order: int, *, lower_order_final: bool, euler_at_final: bool = False
) -> list[int]:
    """The order of each of `count` steps: a ramp at the start and, below 15 steps, one at the end."""
    orders = [min(order, k + 1) for k in range(count)]
    if lower_order_final and count < 15:
        orders = [min(p, count - k) for k, p in enumerate(orders)]
    if euler_at_final:
        orders[-1] = 1
    return orders


def multistep_weights(
    schedule: NoiseSchedule, times: Array, orders: list[int], *, solver_type: str, third_order: str
) -> list[tuple[float, dict[int, float]]]:
    """Per step k: the weight of the sample, and those of the data predictions by evaluation.

    A step to sigma = 0, from alpha = 0, or with no earlier prediction at a finite distance falls back to the
    order that its limit allows, which is exact.
    """
    alpha, sigma = schedule.alpha_sigma(times)
    lambda_ = schedule.lambda_(times)
    steps = []
    for k, wanted in enumerate(orders):
        h = float(lambda_[k + 1] - lambda_[k])
        order = 1 if math.isinf(h) else wanted
        # Gaps to the earlier predictions, in steps; the sample at alpha = 0 lies infinitely far away.
        gaps = [float(lambda_[k - i] - lambda_[k - i - 1]) / h for i in range(order - 1)]
        phi1, phi2, phi3 = phis(-h, 3)
        c1, c2 = phi2, phi3
        if order == 2 and solver_type == "midpoint":
            c1 = phi1 / 2
        # m, D1, D2 as rows of weights of the newest three predictions.
        m = np.array([1.0, 0.0, 0.0])
        d1, d2 = np.zeros(3), np.zeros(3)
        if order >= 2 and math.isfinite(gaps[0]):
            e0 = np.array([1.0, -1.0, 0.0]) / gaps[0]
            d1 = e0
            if order == 3 and math.isfinite(gaps[1]):
                e1 = np.array([0.0, 1.0, -1.0]) / gaps[1]
                d1 = e0 + gaps[0] / (gaps[0] + gaps[1]) * (e0 - e1)
                d2 = (2.0 if third_order == "taylor" else 1.0) * (e0 - e1) / (gaps[0] + gaps[1])
        total = -float(alpha[k + 1]) * (phi1 * m + c1 * d1 + c2 * d2)
        weights = {k - i: float(total[i]) for i in range(3) if total[i] != 0.0}
        steps.append((float(sigma[k + 1] / sigma[k]), weights))
    return steps
