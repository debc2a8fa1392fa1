"""Schedules of solvers, and the evolutionary search over them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.pipelines.load import make_scheduler
from diffalign.solvers import GaussianMixture, NoiseSchedule, sample
from diffalign.solvers.calibrated import CalibratedScheduler, Tables, trace
from diffalign.solvers.evolution import Space, evolve
from diffalign.solvers.fitting import times_at
from diffalign.solvers.unified import CORRECTORS, DERIVATIVES, FORMS, choices, known_steps, table_of

SCHEDULE = NoiseSchedule.from_config(SD_SCHEDULER)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


# ------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("solver", ["dpm-solver", "dpm-solver++", "unipc"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("grid", ["karras", "time_uniform"])
def test_known_solvers_are_points_of_the_space(solver, order, count, grid):
    scheduler = make_scheduler(solver, SD_SCHEDULER, solver_order=order, grid=grid, final_sigmas_type="zero")
    times, weights = trace(scheduler, count)
    steps = known_steps(solver, order, count)
    np.testing.assert_allclose(table_of(SCHEDULE, times[:-1], steps).weights, weights, atol=1e-12)
    if solver != "dpm-solver":
        allowed = choices(count, pure_noise=False)
        assert all(
            c in values for s, a in zip(steps, allowed, strict=True) for c, values in zip(s, a, strict=True)
        )


@pytest.mark.parametrize("solver", ["dpm-solver++", "unipc", "dpm-solver"])
def test_from_pure_noise(solver):
    scheduler = make_scheduler(solver, FLOW, solver_order=2, final_sigmas_type="zero")
    times, weights = trace(scheduler, 6)
    table = table_of(scheduler.schedule, times[:-1], known_steps(solver, 2, 6))
    np.testing.assert_allclose(table.weights, weights, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), flow=st.booleans())
def test_every_choice_is_a_consistent_table(seed, n, flow):
    schedule = NoiseSchedule.from_config(FLOW) if flow else SCHEDULE
    rng = np.random.default_rng(seed)
    space = Space(choices(n, pure_noise=flow), gap=0.02)
    genome = next(g for g in iter(lambda: space.random(rng), 0) if g is not None)
    times = times_at(schedule, [step[0] for step in genome])
    table = table_of(schedule, times, [step[1:] for step in genome])
    np.testing.assert_allclose(table.weights.sum(1), 1, atol=1e-12)
    assert table.weights[-1, -1] == 1.0


def watched(network, seen):
    def model(x, t):
        seen.append(x)
        return network(x, t)

    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("order", "derivative", "corrector", "slope"),
    [
        (1, "taylor", "none", 1),
        (2, "half", "none", 2),
        (2, "taylor", "none", 2),
        (3, "taylor", "none", 3),
        (2, "taylor", "taylor", 3),
        (1, "taylor", "half", 2),
    ],
)
def test_orders(form, order, derivative, corrector, slope):
    """On a grid uniform in log-SNR, at a state inside the range."""
    mixture = GaussianMixture.random((2, 2, 2), components=3, seed=1)
    noise = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []
    for n in (20, 40, 320):
        lambdas = np.linspace(float(SCHEDULE.lambda_(999.0)), 0.5, n + 1)
        times = np.append(SCHEDULE.t_of_lambda(lambdas), SCHEDULE.t_min)
        times[0] = 999.0
        # Starts of order 2 at the least, or they hide the order of the rest.
        steps = [(form, min(order, k + 1), derivative if k else "taylor", corrector) for k in range(n + 2)]
        table = table_of(SCHEDULE, times, steps)
        made = CalibratedScheduler.from_config(
            SD_SCHEDULER, tables=Tables({n + 2: table}, SCHEDULE.fingerprint())
        )
        seen = []
        sample(watched(mixture.model(SCHEDULE), seen), noise, made, num_inference_steps=n + 2)
        ends.append(seen[n])  # handed to the evaluation at lambda 0.5, before any correction there
    exact = mixture.solve(noise, SCHEDULE, t_end=float(SCHEDULE.t_of_lambda(0.5)))
    errors = [float((end - exact).norm()) for end in ends]
    assert math.log2(errors[0] / errors[1]) > slope - 0.35
    assert errors[2] < errors[1]


# ------------------------------------------------------------------------------------------- the search

genomes = st.integers(0, 2**31).map(np.random.default_rng)


def valid(space, genome):
    places = np.array([step[0] for step in genome])
    assert places[0] == 0.0
    assert np.all(np.diff(places) >= space.gap)
    assert places[-1] <= 1.0
    for step, allowed in zip(genome, space.choices, strict=True):
        assert all(choice in values for choice, values in zip(step[1:], allowed, strict=True))


@settings(max_examples=60, deadline=None)
@given(rng=genomes, n=st.integers(2, 8), steps=st.booleans())
def test_what_breeds_stays_in_the_space(rng, n, steps):
    space = Space(choices(n, pure_noise=False) if steps else ((),) * n, rate=0.5)
    found = [space.random(rng) for _ in range(4)]
    found = [g for g in found if g is not None]
    found += [g for one in found for _ in range(3) if (g := space.mutated(rng, one)) is not None]
    found += [g for a in found for b in found[:3] if (g := space.crossed(rng, a, b)) is not None]
    assert found
    for genome in found:
        valid(space, genome)


def test_evolution_comes_near_the_best_and_judges_none_twice():
    space = Space(((("a", "b", "c"),),) * 4)
    asked = []

    def distance(genome):
        asked.append(genome)
        wanted = (0.0, 0.2, 0.3, 0.9)
        return sum(abs(step[0] - w) + (step[1] != "c") for step, w in zip(genome, wanted, strict=True))

    start = tuple((p, "a") for p in (0.0, 0.25, 0.5, 0.75))
    found = evolve(space, distance, [start, start], population=30, generations=12, seed=3)
    assert asked[0] == start
    assert len(asked) == len(set(asked)) == len(found.scores) <= 30 * 12
    best = found.best(5)
    assert found.scores[best[0]] == min(found.scores.values())
    assert found.scores[best[0]] < 0.25 < found.scores[start]
    again = evolve(space, distance, [start], population=30, generations=12, seed=3)
    assert again.scores == found.scores


def test_a_candidate_that_diverges_does_not_win():
    space = Space(((),) * 3)
    found = evolve(
        space, lambda g: math.nan if g[1][0] > 0.5 else g[1][0], [((0.0,), (0.4,), (0.9,))], population=20
    )
    assert all(g[1][0] <= 0.5 for g in found.best(5))
    assert math.inf in found.scores.values()


def test_names_are_those_of_the_choices():
    every = [set(values) for values in choices(9, pure_noise=False)[5]]
    assert every == [set(FORMS), {1, 2, 3}, set(DERIVATIVES), set(CORRECTORS)]
