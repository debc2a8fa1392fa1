"""Draw images from any text-to-image pipeline: same noise for same seed, whatever the batch or scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffalign.errors import UserError


@dataclass(frozen=True)
class Samples:
    """What `generate` drew.

    Attributes:
        images: (N, H, W, 3) uint8.
        latents: (N, ...) float32 on the CPU, in the pipeline's own layout, before decoding.
        nfe: network evaluations per image, counted on the network itself (a guided pair counts as one).
    """

    images: np.ndarray
    latents: torch.Tensor
    nfe: float


@contextmanager
def count_evaluations(network: torch.nn.Module) -> Iterator[list[int]]:
    """Count calls of ``network`` while the block runs; yields a one-element list."""
    calls = [0]

    def hook(*_: object) -> None:
        calls[0] += 1

    handle = network.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def denoiser(pipe: Any) -> torch.nn.Module:
    """The network that a pipeline evaluates once a step: its ``unet`` or its ``transformer``.

    Raises:
        UserError: it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(network := getattr(pipe, name, None), torch.nn.Module):
            return network
    raise UserError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; give a text-to-image pipeline"
    )


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    scheduler: Any = None,
    batch_size: int = 8,
    progress: str | None = None,
    **call: Any,
) -> Samples:
    """Sample one image per prompt.

    Args:
        pipe: a diffusers text-to-image pipeline; it decodes by itself, so any family works.
        prompts: N prompts.
        seeds: N integers; image i depends on ``prompts[i]`` and ``seeds[i]`` alone, not on the batch.
        steps: ``num_inference_steps``.
        guidance: classifier-free guidance scale; 1 turns it off.
        scheduler: used instead of the pipeline's own for this call.
        batch_size: images per network call.
        progress: text of the progress bar; None shows none.
        call: further arguments of the pipeline's call, such as ``height`` or ``negative_prompt``.

    Raises:
        UserError: prompts and seeds differ in length or are empty, or the pipeline does not take an argument.
    """
    if not prompts or len(prompts) != len(seeds):
        raise UserError(
            f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt, at least one"
        )
    known = inspect.signature(pipe.__call__).parameters
    needed = ("prompt", "num_inference_steps", "guidance_scale", "generator", "callback_on_step_end")
    for name in (*needed, *call):
        if name not in known:
            raise UserError(f"{type(pipe).__name__} does not take {name!r}, which this needs")
    network = denoiser(pipe)
    own, own_bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    bar = tqdm(total=len(batches) * steps, desc=progress, unit="step", disable=progress is None, leave=False)
    images: list[np.ndarray] = []
    latents: list[torch.Tensor] = []
    last: dict[str, torch.Tensor] = {}

    def after_step(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = tensors["latents"]
        bar.update()
        return {}

    try:
        pipe.scheduler = scheduler if scheduler is not None else own
        pipe.set_progress_bar_config(disable=True)
        with count_evaluations(network) as calls, torch.no_grad(), bar:
            for batch in batches:
                chosen = list(prompts[batch])
                shared = dict(call)
                if isinstance(negative := shared.get("negative_prompt"), str):
                    shared["negative_prompt"] = [negative] * len(chosen)
                drawn = pipe(
                    prompt=chosen,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator("cpu").manual_seed(int(s)) for s in seeds[batch]],
                    callback_on_step_end=after_step,
                    output_type="np",
                    **shared,
                ).images
                latents.append(last["latents"].float().cpu())
                images.append((np.asarray(drawn) * 255).round().astype(np.uint8))
        return Samples(np.concatenate(images), torch.cat(latents), calls[0] / len(batches))
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**own_bar)
