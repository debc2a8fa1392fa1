"""Fit the table of a sampler to a model: gradient descent through the sampler, against the true solution.

Times and weights of all steps (:mod:`diffalign.solvers.calibrated`) are moved to bring the sampler's end, and
with a smaller say its states on the way, to those of the model's own ODE from the same noises. What comes out
is judged on noises that it did not see and taken only if it beats every known solver there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.solvers.calibrated import Table
from diffalign.solvers.grids import LAMBDA_FLOOR
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.plan import working_dtype
from diffalign.solvers.prediction import training_target
from diffalign.solvers.scheduler import Array

#: ``predict(x, t, alpha, sigma, rows) -> x0``: the belief of the clean image at x (rows, ...), whose noises
#: are numbers ``rows`` of the problem; t, alpha and sigma are 0-d float64 tensors. Differentiable in x, and
#: in the times as far as the network is.
Predict = Callable[[Tensor, Tensor, Tensor, Tensor, slice], Tensor]

CAP = 0.2  # errors count up to this when fits are compared: a basin of attraction that flips is a lottery
FAR = 0.3  # relative error from which a sample is another image
MIN_GAP = 1e-3  # in half log-SNR between evaluations


@dataclass(frozen=True)
class Truth:
    """The exact trajectories of some noises.

    ``lambdas (G,)`` uniform; ``y (G, B, ...)`` states x / sigma and ``slope`` their derivatives in lambda;
    ``end (B, ...)`` where they arrive.
    """

    lambdas: Array
    y: Tensor
    slope: Tensor
    end: Tensor

    def rows(self, part: slice) -> Truth:
        """Of some of the noises."""
        return Truth(self.lambdas, self.y[:, part], self.slope[:, part], self.end[part])

    def state(self, lambda_: Tensor) -> Tensor:
        """``x / sigma`` at ``lambda_`` (0-d), by cubic Hermite interpolation; differentiable in it."""
        grid, gap = self.lambdas, float(self.lambdas[1] - self.lambdas[0])
        cell = min(max(int((float(lambda_.detach()) - grid[0]) / gap), 0), len(grid) - 2)
        s = ((lambda_ - grid[cell]) / gap).to(self.y.device)
        y0, y1 = self.y[cell], self.y[cell + 1]
        d0, d1 = gap * self.slope[cell], gap * self.slope[cell + 1]
        return (
            (1 + 2 * s) * (1 - s) ** 2 * y0
            + s * (1 - s) ** 2 * d0
            + s**2 * (3 - 2 * s) * y1
            + s**2 * (s - 1) * d1
        )


@dataclass(frozen=True)
class Problem:
    """What a sampler is fitted to.

    Attributes:
        predict: the network.
        schedule: its noise schedule.
        noise: (B, ...) starting noises, the first half to fit, the second held out.
        final: where sampling ends, ``zero`` or ``sigma_min``.
        batch_size: rows per network call.
    """

    predict: Predict
    schedule: NoiseSchedule
    noise: Tensor
    final: str = "zero"
    batch_size: int = 64

    @property
    def halves(self) -> tuple[slice, slice]:
        """Rows to fit and rows held out."""
        half = len(self.noise) // 2
        return slice(0, half), slice(half, len(self.noise))

    def asked(self, x: Tensor, level: _Level, rows: slice) -> Tensor:
        """``predict`` in batches."""
        batches = range(rows.start, rows.stop, self.batch_size)
        parts = [slice(i, min(i + self.batch_size, rows.stop)) for i in batches]
        return torch.cat(
            [self.predict(x[p.start - rows.start : p.stop - rows.start], *level.told, p) for p in parts]
        )

    @torch.no_grad()
    def network(self, x: Tensor, t: Tensor | float, prediction_type: str) -> Tensor:
        """The network's output at a sample of all noises, as schedulers are given it."""
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(float(t)))
        told = (torch.tensor(v, dtype=torch.float64) for v in (float(t), alpha, sigma))
        data = self.asked(x, _Level(*told), slice(0, len(x)))
        return training_target(prediction_type, data, (x - alpha * data) / sigma, alpha, sigma).to(x.dtype)


@dataclass(frozen=True)
class Fit:
    """A table, and what it does on the held-out noises.

    ``errors (B,)`` relative to the norm of the true end.
    """

    table: Table
    errors: Array

    @property
    def score(self) -> float:
        """Mean error, each counted up to :data:`CAP`, plus the share beyond :data:`FAR`."""
        return float(np.minimum(self.errors, CAP).mean() + (self.errors > FAR).mean())


