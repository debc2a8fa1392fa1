"""Editing and blind restoration along the probability-flow ODE, after CODE (Confident Ordinary Differential
Editing, van Delft et al. 2024).

    1.  encode    x(t_1) by the ODE, from the image's latent up to the time t_1
    2.  clip      x(t) to what the noised latents of images look like, N(0, alpha_t^2 + sigma_t^2), within the
                  interval that holds a share `confidence` of it
    3.  update    x <- x + eta grad log p_t(x) = x - step_size sigma_t eps(x, t),  eta = step_size sigma_t^2
    4.  clip, and go down the ODE to the next of the times t_1 > t_2 > ... and to 2, or to the image

This is *inspired by* the paper: its abstract says that the ODE encodes and decodes, that updates by the score
make the encoded image more likely, and that a confidence interval says what to clip. Step sizes, the order of
2 to 4 and the interval's centre and width are inferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import UserError
from diffalign.models.base import ModelAdapter, load_adapter
from diffalign.pipelines.guidance import Guidance, guidance_for
from diffalign.pipelines.steering import as_type, at_least
from diffalign.solvers.integration import Network
from diffalign.solvers.inversion import follow
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.sampling import ModelFn


@dataclass
class EditOutput(BaseOutput):  # type: ignore[misc]
    """Edited images and what was between.

    Attributes:
        images: in the order and the type that were asked for.
        latents: (N, C, h, w) float32 on the CPU, the encoded images at the greatest depth, before updates.
        clipped: (N,) share of their numbers that lay outside the confidence interval.
    """

    images: Any
    latents: Tensor
    clipped: Tensor


def clip_to_confidence(x: Tensor, alpha: float, sigma: float, confidence: float) -> Tensor:
    """x with every number inside the central interval of ``N(0, alpha^2 + sigma^2)`` of that probability.

    The latents of all families have unit variance about 0, near enough, before noise is added.
    """
    if confidence == 1.0:
        return x
    bound = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.hypot(alpha, sigma))
    return x.clamp(-bound, bound)


def depth_grid(schedule: NoiseSchedule, depths: Sequence[float], steps: int) -> tuple[np.ndarray, list[int]]:
    """Times ``(steps + 1,)`` from the image to the greatest depth, and the places of the depths among them.

    Evenly spaced in ``sqrt(t)``: dense at the clean end, where the ODE bends. Places fall, each once.
    """
    span = schedule.t_max - schedule.t_min
    times = schedule.t_min + max(depths) * span * np.linspace(0, 1, steps + 1) ** 2
    wanted = schedule.t_min + span * np.asarray(depths)
    places = {int(np.abs(times - time).argmin()) for time in wanted}
    return times, sorted(places - {0}, reverse=True)


def code_edit(
    pipe: Any,
    prompt: str | Sequence[str],
    image: Any,
    *,
    source_prompt: str | Sequence[str] | None = None,
    depths: float | Sequence[float] = 0.5,
    updates: int = 20,
    step_size: float = 0.02,
    confidence: float = 0.95,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
    order: int = 2,
    batch_size: int = 8,
    progress: bool = True,
    output_type: str = "pil",
) -> EditOutput:
    """Restore or edit images: what is unlikely in them under the prompt goes, the rest stays.

    Deterministic, and blind: nothing is assumed of what happened to the image. The network is called
    ``2 num_inference_steps + updates`` times for an image, more with several depths.

    Args:
        pipe: a text-to-image pipeline of any known family.
        prompt: what the images should show; one, or one for each image.
        image: one or more, as diffusers takes them (PIL, arrays or tensors in [0, 1]); brought to the model's
            own size.
        source_prompt: what they show now, for encoding; by default `prompt`. Encoding has no guidance.
        depths: how far to go up, as parts of the model's range of time, each above 0 and below 1. The deeper,
            the more may change. Updates are made at each of them, the deepest first.
        updates: at each depth.
        step_size: of an update, in units of sigma_t^2.
        confidence: of the interval that encoded images are clipped to; 1 leaves them as they are.
        num_inference_steps: from the image to the greatest depth, and as many back.
        guidance_scale: classifier-free guidance of the updates and of the way back; 1 or less is none.
        order: of the solver, see :func:`~diffalign.solvers.inversion.follow`.
        batch_size: images per network call.
        progress: show a bar.
        output_type: ``pil``, ``np`` or ``pt``, as in diffusers.

    Returns:
        Images, encoded latents, and how much of each was clipped.

    Raises:
        UserError: an option out of range, or prompts and images that don't fit.
    """
    at_least(batch_size=(batch_size, 1), num_inference_steps=(num_inference_steps, 1))
    at_least(updates=(updates, 0), step_size=(step_size, 0))
    levels = [depths] if isinstance(depths, int | float) else list(depths)
    if not levels or not all(0 < depth < 1 for depth in levels):
        raise UserError(f"depths must lie above 0 and below 1, but are {depths}")
    if not 0 < confidence <= 1:
        raise UserError(f"confidence must lie above 0 and be at most 1, but is {confidence}")
    adapter = load_adapter(pipe)
    if adapter.video:
        raise UserError(f"code_edit changes images, but {type(pipe).__name__} makes videos")
    side = adapter.default_resolution
    pixels = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor).preprocess(image, side, side)
    count = len(pixels)
    told = _guidance(adapter, "prompt", prompt, count, guidance_scale)
    source = prompt if source_prompt is None else source_prompt
    before = _guidance(adapter, "source_prompt", source, count, 1.0)
    schedule, kind = adapter.schedule, adapter.prediction_type
    solver: dict[str, Any] = {"prediction_type": kind, "order": order}
    times, places = depth_grid(schedule, levels, num_inference_steps)
    passes = -(-count // batch_size)
    total = passes * (2 * num_inference_steps + updates * len(places))
    encoded, images, clipped = [], [], []
    with torch.no_grad(), tqdm(total=total, desc="CODE", unit="step", disable=not progress) as bar:
        for rows in torch.arange(count).split(batch_size):
            encode, restore = _network(adapter, before, rows), _network(adapter, told, rows)
            eps = Network(restore, schedule, kind, torch.float32, False, updates * len(places))
            latents = adapter.encode_images(pixels[rows].to(adapter.device))["latents"].float()
            x = follow(encode, latents, schedule, times, callback=bar.update, **solver)
            encoded.append(x.cpu())
            for place, after in pairwise([*places, 0]):
                time = float(times[place])
                alpha, sigma = (float(level) for level in schedule.alpha_sigma(time))
                inside = clip_to_confidence(x, alpha, sigma, confidence)
                if place == places[0]:
                    clipped.append((inside != x).float().flatten(1).mean(1).cpu())
                x = inside
                for _ in range(updates):
                    x = x - step_size * sigma * eps(x, [time], "epsilon")
                    bar.update()
                x = clip_to_confidence(x, alpha, sigma, confidence)
                down = times[after : place + 1][::-1]
                x = follow(restore, x, schedule, down, callback=bar.update, **solver)
            images.append(adapter.decode(x).float().div(2).add(0.5).clamp(0, 1).cpu())
    return EditOutput(
        images=as_type(torch.cat(images), output_type),
        latents=torch.cat(encoded),
        clipped=torch.cat(clipped),
    )


def _guidance(
    adapter: ModelAdapter, name: str, prompts: str | Sequence[str], count: int, scale: float
) -> Guidance:
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"{len(texts)} texts in {name} but {count} images: give one, or one for each image")
    return guidance_for(adapter, texts, max(scale, 1.0))


def _network(adapter: ModelAdapter, guidance: Guidance, rows: Tensor) -> ModelFn:
    return lambda x, t: guidance.predict(adapter, x, t.to(x.device).expand(len(x)), rows)


class CODEPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose call is :func:`code_edit`; also as ``custom_pipeline``."""

    __call__ = code_edit  # type: ignore[assignment]
