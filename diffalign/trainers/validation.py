"""Numbers and pictures that can be compared between steps and runs.

A training step sees other pairs, times and noise each time, which hides slow changes. The validation pairs
meet the same noise at the same :data:`TIMES` every time (Wallace et al. 2023 picked their checkpoints on such
a set), and the pictures start from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign.report import save_png, tile
from diffalign.solvers import sample
from diffalign.trainers import draws

if TYPE_CHECKING:
    from diffalign.models import ModelAdapter

#: Places in the schedule, as fractions of its length, at which each validation pair is judged.
TIMES = tuple((k + 0.5) / 8 for k in range(8))


def summary(policy: Tensor, reference: Tensor | None, beta: float) -> dict[str, Any]:
    """Metrics of errors ``(pairs, times, 2)`` of policy and reference, chosen images first."""
    ratio = -0.5 * (policy if reference is None else policy - reference)
    rewards = beta * ratio
    margin = rewards[..., 0] - rewards[..., 1]
    won = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "validation/rewards/accuracies": won.mean().item(),
        # One vote per pair over all times: less noise than the mean of single votes.
        "validation/accuracies_by_pair": ((margin.mean(1) > 0).double() + 0.5 * (margin.mean(1) == 0))
        .mean()
        .item(),
        "validation/rewards/margins": margin.mean().item(),
        "validation/rewards/chosen": rewards[..., 0].mean().item(),
        "validation/rewards/rejected": rewards[..., 1].mean().item(),
        "validation/accuracies_by_time": won.mean(0).tolist(),
    }


class Pictures:
    """Draws the same prompts from the same noise with the weights as they are.

    Args:
        adapter: the model; its encoders must be where they can run, since prompts are encoded here.
        prompts: what to draw.
        guidance_scale: of classifier-free guidance; 1 for none.
        steps: network evaluations per picture (twice that with guidance).
        seed: of the noise.
    """

    def __init__(
        self, adapter: ModelAdapter, prompts: Sequence[str], *, guidance_scale: float, steps: int, seed: int
    ) -> None:
        self.adapter, self.prompts = adapter, list(prompts)
        self.guidance_scale, self.steps, self.seed = guidance_scale, steps, seed
        self._cond = adapter.encode_prompts(self.prompts)
        self._empty = adapter.empty_caption()
        side = adapter.default_resolution
        blank = torch.zeros(1, 3, side, side)
        self._shape = adapter.encode_images(blank)["latents"].shape[1:]
        size = torch.tensor([[side, side]])
        self._sizes = adapter.size_conditions(size, torch.zeros_like(size), size)

    @torch.no_grad()
    def draw(self) -> list[Any]:
        """One PIL image per prompt."""
        from diffusers.image_processor import VaeImageProcessor

        adapter = self.adapter
        device, images = adapter.device, []
        adapter.pipeline.vae.to(device)
        for number in range(len(self.prompts)):
            generator = torch.Generator().manual_seed(draws.number(self.seed, "picture", number))
            noise = torch.randn((1, *self._shape), generator=generator).to(device)
            cond = {name: values[number : number + 1] for name, values in self._cond.items()}
            latents = sample(
                self._network(cond, device), noise, self._scheduler(), num_inference_steps=self.steps
            )
            pixels = adapter.decode(latents)
            images += VaeImageProcessor().postprocess(pixels.float().cpu(), output_type="pil")
        adapter.pipeline.vae.to("cpu")
        return images

    def _scheduler(self) -> Any:
        from diffalign.solvers import DPMSolverPPScheduler

        return DPMSolverPPScheduler.from_config(self.adapter.pipeline.scheduler.config)

    def _network(self, cond: dict[str, Tensor], device: torch.device) -> Any:
        rows = [self._empty, cond] if self.guidance_scale != 1.0 else [cond]
        joined = {name: torch.cat([row[name].to(device) for row in rows]) for name in cond}
        joined |= {name: v.to(device).expand(len(rows), -1) for name, v in self._sizes.items()}

        def network(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(device).expand(len(rows))
            out = self.adapter.denoise(x.expand(len(rows), *x.shape[1:]), times, joined).float()
            if len(rows) == 1:
                return out
            free, guided = out.chunk(2)
            return free + self.guidance_scale * (guided - free)

        return network


def save_pictures(images: Sequence[Any], path: Path) -> None:
    """The images side by side in one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, tile(np.stack([np.asarray(image.convert("RGB")) for image in images]), len(images)))