# ------------------------------------------------------------------------------------------------ levels


class _Time(torch.autograd.Function):
    """``t_of_lambda`` of a 0-d tensor, its slope by differences: schedules are tables."""

    @staticmethod
    def forward(ctx: Any, lambda_: Tensor, schedule: NoiseSchedule) -> Tensor:  # type: ignore[override]
        value = float(lambda_)
        low = float(schedule.lambda_(schedule.t_max))
        step = 1e-3
        ends = [float(schedule.t_of_lambda(max(value + s, low))) for s in (-step, step)]
        ctx.slope = (ends[1] - ends[0]) / (2 * step)
        return lambda_.new_tensor(float(schedule.t_of_lambda(max(value, low))))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.slope, None


@dataclass(frozen=True)
class _Level:
    """One place of the schedule, as 0-d float64 tensors."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def told(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t, self.alpha, self.sigma

    @staticmethod
    def at(schedule: NoiseSchedule, lambda_: Tensor) -> _Level:
        if schedule.is_flow:
            alpha, sigma = torch.sigmoid(lambda_), torch.sigmoid(-lambda_)
        else:
            alpha, sigma = torch.sigmoid(2 * lambda_).sqrt(), torch.sigmoid(-2 * lambda_).sqrt()
        return _Level(_Time.apply(lambda_, schedule), alpha, sigma)  # type: ignore[no-untyped-call]

    @staticmethod
    def start(schedule: NoiseSchedule) -> _Level:
        """The noisy end, where lambda may be infinite."""
        alpha, sigma = schedule.alpha_sigma(schedule.t_max)
        return _Level(*(torch.tensor(float(v), dtype=torch.float64) for v in (schedule.t_max, alpha, sigma)))


def lambda_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Half log-SNR of the noisy end, or a floor where that is too low, and of the first training step."""
    return max(float(schedule.lambda_(schedule.t_max)), LAMBDA_FLOOR), float(schedule.lambda_(schedule.t_min))


# ------------------------------------------------------------------------------------------------ truth


@torch.no_grad()
def solve(problem: Problem, steps: int = 100, progress: Callable[[], object] = lambda: None) -> Truth:
    """The probability-flow ODE of every noise by the classical Runge-Kutta method in ``e^lambda``, in which
    ``d(x / sigma) = x0``: four evaluations a step, ``4 steps + 1`` in all.

    The noisy end may be pure noise; what lies before :data:`LAMBDA_FLOOR` is one first-order step.
    """
    schedule, everything = problem.schedule, slice(0, len(problem.noise))
    low, high = lambda_range(schedule)
    lambdas = np.linspace(low, high, steps + 1)
    noise = problem.noise.to(working_dtype(problem.noise))
    start = _Level.start(schedule)

    def belief(y: Tensor, lambda_: float) -> Tensor:
        level = _Level.at(schedule, torch.tensor(lambda_, dtype=torch.float64))
        return problem.asked(y * level.sigma, level, everything)

    y = noise / start.sigma
    gap = np.exp(low) - float(start.alpha / start.sigma)
    if gap > 1e-9:
        y = y + gap * problem.asked(noise, start, everything)
    states, slopes = [], []
    for a, b in itertools.pairwise(lambdas):
        h, middle = np.exp(b) - np.exp(a), np.log((np.exp(a) + np.exp(b)) / 2)
        k1 = belief(y, a)
        states.append(y)
        slopes.append(k1 * float(np.exp(a)))
        k2 = belief(y + h / 2 * k1, middle)
        k3 = belief(y + h / 2 * k2, middle)
        k4 = belief(y + h * k3, b)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        progress()
    last = belief(y, high)
    states.append(y)
    slopes.append(last * float(np.exp(high)))
    sigma = float(schedule.sigma(schedule.t_min))
    return Truth(
        lambdas, torch.stack(states), torch.stack(slopes), last if problem.final == "zero" else sigma * y
    )


# ------------------------------------------------------------------------------------------------ the sampler


