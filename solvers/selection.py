"""Samplers for one model: the known solvers as tables, fits and searches from them, and which one is taken.

Whatever is found is judged on noises that it was not found with, and taken only if it beats every known
solver there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.solvers.calibrated import Table, trace
from diffalign.solvers.descent import Follow, fit
from diffalign.solvers.evolution import Genome, Space, evolve
from diffalign.solvers.fitting import FAR, Fit, Problem, Truth, judge, lambda_range, times_of
from diffalign.solvers.scheduler import Array, PlanScheduler
from diffalign.solvers.stepwise import stepwise

LARGE_WEIGHT = 5.0
MANY = 1024  # held-out noises that show whether a few more end in another image; 256 have missed it
SEEN = 4  # so many of them that do: the share is then no rare event
_TRIAL = 4  # of several weights, each gets this part of the iterations before the best goes on


@dataclass(frozen=True)
class Calibration:
    """What came of fitting one number of steps.

    Attributes:
        chosen: the table to use.
        baselines: name of each known solver -> it as a table, and what it does, best first.
        improved: whether ``chosen`` is a fit; else it is the best known solver that is a table.
        warnings: sentences.
    """

    chosen: Fit
    baselines: Mapping[str, Fit]
    improved: bool
    warnings: tuple[str, ...] = ()


def known(
    problem: Problem,
    truth: Truth,
    starts: Mapping[str, PlanScheduler],
    count: int,
    *,
    mu: float | None = None,
) -> dict[str, Fit]:
    """Several solvers as tables of `count` steps, by name, the best on the held-out noises first.

    Args:
        starts: the solvers; those that are no tables are left out.
        mu: shift of a flow model's grid.

    Raises:
        UserError: no solver is a table.
    """
    _, held_out = problem.parts
    baselines = {}
    for name, scheduler in starts.items():
        try:
            times, weights = trace(scheduler, count, mu=mu)
            table = Table(times[:-1], weights, {"start": name})
        except UserError:
            continue
        baselines[name] = Fit(table, judge(problem, truth, table, held_out))
    if not baselines:
        raise UserError("none of the solvers to start from is a linear multistep method")
    return dict(sorted(baselines.items(), key=lambda item: item[1].score))


def settled(
    problem: Problem, baselines: Mapping[str, Fit], found: Sequence[Fit], more: Mapping[str, Any] = {}
) -> Calibration:
    """The best of `found` if it beats the best known solver on the held-out noises, else that solver.

    Args:
        baselines: from :func:`known`.
        found: judged on the held-out noises; their tables' info is kept.
        more: for the info of the table.
    """
    best_name, best = next(iter(baselines.items()))
    chosen = min(found, key=lambda made: made.score, default=best)
    improved = chosen.score < best.score
    if not improved:
        chosen = best
    count, warnings = len(chosen.table), []
    if np.abs(chosen.table.weights).max() > LARGE_WEIGHT:
        warnings.append(f"the table of {count} steps has weights above {LARGE_WEIGHT:g}: look at its images")
    info = {
        **chosen.table.info,
        "fitted": improved,
        "held_out_error": float(chosen.errors.mean()),
        "held_out_p90": float(np.quantile(chosen.errors, 0.9)),
        "best_known": best_name,
        "best_known_error": float(best.errors.mean()),
        "best_known_p90": float(np.quantile(best.errors, 0.9)),
        "noises": len(problem.noise),
        "decoupled": chosen.table.decoupled,
        **more,
    }
    chosen = replace(chosen, table=replace(chosen.table, info=info))
    return Calibration(chosen, baselines, improved, tuple(warnings))


def calibrate(
    problem: Problem,
    truth: Truth,
    starts: Mapping[str, PlanScheduler],
    count: int,
    *,
    trajectories: Sequence[float] = (0.1, 0.5),
    fits: int = 2,
    iterations: int = 250,
    mu: float | None = None,
    follow: Mapping[str, Follow] | None = None,
    decoupled: bool = True,
    progress: Callable[[], object] = lambda: None,
    **options: Any,
) -> Calibration:
    """Fit a table of ``count`` steps from the best of several starts, and take it if it is better.

    Starts are, in turn, the best of the known solvers and the best of the weights that lead along the true
    trajectories on their times (:func:`~diffalign.solvers.stepwise.stepwise`). The latter are nearer, yet
    with many steps descent may come farther from the former. Of several weights of the states on the way,
    each gets a quarter of the iterations, and the best of these all of them from there.

    Args:
        starts: solvers to start from and to compare with, by name; those that are no tables are left out.
        trajectories: fits are made with each of these weights of the states on the way.
        fits: from so many starts.
        iterations: of a fit.
        mu: shift of a flow model's grid, for the solvers.
        follow: solver -> the weights that it has on a grid, to learn the times alone.
        decoupled: go on from the best fit with the network asked beside the places of the samples; taken only
            if no more of the held-out noises end in another image. Not tried where too few are held out to
            tell: at least :data:`MANY`, or :data:`SEEN` that end elsewhere with the best fit.
        options: of :func:`~diffalign.solvers.descent.fit`.

    Raises:
        UserError: no solver is a table.
    """
    ranked = known(problem, truth, starts, count, mu=mu)
    along = {} if follow else _along(problem, truth, ranked)

    def descended(name: str, start: Fit, trajectory: float, share: int = 1, **more: Any) -> Fit:
        made = fit(
            problem,
            truth,
            start.table,
            trajectory=trajectory,
            iterations=math.ceil(iterations / share),
            follow=follow[name] if follow else None,
            progress=progress,
            **more,
            **options,
        )
        return replace(made, table=replace(made.table, info={"start": name}))

    found: list[tuple[str, Fit, float]] = []
    for name, start in _in_turn(along, ranked)[:fits]:
        jobs = [(name, start, trajectory) for trajectory in trajectories]
        if len(jobs) > 1:
            tried = [(name, descended(*job, share=_TRIAL), job[2]) for job in jobs]
            jobs = [min(tried, key=lambda job: job[1].score)]
        (job,) = jobs
        found.append((name, descended(*job), job[2]))
    name, best, trajectory = min(found, key=lambda one: one[1].score)
    results = [made for _, made, _ in found]
    telling = len(best.errors) >= MANY or (best.errors > FAR).sum() >= SEEN
    if decoupled and telling and follow is None:
        beside = descended(name, best, trajectory, decoupled=True)
        if beside.far <= best.far:
            results.append(beside)
    return settled(problem, ranked, results)


def descents(iterations: int, fits: int, trajectories: int) -> int:
    """Steps of descent that :func:`calibrate` takes at most, decoupled times included."""
    trials = trajectories * math.ceil(iterations / _TRIAL) if trajectories > 1 else 0
    return fits * (trials + iterations) + iterations


def _in_turn(*rankings: Mapping[str, Fit]) -> list[tuple[str, Fit]]:
    """The best of each, then the second of each, and so on; of each round the better one first."""
    sorted_ones = (sorted(ranking.items(), key=_score) for ranking in rankings)
    rounds = itertools.zip_longest(*sorted_ones)
    return [item for one in rounds for item in sorted((found for found in one if found), key=_score)]


def _score(item: tuple[str, Fit]) -> float:
    return item[1].score


def _along(problem: Problem, truth: Truth, ranked: Mapping[str, Fit]) -> dict[str, Fit]:
    """On the times of each known solver, the weights that lead along the true trajectories."""
    _, held_out = problem.parts
    grids = {start.table.times.tobytes(): (name, start.table.times) for name, start in ranked.items()}
    tables = {f"stepwise on {name}": stepwise(problem, truth, times) for name, times in grids.values()}
    return {name: Fit(table, judge(problem, truth, table, held_out)) for name, table in tables.items()}


# ------------------------------------------------------------------------------------------------ searches


def following(scheduler: PlanScheduler) -> Follow:
    """The weights that a solver has where it is told to ask the network: :func:`trace` on custom times."""

    def weights(lambdas: Array) -> Array:
        low, high = lambda_range(scheduler.schedule)
        times = times_of(scheduler.schedule, np.clip(lambdas, low, high))
        return trace(scheduler, timesteps=times.tolist())[1]

    return weights


def search(
    problem: Problem,
    truth: Truth,
    baselines: Mapping[str, Fit],
    space: Space,
    starts: Mapping[str, Genome],
    table_of: Callable[[Genome], Table],
    *,
    finalists: int = 5,
    more: Callable[[Genome], Mapping[str, Any]] = lambda genome: {},
    **options: Any,
) -> Calibration:
    """The best sampler that an evolutionary search finds, without gradients, if it beats the known ones.

    Candidates are judged by :attr:`Fit.score` on the half of the noises that is not held out, all on the same
    ones; the finalists on the held-out half.

    Args:
        baselines: from :func:`known`.
        space: where to search.
        starts: name of each baseline -> its genome.
        table_of: the sampler that a genome means.
        finalists: how many of the best are judged on the held-out noises.
        more: what a table's info says of its genome, JSON.
        options: of :func:`~diffalign.solvers.evolution.evolve`.
    """
    fitted, held_out = problem.parts

    def score(genome: Genome) -> float:
        table = table_of(genome)
        return Fit(table, judge(problem, truth, table, fitted)).score

    evolved = evolve(space, score, starts.values(), **options)
    found = []
    for genome in evolved.best(finalists):
        table = replace(table_of(genome), info={"start": "evolution", **more(genome)})
        found.append(Fit(table, judge(problem, truth, table, held_out)))
    return settled(problem, baselines, found, {"candidates": len(evolved.scores)})
