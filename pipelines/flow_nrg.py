"""Flow-NRG (Liu et al. 2025, Improving Video Generation with Human Feedback): rewards guide each step.

Tilting the distribution of every time by ``exp(w r(x_t, t))`` adds ``w grad r`` to the score, so

    eps' = eps - w sigma grad_x r(x_t, t)

and for a flow model ``v' = v - w s/(1-s) grad_x r``. The paper's reward is a small head on noisy latents;
:func:`reward_of_prediction` makes one of any differentiable reward instead, by way of the predicted image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import UserError
from diffalign.pipelines import latent_reward
from diffalign.pipelines.steering import Drawing, Score, SteeringOutput, as_type, at_least, frozen
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import coefficients, convert

#: Noisy latents (b, C, h, w), times (b,) and prompts -> rewards (b,), differentiable in the latents.
NoisyScore = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


def tilt(
    output: Tensor,
    gradient: Tensor,
    time: float,
    schedule: NoiseSchedule,
    kind: str,
    *,
    weight: float,
    most: float,
) -> Tensor:
    """The network's output of kind `kind` under the tilted distribution, in the dtype of `output`.

    Args:
        output, gradient: (b, ...), the latter of the reward with respect to x_t.
        most: cap of the factor before ``w grad r``, which for a flow is ``s/(1-s)`` and infinite at s = 1.
    """
    alpha, sigma = (float(level) for level in schedule.alpha_sigma(time))
    if kind != "epsilon" and alpha == 0.0:
        factor = most
    else:
        factor = coefficients("epsilon", kind, alpha, sigma)[1] * sigma
    factor = max(-most, min(most, factor))
    return (output.float() - weight * factor * gradient.float()).to(output.dtype)


def reward_of_prediction(drawing: Drawing, score: Score) -> NoisyScore:
    """``r(x_t, t) = score(image of the clean latent that the network predicts at x_t)``."""
    adapter = drawing.adapter

    def reward(x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = [drawing.prompts.index(prompt) for prompt in prompts]  # equal prompts have equal conditions
        raw = drawing.guidance.predict(adapter, x, t, rows)
        alpha, sigma = (
            torch.as_tensor(level, dtype=torch.float32, device=x.device)
            for level in adapter.schedule.alpha_sigma(t.detach().cpu().double().numpy())
        )
        clean = convert(raw, x, alpha, sigma, source=adapter.prediction_type, to="sample")
        return score(drawing.decode(clean), prompts)

    return reward


def flow_nrg(
    pipe: Any,
    prompt: str | Sequence[str],
    score: Score | None = None,
    *,
    noisy_score: NoisyScore | str | Path | None = None,
    weight: float = 1.0,
    most: float = 10.0,
    skip_first: bool = True,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.5,
    batch_size: int = 4,
    progress: bool = True,
    output_type: str = "pil",
) -> SteeringOutput:
    """Draw images whose every step is pulled towards a higher reward. For epsilon models as well.

    Args:
        score: a differentiable reward of images; then each step also differentiates the network and the
            decoder.
        noisy_score: instead of it, a reward of noisy latents: the folder of a head that 'diffalign train
            latent-reward' made, or a function; several rewards are a weighted sum of theirs
            (:func:`~diffalign.pipelines.latent_reward.noisy_score` makes one of a folder).
        weight: w; it scales with the reward's own units.
        most: cap of the factor before ``w grad r``, ``s/(1-s)`` for a flow.
        skip_first: leave the first step as it is: pure noise says nothing about the image.
        pipe, prompt, seeds, num_inference_steps, guidance_scale, batch_size, progress, output_type: as in
            :func:`~diffalign.pipelines.best_of.best_of_n`.

    Raises:
        UserError: not one of `score` and `noisy_score`, or an option out of range.
    """
    if (score is None) == (noisy_score is None):
        raise UserError("flow_nrg takes either score, of images, or noisy_score, of noisy latents")
    at_least(batch_size=(batch_size, 1), most=(most, 0))
    first: float | None = None

    def adjust(output: Tensor, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        nonlocal first
        bar.update()
        time = float(t[0])
        first = time if first is None else first
        if weight == 0 or (skip_first and time == first):
            return output
        with torch.enable_grad():
            at = x.detach().float().requires_grad_()
            reward = judge(at, t, drawing.told(rows))
            if not reward.requires_grad:
                raise UserError("Flow-NRG needs a reward with a gradient: try best_of_n or search_steps")
            (gradient,) = torch.autograd.grad(reward.sum(), at)
        adapter = drawing.adapter
        return tilt(
            output, gradient, time, adapter.schedule, adapter.prediction_type, weight=weight, most=most
        )

    drawing = Drawing(pipe, prompt, seeds, steps=num_inference_steps, guidance=guidance_scale, adjust=adjust)
    if isinstance(noisy_score, str | Path):
        judge: NoisyScore = latent_reward.noisy_score(noisy_score, pipe)
    else:
        judge = noisy_score or reward_of_prediction(drawing, score)  # type: ignore[arg-type]
    rows = range(len(drawing.prompts))
    batches = -(-len(rows) // batch_size)
    bar = tqdm(total=batches * num_inference_steps, desc="Flow-NRG", unit="step", disable=not progress)
    with bar, frozen(pipe):
        images = drawing.images(drawing.noise, rows, batch_size)
    rewards = None
    if score is not None:
        with torch.no_grad():
            device = drawing.noise.device
            chunks = zip(images.split(batch_size), torch.tensor(rows).split(batch_size), strict=True)
            rewards = torch.cat(
                [score(i.to(device), drawing.told(r.tolist())).float().cpu() for i, r in chunks]
            )
    return SteeringOutput(images=as_type(images, output_type), noise=drawing.noise.cpu(), rewards=rewards)


class FlowNRGPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose call is :func:`flow_nrg`; also as ``custom_pipeline``."""

    __call__ = flow_nrg  # type: ignore[assignment]
