"""The schedulers in unmodified diffusers pipelines, built tiny from configs with random weights."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS
from tests.align.families import build

NAMES = list(SOLVERS)


def with_scheduler(pipe, name, **options):
    components = {**pipe.components, "scheduler": SOLVERS[name].from_config(pipe.scheduler.config, **options)}
    swapped = StableDiffusionPipeline(**components, requires_safety_checker=False)
    swapped.set_progress_bar_config(disable=True)
    return swapped


def swapped(pipe, name, kind=None, **options):
    """`pipe`, or one of class `kind` with its parts, with our scheduler made from its config."""
    scheduler = SOLVERS[name].from_config(pipe.scheduler.config, **options)
    other = (kind or type(pipe))(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def draw(pipe, *args, steps=3, **kwargs):
    """The output as an array, checked to be finite, and the times at which the network was asked."""
    seen = []

    def note(_, index, time, tensors):
        seen.append(float(time))
        return tensors

    out = pipe(
        *args,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=note,
        **({"output_type": "np"} | kwargs),
    )
    images = out[0]
    images = images.float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    assert np.isfinite(images).all()
    assert images.std() > 0
    return images, seen


@pytest.fixture(scope="module")
def tiny_sdxl():
    return build("sdxl")


@pytest.fixture(scope="module")
def tiny_sd3():
    return build("sd3")


@pytest.fixture(scope="module")
def tiny_flux():
    return build("flux")


# ---------------------------------------------------------------- Stable Diffusion


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_text_to_image(tiny_sd, name, guidance):
    pipe = with_scheduler(tiny_sd, name)
    seen = []
    images = pipe(
        "a b",
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        callback_on_step_end=lambda p, i, t, kwargs: seen.append((i, float(t))) or kwargs,
    ).images
    assert np.isfinite(images).all()
    assert images.std() > 0
    assert [i for i, _ in seen] == list(range(6))
    assert [t for _, t in seen] == [float(t) for t in pipe.scheduler.timesteps]
    assert pipe.scheduler.step_index == 6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_image_twice(tiny_sd, name):
    """No state of the first run is left for the second."""
    pipe = with_scheduler(tiny_sd, name)
    runs = [
        pipe("a", num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="np").images
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_starts_in_the_middle(tiny_sd, name, strength):
    base = with_scheduler(tiny_sd, name)
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps = []
    out = pipe(
        "a",
        image=image,
        strength=strength,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        callback_on_step_end=lambda p, i, t, kwargs: steps.append(float(t)) or kwargs,
    ).images
    begin = 10 - int(10 * strength)
    assert np.isfinite(out).all()
    assert pipe.scheduler.begin_index == begin
    assert steps == [float(t) for t in pipe.scheduler.timesteps[begin:]]
    # The plan covers the rest only, and starts with a first-order row.
    assert len(pipe.scheduler.plan.rows) == 10 - begin
    assert set(pipe.scheduler.plan.rows[0].m) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_inpainting_with_a_mask_blend_in_the_loop(tiny_sd, name):
    base = with_scheduler(tiny_sd, name)
    pipe = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    out = pipe(
        "a",
        image=torch.rand(1, 3, 64, 64),
        mask_image=mask,
        num_inference_steps=5,
        height=64,
        width=64,
        output_type="np",
    ).images
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_pipeline_loads_with_the_same_scheduler(tiny_sd, name, tmp_path):
    pipe = with_scheduler(tiny_sd, name, grid="karras")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    cls = SOLVERS[name]
    assert index["scheduler"] == [cls.__module__, cls.__name__]
    assert cls.__module__.startswith("diffalign.solvers.")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is cls
    assert loaded.scheduler.config.grid == "karras"
    assert loaded.scheduler.schedule == pipe.scheduler.schedule
    kwargs = {"num_inference_steps": 3, "output_type": "np"}
    loaded.set_progress_bar_config(disable=True)
    a = pipe("a", generator=torch.Generator().manual_seed(0), **kwargs).images
    b = loaded("a", generator=torch.Generator().manual_seed(0), **kwargs).images
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_custom_timesteps_and_sigmas_through_the_pipeline(tiny_sd, name):
    pipe = with_scheduler(tiny_sd, name)
    seen = []
    pipe(
        "a",
        timesteps=[999.0, 700.5, 300.25, 20.0],
        output_type="latent",
        callback_on_step_end=lambda p, i, t, kwargs: seen.append(float(t)) or kwargs,
    )
    assert seen == [999.0, 700.5, 300.25, 20.0]
    pipe("a", sigmas=[14.0, 5.0, 1.0, 0.2], output_type="latent")
    np.testing.assert_allclose(pipe.scheduler.sigmas[:-1], [14.0, 5.0, 1.0, 0.2], rtol=1e-4)
    assert pipe.scheduler.num_inference_steps == 4


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_pipeline_stays_close_to_float32(tiny_sd, name):
    """The step computes in float32, so only the rounding of outputs and of stored samples remains."""
    scheduler = SOLVERS[name].from_config(tiny_sd.scheduler.config)
    x = torch.randn(1, 4, 8, 8)
    outputs = [torch.randn(1, 4, 8, 8) for _ in range(6)]

    def run(dtype):
        scheduler.set_timesteps(6)
        sample = x.to(dtype)
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            sample = scheduler.step(output.to(dtype), t, sample, return_dict=False)[0]
            assert sample.dtype == dtype
        return sample.float()

    reference = run(torch.float32)
    for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        assert (run(dtype) - reference).norm() / reference.norm() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_any_strength_runs_or_says_why_not(tiny_sd, name):
    base = with_scheduler(tiny_sd, name)
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64)
    for strength in (0.25, 0.5, 0.9):
        _, seen = draw(pipe, "a", image=image, strength=strength, steps=4, output_type="latent")
        assert len(seen) == int(4 * strength)


@pytest.mark.parametrize("name", NAMES)
def test_controlnet(tiny_sd, name):
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(tiny_sd.unet, conditioning_channels=3)
    control.controlnet_cond_embedding = type(control.controlnet_cond_embedding)(
        8, block_out_channels=(8, 8, 8)
    )
    base = with_scheduler(tiny_sd, name)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    _, seen = draw(pipe, "a", image=torch.rand(1, 3, 64, 64), control_guidance_end=0.7)
    assert len(seen) == 3


@pytest.mark.parametrize("name", NAMES)
def test_image_i_does_not_depend_on_the_batch(tiny_sd, name):
    pipe = with_scheduler(tiny_sd, name)

    def images(prompts, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(prompts, num_inference_steps=3, generator=generators, output_type="np").images

    np.testing.assert_allclose(images(["a", "b", "c"], [1, 2, 3])[1:2], images(["b"], [2]), atol=1e-5)


# ---------------------------------------------------------------- Stable Diffusion XL


@pytest.mark.parametrize("name", NAMES)
def test_sdxl_image_to_image_and_inpainting(tiny_sdxl, name):
    parts = {"image": torch.rand(1, 3, 16, 16), "steps": 4}
    pipe = swapped(tiny_sdxl, name, diffusers.StableDiffusionXLImg2ImgPipeline)
    _, seen = draw(pipe, "a", strength=0.5, **parts)
    assert len(seen) == 2
    pipe = swapped(tiny_sdxl, name, diffusers.StableDiffusionXLInpaintPipeline)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    _, seen = draw(pipe, "a", mask_image=mask, strength=0.75, height=16, width=16, **parts)
    assert len(seen) == 3


@pytest.mark.parametrize("name", NAMES)
def test_sdxl_base_hands_over_to_the_refiner(tiny_sdxl, name):
    """``denoising_end`` and ``denoising_start``: together they ask as often as one run, at the same times."""
    base = swapped(tiny_sdxl, name)
    refiner = swapped(tiny_sdxl, name, diffusers.StableDiffusionXLImg2ImgPipeline)
    whole, times = draw(base, "a", steps=6, output_type="latent")
    part, first = draw(base, "a", steps=6, denoising_end=0.6, output_type="latent")
    rest, second = draw(
        refiner, "a", steps=6, denoising_start=0.6, image=torch.from_numpy(part), output_type="latent"
    )
    assert first + second == times
    assert first
    assert second
    if name == "ddim":  # no history is lost at the hand-over
        np.testing.assert_allclose(rest, whole, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- flow models


@pytest.mark.parametrize("name", NAMES)
def test_stable_diffusion_3(tiny_sd3, name, tmp_path):
    pipe = swapped(tiny_sd3, name)
    images, seen = draw(pipe, "a", steps=4, height=16, width=16)
    np.testing.assert_allclose(seen, [1000, 900, 750, 500], atol=1e-2)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is SOLVERS[name]
    assert loaded.scheduler.schedule == pipe.scheduler.schedule
    again, _ = draw(loaded, "a", steps=4, height=16, width=16)
    np.testing.assert_allclose(images, again, atol=1e-5)
    pipe = swapped(tiny_sd3, name, diffusers.StableDiffusion3Img2ImgPipeline)
    _, seen = draw(pipe, "a", steps=4, height=16, width=16, image=torch.rand(1, 3, 16, 16), strength=0.5)
    np.testing.assert_allclose(seen, [750, 500], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_flux_with_and_without_dynamic_shifting(tiny_flux, name):
    """The pipeline passes mu in any case; it counts where the config asks for it, as in diffusers."""
    for options in ({"shift": 1.0}, {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}):
        tiny_flux.scheduler = theirs = FlowMatchEulerDiscreteScheduler(**options)
        size = {"height": 32, "width": 32, "steps": 4, "output_type": "latent"}
        _, expected = draw(tiny_flux, "a", **size)
        pipe = swapped(tiny_flux, name)
        _, seen = draw(pipe, "a", **size)
        np.testing.assert_allclose(seen, expected, rtol=1e-5)
        np.testing.assert_allclose(pipe.scheduler.sigmas, theirs.sigmas, atol=1e-5)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.FluxImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    _, seen = draw(pipe, "a", image=torch.rand(1, 3, 32, 32), strength=0.5, **size)
    np.testing.assert_allclose(seen, expected[2:], rtol=1e-5)


# ---------------------------------------------------------------- CogView4


@pytest.mark.parametrize("name", NAMES)
def test_cogview4_tells_its_network_the_times_before_the_shift(name):
    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    shift = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )

    def run(pipe):
        return draw(
            pipe,
            prompt_embeds=torch.ones(1, 16, 16),
            negative_prompt_embeds=torch.zeros(1, 16, 16),
            height=16,
            width=16,
            output_type="latent",
        )

    pipe.set_progress_bar_config(disable=True)
    theirs, levels = run(pipe)
    other = swapped(pipe, name)
    ours, seen = run(other)
    # This pipeline's callback is given sigmas.
    np.testing.assert_allclose(seen, levels, rtol=1e-5)
    assert other.scheduler.timesteps.tolist() == [1000, 500, 1]
    if name == "ddim":  # which Euler's method is, for a flow
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- video


@pytest.fixture(scope="module")
def tiny_wan():
    """Text-to-video without a text encoder: latents (B, 4, frames, H, W)."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer.eval(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_video_of_a_flow_model(tiny_wan, name):
    pipe = swapped(tiny_wan, name)
    prompt = torch.randn(2, 1, 4, 16)
    frames, seen = draw(
        pipe,
        prompt_embeds=prompt[0],
        negative_prompt_embeds=prompt[1],
        height=16,
        width=16,
        num_frames=5,
        output_type="latent",
    )
    assert frames.shape == (1, 4, 2, 2, 2)
    np.testing.assert_allclose(seen, pipe.scheduler.schedule.shifted([1, 2 / 3, 1 / 3]), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_video_of_a_motion_adapter(tiny_sd, name):
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    parts = with_scheduler(tiny_sd, name).components
    pipe = diffusers.AnimateDiffPipeline(
        **{k: parts[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        motion_adapter=adapter,
    )
    pipe.set_progress_bar_config(disable=True)
    frames, seen = draw(pipe, "a", num_frames=2, height=32, width=32, output_type="latent")
    assert frames.shape == (1, 4, 2, 8, 8)
    assert len(seen) == 3


# ---------------------------------------------------------------- pixel models


@pytest.fixture(scope="module")
def pixel_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_pixel_pipelines_call_step_in_their_way(pixel_unet, name):
    config = diffusers.DDPMScheduler(clip_sample=True).config
    pipe = diffusers.DDPMPipeline(pixel_unet, SOLVERS[name].from_config(config))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    images = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert pipe.scheduler.step_index == 4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_pipeline_passes_arguments_that_only_ddim_has(pixel_unet, eta):
    config = diffusers.DDIMScheduler(clip_sample=False).config
    results = []
    for scheduler in (None, SOLVERS["ddim"].from_config(config, grid="diffusers")):
        pipe = diffusers.DDIMPipeline(pixel_unet, diffusers.DDIMScheduler.from_config(config))
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler or pipe.scheduler
        arguments = {"num_inference_steps": 4, "eta": eta, "output_type": "np"}
        results.append(pipe(generator=torch.Generator().manual_seed(0), **arguments).images)
    np.testing.assert_allclose(*results, atol=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", NAMES)
def test_models_without_training_steps_are_refused(name):
    """Variance-exploding and consistency models: no alpha and sigma, so no silent nonsense."""
    for theirs in (diffusers.CMStochasticIterativeScheduler(), diffusers.ScoreSdeVeScheduler()):
        with pytest.raises(UserError, match="neither those of training steps"):
            SOLVERS[name].from_config(theirs.config)
