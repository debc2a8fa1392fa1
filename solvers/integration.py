"""Integration with error control: the adaptive DPM-Solvers, and a reference solution.

A scheduler fixes its times before the first evaluation; what is here chooses them by the error it sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import RunFailed, UserError
from diffalign.solvers.exponential import RULE_OF_TYPE, Equation, Points, Update, singlestep_end, update
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice
from diffalign.solvers.plan import linear, working_dtype
from diffalign.solvers.prediction import check_prediction_type, convert
from diffalign.solvers.sampling import ModelFn

Array = NDArray[np.float64]

# Where alpha is 0 the sample is noise and lambda infinite; up to here x changes by a part in e^12.
_LAMBDA_START = -12.0
_FIRST_STEP, _SAFETY = 0.05, 0.9
# Bounds of the ratio between one step and the next.
_SHRINK, _GROW = 0.1, 5.0
_SMALLEST_STEP = 1e-9
# The published loop ends within this part of the training time.
_PUBLISHED_STOP = 1e-5
# The tolerance of the second run of a reference solution, which tells the error of the first.
_COARSER = 32.0


@dataclass(frozen=True)
class Adaptive:
    """Two updates of different order over the same evaluations, the first of which is the step's start.

    Attributes:
        form: of the prediction, as in :class:`~diffalign.solvers.exponential.Equation`.
        stages: where the other evaluations lie, as fractions of the step in half log-SNR.
        low: how many of the evaluations the update of lower order reads; the other reads all.
    """

    form: str
    stages: tuple[float, ...]
    low: int

    @property
    def order(self) -> int:
        return len(self.stages) + 1


#: DPM-Solver-12 and -23 (DPM-Solver, appendix C) in both forms.
ADAPTIVE: dict[str, Adaptive] = {
    "dpm-solver-12": Adaptive("epsilon", (1 / 2,), 1),
    "dpm-solver-23": Adaptive("epsilon", (1 / 3, 2 / 3), 2),
    "dpm-solver++-12": Adaptive("sample", (1 / 2,), 1),
    "dpm-solver++-23": Adaptive("sample", (1 / 3, 2 / 3), 2),
}
METHODS: tuple[str, ...] = (*ADAPTIVE, "reference")


@dataclass(frozen=True)
class Integration:
    """A sample and what it took.

    Attributes:
        sample: of the shape, dtype and device of the noise.
        evaluations: calls of the network.
        accepted, rejected: steps; one number for the batch, or with ``control="sample"`` one per image.
        error: per image, the estimated relative L2 error (of ``reference``; else None).
    """

    sample: Tensor
    evaluations: int
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    error: tuple[float, ...] | None = None


def integrate(
    model_fn: ModelFn,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    method: str = "dpm-solver++-23",
    prediction_type: str = "epsilon",
    t_start: float | None = None,
    t_end: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    control: str = "batch",
    solver_type: str = "midpoint",
    published: bool = False,
    max_evaluations: int = 100_000,
) -> Integration:
    """Solve the probability-flow ODE of a network from `noise`, with steps chosen by their error.

    The adaptive methods compare two orders in every step and keep the higher. ``reference`` is the
    fifth-order pair of Dormand and Prince on ``dy/dlambda = -e^{-lambda} eps``, ``y = x / alpha``, run at its
    tolerances and at 32 times these; the difference of the two is its error estimate, a cautious one.

    Args:
        model_fn: ``(x, t) -> output`` of type `prediction_type`; channels beyond those of x (a learned
            variance) are left out. t is a 0-d tensor, or (B,) with ``control="sample"``.
        noise: (B, ...) the sample at `t_start`. The network is given its dtype; the arithmetic is float64 for
            float64 and else float32.
        schedule: what t means; ``scheduler.schedule`` of any scheduler of this package.
        method: one of :data:`METHODS`.
        prediction_type: key of :data:`~diffalign.solvers.prediction.PREDICTIONS`.
        t_start: ``schedule.t_max`` unless given.
        t_end: unless given, the clean image: the ODE is solved to ``schedule.t_min``, and one more evaluation
            there gives the data prediction.
        atol, rtol: the error that a step may make, ``max(atol, rtol |x|)`` per entry, in the root mean square
            over an image. Unless given, 0.0078 and 0.05, the paper's; for ``reference`` 1e-7 both, in float32
            1e-5.
        control: ``batch`` takes the steps that the worst image needs. ``sample`` lets each image have its
            own, which do not depend on the others; an image that is done waits for them.
        solver_type: of both orders of an adaptive method, as in
            :class:`~diffalign.solvers.dpm_solver_pp.DPMSolverPPScheduler`: ``midpoint``, or ``heun`` (the
            papers' Taylor type).
        published: steps as the published code takes them: their growth is unbounded, and the end is reached
            within 1e-5 of the training time.
        max_evaluations: how many calls of the network are too many.

    Returns:
        The sample and the cost. One host synchronisation per step tried. Differentiable unless the caller
        turns that off.

    Raises:
        UserError: for bad arguments.
        RunFailed: when the network's output is not finite, or the tolerance cannot be met.
    """
    _check_choices(method, prediction_type, control, solver_type, published)
    dtype = working_dtype(noise)
    tolerance = _tolerance(method, atol, rtol, dtype)
    start = schedule.t_max if t_start is None else float(t_start)
    end = schedule.t_min if t_end is None else float(t_end)
    if not schedule.t_clean < end < start <= schedule.t_max:
        raise UserError(
            f"t_start and t_end must fall from at most {schedule.t_max:g} to above {schedule.t_clean:g} (for "
            f"the clean image leave t_end out), but are {start:g} and {end:g}"
        )
    network = Network(model_fn, schedule, prediction_type, noise.dtype, control == "sample", max_evaluations)
    x = noise.to(dtype)
    clocks = len(noise) if control == "sample" else 1
    if schedule.alpha(start) == 0.0:
        x, start = _leave_noise(network, x, start, clocks)

    def finished(x: Tensor) -> Tensor:
        return network(x, [end] * clocks, "sample") if t_end is None else x

    if method in ADAPTIVE:
        rule = RULE_OF_TYPE[solver_type]
        x, accepted, rejected = _adaptive(
            network, x, start, end, ADAPTIVE[method], tolerance, rule, published=published
        )
        return Integration(finished(x).to(noise.dtype), network.calls, tuple(accepted), tuple(rejected))
    fine, good, bad = _dormand_prince(network, x, start, end, tolerance)
    coarse, *_ = _dormand_prince(network, x, start, end, tolerance.times(_COARSER))
    fine, coarse = finished(fine), finished(coarse)
    error = (fine - coarse).flatten(1).norm(dim=1) / fine.flatten(1).norm(dim=1)
    return Integration(fine.to(noise.dtype), network.calls, (good,), (bad,), tuple(error.detach().tolist()))


def _check_choices(
    method: str, prediction_type: str, control: str, solver_type: str, published: bool
) -> None:
    check_choice("method", method, METHODS)
    check_choice("control", control, ("batch", "sample"))
    check_choice("solver_type", solver_type, tuple(RULE_OF_TYPE))
    check_prediction_type(prediction_type)
    if method == "reference" and (control == "sample" or solver_type != "midpoint" or published):
        raise UserError(
            "method='reference' takes one step for the batch, and has no solver types and no published form"
        )


@dataclass(frozen=True)
class Tolerance:
    """How far two candidates for a sample may be apart."""

    atol: float
    rtol: float

    def times(self, factor: float) -> Tolerance:
        return Tolerance(factor * self.atol, factor * self.rtol)

    def error(self, difference: Tensor, x: Tensor, other: Tensor) -> Tensor:
        """(B,) root mean square of `difference` in units of the tolerance; at most 1 is good."""
        allowed = (self.rtol * torch.maximum(x.abs(), other.abs())).clamp(min=self.atol)
        return (difference / allowed).detach().flatten(1).square().mean(1).sqrt()


def _tolerance(method: str, atol: float | None, rtol: float | None, dtype: torch.dtype) -> Tolerance:
    """Defaults filled in; UserError for tolerances that are no numbers or below what `dtype` resolves."""
    fine = 1e-7 if dtype == torch.float64 else 1e-5
    default = Tolerance(fine, fine) if method == "reference" else Tolerance(0.0078, 0.05)
    atol, rtol = default.atol if atol is None else atol, default.rtol if rtol is None else rtol
    least = 32 * torch.finfo(dtype).eps
    if not (least <= atol < math.inf and 0.0 <= rtol < math.inf):
        raise UserError(
            f"atol must be at least {least:.1g} for {str(dtype).removeprefix('torch.')} samples and rtol at "
            f"least 0, but they are {atol:g} and {rtol:g}"
        )
    return Tolerance(atol, rtol)


class Network:
    """A model function that counts its calls and answers in any form of prediction.

    Attributes:
        calls: so far.
        per_image: whether times are one per image, else one for the batch; they are lists either way.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        schedule: NoiseSchedule,
        prediction_type: str,
        dtype: torch.dtype,
        per_image: bool,
        max_evaluations: int,
    ) -> None:
        self.model_fn, self.schedule, self.prediction_type = model_fn, schedule, prediction_type
        self.dtype, self.per_image, self.max_evaluations = dtype, per_image, max_evaluations
        self.calls = 0

    def times(self, lambda_: Array) -> Array:
        """Times of half log-SNRs, as exact as the network is told them."""
        times = np.asarray(self.schedule.t_of_lambda(lambda_))
        return times if self.dtype == torch.float64 else times.astype(np.float32).astype(np.float64)

    def __call__(self, x: Tensor, times: Sequence[float], form: str) -> Tensor:
        if self.calls >= self.max_evaluations:
            raise RunFailed(
                f"{self.calls} evaluations led to t = {times[0]:g}, not to the end; raise the tolerances or "
                "max_evaluations"
            )
        self.calls += 1
        t: Tensor
        alpha: Any
        sigma: Any
        if self.per_image:
            t, alpha, sigma = (_on(x, v) for v in (times, *self.schedule.alpha_sigma(times)))
        else:
            t = torch.full((), times[0], dtype=x.dtype, device=x.device)
            alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(times[0]))
        output = self.model_fn(x.to(self.dtype), t)[:, : x.shape[1]]
        return convert(output.to(x.dtype), x, alpha, sigma, source=self.prediction_type, to=form)


