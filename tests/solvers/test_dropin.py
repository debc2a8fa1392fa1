"""Configs from and to every scheduler of diffusers, and what its own tests ask of a scheduler."""

from __future__ import annotations

import copy
import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging

from diffalign.solvers import SOLVERS, sample

# As the published models have them on disk.
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FAMILIES = {
    "sd": SD,
    "sd2-v": {**SD, "prediction_type": "v_prediction"},
    "sdxl": {**SD, "interpolation_type": "linear", "sample_max_value": 1.0, "use_karras_sigmas": False},
    "zero-snr": {
        **SD,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "ddpm": {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True, "variance_type": "fixed_small"},
    "deepfloyd": {
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
        "variance_type": "learned_range",
    },
    "sd3": FLOW,
    "flux": {**FLOW, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}
EDM = "EDMEulerScheduler"
# One needs torchsde, one has no betas, two have the options of Heun but take long to make.
LEFT_OUT = ("DPMSolverSDEScheduler", EDM, "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
DISCRETE = [
    *(e.name for e in KarrasDiffusionSchedulers if e.name not in LEFT_OUT),
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverMultistepInverseScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
]
FLOW_MATCHING = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
#: Options whose meaning both sides share, so they must arrive where both have them.
MEANINGFUL = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "thresholding",
    "sample_max_value",
    "solver_order",
    "final_sigmas_type",
    "clip_sample",
    "set_alpha_to_one",
)
NAMES = list(SOLVERS)


@pytest.fixture(params=NAMES)
def cls(request):
    return SOLVERS[request.param]


@pytest.fixture(autouse=True)
def _quiet():
    """Configs carry options of other classes, and diffusers says so each time."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def network(x, t):
    return torch.tanh(x) * (0.5 + float(t) / 2000) + 0.1 * x.roll(1, 1)


def run(scheduler, x, steps=5, **kwargs):
    return sample(network, x, scheduler, num_inference_steps=steps, **kwargs)


# ---------------------------------------------------------------- configs of diffusers


@pytest.mark.parametrize("theirs", DISCRETE)
def test_every_discrete_scheduler_config_comes_in_and_goes_back(cls, theirs):
    """Two model families for each pair of classes, such that each class meets them all."""
    kind = getattr(diffusers, theirs)
    known = inspect.signature(kind.__init__).parameters
    families = [name for name, options in FAMILIES.items() if "_class_name" not in options]
    turn = [SOLVERS[name] for name in NAMES].index(cls) + DISCRETE.index(theirs)
    for family in (families[turn % 6], families[(turn + 3) % 6]):
        options = FAMILIES[family]
        source = kind.from_config(options)
        ours = cls.from_config(source.config)
        for option in MEANINGFUL:
            if option in known and option in ours.config and option in options:
                assert ours.config[option] == source.config[option], (family, option)
        if family in ("sd", "deepfloyd"):
            assert torch.isfinite(run(ours, torch.randn(1, 3, 4, 4), 3)).all()
        if theirs == "SASolverScheduler":
            continue  # refuses the configs of diffusers' own DPM-Solver too
        back = kind.from_config(ours.config)
        for option in MEANINGFUL:
            if option in known:
                assert back.config[option] == source.config[option], (family, option)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("theirs", FLOW_MATCHING)
def test_every_flow_scheduler_config_comes_in_and_goes_back(cls, theirs, family):
    kind = getattr(diffusers, theirs)
    options = FAMILIES[family]
    if "FlowMatch" not in theirs:
        options = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    source = kind.from_config(options)
    ours = cls.from_config(source.config)
    assert ours.schedule.is_flow
    assert ours.schedule.shift == 3.0
    ours.set_timesteps(4)
    np.testing.assert_allclose(ours.sigmas, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    assert torch.isfinite(run(ours, torch.randn(1, 3, 4, 4))).all()
    back = kind.from_config(ours.config)
    for option in ("shift", "flow_shift", "use_dynamic_shifting", "base_shift", "max_shift"):
        if option in source.config:
            assert back.config[option] == source.config[option], option


@pytest.mark.parametrize("theirs", [*DISCRETE, *FLOW_MATCHING])
def test_our_own_configs_are_accepted_by_every_scheduler(cls, theirs):
    options = {"prediction_type": "v_prediction", "grid": "karras", "beta_end": 0.015}
    other = getattr(diffusers, theirs).from_config(cls(**options).config)
    for option in ("beta_end", "prediction_type"):
        if option in inspect.signature(type(other).__init__).parameters:
            assert other.config[option] == options[option]
    if theirs.startswith("FlowMatch"):
        return  # its config is that of a flow model
    # Our own options survive the detour.
    again = cls.from_config(other.config)
    assert {name: again.config[name] for name in options} == options


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_our_schedulers_take_each_others_configs(first, second):
    options = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "grid": "karras"}
    source = SOLVERS[first](**options)
    other = SOLVERS[second].from_config(source.config)
    assert {name: other.config[name] for name in options} == options
    assert other.schedule == source.schedule
    assert torch.isfinite(run(other, torch.randn(1, 3, 4, 4))).all()
    back = SOLVERS[first].from_config(other.config)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(run(back, x), run(source, x))


# ---------------------------------------------------------------- what diffusers tests of its own schedulers


def test_compatible_classes_keep_what_was_chosen(cls):
    """As in diffusers, but what the other class had as default comes back too: it is what that model used."""
    chosen = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule", "timestep_spacing")}
    scheduler = cls(**chosen)
    compatibles = [c for c in scheduler.compatibles if not hasattr(c, "_backends")]
    assert len(compatibles) >= 10
    for other in compatibles:
        if other.__name__.startswith(("FlowMatch", "EDM", "KDPM2")):
            continue  # two kinds have configs of another kind of model, the last takes long to make
        again = cls.from_config(other.from_config(scheduler.config).config)
        assert {name: again.config[name] for name in chosen} == chosen
        assert again.schedule == scheduler.schedule


def test_every_option_is_in_the_signature_and_json_able(cls, tmp_path):
    parameters = inspect.signature(cls.__init__).parameters
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    scheduler = cls(trained_betas=np.array([0.1, 0.3, 0.5]))
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    np.testing.assert_allclose(scheduler.betas, [0.1, 0.3, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(again.betas, scheduler.betas)
    for name in parameters.keys() - {"self", "trained_betas"}:
        assert again.config[name] == scheduler.config[name], name


def test_betas_are_those_of_diffusers(cls):
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        theirs = diffusers.DDIMScheduler(beta_schedule=name)
        np.testing.assert_allclose(cls(beta_schedule=name).betas, theirs.betas, rtol=1e-4, atol=1e-8)


def test_attributes_that_are_not_there_are_said_so(cls):
    scheduler = cls()
    scheduler.register_to_config(an_option=5)
    with pytest.warns(FutureWarning, match="an_option"):
        assert scheduler.an_option == 5
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = scheduler.does_not_exist


def test_signatures_that_pipelines_look_at(cls):
    """``retrieve_timesteps`` and ``prepare_extra_step_kwargs`` read names from the signatures."""
    assert {"timesteps", "sigmas", "mu", "device"} <= set(inspect.signature(cls.set_timesteps).parameters)
    assert {"generator", "return_dict"} <= set(inspect.signature(cls.step).parameters)
    assert cls.order == 1


def test_steps_by_index_by_value_and_by_slice(cls):
    x = torch.randn(2, 3, 4, 4)
    results = []
    for form in (lambda t: t, float, lambda t: t.clone(), lambda t: t.reshape(1)):
        scheduler = cls()
        scheduler.set_timesteps(6)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(network(y, t), form(t), y, return_dict=False)[0]
        results.append(y)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_set_timesteps_again_forgets_everything(cls):
    x = torch.randn(1, 3, 4, 4)
    used = cls()
    for steps in (3, 11, 1, 7):
        used.set_timesteps(steps)
        if steps == 11:
            used.set_begin_index(4)
        if steps == 7:
            for t in used.timesteps[:3]:
                used.step(x, t, x)
        assert used.num_inference_steps == len(used.timesteps) == steps
    assert torch.equal(run(used, x, 5), run(cls(), x, 5))
    assert used.begin_index is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_default_dtype_of_torch_does_not_matter(cls, dtype):
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    expected = run(cls(), x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = run(cls(), x)
    finally:
        torch.set_default_dtype(before)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_host_never_reads_a_tensor_during_a_run(cls, monkeypatch):
    """What would be a synchronisation on a device: reading a value, or moving one to the host."""
    scheduler = cls()
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4, 4)
    outputs = [torch.randn(2, 3, 4, 4) for _ in range(6)]

    def forbidden(self, *args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for t, output in zip(scheduler.timesteps.unbind(), outputs, strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
    monkeypatch.undo()
    assert torch.isfinite(x).all()


def noisy_variants():
    """(name, options) of every configuration that draws noise."""
    yield "ddim", {"eta": 1.0}
    for name in ("dpm-solver", "dpm-solver++"):
        for order, method in ((1, "multistep"), (2, "multistep"), (2, "singlestep")):
            yield (
                name,
                {
                    "algorithm_type": "sde-dpmsolver++",
                    "solver_order": order,
                    "solver_method": method,
                },
            )


@pytest.mark.parametrize(("name", "options"), list(noisy_variants()))
def test_noise_belongs_to_the_image(name, options):
    scheduler = SOLVERS[name](**options)
    x = torch.randn(3, 3, 4, 4)

    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = run(scheduler, x, generator=generators(5, 6, 7))
    alone = torch.cat([run(scheduler, x[i : i + 1], generator=generators(5 + i)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(together, run(copy.deepcopy(scheduler), x, generator=generators(5, 6, 7)))
    assert not torch.equal(together[0], run(scheduler, x, generator=generators(6, 6, 7))[0])
    # One generator for the batch, and noise from outside.
    one = [run(scheduler, x, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*one)


@pytest.mark.parametrize(("name", "options"), list(noisy_variants()))
def test_noise_can_be_passed_in(name, options):
    scheduler = SOLVERS[name](**options)
    x = torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    a = scheduler.step(x, t, x, variance_noise=torch.zeros_like(x), return_dict=False)[0]
    scheduler.set_timesteps(4)
    b = scheduler.step(x, scheduler.timesteps[0], x, variance_noise=torch.ones_like(x), return_dict=False)[0]
    spread = (b - a).flatten()
    torch.testing.assert_close(spread, spread[0].expand_as(spread), rtol=1e-4, atol=1e-5)
    assert spread[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_depend_on_the_batch(name):
    x = torch.randn(5, 3, 4, 4)
    together = run(SOLVERS[name](), x)
    alone = torch.cat([run(SOLVERS[name](), x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_deep_copies_in_turn(cls):
    """Two requests through one pipeline, each with its own copy of the scheduler."""
    x = torch.randn(2, 1, 3, 4, 4)
    original = cls()
    copies = [copy.deepcopy(original) for _ in range(2)]
    for scheduler, steps in zip(copies, (6, 4), strict=True):
        scheduler.set_timesteps(steps)
    state = list(x)
    for i in range(6):
        for k, scheduler in enumerate(copies):
            if i < len(scheduler.timesteps):
                t = scheduler.timesteps[i]
                state[k] = scheduler.step(network(state[k], t), t, state[k], return_dict=False)[0]
    for k, steps in enumerate((6, 4)):
        assert torch.equal(state[k], run(cls(), x[k], steps))
