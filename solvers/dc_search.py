"""Finding DC-Solver's compensation ratios for a model, and the cascade polynomial through many of them.

The ratios are found one step after the other: each makes the state after its step meet, in mean square over
some noises, the state of the exact solution there. No gradient of the network is needed.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.dc_solver import (
    CASCADE_SHAPE,
    DCSolverScheduler,
    check_cascade,
    compensation,
    quadratic,
)
from diffalign.solvers.options import check_choice
from diffalign.solvers.sampling import ModelFn, sample
from diffalign.solvers.scheduler import Array
from diffalign.solvers.unipc import UniPCScheduler

__all__ = ["Cascade", "DCRatios", "fit_cascade", "load_cascade", "reference_states", "search_dc_ratios"]


#: A state after the step at hand -> mean squared distance from the exact one.
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DCRatios:
    """What a search found.

    Attributes:
        num_inference_steps: of the runs that the ratios are for.
        guidance_scale: of those runs, as the caller named it.
        ratios: one per step, to be used.
        searched: what the search proposed.
        kept: which part of the proposal `ratios` is, by the loss on the held-out noises: ``all`` of it, the
            ``last`` ratio alone, or ``none``, when neither is better than no compensation.
        train_before, train_after: mean squared distance of the end point from the exact one without and with
            `ratios`, over the noises of the search.
        held_out_before, held_out_after: the same over the others; None if there are none.
        nfe: network evaluations of the whole batch, those of the reference left out.
        reference_nfe: those.
    """

    num_inference_steps: int
    guidance_scale: float | None
    ratios: list[float]
    searched: list[float]
    kept: str
    train_before: float
    train_after: float
    held_out_before: float | None
    held_out_after: float | None
    nfe: int
    reference_nfe: int


@torch.no_grad()
def search_dc_ratios(
    model_fn: ModelFn,
    scheduler: DCSolverScheduler,
    x_T: Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
    guidance_scale: float | None = None,
    method: str = "bounded",
    bounds: tuple[float, float] = (-1.0, 3.0),
    evaluations: int = 12,
    held_out: float = 0.5,
    reference: Sequence[Tensor] | None = None,
    reference_steps: int = 100,
    callback: Callable[[int], None] | None = None,
) -> DCRatios:
    """Search the ratios of one number of steps.

    Args:
        model_fn: ``(x, t) -> output``, as in :func:`diffalign.solvers.sample`; always called with the whole
            batch, so it may hold one prompt per row.
        scheduler: says which solver and grid; ratios that it has are not used, and it isn't changed.
        x_T: (B, ...) starting noise, float32 or float64.
        num_inference_steps: number of steps, or
        timesteps: custom times.
        mu: shift of a flow model's grid, as in ``set_timesteps``.
        guidance_scale: of `model_fn`, for the record.
        method: ``bounded``: Brent's method within `bounds`, and the exact minimum where the state after the
            step needs no network (the last step, solvers without corrector). ``published``: 40 iterations of
            AdamW, through the network's gradient.
        bounds: of a ratio.
        evaluations: at most, per ratio found by Brent's method.
        held_out: share of the rows, the last ones, that the search doesn't see; they decide what is kept.
            With 0 the rows of the search do.
        reference: n + 1 exact states at the times of the steps and at the end; computed if not given.
        reference_steps: evaluations of that computation.
        callback: called with 1 after every network evaluation.

    Returns:
        The ratios: on the rows that decide, never worse than none.

    Raises:
        UserError: for arguments that don't fit together, and if the exact solution is not finite.
    """
    check_choice("method", method, ("bounded", "published"))
    if not 0.0 <= held_out < 1.0:
        raise UserError(f"held_out must be a share of at least 0 and below 1, but is {held_out}")
    if not bounds[0] < 1.0 < bounds[1]:
        raise UserError(f"bounds must enclose 1, which is no compensation, but are {bounds}")
    train = len(x_T) - int(held_out * len(x_T))
    if not train:
        raise UserError("x_T is empty; give at least one starting noise")
    plain = DCSolverScheduler.from_config(
        scheduler.config, dc_ratios=None, cpr_coefficients=None, cpr_last=None, last_step_ratio=1.0
    )
    plain.set_timesteps(num_inference_steps, device=x_T.device, timesteps=timesteps, mu=mu)
    calls = 0

    def counted(x: Tensor, t: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if callback is not None:
            callback(1)
        return model_fn(x, t)

    if reference is None:
        reference = reference_states(counted, plain, x_T, steps=reference_steps)
    count = len(plain.timesteps)
    if len(reference) != count + 1:
        raise UserError(f"reference must have {count + 1} states, one has {len(reference)}")
    if not torch.isfinite(reference[-1]).all():
        raise UserError(
            "the converged solution of this network is not finite, so nothing can be measured by it; run the "
            "network in float32 or bfloat16"
        )
    reference_nfe, calls = calls, 0

    def loss(state: Tensor, *, e: int, rows: slice) -> Tensor:
        return (state[rows].double() - reference[e][rows].double()).square().mean()

    seen, unseen = slice(0, train), slice(train, None)

    def walk(first: int) -> _Walk:
        """The run whose ratios are 1 before step `first` and searched from there on."""
        going = _Walk(counted, plain, x_T)
        for e in range(count):
            free = e >= max(first, plain.config.dc_order)
            going.take(searched(going, partial(loss, e=e + 1, rows=seen)) if free else 1.0)
        return going

    def searched(going: _Walk, of: Loss) -> float:
        if method == "published":
            return _adamw(going, of)
        if going.needs_network:
            return _bounded(going, of, bounds, evaluations)
        return _exact(going, of, bounds)

    proposed = walk(0)
    # The plain run and the one with the last ratio alone share all their evaluations.
    last = walk(count - 1)
    runs = {"all": (proposed.ratios, proposed.state), "last": (last.ratios, last.state)}
    runs["none"] = ([1.0] * count, last.uncompensated)
    judges = unseen if train < len(x_T) else seen
    # A run that diverges is worse than any other; of equals the simpler is kept.
    losses = {name: float(loss(state, e=count, rows=judges)) for name, (_, state) in runs.items()}
    kept = min(reversed(runs), key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    ratios, state = runs[kept]
    return DCRatios(
        num_inference_steps=count,
        guidance_scale=guidance_scale,
        ratios=ratios,
        searched=proposed.ratios,
        kept=kept,
        train_before=float(loss(last.uncompensated, e=count, rows=seen)),
        train_after=float(loss(state, e=count, rows=seen)),
        held_out_before=losses["none"] if judges is unseen else None,
        held_out_after=losses[kept] if judges is unseen else None,
        nfe=calls,
        reference_nfe=reference_nfe,
    )


class _Walk:
    """The solver, one step at a time, with a free ratio in the step at hand.

    Attributes:
        ratios: of the steps taken.
        state: where they led; corrected, as far as the solver does that.
        uncompensated: where the last of them would have led with ratio 1, if no network was needed for it.
    """

    def __init__(self, model_fn: ModelFn, scheduler: DCSolverScheduler, x_T: Tensor) -> None:
        assert scheduler._times is not None
        self._model, self._scheduler = model_fn, scheduler
        self._times = scheduler._times.tolist()
        self._steps = scheduler.steps(scheduler._times)
        self._order = scheduler.config.dc_order
        self.ratios: list[float] = []
        self.state = self.uncompensated = x_T
        self._history: list[Tensor] = []  # compensated, one for each step taken
        self._newest = self._predict(x_T, 0)

    def _predict(self, x: Tensor, e: int) -> Tensor:
        """The data prediction of evaluation `e`."""
        c_x, c_o = self._scheduler.plan.rows[e].convert
        output = self._model(x, self._scheduler.timesteps[e])[:, : x.shape[1]]
        m = float(c_x) * x + float(c_o) * output
        return self._scheduler._transform(m, x) if self._scheduler._transforms() else m

    @property
    def needs_network(self) -> bool:
        """Whether the state after the step at hand depends on the network there."""
        return self._steps[len(self.ratios)].corrector is not None

    def _held(self, ratio: Any) -> Tensor:
        """The newest prediction, compensated."""
        i = len(self.ratios)
        if i < self._order:
            return self._newest
        weights = compensation(self._times[i - self._order : i + 1], ratio)
        return _sum(weights, [*self._history[i - self._order :], self._newest])

    def _end(self, weights: Mapping[int, float], held: Tensor, arrived: Tensor | None = None) -> Tensor:
        """The state after the step with these weights of the history, of `held`, and of what comes next."""
        i = len(self.ratios)
        known = {i: held, i + 1: arrived}
        tensors = [known[j] if j in known else self._history[j] for j in weights]
        return _sum([self._steps[i].x, *weights.values()], [self.state, *tensors])

    def predicted(self, ratio: Any) -> Tensor:
        """The state after the step at hand, not corrected."""
        return self._end(self._steps[len(self.ratios)].predictor, self._held(ratio))

    def landed(self, ratio: Any) -> Tensor:
        """The same, corrected where the solver does that; the network is then asked."""
        return self._land(ratio)[0]

    def _land(self, ratio: Any) -> tuple[Tensor, Tensor | None]:
        predicted, step = self.predicted(ratio), self._steps[len(self.ratios)]
        if step.corrector is None:
            return predicted, None
        arrived = self._predict(predicted, len(self.ratios) + 1)
        return self._end(step.corrector, self._held(ratio), arrived), arrived

    def take(self, ratio: float) -> None:
        """Take the step at hand."""
        if not self.needs_network:
            self.uncompensated = self.predicted(1.0)
        state, arrived = self._land(ratio)
        self._history.append(self._held(ratio))
        self.state = state
        self.ratios.append(float(ratio))
        if len(self.ratios) < len(self._steps):
            self._newest = arrived if arrived is not None else self._predict(state, len(self.ratios))


def _sum(weights: Sequence[Any], tensors: Sequence[Any]) -> Tensor:
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


# ------------------------------------------------------- one ratio


def _bounded(walk: _Walk, loss: Loss, bounds: tuple[float, float], evaluations: int) -> float:
    """Brent's method, which asks the network once per trial; 1 unless it finds something better."""
    from scipy.optimize import minimize_scalar

    def of(ratio: float) -> float:
        value = float(loss(walk.landed(ratio)))
        return value if math.isfinite(value) else math.inf

    found = minimize_scalar(
        of, bounds=bounds, method="bounded", options={"maxiter": evaluations, "xatol": 1e-3}
    )
    return float(found.x) if found.fun < of(1.0) else 1.0