def _leave_noise(network: Network, x: Tensor, start: float, clocks: int) -> tuple[Tensor, float]:
    """From alpha = 0, where lambda is infinite, to a finite one, by the limit of first order."""
    end = float(network.times(np.array(_LAMBDA_START)))
    points = Points.at(network.schedule, [start, end])
    data = network(x, [start] * clocks, "sample")
    return _combined([update(points, Equation("sample"), [0], 1, "taylor")], [x], [data]), end


def _on(like: Tensor, values: Any) -> Tensor:
    """Host numbers in the dtype and on the device of `like`, without waiting for the device."""
    return torch.as_tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _combined(updates: Sequence[Update], x: Sequence[Tensor], m: Sequence[Tensor]) -> Tensor:
    """The samples at the end of `updates`, one for the batch or one per image."""

    def weight(values: list[float]) -> float | Tensor:
        if len(values) == 1:
            return values[0]
        return _on(x[0], values).reshape(-1, *[1] * (x[0].ndim - 1))

    first = updates[0]
    terms = [(weight([u.x[j] for u in updates]), x[j]) for j in first.x]
    terms += [(weight([u.m[j] for u in updates]), m[j]) for j in first.m]
    return linear(terms, x[0].dtype)


def _adaptive(
    network: Network,
    x: Tensor,
    start: float,
    end: float,
    pair: Adaptive,
    tolerance: Tolerance,
    rule: str,
    *,
    published: bool,
) -> tuple[Tensor, list[int], list[int]]:
    """The sample at `end`, and the accepted and rejected steps of each clock."""
    schedule, equation, order = network.schedule, Equation(pair.form), pair.order
    fractions = np.array([0.0, *pair.stages, 1.0])
    close = _PUBLISHED_STOP * (schedule.t_max - schedule.t_clean) if published else 0.0
    shrink, grow = (0.0, math.inf) if published else (_SHRINK, _GROW)
    last = float(schedule.lambda_(end))
    count = len(x) if network.per_image else 1
    now, steps = [start] * count, [_FIRST_STEP] * count
    accepted, rejected = [0] * count, [0] * count
    x_before, prediction = x, None

    while any(t - end > close for t in now):
        running = [t - end > close for t in now]
        grids = []
        for t, h in zip(now, steps, strict=True):
            lambda_ = float(schedule.lambda_(t))
            left = last - lambda_
            times = network.times(lambda_ + min(h, left) * fractions)
            grids.append(np.array([t, *times[1:-1], end if h >= left else times[-1]]))
        # A clock that is done shares the grid of one that runs; its image is left as it is below.
        spare = grids[running.index(True)]
        grids = [g if r else spare for g, r in zip(grids, running, strict=True)]
        points = [Points.at(schedule, g) for g in grids]

        if prediction is None:
            prediction = network(x, [g[0] for g in grids], pair.form)
        xs, ms = [x], [prediction]
        for j in range(1, order):
            xs.append(_combined([update(p, equation, range(j), j, "taylor") for p in points], xs[:1], ms))
            ms.append(network(xs[j], [g[j] for g in grids], pair.form))
        low = _combined([update(p, equation, range(pair.low), order, rule) for p in points], xs[:1], ms)
        high = _combined([singlestep_end(p, equation, range(order), rule) for p in points], xs[:1], ms)

        errors = tolerance.error(high - low, low, x_before)
        if not network.per_image:
            errors = errors.amax(0, keepdim=True)
        good = []
        for i, error in enumerate(errors.tolist()):
            good.append(running[i] and error <= 1.0)
            if not running[i]:
                continue
            _check_finite(error, now[i])
            accepted[i] += good[i]
            rejected[i] += not good[i]
            ratio = _SAFETY * error ** (-1.0 / order) if error else math.inf
            now[i] = float(grids[i][-1]) if good[i] else now[i]
            h = points[i].step(0, order)
            steps[i] = _bounded_step(h * min(max(ratio, shrink), grow), now[i])
        if all(good):
            x, x_before, prediction = high, low, None
        elif any(good):
            mask = _on(x, good).bool().reshape(-1, *[1] * (x.ndim - 1))
            x, x_before = torch.where(mask, high, x), torch.where(mask, low, x_before)
            prediction = None
    return x, accepted, rejected


