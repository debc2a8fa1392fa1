"""DC-Solver: published numbers, the compensation as written, where ratios come from, and their search."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers import DDIMScheduler, DPMSolverPPScheduler, GaussianMixture, UniPCScheduler, sample
from diffalign.solvers.dc_search import (
    DCRatios,
    fit_cascade,
    load_cascade,
    reference_states,
    search_dc_ratios,
)
from diffalign.solvers.dc_solver import DCSolverScheduler, cascade_ratios, compensated, compensation
from diffalign.solvers.mixture import relative_error

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_v3_dc_ts"
INDEX = json.loads((FOLDER / "index.json").read_text())
PROBLEM = np.load(FOLDER / "problem.npz")
MIXTURE = GaussianMixture(
    PROBLEM["means"],
    PROBLEM["stds"],
    PROBLEM["weights"],
    PROBLEM["labels"],
    tuple(INDEX["gmm"]["shape"]),
)


def cases(algorithm):
    return [case for case in INDEX["cases"] if case["algorithm"] == algorithm]


def setting(case, batch):
    """Scheduler and network of a recorded case, for `batch` samples."""
    scheduler = DCSolverScheduler(
        trained_betas=PROBLEM["betas"].tolist(),
        solver_order=case["order"],
        solver_type=case["variant"],
        dc_order=case["dc_order"],
        last_step_ratio=1.0,
        disable_corrector=[],
        final_sigmas_type="sigma_min",
        grid="time_uniform",
    )
    scale = case["guidance_scale"]
    guidance = {"guidance_scale": scale, "classes": [i % 3 for i in range(batch)]} if scale else {}
    return scheduler, MIXTURE.model(scheduler.schedule, **guidance)


def network(x, t):
    """A smooth stand-in for a network, in the dtype of x."""
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


def largest(a, b):
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize("case", cases("dc_solver"), ids=lambda c: c["id"])
def test_goldens(case):
    recorded = np.load(FOLDER / case["file"])
    scheduler, model = setting(case, 3)
    scheduler = DCSolverScheduler.from_config(scheduler.config, dc_ratios=recorded["ratios"].tolist())
    inputs = []

    def watched(x, t):
        inputs.append(x)
        return model(x, t)

    times = 1000 * (recorded["model_times"] - 1e-3)
    result = sample(watched, torch.from_numpy(PROBLEM["x_T"]), scheduler, timesteps=times)
    assert largest(result, recorded["x0"]) < 1e-6
    for x, expected in zip(inputs, recorded["model_inputs"], strict=True):
        assert largest(x, expected) < 1e-6
    # The named grid is the one of the recording.
    scheduler.set_timesteps(case["steps"])
    np.testing.assert_allclose(scheduler.timesteps, times, rtol=1e-5)


@pytest.mark.parametrize("case", cases("dc_solver_search"), ids=lambda c: c["id"])
def test_the_published_search(case):
    recorded = np.load(FOLDER / case["file"])
    scheduler, model = setting(case, 10)
    reference = [torch.from_numpy(x) for x in recorded["reference_states"]]
    noise = torch.from_numpy(PROBLEM["x_T_search"])
    found = search_dc_ratios(
        model,
        scheduler,
        noise,
        num_inference_steps=case["steps"],
        method="published",
        held_out=0.0,
        reference=reference,
    )
    np.testing.assert_allclose(found.searched, recorded["ratios"], atol=case["tolerance"])
    ours = search_dc_ratios(
        model, scheduler, noise, num_inference_steps=case["steps"], held_out=0.0, reference=reference
    )
    # Without gradients, for a third of the evaluations, none of which goes backward, and with less loss.
    assert ours.train_after < found.train_after < found.train_before / 5
    assert ours.nfe <= 0.4 * found.nfe


def test_cascade_goldens():
    recorded = np.load(FOLDER / "cpr.npz")
    names = [name for name in recorded if name.startswith("cfg")]
    assert len(names) == 4
    for name in names:
        scale, steps = name.removeprefix("cfg").split("_nfe")
        ratios = cascade_ratios(recorded["coefficients"], int(steps), float(scale))
        np.testing.assert_allclose(ratios, recorded[name], atol=1e-12)


# ---------------------------------------------------------------- the compensation


def test_ratios_of_one_leave_the_solver_as_it_is():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    options = {"grid": "time_uniform", "final_sigmas_type": "sigma_min"}
    for predictor, plain in {
        "unipc": UniPCScheduler(**options),
        "dpm-solver++": DPMSolverPPScheduler(**options),
        "ddim": DDIMScheduler(grid="time_uniform", set_alpha_to_one=False),
    }.items():
        ours = DCSolverScheduler(predictor=predictor, last_step_ratio=1.0, **options)
        a, b = (sample(network, x, s, num_inference_steps=8) for s in (ours, plain))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    order=st.integers(1, 3),
    ratio=st.floats(-1.0, 3.0),
    coefficients=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    gaps=st.lists(st.floats(1.0, 100.0), min_size=4, max_size=4),
)
def test_the_interpolant_is_exact_for_polynomials(order, ratio, coefficients, gaps):
    times = 999.0 - np.cumsum(gaps[: order + 1])
    polynomial = np.polynomial.Polynomial(coefficients[: order + 1], domain=(500, 1000))
    weights = compensation(times.tolist(), ratio)
    at = ratio * times[-1] + (1 - ratio) * times[-2]
    expected = polynomial(at)
    scale = np.abs(weights).sum() * (1 + np.abs(polynomial(times)).max())
    assert np.dot(weights, polynomial(times)) == pytest.approx(expected, abs=1e-10 * scale)


@settings(max_examples=40, deadline=None)
@given(
    ratios=st.lists(st.floats(-1.0, 3.0), min_size=1, max_size=9),
    order=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_history_holds_compensated_predictions(ratios, order, seed):
    """`compensated` against a buffer that is overwritten step by step."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 999, len(ratios)))[::-1] + np.arange(len(ratios))[::-1]
    outputs = rng.standard_normal(len(ratios))
    buffer: list[float] = []
    for i, ratio in enumerate(ratios):
        buffer.append(outputs[i])
        if i >= order:
            weights = compensation(times[i - order : i + 1].tolist(), ratio)
            buffer[i] = float(np.dot(weights, buffer[i - order :]))
    held = [sum(w * outputs[j] for j, w in row.items()) for row in compensated(times, ratios, order)]
    np.testing.assert_allclose(held, buffer, rtol=1e-8, atol=1e-6 * max(1.0, np.abs(buffer).max()))


