"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs no network evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import logging

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice, scheduler_options
from diffalign.solvers.phi import phis
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = [
    "Corrected",
    "SchedulerMixin",
    "UniPCScheduler",
    "Weights",
    "folded",
    "unipc_orders",
    "unipc_steps",
]

logger = logging.get_logger(__name__)

#: Evaluation index -> weight of the prediction made there.
Weights = dict[int, float]

#: B(H) of the paper (after equation 8), where one node makes it matter.
_B: dict[str, Callable[[float], float]] = {"bh1": lambda step: step, "bh2": math.expm1}

# solver_type of other diffusers classes, which their configs carry over.
_SOLVER_TYPES = {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}


class UniPCScheduler(PlanScheduler):
    """UniP predictor of order p and UniC corrector, together of order p + 1. Order 1 without it is DDIM.

    With H the signed step in half log-SNR (-h in data form, h in noise form), P the level of what is
    predicted (alpha, sigma) and a the ratio of the other level, nodes ``r_i`` the places of earlier
    predictions in units of the step, and ``F_i = (m_i - m_0) / r_i``:

        x_t = a x - P [phi_1(H) m_0 + sum_i w_i F_i],    sum_i w_i r_i^(k-1) = k! phi_(k+1)(H)

    (equations 3 and 8 with w = B rho). The corrector has one node more, ``r = 1``: the prediction at the
    predicted ``x_t``. It is then kept as history, though it was made at the uncorrected point.

    Args:
        solver_order: 1 to 4; 2 is the robust choice for guided sampling, 3 for unguided.
        predict_x0: combine data predictions; False for noise predictions.
        solver_type: ``bh2`` or ``bh1``: the weight B / 2 of a single node, B = e^H - 1 or H. With more nodes
            B cancels. ``bh1`` diverges more easily under guidance.
        vary_coeff: solve for single nodes as well, which ``solver_type`` then has no say in.
        lower_order_final: lower the order of the last steps.
        use_corrector: False for the predictor alone.
        disable_corrector: indices of steps whose result is not corrected. Correcting the first two makes few
            guided steps diverge, and gains little: on the mixture of the benchmarks at 5 steps the error is
            0.08 without, and with it 0.88 at guidance 7.5, 0.08 unguided.
        final_sigmas_type: end at the clean image (``zero``; the last step is then exact at first order) or at
            the first training step (``sigma_min``).
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`); ``auto`` unless you compare
            with diffusers, whose grids ``diffusers`` reproduces.

    The other options are diffusers'.
    """

    @scheduler_options
    def __init__(
        self,
        solver_order: int = 2,
        predict_x0: bool = True,
        solver_type: str = "bh2",
        vary_coeff: bool = False,
        lower_order_final: bool = True,
        use_corrector: bool = True,
        disable_corrector: list[int] = [0, 1],  # noqa: B006  only read; diffusers needs a list
        final_sigmas_type: str = "zero",
        **shared: Any,
    ) -> None:
        check_unipc_options(solver_order, solver_type, final_sigmas_type, disable_corrector)
        if not predict_x0:
            self.form = "epsilon"

    def _setup(self) -> None:
        super()._setup()
        if not self.config.predict_x0 and self.config.thresholding:
            raise UserError("thresholding acts on data predictions; it needs predict_x0=True")
        if not self.config.predict_x0 and self.schedule.alpha(self.schedule.t_max) == 0.0:
            raise UserError(
                "predict_x0=False cannot start where alpha is 0 (flow models, zero terminal SNR); "
                "use predict_x0=True"
            )

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        return super()._translated(translated(config))

    def _plan(self, times: Array) -> Plan:
        config = self.config
        steps = unipc_steps(
            self.schedule,
            times,
            unipc_orders(len(times) - 1, config.solver_order, lower_order_final=config.lower_order_final),
            form=self.form,
            solver_type=None if config.vary_coeff else config.solver_type,
            corrected=lambda k: config.use_corrector and self._origin + k not in config.disable_corrector,
        )
        weights = folded(steps, [{j: 1.0} for j in range(len(steps))])
        return Plan(
            tuple(
                Row(time=float(t), convert=self._conversion(t), x={e: step.x}, m=m)
                for e, (t, step, m) in enumerate(zip(times[:-1], steps, weights, strict=True))
            )
        )


def check_unipc_options(order: int, solver_type: str, final: str, disable_corrector: Sequence[int]) -> None:
    """UserError unless these are options of UniPC."""
    if order not in (1, 2, 3, 4):
        raise UserError(f"solver_order must be 1, 2, 3 or 4, but is {order!r}")
    check_choice("solver_type", solver_type, tuple(_B))
    check_choice("final_sigmas_type", final, ("zero", "sigma_min"))
    if not isinstance(disable_corrector, list | tuple) or any(
        not isinstance(k, int) or k < 0 for k in disable_corrector
    ):
        raise UserError(f"disable_corrector must be a list of step indices, but is {disable_corrector!r}")


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """A config of another multistep scheduler in UniPC's terms."""
    if "solver_type" in config:
        config["solver_type"] = _SOLVER_TYPES.get(config["solver_type"], config["solver_type"])
    if isinstance(config.get("solver_order"), int):
        config["solver_order"] = min(config["solver_order"], 4)
    defaults = config.get("_use_default_values", ())
    theirs = config.get("_class_name") == "UniPCMultistepScheduler" or "disable_corrector" in defaults
    if theirs and not config.get("disable_corrector"):
        config.pop("disable_corrector", None)  # diffusers' default, which nobody chose
    if config.pop("solver_p", None) is not None:
        logger.warning("solver_p is left out: the predictor is UniPC's own")
    return config


