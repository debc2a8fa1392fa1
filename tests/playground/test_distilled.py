"""The models taught by the playground's Stable Diffusion: their arithmetic, and that they are built."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.playground import few_step, flow, load
from diffalign.playground.build import BuildConfig, load_teacher, run
from diffalign.solvers.noise import NoiseSchedule

VP = NoiseSchedule.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def unet(function):
    """A network in name only: ``function(x, t)``."""
    return lambda x, t, condition: SimpleNamespace(sample=function(x, t.expand(len(x))))


def sigma_of(t):
    return torch.from_numpy(VP.sigma(t.numpy()))[:, None, None, None]


def test_the_velocity_of_gaussian_data_is_exact():
    """For x0 and z standard normal, eps(x, t) = sigma x and E[z - x0 | x] = (2 s - 1) x / (s^2 + (1-s)^2)."""
    generator = torch.Generator().manual_seed(0)
    s = torch.linspace(0.04, 0.93, 12)
    x = torch.randn(12, 2, 4, 4, generator=generator)
    v = flow.velocity(unet(lambda x, t: sigma_of(t) * x), VP, x, s, torch.empty(12, 1, 1))
    factor = (2 * s - 1) / (s**2 + (1 - s) ** 2)
    torch.testing.assert_close(v, (factor[:, None, None, None] * x).to(v), atol=2e-5, rtol=1e-5)


def test_guidance_weighs_the_empty_caption():
    seen = []

    def network(x, t, condition):
        seen.append(condition.clone())
        return SimpleNamespace(sample=condition.mean((1, 2))[:, None, None, None].expand_as(x))

    eps = few_step.guided(network, torch.zeros(1, 3, 2), torch.ones(5, 3, 2))
    out = eps(torch.zeros(5, 4, 2, 2), torch.tensor(3.0))
    torch.testing.assert_close(out, torch.full((5, 4, 2, 2), few_step.GUIDANCE))
    assert seen[0][:5].eq(0).all()
    assert seen[0][5:].eq(1).all()


def test_the_chain_predicts_and_noises_again():
    """A student that always sees the clean image 3 arrives at alpha 3 + sigma z, whatever it starts from."""
    student = few_step.Student(None, VP)

    def sees_three(x, t):  # v = (alpha x - x0) / sigma
        alpha = torch.from_numpy(VP.alpha(t.numpy()))[:, None, None, None]
        return ((alpha * x - 3.0) / sigma_of(t)).float()

    student.unet = unet(sees_three)
    place = torch.arange(4)
    noise = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    condition = torch.empty(4, 1, 1)
    x = student.arrive(noise, place, condition, torch.Generator().manual_seed(2))
    assert torch.equal(x[0], noise[0])
    for i in (1, 2, 3):
        assert x[i].mean().item() == pytest.approx(3 * VP.alpha(few_step.TIMES[i]), abs=0.03)
        assert x[i].std().item() == pytest.approx(VP.sigma(few_step.TIMES[i]), abs=0.03)
    torch.testing.assert_close(student.clean(x, place, condition), torch.full_like(x, 3.0), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def teacher():
    return load()


def test_trajectories_are_kept_and_are_the_teachers(teacher, tmp_path):
    from diffalign.playground.sd import tokenize

    with torch.no_grad():
        ids = tokenize(teacher.tokenizer, ["", "a red star", "two blue rings", "a black heart"])
        empty, conditions = teacher.text_encoder(ids).last_hidden_state.split([1, 3])
    states, ends = few_step.trajectories(tmp_path, teacher, conditions, empty, seed=0, batch_size=2)
    assert states.shape == (3, 4, 4, 16, 16)
    assert ends.shape == (3, 4, 16, 16)
    # The probability flow brings states nearer to their ends from time to time.
    distance = (states.float() - ends[:, None].float()).square().mean((2, 3, 4))
    assert (distance.diff(dim=1) < 0).all()
    broken = SimpleNamespace(scheduler=teacher.scheduler, unet=SimpleNamespace(config=teacher.unet.config))
    again, _ = few_step.trajectories(tmp_path, broken, conditions, empty, seed=0, batch_size=2)
    assert torch.equal(again, states)


@pytest.mark.parametrize(
    ("what", "options"), [("flow", {"steps": 2}), ("few-step", {"steps": 2, "matching_steps": 2})]
)
def test_they_are_built_resumed_and_load_as_pipelines(what, options, tmp_path):
    config = BuildConfig(what, output_dir=str(tmp_path), images=6, eval_prompts=2, **options)
    run(config)
    weights = tmp_path / what / "unet/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    run(BuildConfig(**{**vars(config), "resume": True}))
    assert weights.read_bytes() == before
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / what)
    image = pipe("a red star", num_inference_steps=2, guidance_scale=1.0, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    text = (tmp_path / what / "README.md").read_text()
    assert f"playground build {what} --seed 0 --images 6 --steps 2 --teacher playground/sd" in text
    assert json.loads((tmp_path / what / "facts.json").read_text())["parameters"] > 3e6
    adapter = load_adapter(tmp_path / what)
    expected = {"flow": ("flow", "flow_prediction"), "few-step": ("discrete", "v_prediction")}[what]
    assert (adapter.schedule.kind, adapter.prediction_type) == expected


def test_a_teacher_must_predict_epsilon(tmp_path):
    with pytest.raises(UserError, match="no playground model"):
        load_teacher("playground/none")
    pipe = load()
    pipe.scheduler = flow.make_scheduler()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="flow_prediction prediction"):
        run(BuildConfig("flow", output_dir=str(tmp_path / "out"), teacher=str(tmp_path)))
    with pytest.raises(UserError, match="matching_steps must be positive"):
        run(BuildConfig("few-step", output_dir=str(tmp_path / "out"), matching_steps=0))
