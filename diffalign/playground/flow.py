"""The playground's flow model: the UNet of its Stable Diffusion, turned into a velocity network.

A rectified flow ``x_s = (1 - s) x0 + s z`` differs from the teacher's process only by a scale and by how it
counts time: ``x_s / sqrt((1 - s)^2 + s^2)`` is the teacher's state where lambda = log((1 - s) / s). So the
teacher's epsilon gives its velocity at every state, a target without the noise of ``z - x0``.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffalign.playground import sd
from diffalign.playground.fit import fit
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import convert

#: Noise levels at which the teacher's velocity is the target. Its error grows as 1 / (1 - s) above, where
#: little but noise is left, and its own schedule ends at 0.94; elsewhere the target is ``z - x0``.
TAUGHT = (0.1, 0.85)


def make_scheduler() -> Any:
    """diffusers' usual sampler, told that the network is a flow.

    Not ``FlowMatchEulerDiscreteScheduler``: it lacks ``init_noise_sigma``, which StableDiffusionPipeline
    needs.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        steps_offset=1,  # no effect, but StableDiffusionPipeline warns of any other value
    )


def velocity(unet: Any, schedule: NoiseSchedule, x: Tensor, s: Tensor, condition: Tensor) -> Tensor:
    """Velocity of an epsilon network at states of a flow.

    Args:
        unet: predicts epsilon on ``schedule``.
        x: (B, C, h, w) ``(1 - s) x0 + s z``.
        s: (B,) noise levels in (0, 1), within the range of ``schedule``.
        condition: (B, tokens, width).

    Returns:
        (B, C, h, w) estimate of E[z - x0 | x].
    """
    level = s[:, None, None, None]
    t = torch.from_numpy(np.asarray(schedule.t_of_lambda(torch.logit(1 - s.double()).numpy())))
    scaled = x / torch.hypot(1 - level, level)
    eps = unet(scaled.contiguous(memory_format=torch.channels_last), t.float(), condition).sample
    return convert(eps, x, 1 - level, level, source="epsilon", to="flow_prediction")


def train(
    folder: Path,
    teacher: Any,
    latents: Tensor,
    captions: list[str],
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    every: int = 500,
) -> tuple[Any, float]:
    """Flow matching from the teacher's weights; its text encoder and autoencoder stay as they are.

    Args:
        teacher: the pipeline of Stable Diffusion shape that is taught from.
        latents: (N, 4, h, w) of images.
        captions: N captions.

    Returns:
        The pipeline with averaged weights, and the training seconds.
    """
    schedule = NoiseSchedule.from_config(teacher.scheduler.config)
    unet = copy.deepcopy(teacher.unet).to(memory_format=torch.channels_last)
    teacher.unet.to(memory_format=torch.channels_last)
    pipe = sd.with_network(teacher, unet, make_scheduler())
    ids, empty = sd.tokenize(pipe.tokenizer, captions), sd.tokenize(pipe.tokenizer, [""])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        x0 = latents[rows].float()
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        noise = torch.randn(x0.shape, generator=generator)
        s = sd.stratified(batch_size, generator)
        level = s[:, None, None, None]
        x, target = (1 - level) * x0 + level * noise, noise - x0
        taught = (s > TAUGHT[0]) & (s < TAUGHT[1])
        with torch.no_grad():
            condition = pipe.text_encoder(torch.where(dropped[:, None], empty, ids[rows])).last_hidden_state
            target[taught] = velocity(teacher.unet, schedule, x[taught], s[taught], condition[taught])
        predicted = unet(x.contiguous(memory_format=torch.channels_last), 1000 * s, condition).sample
        return F.mse_loss(predicted, target)

    seconds = fit(
        "flow",
        folder,
        {"unet": unet},
        loss,
        steps=steps,
        learning_rate=1e-3,
        seed=seed,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        every=every,
        evaluate=lambda step: sd.judge(pipe, prompts=100, seed=1, sheet=folder / f"samples-{step:05d}.png"),
    )
    return pipe, seconds


def build(
    output: Path,
    work: Path,
    teacher: Any,
    *,
    images: int,
    steps: int,
    seed: int,
    eval_prompts: int,
) -> dict[str, float]:
    """Train the flow model and write ``output`` as an ordinary pipeline folder.

    Returns:
        Seconds and accuracies, for the README.
    """
    began = time.perf_counter()
    scenes, pictures = sd.draw_images(seed, images)
    latents = sd.encode(teacher.vae, pictures).half()
    pipe, seconds = train(work, teacher, latents, [s.caption for s in scenes], steps=steps, seed=seed)
    facts = sd.ship(pipe, output, eval_prompts)
    return facts | {"training_seconds": seconds, "seconds": time.perf_counter() - began}
