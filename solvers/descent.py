"""Fit the table of a sampler to a model: gradient descent through the sampler, against the true solution.

Times and weights of all steps are moved to bring the sampler's end, and with a smaller say its states on the
way, to those of the model's own ODE from the same noises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.solvers.calibrated import Table
from diffalign.solvers.fitting import (
    MIN_GAP,
    Fit,
    Problem,
    Truth,
    judge,
    lambda_range,
    lambdas_of,
    relative_error,
    times_of,
    unrolled,
)
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.scheduler import Array

#: ``(n,) half log-SNR of the evaluations -> (n, n) weights``, as a solver on that grid has them.
Follow = Callable[[Array], Array]


class Followed(torch.autograd.Function):
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
    With `follow` the weights are not learnt but those that a solver has at these places. Decoupled, the
    network is asked up to half a gap beside the places of the states, by u in ``tanh(u) / 2``.
    """

    def __init__(
        self,
        problem: Problem,
        start: Table,
        window: int,
        *,
        follow: Follow | None = None,
        decoupled: bool = False,
    ) -> None:
        self._follow = follow
        self.beside = torch.zeros(len(start) - 1, dtype=torch.float64).requires_grad_() if decoupled else None
        low, high = lambda_range(problem.schedule)
        nodes = np.append(lambdas_of(problem.schedule, start.times), high)
        nodes[0] = low
        gaps = np.maximum(np.diff(nodes), 2 * MIN_GAP)
        self._low, self._high, self._total = low, high, high - low
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
        return [
            self.gaps,
            *([self.weights] if self._follow is None else []),
            *([] if self.beside is None else [self.beside]),
        ]

    def lambdas(self) -> Tensor:
        """(n,) increasing, ends pinned."""
        gaps = MIN_GAP + self._slack * torch.softmax(self.gaps, 0)
        return torch.cat([gaps.new_full((1,), self._low), self._low + gaps.cumsum(0)[:-1]])

    def told(self) -> Tensor | None:
        """(n,) increasing, the first one pinned: where the network is asked, if beside the states' places."""
        if self.beside is None:
            return None
        places = self.lambdas()
        gaps = torch.cat([places, places.new_full((1,), self._high)]).diff()
        return places + torch.cat(
            [places.new_zeros(1), self.beside.tanh() / 2 * torch.where(self.beside > 0, gaps[1:], gaps[:-1])]
        )

    def matrix(self) -> Tensor:
        """(n, n) weights whose rows sum to 1."""
        if self._follow is not None:
            return Followed.apply(self.lambdas(), self._follow)  # type: ignore[no-any-return, no-untyped-call]
        n = len(self._rest)
        older = self._rest
        if self._older:
            rows, columns = zip(*self._older, strict=True)
            older = older.index_put((torch.tensor(rows), torch.tensor(columns)), self.weights)
        return older + torch.diag(1 - older.sum(1)) if n > 1 else torch.ones(1, 1, dtype=torch.float64)

    def table(self, schedule: NoiseSchedule) -> Table:
        with torch.no_grad():
            lambdas, weights, told = self.lambdas(), self.matrix().numpy(), self.told()
        return Table(
            times_of(schedule, lambdas.numpy()),
            weights / weights.sum(1, keepdims=True),
            told=times_of(schedule, (lambdas if told is None else told).numpy()),
        )


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
    decoupled: bool = False,
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
        decoupled: learn as well where the network is asked, apart from where the states are.
        recompute: save memory by evaluating the network again in the backward pass.
        check_every: iterations between looks at the held-out noises.
    """
    fitted, held_out = problem.parts
    parameters = _Parameters(problem, start, window, follow=follow, decoupled=decoupled)
    learnt = parameters.learnt()
    optimizer = torch.optim.Adam(learnt, lr=learning_rate, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    best = Fit(start, judge(problem, truth, start, held_out))
    for iteration in range(iterations):
        optimizer.zero_grad()
        for rows in problem.batches(fitted):  # the graph of one batch is kept at a time
            known = truth.rows(rows)
            end, states = unrolled(
                problem,
                parameters.lambdas(),
                parameters.matrix(),
                rows,
                told=parameters.told(),
                recompute=recompute,
            )
            loss = relative_error(end, known.end).sum()
            if trajectory and states:
                inner = [
                    relative_error(x / level.sigma.to(x), known.state(level.lambda_)) for x, level in states
                ]
                loss = loss + trajectory * torch.stack(inner).mean(0).sum()
            (loss / fitted.stop).backward()  # type: ignore[no-untyped-call]
        if not all(torch.isfinite(tensor.grad).all() for tensor in learnt if tensor.grad is not None):
            break
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
