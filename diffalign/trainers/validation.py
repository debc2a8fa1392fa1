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

from diffalign.pipelines.guidance import dynamic_shift, guidance_for
from diffalign.pipelines.rollout import RowNoise
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
        self.steps, self.seed = steps, seed
        self._guidance = guidance_for(adapter, self.prompts, guidance_scale)
        self._mu = dynamic_shift(adapter)

    @torch.no_grad()
    def draw(self) -> list[Any]:
        """One PIL image per prompt."""
        from diffusers.image_processor import VaeImageProcessor

        adapter = self.adapter
        device, images = adapter.device, []
        adapter.pipeline.vae.to(device)
        for number in range(len(self.prompts)):
            seed = draws.number(self.seed, "picture", number)
            noise = RowNoise([seed], adapter.latent_shape(), device).draw()

            def network(x: Tensor, t: Tensor, number: int = number) -> Tensor:
                return self._guidance.predict(adapter, x, t.to(x.device).expand(1), [number])

            latents = sample(network, noise, self._scheduler(), num_inference_steps=self.steps, mu=self._mu)
            pixels = adapter.decode(latents)
            images += VaeImageProcessor().postprocess(pixels.float().cpu(), output_type="pil")
        adapter.pipeline.vae.to("cpu")
        return images

    def _scheduler(self) -> Any:
        from diffalign.solvers import DPMSolverPPScheduler

        return DPMSolverPPScheduler.from_config(self.adapter.pipeline.scheduler.config)


def save_pictures(images: Sequence[Any], path: Path) -> None:
    """The images side by side in one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, tile(np.stack([np.asarray(image.convert("RGB")) for image in images]), len(images)))