def _check_finite(error: float, time: float) -> None:
    if not math.isfinite(error):
        raise RunFailed(f"the network's output, or the sample made of it, is not finite near t = {time:g}")


def _bounded_step(step: float, time: float) -> float:
    if step < _SMALLEST_STEP:
        raise RunFailed(
            f"no step meets the tolerance near t = {time:g}: the network is not smooth there, or the "
            "tolerance is below its rounding"
        )
    return step


# Dormand & Prince 1980: the nodes, the stages (the last is the update of fifth order), and what the update of
# fourth order has less.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dormand_prince(
    network: Network, x: Tensor, start: float, end: float, tolerance: Tolerance
) -> tuple[Tensor, int, int]:
    """The sample at `end`, and the accepted and rejected steps."""
    schedule, dtype = network.schedule, x.dtype

    def slope(y: Tensor, lambda_: float) -> Tensor:
        t = float(network.times(np.array(lambda_)))
        return -math.exp(-lambda_) * network(y * float(schedule.alpha(t)), [t], "epsilon")

    now, last = float(schedule.lambda_(start)), float(schedule.lambda_(end))
    y = x / float(schedule.alpha(start))
    step, accepted, rejected = _FIRST_STEP, 0, 0
    slopes = [slope(y, now)]
    while now < last:
        h = min(step, last - now)
        after = last if h == last - now else now + h
        del slopes[1:]
        for node, weights in zip(_NODES[1:], _STAGES, strict=True):
            stage = linear([(1.0, y), *((h * w, k) for w, k in zip(weights, slopes, strict=True))], dtype)
            slopes.append(slope(stage, after if node == 1.0 else now + node * h))
        alpha = float(schedule.alpha(schedule.t_of_lambda(after)))
        difference = linear([(alpha * h * w, k) for w, k in zip(_ERROR, slopes, strict=True)], dtype)
        error = float(tolerance.error(difference, alpha * stage, alpha * y).amax())
        _check_finite(error, float(schedule.t_of_lambda(now)))
        ratio = _SAFETY * error ** (-1 / 5) if error else _GROW
        if error <= 1.0:
            y, now, accepted = stage, after, accepted + 1
            slopes = slopes[-1:]  # the last stage is the next start
        else:
            rejected += 1
        step = _bounded_step(h * min(max(ratio, _SHRINK), _GROW), float(schedule.t_of_lambda(now)))
    return y * float(schedule.alpha(end)), accepted, rejected
