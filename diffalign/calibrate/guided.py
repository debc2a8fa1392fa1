"""A pipeline's network as the function of a latent and a time that samplers integrate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models.base import ModelAdapter
from diffalign.solvers.sampling import ModelFn

#: ``(x, t, items) -> output``: row i of x under prompt ``items[i]``; differentiable in x and t (0-d).
GuidedNetwork = Callable[[Tensor, Any, Tensor], Tensor]


@torch.no_grad()
def guided_network(
    adapter: ModelAdapter, prompts: Sequence[str], *, guidance_scale: float, resolution: int | None = None
) -> GuidedNetwork:
    """The network under any of `prompts`, guided as the pipeline guides it.

    Args:
        adapter: of the pipeline.
        prompts: encoded here, once.
        guidance_scale: classifier-free guidance, where 1 is none, and then half the work; networks whose
            guidance is distilled (Flux) are told it instead.
        resolution: side of the images in pixels, for networks that are told; the model's own by default.

    Returns:
        The function; output like x, in float32.
    """
    side = resolution or adapter.default_resolution
    distilled = hasattr(adapter, "guidance_scale")
    conditional = adapter.encode_prompts(prompts)
    empty = {} if distilled or guidance_scale == 1.0 else adapter.empty_caption()

    def network(x: Tensor, t: Any, items: Tensor) -> Tensor:
        rows, count = items.to(x.device), len(items)
        size = torch.full((count, 2), side, device=x.device)
        cond = {name: v[rows] for name, v in conditional.items()}
        cond |= adapter.size_conditions(size, torch.zeros_like(size), size)
        if distilled:
            adapter.guidance_scale = guidance_scale  # type: ignore[attr-defined]
        elif empty:
            nothing = {name: v.expand(count, *v.shape[1:]) for name, v in empty.items()}
            cond = {name: torch.cat([nothing.get(name, v), v]) for name, v in cond.items()}
            x = torch.cat([x, x])
        time = torch.as_tensor(t, device=x.device).expand(len(x))
        output = adapter.denoise(x, time, cond).float()
        if not empty:
            return output
        free, towards = output.chunk(2)
        return free + guidance_scale * (towards - free)

    return network


def guided_model(network: GuidedNetwork, items: Sequence[int], *, batch_size: int = 8) -> ModelFn:
    """``(x, t) -> output`` for samplers: row i of x under prompt ``items[i]``; no gradient.

    Args:
        network: from :func:`guided_network`.
        items: one per row.
        batch_size: rows handed to the network at once, twice as many when guided.
    """
    batches = torch.as_tensor(items).split(batch_size)

    @torch.no_grad()
    def model(x: Tensor, t: Any) -> Tensor:
        parts = zip(x.split(batch_size), batches, strict=True)
        return torch.cat([network(part, t, rows) for part, rows in parts])

    return model


def latent_side(adapter: ModelAdapter, resolution: int | None = None) -> int:
    """Side of the latent of a square image; UserError unless the model can draw that size."""
    scale = adapter.pipeline.vae_scale_factor
    unit = scale * _patch(adapter)
    side = adapter.default_resolution if resolution is None else resolution
    if side < unit or side % unit:
        raise UserError(f"--resolution must be a multiple of {unit} for this model, not {side}")
    return side // scale


def _patch(adapter: ModelAdapter) -> int:
    """How many latents a side a token of the network is: Flux joins 2 x 2, whatever its config says."""
    return 1 if adapter.denoiser_name == "unet" else getattr(adapter.pipeline, "patch_size", 2)


def starting_noise(adapter: ModelAdapter, seeds: Sequence[int], *, resolution: int | None = None) -> Tensor:
    """(len(seeds), C, h, w) float32 noise on the adapter's device; row i depends on ``seeds[i]`` alone."""
    side = latent_side(adapter, resolution)
    shape = (adapter.pipeline.vae.config.latent_channels, side, side)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(draws).to(adapter.device)


def dynamic_shift(adapter: ModelAdapter, *, resolution: int | None = None) -> float | None:
    """The ``mu`` that the pipeline hands to ``set_timesteps`` at this size, None where it hands none.

    Pipelines of flow models shift the grid by the number of image tokens, if their scheduler's config says
    ``use_dynamic_shifting``.
    """
    pipe, config = adapter.pipeline, adapter.pipeline.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    tokens = (latent_side(adapter, resolution) // _patch(adapter)) ** 2
    limits = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
    limits |= {"base_shift": "base_shift", "max_shift": "max_shift"}
    given = {name: config[key] for name, key in limits.items() if config.get(key) is not None}
    # The pipeline's module has the function, and defaults of its own.
    return float(sys.modules[type(pipe).__module__].calculate_shift(tokens, **given))
