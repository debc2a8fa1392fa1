"""Stable Diffusion 1.x and 2.x, and everything of that shape: UNet2DConditionModel, AutoencoderKL, one
CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.likelihood import Conditions
from diffalign.models.base import ModelAdapter
from diffalign.models.windows import Windows


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

    @property
    def prompt_windows(self) -> int:
        encode = self.pipeline.encode_prompt
        return encode.count if isinstance(encode, Windows) else 1

    def read_in_windows(self, count: int) -> None:
        if count < 1:
            raise UserError(f"prompt_windows must be at least 1, but is {count}")
        self.pipeline.__dict__.pop("encode_prompt", None)
        if count > 1:
            self.pipeline.encode_prompt = Windows(self.pipeline, count)

    def count_truncated(self, texts: Sequence[str]) -> int:
        encode = self.pipeline.encode_prompt
        if not isinstance(encode, Windows):
            return super().count_truncated(texts)
        return sum(len(encode.split(text)) > encode.count for text in texts)

    def _file_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_state_dict_to_diffusers(state)
