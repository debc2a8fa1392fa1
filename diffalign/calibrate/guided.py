"""A pipeline's network as the function of a latent and a time that samplers integrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.base import ModelAdapter
from diffalign.solvers.sampling import ModelFn


@torch.no_grad()
def guided_model(
    adapter: ModelAdapter,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    resolution: int | None = None,
    batch_size: int = 8,
) -> ModelFn:
    """``(x, t) -> output``, row i of x under ``prompts[i]``, guided as the pipeline guides it.

    Args:
        adapter: of the pipeline.
        prompts: one per row.
        guidance_scale: classifier-free guidance; 1 is none, and then half the work.
        resolution: side of the images in pixels, for networks that are told; the model's own by default.
        batch_size: rows handed to the network at once, twice as many when guided.

    Returns:
        The function; output like x, in float32.
    """
    count, side = len(prompts), resolution or adapter.default_resolution
    size = torch.full((count, 2), side, device=adapter.device)
    told = adapter.size_conditions(size, torch.zeros_like(size), size)
    conditional = adapter.encode_prompts(prompts)
    empty = {name: v.expand(count, *v.shape[1:]) for name, v in adapter.empty_caption().items()}
    branches = [{**c, **told} for c in ([conditional] if guidance_scale == 1.0 else [empty, conditional])]

    def rows(x: Tensor, t: Any, part: slice) -> Tensor:
        cond = {name: torch.cat([b[name][part] for b in branches]) for name in branches[0]}
        repeated = torch.cat([x[part]] * len(branches))
        time = torch.as_tensor(t, device=x.device).expand(len(repeated))
        outputs = adapter.denoise(repeated, time, cond).float().chunk(len(branches))
        free, towards = outputs[0], outputs[-1]
        return free + guidance_scale * (towards - free) if len(outputs) == 2 else towards

    @torch.no_grad()
    def model(x: Tensor, t: Any) -> Tensor:
        return torch.cat([rows(x, t, slice(i, i + batch_size)) for i in range(0, count, batch_size)])

    return model


def starting_noise(adapter: ModelAdapter, seeds: Sequence[int], *, resolution: int | None = None) -> Tensor:
    """(len(seeds), C, h, w) float32 noise on the adapter's device; row i depends on ``seeds[i]`` alone."""
    side = (resolution or adapter.default_resolution) // adapter.pipeline.vae_scale_factor
    shape = (adapter.pipeline.vae.config.latent_channels, side, side)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(draws).to(adapter.device)
