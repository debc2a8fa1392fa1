"""What a network is told beside the latent and the time: prompts, guidance, and the size of the image."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.likelihood import guided
from diffalign.models.base import EmptyCaption, ModelAdapter


@dataclass(frozen=True)
class Guidance:
    """What a batch of images is conditioned on, and how strongly: a property of the policy.

    Attributes:
        cond: conditions of each prompt, ``(P, ...)``.
        uncond: of no caption, ``(1, ...)``; None without classifier-free guidance.
        scale: classifier-free guidance; 1 is none.
    """

    cond: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None
    scale: float

    def predict(
        self,
        adapter: ModelAdapter,
        x: Tensor,
        t: Tensor,
        prompts: Sequence[int] | Tensor,
        *,
        reference: bool = False,
        detach_uncond: bool = False,
    ) -> Tensor:
        """The guided prediction at ``x (rows, ...)`` and ``t (rows,)``, row i under ``cond[prompts[i]]``.

        Like x, in float32 or better; differentiable in x and t.
        """
        index = torch.as_tensor(prompts, device=x.device)
        cond = {name: values.to(x.device)[index] for name, values in self.cond.items()}
        uncond = None
        if self.uncond is not None:
            uncond = {k: v.to(x.device).expand(len(x), *v.shape[1:]) for k, v in self.uncond.items()}
        return guided(
            adapter.denoise, x, t, cond, uncond, self.scale, reference=reference, detach_uncond=detach_uncond
        )


@torch.no_grad()
def guidance_for(
    adapter: ModelAdapter,
    prompts: Sequence[str],
    scale: float,
    *,
    resolution: int | None = None,
    empty_caption: EmptyCaption = "as_pipeline",
    batch_size: int = 32,
) -> Guidance:
    """Encode ``prompts`` and guide as the pipeline does.

    Args:
        scale: of classifier-free guidance, where 1 is none and half the work; a network whose guidance is
            distilled (Flux) is told it instead.
        resolution: side in pixels of the images, which are taken as uncropped; the model's own by default.
        empty_caption: what guidance steers away from.
        batch_size: prompts encoded at once.

    Raises:
        UserError: for a refiner, which draws nothing from noise.
    """
    if adapter.time_share < 1:
        raise UserError("a refiner changes images and draws none from noise: that is the base model's part")
    side = torch.tensor([resolution or adapter.default_resolution] * 2)

    def told(rows: int) -> dict[str, Tensor]:
        size = side.expand(rows, 2)
        return adapter.size_conditions(size, torch.zeros_like(size), size)

    chunks = [adapter.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    cond = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]} | told(len(prompts))
    if adapter.distilled_guidance:
        return Guidance(cond | {"guidance": torch.full((len(prompts),), float(scale))}, None, 1.0)
    uncond = None if scale == 1.0 else adapter.empty_caption(empty_caption) | told(1)
    return Guidance(cond, uncond, scale)


def dynamic_shift(adapter: ModelAdapter, *, resolution: int | None = None) -> float | None:
    """The ``mu`` that the pipeline hands to ``set_timesteps`` at this size, None where it hands none.

    Pipelines of flow models shift the grid by the number of image tokens, if their scheduler's config says
    ``use_dynamic_shifting``.
    """
    pipe, config = adapter.pipeline, adapter.pipeline.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    _, height, width = adapter.latent_shape(resolution)
    tokens = height * width // adapter.patch_size**2
    limits = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
    limits |= {"base_shift": "base_shift", "max_shift": "max_shift"}
    given = {name: config[key] for name, key in limits.items() if config.get(key) is not None}
    # The pipeline's module has the function, and defaults of its own.
    return float(sys.modules[type(pipe).__module__].calculate_shift(tokens, **given))
