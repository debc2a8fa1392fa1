"""Stable Diffusion 1.x and 2.x, and everything of that shape: UNet2DConditionModel, AutoencoderKL, one
CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from diffalign.likelihood import Conditions
from diffalign.models.base import ModelAdapter


class SDAdapter(ModelAdapter):
    """A ``StableDiffusionPipeline``. Conditions: ``prompt_embeds (rows, tokens, width)``."""

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    encoder_names: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        embeds = cond["prompt_embeds"].to(self.dtype)
        return network(x_t.to(self.dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        # The pipeline's own routine, so that training and sampling condition on the same thing.
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.pipeline.text_encoder.device, 1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def _file_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_state_dict_to_diffusers(state)
