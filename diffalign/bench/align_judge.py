"""How the contest judges a model: by its pictures of held-out captions, its distance from the base model, and
whether it prefers the better image of pairs that no method trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from diffalign import output

if TYPE_CHECKING:
    from diffalign.bench.align import AlignConfig

ALIKE, TWINS = 24, 4  # captions that several images are drawn of, and how many, to see how they differ
DRIFTED = 64  # images that the drift is measured on


@dataclass(frozen=True)
class Judged:
    """What one model drew for the held-out captions of one seed.

    Attributes:
        true: (N,) bool, whether the verifier finds the caption true.
        score: (N,) float, by the learned scorer.
        facts: of the images, and of the training: what :func:`train` and :func:`distance` say.
    """

    true: np.ndarray
    score: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        output.write_json(
            path, {"true": self.true.tolist(), "score": self.score.tolist(), "facts": self.facts}
        )

    @classmethod
    def read(cls, path: Path) -> Judged:
        """What :meth:`write` wrote."""
        found = json.loads(path.read_text())
        return cls(np.array(found["true"], bool), np.array(found["score"], float), found["facts"])


def judge(pipe: Any, config: AlignConfig, seed: int, facts: Mapping[str, Any]) -> Judged:
    """Held-out captions from noises that depend on the seed alone, judged by the verifier and the scorer, and
    how far the model is from the base: ``drift`` and ``diversity``."""
    from diffalign.demo import verified
    from diffalign.playground import load_scorer
    from diffalign.playground.captions import draw_captions
    from diffalign.rewards import score_images

    captions = draw_captions(1000 + seed, config.eval_prompts, held_out=True)
    first = 10_000_000 + 100_000 * seed
    images = _draw(pipe, config, captions, [first + i for i in range(len(captions))])
    scores = score_images(load_scorer(), list(images), captions)
    few = captions[:ALIKE]
    again = [c for c in few for _ in range(TWINS)]
    more = _draw(pipe, config, again, [first + 50_000 + i for i in range(len(again))])
    own = {
        "drift": drift(pipe, images[:DRIFTED], captions[:DRIFTED]),
        "diversity": diversity(more.reshape(len(few), TWINS, *more.shape[1:])),
    }
    return Judged(verified(captions, images), np.asarray(scores, dtype=np.float64), {**facts, **own})


def _draw(pipe: Any, config: AlignConfig, captions: list[str], seeds: list[int]) -> np.ndarray:
    from diffalign.pipelines.generate import generate
    from diffalign.playground.pairs import sampler_of

    return generate(
        pipe,
        captions,
        seeds,
        steps=config.steps,
        guidance=config.guidance,
        scheduler=sampler_of(pipe),
        batch_size=40,
        progress="judging",
    ).images


def diversity(images: np.ndarray) -> float:
    """Mean over captions of the distance between two images of one: ``(P, K, H, W, 3)`` uint8, K from 2; root
    mean square per channel, of 255."""
    pixels = images.reshape(*images.shape[:2], -1).astype(np.float32)
    distance = np.sqrt(np.square(pixels[:, :, None] - pixels[:, None]).mean(-1))
    count = images.shape[1]
    return float(distance.sum((1, 2)).mean() / (count * (count - 1)))


def drift(pipe: Any, images: np.ndarray, captions: list[str]) -> float:
    """How far the LoRA moved the network's output on the model's own images, as a share of that output: root
    mean square over images, times and noises. Its square is the divergence of the model from the base, with
    the same weight at every noise level."""
    import torch

    from diffalign.likelihood import add_noise
    from diffalign.models import load_adapter
    from diffalign.models.reference import adapters_off
    from diffalign.trainers.validation import TIMES

    adapter = load_adapter(pipe)
    adapter.reference = adapters_off
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    moved = norm = 0.0
    for k, part in enumerate(TIMES):
        with torch.no_grad():
            latents = adapter.encode_images(pixels)["latents"].float()
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(k))
            t = torch.full((len(latents),), int(part * adapter.schedule.num_train_timesteps))
            noised = add_noise(adapter.schedule, adapter.prediction_type, latents, noise, t)
            cond = adapter.encode_prompts(captions)
            policy, base = (adapter.denoise(noised.x_t, noised.t, cond, reference=r) for r in (False, True))
        moved += float((policy - base).square().sum())
        norm += float(base.square().sum())
    return (moved / norm) ** 0.5


def implicit_accuracy(pipe: Any, folder: Path, held_out: float) -> list[float]:
    """Of each held-out pair, whether the LoRA made the chosen image likelier by more than the rejected one.

    1, 0, or 1/2 if by as much; for all methods at the same times and noises, on captions none trained on.
    """
    import torch

    from diffalign.data import open_pairs
    from diffalign.data.transforms import fit
    from diffalign.likelihood import add_noise, evaluate
    from diffalign.models import load_adapter
    from diffalign.models.reference import adapters_off
    from diffalign.trainers.validation import TIMES

    adapter = load_adapter(pipe)
    adapter.reference = adapters_off
    pairs = open_pairs(folder).split_by_prompt(held_out)[1]
    won = []
    for i, pair in enumerate(tqdm(pairs, desc="held-out pairs", unit="pair", leave=False)):
        pixels = torch.stack([fit(image, adapter.default_resolution).pixels for image in pair.images])
        latents = adapter.encode_images(pixels)["latents"].float().repeat(len(TIMES), 1, 1, 1)
        cond = adapter.encode_prompts([pair.prompt] * len(latents))
        numbers = torch.Generator().manual_seed(i)
        noise = torch.randn(len(TIMES), *latents.shape[1:], generator=numbers).repeat_interleave(2, 0)
        t = torch.tensor([int(part * adapter.schedule.num_train_timesteps) for part in TIMES])
        noised = add_noise(
            adapter.schedule, adapter.prediction_type, latents, noise.to(latents), t.repeat_interleave(2)
        )
        with torch.no_grad():
            ratio = evaluate(adapter.denoise, noised, cond).log_ratio().reshape(-1, 2).mean(0)
        won.append(float(ratio[0] > ratio[1]) + 0.5 * float(ratio[0] == ratio[1]))
    return won
