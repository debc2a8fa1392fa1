"""What diffusers' pipelines and training scripts take for granted of a scheduler."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS, DDIMScheduler, DPMSolverPPScheduler, GaussianMixture, sample
from diffalign.solvers.grids import GRIDS
from diffalign.solvers.mixture import relative_error

NAMES = list(SOLVERS)


@pytest.fixture(params=NAMES)
def cls(request):
    return SOLVERS[request.param]


def network(x, t):
    """A smooth stand-in for a network, in the dtype of x."""
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


def run(scheduler, x, steps=7, **kwargs):
    return sample(network, x, scheduler, num_inference_steps=steps, **kwargs)


# ---------------------------------------------------------------- configs


def test_every_option_is_read_and_saved(cls, tmp_path):
    options = inspect.signature(cls.__init__).parameters
    scheduler = cls(
        prediction_type="v_prediction", beta_end=0.015, grid="karras", timestep_spacing="trailing"
    )
    assert set(options) - {"self"} <= set(scheduler.config)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name in set(options) - {"self"}:
        assert loaded.config[name] == scheduler.config[name], name
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(run(scheduler, x), run(loaded, x))


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
    ],
)
def test_configs_of_diffusers_schedulers_are_taken_over(cls, name, sd_betas, tmp_path):
    theirs = getattr(diffusers, name)(**sd_betas, prediction_type="v_prediction")
    ours = cls.from_config(theirs.config)
    assert ours.config.prediction_type == "v_prediction"
    expected = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose(ours.alphas_cumprod, expected, rtol=1e-5)
    assert torch.isfinite(run(ours, torch.randn(1, 4, 4, 4))).all()
    # And back, without loss of what they know.
    back = getattr(diffusers, name).from_config(ours.config)
    assert back.config.beta_schedule == "scaled_linear"
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == cls.__name__


def test_edited_defaults_of_a_config_count(cls):
    """diffusers ignores an edit of a value that was at its default; users reported it."""
    config = dict(DPMSolverMultistepScheduler().config)
    config["prediction_type"] = "v_prediction"
    assert cls.from_config(config).config.prediction_type == "v_prediction"
    assert cls.from_config(config, prediction_type="sample").config.prediction_type == "sample"


def test_flow_configs_are_taken_over(cls, capfd):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = cls.from_config(theirs.config)
    assert "not expected" not in capfd.readouterr().err
    ours.set_timesteps(4, mu=math.log(2.0))  # of no meaning without dynamic shifting, yet pipelines pass it
    np.testing.assert_allclose(ours.sigmas, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    assert ours.schedule.is_flow
    assert ours.config.prediction_type == "flow_prediction"
    ours.set_timesteps(4)
    np.testing.assert_allclose(ours.sigmas, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(ours.timesteps, [1000, 900, 750, 500], atol=1e-3)
    assert torch.isfinite(run(ours, torch.randn(1, 4, 4, 4))).all()
    dynamic = cls.from_config(theirs.config, use_dynamic_shifting=True)
    dynamic.set_timesteps(4, mu=math.log(2.0))
    np.testing.assert_allclose(dynamic.sigmas, [1, 6 / 7, 2 / 3, 0.4, 0], atol=1e-6)
    # What is passed is what runs, unless a shift is passed with it.
    ours.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    np.testing.assert_allclose(ours.sigmas, [1, 0.6, 0.2, 0], atol=1e-6)


def test_euler_on_a_flow_schedule_is_the_first_order_solver():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    ours = DPMSolverPPScheduler.from_config(theirs.config, solver_order=1)
    x = torch.randn(2, 4, 4, 4)
    sigmas = [1.0, 0.8, 0.5, 0.1]
    theirs.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    a = b = x
    for t in theirs.timesteps:
        a = theirs.step(network(a, t), t, a, return_dict=False)[0]
    for t in ours.timesteps:
        b = ours.step(network(b, t), t, b, return_dict=False)[0]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": "noise"}, "unknown prediction type"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        ({"grid": "flow"}, "for flow models"),
        ({"timestep_spacing": "line"}, "unknown timestep_spacing"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio"),
        ({"sample_max_value": 0.5}, "sample_max_value"),
        ({"use_flow_sigmas": True}, "flow_prediction"),
        ({"beta_schedule": "sd"}, "unknown beta_schedule"),
    ],
)
def test_bad_options_are_refused_at_construction(cls, options, words):
    with pytest.raises(UserError, match=words):
        cls(**options)


def test_misspelt_options_are_refused_and_those_of_a_pipeline_overlooked(cls, tmp_path):
    with pytest.raises(UserError, match=f"{cls.__name__} has no option 'gird'; did you mean 'grid'"):
        cls.from_config(DPMSolverMultistepScheduler().config, gird="karras")
    cls().save_pretrained(tmp_path)
    assert type(cls.from_pretrained(tmp_path, torch_dtype=torch.float16)) is cls
    made, unused = cls.from_pretrained(tmp_path, return_unused_kwargs=True, grid="karras", other=1)
    assert made.config.grid == "karras"
    assert unused["other"] == 1


def test_options_of_other_schedulers_are_read_as_of_their_configs(cls, caplog):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    logger = logging.getLogger("diffalign.solvers.scheduler")
    logger.addHandler(caplog.handler)
    try:
        made = cls.from_config(flow, shift=3.0, invert_sigmas=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert made.schedule.shift == 3.0
    assert f"{cls.__name__} has no option shift, invert_sigmas" in caplog.text


def test_configs_go_from_one_class_to_another_and_back_in_silence(caplog):
    logging.getLogger("diffusers").addHandler(caplog.handler)  # it does not propagate
    first = SOLVERS["dpm-solver++"](solver_order=3, sde_eta=0.5)
    second = SOLVERS["ddim"].from_config(first.config)
    back = type(first).from_config(second.config)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.text
    assert back.config.sde_eta == 0.5


def test_unknown_solver_names_the_known():
    with pytest.raises(UserError, match=r"did you mean 'dpm-solver\+\+'"):
        SOLVERS["dpm-solver+"]
    with pytest.raises(KeyError):
        SOLVERS["euler"]
    assert "euler" not in SOLVERS
    assert len(SOLVERS) == len(list(SOLVERS))


# ---------------------------------------------------------------- timesteps


def test_what_loops_read_of_a_scheduler(cls):
    """The number of steps on every grid is the matter of test_sweep."""
    scheduler = cls()
    scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 5
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs num_inference_steps"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"timesteps": [10, 20]}, "decrease strictly"),
        ({"timesteps": [10, 10]}, "decrease strictly"),
        ({"timesteps": []}, "not be empty"),
        ({"timesteps": [1500]}, "not above 999"),
        ({"timesteps": [float("nan")]}, "must lie above"),
        ({"sigmas": [1e6]}, "sigmas must lie"),
        ({"sigmas": [3.0, 5.0]}, "sigmas must decrease strictly, but 3 is followed by 5"),
        ({"timesteps": [5], "sigmas": [5]}, "not both"),
        ({"num_inference_steps": 5, "mu": 1.0}, "flow"),
    ],
)
def test_bad_timesteps_are_refused(cls, arguments, words):
    with pytest.raises(UserError, match=words):
        cls().set_timesteps(**arguments)


def test_more_integer_steps_than_training_steps_are_refused(cls):
    with pytest.raises(UserError, match="use fewer steps or another grid"):
        cls(grid="diffusers", timestep_spacing="linspace").set_timesteps(3000)


def test_whole_timesteps_are_integers_and_others_are_not_rounded(cls):
    scheduler = cls()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.dtype == torch.int64
    scheduler.set_timesteps(timesteps=[900.25, 500, 100])
    assert scheduler.timesteps.tolist() == [900.25, 500, 100]
    seen = []
    sample(lambda x, t: seen.append(float(t)) or x, torch.zeros(1, 1, 2), scheduler, timesteps=[900.25, 3.5])
    assert seen == [900.25, 3.5]


def test_sigmas_and_timesteps_name_the_same_points(cls):
    a, b = cls(), cls()
    a.set_timesteps(9)
    b.set_timesteps(sigmas=a.sigmas.tolist())
    np.testing.assert_allclose(a.timesteps, b.timesteps, rtol=1e-3, atol=2e-3)


def test_flow_models_may_be_told_other_times(cls):
    """CogView4 passes sigmas, which are shifted, and the times before the shift for the network."""
    told = np.linspace(1000, 1, 6).astype(int)
    shift = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    both = {"timesteps": told.tolist(), "sigmas": (told / 1000).tolist(), "mu": 0.6}
    scheduler = cls(prediction_type="flow_prediction", **shift)
    scheduler.set_timesteps(**both)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    theirs.set_timesteps(**both)
    assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(scheduler.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    clean, noise = torch.randn(2, 2, 1, 4, 4)
    for times in (scheduler.timesteps[2:3], scheduler.timesteps[[2, 2]]):
        torch.testing.assert_close(
            scheduler.scale_noise(clean, times, noise),
            torch.lerp(clean, noise, float(theirs.sigmas[2])),
        )

    def outputs(scheduler, x):
        for e, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.tanh(x) * (1 - told[e] / 2000), t, x).prev_sample
        return x

    alone = cls(prediction_type="flow_prediction", **shift)
    alone.set_timesteps(sigmas=both["sigmas"], mu=0.6)
    assert torch.equal(outputs(scheduler, noise), outputs(alone, noise))
    with pytest.raises(UserError, match="belong together"):
        scheduler.set_timesteps(**{**both, "timesteps": told[1:].tolist()})


def test_lambda_clip_starts_where_it_says():
    scheduler = DPMSolverPPScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    for grid in ("auto", "diffusers", "karras", "time_uniform"):
        scheduler.register_to_config(grid=grid)
        scheduler.set_timesteps(10)
        start = float(scheduler.timesteps[0])
        assert -5.1 <= scheduler.schedule.lambda_(start) < -5.0


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "unipc"])
def test_epsilon_is_converted_at_the_smallest_alpha_too(name):
    """alpha is 5e-5 at the end of the cosine schedule: small, but an ideal epsilon still tells the data."""
    mixture = GaussianMixture.random((2, 4, 4), spread=0.6, seed=1)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    options = {"beta_schedule": "squaredcos_cap_v2", "grid": "time_uniform"}
    told = SOLVERS[name](**options, prediction_type="epsilon")
    asked = SOLVERS[name](**options, prediction_type="sample")
    ideal = mixture.model(told.schedule)

    def data(x, t):
        alpha, sigma = (float(v) for v in told.schedule.alpha_sigma(float(t)))
        return (x - sigma * ideal(x, t)) / alpha

    a = sample(ideal, x, told, num_inference_steps=5)
    assert told.timesteps[0] == 999
    assert relative_error(a, sample(data, x, asked, num_inference_steps=5)) < 1e-9


# ---------------------------------------------------------------- agreement with diffusers


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_multistep_agrees_with_diffusers_on_its_grid(sd_betas, spacing, final, order, kind, prediction):
    options = {
        **sd_betas,
        "solver_order": order,
        "solver_type": kind,
        "timestep_spacing": spacing,
        "final_sigmas_type": final,
        "prediction_type": prediction,
        "steps_offset": int(spacing == "leading"),
    }
    x = torch.randn(2, 4, 8, 8)
    theirs = DPMSolverMultistepScheduler(**options)
    ours = DPMSolverPPScheduler.from_config(theirs.config, grid="diffusers", third_order="published")
    for steps in (6, 20):
        a, b = run(theirs, x, steps), run(ours, x, steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert (a - b).norm() / a.norm() < 1e-5


@pytest.mark.parametrize(
    "flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas"]
)
def test_sigma_flags_give_the_sigmas_of_diffusers(sd_betas, flag):
    theirs = DPMSolverMultistepScheduler(**sd_betas, **{flag: True})
    for grid in ("diffusers", "auto"):
        ours = DPMSolverPPScheduler.from_config(theirs.config, grid=grid)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(9)
        if grid == "diffusers" or flag not in ("use_beta_sigmas",):
            np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_agrees_with_diffusers(sd_betas, steps, to_one):
    theirs = diffusers.DDIMScheduler(**sd_betas, clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
    ours = DDIMScheduler.from_config(theirs.config, grid="diffusers")
    x = torch.randn(2, 4, 8, 8)
    a, b = run(theirs, x, steps), run(ours, x, steps)
    assert (a - b).norm() / a.norm() < 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise_is_that_of_diffusers(sd_betas, eta):
    theirs = diffusers.DDIMScheduler(**sd_betas, clip_sample=False)
    ours = DDIMScheduler.from_config(theirs.config, grid="diffusers")
    x, noise = torch.randn(2, 2, 4, 8, 8)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps[:3]:
        output = network(x, t)
        a = theirs.step(output, t, x, eta=eta, variance_noise=noise)
        b = ours.step(output, t, x, eta=eta, variance_noise=noise)
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-4)
        x = b.prev_sample


@pytest.mark.parametrize("maximum", [1.0, 2.5, math.inf])
def test_thresholding_is_that_of_diffusers(sd_betas, maximum):
    options = {
        **sd_betas,
        "thresholding": True,
        "sample_max_value": maximum,
        "dynamic_thresholding_ratio": 0.9,
    }
    theirs = DPMSolverMultistepScheduler(**options)
    ours = DPMSolverPPScheduler.from_config(theirs.config, grid="diffusers")
    x = 2 * torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(ours._transform(x, x), theirs._threshold_sample(x), rtol=1e-5, atol=1e-6)
    a, b = run(theirs, x, 8), run(ours, x, 8)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_clip_sample_of_pixel_models():
    ours = DDIMScheduler.from_config(diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.5).config)
    x = 3 * torch.randn(1, 3, 8, 8)
    assert run(ours, x, 5).abs().max() <= 0.5


# ---------------------------------------------------------------- no combination crashes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr_is_finite(cls, prediction):
    x = torch.randn(1, 2, 4, 4)
    for grid in GRIDS:
        if grid == "flow":
            continue
        scheduler = cls(rescale_betas_zero_snr=True, prediction_type=prediction, grid=grid)
        for steps in (1, 2, 10):
            assert torch.isfinite(run(scheduler, x, steps)).all(), (grid, steps)
        assert torch.isfinite(scheduler.sigmas).all()


# ---------------------------------------------------------------- state


def test_step_before_set_timesteps_and_after_the_end(cls):
    x = torch.randn(1, 2, 4)
    with pytest.raises(UserError, match="set_timesteps"):
        cls().step(x, 5, x)
    scheduler = cls()
    run(scheduler, x, 3)
    foreign = torch.tensor(7.0, device="meta")  # tells nothing without a synchronisation
    with pytest.raises(UserError, match="all steps of this run are done"):
        scheduler.step(x, foreign, x)


def test_two_interleaved_copies_do_not_disturb_each_other(cls):
    x, y = torch.randn(2, 1, 4, 4, 4)
    alone = [run(cls(), x), run(cls(), y)]
    first = cls()
    first.set_timesteps(7)
    a, b = x, y
    second = None
    for i, t in enumerate(first.timesteps):
        a = first.step(network(a, t), t, a, return_dict=False)[0]
        if i == 0:
            # Copied in mid-run, then used for another image from its start.
            second = copy.deepcopy(first)
            second.set_timesteps(7)
        u = second.timesteps[i]
        b = second.step(network(b, u), u, b, return_dict=False)[0]
    assert torch.equal(a, alone[0])
    assert torch.equal(b, alone[1])


def test_a_copy_made_in_mid_run_goes_on(cls):
    x = torch.randn(1, 4, 4, 4)
    scheduler = cls()
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps.clone()):
        if i == 3:
            scheduler = copy.deepcopy(scheduler)
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        if i == 2:
            kept = x.clone()
    reference = cls()
    y = run(reference, torch.zeros(1, 4, 4, 4), 6)
    assert y.shape == x.shape
    assert not torch.equal(kept, x)
    assert scheduler.step_index == 6


def test_inputs_are_left_alone_and_outputs_are_not_reused(cls):
    scheduler = cls()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 4, 4)
    seen = []
    for t in scheduler.timesteps:
        output = network(x, t)
        before = x.clone(), output.clone()
        x_next = scheduler.step(output, t, x, return_dict=False)[0]
        assert torch.equal(x, before[0])
        assert torch.equal(output, before[1])
        output.fill_(math.nan)  # a static buffer that the next evaluation overwrites
        seen.append((x_next, x_next.clone()))
        x = x_next
    assert all(torch.equal(a, b) for a, b in seen)
    assert torch.isfinite(x).all()


def test_a_loop_that_starts_in_the_middle_needs_no_begin_index(cls):
    """``for t in timesteps[k:]``: the first timestep tells where we are."""
    x = torch.randn(1, 4, 4, 4)
    told, untold, copied = cls(), cls(), cls()
    for scheduler in (told, untold, copied):
        scheduler.set_timesteps(9)
    told.set_begin_index(4)
    results = []
    for scheduler, times in (
        (told, told.timesteps[4:]),
        (untold, untold.timesteps[4:]),
        (copied, copied.timesteps[4:].tolist()),
    ):
        y = x
        for t in times:
            y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
        assert scheduler.step_index == 9
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_going_back_starts_afresh(cls):
    """A second image through the same scheduler, without set_timesteps in between."""
    x, y = torch.randn(2, 1, 4, 4, 4)
    scheduler = cls()
    scheduler.set_timesteps(5)

    def loop(z):
        for t in scheduler.timesteps:
            z = scheduler.step(network(z, t), t, z, return_dict=False)[0]
        return z

    loop(x)
    assert torch.equal(loop(y), run(cls(), y, 5))


def test_begin_index_is_checked(cls):
    scheduler = cls()
    with pytest.raises(UserError, match="set_timesteps"):
        scheduler.set_begin_index(1)
    scheduler.set_timesteps(5)
    with pytest.raises(UserError, match="between 0 and 4"):
        scheduler.set_begin_index(5)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_shapes_are_kept(cls, dtype):
    for shape in ((2, 4, 8, 8), (1, 3, 2, 4, 4), (2, 16, 32)):
        x = torch.randn(shape).to(dtype)
        result = run(cls(), x, 4)
        assert result.dtype == dtype
        assert result.shape == shape


def test_float64_samples_are_computed_in_float64(cls):
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    exact = run(cls(), x, 10)
    error = (run(cls(), x.float(), 10).double() - exact).abs().max()
    assert 1e-9 < error < 1e-3


def test_learned_variance_channels_are_left_out(cls):
    x = torch.randn(2, 3, 4, 4)
    a, b = cls(), cls()
    for s in (a, b):
        s.set_timesteps(3)
    t = a.timesteps[0]
    output = network(x, t)
    with_variance = torch.cat([output, torch.randn_like(output)], 1)
    assert torch.equal(a.step(output, t, x)[0], b.step(with_variance, b.timesteps[0], x)[0])


def test_tuple_and_dict_outputs(cls):
    x = torch.randn(1, 4, 4, 4)
    a, b = cls(), cls()
    for s in (a, b):
        s.set_timesteps(3)
    output = a.step(x, a.timesteps[0], x)
    assert torch.equal(output.prev_sample, b.step(x, b.timesteps[0], x, return_dict=False)[0])


def test_gradients_reach_noise_and_outputs(cls):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    run(cls(), x, 5).sum().backward()
    step = 1e-6
    with torch.no_grad():
        plus, minus = (run(cls(), x + s * step * direction, 5).sum() for s in (1, -1))
    assert (x.grad * direction).sum() == pytest.approx(float((plus - minus) / (2 * step)), rel=1e-5)


def test_a_run_with_gradients_equals_one_without(cls):
    x = torch.randn(1, 2, 4, 4)
    a = run(cls(), x)
    b = run(cls(), x.clone().requires_grad_())
    torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_noise_of_image_i_does_not_depend_on_the_batch():
    x = torch.randn(3, 4, 4, 4)
    scheduler = DDIMScheduler(eta=1.0)

    def generators(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = run(scheduler, x, generator=generators([5, 6, 7]))
    alone = run(scheduler, x[1:2], generator=generators([6]))
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together, run(scheduler, x, generator=generators([8, 9, 10])))


def test_ancestral_noise_has_the_posteriors_variance():
    """With eta = 1 and the ideal network of N(0, 1) data, the marginal stays N(0, 1) at every step."""
    scheduler = DDIMScheduler(eta=1.0, prediction_type="sample", grid="time_uniform")
    scheduler.set_timesteps(8)
    x = torch.randn(200_000, 1)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[:-1]:
        alpha = float(scheduler.schedule.alpha(float(t)))
        # E[x0 | x] is the mean of a posterior; its spread must come from a draw for the marginal to be right.
        x0 = alpha * x + math.sqrt(1 - alpha**2) * torch.randn(x.shape, generator=generator)
        x = scheduler.step(x0, t, x, generator=generator, return_dict=False)[0]
        assert float(x.var()) == pytest.approx(1.0, abs=0.02)


# ---------------------------------------------------------------- noising


def test_add_noise_and_velocity_match_diffusers(cls, sd_betas):
    theirs, ours = diffusers.DDPMScheduler(**sd_betas), cls(**sd_betas)
    x, noise = torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(
        ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), rtol=1e-5, atol=1e-5
    )
    half = ours.add_noise(x.half(), noise.half(), t[:1])
    assert half.dtype == torch.float16
    # Between two training steps the levels lie between theirs.
    alpha = [
        float(ours.add_noise(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([s]))) for s in (5, 5.5, 6)
    ]
    assert alpha[0] > alpha[1] > alpha[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("begin", [None, 2])
def test_step_does_not_synchronise(cls, begin):
    x = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16)
    scheduler = cls()
    scheduler.set_timesteps(8, device="cuda")
    times = scheduler.timesteps
    if begin is not None:
        scheduler.set_begin_index(begin)
        times = times[begin:]
    output = torch.randn_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in times:
            x = scheduler.step(output, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()
