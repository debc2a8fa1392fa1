"""Time shift around diffusers' schedulers: against this package's own, and against loops written out."""

from __future__ import annotations

import copy
import inspect
import json

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from diffalign.bench.step import count_syncs
from diffalign.errors import UserError
from diffalign.solvers import GaussianMixture, NoiseSchedule, ShiftedScheduler, TimeShiftScheduler
from diffalign.solvers.mixture import relative_error
from diffalign.solvers.shifted import SCHEDULERS
from diffalign.solvers.unipc import UniPCScheduler
from tests.align.families import build

SHIFT = {"data_variance": 0.33, "window": 40}
SEVERAL = [name for name, one_step in SCHEDULERS.items() if not one_step]


@pytest.fixture(scope="module")
def mixture():
    return GaussianMixture.random((3, 16, 16), spread=0.49, seed=3)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def faulty(mixture, schedule, kind="epsilon"):
    """A network whose outputs are 2 % too large."""
    network = mixture.model(schedule, prediction_type=kind)
    return lambda x, t: 1.02 * network(x, float(t))


def run(scheduler, network, x, steps=10, told=None, sigmas=None, **kwargs):
    """The result and the times that the network was told; `told` replaces them."""
    scheduler.set_timesteps(steps) if sigmas is None else scheduler.set_timesteps(sigmas=sigmas)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    seen = []
    for e, t in enumerate(scheduler.timesteps):
        seen.append(float(t) if told is None else told[e])
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(shown, seen[-1]), t, x, return_dict=False, **kwargs)[0]
    return x, seen


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("theirs", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_ddim_and_euler_agree_with_this_packages_ddim(mixture, noise, theirs, kind):
    """Euler's method in sigma is DDIM's: the variance that counts is that of what the network is shown."""
    options = {"prediction_type": kind, "timestep_spacing": "leading", "steps_offset": 1}
    if theirs == "DDIMScheduler":
        options["clip_sample"] = False
    network = faulty(mixture, NoiseSchedule.from_config({}), kind)
    result, seen = run(ShiftedScheduler(theirs, **SHIFT, **options), network, noise)
    options.pop("clip_sample", None)
    ours = TimeShiftScheduler(**SHIFT, **options, grid="diffusers")
    expected, times = run(ours, network, noise)
    assert seen == times
    nominal = [901.0 - 100 * e for e in range(10)]
    assert sum(a != b for a, b in zip(seen, nominal, strict=True)) >= 4
    assert relative_error(result, expected) < 1e-5  # their tables are float32


def test_flow_euler_agrees_with_this_packages_ddim(mixture, noise):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler = ShiftedScheduler.around(theirs, data_variance=1.0, window=40, cutoff=300)
    network = faulty(mixture, scheduler.schedule, "flow_prediction")
    sigmas = [1 - e / 10 for e in range(10)]
    result, seen = run(scheduler, network, noise, sigmas=sigmas)
    ours = TimeShiftScheduler.from_config(theirs.config, data_variance=1.0, window=40, cutoff=300)
    expected, times = run(ours, network, noise, sigmas=sigmas)
    assert seen == pytest.approx(times, abs=1e-3)
    assert sum(a != b for a, b in zip(seen, scheduler.base.timesteps.tolist(), strict=True)) >= 2
    assert relative_error(result, expected) < 1e-5


def test_ddpm_reads_x0_at_the_told_time_and_keeps_its_own_levels(mixture, noise):
    scheduler = ShiftedScheduler("DDPMScheduler", **SHIFT, clip_sample=False, variance_type="fixed_small")
    network = faulty(mixture, scheduler.schedule)
    torch.manual_seed(0)
    result, seen = run(scheduler, network, noise)
    # diffusers draws its noise in the type of the prediction.
    torch.manual_seed(0)
    x, nominal = noise, [900 - 100 * e for e in range(10)]
    abar = scheduler.alphas_cumprod.double()
    for t, told in zip(nominal, seen, strict=True):
        eps = network(x, told)
        a = abar[int(told)]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        a, end = abar[t], abar[t - 100] if t >= 100 else torch.ones((), dtype=torch.float64)
        at_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        beta = 1 - a / end
        x = end.sqrt() * beta / (1 - a) * x0 + (a / end).sqrt() * (1 - end) / (1 - a) * at_t
        if t:
            x = x + ((1 - end) / (1 - a) * beta).sqrt() * torch.randn_like(x)
    assert seen != nominal
    assert relative_error(result, x) < 1e-5


@pytest.mark.parametrize("theirs", SEVERAL)
def test_schedulers_with_a_memory_keep_their_coefficients(mixture, noise, theirs):
    """The same samples come from the scheduler itself with a network that is told other times."""
    flow = "Flow" in theirs
    options = {} if flow else {"beta_schedule": "scaled_linear"}
    shifted = ShiftedScheduler(theirs, **(SHIFT | {"cutoff": 500}), **options)
    network = faulty(mixture, shifted.schedule, "flow_prediction" if flow else "epsilon")
    noisy = "Ancestral" in theirs or theirs == "SASolverScheduler"
    random = {"generator": torch.Generator().manual_seed(0)} if noisy else {}
    result, told = run(shifted, network, noise, 12, **random)
    if noisy:
        random["generator"].manual_seed(0)
    plain = getattr(diffusers, theirs)(**options)
    expected, _ = run(plain, network, noise, 12, told, **random)
    assert torch.equal(result, expected)
    nominal = plain.timesteps.tolist()
    assert sum(a != b for a, b in zip(told, nominal, strict=True)) >= 3
    assert all(a == b for a, b in zip(told, nominal, strict=True) if b <= 500)
    assert max(abs(a - b) for a, b in zip(told, nominal, strict=True)) <= 20


def test_learned_variances_pass_through(mixture, noise):
    """The second half of the output is a variance, which no time shift touches."""
    scheduler = ShiftedScheduler("DDPMScheduler", **SHIFT, variance_type="learned_range", clip_sample=False)
    network = faulty(mixture, scheduler.schedule)
    seen = []

    def both(x, t):
        return torch.cat([network(x, t), torch.full_like(x, 0.25)], 1)

    step = scheduler.base.step
    scheduler.base.step = lambda output, *args, **kwargs: (
        seen.append(output[:, 3:].unique().item()) or step(output, *args, **kwargs)
    )
    out, _ = run(scheduler, both, noise)
    assert seen == [0.25] * 10
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("options", "words"), [({}, "needs data_variance"), ({"data_variance": 1.1}, "nearly that variance")]
)
def test_without_information_it_warns_and_runs_unshifted(noise, options, words, caplog):
    logger = diffusers.utils.logging.get_logger("diffalign.solvers.time_shift")
    logger.addHandler(caplog.handler)
    try:
        scheduler = ShiftedScheduler("DPMSolverMultistepScheduler", **options)
    finally:
        logger.removeHandler(caplog.handler)
    assert words in caplog.text
    result, _ = run(scheduler, lambda x, t: 0.9 * x.tanh(), noise)
    expected, _ = run(diffusers.DPMSolverMultistepScheduler(), lambda x, t: 0.9 * x.tanh(), noise)
    assert torch.equal(result, expected)