def _unrolled(
    problem: Problem, lambdas: Tensor, weights: Tensor, rows: slice, *, recompute: bool
) -> tuple[Tensor, list[tuple[Tensor, _Level]]]:
    """The end of the sampler and its states on the way, with their levels.

    ``lambdas (n,)`` of the evaluations, the first one pinned; ``weights (n, n)``.
    """
    schedule = problem.schedule
    levels = [_Level.start(schedule), *(_Level.at(schedule, v) for v in lambdas[1:])]
    if problem.final == "zero":
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        levels.append(_Level(zero, one, zero))
    else:
        levels.append(_Level.at(schedule, torch.tensor(lambda_range(schedule)[1], dtype=torch.float64)))
    x = problem.noise[rows]
    x = x.to(working_dtype(x))
    beliefs: list[Tensor] = []
    states = []
    for k in range(len(lambdas)):
        here, there = levels[k], levels[k + 1]
        if recompute:
            belief = checkpoint(problem.asked, x, here, rows, use_reentrant=False)
        else:
            belief = problem.asked(x, here, rows)
        beliefs.append(belief)
        mean = sum(weights[k, j].to(x.dtype) * m for j, m in enumerate(beliefs))
        ratio = (there.sigma / here.sigma).to(x.dtype)
        scale = (there.alpha - there.sigma / here.sigma * here.alpha).to(x.dtype)
        x = ratio * x + scale * mean
        states.append((x, there))
    return x, states[:-1]