def test_the_first_steps_have_no_history():
    scheduler = DCSolverScheduler(dc_ratios=[5.0, 5.0, 1.0, 1.0, 1.0], dc_order=2)
    plain = UniPCScheduler()
    for s in (scheduler, plain):
        s.set_timesteps(5)
    np.testing.assert_allclose(scheduler.plan.table(), plain.plan.table(), atol=1e-12)


def test_image_to_image_uses_the_ratios_of_its_steps():
    ratios = [1.0, 1.0, 1.1, 0.9, 1.2, 1.3, 0.8, 1.5]
    whole = DCSolverScheduler(dc_ratios=ratios, disable_corrector=[4])
    whole.set_timesteps(8)
    whole.set_begin_index(3)
    # The same steps as a run of their own, whose first two cannot be compensated.
    part = DCSolverScheduler(dc_ratios=[1.0, 1.0, *ratios[5:]], disable_corrector=[1])
    part.set_timesteps(timesteps=whole.timesteps[3:])
    np.testing.assert_allclose(whole.plan.table(), part.plan.table(), atol=1e-12)


@pytest.mark.parametrize("predictor", ["unipc", "dpm-solver++", "ddim"])
def test_the_last_ratio_alone_gains_on_uniform_time(predictor):
    """The last step, huge in log-SNR and of first order, is extrapolated to second."""
    scheduler, model = setting(cases("dc_solver")[2], 3)
    noise = torch.from_numpy(PROBLEM["x_T"])
    exact = MIXTURE.solve(noise, scheduler.schedule, t_end=0.0, tolerance=1e-7)
    errors = []
    for ratio in (1.0, 1.85):
        compensating = DCSolverScheduler.from_config(
            scheduler.config, predictor=predictor, last_step_ratio=ratio
        )
        errors.append(relative_error(sample(model, noise, compensating, num_inference_steps=10), exact))
    assert errors[1] < errors[0] / 1.5


