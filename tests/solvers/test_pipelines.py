"""The schedulers in unmodified diffusers pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

from diffalign.solvers import SOLVERS

NAMES = list(SOLVERS)


def with_scheduler(pipe, name, **options):
    components = {**pipe.components, "scheduler": SOLVERS[name].from_config(pipe.scheduler.config, **options)}
    swapped = StableDiffusionPipeline(**components, requires_safety_checker=False)
    swapped.set_progress_bar_config(disable=True)
    return swapped


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
