"""UniPC: published numbers, orders, identities, agreement with diffusers, and the cost of its step."""

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
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.plan import compile_plan

FOLDER = Path(__file__).parents[1] / "goldens" / "solvers_dpm_pndm"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "goldens.npz")
CASES = [case for case in INDEX["cases"] if case["family"] == "unipc"]
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, t):
    """A smooth stand-in for a network, in the dtype of x."""
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_goldens(case):
    spec = INDEX["problems"][case["problem"]]
    mixture = GaussianMixture.random(spec["shape"], spread=spec["spread"], seed=spec["gmm_seed"])
    guidance = spec["guidance"]
    arguments = {}
    if guidance:
        arguments = {"guidance_scale": guidance["scale"], "classes": guidance["class_per_sample"]}
    vary = case["variant"] == "vary_coeff"
    scheduler = UniPCScheduler(
        trained_betas=ARRAYS[spec["betas_array"]].tolist(),
        solver_order=case["order"],
        solver_type="bh2" if vary else case["variant"],
        vary_coeff=vary,
        predict_x0=case["prediction"] == "data",
        lower_order_final=case["lower_order_final"],
        final_sigmas_type="sigma_min",
        disable_corrector=[],
        thresholding=case["dynamic_thresholding"] is not None,
        sample_max_value=math.inf,
    )
    evaluations = []
    model = mixture.model(scheduler.schedule, **arguments)

    def counted(x, t):
        evaluations.append(float(t))
        return model(x, t)

    noise = torch.from_numpy(ARRAYS[spec["x_T"]])
    result = sample(counted, noise, scheduler, timesteps=case["model_time_inputs"])
    assert relative_error(result, torch.from_numpy(ARRAYS[case["x0"]])) < 1e-6
    assert len(evaluations) == case["nfe"]


# ---------------------------------------------------------------- orders of accuracy


class Gaussian:
    """Data N(0.7, 0.5^2), whose network and whose solution of the ODE are formulas."""

    mean, std = 0.7, 0.5

    def __init__(self, schedule):
        self.schedule = schedule
        self.noise = torch.tensor([[-1.3, 0.4, 2.0]], dtype=torch.float64)

    def levels(self, t):
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(float(t)))
        return alpha, sigma, math.hypot(alpha * self.std, sigma)

    def epsilon(self, x, t):
        alpha, sigma, spread = self.levels(t)
        return sigma * (x - alpha * self.mean) / spread**2

    def solution(self, t):
        """At time t, from the noise at the noisy end: standardised values stay what they are."""
        alpha, _, spread = self.levels(self.schedule.t_max)
        standard = (self.noise - alpha * self.mean) / spread
        alpha, _, spread = self.levels(t)
        return alpha * self.mean + spread * standard


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"solver_type": "bh1"}, {"vary_coeff": True}, {"predict_x0": False}],
    ids=["bh2", "bh1", "vary", "noise"],
)
def test_order(order, corrector, options):
    """p, and p + 1 with the corrector. The first steps, which are of lower order, are short on this grid."""
    scheduler = UniPCScheduler(
        **SD_BETAS,
        solver_order=order,
        use_corrector=corrector,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        **options,
    )
    problem = Gaussian(scheduler.schedule)
    low, high = scheduler.schedule.lambda_([999.0, 0.0])
    errors = []
    for n in (40, 80) if order < 3 else (320, 640):  # high orders settle late
        times = scheduler.schedule.t_of_lambda(low + (high - low) * np.linspace(0.0, 1.0, n + 1) ** 2)
        result = sample(problem.epsilon, problem.noise, scheduler, timesteps=times[:-1])
        errors.append(float((result - problem.solution(0.0)).norm()))
    assert math.log2(errors[0] / errors[1]) >= order + corrector - 0.15


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_the_networks_prediction_does_not_matter(kind, predict_x0):
    """The history holds converted predictions, so what the network predicts changes nothing but rounding."""
    mixture = GaussianMixture.random((1, 2, 2), components=3, spread=0.6, seed=1)
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    results = []
    for prediction in ("epsilon", kind):
        scheduler = UniPCScheduler(**SD_BETAS, solver_order=3, predict_x0=predict_x0)
        scheduler.register_to_config(prediction_type=prediction)
        model = mixture.model(scheduler.schedule, prediction_type=prediction)
        results.append(sample(model, noise, scheduler, num_inference_steps=12))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- identities


def plan(cls, steps=9, **options):
    scheduler = cls(**SD_BETAS, **options)
    scheduler.set_timesteps(steps)
    return scheduler.plan


