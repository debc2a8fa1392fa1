"""Weights of a table from the true solution, step by step: least squares, no gradients.

With the places of the evaluations fixed, the state after a step is linear in the step's weights. So each row
in turn is chosen to bring the states of some noises nearest to their true trajectories, from the states that
the rows before have led to: what went wrong earlier is made good where it can be. It costs one run of the
sampler, and a descent from there (:mod:`diffalign.solvers.descent`) has less to do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffalign.solvers.calibrated import Table
from diffalign.solvers.fitting import Problem, Truth, lambdas_of, levels_of, step_between
from diffalign.solvers.plan import working_dtype
from diffalign.solvers.scheduler import Array

_REWEIGHTED = 10  # times: least squares become least distances
_LEAST = 1e-3  # relative distance below which a noise gets no more weight
_RIDGE = 1e-6  # of the mean diagonal: beliefs that hardly differ get no large weights


@torch.no_grad()
def stepwise(problem: Problem, truth: Truth, times: Array, *, window: int = 3) -> Table:
    """The table at `times` whose every row leads nearest to the truth, on the noises to fit.

    Args:
        times: (n,) falling, where the network is asked.
        window: rows read so many newest evaluations.
    """
    rows, _ = problem.parts
    known = truth.rows(rows)
    levels = levels_of(problem, torch.from_numpy(lambdas_of(problem.schedule, times)))
    x = problem.noise[rows]
    x = x.to(working_dtype(x))
    beliefs: list[Tensor] = []
    weights = np.zeros((len(times), len(times)))
    for k in range(len(times)):
        here, there = levels[k], levels[k + 1]
        beliefs.append(problem.asked(x, here, rows))
        ratio, scale = (float(v) for v in step_between(here, there))
        last = k + 1 == len(times)
        goal = known.end if last else known.state(there.lambda_) * float(there.sigma)
        older = list(range(max(0, k - window + 1), k))
        gap = goal - ratio * x - scale * beliefs[k]
        moves = [scale * (beliefs[j] - beliefs[k]) for j in older]
        weights[k, older] = _nearest(gap, moves, goal.flatten(1).norm(dim=1))
        weights[k, k] = 1.0 - weights[k, older].sum()
        x = ratio * x + scale * sum(float(weights[k, j]) * beliefs[j] for j in (*older, k))
    return Table(times, weights)


def _nearest(gap: Tensor, moves: list[Tensor], norms: Tensor) -> Array:
    """The numbers w with the least mean of ``|gap_b - sum_j w_j moves_jb| / norms_b`` over the rows b."""
    if not moves:
        return np.empty(0)
    columns = (torch.stack(moves, -1).flatten(1, -2) / norms[:, None, None]).double()  # (B, D, J)
    wanted = (gap.flatten(1) / norms[:, None]).double()
    gram = torch.einsum("bdi,bdj->bij", columns, columns)
    right = torch.einsum("bdi,bd->bi", columns, wanted)
    share = torch.ones(len(wanted), dtype=torch.float64, device=wanted.device)
    eye = torch.eye(len(moves), dtype=torch.float64, device=wanted.device)
    for _ in range(_REWEIGHTED):
        matrix = (share[:, None, None] * gram).sum(0)
        ridge = _RIDGE * matrix.diagonal().mean().clamp_min(1e-30)
        found = torch.linalg.solve(matrix + ridge * eye, (share[:, None] * right).sum(0))
        share = 1.0 / (wanted - columns @ found).norm(dim=1).clamp_min(_LEAST)
    return found.cpu().numpy()
