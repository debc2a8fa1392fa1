"""The reward head on noisy latents: what it stands on, what it learns, how it is kept and used."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffalign.data import open_scored
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.pipelines.flow_nrg import flow_nrg
from diffalign.pipelines.guidance import guidance_for
from diffalign.pipelines.latent_reward import LatentReward, first_blocks, load, noisy_score
from diffalign.trainers.latent_reward import LatentRewardConfig, LatentRewardTrainer, order_accuracy
from tests.align import families


@pytest.fixture(scope="session")
def bright_images(tmp_path_factory):
    """Four images of each of eight prompts; the score is their brightness."""
    folder = tmp_path_factory.mktemp("bright")
    rows = []
    for i in range(32):
        level, noise = 30 + 60 * (i % 4), np.random.default_rng(i).integers(-20, 21, (8, 8, 3))
        Image.fromarray((level + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"prompt": f"a red star {i // 4}", "image": f"{i}.png", "score": 10 + level / 10})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(tmp_path, model_folder, bright_images, shared_cache):
    def make(name="run", model=model_folder, **options):
        settings = {
            "output_dir": str(tmp_path / name),
            "cache_dir": str(shared_cache),
            "train_batch_size": 8,
            "max_train_steps": 2,
            "width": 16,
            "layers": 1,
            "validation_share": 0.25,
            "checkpointing_steps": 0,
            "progress": False,
        }
        config = LatentRewardConfig(**(settings | options))
        return LatentRewardTrainer(config, model=model, dataset=bright_images)

    return make


def test_it_learns_the_score_and_guides_by_its_folder(train, log, model_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.vae.register_to_config(scaling_factor=20.0)  # its latents of dark and bright are nearly the same
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    run = train(
        model=pipe,
        cache_dir=str(tmp_path / "cache"),
        max_train_steps=60,
        learning_rate=1e-2,
        timesteps=[1, 20],
        evaluation_timesteps=[20, 999],
    )
    result = run.train()
    losses = [record["loss"] for record in log(run.folder)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert result.metrics["validation/rank_correlation_t20"] > 0.7
    assert result.metrics["validation/accuracy_t20"] > 0.8
    assert {"validation/rank_correlation_t999", "rewards/correlation"} <= result.metrics.keys()
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, before[name])  # the generator has not moved
    assert "noisy_score=" in (run.folder / "README.md").read_text()

    score = noisy_score(run.folder, pipe)
    pixels = torch.stack([torch.full((3, 8, 8), level) for level in (-0.9, 0.9)])
    latents = load_adapter(pipe).encode_images(pixels)["latents"].requires_grad_()
    dark, light = score(latents, torch.full((2,), 1.0), ["a red star 1"] * 2)
    assert light > dark + 3  # in the units of the scores, 13 to 31
    assert 5 < dark < light < 40
    (gradient,) = torch.autograd.grad(dark, latents)
    assert gradient[0].norm() > 0 == gradient[1].norm()

    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "progress": False, "output_type": "pt"}
    pulled = flow_nrg(pipe, "a red star", noisy_score=run.folder, weight=30.0, **options)
    by_function = flow_nrg(pipe, "a red star", noisy_score=score, weight=30.0, **options)
    assert torch.equal(pulled.images, by_function.images)
    assert not torch.equal(
        pulled.images, flow_nrg(pipe, "a red star", noisy_score=score, weight=0.0, **options).images
    )


def test_a_stopped_run_goes_on_to_the_same_bits(train):
    constant = {"lr_scheduler": "constant"}  # a cosine depends on where it ends
    whole = train("whole", max_train_steps=4, **constant)
    whole.train()
    train("half", max_train_steps=2, checkpointing_steps=2, **constant).train()
    rest = train("half", max_train_steps=4, resume_from_checkpoint="latest", **constant)
    rest.train()
    for name, value in whole.head.state_dict().items():
        assert torch.equal(rest.head.state_dict()[name], value), name
    again = train("again", max_train_steps=1, learning_rate=0.0, init_head=str(whole.folder))
    again.train()
    assert torch.equal(again.head.out.weight, whole.head.out.weight)


def test_scores_are_learnt_in_standard_units(train):
    run = train(max_train_steps=1)
    run.train()
    assert run.rewards.mean() == pytest.approx(0, abs=1e-5)
    assert run.rewards.std(correction=0) == pytest.approx(1, abs=1e-5)
    raw = dict(zip(run.examples.ids, run.examples.scores, strict=True))
    wanted = [raw[row] for row in run.data.ids]
    torch.testing.assert_close(run.head.mean + run.head.std * run.rewards, torch.tensor(wanted))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_first_blocks_of_every_family_see_latent_time_and_prompt(family):
    adapter = load_adapter(families.build(family))
    adapter.module.requires_grad_(False)
    shape, ran = adapter.latent_shape(), []
    adapter.module.register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def features(x, t, prompts):
        return first_blocks(adapter, x, torch.tensor(t), guidance_for(adapter, prompts, 1.0).cond)

    found = features(x, [100.0, 100.0], ["a", "b"])
    assert found.ndim == 3
    assert len(found) == 2
    (gradient,) = torch.autograd.grad(found[0].square().sum(), x)
    assert gradient[0].norm() > 0 == gradient[1].norm()
    assert not torch.allclose(features(x, [100.0, 100.0], ["b", "b"])[0], found[0])
    assert not torch.allclose(features(x, [500.0, 100.0], ["a", "b"])[0], found[0])
    assert not ran  # it ends at the block
    head = LatentReward(found.shape[-1], guidance_for(adapter, ["a"], 1.0).cond["prompt_embeds"].shape[-1])
    score = noisy_score(head, adapter.pipeline)
    alone = score(x[1:], torch.tensor([100.0]), ["b"])
    torch.testing.assert_close(
        score(x, torch.tensor([100.0, 100.0]), ["a", "b"])[1:], alone, rtol=1e-4, atol=1e-5
    )


def test_order_accuracy_compares_within_prompts():
    prompts = ["a", "a", "b", "b", "b"]
    scores = np.array([1.0, 2.0, 0.0, 5.0, 5.0])
    assert order_accuracy(scores, scores, prompts) == 1.0
    assert order_accuracy(-scores, scores, prompts) == 0.0
    assert order_accuracy(np.array([9.0, 9.0, 0.0, 1.0, -1.0]), scores, prompts) == pytest.approx(1.5 / 3)
    assert order_accuracy(scores, scores, list("vwxyz")) is None


def test_what_cannot_work_is_refused(train, tmp_path, bright_images):
    with pytest.raises(UserError, match=r"there is no latent reward at .*train latent-reward"):
        load(tmp_path)
    head, pipe, videos = LatentReward(7, 32, width=8), families.build("sd"), families.build("wan")
    score, x = noisy_score(head, pipe), torch.zeros(1, *load_adapter(pipe).latent_shape())
    with pytest.raises(UserError, match="for models whose channels is 7, not"):
        score(x, torch.ones(1), ["a"])
    with pytest.raises(UserError, match="makes videos"):
        noisy_score(head, videos)
    for options, match in (
        ({"width": 6}, "width must be a multiple of 4"),
        ({"rank": 4}, "all weights of the head"),
        ({"evaluation_timesteps": []}, "evaluation_timesteps"),
    ):
        with pytest.raises(UserError, match=match):
            train(**options)
    images = open_scored(bright_images)
    same = images.select([0, 4, 8, 12, 16, 20, 24, 28])
    config = LatentRewardConfig(
        output_dir=str(tmp_path / "same"), validation_share=0.0, validation_steps=0, progress=False
    )
    run = LatentRewardTrainer(config, model=train()._model, dataset=same)
    with pytest.raises(UserError, match="the same score"):
        run.train()