def assert_same_plan(a, b):
    np.testing.assert_allclose(a.times, b.times)
    np.testing.assert_allclose(a.table(), b.table(), rtol=1e-10, atol=1e-12)
    for e, (r, s) in enumerate(zip(a.rows, b.rows, strict=True)):
        assert r.x[e] == pytest.approx(s.x[e], abs=1e-14)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_order_one_without_corrector_is_ddim(final):
    options = {"grid": "logsnr", "final_sigmas_type": final}
    ours = plan(UniPCScheduler, solver_order=1, use_corrector=False, **options)
    assert_same_plan(ours, plan(DPMSolverPPScheduler, solver_order=1, **options))


def test_ddim_in_noise_form_ends_at_the_same_image():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise_form = UniPCScheduler(
        **SD_BETAS, solver_order=1, use_corrector=False, predict_x0=False, grid="karras"
    )
    ddim = DDIMScheduler(**SD_BETAS, grid="karras")
    a, b = (sample(network, x, s, num_inference_steps=7) for s in (noise_form, ddim))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "theirs"), [("bh2", "midpoint"), (None, "heun")])
def test_order_two_without_corrector_is_two_step_dpm_solver_pp(kind, theirs):
    """bh2 halves phi_1 where the varying coefficients have phi_2: the two forms of 2M."""
    options = {"solver_type": kind} if kind else {"vary_coeff": True}
    ours = plan(UniPCScheduler, use_corrector=False, grid="time_uniform", **options)
    assert_same_plan(ours, plan(DPMSolverPPScheduler, solver_type=theirs, grid="time_uniform"))


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_b_cancels_beyond_single_nodes(order, predict_x0):
    """bh1, bh2 and the varying coefficients differ in the warm-up and at the end alone."""
    options = {"solver_order": order, "predict_x0": predict_x0, "grid": "logsnr"}
    tables = [
        plan(UniPCScheduler, 12, **options, **o).table()
        for o in ({}, {"solver_type": "bh1"}, {"vary_coeff": True})
    ]
    for other in tables[1:]:
        np.testing.assert_allclose(other[3:10], tables[0][3:10], rtol=1e-8, atol=1e-10)
        assert np.abs(other[:2] - tables[0][:2]).max() > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(1.0, 120.0), min_size=3, max_size=9),
    order=st.integers(1, 4),
    corrector=st.booleans(),
    data=st.booleans(),
    kind=st.sampled_from(["bh1", "bh2", None]),
    final=st.sampled_from(["zero", "sigma_min"]),
)
def test_constant_predictions_are_integrated_exactly(gaps, order, corrector, data, kind, final):
    """x = alpha x0 + sigma eps for a constant x0 (data form) or eps (noise form), on any grid."""
    scheduler = UniPCScheduler(
        **SD_BETAS,
        solver_order=order,
        use_corrector=corrector,
        predict_x0=data,
        solver_type=kind or "bh2",
        vary_coeff=kind is None,
        final_sigmas_type=final,
        prediction_type="sample" if data else "epsilon",
    )
    scheduler.set_timesteps(timesteps=999.0 - np.cumsum(np.minimum(gaps, 900 / len(gaps))))
    alpha, sigma = scheduler.schedule.alpha_sigma(scheduler._times)
    level, other = (alpha, sigma) if data else (sigma, alpha)
    x = np.array([row.x[e] for e, row in enumerate(scheduler.plan.rows)])
    np.testing.assert_allclose(x * other[:-1], other[1:], atol=1e-12)
    np.testing.assert_allclose(x * level[:-1] + scheduler.plan.table().sum(1), level[1:], atol=1e-9)


def test_the_corrector_is_the_written_one():
    """The folded rows against predict, evaluate, correct, in the order of the paper's algorithm 1."""
    scheduler = UniPCScheduler(
        **SD_BETAS, solver_order=1, grid="logsnr", prediction_type="sample", disable_corrector=[]
    )
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    result = sample(network, x, scheduler, num_inference_steps=4)
    alpha, sigma = scheduler.schedule.alpha_sigma(scheduler._times)
    corrected, m = x, network(x, scheduler._times[0])
    for e in range(4):
        base = sigma[e + 1] / sigma[e] * corrected
        weight = alpha[e + 1] - sigma[e + 1] / sigma[e] * alpha[e]
        predicted = base + weight * m
        if e < 3:
            new = network(predicted, scheduler._times[e + 1])
            corrected, m = base + weight * (m + new) / 2, new
    torch.testing.assert_close(result, predicted, rtol=1e-9, atol=1e-9)