# ---------------------------------------------------------------- where ratios come from


def ratios_of(scheduler, steps, **kwargs):
    scheduler.set_timesteps(steps, **kwargs)
    return scheduler.ratios


def test_stored_ratios_go_before_the_polynomial_and_that_before_the_last_ratio(caplog):
    coefficients = np.load(FOLDER / "cpr.npz")["coefficients"].tolist()
    five = [1.0, 1.0, 1.1, 1.2, 1.3]
    scheduler = DCSolverScheduler(
        dc_ratios={"5": five, "3": [1.0, 1.0, 2.0]},
        cpr_coefficients=coefficients,
        guidance_scale=6.0,
        last_step_ratio=1.85,
    )
    assert ratios_of(scheduler, 5) == five
    assert ratios_of(scheduler, 3) == [1.0, 1.0, 2.0]
    assert ratios_of(scheduler, 8) == cascade_ratios(coefficients, 8, 6.0)
    assert ratios_of(scheduler, 8, guidance_scale=2.0) == cascade_ratios(coefficients, 8, 2.0)
    scheduler = DCSolverScheduler(dc_ratios=five, last_step_ratio=1.85)
    assert ratios_of(scheduler, 5) == five
    assert ratios_of(scheduler, 4) == [1.0, 1.0, 1.0, 1.85]


def test_without_ratios_it_says_so_once(monkeypatch):
    import diffalign.solvers.dc_solver as module

    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    scheduler = DCSolverScheduler(dc_ratios={"5": [1.0, 1.0, 1.1, 1.2, 1.3]})
    assert ratios_of(scheduler, 5)[-1] == 1.3
    assert not said
    assert ratios_of(scheduler, 6) == [1.0] * 6
    assert ratios_of(scheduler, 7) == [1.0] * 7
    assert len(said) == 1
    assert "no compensation ratios for 6 steps (stored: 5)" in said[0]


def test_the_cascade_needs_a_guidance_scale():
    scheduler = DCSolverScheduler(cpr_coefficients=[0.0] * 45)
    with pytest.raises(UserError, match="set the option guidance_scale"):
        scheduler.set_timesteps(5)
    with pytest.raises(UserError, match="call set_timesteps first"):
        _ = DCSolverScheduler().ratios


def test_hull_and_last_ratio_of_the_cascade():
    coefficients = np.load(FOLDER / "cpr.npz")["coefficients"]
    hull = [5.0, 20.0, 1.5, 12.0]
    outside = cascade_ratios(coefficients, 40, 30.0, hull=hull)
    powers = np.polynomial.polynomial.polyval(
        np.arange(1, 41) / 40,
        np.einsum("qab,a,b->q", coefficients.reshape(5, 3, 3), [1, 1, 1], [0.4**2, 0.4, 1]),
    )
    np.testing.assert_allclose(outside[2:], powers[2:], atol=1e-12)
    last = [0.0] * 8 + [1.9]
    assert cascade_ratios(coefficients, 8, 6.0, last=last)[-1] == pytest.approx(1.9)
    assert cascade_ratios(coefficients, 8, 6.0, last=last)[:-1] == cascade_ratios(coefficients, 8, 6.0)[:-1]


