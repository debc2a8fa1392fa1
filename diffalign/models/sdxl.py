"""Stable Diffusion XL: two CLIPs, and a network that is told the size and crop of what it was shown.

Its refiner has one CLIP, and is told how beautiful the image is in place of the target size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.likelihood import Conditions
from diffalign.models.sd import SDAdapter

# What the pipeline tells a refiner of an image that it should make.
AESTHETIC_SCORE = 6.0


class SDXLAdapter(SDAdapter):
    """A ``StableDiffusionXLPipeline``, or a ``StableDiffusionXLImg2ImgPipeline`` of the base or the refiner.

    Conditions: ``prompt_embeds (rows, tokens, width)``, ``pooled (rows, width)`` and ``time_ids (rows, 6)``:
    original size, crop corner and target size in pixels, height first; of a refiner ``(rows, 5)``, original
    size, crop corner and the aesthetic score, 6. Without ``time_ids`` the image is taken as uncropped and of
    the model's default size.
    """

    encoder_names = ("vae", "text_encoder", "text_encoder_2")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        ids = cond.get("time_ids")
        if ids is None:
            whole = torch.full((len(x_t), 2), self.default_resolution, device=x_t.device)
            ids = self.size_conditions(whole, torch.zeros_like(whole), whole)["time_ids"]
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
        last = torch.full_like(target[:, :1], AESTHETIC_SCORE) if self._refiner else target
        return {"time_ids": torch.cat([original_size, crop_top_left, last], 1).float()}

    @property
    def _refiner(self) -> bool:
        return bool(self.pipeline.config.get("requires_aesthetics_score"))

    @property
    def time_share(self) -> float:
        """The refiner was trained on the last 200 of 1000 times."""
        return 0.2 if self._refiner else 1.0