def test_disabled_steps_are_not_corrected():
    full, none = (
        plan(UniPCScheduler, disable_corrector=[]).table(),
        plan(UniPCScheduler, use_corrector=False).table(),
    )
    some = plan(UniPCScheduler, disable_corrector=[0, 4]).table()
    for row in range(9):
        expected = none if row in (0, 1, 5) else full
        np.testing.assert_allclose(some[row], expected[row])
    np.testing.assert_allclose(plan(UniPCScheduler, disable_corrector=list(range(9))).table(), none)


def test_disabled_steps_are_counted_from_the_start_of_the_grid():
    scheduler = UniPCScheduler(**SD_BETAS, disable_corrector=[4])
    scheduler.set_timesteps(9)
    scheduler.set_begin_index(3)
    free = UniPCScheduler(**SD_BETAS, disable_corrector=[])
    free.set_timesteps(timesteps=scheduler.timesteps[3:])
    difference = np.abs(scheduler.plan.table() - free.plan.table()).max(1)
    assert np.flatnonzero(difference > 1e-9).tolist() == [2]


# ---------------------------------------------------------------- agreement with diffusers


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    ("kind", "final"),
    # With bh1 and the end at zero diffusers gives NaN.
    [("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min")],
)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "extra",
    [
        {"disable_corrector": []},
        {"predict_x0": False, "disable_corrector": []},
        {"disable_corrector": [0, 2]},
    ],
)
def test_agrees_with_diffusers_on_its_grid(spacing, kind, final, order, extra):
    theirs = diffusers.UniPCMultistepScheduler(
        **SD_BETAS,
        solver_order=order,
        solver_type=kind,
        final_sigmas_type=final,
        timestep_spacing=spacing,
        steps_offset=int(spacing == "leading"),
        **extra,
    )
    ours = UniPCScheduler.from_config(
        theirs.config, grid="diffusers", disable_corrector=extra["disable_corrector"]
    )
    x = torch.randn(2, 4, 8, 8)
    for steps in (5, 12):
        a, b = (sample(network, x, s, num_inference_steps=steps) for s in (theirs, ours))
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        if final == "zero" and not ours.config.predict_x0:  # theirs multiplies 0 by infinity
            assert not torch.isfinite(a).all()
            assert torch.isfinite(b).all()
        else:
            assert (a - b).norm() / a.norm() < 3e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_agrees_with_diffusers_on_a_flow_grid(order):
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order
    )
    ours = UniPCScheduler.from_config(theirs.config, disable_corrector=[])
    x = torch.randn(2, 4, 8, 8)
    theirs.set_timesteps(12)
    ours.set_timesteps(sigmas=theirs.sigmas[:-1].double().clamp(max=0.999998).tolist())
    results = []
    for scheduler in (theirs, ours):
        y = x
        for t in scheduler.timesteps:
            # The same times for both, which theirs truncates.
            at = float(ours.timesteps[scheduler.timesteps.tolist().index(float(t))])
            y = scheduler.step(network(y, at), t, y, return_dict=False)[0]
        results.append(y)
    assert (results[0] - results[1]).norm() / results[0].norm() < 1e-4


# ---------------------------------------------------------------- robustness


@pytest.mark.parametrize("kind", ["bh1", "bh2", None])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_every_grid_end_and_step_count_is_finite(kind, predict_x0, beta_schedule):
    """bh1 with an end at zero, where diffusers gives NaN, among them."""
    x = torch.randn(1, 2, 4, 4)
    options = {"solver_type": kind} if kind else {"vary_coeff": True}
    for grid in ("auto", "diffusers", "karras"):
        for final in ("zero", "sigma_min"):
            for lower in (True, False):
                scheduler = UniPCScheduler(
                    beta_schedule=beta_schedule,
                    solver_order=3,
                    predict_x0=predict_x0,
                    grid=grid,
                    final_sigmas_type=final,
                    lower_order_final=lower,
                    **options,
                )
                for steps in (1, 2, 3, 5, 15):
                    result = sample(network, x, scheduler, num_inference_steps=steps)
                    assert torch.isfinite(result).all(), (grid, final, lower, steps)


