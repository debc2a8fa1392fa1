"""Time-shift sampling against straightforward loops and recorded runs of the released code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from diffalign.bench.step import count_syncs
from diffalign.errors import UserError
from diffalign.solvers import SOLVERS, GaussianMixture, TimeShiftScheduler, sample
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.time_shift import data_variance

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_time_shift"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "goldens.npz")
RELEASED = {
    "euler": ("ddim", {}),
    "s_pndm": ("pndm", {"variant": "s-pndm", "convention": "uniform"}),
    "f_pndm": ("pndm", {"variant": "f-pndm", "convention": "uniform"}),
}
PIXELS = {"data_variance": 0.33, "window": 40, "grid": "diffusers"}


@pytest.fixture(scope="module")
def pixels():
    """A mixture of 768 coordinates whose variance is 0.33, and start noise."""
    mixture = GaussianMixture.random((3, 16, 16), spread=0.49, seed=3)
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return mixture, noise


def biased(mixture, schedule, factor=1.02):
    """A network with one systematic fault; `t` is a number or one per image."""

    def network(x, t):
        times = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
        ideal = [mixture.model(schedule)(x[b : b + 1], float(times[b])) for b in range(len(x))]
        return factor * torch.cat(ideal)

    return network


def run(scheduler, network, x, steps, passed=lambda s, t: t):
    scheduler.set_timesteps(steps)
    seen = []
    for t in scheduler.timesteps:
        seen.append(passed(scheduler, t))
        x = scheduler.step(network(x, seen[-1]), t, x, return_dict=False)[0]
    return x, seen


# ---------------------------------------------------------------- the published and the corrected rule


@pytest.mark.parametrize("mode", ["published", "corrected"])
@pytest.mark.parametrize("pool", ["batch", "sample"])
def test_ddim_agrees_with_a_straightforward_loop(pixels, mode, pool):
    mixture, noise = pixels
    scheduler = TimeShiftScheduler(**PIXELS, mode=mode, pool=pool, cutoff=300)
    schedule = scheduler.schedule
    network = biased(mixture, schedule)
    result, _ = run(scheduler, network, noise, 10, lambda s, t: s.next_timesteps)

    nominal = [900.0 - 100 * k for k in range(10)] + [-1.0]
    v0 = 0.33 if mode == "corrected" else 0.0
    x, times = noise, np.full(4, nominal[0])
    shifted = 0
    for end in nominal[1:]:
        eps = network(x, times)
        a, s = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in schedule.alpha_sigma(times))
        a_end, s_end = (float(v) for v in schedule.alpha_sigma(end))
        x = a_end * (x - s * eps) / a + s_end * eps
        times = np.full(4, end)
        if end > 300:
            variance = x.reshape(4, -1).var(1).numpy()
            if pool == "batch":
                variance = np.full(4, variance.mean())
            candidates = end + np.arange(-20, 21)
            alpha, sigma = schedule.alpha_sigma(candidates)
            levels = alpha**2 * v0 + sigma**2
            times = candidates[np.abs(levels - variance[:, None]).argmin(1)]
            shifted += np.any(times != end)
    assert shifted >= 4
    assert relative_error(result, x) < 1e-12


@pytest.mark.parametrize(
    ("solver", "options"),
    [("dpm-solver++", {"solver_order": 2}), ("pndm", {"variant": "f-pndm"})],
)
def test_other_solvers_keep_their_coefficients(pixels, solver, options):
    """The same samples come from the solver itself with a network that is told other times."""
    mixture, noise = pixels
    steps = 20
    scheduler = TimeShiftScheduler(**PIXELS, solver=solver, solver_options=options)
    network = biased(mixture, scheduler.schedule)
    result, seen = run(scheduler, network, noise, steps, lambda s, t: float(t))
    plain = SOLVERS[solver](**options, grid="diffusers", timestep_spacing="leading")
    told = iter(seen)
    expected = sample(lambda x, t: network(x, next(told)), noise, plain, num_inference_steps=steps)
    nominal = plain.timesteps.tolist()
    assert relative_error(result, expected) < 1e-12
    assert sum(a != b for a, b in zip(seen, nominal, strict=True)) > 3
    assert all(a == b for a, b in zip(seen, nominal, strict=True) if b <= 300)
    assert max(abs(a - b) for a, b in zip(seen, nominal, strict=True)) <= 20


def test_a_network_with_too_large_outputs_gains(pixels):
    """The one case in which the method is known to help; an exact network loses."""
    mixture, noise = pixels
    errors = {}
    for factor in (1.0, 1.02):
        for window in (0, 60):
            scheduler = TimeShiftScheduler(**{**PIXELS, "window": window})
            network = biased(mixture, scheduler.schedule, factor)
            exact = mixture.solve(noise, scheduler.schedule, t_start=900.0, tolerance=1e-6)
            errors[factor, window] = relative_error(run(scheduler, network, noise, 10)[0], exact)
    assert errors[1.02, 60] < 0.97 * errors[1.02, 0]
    assert errors[1.0, 60] < 1.2 * errors[1.0, 0]


# ---------------------------------------------------------------- the released code


@pytest.mark.parametrize("case", INDEX["cases"], ids=lambda c: c["id"])
def test_released_mode_reproduces_the_released_code(case):
    mixture = GaussianMixture(*(ARRAYS[k] for k in ("means", "stds", "weights", "labels")), (4, 4, 4))
    solver, options = RELEASED[case["method"]]
    scheduler = TimeShiftScheduler(
        solver=solver,
        solver_options={**options, "set_alpha_to_one": False},
        mode="released",
        window=case["window"] or 0,
        cutoff=case["cutoff"] or 0,
        pool="sample",
    )

    def network(x, t):
        """1.01 times the ideal epsilon at whole training steps."""
        return biased(mixture, scheduler.schedule, 1.01)(x, t.floor())

    times, expected = ARRAYS[f"{case['id']}_model_times"], torch.from_numpy(ARRAYS[f"{case['id']}_x0"])
    result, seen = run(
        scheduler, network, torch.from_numpy(ARRAYS["x_T"]), len(times), lambda s, t: s.next_timesteps
    )
    np.testing.assert_array_equal([t.expand(3).numpy() for t in seen], times)
    assert (result - expected).abs().max() < 1e-6 * expected.abs().max()


def released_loop(network, schedule, x, points, memory, window, cutoff):
    """The released rule in words of its own: steps between whole times, stages at the level below theirs."""

    def transfer(x, t, t_end, eps):
        (a, s), (b, r) = (
            [torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in schedule.alpha_sigma(np.floor(u))]
            for u in (t, t_end)
        )
        return b / a * x + (r - b * s / a) * eps

    weights = {1: [1.0], 2: [1.5, -0.5], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}[memory]
    history, told = [], []
    for k, (time, end) in enumerate(zip(points, [*points[1:], 0], strict=True)):
        ends = np.full(len(x), float(end))
        if k and end > cutoff:
            candidates = np.arange(max(end - window // 2, 0), end + window // 2 + 1.0)
            levels = schedule.sigma(candidates) ** 2
            ends = candidates[np.abs(levels - x.flatten(1).var(1).numpy()[:, None]).argmin(1)]
        times = np.full(len(x), float(time))

        def ask(x, t):
            told.append(t.tolist())
            return network(x, torch.from_numpy(t))

        history.insert(0, ask(x, times))
        if len(history) >= memory:
            eps = sum(w * e for w, e in zip(weights, history, strict=False))
        elif memory == 2:
            eps = (history[0] + ask(transfer(x, times, ends, history[0]), ends)) / 2
        else:
            middle = (times + ends) / 2
            second = ask(transfer(x, times, middle, history[0]), middle)
            third = ask(transfer(x, times, middle, second), middle)
            fourth = ask(transfer(x, times, ends, third), ends)
            eps = (history[0] + 2 * second + 2 * third + fourth) / 6
        x = transfer(x, times, ends, eps)
    return x, told


@pytest.mark.parametrize(
    ("solver", "memory", "steps", "stride", "window"),
    [
        ("euler", 1, 49, 20, 40),  # ends reach the step's start
        ("euler", 1, 49, 20, 60),  # and beyond it
        ("s_pndm", 2, 49, 20, 60),
        ("f_pndm", 4, 27, 37, 20),  # stages between training steps, and a stride that no 27 asks for
        ("f_pndm", 4, 27, 37, 80),
    ],
)
def test_released_windows_may_be_wider_than_the_steps(pixels, solver, memory, steps, stride, window):
    mixture, noise = pixels
    noise = noise[:2]
    name, options = RELEASED[solver]
    scheduler = TimeShiftScheduler(
        solver=name,
        solver_options={**options, "set_alpha_to_one": False},
        mode="released",
        window=window,
        cutoff=800,
        pool="sample",
    )
    network = biased(mixture, scheduler.schedule, 1.05)
    points = [1 + stride * k for k in reversed(range(steps))]
    expected, told = released_loop(network, scheduler.schedule, noise, points, memory, window, 800)
    result, seen = run(scheduler, network, noise, len(told), lambda s, t: s.next_timesteps)
    np.testing.assert_array_equal([t.expand(2).numpy() for t in seen], told)
    assert relative_error(result, expected) < 1e-10


def test_the_timesteps_of_a_released_run_can_be_passed():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    options = {"variant": "f-pndm", "convention": "uniform", "set_alpha_to_one": False}
    scheduler = TimeShiftScheduler(solver="pndm", solver_options=options, mode="released", window=0)
    expected = sample(lambda x, t: 0.9 * x.tanh(), x, scheduler, num_inference_steps=20)
    times = scheduler.timesteps.tolist()
    assert len(set(times)) < len(times)
    assert torch.equal(sample(lambda x, t: 0.9 * x.tanh(), x, scheduler, timesteps=times), expected)


# ---------------------------------------------------------------- where nothing can be read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs data_variance"),
        ({"data_variance": 1.2}, "nearly that variance"),
        ({"data_variance": 0.8, "mode": "published"}, "nearly that variance"),
    ],
)
def test_without_information_it_warns_and_runs_unshifted(options, words, caplog):
    logger = diffusers.utils.logging.get_logger("diffalign.solvers.time_shift")
    logger.addHandler(caplog.handler)
    try:
        scheduler = TimeShiftScheduler(**options)
    finally:
        logger.removeHandler(caplog.handler)
    assert words in caplog.text
    x = torch.randn(2, 3, 8, 8)
    a, b = (
        sample(lambda x, t: 0.9 * x.tanh(), x, s, num_inference_steps=8)
        for s in (scheduler, SOLVERS["ddim"]())
    )
    assert torch.equal(a, b)


def test_data_variance_is_that_of_each_sample(pixels):
    mixture, _ = pixels
    assert data_variance(mixture.sample(200)) == pytest.approx(0.33, abs=0.03)
    # A constant offset per image is no variance over its coordinates.
    x = torch.randn(50, 3, 16, 16) * 0.5
    assert data_variance(x + torch.arange(50.0).reshape(-1, 1, 1, 1)) == pytest.approx(0.25, rel=0.05)


# ---------------------------------------------------------------- the loop, copies and files


def test_numbers_and_views_of_the_timesteps_find_the_same_step(pixels):
    mixture, noise = pixels
    scheduler = TimeShiftScheduler(**{**PIXELS, "window": 80})
    network = biased(mixture, scheduler.schedule)
    expected, _ = run(scheduler, network, noise, 25)
    scheduler.set_timesteps(25)
    x = noise
    for i in range(25):
        t = float(scheduler.timesteps[i])
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(x, expected)


def test_a_second_run_starts_from_the_nominal_times(pixels):
    mixture, noise = pixels
    scheduler = TimeShiftScheduler(**PIXELS)
    network = biased(mixture, scheduler.schedule)
    first, seen = run(scheduler, network, noise, 10, lambda s, t: float(t))
    times = scheduler.timesteps
    assert times.tolist() == seen
    x = noise
    for t in times:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(x, first)
    copied = copy.deepcopy(scheduler)
    assert torch.equal(run(copied, network, noise, 10)[0], first)
    assert scheduler.timesteps is times


def test_image_to_image_starts_unshifted(pixels):
    mixture, noise = pixels
    scheduler = TimeShiftScheduler(**PIXELS)
    network = biased(mixture, scheduler.schedule)
    scheduler.set_timesteps(20)
    nominal = scheduler.timesteps.tolist()
    scheduler.set_begin_index(5)
    x, seen = noise, []
    for t in scheduler.timesteps[5:]:
        seen.append(float(t))
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert seen[0] == nominal[5]
    assert seen[1] != nominal[6]
    assert scheduler.step_index == 20


def test_the_solver_and_its_options_are_saved_and_taken_over(tmp_path):
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=3, beta_end=0.015)
    scheduler = TimeShiftScheduler.from_config(theirs.config, solver="dpm-solver++", data_variance=0.3)
    assert scheduler.config.beta_end == scheduler.base.config.beta_end == 0.015
    assert scheduler.base.config.solver_order == 3
    scheduler.save_pretrained(tmp_path)
    loaded = TimeShiftScheduler.from_pretrained(tmp_path)
    assert type(loaded.base) is SOLVERS["dpm-solver++"]
    assert dict(loaded.base.config) == dict(scheduler.base.config)
    again = TimeShiftScheduler.from_config(loaded.config, window=30)
    assert again.config.window == 30
    assert again.base.config.solver_order == 3
    back = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    assert back.config.beta_end == 0.015


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("pool", ["batch", "sample"])
def test_no_step_reads_a_value(solver, pool):
    scheduler = TimeShiftScheduler(**PIXELS, solver=solver, pool=pool)
    x = torch.randn(2, 3, 8, 8)

    def ready():
        scheduler.set_timesteps(10)

        def steps():
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(x, t, y, return_dict=False)[0]
                yield

        return steps()

    assert count_syncs(ready, torch.device("cpu")) == 0
    assert scheduler._shifted


def test_flow_models_are_shifted_where_the_variance_tells(pixels):
    """(1 - s)^2 v0 + s^2 has its lowest point at s = 1/2, on whose sides times have equal variances."""
    mixture, noise = pixels
    scheduler = TimeShiftScheduler(
        prediction_type="flow_prediction", data_variance=1.0, window=40, cutoff=0, solver="dpm-solver++"
    )
    network = mixture.model(scheduler.schedule, prediction_type="flow_prediction")
    out, _ = run(scheduler, network, noise, 20)
    assert torch.isfinite(out).all()
    times = [scheduler._host_times[e] for e in scheduler._choices]
    assert 500.0 not in times
    assert {450.0, 550.0, 950.0} <= set(times)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "ddmi"}, "did you mean 'ddim'"),
        ({"solver": "time-shift"}, "unknown solver"),
        ({"mode": "paper"}, "unknown mode"),
        ({"pool": "image"}, "unknown pool"),
        ({"window": -1}, "window must be 0 or more"),
        ({"window": "20"}, "window must be a finite number"),
        ({"cutoff": float("nan")}, "cutoff must be a finite number"),
        ({"data_variance": 0.0}, "data_variance must be above 0"),
        ({"solver": "dpm-solver-v3", "solver_options": {"statistics": 1}}, "no place for the statistics"),
        ({"mode": "released", "solver": "dpm-solver++"}, "is for the solvers ddim and pndm"),
        ({"solver_options": {"et": 1.0}}, "did you mean 'eta'"),
        ({"solver_options": {"eta": 2.0}}, "eta must lie"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        TimeShiftScheduler(**options)