# ---------------------------------------------------------------- as a scheduler


def test_it_adds_no_read_of_the_device(noise):
    x = noise.float()

    def loop(scheduler):
        def ready():
            scheduler.set_timesteps(10)
            first = scheduler.timesteps[0]
            made = scheduler.step(x, first, x, return_dict=False)[0]  # where a scheduler looks for its index

            def steps():
                y = made
                for t in scheduler.timesteps[1:]:
                    y = scheduler.step(x, t, y, return_dict=False)[0]
                    yield

            return steps()

        return count_syncs(ready, torch.device("cpu"))

    theirs = diffusers.UniPCMultistepScheduler()
    shifted = ShiftedScheduler.around(theirs, **SHIFT)
    assert loop(shifted) == loop(theirs)
    assert not torch.equal(shifted.timesteps, shifted.base.timesteps)


def test_a_second_run_and_a_copy_start_from_the_nominal_times(mixture, noise):
    scheduler = ShiftedScheduler("DPMSolverMultistepScheduler", **SHIFT)
    network = faulty(mixture, scheduler.schedule)
    first, seen = run(scheduler, network, noise)
    assert scheduler.timesteps.tolist() == seen
    copied = copy.deepcopy(scheduler)
    assert torch.equal(run(scheduler, network, noise)[0], first)
    assert torch.equal(run(copied, network, noise)[0], first)