def test_everything_survives_saving(tmp_path, tiny_sd):
    coefficients = np.load(FOLDER / "cpr.npz")["coefficients"].tolist()
    own = tiny_sd.scheduler
    try:
        tiny_sd.scheduler = DCSolverScheduler.from_config(
            own.config,
            dc_ratios={"4": [1.0, 1.0, 1.1, 1.6], "5": [1.0, 1.0, 1.1, 1.2, 1.7]},
            cpr_coefficients=coefficients,
            cpr_hull=[5.0, 20.0, 1.5, 12.0],
            guidance_scale=5.0,
        )
        tiny_sd.save_pretrained(tmp_path)
        call = {"prompt": "a", "num_inference_steps": 4, "output_type": "latent"}
        before = tiny_sd(**call, generator=torch.Generator().manual_seed(0)).images
    finally:
        tiny_sd.scheduler = own
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DCSolverScheduler
    assert ratios_of(loaded.scheduler, 5) == [1.0, 1.0, 1.1, 1.2, 1.7]
    assert ratios_of(loaded.scheduler, 8) == pytest.approx(cascade_ratios(coefficients, 8, 5.0))
    after = loaded(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"predictor": "unpic"}, "did you mean 'unipc'"),
        ({"predictor": "dpm-solver++", "solver_order": 4}, "solver_order of dpm-solver"),
        ({"solver_order": 0}, "solver_order must be"),
        ({"dc_order": 0}, "dc_order must be 1, 2 or 3"),
        ({"dc_ratios": [1.0, math.nan]}, "dc_ratios must be finite numbers"),
        ({"dc_ratios": []}, "dc_ratios must be finite numbers"),
        ({"dc_ratios": ["a"]}, "dc_ratios must be finite numbers"),
        ({"dc_ratios": {"five": [1.0]}}, "whole numbers as keys, not 'five'"),
        ({"dc_ratios": {"3": [1.0]}}, "dc_ratios of 3 steps must have 3 numbers"),
        ({"last_step_ratio": math.inf}, "last_step_ratio must be a finite number"),
        ({"cpr_coefficients": [0.0] * 44}, "9 numbers for each power of i/n"),
        ({"cpr_coefficients": [0.0] * 45, "cpr_last": [1.0]}, "cpr_last must have 9 numbers"),
        ({"cpr_last": [1.0] * 9}, "cpr_last belongs to cpr_coefficients"),
        ({"cpr_hull": [1.0]}, "cpr_hull must have 4 numbers"),
        ({"cpr_hull": [10, 5, 1, 4]}, "least and greatest"),
        ({"dc_ratios": 1.5}, "dc_ratios must be finite numbers"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "5"}, "guidance_scale must be a finite number"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        DCSolverScheduler(**options)


# ---------------------------------------------------------------- search


@pytest.fixture(scope="module")
def problem():
    return setting(cases("dc_solver")[2], 16)


def noises(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *MIXTURE.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_reference_states_are_the_exact_solution(problem, final):
    scheduler = DCSolverScheduler.from_config(problem[0].config, final_sigmas_type=final)
    scheduler.set_timesteps(4)
    noise = noises(2)
    states = reference_states(problem[1], scheduler, noise)
    assert len(states) == 5
    assert torch.equal(states[0], noise)
    for state, t in zip(states[1:], scheduler._times[1:], strict=True):
        exact = MIXTURE.solve(noise, scheduler.schedule, t_end=float(t), tolerance=1e-7)
        # What is between the first training step and the clean image is one step of first order.
        assert relative_error(state, exact) < (2e-3 if t < 0 else 2e-4)


def test_reference_states_start_at_pure_noise():
    scheduler = DCSolverScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, last_step_ratio=1.0
    )
    scheduler.set_timesteps(5)
    noise = noises(2)
    model = MIXTURE.model(scheduler.schedule, prediction_type="flow_prediction")
    coarse, fine = (reference_states(model, scheduler, noise, steps=n) for n in (80, 400))
    for a, b in zip(coarse, fine, strict=True):
        assert relative_error(a, b) < 2e-2


