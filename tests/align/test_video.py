"""Video models: clips from files to latents, one network call like the pipeline's, and Flow-DPO on them."""

import pytest
import torch

from diffalign.errors import UserError
from diffalign.models import load_adapter
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
