"""PNDM: recorded runs of the published code, orders, and starts that ask twice at one time."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers import DDIMScheduler, GaussianMixture, PNDMScheduler, sample
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.pndm import VARIANTS, adams_weights, published_steps
from diffalign.solvers.scheduler import threshold

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_dpm_pndm"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "goldens.npz")
RECORDED = [c for c in INDEX["cases"] if c["family"] == "pndm" and c["method"] in ("S-PNDM", "F-PNDM")]


@pytest.fixture(scope="module")
def small(sd_betas):
    """A mixture of 32 coordinates, four noises, and the exact solution down to the first training step."""
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    schedule = PNDMScheduler(**sd_betas).schedule
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return mixture, noise, mixture.solve(noise, schedule, t_end=0.0, tolerance=1e-9)


def network(x, t):
    """A smooth stand-in for a network, in the dtype of x."""
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


def loop(scheduler, x, times):
    for t in times:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: c["id"])
def test_the_published_convention_reproduces_the_published_code(case):
    spec = INDEX["problems"][case["problem"]]
    mixture = GaussianMixture.random(spec["shape"], spread=spec["spread"], seed=spec["gmm_seed"])
    guidance = spec["guidance"]
    arguments = {}
    if guidance:
        arguments = {"guidance_scale": guidance["scale"], "classes": guidance["class_per_sample"]}
    scheduler = PNDMScheduler(
        trained_betas=ARRAYS[spec["betas_array"]].tolist(),
        variant=case["method"].lower(),
        convention="published",
    )
    model = mixture.model(scheduler.schedule, **arguments)
    seen = []

    def recorded(x, t):
        seen.append(float(t) + case["model_time_offset"])
        return model(x, seen[-1])

    noise = torch.from_numpy(ARRAYS[spec["x_T"]])
    result = sample(recorded, noise, scheduler, num_inference_steps=case["nfe"])
    assert relative_error(result, torch.from_numpy(ARRAYS[case["x0"]])) < 1e-6
    assert seen == case["model_time_inputs"]


@pytest.mark.parametrize(
    ("count", "asked"),
    [(10, 10), (16, 15), (7, 6), (8, 8), (25, 25), (19, 18), (101, None), (28, None)],
    ids=str,
)
def test_the_published_grid(count, asked):
    """Who asks for n gets every 1000 // n-th training step from 0 on, which may be more than n.

    8 come of 7 as well, with a stride of 142. 101 come of nothing, and 28 of 27 alone, whose first time has
    no level: it would be that of training step 1000.
    """
    stride = 1000 // (asked or count)
    if asked:
        assert len(range(0, 1000, stride)) == count
    assert published_steps(count, 1000).tolist() == [stride * k for k in reversed(range(count))]


@pytest.mark.parametrize(("variant", "skip", "extra"), [("plms-heun", True, 1), ("f-pndm", False, 9)])
@pytest.mark.parametrize("to_one", [True, False])
def test_uniform_weights_are_those_of_diffusers(sd_betas, variant, skip, extra, to_one):
    theirs = diffusers.PNDMScheduler(
        **sd_betas, skip_prk_steps=skip, set_alpha_to_one=to_one, steps_offset=1, timestep_spacing="leading"
    )
    ours = PNDMScheduler.from_config(theirs.config, variant=variant, convention="uniform", grid="diffusers")
    x = torch.randn(2, 4, 8, 8)
    a = sample(network, x, theirs, num_inference_steps=20)
    b = sample(network, x, ours, num_inference_steps=20 + extra)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert relative_error(b, a) < 1e-5


def test_skip_prk_steps_chooses_the_variant():
    for skip, starts in ((True, ()), (False, (4, 4, 4))):
        ours = PNDMScheduler.from_config(diffusers.PNDMScheduler(skip_prk_steps=skip).config)
        ours.set_timesteps(30)
        assert ours.config.skip_prk_steps is skip
        assert len(set(ours.timesteps.tolist())) == 30 - sum(s - 2 for s in starts)
        assert diffusers.PNDMScheduler.from_config(ours.config).config.skip_prk_steps is skip


# ---------------------------------------------------------------- orders


def slope(scheduler, mixture, noise, exact, steps=(40, 80, 160), **model):
    ideal = mixture.model(scheduler.schedule, **model)
    errors = [relative_error(sample(ideal, noise, scheduler, num_inference_steps=n), exact) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("grid", ["logsnr", "time_quadratic"])
@pytest.mark.parametrize(
    ("variant", "convention", "least", "most"),
    [
        ("s-pndm", "consistent", 1.85, 2.1),
        ("plms", "consistent", 2.8, 3.7),  # its first step is of first order, once
        ("plms-heun", "consistent", 3.3, 4.2),
        ("f-pndm", "consistent", 3.7, 4.4),
        ("s-pndm", "uniform", 1.85, 2.1),
        ("f-pndm", "uniform", 1.85, 2.6),
    ],
)
def test_orders(small, sd_betas, variant, convention, least, most, grid):
    scheduler = PNDMScheduler(
        **sd_betas, variant=variant, convention=convention, grid=grid, set_alpha_to_one=False
    )
    assert least <= slope(scheduler, *small) <= most


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_order_does_not_depend_on_what_the_network_predicts(small, sd_betas, kind):
    scheduler = PNDMScheduler(**sd_betas, variant="f-pndm", grid="logsnr", set_alpha_to_one=False)
    scheduler.register_to_config(prediction_type=kind)
    assert slope(scheduler, *small, prediction_type=kind) > 3.7


@pytest.mark.parametrize("variant", ["s-pndm", "f-pndm"])
def test_flow_and_zero_terminal_snr_start_from_noise(small, variant):
    """At alpha = 0 the first step is DDIM's; the start follows it."""
    mixture, noise, _ = small
    for options in (
        {"prediction_type": "flow_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ):
        scheduler = PNDMScheduler(**options, variant=variant)
        model = mixture.model(scheduler.schedule, prediction_type=options["prediction_type"])
        fine = sample(model, noise, scheduler, num_inference_steps=128)
        coarse = [
            relative_error(sample(model, noise, scheduler, num_inference_steps=n), fine) for n in (16, 48)
        ]
        assert coarse[1] < 0.01
        assert coarse[1] < coarse[0] / 4


def test_large_guidance_and_few_steps_stay_bounded(sd_betas):
    """The default is near the solution where the published weights have left it."""
    mixture = GaussianMixture.random((4, 8, 8))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, published = PNDMScheduler(**sd_betas), PNDMScheduler(**sd_betas, convention="uniform")
    guidance = {"guidance_scale": 7.5, "classes": [1] * 4}
    exact = mixture.solve(noise, ours.schedule, tolerance=1e-7, **guidance)
    model = mixture.model(ours.schedule, **guidance)
    for steps in (5, 8, 10, 15):
        error, other = (
            relative_error(sample(model, noise, s, num_inference_steps=steps), exact)
            for s in (ours, published)
        )
        assert error < 0.8 / steps
        assert other > 5 * error


# ---------------------------------------------------------------- weights


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4),
    coefficients=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_adams_weights_integrate_polynomials_exactly(gaps, coefficients):
    """k nodes integrate any polynomial of degree k - 1 over the step, whatever the gaps."""
    nodes = -np.cumsum([0.0, *gaps[1:]])
    weights = adams_weights(nodes, gaps[0])
    p = np.polynomial.Polynomial(coefficients[: len(nodes)])
    mean = (p.integ()(gaps[0]) - p.integ()(0.0)) / gaps[0]
    scale = np.abs(weights) @ np.abs(p(nodes)) + 1.0
    assert abs(np.dot(weights, p(nodes)) - mean) < 1e-9 * scale
    assert sum(weights) == pytest.approx(1.0, abs=1e-9 * scale)


def test_adams_weights_of_equal_steps_are_the_classical_ones():
    for classical in (
        [1],
        [3 / 2, -1 / 2],
        [23 / 12, -16 / 12, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ):
        nodes = -0.3 * np.arange(len(classical))
        np.testing.assert_allclose(adams_weights(nodes, 0.3), classical, atol=1e-13)


# ---------------------------------------------------------------- counting and starting


@pytest.mark.parametrize("convention", ["consistent", "uniform", "published"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_evaluation_is_counted(variant, convention):
    """n is the length of the loop for every n, also where a start doesn't fit."""
    scheduler = PNDMScheduler(variant=variant, convention=convention)
    x = torch.randn(1, 4, 4, 4)
    for steps in (*range(1, 18), 50):
        seen = []
        out = sample(
            network,
            x,
            scheduler,
            num_inference_steps=steps,
            callback=lambda i, t, x, seen=seen: seen.append(t),
        )
        assert len(seen) == len(scheduler.timesteps) == scheduler.num_inference_steps == steps
        assert bool((torch.diff(scheduler.timesteps.double()) <= 0).all())
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("variant", "counts"), [("plms", {}), ("plms-heun", {3: 1, 12: 1}), ("f-pndm", {4: 0, 5: 1, 9: 2, 13: 3})]
)
def test_starts_take_what_fits(variant, counts):
    scheduler = PNDMScheduler(variant=variant)
    size = {"plms-heun": 2}.get(variant, 4)
    for steps, starts in counts.items():
        scheduler.set_timesteps(steps)
        anchored = sum(min(row.x) < e for e, row in enumerate(scheduler.plan.rows))
        assert anchored == starts * (size - 1)


def test_one_step_is_ddim(sd_betas):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    a = sample(network, x, PNDMScheduler(**sd_betas), num_inference_steps=1)
    b = sample(network, x, DDIMScheduler(**sd_betas), num_inference_steps=1)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["s-pndm", "f-pndm"])
def test_repeated_times_may_be_passed_by_value(variant):
    """Views tell an index by their address; numbers and copies follow the count of steps."""
    x = torch.randn(1, 4, 4, 4)
    scheduler = PNDMScheduler(variant=variant)
    results = []
    for passed in (lambda t: t, lambda t: t.clone(), float):
        scheduler.set_timesteps(16)
        results.append(loop(scheduler, x, [passed(t) for t in scheduler.timesteps]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("variant", "begins"), [("plms", [20]), ("s-pndm", [1, 2]), ("f-pndm", [1, 2, 3, 6])]
)
def test_any_begin_index_solves_the_rest(small, sd_betas, variant, begins):
    """Also one inside a start, whose other evaluations are then steps of their own."""
    mixture, noise, _ = small
    scheduler = PNDMScheduler(**sd_betas, variant=variant, grid="logsnr", set_alpha_to_one=False)
    model = mixture.model(scheduler.schedule)
    scheduler.set_timesteps(40)
    for begin in begins:
        scheduler.set_begin_index(begin)
        t = float(scheduler.timesteps[begin])
        exact = mixture.solve(noise, scheduler.schedule, t_start=t, t_end=0.0, tolerance=1e-5)
        x = noise
        for time in scheduler.timesteps[begin:]:
            x = scheduler.step(model(x, time), time, x, return_dict=False)[0]
        assert relative_error(x, exact) < 1e-2


def test_custom_timesteps_are_the_evaluations(small):
    scheduler = PNDMScheduler(variant="f-pndm")
    scheduler.set_timesteps(20)
    times = [900.0, 700.5, 400.0, 100.0, 10.0]
    scheduler.set_timesteps(timesteps=times)
    assert scheduler.timesteps.tolist() == times
    assert [set(row.x) for row in scheduler.plan.rows] == [{e} for e in range(5)]


@pytest.mark.parametrize("convention", ["consistent", "published"])
@pytest.mark.parametrize("variant", ["s-pndm", "f-pndm"])
def test_the_timesteps_of_a_run_make_the_same_run(variant, convention):
    """Their repetitions are those of a start."""
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    scheduler = PNDMScheduler(variant=variant, convention=convention)
    expected = sample(network, x, scheduler, num_inference_steps=17)
    for passed in (scheduler.timesteps, scheduler.timesteps.tolist()):
        assert torch.equal(sample(network, x, scheduler, timesteps=passed), expected)
    with pytest.raises(UserError, match="decrease strictly"):
        scheduler.set_timesteps(timesteps=[900, 900, 500])


def test_thresholding_acts_on_the_data_prediction(sd_betas):
    """As if the network itself returned the eps of the thresholded x0."""
    options = {**sd_betas, "grid": "logsnr", "variant": "f-pndm"}
    plain = PNDMScheduler(**options)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def thresholded(x, t):
        alpha, sigma = (float(v) for v in plain.schedule.alpha_sigma(float(t)))
        x0 = threshold((x - sigma * network(x, t)) / alpha, 0.9, 2.0)
        return (x - alpha * x0) / sigma

    expected = sample(thresholded, x, plain, num_inference_steps=17)
    scheduler = PNDMScheduler(
        **options, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0
    )
    result = sample(network, x, scheduler, num_inference_steps=17)
    assert relative_error(result, expected) < 1e-9
    assert relative_error(sample(network, x, plain, num_inference_steps=17), expected) > 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "s-pmdn"}, "did you mean 's-pndm'"),
        ({"convention": "paper"}, "unknown convention"),
        (
            {"convention": "published", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
            "use convention='consistent'",
        ),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        PNDMScheduler(**options)


def test_the_published_convention_has_no_level_above_the_last_time():
    with pytest.raises(UserError, match="must stay below 999"):
        PNDMScheduler(convention="published").set_timesteps(timesteps=[999, 500])
