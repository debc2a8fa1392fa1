"""What a sampler is fitted to: a network, noises, their true trajectories; and how near a table comes.

:mod:`diffalign.solvers.stepwise` and :mod:`diffalign.solvers.descent` find tables of times and weights
(:mod:`diffalign.solvers.calibrated`) that lead to the ends of the model's own ODE from the same noises. What
comes out is judged on noises that it did not see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        noise: (B, ...) starting noises, the first ones to fit, the last ones held out.
        final: where sampling ends, ``zero`` or ``sigma_min``.
        batch_size: rows per network call.
        held_out: how many are held out; half of them if not given.
    """

    predict: Predict
    schedule: NoiseSchedule
    noise: Tensor
    final: str = "zero"
    batch_size: int = 64
    held_out: int | None = None

    @property
    def parts(self) -> tuple[slice, slice]:
        """Rows to fit and rows held out."""
        count = len(self.noise)
        fitted = count // 2 if self.held_out is None else count - self.held_out
        return slice(0, fitted), slice(fitted, count)

    def batches(self, rows: slice) -> list[slice]:
        """`rows` in pieces that the network takes at once."""
        starts = range(rows.start, rows.stop, self.batch_size)
        return [slice(i, min(i + self.batch_size, rows.stop)) for i in starts]

    def asked(self, x: Tensor, level: Level, rows: slice) -> Tensor:
        """``predict`` in batches."""
        first, told = rows.start, level.told
        return torch.cat(
            [self.predict(x[p.start - first : p.stop - first], *told, p) for p in self.batches(rows)]
        )

    def part(self, rows: slice) -> Problem:
        """The problem of some of the noises."""

        def predict(x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, own: slice) -> Tensor:
            moved = slice(rows.start + own.start, rows.start + own.stop)
            return self.predict(x, t, alpha, sigma, moved)

        return replace(self, predict=predict, noise=self.noise[rows], held_out=None)

    @torch.no_grad()
    def network(self, x: Tensor, t: Tensor | float, prediction_type: str) -> Tensor:
        """The network's output at a sample of all noises, as schedulers are given it."""
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(float(t)))
        told = (torch.tensor(v, dtype=torch.float64) for v in (float(t), alpha, sigma))
        data = self.asked(x, Level(*told), slice(0, len(x)))
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
        return float(np.minimum(self.errors, CAP).mean()) + self.far

    @property
    def far(self) -> float:
        """The share of errors beyond :data:`FAR`."""
        return float((self.errors > FAR).mean())


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
class Level:
    """One place of the schedule, as 0-d float64 tensors."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def told(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t, self.alpha, self.sigma

    @property
    def lambda_(self) -> Tensor:
        return self.alpha.log() - self.sigma.log()

    @staticmethod
    def at(schedule: NoiseSchedule, lambda_: Tensor) -> Level:
        if schedule.is_flow:
            alpha, sigma = torch.sigmoid(lambda_), torch.sigmoid(-lambda_)
        else:
            alpha, sigma = torch.sigmoid(2 * lambda_).sqrt(), torch.sigmoid(-2 * lambda_).sqrt()
        return Level(_Time.apply(lambda_, schedule), alpha, sigma)  # type: ignore[no-untyped-call]

    @staticmethod
    def start(schedule: NoiseSchedule) -> Level:
        """The noisy end, where lambda may be infinite."""
        alpha, sigma = schedule.alpha_sigma(schedule.t_max)
        return Level(*(torch.tensor(float(v), dtype=torch.float64) for v in (schedule.t_max, alpha, sigma)))


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
    start = Level.start(schedule)

    def belief(y: Tensor, lambda_: float) -> Tensor:
        level = Level.at(schedule, torch.tensor(lambda_, dtype=torch.float64))
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


def levels_of(problem: Problem, lambdas: Tensor) -> list[Level]:
    """Of the n evaluations, the first one pinned, and of the end."""
    schedule = problem.schedule
    levels = [Level.start(schedule), *(Level.at(schedule, v) for v in lambdas[1:])]
    if problem.final == "zero":
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return [*levels, Level(zero, one, zero)]
    end = torch.tensor(lambda_range(schedule)[1], dtype=torch.float64)
    return [*levels, Level.at(schedule, end)]


def step_between(here: Level, there: Level) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of a step ``a x + b m`` with m the belief of the clean image, 0-d float64; exact for a
    constant m. :func:`~diffalign.solvers.calibrated.step_scales` is the same for times on the host."""
    ratio = there.sigma / here.sigma
    return ratio, there.alpha - ratio * here.alpha


def unrolled(
    problem: Problem,
    lambdas: Tensor,
    weights: Tensor,
    rows: slice,
    *,
    told: Tensor | None = None,
    recompute: bool,
) -> tuple[Tensor, list[tuple[Tensor, Level]]]:
    """The end of the sampler and its states on the way, with their levels.

    ``lambdas (n,)`` of the evaluations, the first one pinned; ``weights (n, n)``; ``told (n,)`` where the
    network is asked, if elsewhere.
    """
    levels = levels_of(problem, lambdas)
    asked = levels if told is None else levels_of(problem, told)
    x = problem.noise[rows]
    x = x.to(working_dtype(x))
    beliefs: list[Tensor] = []
    states = []
    for k in range(len(lambdas)):
        here, there = levels[k], levels[k + 1]
        if recompute:
            belief = checkpoint(problem.asked, x, asked[k], rows, use_reentrant=False)
        else:
            belief = problem.asked(x, asked[k], rows)
        beliefs.append(belief)
        mean = sum(weights[k, j].to(x.dtype) * m for j, m in enumerate(beliefs))
        ratio, scale = step_between(here, there)
        x = ratio.to(x.dtype) * x + scale.to(x.dtype) * mean
        states.append((x, there))
    return x, states[:-1]


def relative_error(x: Tensor, truth: Tensor) -> Tensor:
    """(B,) relative error of each sample."""
    return (x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


@torch.no_grad()
def judge(problem: Problem, truth: Truth, table: Table, rows: slice) -> Array:
    """Relative errors of a table on the noises of ``rows``."""
    lambdas, told = (torch.from_numpy(lambdas_of(problem.schedule, t)) for t in (table.times, table.told))
    weights = torch.from_numpy(table.weights)
    x, _ = unrolled(problem, lambdas, weights, rows, told=told, recompute=False)
    return relative_error(x, truth.rows(rows).end).double().cpu().numpy()


def lambdas_of(schedule: NoiseSchedule, times: Array) -> Array:
    """Half log-SNR of times, within :func:`lambda_range`."""
    low, high = lambda_range(schedule)
    return np.clip(schedule.lambda_(times), low, high)


def places_of(schedule: NoiseSchedule, times: Array) -> Array:
    """(n,) places of times in the range of half log-SNR, 0 its noisy end and 1 the first training step."""
    low, high = lambda_range(schedule)
    return np.append(0.0, ((lambdas_of(schedule, times) - low) / (high - low))[1:])


def times_at(schedule: NoiseSchedule, places: Array | Sequence[float]) -> Array:
    """The times at places, the first of which is the noisy end: the inverse of :func:`places_of`."""
    low, high = lambda_range(schedule)
    return times_of(schedule, low + np.asarray(places) * (high - low))


def times_of(schedule: NoiseSchedule, lambdas: Array) -> Array:
    """The times at half log-SNRs, of which the first is the noisy end, where it may be infinite."""
    times = np.array([float(schedule.t_of_lambda(v)) for v in lambdas])
    times[0] = schedule.t_max
    return times
