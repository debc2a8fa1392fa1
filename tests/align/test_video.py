"""Video models: clips from files to latents, one network call like the pipeline's, and Flow-DPO on them."""

import io
import json
import math

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from diffalign.data import PairDataset, images
from diffalign.data.transforms import View, fit
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.trainers import FlowDPOConfig, FlowDPOTrainer, FlowRWRConfig, FlowRWRTrainer
from tests.align.families import build, wan

# -------------------------------------------------------------------- the family


@pytest.mark.parametrize("expand_timesteps", [False, True])
def test_the_adapter_asks_the_network_what_the_pipeline_asks(expand_timesteps):
    pipe = build("wan", expand_timesteps=expand_timesteps)
    adapter, seen = load_adapter(pipe), {}

    def spy(module, args, kwargs, out):
        seen.setdefault("call", (kwargs, out[0]))

    handle = pipe.transformer.register_forward_hook(spy, with_kwargs=True)
    pipe(
        "a red star",
        height=16,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.manual_seed(0),
    )
    handle.remove()
    kwargs, out = seen["call"]
    x, t = kwargs["hidden_states"], kwargs["timestep"].float().reshape(-1)[:1]
    assert x.shape == (1, 4, 3, 8, 16)
    assert kwargs["timestep"].ndim == 1 + expand_timesteps
    with torch.no_grad():
        ours = adapter.denoise(x, t, adapter.encode_prompts(["a red star"]))
    torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-5)


