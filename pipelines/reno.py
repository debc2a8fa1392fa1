"""ReNO (Eyring et al. 2024): the starting noise of a few-step model is optimised for rewards.

    min over x  of  -sum_i w_i r_i(G(x), prompt) + c (|x|^2 / 2 - (d - 1) log |x|)

The second term is the negative log-density of the norm of a Gaussian vector (up to a constant) and keeps x
where the generator has been trained. Clipped Nesterov ascent, and the best of all iterates by reward alone.

A learned reward can be raised without the image getting better. Judge the result by something that was not
optimised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import RunFailed, UserError
from diffalign.pipelines.steering import Drawing, Score, SteeringOutput, as_type, at_least, frozen


def norm_penalty(noise: Tensor) -> Tensor:
    """``|x|^2 / 2 - (d - 1) log |x|``, (B,) float32 of (B, ...): least at ``|x|^2 = d - 1``."""
    flat = noise.flatten(1).float()  # squares of half precision overflow
    norm = flat.norm(dim=1)
    return norm.square() / 2 - (flat.shape[1] - 1) * norm.log()


def optimise_noise(
    reward: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    iterations: int = 50,
    lr: float = 5.0,
    momentum: float = 0.9,
    max_norm: float = 0.1,
    penalty: float = 0.01,
    patience: int | None = None,
    batch_size: int = 4,
    after: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Nesterov ascent on the reward less `penalty` times :func:`norm_penalty`, each row for itself.

    Args:
        reward: differentiable; ``(x (b, ...), rows (b,)) -> (b,)``.
        noise: (B, ...) where to start; float32.
        iterations: evaluations of the reward for each row.
        lr, momentum, max_norm: of the ascent; the gradient of a row is scaled down to that norm.
        patience: a row is done after so many iterations without a better one; None for all iterations.
        batch_size: rows at a time.
        after: called as ``after(iteration, x, gradient norms before clipping)`` after each iteration.

    Returns:
        The best iterate of each row by reward, the earliest of equals; and all rewards
        ``(iterations, B)`` in host memory, NaN where a row was done.

    Raises:
        RunFailed: a gradient that is not finite.
    """
    x, velocity, best = noise.clone(), torch.zeros_like(noise), noise.clone()
    history = torch.full((iterations, len(noise)), torch.nan)
    found_at = torch.zeros(len(noise), dtype=torch.long)
    active = torch.arange(len(noise))
    for iteration in range(iterations):
        norms = torch.zeros(len(noise))
        for rows in active.split(batch_size):
            with torch.enable_grad():
                start = x[rows].detach().requires_grad_()
                rewards = reward(start, rows)
                loss = penalty * norm_penalty(start).sum() - rewards.sum()
                (gradient,) = torch.autograd.grad(loss, start)
            norm = gradient.flatten(1).norm(dim=1)
            if not norm.isfinite().all():
                raise RunFailed(f"the gradient of the reward is not finite in iteration {iteration + 1}")
            norms[rows] = norm.float().cpu()
            history[iteration, rows] = rewards.detach().float().cpu()
            scale = (max_norm / (norm + 1e-6)).clamp(max=1)
            gradient = gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))
            velocity[rows] = momentum * velocity[rows] + gradient
            x[rows] = start.detach() - lr * (gradient + momentum * velocity[rows])
            earlier = history[:iteration, rows]
            better = (history[iteration, rows] > earlier).all(0)
            best[rows[better]] = start.detach()[better.to(start.device)]
            found_at[rows[better]] = iteration
        if after is not None:
            after(iteration, x, norms)
        if patience is not None:
            active = active[iteration - found_at[active] < patience]
            if not len(active):
                break
    return best, history


def reno(
    pipe: Any,
    prompt: str | Sequence[str],
    score: Score,
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    iterations: int = 50,
    lr: float = 5.0,
    momentum: float = 0.9,
    max_norm: float = 0.1,
    penalty: float = 0.01,
    patience: int | None = None,
    checkpoints: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
    output_type: str = "pil",
) -> SteeringOutput:
    """Draw images whose starting noise was optimised for a reward. The defaults are the published ones.

    Args:
        pipe: a text-to-image pipeline of any known family. Few steps make it quick; with many, memory stays
            that of one network call.
        prompt: one, or one for each seed.
        score: differentiable, such as ``load_reward("pickscore", path).score`` or that of an ensemble.
        seeds: of the noise to start from and of the sampler's steps; 0, 1, ... if not given.
        num_inference_steps, guidance_scale, output_type: as in diffusers; output types are pil, np and pt.
        iterations, lr, momentum, max_norm, penalty, patience, batch_size: see :func:`optimise_noise`.
        checkpoints: see :func:`~diffalign.solvers.adjoint.differentiable_sample`.
        progress: show a bar.

    Returns:
        The best images, their noise and rewards, those without a search, and the history.

    Raises:
        UserError: an option out of range, a reward without a gradient, prompts and seeds that don't fit.
        RunFailed: a gradient that is not finite.
    """
    at_least(iterations=(iterations, 1), batch_size=(batch_size, 1), lr=(lr, 0), penalty=(penalty, 0))
    at_least(patience=(1 if patience is None else patience, 1), max_norm=(max_norm, 0))
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), but is {momentum}")
    with frozen(pipe), tqdm(total=iterations, desc="ReNO", unit="iteration", disable=not progress) as bar:
        drawing = Drawing(
            pipe, prompt, seeds, steps=num_inference_steps, guidance=guidance_scale, checkpoints=checkpoints
        )

        def reward(noise: Tensor, rows: Tensor) -> Tensor:
            images = drawing(noise, rows.tolist())
            rewards = score(images, drawing.told(rows.tolist()))
            if not rewards.requires_grad:
                raise UserError(
                    "ReNO needs a reward with a gradient to the image: try zo_rank_sgd or best_of_n"
                )
            return rewards

        noise, history = optimise_noise(
            reward,
            drawing.noise,
            iterations=iterations,
            lr=lr,
            momentum=momentum,
            max_norm=max_norm,
            penalty=penalty,
            patience=patience,
            batch_size=batch_size,
            after=lambda *_: bar.update() and None,
        )
        images = drawing.images(noise, range(len(noise)), batch_size)
    return SteeringOutput(
        images=as_type(images, output_type),
        noise=noise.cpu(),
        rewards=history.nan_to_num(-torch.inf).amax(0),
        first_rewards=history[0],
        history=history,
    )


class ReNOPipeline(StableDiffusionPipeline):
    """Stable Diffusion (and Turbo, LCM) whose call is :func:`reno`; also as ``custom_pipeline``."""

    __call__ = reno  # type: ignore[assignment]