def _relative(x: Tensor, truth: Tensor) -> Tensor:
    """(B,) relative error of each sample."""
    return (x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


@torch.no_grad()
def judge(problem: Problem, truth: Truth, table: Table, rows: slice) -> Array:
    """Relative errors of a table on the noises of ``rows``."""
    lambdas = torch.from_numpy(_lambdas(problem.schedule, table.times))
    weights = torch.from_numpy(table.weights)
    x, _ = _unrolled(problem, lambdas, weights, rows, recompute=False)
    return _relative(x, truth.rows(rows).end).double().cpu().numpy()


def _lambdas(schedule: NoiseSchedule, times: Array) -> Array:
    low, high = lambda_range(schedule)
    return np.clip(schedule.lambda_(times), low, high)


def places_of(schedule: NoiseSchedule, times: Array) -> Array:
    """(n,) places of times in the range of half log-SNR, 0 its noisy end and 1 the first training step."""
    low, high = lambda_range(schedule)
    return np.append(0.0, ((_lambdas(schedule, times) - low) / (high - low))[1:])


def times_at(schedule: NoiseSchedule, places: Array | Sequence[float]) -> Array:
    """The times at places, the first of which is the noisy end: the inverse of :func:`places_of`."""
    low, high = lambda_range(schedule)
    return times_of(schedule, low + np.asarray(places) * (high - low))


def times_of(schedule: NoiseSchedule, lambdas: Array) -> Array:
    """The times at half log-SNRs, of which the first is the noisy end, where it may be infinite."""
    times = np.array([float(schedule.t_of_lambda(v)) for v in lambdas])
    times[0] = schedule.t_max
    return times


# ------------------------------------------------------------------------------------------------ the fit


#: ``(n,) half log-SNR of the evaluations -> (n, n) weights``, as a solver on that grid has them.
Follow = Callable[[Array], Array]


class _Followed(torch.autograd.Function):
    """The weights that a solver has on a grid; their slopes by differences, for which no network is asked."""

    @staticmethod
    def forward(ctx: Any, lambdas: Tensor, follow: Follow) -> Tensor:  # type: ignore[override]
        values, step = lambdas.detach().numpy(), MIN_GAP / 10
        slopes = [np.zeros((len(values), len(values)))]  # the first place is pinned
        for k in range(1, len(values)):
            around = [values + s * step * (np.arange(len(values)) == k) for s in (-1, 1)]
            low, high = (follow(v) for v in around)
            slopes.append((high - low) / (2 * step))
        ctx.slopes = np.stack(slopes)
        return torch.from_numpy(follow(values))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.einsum("kij,ij->k", torch.from_numpy(ctx.slopes), gradient), None


class _Parameters:
    """What is learnt: logarithms of the gaps between evaluations, and the weights of earlier ones.

    Both ends are pinned: the first evaluation, and the clean end of the schedule's range behind the last one.
    With `follow` the weights are not learnt but those that a solver has at these places.
    """

    def __init__(self, problem: Problem, start: Table, window: int, follow: Follow | None = None) -> None:
        self._follow = follow
        low, high = lambda_range(problem.schedule)
        nodes = np.append(_lambdas(problem.schedule, start.times), high)
        nodes[0] = low
        gaps = np.maximum(np.diff(nodes), 2 * MIN_GAP)
        self._low, self._total = low, high - low
        self._slack = self._total - MIN_GAP * len(start)
        self.gaps = torch.from_numpy(np.log(np.maximum(gaps - MIN_GAP, MIN_GAP))).requires_grad_()
        n = len(start)
        self._older = [(k, j) for k in range(n) for j in range(max(0, k - window + 1), k)]
        self.weights = torch.tensor(
            [start.weights[k, j] for k, j in self._older], dtype=torch.float64
        ).requires_grad_()
        # What the start gives to still older ones stays as it is.
        rest = start.weights.copy()
        for k, j in self._older:
            rest[k, j] = 0.0
        rest[np.diag_indices(n)] = 0.0
        self._rest = torch.from_numpy(rest)

    def learnt(self) -> list[Tensor]:
        return [self.gaps, self.weights] if self._follow is None else [self.gaps]

    def lambdas(self) -> Tensor:
        """(n,) increasing, ends pinned."""
        gaps = MIN_GAP + self._slack * torch.softmax(self.gaps, 0)
        return torch.cat([gaps.new_full((1,), self._low), self._low + gaps.cumsum(0)[:-1]])

    def matrix(self) -> Tensor:
        """(n, n) weights whose rows sum to 1."""
        if self._follow is not None:
            return _Followed.apply(self.lambdas(), self._follow)  # type: ignore[no-any-return, no-untyped-call]
        n = len(self._rest)
        older = self._rest
        if self._older:
            rows, columns = zip(*self._older, strict=True)
            older = older.index_put((torch.tensor(rows), torch.tensor(columns)), self.weights)
        return older + torch.diag(1 - older.sum(1)) if n > 1 else torch.ones(1, 1, dtype=torch.float64)

    def table(self, schedule: NoiseSchedule) -> Table:
        with torch.no_grad():
            lambdas, weights = self.lambdas().numpy(), self.matrix().numpy()
        return Table(times_of(schedule, lambdas), weights / weights.sum(1, keepdims=True))


def fit(
    problem: Problem,
    truth: Truth,
    start: Table,
    *,
    trajectory: float = 0.1,
    iterations: int = 250,
    learning_rate: float = 0.02,
    window: int = 3,
    follow: Follow | None = None,
    recompute: bool = False,
    check_every: int = 10,
    progress: Callable[[], object] = lambda: None,
) -> Fit:
    """The best table on the held-out noises that descent from ``start`` passes through, itself included.

    The loss is the mean over noises of the relative error at the end, plus ``trajectory`` times its mean over
    the states on the way; plain norms, since squares would give all say to the few noises that change images.

    Args:
        trajectory: 0.1, or 0.5 for large guidance.
        iterations, learning_rate: of Adam, the rate on a cosine to 0.
        window: weights of so many newest evaluations are learnt.
        follow: learn the times alone, with the weights that a solver has there (:func:`following`).
        recompute: save memory by evaluating the network again in the backward pass.
        check_every: iterations between looks at the held-out noises.
    """
    fitted, held_out = problem.halves
    known = truth.rows(fitted)
    parameters = _Parameters(problem, start, window, follow)
    learnt = parameters.learnt()
    optimizer = torch.optim.Adam(learnt, lr=learning_rate, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    best = Fit(start, judge(problem, truth, start, held_out))
    for iteration in range(iterations):
        optimizer.zero_grad()
        end, states = _unrolled(
            problem, parameters.lambdas(), parameters.matrix(), fitted, recompute=recompute
        )
        loss = _relative(end, known.end).mean()
        if trajectory and states:
            inner = [_relative(x / level.sigma.to(x), known.state(_lambda(level))) for x, level in states]
            loss = loss + trajectory * torch.stack(inner).mean()
        if not torch.isfinite(loss):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        cosine.step()
        progress()
        if (iteration + 1) % check_every == 0 or iteration + 1 == iterations:
            table = parameters.table(problem.schedule)
            found = Fit(table, judge(problem, truth, table, held_out))
            if found.score < best.score:
                best = found
    return best


def _lambda(level: _Level) -> Tensor:
    return level.alpha.log() - level.sigma.log()
