"""Draw images from any text-to-image pipeline: same noise for same seed, whatever the batch or scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffalign.errors import UserError
from diffalign.solvers import CalibratedScheduler, sample


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


def takes_prompts(pipe: Any) -> bool:
    """Whether a pipeline draws from prompts; one that does not, such as ``DDPMPipeline``, draws pixels."""
    return "prompt" in inspect.signature(pipe.__call__).parameters


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
        pipe: a diffusers text-to-image pipeline; it decodes by itself, so any family works. Or one that draws
            pixels from noise alone, such as ``DDPMPipeline``: the prompts then only say how many.
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
    _check_call(pipe, guidance, call)
    network: Any = denoiser(pipe)
    own, own_bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    used = own if scheduler is None else scheduler
    if isinstance(used, CalibratedScheduler):
        used.check_guidance(guidance)
    batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    bar = tqdm(total=len(batches) * steps, desc=progress, unit="step", disable=progress is None, leave=False)
    images: list[np.ndarray] = []
    latents: list[torch.Tensor] = []
    last: dict[str, torch.Tensor] = {}

    def after_step(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = tensors["latents"]
        bar.update()
        return {}

    def draw(chosen: list[str], generators: list[torch.Generator]) -> Any:
        shared = dict(call)
        if isinstance(negative := shared.get("negative_prompt"), str):
            shared["negative_prompt"] = [negative] * len(chosen)
        return pipe(
            prompt=chosen,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            callback_on_step_end=after_step,
            output_type="np",
            **shared,
        ).images

    def draw_pixels(chosen: list[str], generators: list[torch.Generator]) -> Any:
        # Not through the pipeline, which knows no scheduler but DDPM's: the loop that all of them share.
        shape = (len(chosen), network.config.in_channels, *_sides(network.config.sample_size))
        noise = randn_tensor(shape, generator=generators, device=network.device, dtype=network.dtype)
        last["latents"] = sample(
            lambda x, t: network(x, t, return_dict=False)[0],
            noise,
            pipe.scheduler,
            num_inference_steps=steps,
            generator=generators,
            callback=lambda *_: bar.update(),
        )
        return (last["latents"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()

    drawn = draw if takes_prompts(pipe) else draw_pixels
    try:
        pipe.scheduler = used
        pipe.set_progress_bar_config(disable=True)
        with count_evaluations(network) as calls, torch.no_grad(), bar:
            for batch in batches:
                generators = [torch.Generator("cpu").manual_seed(int(s)) for s in seeds[batch]]
                made = drawn(list(prompts[batch]), generators)
                latents.append(last["latents"].float().cpu())
                images.append((np.asarray(made) * 255).round().astype(np.uint8))
        return Samples(np.concatenate(images), torch.cat(latents), calls[0] / len(batches))
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**own_bar)


def _check_call(pipe: Any, guidance: float, call: Mapping[str, Any]) -> None:
    """Refuse a pipeline that `generate` cannot use, or that does not take what it would be given."""
    from diffusers import UNet2DModel

    known = inspect.signature(pipe.__call__).parameters
    needed = ["prompt", "num_inference_steps", "guidance_scale", "generator", "callback_on_step_end"]
    pixels = isinstance(getattr(pipe, "unet", None), UNet2DModel) and len(pipe.components) == 2
    if pixels and not takes_prompts(pipe):
        needed = []
        if guidance != 1.0:
            raise UserError(
                f"{type(pipe).__name__} takes no prompts, so there is nothing to guide: give guidance 1, not "
                f"{guidance:g}"
            )
    for name in (*needed, *call):
        if name not in known:
            raise UserError(f"{type(pipe).__name__} does not take {name!r}, which this needs")


def _sides(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