@pytest.mark.parametrize("kind", ["bh1", "bh2", None])
def test_start_at_pure_noise(kind):
    """Where alpha is 0 the first step has no size in log-SNR: plain first order, trapezoid as corrector."""
    scheduler = UniPCScheduler(
        prediction_type="flow_prediction",
        solver_order=3,
        solver_type=kind or "bh2",
        vary_coeff=kind is None,
        use_flow_sigmas=True,
    )
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.7, 0.4])
    table = scheduler.plan.table()
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table[0], [0.1, 0, 0, 0], atol=1e-7)
    # The data prediction of a straight path is constant, and every step then ends on that path.
    x0, x = torch.randn(2, 1, 2, 4)
    straight = sample(lambda y, t: x - x0, x, scheduler, timesteps=scheduler.timesteps)
    torch.testing.assert_close(straight, x0, rtol=1e-5, atol=1e-5)


def test_a_pipeline_may_change_the_sample_between_steps():
    """Inpainting overwrites what step returned; the corrector acts on what it finds."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    change = torch.randn_like(x)
    a, b = UniPCScheduler(**SD_BETAS), UniPCScheduler(**SD_BETAS)
    for scheduler in (a, b):
        scheduler.set_timesteps(6)
    y, z = x, x
    for i, t in enumerate(a.timesteps):
        row = a.plan.rows[i]
        output = network(x, t)  # the same for both, whatever they are given
        y, z = (s.step(output, t, v, return_dict=False)[0] for s, v in ((a, y), (b, z)))
        if i == 2:
            z = z + change
        if i == 3:  # the change goes through its own step only by the weights of x and of the prediction
            direct = row.x[3] + row.m[3] * row.convert[0]
            torch.testing.assert_close(z - y, direct * change, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver_order": 5}, "solver_order must be 1, 2, 3 or 4"),
        ({"solver_type": "bh3"}, "unknown solver_type 'bh3'"),
        ({"final_sigmas_type": "end"}, "unknown final_sigmas_type"),
        ({"disable_corrector": 0}, "disable_corrector must be a list"),
        ({"disable_corrector": [-1]}, "disable_corrector must be a list"),
        ({"predict_x0": False, "thresholding": True}, "needs predict_x0=True"),
        ({"predict_x0": False, "rescale_betas_zero_snr": True}, "cannot start where alpha is 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        UniPCScheduler(**options)


def test_configs_travel(tmp_path):
    """A config of another multistep class, and ours in diffusers' hands."""
    ours = UniPCScheduler.from_config(diffusers.DEISMultistepScheduler(solver_order=3).config)
    assert (ours.config.solver_type, ours.config.solver_order) == ("bh2", 3)
    theirs = diffusers.UniPCMultistepScheduler.from_config(
        UniPCScheduler(solver_order=3, disable_corrector=[0], vary_coeff=True, grid="karras").config
    )
    assert theirs.disable_corrector == [0]
    assert UniPCScheduler.from_config(theirs.config).config.grid == "karras"
    assert UniPCScheduler.from_config(theirs.config).config.disable_corrector == [0]


def test_defaults_of_diffusers_become_ours():
    theirs = diffusers.UniPCMultistepScheduler()
    assert theirs.config.disable_corrector == []
    assert UniPCScheduler.from_config(theirs.config).config.disable_corrector == [0, 1]
    ours = UniPCScheduler(disable_corrector=[])
    assert UniPCScheduler.from_config(ours.config).config.disable_corrector == []


@pytest.mark.parametrize("guidance", [1.0, 7.5, 12.0])
@pytest.mark.parametrize("steps", [4, 5, 8, 15])
def test_default_options_do_not_diverge_under_guidance(guidance, steps):
    """Where correcting the first steps does; and they beat diffusers' defaults."""
    mixture = GaussianMixture.random((4, 8, 8))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = diffusers.UniPCMultistepScheduler(**SD_BETAS)
    ours = UniPCScheduler.from_config(theirs.config)
    arguments = {"guidance_scale": guidance, "classes": [1] * 4}
    exact = mixture.solve(noise, ours.schedule, tolerance=1e-6, **arguments)
    model = mixture.model(ours.schedule, **arguments)
    error, other = (
        relative_error(sample(model, noise, s, num_inference_steps=steps), exact) for s in (ours, theirs)
    )
    # Up to 4 steps both grids are uniform in time.
    assert error < (1.01 if steps == 4 else 0.6) * other
    assert error < 0.2


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(("order", "slots"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_the_corrector_needs_no_tensor_beyond_the_history(order, slots):
    """Order p reads p earlier predictions with the corrector, and keeps no sample."""
    instructions, size = compile_plan(plan(UniPCScheduler, 20, solver_order=order, lower_order_final=False))
    assert size == slots + 1
    assert all(i.keep_x is None and len(i.past) <= order for i in instructions)