def test_pipelines_see_the_parameters_of_the_scheduler_underneath():
    scheduler = ShiftedScheduler("DDIMScheduler", **SHIFT)
    assert {"eta", "generator"} <= set(inspect.signature(scheduler.step).parameters)
    assert "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters
    assert scheduler.order == 1
    assert not hasattr(scheduler, "set_begin_index")
    assert hasattr(ShiftedScheduler("UniPCMultistepScheduler", **SHIFT), "set_begin_index")


@pytest.mark.parametrize("theirs", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_it_is_saved_with_a_pipeline_and_loaded(tmp_path, theirs):
    pipe = build("sd")
    base = getattr(diffusers, theirs).from_config(pipe.scheduler.config, steps_offset=1)
    pipe.scheduler = ShiftedScheduler.around(base, **SHIFT)
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe):
        generator = torch.Generator().manual_seed(1)
        out = pipe("a cat", num_inference_steps=8, generator=generator, output_type="np").images
        return out, pipe.scheduler.timesteps.tolist()

    images, seen = draw(pipe)
    assert seen != pipe.scheduler.base.timesteps.tolist()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffalign.solvers.shifted",
        "ShiftedScheduler",
    ]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert dict(loaded.scheduler.base.config) == dict(pipe.scheduler.base.config)
    again, times = draw(loaded)
    assert times == seen
    assert (again == images).all()


def test_image_to_image_starts_unshifted():
    pipe = build("sd")
    scheduler = ShiftedScheduler(
        "DPMSolverMultistepScheduler", **SHIFT, beta_schedule="scaled_linear", steps_offset=1
    )
    pipe = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe(
        "a cat",
        image=torch.rand(1, 3, 32, 32),
        strength=0.75,
        num_inference_steps=8,
        callback_on_step_end=lambda _, e, t, tensors: seen.append(float(t)) or tensors,
    )
    nominal = scheduler.base.timesteps.tolist()[2:]
    assert len(seen) == len(nominal)
    assert seen[0] == nominal[0]
    assert seen[1:] != nominal[1:]


def test_configs_lead_there_and_back():
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=3, beta_end=0.015)
    shifted = ShiftedScheduler.around(theirs, **SHIFT)
    assert type(shifted.base) is diffusers.DPMSolverMultistepScheduler
    assert shifted.base.config.solver_order == 3
    again = ShiftedScheduler.from_config(shifted.config, window=10)
    assert (again.config.window, again.base.config.beta_end) == (10, 0.015)
    other = ShiftedScheduler.from_config(shifted.config, scheduler="UniPCMultistepScheduler")
    assert type(other.base) is diffusers.UniPCMultistepScheduler
    assert (other.config.window, other.base.config.solver_order) == (40, 3)
    also = ShiftedScheduler.from_config(theirs.config, scheduler="EulerDiscreteScheduler", **SHIFT)
    assert also.base.config.beta_end == 0.015
    back = diffusers.DPMSolverMultistepScheduler.from_config(shifted.config)
    assert back.config.beta_end == 0.015


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler": "EDMEulerScheduler"}, "unknown scheduler"),
        ({"scheduler": "DPMSolverMultistep"}, "did you mean 'DPMSolverMultistepScheduler'"),
        ({"window": -1}, "window must be 0 or more"),
        ({"cutoff": float("inf")}, "cutoff must be a finite number"),
        ({"data_variance": -0.1}, "data_variance must be 0 or more"),
        ({"etta": 1.0}, "unknown option of DDIMScheduler"),
        ({"scheduler": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "must be 'discrete'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ShiftedScheduler(**options)


def test_what_it_cannot_wrap_has_a_way_out():
    with pytest.raises(UserError, match="use TimeShiftScheduler"):
        ShiftedScheduler.around(UniPCScheduler())
    with pytest.raises(UserError, match="unknown scheduler 'EDMEulerScheduler'"):
        ShiftedScheduler.around(diffusers.EDMEulerScheduler())
    with pytest.raises(UserError, match=r"ShiftedScheduler\.around"):
        ShiftedScheduler.from_config(diffusers.DDIMScheduler().config)
    with pytest.raises(UserError, match="from_pretrained takes a folder"):
        ShiftedScheduler.from_config("folder")
