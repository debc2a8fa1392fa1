"""Samplers fitted to a model: tables of known solvers, descent, safeguards, files."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.errors import UserError
from diffalign.solvers import (
    CalibratedScheduler,
    DDIMScheduler,
    DPMSolverPPScheduler,
    DPMSolverScheduler,
    DPMSolverV3Scheduler,
    GaussianMixture,
    NoiseSchedule,
    PNDMScheduler,
    UniPCScheduler,
    calibrated,
    sample,
)
from diffalign.solvers.calibrated import Table, Tables, started_late, trace
from diffalign.solvers.descent import Followed, fit
from diffalign.solvers.evolution import Space
from diffalign.solvers.fitting import (
    Problem,
    judge,
    places_of,
    relative_error,
    solve,
    times_at,
    unrolled,
)
from diffalign.solvers.selection import calibrate, following, known, search

SCHEDULE = NoiseSchedule.from_config(SD_SCHEDULER)
MIXTURE = GaussianMixture.random((2, 3, 3), components=4, seed=3)


def problem(count, *, guidance=None, final="zero", schedule=SCHEDULE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.float64)
    classes = None if guidance is None else [1] * count

    def predict(x, t, alpha, sigma, rows):
        return MIXTURE._guided(x, alpha, sigma, guidance, classes and classes[: len(x)])[0]

    return Problem(predict, schedule, noise, final=final)


def solver(cls=DPMSolverPPScheduler, **options):
    return cls.from_config(SD_SCHEDULER, **options)


def scheduler_of(tables, **options):
    content = Tables(tables, SCHEDULE.fingerprint(), info={"guidance_scale": 4.0})
    return CalibratedScheduler.from_config(SD_SCHEDULER, tables=content, **options)


def as_scheduler(times, weights, final="zero"):
    tables = Tables({len(times): Table(times, weights)}, SCHEDULE.fingerprint(), final)
    return CalibratedScheduler.from_config(SD_SCHEDULER, tables=tables)


KNOWN = {
    "2M": (DPMSolverPPScheduler, {"solver_order": 2}),
    "3M": (DPMSolverPPScheduler, {"solver_order": 3, "grid": "karras"}),
    "UniPC-2": (UniPCScheduler, {"solver_order": 2, "grid": "logsnr"}),
    "UniPC-3": (UniPCScheduler, {"solver_order": 3, "grid": "time_uniform"}),
}


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_traced_table_is_the_solver(name, final):
    cls, options = KNOWN[name]
    known = solver(cls, final_sigmas_type=final, **options)
    times, weights = trace(known, 7)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-14)
    content = Tables({7: Table(times[:-1], weights)}, SCHEDULE.fingerprint(), final)
    table = CalibratedScheduler.from_config(SD_SCHEDULER, tables=content)
    network = MIXTURE.model(SCHEDULE)
    noise = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = sample(network, noise, known, num_inference_steps=7)
    torch.testing.assert_close(
        sample(network, noise, table, num_inference_steps=7), wanted, rtol=1e-10, atol=1e-10
    )
    assert len(table.timesteps) == table.num_inference_steps == 7


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DDIMScheduler, {}),
        (DPMSolverScheduler, {"solver_order": 3}),
        (DPMSolverScheduler, {"solver_order": 2, "solver_method": "singlestep"}),
        (DPMSolverPPScheduler, {"solver_order": 3, "solver_method": "singlestep"}),
        (UniPCScheduler, {"solver_order": 2, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
        (PNDMScheduler, {"variant": "plms"}),
        (DPMSolverV3Scheduler, {}),
    ],
)
def test_noise_form_stages_and_correctors_are_tables_too(cls, options):
    known = solver(cls, **options)
    final = known._final()
    times, weights = trace(known, 6)
    network = MIXTURE.model(SCHEDULE)
    noise = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = sample(network, noise, known, num_inference_steps=6)
    found = sample(network, noise, as_scheduler(times[:-1], weights, final), num_inference_steps=6)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_solver_on_custom_times_is_a_table_there():
    chosen = [999.0, 700.5, 333.3, 20.0]
    known = solver(UniPCScheduler, solver_order=3)
    times, weights = trace(known, timesteps=chosen)
    np.testing.assert_allclose(times[:-1], chosen, rtol=1e-6)  # the network is told float32
    network = MIXTURE.model(SCHEDULE)
    noise = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = sample(network, noise, known, timesteps=chosen)
    found = sample(network, noise, as_scheduler(times[:-1], weights), num_inference_steps=4)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_other_forms_are_no_tables():
    for other in (solver(PNDMScheduler, variant="f-pndm"), solver(algorithm_type="sde-dpmsolver++")):
        with pytest.raises(UserError, match="no linear multistep method"):
            trace(other, 6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), final=st.sampled_from(["zero", "sigma_min"]))
def test_a_constant_belief_is_solved_exactly_by_every_table(seed, n, final):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(SCHEDULE.t_min, 998, n))[::-1]
    weights = np.tril(rng.standard_normal((n, n)))
    weights[np.diag_indices(n)] += 1 - weights.sum(1)
    content = Tables({n: Table(times, weights)}, SCHEDULE.fingerprint(), final)
    table = CalibratedScheduler.from_config({**SD_SCHEDULER, "prediction_type": "sample"}, tables=content)
    x0 = torch.from_numpy(rng.standard_normal((1, 2, 3)))
    noise = torch.from_numpy(rng.standard_normal((1, 2, 3)))
    end = sample(lambda x, t: x0, noise, table, num_inference_steps=n)
    alpha, sigma = SCHEDULE.alpha_sigma([times[0], SCHEDULE.t_clean if final == "zero" else SCHEDULE.t_min])
    wanted = alpha[1] * x0 + sigma[1] / sigma[0] * (noise - alpha[0] * x0)
    torch.testing.assert_close(end, wanted, rtol=1e-8, atol=1e-8)


def test_a_late_start_keeps_every_row_consistent():
    _, weights = trace(solver(solver_order=3), 8)
    late = started_late(weights, 3)
    assert late.shape == (5, 5)
    np.testing.assert_allclose(late.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(late[2:], weights[5:, 3:], atol=1e-12)  # nothing old is read any more
    times, _ = trace(solver(solver_order=3), 8)
    table = scheduler_of({8: Table(times[:-1], weights)})
    table.set_timesteps(8)
    table.set_begin_index(3)
    assert len(table.plan.rows) == 5


@pytest.mark.parametrize(
    ("times", "weights", "words"),
    [
        ([900.0, 950.0], np.eye(2), "must fall"),
        ([900.0, 100.0], [[1.0, 0.0], [0.7, 0.2]], "must sum to 1"),
        ([900.0, 100.0], [[0.5, 0.5], [0.0, 1.0]], "no row may read later"),
        ([900.0, np.nan], np.eye(2), "not finite"),
        ([900.0], np.eye(2), "n x n weights"),
    ],
)
def test_what_is_no_table_is_refused(times, weights, words):
    with pytest.raises(UserError, match=words):
        Table(np.array(times), np.array(weights))


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_true_solution(final):
    case = problem(4, final=final)
    truth = solve(case, 100)
    end = MIXTURE.solve(case.noise, SCHEDULE, t_end=SCHEDULE.t_min)
    if final == "zero":
        alpha, sigma = (float(v) for v in SCHEDULE.alpha_sigma(SCHEDULE.t_min))
        end, _ = MIXTURE.posterior(end, alpha, sigma)
    torch.testing.assert_close(truth.end, end, rtol=1e-4, atol=1e-4)
    middle = SCHEDULE.t_of_lambda(0.3)
    x = MIXTURE.solve(case.noise, SCHEDULE, t_end=float(middle))
    state = truth.state(torch.tensor(0.3, dtype=torch.float64)) * float(SCHEDULE.sigma(middle))
    torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)


def test_a_flow_model_from_pure_noise():
    flow = NoiseSchedule.flow(1000)
    case = problem(4, schedule=flow)
    truth = solve(case, 100)
    known = DPMSolverPPScheduler.from_config(
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, solver_order=2
    )
    errors = []
    for n in (8, 32):
        times, weights = trace(known, n)
        errors.append(judge(case, truth, Table(times[:-1], weights), slice(0, 4)).mean())
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05


def test_gradients_through_the_sampler():
    """Against finite differences, in the places of the evaluations and in the weights."""
    case = problem(3)
    truth = solve(case, 60)
    times, weights = trace(solver(solver_order=2, grid="karras"), 5)
    lambdas = torch.from_numpy(SCHEDULE.lambda_(times[:-1])).requires_grad_()
    matrix = torch.from_numpy(weights).requires_grad_()

    def loss(lambdas, matrix):
        end, states = unrolled(case, lambdas, matrix, slice(0, 3), recompute=False)
        inner = [
            relative_error(x / level.sigma, truth.state(level.alpha.log() - level.sigma.log()))
            for x, level in states
        ]
        return relative_error(end, truth.end).mean() + 0.5 * torch.stack(inner).mean()

    loss(lambdas, matrix).backward()
    step = 1e-5
    for tensor, place in ((lambdas, 2), (lambdas, 3), (matrix, (2, 1)), (matrix, (4, 2))):
        values = []
        for sign in (1, -1):
            moved = [t.detach().clone() for t in (lambdas, matrix)]
            moved[0 if tensor is lambdas else 1][place] += sign * step
            with torch.no_grad():
                values.append(float(loss(*moved)))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float(tensor.grad[place]), rel=1e-3, abs=1e-6
        )


def test_recomputing_changes_no_gradient():
    case = problem(2)
    times, weights = trace(solver(solver_order=2), 4)
    found = []
    for recompute in (False, True):
        lambdas = torch.from_numpy(SCHEDULE.lambda_(times[:-1])).requires_grad_()
        end, _ = unrolled(case, lambdas, torch.from_numpy(weights), slice(0, 2), recompute=recompute)
        end.square().sum().backward()
        found.append(lambdas.grad)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def calibration():
    case = problem(64)
    truth = solve(case, 60)
    starts = {name: solver(cls, **options) for name, (cls, options) in KNOWN.items()}
    starts["no table"] = solver(PNDMScheduler, variant="f-pndm")
    return calibrate(case, truth, starts, 6, iterations=80, fits=1, trajectories=(0.1,))


def test_a_fit_beats_every_known_solver_on_fresh_noises(calibration):
    assert calibration.improved
    assert set(calibration.baselines) == set(KNOWN)
    fresh = problem(512, seed=77)
    truth = solve(fresh, 60)
    rows = slice(0, 512)
    known = min(
        np.quantile(judge(fresh, truth, made.table, rows), 0.9) for made in calibration.baselines.values()
    )
    found = np.quantile(judge(fresh, truth, calibration.chosen.table, rows), 0.9)
    assert found < 0.5 * known
    info = calibration.chosen.table.info
    assert info["held_out_p90"] < info["best_known_p90"]


def test_a_fit_that_does_not_help_is_dropped():
    case = problem(8)
    truth = solve(case, 40)
    times, weights = trace(solver(solver_order=2), 5)
    start = Table(times[:-1], weights)
    bad = fit(case, truth, start, iterations=5, learning_rate=50.0, check_every=1)
    assert bad.score <= fit(case, truth, start, iterations=1, learning_rate=0.0).score
    only = {"2M": solver(solver_order=2)}
    follow = {"2M": following(only["2M"])}
    result = calibrate(case, truth, only, 5, iterations=2, learning_rate=0.0, follow=follow)
    assert not result.improved
    assert result.chosen.table.info["fitted"] is False


def test_nothing_to_start_from_is_said():
    case = problem(4)
    with pytest.raises(UserError, match="none of the solvers"):
        calibrate(case, solve(case, 20), {"sde": solver(algorithm_type="sde-dpmsolver++")}, 5)


def test_times_alone_are_fitted_with_the_weights_of_the_solver():
    case = problem(32)
    truth = solve(case, 60)
    starts = {"2M": solver(solver_order=2, grid="time_uniform")}
    result = calibrate(
        case,
        truth,
        starts,
        5,
        fits=1,
        trajectories=(0.1,),
        iterations=40,
        follow={name: following(one) for name, one in starts.items()},
    )
    table = result.chosen.table
    assert result.improved
    assert table.info["held_out_p90"] < 0.8 * table.info["best_known_p90"]
    np.testing.assert_allclose(
        trace(starts["2M"], timesteps=table.times.tolist())[1], table.weights, atol=1e-12
    )


def test_the_slopes_of_followed_weights():
    """Against differences over a wider step."""
    follow = following(solver(UniPCScheduler, solver_order=3))
    times, _ = trace(solver(solver_order=2, grid="karras"), 5)
    lambdas = torch.from_numpy(SCHEDULE.lambda_(times[:-1]) - 0.05 * np.arange(5)).requires_grad_()
    pull = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 5)))
    (Followed.apply(lambdas, follow) * pull).sum().backward()
    assert lambdas.grad[0] == 0
    for k in (1, 3, 4):
        step = 1e-3 * (np.arange(5) == k)
        low, high = (follow(lambdas.detach().numpy() + s * step) for s in (-1, 1))
        slope = ((high - low) * pull.numpy()).sum() / 2e-3
        assert float(lambdas.grad[k]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_evolution_finds_times_and_solvers_without_gradients():
    """From poor starts, never worse than these on the held-out noises, and much better on fresh ones."""
    case = problem(32)
    truth = solve(case, 60)
    one = solver(solver_order=2, grid="time_uniform")
    baselines = known(case, truth, {"2M": one}, 5)
    start = places_of(SCHEDULE, baselines["2M"].table.times)
    np.testing.assert_allclose(times_at(SCHEDULE, start), baselines["2M"].table.times, atol=1e-6)

    def table_of(genome):
        times = times_at(SCHEDULE, [place for (place,) in genome])
        return Table(times, trace(one, timesteps=times.tolist())[1])

    starts = {"2M": tuple((float(p),) for p in start)}
    space = Space(((),) * 5)
    result = search(case, truth, baselines, space, starts, table_of, population=12, generations=6)
    info = result.chosen.table.info
    assert result.improved
    assert result.chosen.score < baselines["2M"].score
    assert info["held_out_p90"] < 0.8 * info["best_known_p90"]
    fresh = problem(256, seed=7)
    exact = solve(fresh, 60)
    errors = [
        np.quantile(judge(fresh, exact, made.table, slice(0, 256)), 0.9)
        for made in (result.chosen, baselines["2M"])
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_search_that_finds_nothing_better_keeps_the_known_solver():
    case = problem(8)
    truth = solve(case, 40)
    baselines = known(case, truth, {"2M": solver(solver_order=2)}, 5)
    bad = Table(np.array([999.0, 5.0, 4.0, 3.0, 2.0]), np.eye(5))
    start = {"2M": tuple((p,) for p in (0.0, 0.2, 0.4, 0.6, 0.8))}
    result = search(
        case, truth, baselines, Space(((),) * 5), start, lambda genome: bad, population=4, generations=1
    )
    assert not result.improved
    assert result.chosen.table.info["best_known"] == "2M"
    np.testing.assert_array_equal(result.chosen.table.weights, baselines["2M"].table.weights)


# ------------------------------------------------------------------------------------------- the scheduler


def test_a_file_keeps_every_bit_and_a_pipeline_folder_carries_it(tmp_path, calibration):
    table = calibration.chosen.table
    scheduler_of({6: table}).save_pretrained(tmp_path)
    loaded = CalibratedScheduler.from_pretrained(tmp_path).tables.of(6)
    assert loaded is not table
    np.testing.assert_array_equal(loaded.weights, table.weights)
    np.testing.assert_array_equal(loaded.times, table.times)


def test_what_it_was_not_made_for_is_refused(calibration):
    made = scheduler_of({6: calibration.chosen.table})
    with pytest.raises(UserError, match="no table of 9 steps: this scheduler has 6, the nearest is 6"):
        made.set_timesteps(9)
    with pytest.raises(UserError, match="brings its own times"):
        made.set_timesteps(timesteps=[900, 100])
    with pytest.raises(UserError, match="fitted on another noise schedule"):
        CalibratedScheduler.from_config({**SD_SCHEDULER, "beta_end": 0.013}, tables=made.tables)
    told = Tables(made.tables.tables, SCHEDULE.fingerprint(), info={"prediction_type": "epsilon"})
    CalibratedScheduler.from_config(SD_SCHEDULER, tables=told)
    with pytest.raises(UserError, match="fitted to a model that predicts epsilon, not v_prediction"):
        CalibratedScheduler.from_config({**SD_SCHEDULER, "prediction_type": "v_prediction"}, tables=told)
    with pytest.raises(UserError, match="has no tables: fit some with"):
        CalibratedScheduler.from_config(SD_SCHEDULER).set_timesteps(6)
    with pytest.raises(UserError, match="must be a Tables object"):
        CalibratedScheduler.from_config(SD_SCHEDULER, tables=[1, 2])


def test_another_guidance_scale_is_warned_of_once(calibration, monkeypatch):
    said = []
    monkeypatch.setattr(calibrated.logger, "warning", lambda text, *of: said.append(text % of))
    made = scheduler_of({6: calibration.chosen.table})  # at guidance 4
    for scale in (4.0, 6.5, 1.5):
        made.check_guidance(scale)
    assert not said
    made.check_guidance(6.6)
    made.check_guidance(1.0)
    assert said == [
        "these tables were fitted at guidance 4 and may be poor at 6.6: calibrate for that, or take "
        "dpm-solver++"
    ]
    as_scheduler(calibration.chosen.table.times, calibration.chosen.table.weights).check_guidance(99.0)
    assert len(said) == 1


def test_half_precision_samples(calibration):
    made = scheduler_of({6: calibration.chosen.table})
    network = MIXTURE.model(SCHEDULE)
    noise = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = sample(network, noise, made, num_inference_steps=6)
    half = sample(network, noise.bfloat16(), made, num_inference_steps=6)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)