# ------------------------------------------------------- the method


@dataclass(frozen=True)
class Corrected:
    """One step: ``x_t = x x_s + sum_j predictor[j] m_j``, and the same with `corrector` where there is one.

    Attributes:
        x: weight of the (corrected) state that the step leaves.
        predictor: weights of the predictions made up to there.
        corrector: the same with the prediction made at the predicted ``x_t``, or None.
    """

    x: float
    predictor: Mapping[int, float]
    corrector: Mapping[int, float] | None = None


def unipc_orders(count: int, order: int, *, lower_order_final: bool) -> list[int]:
    """The order of each of `count` steps: a ramp at the start and, if wanted, one at the end."""
    return [min(order, k + 1, count - k if lower_order_final else order) for k in range(count)]


def unipc_steps(
    schedule: NoiseSchedule,
    times: Array,
    orders: Sequence[int],
    *,
    form: str,
    solver_type: str | None,
    corrected: Callable[[int], bool],
) -> list[Corrected]:
    """The steps between `times`.

    Args:
        schedule: what the times mean.
        times: (n + 1,).
        orders: (n,), of the predictor.
        form: ``"sample"`` or ``"epsilon"``, the kind of prediction that is combined.
        solver_type: ``"bh1"``, ``"bh2"``, or None for the varying coefficients.
        corrected: whether the result of step k is; that of the last cannot be.
    """
    alpha, sigma = schedule.alpha_sigma(times)
    lambda_ = schedule.lambda_(times)
    level, other, sign = (alpha, sigma, -1.0) if form == "sample" else (sigma, alpha, 1.0)
    steps = []
    for k, order in enumerate(orders):
        h = float(lambda_[k + 1] - lambda_[k])
        a = float(other[k + 1] / other[k])
        wanted = corrected(k) and k + 1 < len(orders)
        if math.isinf(h):
            # To sigma = 0, or from alpha = 0: the first order, exact for a constant prediction, and for the
            # corrector the mean of both predictions, the limit of bh2.
            total = float(level[k + 1] - a * level[k])
            steps.append(Corrected(a, {k: total}, {k: total / 2, k + 1: total / 2} if wanted else None))
            continue
        # A prediction at alpha = 0 lies infinitely far back.
        nodes = {k - i: float(lambda_[k - i] - lambda_[k]) / h for i in range(1, order)}
        nodes = {j: r for j, r in nodes.items() if math.isfinite(r)}
        step, scale = sign * h, -float(level[k + 1])
        steps.append(
            Corrected(
                a,
                _weights(k, nodes, step, scale, solver_type),
                _weights(k, {**nodes, k + 1: 1.0}, step, scale, solver_type) if wanted else None,
            )
        )
    return steps


def _weights(base: int, nodes: Weights, step: float, scale: float, solver_type: str | None) -> Weights:
    """Weights of the predictions at `base` (the step's start) and at `nodes`, evaluation -> place r."""
    phi1, *phi = phis(step, len(nodes) + 1)
    r = np.array(list(nodes.values()))
    if len(nodes) == 1 and solver_type is not None:
        w = np.array([_B[solver_type](step) / 2])
    else:
        powers = np.vander(r, increasing=True).T
        w = np.linalg.solve(powers, [math.factorial(k) * p for k, p in enumerate(phi, 1)])
    of_nodes = scale * w / r
    return {base: scale * phi1 - float(of_nodes.sum()), **dict(zip(nodes, of_nodes.tolist(), strict=True))}


def folded(steps: Sequence[Corrected], buffered: Sequence[Mapping[int, float]]) -> list[Weights]:
    """Per evaluation e, the weights of ``m_0 .. m_e`` in the next sample, correctors included.

    The corrected state is ``x_e + sum_j (corrector - predictor)[j] m_j`` of the step that led here; its part
    beyond ``x_e`` is carried through the step that leaves.

    Args:
        steps: in order.
        buffered: what the history holds in the place of each prediction, as weights of predictions; one and
            the same for plain UniPC. The newest prediction enters a corrector as it is.
    """
    rows: list[Weights] = []
    before: Corrected | None = None
    for e, step in enumerate(steps):
        row: Weights = {}
        _add(row, 1.0, step.predictor, buffered)
        if before is not None and before.corrector is not None:
            history = {j: c for j, c in before.corrector.items() if j != e}
            _add(row, step.x, history, buffered)
            _add(row, -step.x, before.predictor, buffered)
            row[e] = row.get(e, 0.0) + step.x * before.corrector[e]
        rows.append({j: c for j, c in row.items() if c != 0.0})
        before = step
    return rows


def _add(
    row: Weights, factor: float, weights: Mapping[int, float], buffered: Sequence[Mapping[int, float]]
) -> None:
    for j, c in weights.items():
        for i, b in buffered[j].items():
            row[i] = row.get(i, 0.0) + factor * c * b
