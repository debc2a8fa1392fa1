"""Tables from the true trajectories step by step, and networks asked beside the places of the samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.bench.plans import mixture_problem
from diffalign.errors import UserError
from diffalign.solvers import (
    CalibratedScheduler,
    DPMSolverPPScheduler,
    GaussianMixture,
    NoiseSchedule,
    UniPCScheduler,
    sample,
    selection,
)
from diffalign.solvers.calibrated import Table, Tables, trace
from diffalign.solvers.descent import fit
from diffalign.solvers.fitting import judge, lambdas_of, relative_error, solve, unrolled
from diffalign.solvers.selection import calibrate, descents, known
from diffalign.solvers.stepwise import stepwise

SCHEDULE = NoiseSchedule.from_config(SD_SCHEDULER)
TIMES = np.array([999.0, 870.0, 690.0, 430.0, 190.0])
TOLD = np.array([999.0, 850.5, 660.0, 440.0, 150.25])


@pytest.fixture(scope="module")
def case():
    """A mixture's noises and their true trajectories, guided."""
    problem = mixture_problem(GaussianMixture.random(seed=0), 4.0, 32, 0)
    return problem, solve(problem, 60)


def table_of(solver, count):
    times, weights = trace(solver, count)
    return Table(times[:-1], weights)


def solvers():
    grids = ("karras", "time_uniform", "logsnr")
    made = {
        f"{cls.__name__} {grid}": cls.from_config(SD_SCHEDULER, solver_order=2, grid=grid)
        for cls in (DPMSolverPPScheduler, UniPCScheduler)
        for grid in grids
    }
    return made


def test_every_row_leads_nearest_to_the_truth(case):
    """No other weight of a row brings the state after it nearer, on the noises that it was made with."""
    problem, truth = case
    rows, _ = problem.parts
    table = stepwise(problem, truth, TIMES)
    np.testing.assert_allclose(table.weights.sum(1), 1.0)
    assert not np.any(np.tril(table.weights, -3))

    def distance(weights, k):
        lambdas = torch.from_numpy(lambdas_of(SCHEDULE, TIMES))
        end, states = unrolled(problem, lambdas, torch.from_numpy(weights), rows, recompute=False)
        known = truth.rows(rows)
        if k == len(TIMES) - 1:
            return float(relative_error(end, known.end).mean())
        x, level = states[k]
        return float(relative_error(x / level.sigma, known.state(level.lambda_)).mean())

    for k in range(1, len(TIMES)):
        best = distance(table.weights, k)
        for j in range(max(0, k - 2), k):
            for move in (-0.05, 0.05):
                other = table.weights.copy()
                other[k, [j, k]] += move, -move
                assert distance(other, k) > 0.999 * best, (k, j)


def test_along_the_trajectory_is_nearer_than_the_solver_on_the_same_times(case):
    problem, truth = case
    _, fresh = problem.parts
    for name, solver in solvers().items():
        start = table_of(solver, 6)
        made = stepwise(problem, truth, start.times)
        errors = [np.median(judge(problem, truth, table, fresh)) for table in (made, start)]
        assert errors[0] < errors[1], name


def test_the_iterations_are_those_that_are_announced(case):
    problem, truth = case
    for fits, weights in ((1, (0.5,)), (2, (0.1, 0.5))):
        done = []
        calibrate(
            problem,
            truth,
            {"2M": DPMSolverPPScheduler.from_config(SD_SCHEDULER)},
            3,
            fits=fits,
            trajectories=weights,
            iterations=6,
            progress=lambda: done.append(1),  # noqa: B023
        )
        assert len(done) == descents(6, fits, len(weights)) - 6  # no decoupled times: too few noises


# ------------------------------------------------------------------------------------------- decoupled


def decoupled(prediction_type="epsilon"):
    weights = table_of(DPMSolverPPScheduler.from_config(SD_SCHEDULER, solver_order=2), len(TIMES)).weights
    tables = Tables({len(TIMES): Table(TIMES, weights, told=TOLD)}, SCHEDULE.fingerprint())
    return CalibratedScheduler.from_config(
        {**SD_SCHEDULER, "prediction_type": prediction_type}, tables=tables
    )


def test_the_scheduler_does_what_was_judged(case):
    """The network is told other times, and its output is read as at these."""
    problem, truth = case
    scheduler = decoupled()
    asked = []

    def network(x, t):
        asked.append(float(t))
        return problem.network(x, t, "epsilon")

    found = sample(network, problem.noise, scheduler, num_inference_steps=5)
    assert asked == TOLD.tolist()
    errors = judge(problem, truth, scheduler.tables.of(5), slice(0, len(problem.noise)))
    np.testing.assert_allclose(relative_error(found, truth.end).numpy(), errors, rtol=1e-5)
    coupled = Table(TIMES, scheduler.tables.of(5).weights)
    assert not np.allclose(judge(problem, truth, coupled, slice(0, len(problem.noise))), errors, rtol=0.01)


def test_samples_are_noised_to_their_own_level_not_to_the_told_one():
    scheduler = decoupled()
    scheduler.set_timesteps(5)
    x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for k, time in enumerate(TIMES):
        level = scheduler.add_noise(x0, noise, scheduler.timesteps[k : k + 1])
        np.testing.assert_allclose(level.flatten()[0], SCHEDULE.sigma(time), rtol=1e-6)
    scheduler.set_begin_index(2)
    assert [row.time for row in scheduler.plan.rows] == TOLD[2:].tolist()


