"""Stable Diffusion 3: a flow transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.likelihood import Conditions
from diffalign.models.base import JOINT_ATTENTION, ModelAdapter


class SD3Adapter(ModelAdapter):
    """A ``StableDiffusion3Pipeline``. Conditions: ``prompt_embeds (rows, tokens, width)``, ``pooled``."""

    denoiser_name = "transformer"
    lora_targets = JOINT_ATTENTION
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompts = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled": pooled}
