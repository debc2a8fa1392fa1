"""DPM-Solver-v3 (Zheng et al. 2023): exponential integration with coefficients estimated from the model.

With per-coordinate functions l, s, b of half log-SNR lambda (the empirical model statistics) and their
integrals ``L = int l``, ``S = int s``, ``B = int e^{-S} b``, the method integrates

    f = (sigma eps - l x) / alpha,        g_k = e^{S_0 - S_k} f_k - e^{S_0} (B_k - B_0)        (section 3.1)

where 0 is the point a step starts from: g is f without the part of its slope that is affine in f. A step to
point 1 follows from the variation of constants and a polynomial through g (equation 12):

    x_1 / alpha_1 = e^{L_0 - L_1} [x_0 / alpha_0 - K - sum_k J_k g^(k)_0]
    J_k = int_0^1 e^{L + S - L_0 - S_0} (lambda - lambda_0)^k / k!,    K = int_0^1 e^{L + S - L_0} (B - B_0)

Everything is linear in x, in the f of earlier points and in a constant, so it is a plan with ``m = f``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers import grids
from diffalign.solvers.options import check_choice, check_numbers, scheduler_options
from diffalign.solvers.phi import phis
from diffalign.solvers.plan import Coefficient, Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin
from diffalign.solvers.statistics import RANGE_SLACK, Sidecar, Statistics

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DPMSolverV3Scheduler", "SchedulerMixin", "derivative_weights"]

# Times rounded to float32 move a place among the rows by less than this.
_TIE = 1e-4
# Above this guidance scale the corrector diverges in few steps (measured on mixtures at 7.5).
_CORRECTOR_GUIDANCE = 3.0


class DPMSolverV3Scheduler(PlanScheduler):
    """DPM-Solver-v3, multistep, of order 1 to 3, with an optional corrector that costs no evaluation.

    Without statistics it integrates the data prediction (l = 1, s = b = 0) and is DPM-Solver++ with other
    finite differences: order 1 is DDIM. With those of the model (``diffalign calibrate ems``) it needs fewer
    steps. Where lambda leaves the range of the statistics (the clean image, alpha = 0) a step is DDIM's.

    In memory a config carries its statistics, so ``from_config`` keeps them. A config that was read from
    JSON alone names them only; then ``set_timesteps`` raises until they are passed, or ``statistics=None``.

    Args:
        solver_order: 1, 2 or 3; 2 for guided sampling, 3 without guidance.
        statistics: a :class:`~diffalign.solvers.statistics.Statistics`; None for none.
        predictor_pseudo: estimate derivatives by plain divided differences (meant for 5 or 6 steps).
        use_corrector: None is yes for statistics made at guidance up to 3, else no: it diverges at high
            guidance in few steps.
        corrector_pseudo: the same estimate in the corrector, whose order is then one higher.
        corrector_range: continuous times (from, to] in which it runs; (0, 0.5) is the paper's half corrector,
            (0.5, 1) that of the released code.
        lower_order_final: lower the order of the last steps.
        final_sigmas_type: end at the clean image (``zero``) or at the first training step (``sigma_min``, as
            published).
        snap: round times to rows of the statistics and integrate by trapezoids, as published; else l, s, b
            are interpolated linearly and integrated to fourth order. No effect without statistics.
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`).

    The other options are diffusers'. ``thresholding`` needs a run without statistics.
    """

    _sidecars: ClassVar[dict[str, type[Sidecar]]] = {"statistics": Statistics}

    @scheduler_options
    def __init__(
        self,
        solver_order: int = 2,
        statistics: Any = None,
        predictor_pseudo: bool = False,
        use_corrector: bool | None = None,
        corrector_pseudo: bool = True,
        corrector_range: Sequence[float] = (0.0, 1.0),
        lower_order_final: bool = True,
        final_sigmas_type: str = "zero",
        snap: bool = False,
        **shared: Any,
    ) -> None:
        if solver_order not in (1, 2, 3):
            raise UserError(f"solver_order must be 1, 2 or 3, but is {solver_order!r}")
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        first, last = check_numbers("corrector_range", corrector_range, 2)
        if not 0.0 <= first < last <= 1.0:
            raise UserError(f"corrector_range must be (from, to] within 0 and 1, but is {corrector_range}")
        if isinstance(statistics, Statistics):
            statistics = statistics.record()
        if statistics is not None and not (isinstance(statistics, Mapping) and "sha256" in statistics):
            raise UserError(
                f"statistics must be a Statistics object or None, not {type(statistics).__name__}; "
                "Statistics.load(file) reads one"
            )
        # JSON has lists only.
        self.register_to_config(statistics=statistics, corrector_range=[first, last])

    def _setup(self) -> None:
        super()._setup()
        statistics = self.statistics
        if statistics is not None:
            statistics.check_schedule(self.schedule)
            if self.config.thresholding:
                raise UserError(
                    "thresholding cannot be combined with statistics, which describe the network without it; "
                    "set thresholding=False or statistics=None"
                )

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        config = super()._translated(config)
        if isinstance(config.get("solver_order"), int):
            config["solver_order"] = min(config["solver_order"], 3)
        return config

    @property
    def statistics(self) -> Statistics | None:
        """The statistics in use."""
        return getattr(self.config.statistics, "content", None)

    def _table(self) -> _Table:
        statistics = self.statistics
        if statistics is not None:
            return _Fitted(statistics, self.config.snap)
        if self.config.statistics is not None:
            raise UserError(
                "this config was saved with statistics that are not here; load the scheduler with "
                "from_pretrained from its folder, pass statistics=..., or statistics=None to sample without"
            )
        return _Free()

    def _corrects(self) -> bool:
        if self.config.use_corrector is not None:
            return bool(self.config.use_corrector)
        guidance = self.statistics.info.get("guidance_scale") if self.statistics is not None else None
        return guidance is not None and float(guidance) <= _CORRECTOR_GUIDANCE

    def _check_sample(self, sample: Tensor) -> None:
        if self.statistics is not None:
            self.statistics.check_sample(sample.shape)

    def _evaluations(self, times: Array) -> Array:
        statistics = self.statistics
        if statistics is None or not self.config.snap:
            return times
        lambda_ = self.schedule.lambda_(times)
        inside = _Fitted(statistics, True).covers(lambda_)
        snapped = times.copy()
        rows = statistics.lambdas[_rows(statistics, lambda_[inside])]
        low = float(self.schedule.lambda_(self.schedule.t_max))
        snapped[inside] = self.schedule.t_of_lambda(np.maximum(rows, low))
        return grids.checked(snapped)

    def _plan(self, times: Array) -> Plan:
        config, count = self.config, len(times) - 1
        table = self._table()
        alpha, sigma = self.schedule.alpha_sigma(times)
        lambda_ = self.schedule.lambda_(times)
        inside = table.covers(lambda_)
        lambda_ = np.where(inside, table.placed(np.where(inside, lambda_, 0.0)), lambda_)
        clock = (times - self.schedule.t_clean) / (self.schedule.t_max - self.schedule.t_clean)
        first, last = config.corrector_range
        rows: list[Row] = []
        led: _Step | None = None  # the step that led here, if a corrector can improve on it
        led_order = known = 0
        for e in range(count):
            correction = None
            if led is not None and self._corrects() and first < clock[e] <= last:
                order = led_order + int(config.corrector_pseudo)
                nodes = [e - 1, e, *range(e - 2, e - 1 - led_order, -1)][:order]
                if order >= 2:
                    better = _step(table, alpha, lambda_, e, nodes, config.corrector_pseudo)
                    correction = better.minus(led)
            known = known + 1 if inside[e] else 0
            if inside[e] and inside[e + 1]:
                led_order = min(config.solver_order, known)
                if config.lower_order_final:
                    led_order = min(led_order, count - e)
                nodes = list(range(e, e - led_order, -1))
                step = led = _step(table, alpha, lambda_, e + 1, nodes, config.predictor_pseudo)
            else:
                l = table.l(lambda_[e]) if inside[e] else 1.0  # noqa: E741
                step, led = _data_step(alpha, sigma, e, l), None
            if correction is not None:
                step = step.after(correction)
            c_x, c_o = self._conversion(times[e], "sample")
            y = (1.0 - table.l(lambda_[e])) / alpha[e] if inside[e] else 0.0
            rows.append(
                Row(float(times[e]), (y - c_x, -1.0 * c_o), x={e: step.x}, m=step.m, bias=_array(step.bias))
            )
        return Plan(tuple(rows))


@dataclass(frozen=True)
class _Step:
    """``x_1 = x x_0 + sum_j m[j] f_j + bias``."""

    x: Coefficient
    m: dict[int, Coefficient]
    bias: Coefficient

    def minus(self, other: _Step) -> _Step:
        """What a corrector adds to the state that `other`, a step with the same start, predicted."""
        m = {j: self.m.get(j, 0.0) - other.m.get(j, 0.0) for j in {**self.m, **other.m}}
        return _Step(1.0, m, self.bias - other.bias)

    def after(self, correction: _Step) -> _Step:
        """This step from the state ``x + correction``."""
        m = {j: self.m.get(j, 0.0) + self.x * correction.m.get(j, 0.0) for j in {**self.m, **correction.m}}
        return _Step(self.x, m, self.bias + self.x * correction.bias)


def _array(bias: Coefficient) -> Array | None:
    return np.asarray(bias) if np.any(bias) else None


def _data_step(alpha: Array, sigma: Array, e: int, l: Coefficient) -> _Step:  # noqa: E741
    """DDIM's step in terms of f: the data prediction is ``(1 - l) x / alpha - f``."""
    ratio = sigma[e + 1] / sigma[e]
    weight = alpha[e + 1] - ratio * alpha[e]
    y = (1.0 - l) / alpha[e] if np.any(l != 1.0) else 0.0
    return _Step(ratio + weight * y, {e: -weight}, 0.0)


def _step(table: _Table, alpha: Array, lambda_: Array, target: int, nodes: list[int], pseudo: bool) -> _Step:
    """The step from ``nodes[0]`` to `target` with a polynomial through g at all `nodes`."""
    base = nodes[0]
    decay, moments, constant = table.integrals(lambda_[base], lambda_[target], len(nodes) - 1)
    weights = derivative_weights(lambda_[nodes] - lambda_[base], pseudo)
    scale = alpha[target] * decay
    m: dict[int, Coefficient] = {}
    bias: Coefficient = -scale * constant
    for column, node in enumerate(nodes):
        of_g = sum(j * w for j, w in zip(moments, weights[:, column], strict=True))
        growth, offset = table.shift(lambda_[base], lambda_[node])
        m[node] = -scale * of_g * growth
        bias = bias + scale * of_g * offset
    return _Step(scale / alpha[base], m, bias)


def derivative_weights(offsets: Array, pseudo: bool) -> Array:
    """(n + 1, n + 1): row k gives the k-th derivative at the base from the values at the nodes.

    By the interpolating polynomial or, if `pseudo`, by the divided difference ``k! [g_0, ..., g_k]`` over the
    nodes in their order, which sees fewer of them. The two agree for one node beside the base, and for the
    highest derivative.

    Args:
        offsets: (n + 1,) of the nodes from the base, which is first.
    """
    count = len(offsets)
    factorials = np.array([float(math.factorial(k)) for k in range(count)])
    if not pseudo:
        return np.linalg.inv(np.vander(offsets, increasing=True)) * factorials[:, None]
    weights = np.zeros((count, count))
    for k in range(count):
        gaps = offsets[: k + 1, None] - offsets[None, : k + 1] + np.eye(k + 1)
        weights[k, : k + 1] = factorials[k] / gaps.prod(axis=1)
    return weights


# ------------------------------------------------------- integrals of the statistics


class _Table(Protocol):
    """l, S, B and the integrals of a step, in lambda."""

    def covers(self, lambda_: Array) -> NDBool: ...

    def placed(self, lambda_: Array) -> Array: ...

    def l(self, lambda_: float) -> Coefficient: ...  # noqa: E743

    def shift(self, base: float, node: float) -> tuple[Coefficient, Coefficient]:
        """``e^{S_0 - S_k}`` and ``e^{S_0} (B_k - B_0)``, k the node and 0 the base."""

    def integrals(
        self, base: float, target: float, degree: int
    ) -> tuple[Coefficient, list[Coefficient], Coefficient]:
        """``e^{L_0 - L_1}``, ``J_0 .. J_degree`` and K of the module's formula."""


NDBool = np.ndarray[Any, np.dtype[np.bool_]]


class _Free:
    """No statistics: l = 1, s = b = 0, in closed form."""

    def covers(self, lambda_: Array) -> NDBool:
        return np.isfinite(lambda_)

    def placed(self, lambda_: Array) -> Array:
        return lambda_

    def l(self, lambda_: float) -> Coefficient:  # noqa: E743
        return 1.0

    def shift(self, base: float, node: float) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0

    def integrals(
        self, base: float, target: float, degree: int
    ) -> tuple[Coefficient, list[Coefficient], Coefficient]:
        # int_0^h e^r r^k / k! dr = -e^h h^k phi_{k+1}(-h)
        h = float(target - base)
        growth = math.exp(h)
        return 1 / growth, [-growth * h**k * p for k, p in enumerate(phis(-h, degree + 1))], 0.0


class _Fitted:
    """Statistics as piecewise linear functions, integrated with a per-interval rule.

    The rule is the trapezoid, corrected by the slopes at its ends (Hermite), which makes it of fourth order;
    published code (`snap`) leaves the correction out and steps from row to row. L and S, integrals of linear
    pieces, are exact either way.
    """

    def __init__(self, statistics: Statistics, snap: bool) -> None:
        self._statistics, self._snap = statistics, snap
        self._grid = statistics.lambdas

    def covers(self, lambda_: Array) -> NDBool:
        slack = RANGE_SLACK * (self._grid[-1] - self._grid[0]) + (self._snap * 0.5) * np.diff(self._grid)[0]
        return (lambda_ >= self._grid[0] - slack) & (lambda_ <= self._grid[-1] + slack)

    def placed(self, lambda_: Array) -> Array:
        if self._snap:
            return self._grid[_rows(self._statistics, lambda_)]
        return np.clip(lambda_, self._grid[0], self._grid[-1])

    def _at(self, values: Array, lambda_: Array) -> Array:
        position = np.interp(lambda_, self._grid, np.arange(len(self._grid), dtype=np.float64))
        low = np.minimum(position.astype(int), len(self._grid) - 2)
        part = (position - low).reshape(-1, *[1] * (values.ndim - 1))
        return (1.0 - part) * values[low] + part * values[low + 1]

    def l(self, lambda_: float) -> Coefficient:  # noqa: E743
        return self._at(self._statistics.l, np.array([lambda_]))[0]

    def _pieces(self, start: float, end: float) -> tuple[Array, Array, Array, Array]:
        """Points from `start` to `end` with every row between, and l, s, b there."""
        slack = 1e-9 * (self._grid[1] - self._grid[0])
        rows = self._grid[(self._grid > start + slack) & (self._grid < end - slack)]
        points = np.concatenate([[start], rows, [end]])
        statistics = self._statistics
        return points, *(self._at(v, points) for v in (statistics.l, statistics.s, statistics.b))  # type: ignore[return-value]

    def _cumulative(self, d: Array, y: Array, left: Array | float, right: Array | float) -> Array:
        """Integral of y up to each point, from its slopes at the left and right end of each interval."""
        steps = 0.5 * d * (y[:-1] + y[1:])
        if not self._snap:
            steps = steps + d**2 / 12.0 * (left - right)
        return np.concatenate([np.zeros_like(y[:1]), np.cumsum(steps, axis=0)])

    def _drift(self, d: Array, decay: Array, s: Array, b: Array) -> Array:
        """``int e^{-S} b`` up to each point, `decay` being ``e^{-S}``."""
        slope = np.diff(b, axis=0) / d
        left, right = decay[:-1] * (slope - s[:-1] * b[:-1]), decay[1:] * (slope - s[1:] * b[1:])
        return self._cumulative(d, decay * b, left, right)

    def shift(self, base: float, node: float) -> tuple[Coefficient, Coefficient]:
        if node == base:
            return 1.0, 0.0
        points, _, s, b = self._pieces(min(base, node), max(base, node))
        d = _column(np.diff(points), s)
        integral = _linear_integral(d, s)
        # From the base: S - S_0, whichever of the two is the earlier point.
        integral = integral - (integral[-1] if node < base else 0.0)
        drift = self._drift(d, np.exp(-integral), s, b)[-1]
        if node < base:
            return np.exp(-integral[0]), -drift
        return np.exp(-integral[-1]), drift

    def integrals(
        self, base: float, target: float, degree: int
    ) -> tuple[Coefficient, list[Coefficient], Coefficient]:
        points, l, s, b = self._pieces(base, target)  # noqa: E741
        d = _column(np.diff(points), l)
        r = _column(points - base, l)
        big_l, big_s = _linear_integral(d, l), _linear_integral(d, s)
        growth, decay = np.exp(big_l + big_s), np.exp(-big_s)
        rate = l + s
        moments: list[Coefficient] = []
        below: Array | float = 0.0  # r^(k-1) / (k-1)!
        for k in range(degree + 1):
            power = r**k / math.factorial(k)
            slope = growth * (rate * power + below)
            moments.append(self._cumulative(d, growth * power, slope[:-1], slope[1:])[-1])
            below = power
        drift = self._drift(d, decay, s, b)
        slope = growth * (rate * drift + decay * b)
        constant = self._cumulative(d, growth * drift, slope[:-1], slope[1:])[-1]
        return np.exp(-big_l[-1]), moments, constant


def _linear_integral(d: Array, y: Array) -> Array:
    """Cumulative integral of a piecewise linear function."""
    return np.concatenate([np.zeros_like(y[:1]), np.cumsum(0.5 * d * (y[:-1] + y[1:]), axis=0)])


def _column(values: Array, like: Array) -> Array:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _rows(statistics: Statistics, lambda_: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The nearest row of each lambda. Ties, which rounding would decide, go to the cleaner row."""
    grid = statistics.lambdas
    position = (lambda_ - grid[0]) / (grid[-1] - grid[0]) * (len(grid) - 1)
    return np.clip(np.rint(position + _TIE), 0, len(grid) - 1).astype(np.int64)
