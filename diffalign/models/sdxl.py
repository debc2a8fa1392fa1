"""Stable Diffusion XL: two CLIPs, and a network that is told the size and crop of what it was shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.likelihood import Conditions
from diffalign.models.sd import SDAdapter


class SDXLAdapter(SDAdapter):
    """A ``StableDiffusionXLPipeline``.

    Conditions: ``prompt_embeds (rows, tokens, width)``, ``pooled (rows, width)`` and ``time_ids (rows, 6)``:
    original size, crop corner and target size in pixels, height first. Without ``time_ids`` the image is
    taken as uncropped and of the model's default size.
    """

    encoder_names = ("vae", "text_encoder", "text_encoder_2")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        ids = cond.get("time_ids")
        if ids is None:
            side = float(self.default_resolution)
            ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=x_t.device).expand(len(x_t), -1)
        dtype = self.dtype
        return network(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            added_cond_kwargs={"text_embeds": cond["pooled"].to(dtype), "time_ids": ids.to(dtype)},
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder_2.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    @property
    def _zeros_when_empty(self) -> bool:
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def size_conditions(
        self, original_size: Tensor, crop_top_left: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        return {"time_ids": torch.cat([original_size, crop_top_left, target], 1).float()}