def _exact(walk: _Walk, loss: Loss, bounds: tuple[float, float]) -> float:
    """The minimum within `bounds` of what is a polynomial in the ratio, of twice the degree of the state."""
    degree = 2 * walk._order

    def of(ratios: Array) -> Array:
        return np.array([float(loss(walk.predicted(float(r)))) for r in np.atleast_1d(ratios)])

    values = of(np.array([1.0, *bounds]))
    if not np.all(np.isfinite(values)):
        return 1.0
    polynomial = np.polynomial.Chebyshev.interpolate(of, degree, domain=bounds)
    roots = polynomial.deriv().roots()
    inside = roots.real[(np.abs(roots.imag) < 1e-8) & (roots.real > bounds[0]) & (roots.real < bounds[1])]
    return float(min([1.0, *bounds, *inside], key=polynomial))


def _adamw(walk: _Walk, loss: Loss) -> float:
    """What the published code does."""
    ratio = torch.ones((), dtype=torch.float64, device=walk.state.device, requires_grad=True)
    optimizer = torch.optim.AdamW([ratio], lr=0.1, weight_decay=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(walk.landed(ratio)).backward()
        optimizer.step()
    return float(ratio)


# ------------------------------------------------------- the exact states


@torch.no_grad()
def reference_states(
    model_fn: ModelFn, scheduler: DCSolverScheduler, x_T: Tensor, *, steps: int = 100
) -> list[Tensor]:
    """The states of the exact solution at the times of a run and at its end.

    By third-order UniPC on a grid that has all of them and about `steps` points more, even in half log-SNR.

    Args:
        model_fn: as in :func:`search_dc_ratios`.
        scheduler: after ``set_timesteps``.
        x_T: (B, ...) starting noise.
        steps: evaluations, about.

    Returns:
        n + 1 tensors like `x_T`, itself first.
    """
    if scheduler._times is None:
        raise UserError("call set_timesteps first: the states are those at its times")
    segments = _refined(scheduler, scheduler._times, steps)
    options = inspect.signature(UniPCScheduler.__init__).parameters
    shared = {k: v for k, v in scheduler.config.items() if k in options}
    solver = UniPCScheduler(**{**shared, "solver_order": 3, "use_corrector": True, "disable_corrector": []})
    # Index, among the fine grid's states, of the end of each segment.
    ends = np.cumsum([len(s) for s in segments]) - 1
    states = [x_T]
    sample(
        model_fn,
        x_T,
        solver,
        timesteps=np.concatenate(segments).tolist(),
        callback=lambda i, t, x: states.append(x) if i in ends else None,
    )
    return states


def _refined(scheduler: DCSolverScheduler, times: Array, steps: int) -> list[Array]:
    """Per step, the times at which to ask the network on the way: the start, and points up to the end."""
    schedule = scheduler.schedule
    last = float(schedule.lambda_(schedule.t_min))
    lambda_ = np.minimum(schedule.lambda_(times), last)
    length = float(lambda_[-1] - lambda_[np.isfinite(lambda_)][0])
    segments = []
    for (start, end), (low, high) in zip(itertools.pairwise(times), itertools.pairwise(lambda_), strict=True):
        count = 4 if math.isinf(low) else math.ceil(steps * float(high - low) / length)
        if end < schedule.t_min and high > low:  # to the clean image: up to the last time of the network
            inner = schedule.t_of_lambda(np.linspace(low, high, count + 1)[1:])
        elif math.isinf(low):
            inner = np.linspace(start, end, count + 1)[1:-1]
        else:
            inner = schedule.t_of_lambda(np.linspace(low, high, count + 1)[1:-1])
        segments.append(np.concatenate([[start], inner]))
    return segments


# ------------------------------------------------------- cascade polynomial


@dataclass(frozen=True)
class Cascade:
    """A fitted cascade polynomial; see :func:`diffalign.solvers.dc_solver.cascade_ratios`.

    Attributes:
        coefficients: 45 numbers.
        hull: smallest and largest number of steps, smallest and largest guidance scale of the fit.
        last: 9 numbers of the last ratio, or None.
        error: root mean square of what the polynomial leaves of the ratios.
    """

    coefficients: list[float]
    hull: list[float]
    last: list[float] | None
    error: float

    def options(self) -> dict[str, Any]:
        """As options of :class:`~diffalign.solvers.dc_solver.DCSolverScheduler`."""
        return {"cpr_coefficients": self.coefficients, "cpr_last": self.last, "cpr_hull": self.hull}


def fit_cascade(
    results: Sequence[DCRatios], *, order: int = 2, cpr_last: bool = True, ridge: float = 1e-4
) -> Cascade:
    """The cascade polynomial through the ratios of several searches, by least squares.

    Args:
        results: of at least 3 numbers of steps and 3 guidance scales.
        order: ``dc_order`` of the searches, whose first ratios are 1 by construction.
        cpr_last: fit the last ratios by a polynomial of their own; they jump, and one quartic cannot follow.
        ridge: weight, per ratio, of the squares of the coefficients, which pulls ratios towards 1.

    Raises:
        UserError: too few numbers of steps or guidance scales, or a result without one.
    """
    scales = [r.guidance_scale for r in results]
    if any(g is None for g in scales):
        raise UserError("a cascade needs the guidance scale of every search; pass guidance_scale to it")
    steps = [r.num_inference_steps for r in results]
    if len(set(steps)) < 3 or len(set(scales)) < 3:
        raise UserError(
            "a cascade needs searches of at least 3 numbers of steps and 3 guidance scales, but has "
            f"{len(set(steps))} and {len(set(scales))}"
        )
    rows: list[Array] = []
    values: list[float] = []
    last_rows: list[Array] = []
    last_values: list[float] = []
    for result in results:
        n = result.num_inference_steps
        powers = np.outer(quadratic(float(result.guidance_scale or 0.0) / 12), quadratic(n / 50)).ravel()
        for i in range(order + 1, n + 1):
            if cpr_last and i == n:
                last_rows.append(powers)
                last_values.append(result.ratios[-1])
            else:
                rows.append(np.outer((i / n) ** np.arange(CASCADE_SHAPE[0]), powers).ravel())
                values.append(result.ratios[i - 1])
    coefficients, residuals = _ridge(rows, values, ridge, constant=8)
    last, last_residuals = _ridge(last_rows, last_values, ridge, constant=8) if last_rows else (None, [])
    return Cascade(
        coefficients=coefficients,
        hull=[float(min(steps)), float(max(steps)), float(min(scales)), float(max(scales))],  # type: ignore[type-var,arg-type]
        last=last,
        error=float(np.sqrt(np.mean(np.square([*residuals, *last_residuals])))),
    )


def _ridge(
    rows: Sequence[Array], values: Sequence[float], ridge: float, *, constant: int
) -> tuple[list[float], list[float]]:
    """Coefficients of the ratios' distance from 1, plus 1 for the `constant` one; and the residuals."""
    x, y = np.array(rows), np.array(values) - 1.0
    penalty = np.sqrt(ridge * len(rows)) * np.eye(x.shape[1])
    c = np.linalg.lstsq(np.vstack([x, penalty]), np.append(y, np.zeros(x.shape[1])), rcond=None)[0]
    residuals = x @ c - y
    c[constant] += 1.0
    return c.tolist(), residuals.tolist()


def load_cascade(path: str | Path) -> list[float]:
    """The numbers of a published ``.npy`` file, for ``cpr_coefficients``; nothing is unpickled.

    Raises:
        UserError: no such file, no array, or not nine finite numbers per power of i/n.
    """
    try:
        array = np.load(Path(path).expanduser(), allow_pickle=False)
        numbers = np.asarray(array, dtype=np.float64).ravel()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read an array from {str(path)!r}: {error}") from error
    if not np.all(np.isfinite(numbers)):
        raise UserError(f"{str(path)!r} holds numbers that are not finite")
    check_cascade(repr(str(path)), numbers.tolist())
    return numbers.tolist()
