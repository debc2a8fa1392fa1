"""Search without learning: the best of several seeds, and of several next states at every step.

What any cleverer way of spending network calls must beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.pipelines.rollout import RowNoise, SamplerConfig, transition_for
from diffalign.pipelines.steering import Drawing, Score, SteeringOutput, as_type, at_least, frozen


def candidate_seeds(seed: int, count: int) -> list[int]:
    """`seed` itself and others that follow from it."""
    others = np.random.SeedSequence(abs(seed)).generate_state(count - 1, np.uint64) >> np.uint64(1)
    return [seed, *(int(other) for other in others)]


def best_of_n(
    pipe: Any,
    prompt: str | Sequence[str],
    score: Score,
    *,
    seeds: Sequence[int] | None = None,
    n: int = 8,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    progress: bool = True,
    output_type: str = "pil",
) -> SteeringOutput:
    """Draw n images of each prompt and keep the one with the highest reward.

    Args:
        n: candidates; the first is the seed's own image, so the best of more is never worse.
        score: any reward, with or without a gradient.
        batch_size: images per network call.
        pipe, prompt, seeds, num_inference_steps, guidance_scale, progress, output_type: as in
            :func:`~diffalign.pipelines.reno.reno`.

    Returns:
        Images, their starting noise and rewards; ``history`` is (n, N), the rewards of all candidates.

    Raises:
        UserError: an option out of range, prompts and seeds that don't fit.
    """
    at_least(n=(n, 1), batch_size=(batch_size, 1))
    first = Drawing(pipe, prompt, seeds, steps=num_inference_steps, guidance=guidance_scale)
    history, images, noises = [], [], []
    with tqdm(total=len(first.prompts), desc=f"best of {n}", unit="prompt", disable=not progress) as bar:
        for text, seed in zip(first.prompts, first.seeds, strict=True):
            drawing = Drawing(
                pipe, text, candidate_seeds(seed, n), steps=num_inference_steps, guidance=guidance_scale
            )
            drawn = drawing.images(drawing.noise, range(n), batch_size)
            with torch.no_grad():
                chunks = drawn.to(drawing.noise.device).split(batch_size)
                rewards = torch.cat([score(chunk, [text] * len(chunk)).float().cpu() for chunk in chunks])
            best = int(rewards.argmax())
            history.append(rewards)
            images.append(drawn[best])
            noises.append(drawing.noise[best].cpu())
            bar.update()
    rewards = torch.stack(history, 1)
    return SteeringOutput(
        images=as_type(torch.stack(images), output_type),
        noise=torch.stack(noises),
        rewards=rewards.amax(0),
        first_rewards=rewards[0],
        history=rewards,
    )


def search_steps(
    pipe: Any,
    prompt: str | Sequence[str],
    score: Score,
    *,
    seeds: Sequence[int] | None = None,
    candidates: int = 4,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    transition: str = "ddim",
    transition_options: dict[str, float] | None = None,
    batch_size: int = 4,
    progress: bool = True,
    output_type: str = "pil",
) -> SteeringOutput:
    """Draw several next states at each step of a stochastic sampler and go on with the best one.

    A state is judged by the clean image that the network predicts from it, which is the call that the next
    step needs anyway: an image costs ``candidates`` times a plain one, and a decoding for each.

    Args:
        candidates: next states of each state.
        transition, transition_options: the sampler, as in
            :class:`~diffalign.pipelines.rollout.SamplerConfig`, in place of the pipeline's scheduler.
        batch_size: prompts at a time.
        pipe, prompt, score, seeds, num_inference_steps, guidance_scale, progress, output_type: as in
            :func:`best_of_n`.

    Raises:
        UserError: an option out of range, a sampler that does not fit the model.
    """
    at_least(candidates=(candidates, 1), batch_size=(batch_size, 1))
    drawing = Drawing(pipe, prompt, seeds, steps=num_inference_steps, guidance=guidance_scale)
    config = SamplerConfig(
        sample_steps=num_inference_steps, transition=transition, transition_options=transition_options or {}
    )
    config.check_sampler()
    adapter = drawing.adapter
    steps = transition_for(adapter, config)
    count = len(drawing.prompts)
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    images, rewards = [], []

    def predict(x: Tensor, step: int, rows: Sequence[int]) -> Tensor:
        return drawing.guidance.predict(adapter, x, steps.times(step, x), rows)

    def judge(latents: Tensor, rows: Sequence[int]) -> Tensor:
        return score(drawing.decode(latents), drawing.told(rows)).float()

    bar = tqdm(total=len(batches) * len(steps), desc="search", unit="step", disable=not progress)
    with frozen(pipe), torch.no_grad(), bar:
        for rows in batches:
            x = drawing.noise[rows.start : rows.stop]
            noise = RowNoise([drawing.seeds[row] + 2**32 for row in rows], x.shape[1:], x.device)
            raw = predict(x, 0, rows)
            for step in range(len(steps)):
                drawn = steps(raw, x, step).sample(noise.draw(candidates))  # (candidates, rows, ...)
                last, noisy = step == len(steps) - 1, steps.std[step] > 0
                many = [*rows] * (candidates if noisy else 1)
                nexts = drawn.flatten(0, 1) if noisy else drawn[0]
                raws = nexts if last else predict(nexts, step + 1, many)
                if noisy:
                    clean = nexts if last else steps.predicted_x0(raws, nexts, step + 1)
                    chosen = judge(clean, many).unflatten(0, (candidates, len(rows))).argmax(0)
                    index = chosen * len(rows) + torch.arange(len(rows), device=chosen.device)
                    nexts, raws = nexts[index], raws[index]
                x, raw = nexts, raws
                bar.update()
            images.append(drawing.decode(x).cpu())
            rewards.append(judge(x, rows).cpu())
    return SteeringOutput(
        images=as_type(torch.cat(images), output_type), noise=drawing.noise.cpu(), rewards=torch.cat(rewards)
    )


class BestOfNPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose call is :func:`best_of_n`; also as ``custom_pipeline``."""

    __call__ = best_of_n  # type: ignore[assignment]