def test_a_file_keeps_where_the_network_is_asked(tmp_path):
    decoupled().save_pretrained(tmp_path)
    loaded = CalibratedScheduler.from_pretrained(tmp_path).tables.of(5)
    np.testing.assert_array_equal(loaded.told, TOLD)
    np.testing.assert_array_equal(loaded.times, TIMES)
    assert loaded.decoupled
    with pytest.raises(UserError, match="no linear multistep method"):
        trace(decoupled(), 5)


def test_told_times_that_are_none_are_refused():
    for told in (TOLD[::-1], TOLD[:-1], np.where(TOLD == 660.0, np.nan, TOLD)):
        with pytest.raises(UserError, match=r"fall|needs n times|not finite"):
            Table(TIMES, np.eye(5), told=told)


def test_gradients_of_the_told_times(case):
    """Against finite differences."""
    problem, truth = case
    rows, _ = problem.parts
    weights = torch.from_numpy(table_of(DPMSolverPPScheduler.from_config(SD_SCHEDULER), 5).weights)
    lambdas, told = (torch.from_numpy(lambdas_of(SCHEDULE, t)) for t in (TIMES, TOLD))

    def loss(told):
        end, _ = unrolled(problem, lambdas, weights, rows, told=told, recompute=False)
        return relative_error(end, truth.rows(rows).end).mean()

    leaf = told.clone().requires_grad_()
    loss(leaf).backward()
    for k in (1, 3, 4):
        step = 1e-5 * (torch.arange(5) == k)
        with torch.no_grad():
            slope = float(loss(told + step) - loss(told - step)) / 2e-5
        assert float(leaf.grad[k]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(selection, "MANY", 64)


def test_decoupled_times_are_taken_where_they_help(few_are_enough):
    problem = mixture_problem(GaussianMixture.random(seed=7), 7.5, 96, 0, held_out=64)
    truth = solve(problem, 40)
    only = {"3M": DPMSolverPPScheduler.from_config(SD_SCHEDULER, solver_order=3, grid="logsnr")}
    options = {"fits": 1, "trajectories": (0.1,), "iterations": 40}
    plain, beside = (
        calibrate(problem, truth, only, 5, decoupled=decoupled, **options) for decoupled in (False, True)
    )
    assert beside.chosen.table.info["decoupled"]
    assert beside.chosen.score < plain.chosen.score
    assert beside.chosen.far <= plain.chosen.far
    assert np.all(np.diff(beside.chosen.table.told) < 0)


def test_decoupled_times_that_send_more_noises_elsewhere_are_dropped(few_are_enough, monkeypatch):
    """Although the score, in which the errors of the others count as well, is better."""

    def tempting(*args, decoupled=False, **options):
        made = fit(*args, decoupled=decoupled, **options)
        errors = np.where(np.arange(len(made.errors)) < decoupled, 1.0, 0.0 if decoupled else 0.1)
        return replace(made, errors=errors)

    monkeypatch.setattr(selection, "fit", tempting)
    problem = mixture_problem(GaussianMixture.random(seed=0), 1.0, 72, 0, held_out=64)
    only = {"2M": DPMSolverPPScheduler.from_config(SD_SCHEDULER, solver_order=2, grid="time_quadratic")}
    options = {"fits": 1, "trajectories": (0.1,), "iterations": 2}
    made = calibrate(problem, solve(problem, 20), only, 3, decoupled=True, **options)
    assert made.improved
    assert made.chosen.far == 0.0
    assert not made.chosen.table.info["decoupled"]


def test_decoupled_times_are_tried_only_where_a_flip_would_be_seen(monkeypatch):
    tried, elsewhere = [], [0]

    def recorded(*args, decoupled=False, **options):
        made = fit(*args, **options)
        if decoupled:
            tried.append(True)
        return replace(made, errors=np.where(np.arange(len(made.errors)) < elsewhere[0], 1.0, 0.0))

    monkeypatch.setattr(selection, "fit", recorded)
    problem = mixture_problem(GaussianMixture.random(seed=0), 1.0, 16, 0)
    truth = solve(problem, 10)
    only = {"2M": DPMSolverPPScheduler.from_config(SD_SCHEDULER)}
    options = {"fits": 1, "trajectories": (0.1,), "iterations": 1}
    for far, tries in ((0, 0), (selection.SEEN - 1, 0), (selection.SEEN, 1)):
        elsewhere[0] = far
        calibrate(problem, truth, only, 3, **options)
        assert len(tried) == tries


def test_fits_start_from_a_known_solver_and_from_stepwise_weights(case, monkeypatch):
    begun = []
    monkeypatch.setattr(
        selection,
        "fit",
        lambda problem, truth, start, **o: begun.append(start) or fit(problem, truth, start, **o),
    )
    options = {"trajectories": (0.5,), "iterations": 1, "decoupled": False}
    calibrate(*case, solvers(), 5, fits=2, **options)
    best = next(iter(known(*case, solvers(), 5).values())).table
    assert len(begun) == 2
    assert sum(np.array_equal(table.weights, best.weights) for table in begun) == 1
    stepped = next(table for table in begun if not np.array_equal(table.weights, best.weights))
    np.testing.assert_allclose(stepped.weights, stepwise(*case, stepped.times).weights)


def test_the_start_is_never_worse_than_the_known_solvers(case):
    problem, truth = case
    best = next(iter(known(problem, truth, solvers(), 5).values()))
    made = calibrate(problem, truth, solvers(), 5, fits=1, trajectories=(0.5,), iterations=1)
    assert made.chosen.score < best.score
    assert made.chosen.table.info["start"].startswith("stepwise on")
