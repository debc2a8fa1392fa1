"""The playground's few-step model: Stable Diffusion distilled to four steps without guidance.

A step predicts the clean image and noises it again to the next of four times, so that all but the last are
Gaussian transitions. The student learns in two stages:

1. Regression: at the four states of a guided teacher's trajectory, predict where the trajectory ends
   (Salimans & Ho 2022 do so step by step). One network call then gives an image, a blurred one where the end
   is hard to tell.
2. Distribution matching (Yin et al. 2024, DMD and DMD2): along its own chain, the student's images move by
   the difference between the guided teacher's prediction and that of a network which learns to denoise the
   student's images; the regression goes on beside it and keeps all modes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.playground import sd
from diffalign.playground.fit import fit
from diffalign.playground.world import scene
from diffalign.solvers.dpm_solver_pp import DPMSolverPPScheduler
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import convert
from diffalign.solvers.sampling import sample

TIMES = (999, 749, 499, 249)
"""Times at which the student is asked, the first with pure noise: (n - j) 1000 / n - 1 for n = 4."""

GUIDANCE = 4.0
"""Scale of the teacher's guidance, which becomes part of the student."""

_TEACHER_STEPS = 12  # a multiple of len(TIMES), so that an evenly spaced grid passes through TIMES


def make_scheduler(teacher: Any) -> Any:
    """Predict the clean image, noise again; 1 to 4 steps fall on `TIMES`.

    Args:
        teacher: the scheduler of the teacher, whose noise schedule it keeps.
    """
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    return LCMScheduler(
        **{key: teacher.config[key] for key in kept},
        original_inference_steps=len(TIMES),
        prediction_type="v_prediction",
        steps_offset=1,  # no effect, but StableDiffusionPipeline warns of any other value
    )


