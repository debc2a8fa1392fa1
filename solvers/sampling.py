"""The sampling loop, for tests, benchmarks and pixel models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]


def sample(
    model_fn: ModelFn,
    noise: Tensor,
    scheduler: Any,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from `noise` to a sample with any diffusers-like scheduler, ours or theirs.

    Args:
        model_fn: ``(x, t) -> output`` in the scheduler's prediction type; t is a 0-d element of
            ``timesteps``.
        noise: (B, ...) standard normal.
        scheduler: its ``set_timesteps`` is called, so it may have been used before.
        num_inference_steps: number of steps, or
        timesteps: custom times.
        mu: shift of a flow model's grid, as in ``set_timesteps``.
        generator: for schedulers with noise; one, or one per image.
        callback: called as ``callback(i, t, x)`` with the sample after step i.

    Returns:
        The sample, of the shape, dtype and device of `noise`. Differentiable unless the caller turns that
        off.
    """
    how = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "mu": mu}
    scheduler.set_timesteps(device=noise.device, **{k: v for k, v in how.items() if v is not None})
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_arguments = {"generator": generator} if takes_generator and generator is not None else {}
    # diffusers' flow schedulers have neither: their samples are what the network takes.
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for i, t in enumerate(scheduler.timesteps):
        output = model_fn(scaled(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **step_arguments)[0]
        if callback is not None:
            callback(i, t, x)
    return x
