"""DPM-Solver-v3: recorded runs, orders, identities, and how its options are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers import DDIMScheduler, DPMSolverV3Scheduler, GaussianMixture, Statistics, sample
from diffalign.solvers.dpm_solver_v3 import derivative_weights
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.statistics import sampling_range

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_v3_dc_ts"
INDEX = json.loads((FOLDER / "index.json").read_text())
PROBLEM = np.load(FOLDER / "problem.npz")
CASES = [case for case in INDEX["cases"] if case["algorithm"] == "dpm_solver_v3"]
GRIDS = {"time_uniform": "time_uniform", "logSNR": "logsnr", "edm": "edm", "time_quadratic": "time_quadratic"}
BETAS = {"trained_betas": PROBLEM["betas"].tolist()}


def published(name="ems_uncond.npz", **constants):
    arrays = np.load(FOLDER / name)
    rows = [np.full_like(arrays[k], constants[k]) if k in constants else arrays[k] for k in "lsb"]
    return Statistics(arrays["lambdas"], *rows, info={"guidance_scale": 1.0})


@pytest.fixture(scope="module")
def mixture():
    return GaussianMixture(
        PROBLEM["means"], PROBLEM["stds"], PROBLEM["weights"], PROBLEM["labels"], (4, 4, 4)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_recorded_runs(case, mixture):
    recorded = np.load(FOLDER / case["file"])
    constants = {"l": 1.0, "s": 0.0, "b": 0.0} if case["degenerate"] else {}
    scheduler = DPMSolverV3Scheduler(
        **BETAS,
        solver_order=case["order"],
        statistics=published(case["ems"], **constants),
        snap=True,
        predictor_pseudo=case["predictor_pseudo"],
        use_corrector=case["use_corrector"],
        corrector_pseudo=case["corrector_pseudo"],
        corrector_range=(0.5, 1.0) if case["half_corrector"] else (0.0, 1.0),
        lower_order_final=case["lower_order_final"],
        final_sigmas_type="sigma_min",
        grid=GRIDS[case["skip_type"]],
    )
    scale = case["guidance_scale"]
    guidance = {} if scale is None else {"guidance_scale": scale, "classes": [0, 1, 2]}
    model = mixture.model(scheduler.schedule, **guidance)
    result = sample(model, torch.from_numpy(PROBLEM["x_T"]), scheduler, num_inference_steps=case["steps"])
    np.testing.assert_allclose(scheduler.timesteps, recorded["model_times"][:-1], atol=1e-3)
    expected = torch.from_numpy(recorded["x0"])
    assert (result - expected).abs().max() / expected.abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_order_one_without_statistics_is_ddim(mixture, steps, final):
    ours = DPMSolverV3Scheduler(**BETAS, solver_order=1, grid="logsnr", final_sigmas_type=final)
    ddim = DDIMScheduler(**BETAS, grid="logsnr", set_alpha_to_one=final == "zero")
    model = mixture.model(ours.schedule)
    x = torch.from_numpy(PROBLEM["x_T"])
    a, b = (sample(model, x, s, num_inference_steps=steps) for s in (ours, ddim))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("corrector", [False, True])
def test_constant_statistics_are_the_closed_form(mixture, corrector):
    """l = 1, s = b = 0 as a table of rows: interpolation and quadrature against phi functions."""
    options = {**BETAS, "solver_order": 3, "use_corrector": corrector}
    table = DPMSolverV3Scheduler(**options, statistics=published(l=1.0, s=0.0, b=0.0))
    free = DPMSolverV3Scheduler(**options)
    model = mixture.model(free.schedule)
    x = torch.from_numpy(PROBLEM["x_T"])
    a, b = (sample(model, x, s, num_inference_steps=8) for s in (table, free))
    assert relative_error(a, b) < 1e-8


def smooth_statistics(schedule):
    """Any smooth l, s, b keep the order; none of these is trivial, and they differ per coordinate.

    l starts as 1 with slope 0: the first step is of order 1 and its error, of order h^2 in the end, is
    negligible only while f hardly changes, which the data prediction doesn't at the noisy end.
    """
    lambdas = np.linspace(*sampling_range(schedule), 2001)
    u = ((lambdas - lambdas[0]) / np.ptp(lambdas)).reshape(-1, 1, 1, 1)
    l, s, b = np.random.default_rng(0).uniform(-0.2, 0.2, (3, 1, 2, 2, 2))  # noqa: E741
    return Statistics(lambdas, 1.0 + l * u**2, s * (1 - u), b * u, schedule.fingerprint())


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (2, True)])
def test_order_in_every_coordinate(fitted, order, corrector):
    mixture = GaussianMixture.random((2, 2, 2), spread=0.6, seed=1)
    options = {
        **BETAS,
        "solver_order": order,
        "use_corrector": corrector,
        "corrector_pseudo": False,
        "lower_order_final": False,
        "grid": "logsnr",
        "final_sigmas_type": "sigma_min",
    }
    schedule = DPMSolverV3Scheduler(**options).schedule
    statistics = smooth_statistics(schedule) if fitted else None
    scheduler = DPMSolverV3Scheduler(**options, statistics=statistics)
    noise = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = mixture.solve(noise, schedule, t_end=0.0, tolerance=1e-10)
    model = mixture.model(schedule)
    steps = (40, 80, 160)
    errors = np.array(
        [
            (sample(model, noise, scheduler, num_inference_steps=n) - exact).square().mean(0).sqrt().numpy()
            for n in steps
        ]
    ).reshape(3, -1)
    slopes = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert np.median(slopes) >= order - 0.15


@given(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_derivative_weights(gaps, pseudo):
    """Exact for polynomials of the degree that the nodes allow; pseudo only in the highest derivative."""
    offsets = -np.concatenate([[0.0], np.cumsum(gaps)])
    n = len(gaps)
    weights = derivative_weights(offsets, pseudo)
    assert weights.shape == (n + 1, n + 1)
    np.testing.assert_allclose(weights[0], np.eye(n + 1)[0], atol=1e-9)
    np.testing.assert_allclose(weights[1:].sum(1), 0, atol=1e-6 * np.abs(weights).max())
    np.testing.assert_allclose(weights[n], derivative_weights(offsets, False)[n], rtol=1e-6)
    if not pseudo:
        np.testing.assert_allclose(weights @ offsets, np.eye(n + 1)[1], atol=1e-6 * np.abs(weights).max())


def test_statistics_beat_their_absence(mixture):
    """What the whole is for: at equal grid and steps the error falls severalfold."""
    noise = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = {}
    for name, statistics in (("with", published()), ("without", None)):
        scheduler = DPMSolverV3Scheduler(
            **BETAS,
            solver_order=3,
            statistics=statistics,
            grid="time_uniform",
            final_sigmas_type="sigma_min",
        )
        exact = mixture.solve(noise, scheduler.schedule, t_end=0.0, tolerance=1e-8)
        result = sample(mixture.model(scheduler.schedule), noise, scheduler, num_inference_steps=10)
        errors[name] = relative_error(result, exact)
    assert errors["with"] * 3 < errors["without"]


@pytest.mark.parametrize("snap", [False, True])
@pytest.mark.parametrize("corrector", [None, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_statistics_and_any_number_of_steps(mixture, snap, corrector, order):
    scheduler = DPMSolverV3Scheduler(
        **BETAS, solver_order=order, statistics=published(), snap=snap, use_corrector=corrector
    )
    for n in (1, 2, 3, 7, 20):
        x = sample(
            mixture.model(scheduler.schedule), torch.randn(1, 4, 4, 4), scheduler, num_inference_steps=n
        )
        assert torch.isfinite(x).all()
        assert len(scheduler.timesteps) == n
    scheduler.set_begin_index(8)
    assert len(scheduler.plan.rows) == 12
    assert set(scheduler.plan.rows[0].m) == {0}


def test_the_corrector_follows_the_guidance_of_the_statistics():
    def weights(**options):
        scheduler = DPMSolverV3Scheduler(**BETAS, **options)
        scheduler.set_timesteps(6)
        return len(scheduler.plan.rows[2].m)

    arrays = np.load(FOLDER / "ems_cfg7.5.npz")
    high = Statistics(arrays["lambdas"], *(arrays[k] for k in "lsb"), info={"guidance_scale": 7.5})
    assert weights(statistics=high) == weights() == 2
    assert weights(statistics=published()) == weights(statistics=high, use_corrector=True) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver_order": 4}, "solver_order"),
        ({"corrector_range": (0.5, 0.2)}, "corrector_range"),
        ({"corrector_range": 0.5}, "corrector_range"),
        ({"corrector_range": ("a", "b")}, "corrector_range"),
        ({"statistics": 3}, "Statistics.load"),
        ({"final_sigmas_type": "none"}, "final_sigmas_type"),
        ({"statistics": "published", "thresholding": True}, "thresholding"),
    ],
)
def test_bad_options(options, words):
    options = {k: published() if v == "published" else v for k, v in options.items()}
    with pytest.raises(UserError, match=words):
        DPMSolverV3Scheduler(**BETAS, **options)


def test_ties_between_rows_go_to_the_cleaner_one():
    """Eight steps uniform in 250 intervals: 62.5 and 187.5 are no rows, whatever float32 makes of them."""
    scheduler = DPMSolverV3Scheduler(
        **BETAS, statistics=published(), snap=True, grid="logsnr", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(8)
    lambdas = scheduler.statistics.lambdas
    at = scheduler.schedule.lambda_(scheduler.timesteps.double().numpy())
    rows = (at - lambdas[0]) / (lambdas[1] - lambdas[0])
    np.testing.assert_allclose(rows, [0, 31, 63, 94, 125, 156, 188, 219], atol=1e-3)


def test_two_steps_on_one_row_are_refused():
    scheduler = DPMSolverV3Scheduler(**BETAS, statistics=published(), snap=True, grid="logsnr")
    with pytest.raises(UserError, match="fewer steps"):
        scheduler.set_timesteps(400)