def test_latents_are_in_the_denoisers_units():
    adapter = load_adapter(build("wan"))
    clip = torch.rand(2, 3, 5, 8, 12, generator=torch.manual_seed(0)) * 2 - 1
    latents = adapter.encode_images(clip)["latents"]
    assert latents.shape == (2, 4, 3, 4, 6)
    vae = adapter.pipeline.vae
    mean = vae.encode(clip).latent_dist.mode()
    torch.testing.assert_close(latents[:, 2], (mean[:, 2] - 0.3) / 2.0)
    torch.testing.assert_close(adapter.decode(latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_what_the_network_sees_has_the_networks_precision():
    adapter = load_adapter(build("wan"))
    adapter.module.patch_embedding.to(torch.bfloat16)  # as loaded in bfloat16: the tables stay float32
    assert next(adapter.module.parameters()).dtype == torch.float32
    assert adapter.dtype == torch.bfloat16


def test_a_model_of_two_stages_is_refused():
    two = wan()
    two.register_modules(transformer_2=two.transformer)
    with pytest.raises(UserError, match="hands over from one transformer to another"):
        load_adapter(two)


# -------------------------------------------------------------------- clips


def clip(seed, frames=5, size=(24, 16)):
    """An animation without loss, and its frames."""
    generator = np.random.default_rng(seed)
    drawn = [
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for _ in range(frames)
    ]
    file = io.BytesIO()
    drawn[0].save(file, "WEBP", save_all=True, append_images=drawn[1:], lossless=True)
    return file.getvalue(), drawn


@pytest.fixture(scope="module")
def pairs():
    count = 6
    sides = ([clip(start + i)[0] for i in range(count)] for start in (0, 100))
    return PairDataset.from_lists([f"clip {i % 3}" for i in range(count)], *sides)


@pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_frames_come_back_exactly(format, options):
    _, drawn = clip(0)
    file = io.BytesIO()
    drawn[0].save(file, format, save_all=True, append_images=drawn[1:], **options)
    frames = images.decode_clip(file.getvalue(), 4)
    assert len(frames) == 4
    assert all(np.array_equal(a, b) for a, b in zip(frames, drawn, strict=False))
    assert np.array_equal(images.decode(file.getvalue()), drawn[0])
    with pytest.raises(images.BadImage, match="too few frames"):
        images.decode_clip(file.getvalue(), 6)
    with pytest.raises(images.BadImage, match="unreadable image"):
        images.decode_clip(file.getvalue()[:-200], 5)


def test_pairs_as_clips(pairs):
    clips = pairs.as_clips(5)
    pair = clips[0]
    first, second = pair.images
    assert np.array_equal(first[4], clip(0)[1][4])
    assert np.array_equal(second[2], clip(100)[1][2])
    assert pair.chosen is first[0]
    assert pair.swapped().images == (second, first)
    assert clips.select([1, 2]).frames == 5
    assert pairs[0].images == (pairs[0].chosen, pairs[0].rejected)
    too_long = pairs.as_clips(6)
    assert too_long.read(0).reason == "too few frames"
    assert not pairs.skipped  # as images they are good


def test_every_frame_is_cropped_and_mirrored_alike():
    _, drawn = clip(3, size=(24, 16))
    view = View(0.5, 1.0, flip=True)
    whole = fit(tuple(drawn), (8, 8), view)
    assert whole.pixels.shape == (3, 5, 8, 8)
    for number, frame in enumerate(drawn):
        assert torch.equal(whole.pixels[:, number], fit(frame, (8, 8), view).pixels)
    assert whole.original_size == (16, 24)


# -------------------------------------------------------------------- training


@pytest.fixture
def run_of(tmp_path, pairs):
    def make(name="wan", dataset=pairs, folder="run", kind=(FlowDPOConfig, FlowDPOTrainer), **options):
        settings = {
            "output_dir": str(tmp_path / folder),
            "clip": [5, 8, 12],
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "checkpointing_steps": 0,
            "progress": False,
        } | options
        config, trainer = kind
        return trainer(config(**settings), model=build(name), dataset=dataset)

    return make


@pytest.mark.parametrize("rank", [2, 0])
def test_flow_dpo_trains_and_its_result_loads_in_diffusers(rank, run_of, tmp_path):
    run = run_of(rank=rank, low_memory=True, gradient_checkpointing=True, random_flip=True)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[1]["rewards/margins"] != 0
    batch = run.batch(0, range(2))
    assert batch.latents.shape == (4, 4, 3, 4, 6)
    assert torch.equal(batch.noise[:2], batch.noise[2:])
    cond = run.adapter.encode_prompts(["a star"])
    x, t = torch.randn(1, 4, 3, 4, 6, generator=torch.manual_seed(1)), torch.tensor([400.0])
    with torch.no_grad():
        trained = run.adapter.denoise(x, t, cond)
        if rank:
            other = build("wan")
            other.load_lora_weights(tmp_path / "run")
        else:
            other = WanPipeline.from_pretrained(tmp_path / "run")
        torch.testing.assert_close(load_adapter(other).denoise(x, t, cond), trained, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(load_adapter(build("wan")).denoise(x, t, cond), trained, atol=1e-5)


def test_one_clip_at_a_time_has_the_same_gradient(run_of):
    gradients = []
    for low_memory in (False, True):
        run = run_of(folder=f"low-{low_memory}", low_memory=low_memory, max_train_steps=1)
        run.train()
        run.weights.trainable[1].data += 0.1
        run.accumulate(1, range(2), 2, last=True)
        gradients.append([p.grad.clone() for p in run.weights.trainable])
    largest = max(p.abs().max() for p in gradients[0])
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() <= 1e-3 * largest
    assert sum(bool(p.any()) for p in gradients[0]) > 4


def test_half_precision_keeps_in_float32_what_diffusers_keeps(run_of, tmp_path):
    run = run_of(mixed_precision="bf16", low_memory=True)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    network = run.adapter.module
    assert network.blocks[0].attn1.to_q.base_layer.weight.dtype == run.adapter.dtype == torch.bfloat16
    assert network.scale_shift_table.dtype == torch.float32
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_a_size_is_refused_before_anything_is_encoded(run_of, tmp_path):
    with pytest.raises(UserError, match="this is a video model: say what it is shown as clip"):
        run_of(clip=[]).train()
    with pytest.raises(
        UserError, match="clip must be 2 k \\+ 1 frames of a height and width divisible by 4 and"
    ):
        run_of(clip=[4, 8, 12], folder="even").train()
    with pytest.raises(
        UserError, match="clip is for video models, but StableDiffusion3Pipeline makes images"
    ):
        run_of("sd3", folder="image").train()
    with pytest.raises(UserError, match="too few frames"):
        run_of(clip=[7, 8, 12], folder="long").train()
    with pytest.raises(UserError, match="clip must be three whole numbers"):
        run_of(clip=[5], folder="one")
    with pytest.raises(UserError, match="leave resolution and validation_prompts out"):
        run_of(resolution=8, folder="two")
    assert not list(tmp_path.glob("*/cache"))


def test_flow_rwr_on_scored_clips(run_of, tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.webp").write_bytes(clip(k)[0])
    row = {"prompt": "a clip", "images": [f"{k}.webp" for k in range(3)], "scores": [0.0, 1.0, 3.0]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(row) + "\n")
    run = run_of(dataset=tmp_path / "lists.jsonl", kind=(FlowRWRConfig, FlowRWRTrainer), train_batch_size=3)
    run.train()
    assert run.batch(0, range(3)).latents.shape == (3, 4, 3, 4, 6)
    weights = dict(zip(run.data.ids, run.data.weight.tolist(), strict=True))
    assert weights["line-1:2"] == max(weights.values()) > 2
