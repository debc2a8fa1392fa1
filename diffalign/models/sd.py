"""Stable Diffusion 1.x and 2.x, and everything of that shape: UNet2DConditionModel, AutoencoderKL, one
CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.likelihood import Conditions
from diffalign.models.base import LORA_FILE, ModelAdapter


class SDAdapter(ModelAdapter):
    """A ``StableDiffusionPipeline``. Conditions: ``prompt_embeds (rows, tokens, width)``."""

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    encoder_names = ("vae", "text_encoder")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.module.conv_in.weight.dtype  # module.dtype walks all parameters, 3 ms each time
        return network(
            x_t.to(dtype), t, encoder_hidden_states=cond["prompt_embeds"].to(dtype), return_dict=False
        )[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        # The pipeline's own routine, so that training and sampling condition on the same thing.
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.pipeline.text_encoder.device, 1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        vae = self.pipeline.vae
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return {"latents": mean * vae.config.scaling_factor}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample

    @property
    def default_resolution(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def save_lora(self, folder: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.pipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=metadata,
        )

    def load_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"there is no LoRA at {folder}: it has no {LORA_FILE}")
        state, _, metadata = self.pipeline.lora_state_dict(
            folder, weight_name=LORA_FILE, return_lora_metadata=True, use_safetensors=True
        )
        prefix = f"{self.denoiser_name}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        settings = {k.removeprefix(prefix): v for k, v in (metadata or {}).items() if k.startswith(prefix)}
        return convert_unet_state_dict_to_peft(own), settings