def guided(unet: Any, empty: Tensor, condition: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``eps(x, t)`` with classifier-free guidance of scale `GUIDANCE`.

    Args:
        unet: predicts epsilon.
        empty: (1, tokens, width) of the empty caption.
        condition: (B, tokens, width).
    """
    both = torch.cat([empty.expand_as(condition), condition])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        twice = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
        times = t.expand(len(x)).repeat(2).float()
        without, with_ = unet(twice, times, both).sample.chunk(2)
        return without + GUIDANCE * (with_ - without)

    return eps


@torch.no_grad()
def trajectories(
    folder: Path, teacher: Any, conditions: Tensor, empty: Tensor, *, seed: int, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Where the guided teacher is at `TIMES` and where it ends; kept in ``folder``, so a second call resumes.

    Args:
        conditions: (N, tokens, width) of captions.
        empty: (1, tokens, width).

    Returns:
        States (N, 4, C, h, w) and ends (N, C, h, w), both float16.
    """
    scheduler = DPMSolverPPScheduler.from_config(teacher.scheduler.config)
    grid = np.linspace(TIMES[0], -1, _TEACHER_STEPS, endpoint=False)
    every = _TEACHER_STEPS // len(TIMES)
    side, channels = teacher.unet.config.sample_size, teacher.unet.config.in_channels
    states, ends = [], []
    starts = tqdm(range(0, len(conditions), batch_size), desc="teacher's trajectories", unit="batch")
    for start in starts:
        file = folder / f"trajectories-{start:06d}.safetensors"
        if not file.exists():
            chosen = conditions[start : start + batch_size]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            noise = torch.randn(len(chosen), channels, side, side, generator=generator)
            seen = [noise]

            def keep(i: int, _t: Tensor, x: Tensor, seen: list[Tensor] = seen) -> None:
                if (i + 1) % every == 0:
                    seen.append(x)

            sample(
                guided(teacher.unet, empty, chosen), noise, scheduler, timesteps=grid.tolist(), callback=keep
            )
            partial = file.with_suffix(".partial")
            save_file({"states": torch.stack(seen[:-1], 1).half(), "ends": seen[-1].half()}, partial)
            partial.replace(file)
        saved = load_file(file)
        states.append(saved["states"])
        ends.append(saved["ends"])
    return torch.cat(states), torch.cat(ends)


class Student:
    """The student's network as a function to clean images, and its chain.

    Args:
        unet: predicts v on ``schedule``.
        schedule: of the teacher.
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule) -> None:
        self.unet = unet
        self.alpha = torch.tensor(schedule.alpha(TIMES), dtype=torch.float32)
        self.sigma = torch.tensor(schedule.sigma(TIMES), dtype=torch.float32)

    def clean(self, x: Tensor, place: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w) predicted clean images at states ``x`` of times ``TIMES[place]``, ``place`` (B,)."""
        t = torch.tensor(TIMES)[place]
        v = self.unet(x.contiguous(memory_format=torch.channels_last), t, condition).sample
        return convert(v, x, self.alpha[place], self.sigma[place], source="v_prediction", to="sample")

    @torch.no_grad()
    def arrive(self, noise: Tensor, place: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """States at ``TIMES[place]`` of chains that start at ``noise`` (DMD2's backward simulation)."""
        x = noise
        for step in range(int(place.max())):
            going = place > step
            at = torch.full((int(going.sum()),), step)
            x0 = self.clean(x[going], at, condition[going])
            fresh = torch.randn(x0.shape, generator=generator)
            x = x.clone()
            x[going] = self.alpha[step + 1] * x0 + self.sigma[step + 1] * fresh
        return x


def train(
    folder: Path,
    teacher: Any,
    captions: list[str],
    *,
    steps: int,
    matching_steps: int,
    seed: int,
    batch_size: int = 32,
    every: int = 500,
) -> tuple[Any, float]:
    """Distil ``teacher``; its text encoder and autoencoder stay as they are.

    Args:
        teacher: the pipeline of Stable Diffusion shape that is taught from; predicts epsilon.
        captions: one trajectory of the teacher is drawn for each.
        steps: of the regression.
        matching_steps: of distribution matching, about three times as dear each.

    Returns:
        The pipeline with averaged weights, and the training seconds.
    """
    schedule = NoiseSchedule.from_config(teacher.scheduler.config)
    teacher.unet.to(memory_format=torch.channels_last)
    unet, critic = copy.deepcopy(teacher.unet), copy.deepcopy(teacher.unet)
    student = Student(unet, schedule)
    pipe = sd.with_network(teacher, unet, make_scheduler(teacher.scheduler))
    with torch.no_grad():
        ids = sd.tokenize(pipe.tokenizer, ["", *captions]).split(500)
        empty, conditions = torch.cat([pipe.text_encoder(i).last_hidden_state for i in ids]).split(
            [1, len(captions)]
        )
    states, ends = trajectories(folder, teacher, conditions, empty, seed=seed)

    def regression(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ends), (batch_size,), generator=generator)
        place = torch.randperm(batch_size, generator=generator) % len(TIMES)
        predicted = student.clean(states[rows, place].float(), place, conditions[rows])
        return F.mse_loss(predicted, ends[rows].float())

    def matching(generator: torch.Generator) -> Tensor:
        condition = conditions[torch.randint(len(ends), (batch_size,), generator=generator)]
        noise = torch.randn(batch_size, *ends.shape[1:], generator=generator)
        place = torch.randperm(batch_size, generator=generator) % len(TIMES)
        x0 = student.clean(student.arrive(noise, place, condition, generator), place, condition)

        t = 20 + 960 * sd.stratified(batch_size, generator)
        alpha, sigma = (torch.from_numpy(v).float() for v in schedule.alpha_sigma(t.numpy()))
        eps = torch.randn(x0.shape, generator=generator)
        still = x0.detach()
        x = alpha[:, None, None, None] * still + sigma[:, None, None, None] * eps
        guess = critic(x.contiguous(memory_format=torch.channels_last), t, condition).sample
        with torch.no_grad():
            to_clean = {"source": "epsilon", "to": "sample"}
            real = convert(guided(teacher.unet, empty, condition)(x, t), x, alpha, sigma, **to_clean)
            fake = convert(guess, x, alpha, sigma, **to_clean)
            # Equation 8 of DMD: the difference of the two scores, in units of the teacher's own error.
            scale = (still - real).abs().mean((1, 2, 3), keepdim=True)
            target = still - (fake - real) / scale
        return 0.5 * F.mse_loss(x0, target) + F.mse_loss(guess, eps) + 0.25 * regression(generator)

    def evaluate(name: str) -> Callable[[int], dict[str, float]]:
        return lambda step: sd.judge(
            pipe, prompts=100, seed=1, steps=4, guidance=1.0, sheet=folder / f"{name}-{step:05d}.png"
        )

    shared: dict[str, Any] = {"seed": seed, "betas": (0.9, 0.99), "every": every}
    seconds = fit(
        "regression",
        folder,
        {"unet": unet},
        lambda _, generator: regression(generator),
        steps=steps,
        learning_rate=1e-3,
        ema_decay=0.998,
        evaluate=evaluate("regression"),
        **shared,
    )
    seconds += fit(
        "matching",
        folder,
        {"unet": unet, "critic": critic},
        lambda _, generator: matching(generator),
        steps=matching_steps,
        learning_rate=2e-4,
        ema_decay=0.99,
        evaluate=evaluate("matching"),
        **shared,
    )
    return pipe, seconds


def build(
    output: Path,
    work: Path,
    teacher: Any,
    *,
    images: int,
    steps: int,
    matching_steps: int,
    seed: int,
    eval_prompts: int,
) -> dict[str, float]:
    """Train the few-step model and write ``output`` as an ordinary pipeline folder.

    Returns:
        Seconds and accuracies, for the README; ``true`` is of four steps, ``true_2`` and ``true_1`` of fewer.
    """
    began = time.perf_counter()
    captions = [scene(seed, i).caption for i in range(images)]
    pipe, seconds = train(work, teacher, captions, steps=steps, matching_steps=matching_steps, seed=seed)
    facts = sd.ship(pipe, output, eval_prompts, steps=4, guidance=1.0)
    shipped = StableDiffusionPipeline.from_pretrained(output)
    for n in (2, 1):
        judged = sd.judge(shipped, prompts=eval_prompts, seed=2, steps=n, guidance=1.0)
        facts[f"true_{n}"] = judged["true"]
    return facts | {"training_seconds": seconds, "seconds": time.perf_counter() - began}
