"""A pipeline's network as the function of a latent and a time that samplers integrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.base import ModelAdapter
from diffalign.pipelines.guidance import guidance_for
from diffalign.pipelines.rollout import RowNoise
from diffalign.solvers.sampling import ModelFn

#: ``(x, t, items) -> output``: row i of x under prompt ``items[i]``; differentiable in x and t (0-d).
GuidedNetwork = Callable[[Tensor, Any, Tensor], Tensor]


def guided_network(
    adapter: ModelAdapter, prompts: Sequence[str], *, guidance_scale: float, resolution: int | None = None
) -> GuidedNetwork:
    """The network under any of `prompts`, guided as :func:`~diffalign.pipelines.guidance.guidance_for` says.

    Returns:
        The function; output like x, in float32.
    """
    guidance = guidance_for(adapter, prompts, guidance_scale, resolution=resolution)

    def network(x: Tensor, t: Any, items: Tensor) -> Tensor:
        return guidance.predict(adapter, x, torch.as_tensor(t, device=x.device).expand(len(x)), items)

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


def starting_noise(adapter: ModelAdapter, seeds: Sequence[int], *, resolution: int | None = None) -> Tensor:
    """(len(seeds), C, h, w) float32 noise on the adapter's device; row i depends on ``seeds[i]`` alone."""
    return RowNoise(seeds, adapter.latent_shape(resolution), adapter.device).draw()
