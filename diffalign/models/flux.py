"""Flux: a flow transformer on packed latents, with distilled guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.likelihood import Conditions
from diffalign.models.base import JOINT_ATTENTION, ModelAdapter


class FluxAdapter(ModelAdapter):
    """A ``FluxPipeline``. Conditions: ``prompt_embeds (rows, tokens, width)``, ``pooled``, and, unless it is
    1, ``guidance (rows,)``: what a guidance-distilled network is told; 1 leaves its own distribution.

    Latents are ordinary ``(rows, C, h, w)`` here, with even h and w; patches of 2 x 2 are packed at the
    network's door.
    """

    denoiser_name = "transformer"
    lora_targets = JOINT_ATTENTION
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    distilled_guidance = True

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype, pipe = self.dtype, self.pipeline
        rows, channels, height, width = x_t.shape
        embeds = cond["prompt_embeds"].to(dtype)
        guidance = None
        if self.module.config.guidance_embeds:
            guidance = cond.get("guidance", torch.ones(rows, device=x_t.device)).to(dtype)
        packed = network(
            hidden_states=pipe._pack_latents(x_t.to(dtype), rows, channels, height, width),
            timestep=t.to(dtype) / self.schedule.num_train_timesteps,
            guidance=guidance,
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=dtype, device=x_t.device),
            img_ids=pipe._prepare_latent_image_ids(rows, height // 2, width // 2, x_t.device, dtype),
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.pipeline.text_encoder.device
        )
        return {"prompt_embeds": embeds, "pooled": pooled}