@pytest.mark.parametrize("predictor", ["unipc", "dpm-solver++", "ddim"])
def test_ratios_found_pay_on_other_noises(problem, predictor):
    scheduler = DCSolverScheduler.from_config(problem[0].config, predictor=predictor)
    found = search_dc_ratios(problem[1], scheduler, noises(16), num_inference_steps=8, reference_steps=60)
    assert found.kept in ("all", "last")
    assert found.held_out_after < found.held_out_before / 2
    assert found.train_after < found.train_before
    assert all(-1 <= r <= 3 for r in found.ratios)
    assert found.ratios[:2] == [1.0, 1.0]
    if predictor != "unipc":  # no network is needed to try a ratio
        assert found.nfe == 2 * 8
    fresh = noises(16, seed=6)
    exact = MIXTURE.solve(fresh, scheduler.schedule, t_end=0.0, tolerance=1e-7)
    errors = [
        relative_error(
            sample(
                problem[1],
                fresh,
                DCSolverScheduler.from_config(scheduler.config, dc_ratios=ratios),
                num_inference_steps=8,
            ),
            exact,
        )
        for ratios in (found.ratios, [1.0] * 8)
    ]
    assert errors[0] < errors[1]


def test_the_loss_is_that_of_the_scheduler_itself(problem):
    """The search's own arithmetic and the plan's rows end at the same point."""
    scheduler, model = problem
    noise = noises(6)
    scheduler.set_timesteps(6)
    reference = reference_states(model, scheduler, noise, steps=60)
    found = search_dc_ratios(model, scheduler, noise, num_inference_steps=6, reference=reference)
    used = DCSolverScheduler.from_config(scheduler.config, dc_ratios=found.ratios)
    end = sample(model, noise, used, num_inference_steps=6)
    assert float((end - reference[-1])[:3].square().mean()) == pytest.approx(found.train_after, rel=1e-9)
    assert float((end - reference[-1])[3:].square().mean()) == pytest.approx(found.held_out_after, rel=1e-9)
    assert found.nfe > 12
    assert found.reference_nfe == 0


def test_what_does_not_help_the_held_out_noises_is_dropped(problem):
    """The rows of the search want the state elsewhere; the others want it where the plain solver leads."""
    scheduler, model = problem
    noise = noises(4)
    plain, states = DCSolverScheduler.from_config(scheduler.config), [noise]
    sample(model, noise, plain, num_inference_steps=5, callback=lambda i, t, x: states.append(x))
    misleading = [x.clone() for x in states]
    for x in misleading:
        x[:2] *= 1.2
    found = search_dc_ratios(model, scheduler, noise, num_inference_steps=5, reference=misleading)
    assert found.kept == "none"
    assert found.ratios == [1.0] * 5
    assert found.searched != found.ratios
    assert found.held_out_after == found.held_out_before


def test_runs_too_short_to_compensate(problem):
    found = search_dc_ratios(problem[1], problem[0], noises(2), num_inference_steps=2, reference_steps=20)
    assert (found.kept, found.ratios) == ("none", [1.0, 1.0])


def test_the_callers_scheduler_is_left_alone(problem):
    scheduler = DCSolverScheduler.from_config(problem[0].config, dc_ratios=[1.0] * 3)
    config = dict(scheduler.config)
    search_dc_ratios(problem[1], scheduler, noises(2), num_inference_steps=4, reference_steps=20)
    assert dict(scheduler.config) == config
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "adam"}, "unknown method 'adam'"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"bounds": (1.0, 2.0)}, "bounds must enclose 1"),
        ({"reference": [torch.zeros(2)]}, "reference must have 5 states"),
    ],
)
def test_bad_searches_are_refused(problem, options, words):
    with pytest.raises(UserError, match=words):
        search_dc_ratios(problem[1], problem[0], noises(2), num_inference_steps=4, **options)
    with pytest.raises(UserError, match="x_T is empty"):
        search_dc_ratios(problem[1], problem[0], noises(0), num_inference_steps=4)
    with pytest.raises(UserError, match="set_timesteps"):
        reference_states(problem[1], DCSolverScheduler(), noises(2))


