"""Preference pairs from a model's own samples, labelled by the learned scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from diffalign.data import Pair, ScoredImages, write_lists, write_pairs
from diffalign.errors import UserError
from diffalign.pipelines.generate import generate
from diffalign.playground.captions import draw_captions


@dataclass
class PairsConfig:
    """Sample a playground model and let the scorer pick the best and the worst image of each caption.

    Writes a folder of images with pairs.jsonl (prompt, chosen, rejected), ready for 'diffalign train'; with
    lists, (prompt, images, scores) for 'diffalign train list-dpo'.

    Args:
        output_dir: folder for the pairs.
        model: pipeline folder to sample; playground/sd is the shipped one.
        lora: folder of a LoRA to put on it, for pairs of an aligned model's own samples.
        prompts: number of captions, none of them held out.
        images: images per caption, of which the best and the worst make a pair.
        steps: sampling steps (DPM-Solver++; a few-step model has its own sampler).
        guidance: classifier-free guidance scale.
        margin: pairs whose scores differ by less are left out, and lists whose best and worst do.
        lists: write all images of each caption with their scores instead of the best and the worst.
        batch_size: images per network call.
        seed: of captions and noise.
        overwrite: replace pairs that are in output_dir.
    """

    output_dir: str = "outputs/pairs"
    model: str = "playground/sd"
    lora: str | None = None
    prompts: int = 200
    images: int = 4
    steps: int = 12
    guidance: float = 4.0
    margin: float = 1.5
    lists: bool = False
    batch_size: int = 40
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Candidates:
    """Several images of each caption, with their scores.

    Attributes:
        captions: P captions.
        images: (P, K, 64, 64, 3) uint8.
        scores: (P, K) float32, higher is better.
    """

    captions: list[str]
    images: np.ndarray
    scores: np.ndarray

    def pairs(self, margin: float = 0.0) -> list[tuple[int, int, int]]:
        """(caption, best image, worst image) wherever their scores differ by ``margin`` or more."""
        best, worst = self.scores.argmax(1), self.scores.argmin(1)
        gap = self.scores.max(1) - self.scores.min(1)
        return [
            (p, int(best[p]), int(worst[p]))
            for p in range(len(self.captions))
            if best[p] != worst[p] and gap[p] >= margin
        ]


def sampler_of(pipe: Any) -> Any:
    """What a playground model is sampled with: DPM-Solver++, and a few-step one with its own scheduler."""
    from diffusers import LCMScheduler

    from diffalign.pipelines.load import make_scheduler

    if isinstance(pipe.scheduler, LCMScheduler):
        return pipe.scheduler
    return make_scheduler("dpm-solver++", pipe.scheduler.config)


def draw_candidates(
    pipe: Any,
    scorer: Any,
    captions: Sequence[str],
    *,
    images: int = 4,
    steps: int = 10,
    guidance: float = 4.0,
    batch_size: int = 40,
    seed: int = 0,
    progress: str | None = None,
) -> Candidates:
    """Sample ``images`` pictures of each caption and score them.

    Args:
        scorer: has ``score(prompts, (N, H, W, 3) uint8) -> (N,)``.
    """
    from diffalign.rewards import score_images

    prompts = [c for c in captions for _ in range(images)]
    seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
    drawn = generate(
        pipe,
        prompts,
        seeds,
        steps=steps,
        guidance=guidance,
        scheduler=sampler_of(pipe),
        batch_size=batch_size,
        progress=progress,
    )
    scores = score_images(scorer, drawn.images, prompts)
    shape = (len(captions), images)
    return Candidates(
        list(captions), drawn.images.reshape(*shape, *drawn.images.shape[1:]), scores.reshape(shape)
    )


def run(config: PairsConfig) -> Path:
    """The command ``diffalign playground pairs``; returns the folder.

    Raises:
        UserError: no pair is left, or the folder is in use.
    """
    from diffalign.pipelines.load import load_pipeline
    from diffalign.playground import load_scorer

    if config.images < 2:
        raise UserError(f"images is {config.images}: a pair needs at least two images of a caption")
    folder = Path(config.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise UserError(f"output folder {str(folder)!r} is not empty; add --overwrite or choose another")
    candidates = draw_candidates(
        load_pipeline(config.model, lora=config.lora),
        load_scorer(),
        draw_captions(config.seed, config.prompts, held_out=False),
        images=config.images,
        steps=config.steps,
        guidance=config.guidance,
        batch_size=config.batch_size,
        seed=config.seed,
        progress="sampling candidates",
    )
    written = write_as_lists if config.lists else write
    n = written(candidates, folder, margin=config.margin, overwrite=config.overwrite)
    what = "lists" if config.lists else "pairs"
    print(f"wrote {n} {what} of {len(candidates.captions)} captions to {folder}")
    return folder


def write(candidates: Candidates, folder: Path, *, margin: float, overwrite: bool = False) -> int:
    """Write the pairs of ``candidates`` as a folder for trainers; returns their number.

    Raises:
        UserError: no pair is left, or the folder is in use.
    """
    chosen = _chosen(candidates, margin)

    def pairs() -> Iterator[Pair]:
        for p, best, worst in tqdm(chosen, desc="writing", unit="pair", leave=False):
            images = [Image.fromarray(candidates.images[p, i]) for i in (best, worst)]
            yield Pair(f"caption-{p:04d}", candidates.captions[p], images[0], images[1])

    write_pairs(folder, pairs(), overwrite=overwrite)
    return len(chosen)


def write_as_lists(candidates: Candidates, folder: Path, *, margin: float, overwrite: bool = False) -> int:
    """Write all images, with their scores, of the captions that :func:`write` makes pairs of; returns the
    number of captions.

    Raises:
        UserError: as :func:`write`.
    """
    chosen = _chosen(candidates, margin)

    def lists() -> Iterator[ScoredImages]:
        for p, _, _ in tqdm(chosen, desc="writing", unit="list", leave=False):
            images = [Image.fromarray(image) for image in candidates.images[p]]
            yield ScoredImages(
                f"caption-{p:04d}", candidates.captions[p], images, candidates.scores[p].tolist()
            )

    write_lists(folder, lists(), overwrite=overwrite)
    return len(chosen)


def _chosen(candidates: Candidates, margin: float) -> list[tuple[int, int, int]]:
    if not (chosen := candidates.pairs(margin)):
        raise UserError(f"no two scores differ by {margin} or more; lower --margin or draw more images")
    return chosen
