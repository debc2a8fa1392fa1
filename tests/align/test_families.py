"""Every family through one adapter: it calls the network as the pipeline does, trains, saves and loads."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from diffalign.data import PairDataset
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer
from tests.align.families import BUILDERS, build

FAMILIES = sorted(BUILDERS)


def first_call(pipe, monkeypatch, prompt="a red star", **options):
    """Latents, time and output of the denoiser's first call in a run of the pipeline without guidance."""
    adapter = load_adapter(pipe)
    module, seen = adapter.module, {}
    forward = module.forward

    def spy(*args, **kwargs):
        out = forward(*args, **kwargs)
        if not seen:
            seen.update(out=out[0] if isinstance(out, tuple) else out.sample, args=args, kwargs=kwargs)
        return out

    monkeypatch.setattr(module, "forward", spy)
    size = adapter.default_resolution
    if "Img2Img" in type(pipe).__name__:
        options |= {"image": torch.rand(1, 3, size, size), "strength": 1.0}
    else:
        options |= {"height": size, "width": size}
    pipe(prompt, num_inference_steps=2, output_type="latent", **options)
    monkeypatch.setattr(module, "forward", forward)
    return adapter, seen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_asks_the_network_what_the_pipeline_asks(name, monkeypatch):
    pipe = build(name)
    adapter, seen = first_call(pipe, monkeypatch, guidance_scale=1.0, generator=torch.manual_seed(0))
    args, kwargs, out = seen["args"], seen["kwargs"], seen["out"]
    x = args[0] if args else kwargs["hidden_states"]
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1)[:1]
    if name == "flux":  # the pipeline packs and divides before the network; the adapter at its door
        side = pipe.vae_scale_factor * 4
        x, out = (pipe._unpack_latents(v, side, side, pipe.vae_scale_factor) for v in (x, out))
        t = t * 1000
    with torch.no_grad():
        ours = adapter.denoise(x, t, adapter.encode_prompts(["a red star"]))
    torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_in_the_denoisers_units(name):
    adapter = load_adapter(build(name))
    pixels = torch.rand(2, 3, 8, 8, generator=torch.manual_seed(0)) * 2 - 1
    latents = adapter.encode_images(pixels)["latents"]
    vae = adapter.pipeline.vae
    mean = vae.encode(pixels).latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    torch.testing.assert_close(latents, (mean - shift) * vae.config.scaling_factor)
    torch.testing.assert_close(adapter.decode(latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_latents_with_their_own_mean_and_spread():
    pipe = build("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    adapter = load_adapter(pipe)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    mean = pipe.vae.encode(pixels).latent_dist.mode()
    latents = adapter.encode_images(pixels)["latents"]
    scale = pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[:, 2], (mean[:, 2] - 0.3) / 3.0 * scale)
    torch.testing.assert_close(adapter.decode(latents), pipe.vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def sized_pairs():
    """Pairs whose chosen images are 8 x 8 and whose rejected ones are 16 x 12."""
    generator = np.random.default_rng(0)

    def picture(width, height):
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return PairDataset.from_lists(
        [f"picture {i % 3}" for i in range(6)],
        [picture(8, 8) for _ in range(6)],
        [picture(12, 16) for _ in range(6)],
    )


@pytest.fixture
def run_of(tmp_path, sized_pairs):
    def make(name, **options):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "train_batch_size": 3,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "checkpointing_steps": 0,
            "progress": False,
        } | options
        return DiffusionDPOTrainer(DiffusionDPOConfig(**settings), model=build(name), dataset=sized_pairs)

    return make


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", [2, 0])
def test_diffusion_dpo_trains_and_its_result_loads_in_diffusers(name, rank, run_of, tmp_path):
    run = run_of(name, rank=rank, proportion_empty_prompts=0.3)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[0]["rewards/accuracies"] == 0.5
    assert records[1]["rewards/margins"] != 0
    cond = run.adapter.encode_prompts(["a star"])
    x, t = torch.randn(1, 4, 4, 4, generator=torch.manual_seed(1)), torch.tensor([400.0])
    with torch.no_grad():
        trained = run.adapter.denoise(x, t, cond)
        if rank:
            other = build(name)
            other.load_lora_weights(tmp_path / "run")
        else:
            other = type(run.adapter.pipeline).from_pretrained(tmp_path / "run")
        loaded = load_adapter(other)
        torch.testing.assert_close(loaded.denoise(x, t, cond), trained, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(load_adapter(build(name)).denoise(x, t, cond), trained, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_going_on_from_a_lora(name, run_of, tmp_path):
    run_of(name).train()
    (tmp_path / "run").rename(tmp_path / "first")
    run = run_of(name, init_lora=str(tmp_path / "first"), max_train_steps=1)
    run.train()
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_sdxl_is_told_the_size_and_crop_of_each_image(run_of):
    run = run_of("sdxl", resolution=8)
    run.train()
    ids = run.batch(0, range(3)).cond["time_ids"]
    assert ids[0].tolist() == [8, 8, 0, 0, 8, 8]
    height, width, top, left, *target = ids[3].tolist()
    assert (height, width) == (16, 12)
    assert target == [8, 8]
    assert top + left > 0  # the centre of the smaller side fitted to 8
    as_published = run_of("sdxl", resolution=8, time_ids="resolution", overwrite=True)
    as_published.train()
    assert (as_published.batch(0, range(3)).cond["time_ids"] == torch.tensor([8.0, 8, 0, 0, 8, 8])).all()
    nothing = run_of("sdxl", resolution=8, time_ids="none", overwrite=True)
    nothing.train()
    assert not nothing.batch(0, range(3)).cond["time_ids"].any()


def test_a_refiner_is_told_a_score_and_shown_the_times_it_knows(run_of):
    run = run_of(
        "sdxl-refiner", resolution=8, timestep_sampling="uniform", validation_share=0.3, validation_steps=2
    )
    run.train()
    batches = [run.batch(step, range(3)) for step in range(40)]
    assert batches[0].cond["time_ids"][0].tolist() == [8, 8, 0, 0, 6.0]
    times = torch.cat([batch.t for batch in batches])
    assert times.max() < 200
    assert times.float().mean() == pytest.approx(100, abs=25)
    assert [run._validation_time(k) for k in (0, 7)] == [12, 187]
    base = load_adapter(build("sdxl"))
    as_image_to_image = load_adapter(StableDiffusionXLImg2ImgPipeline(**base.pipeline.components))
    assert (run.adapter.time_share, as_image_to_image.time_share) == (0.2, 1)
    assert as_image_to_image.size_conditions(*torch.ones(3, 1, 2))["time_ids"].shape == (1, 6)


def test_a_refiner_draws_no_pictures_from_noise(run_of):
    with pytest.raises(UserError, match="base model's part"):
        run_of("sdxl-refiner", validation_prompts=["a star"], validation_steps=1).train()


def test_an_empty_caption_is_what_the_pipeline_takes_for_none():
    adapter = load_adapter(build("sdxl"))
    encoded = adapter.encode_prompts([""])
    assert not any(v.any() for v in adapter.empty_caption().values())
    assert all(torch.equal(v, encoded[k]) for k, v in adapter.empty_caption("encode").items())
    adapter.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(torch.equal(v, encoded[k]) for k, v in adapter.empty_caption().items())
    assert not any(v.any() for v in load_adapter(build("sd3")).empty_caption("zeros").values())


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_times_of_a_flow_model_are_shifted_as_its_scheduler_shifts(sampling, run_of):
    run = run_of("sd3", timestep_sampling=sampling, logit_mean=0.5, logit_std=0.8)
    run.adapter = load_adapter(build("sd3"))
    numbers = np.random.default_rng(0)
    times = np.array([run._time(numbers) for _ in range(20_000)])
    assert times.min() > 0
    assert times.max() <= 1000
    sigma = times / 1000
    fraction = sigma / (3.0 - 2.0 * sigma)  # the shift of 3 undone
    if sampling == "uniform":
        assert np.quantile(fraction, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    else:
        logits = np.log(fraction / (1 - fraction))
        assert logits.mean() == pytest.approx(0.5, abs=0.03)
        assert logits.std() == pytest.approx(0.8, abs=0.03)


def test_logit_normal_times_of_a_discrete_schedule_are_training_steps(run_of):
    run = run_of("sd", timestep_sampling="logit_normal")
    run.adapter = load_adapter(build("sd"))
    numbers = np.random.default_rng(0)
    times = [run._time(numbers) for _ in range(1000)]
    assert all(isinstance(t, int) and 0 <= t < 1000 for t in times)
    assert np.median(times) == pytest.approx(500, abs=40)