# ---------------------------------------------------------------- cascade


def searches(coefficients, last=None):
    return [
        DCRatios(
            num_inference_steps=n,
            guidance_scale=g,
            ratios=cascade_ratios(coefficients, n, g, last=last),
            searched=[],
            kept="all",
            train_before=1.0,
            train_after=0.5,
            held_out_before=None,
            held_out_after=None,
            nfe=0,
            reference_nfe=0,
        )
        for n in (5, 8, 12, 20)
        for g in (1.5, 4.0, 7.5, 12.0)
    ]


def test_fit_recovers_a_cascade():
    coefficients = np.load(FOLDER / "cpr.npz")["coefficients"].tolist()
    fitted = fit_cascade(searches(coefficients), cpr_last=False, ridge=1e-12)
    assert fitted.last is None
    assert fitted.error < 1e-5
    assert fitted.hull == [5.0, 20.0, 1.5, 12.0]
    for steps, scale in ((6, 3.0), (15, 9.0)):
        np.testing.assert_allclose(
            cascade_ratios(fitted.coefficients, steps, scale),
            cascade_ratios(coefficients, steps, scale),
            atol=2e-2,
        )
    scheduler = DCSolverScheduler(**fitted.options(), guidance_scale=3.0)
    assert ratios_of(scheduler, 9) == cascade_ratios(fitted.coefficients, 9, 3.0, hull=fitted.hull)


def test_a_jump_of_the_last_ratio_needs_its_own_polynomial():
    flat = [0.0] * 8 + [1.0] + [0.0] * 36
    jump = [0.0] * 8 + [1.9]
    results = searches(flat, last=jump)
    own, one = (fit_cascade(results, cpr_last=separate) for separate in (True, False))
    assert own.error < 1e-3 < one.error
    assert cascade_ratios(own.coefficients, 10, 5.0, last=own.last)[-1] == pytest.approx(1.9, abs=1e-2)
    assert cascade_ratios(own.coefficients, 10, 5.0, last=own.last)[5] == pytest.approx(1.0, abs=1e-2)


def test_a_cascade_needs_three_by_three():
    results = searches([0.0] * 45)
    with pytest.raises(UserError, match="at least 3 numbers of steps"):
        fit_cascade([r for r in results if r.num_inference_steps < 10])
    with pytest.raises(UserError, match="guidance scale of every search"):
        fit_cascade([DCRatios(**{**vars(results[0]), "guidance_scale": None})])


def test_a_cascade_may_have_other_powers():
    """The published file of Stable Diffusion 2.1 has 36 numbers, a cubic."""
    cubic = np.random.default_rng(0).normal(size=36).tolist()
    assert cascade_ratios(cubic, 10, 7.5) == pytest.approx(
        cascade_ratios(cubic + [0.0] * 9, 10, 7.5), rel=1e-12
    )
    scheduler = DCSolverScheduler(cpr_coefficients=cubic, guidance_scale=7.5)
    scheduler.set_timesteps(10)
    assert scheduler.ratios == cascade_ratios(cubic, 10, 7.5)


def test_published_coefficients_are_read_without_unpickling(tmp_path):
    path = tmp_path / "cpr.npy"
    numbers = np.arange(45.0)
    np.save(path, numbers.reshape(5, 9))
    assert load_cascade(path) == numbers.tolist()
    np.save(path, numbers[:44])
    with pytest.raises(UserError, match=r"9 numbers for each power of i/n.* but has 44"):
        load_cascade(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot read an array"):
        load_cascade(path)
    with pytest.raises(UserError, match="cannot read an array"):
        load_cascade(tmp_path / "nowhere.npy")
