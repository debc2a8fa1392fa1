"""What pipelines that choose among images share: drawing as a function of the starting noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.base import load_adapter
from diffalign.models.flux import FluxAdapter
from diffalign.pipelines.guidance import dynamic_shift, guidance_for
from diffalign.solvers.adjoint import differentiable_sample

#: Images (B, 3, H, W) in [0, 1] and their prompts -> rewards (B,), higher is better: ``reward.score``.
Score = Callable[[Tensor, Sequence[str]], Tensor]
#: The network's output at x (rows, ...) and t (rows,), x, t, the rows -> another output.
Adjust = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


@dataclass
class SteeringOutput(BaseOutput):  # type: ignore[misc]
    """What was found.

    Attributes:
        images: one for each prompt, in the type that was asked for.
        noise: (N, C, h, w) float32 on the CPU, the starting noise of the images.
        rewards: (N,) of the images; None where nothing scored them.
        first_rewards: (N,) of the images that the seeds give without a search.
        history: (iterations, N) rewards on the way, NaN for images that were done.
    """

    images: Any
    noise: Tensor
    rewards: Tensor | None = None
    first_rewards: Tensor | None = None
    history: Tensor | None = None


class Drawing:
    """Images of prompts as a function of their starting noise, differentiable.

    Seeds mean what they mean for the pipeline itself: with :attr:`noise`, image i is the one that it draws
    with ``torch.Generator().manual_seed(seeds[i])``. The noise of a stochastic sampler's steps follows from
    the seed and stays the same from call to call, so that reward differences come from the start alone.

    Args:
        pipe: a text-to-image pipeline of a known family; its scheduler is copied, its parts are used.
        prompts: one, or one for each seed.
        seeds: one for each image; 0, 1, ... if not given.
        steps: of the pipeline's scheduler.
        guidance: classifier-free guidance scale; 1 or less is none.
        checkpoints: see :func:`~diffalign.solvers.adjoint.differentiable_sample`.
        adjust: changes the network's outputs.

    Attributes:
        prompts: one for each image.
        noise: (N, C, h, w) float32 on the network's device.

    Raises:
        UserError: no prompts, another number of seeds, or a pipeline of videos or of an unknown family.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None,
        *,
        steps: int,
        guidance: float,
        checkpoints: int | None = None,
        adjust: Adjust | None = None,
    ) -> None:
        if steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, but is {steps}")
        self.adapter = load_adapter(pipe)
        if self.adapter.video:
            raise UserError(f"steering draws images, but {type(pipe).__name__} makes videos")
        self.prompts = [prompts] * len(seeds or [0]) if isinstance(prompts, str) else list(prompts)
        self.seeds = list(range(len(self.prompts))) if seeds is None else [int(seed) for seed in seeds]
        if not self.prompts or len(self.seeds) != len(self.prompts):
            raise UserError(
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds: give one seed per prompt, "
                "at least one"
            )
        self.guidance = guidance_for(self.adapter, self.prompts, max(guidance, 1.0))
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.checkpoints, self.adjust = checkpoints, adjust
        self.grid: dict[str, Any] = {"num_inference_steps": steps}
        if isinstance(self.adapter, FluxAdapter):  # whose pipeline has a grid of its own
            self.grid = {"sigmas": np.linspace(1, 1 / steps, steps).tolist()}
        self.grid["mu"] = dynamic_shift(self.adapter)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        shape = self.adapter.latent_shape()
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        self.noise = noise.to(self.adapter.device)
        self._states = [g.get_state() for g in generators]

    def __call__(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        """Images ``(len(rows), 3, H, W)`` float32 in [0, 1] from `noise`, under the prompts `rows`."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(x.device).expand(len(x))
            output = self.guidance.predict(self.adapter, x, times, rows)
            return output if self.adjust is None else self.adjust(output, x, times, rows)

        generators = []
        for row in rows:
            generators.append(torch.Generator())
            generators[-1].set_state(self._states[row])
        latents = differentiable_sample(
            network,
            noise,
            self.scheduler,
            checkpoints=self.checkpoints,
            generator=generators,
            **self.grid,
        )
        return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(rows, 3, H, W)`` float32 in [0, 1]."""
        return self.adapter.decode(latents, gradient=True).float().div(2).add(0.5).clamp(0, 1)

    def told(self, rows: Sequence[int]) -> list[str]:
        """The prompts of `rows`."""
        return [self.prompts[row] for row in rows]

    @torch.no_grad()
    def images(self, noise: Tensor, rows: Sequence[int], batch_size: int) -> Tensor:
        """As a call, without gradients, `batch_size` at a time, in host memory."""
        batches = [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]
        return torch.cat([self(noise[b], rows[b]).cpu() for b in batches])

    @torch.no_grad()
    def scores(self, score: Score, noise: Tensor, rows: Sequence[int], batch_size: int) -> Tensor:
        """Rewards ``(len(rows),)`` float32 in host memory of the images from `noise`."""
        batches = [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]
        return torch.cat([score(self(noise[b], rows[b]), self.told(rows[b])).float().cpu() for b in batches])


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """No gradient to any weight of a pipeline while the block runs: what only those need is not kept."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = [w for part in parts for w in part.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_()


def as_type(images: Tensor, output_type: str) -> Any:
    """Images ``(N, 3, H, W)`` in [0, 1] as ``pil`` (a list), ``np`` ((N, H, W, 3)) or ``pt``, as diffusers
    names them.

    Raises:
        UserError: another type.
    """
    if output_type == "pt":
        return images
    if output_type not in ("np", "pil"):
        raise UserError(f"output_type must be pil, np or pt, not {output_type!r}")
    arrays = VaeImageProcessor.pt_to_numpy(images)
    return arrays if output_type == "np" else VaeImageProcessor.numpy_to_pil(arrays)


def at_least(**options: tuple[float, float]) -> None:
    """Refuse options, given as ``name=(value, smallest)``, that are too small.

    Raises:
        UserError: names the first of them.
    """
    for name, (value, smallest) in options.items():
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest}, but is {value}")
