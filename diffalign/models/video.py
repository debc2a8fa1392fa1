"""Text-to-video models: networks on latents with a time axis, ``(rows, C, F, h, w)``. Wan is the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.likelihood import Conditions
from diffalign.models.base import ModelAdapter

TOKENS = 512  # of a prompt, as the pipeline's call has it; its encode_prompt alone would take 226


class WanAdapter(ModelAdapter):
    """A ``WanPipeline`` with one transformer (Wan 2.1, and 2.2 5B).

    Conditions: ``prompt_embeds (rows, tokens, width)``. Where other families have images, this one has clips:
    pixels ``(rows, 3, frames, H, W)``, with ``4 k + 1`` frames for latents of ``k + 1`` (4 is the
    autoencoder's compression in time).

    Raises:
        UserError: the two-stage models of Wan 2.2, whose trajectory is shared by two networks.
    """

    denoiser_name = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    encoder_names = ("vae", "text_encoder")
    video = True
    default_resolution = 480

    def __init__(self, pipeline: Any) -> None:
        if pipeline.transformer is None or getattr(pipeline, "transformer_2", None) is not None:
            raise UserError(
                "this Wan pipeline hands over from one transformer to another on the way, which is not "
                "supported: take a model with one, such as Wan 2.1 or Wan 2.2 5B"
            )
        super().__init__(pipeline)

    def check_clip(self, clip: Sequence[int]) -> None:
        if not clip:
            raise UserError(
                "this is a video model: say what it is shown as clip, frames, height and width, such as "
                "--clip 81 480 832"
            )
        pipe = self.pipeline
        _, *patch = self.module.config.patch_size
        temporal, *spatial = (
            pipe.vae_scale_factor_temporal,
            *(pipe.vae_scale_factor_spatial * p for p in patch),
        )
        frames, *sides = clip
        if (frames - 1) % temporal or any(side % step for side, step in zip(sides, spatial, strict=True)):
            raise UserError(
                f"clip must be {temporal} k + 1 frames of a height and width divisible by "
                f"{' and '.join(map(str, spatial))}, but is {list(clip)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.module.patch_embedding.weight.dtype  # its modulation tables stay float32

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        if self.pipeline.config.expand_timesteps:  # one time per token
            sizes = zip(x_t.shape[2:], self.module.config.patch_size, strict=True)
            tokens = torch.Size(side // patch for side, patch in sizes).numel()
            t = t[:, None].expand(-1, tokens)
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
            device=self.pipeline.text_encoder.device,
        )
        return {"prompt_embeds": embeds}
