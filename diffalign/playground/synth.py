"""A set of pairs with the columns of Pick-a-Pic, rendered instead of sampled and judged by the verifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffalign.data.images import digest
from diffalign.data.write import check_target, encoded, pick_a_pic_row, put_in_place, write_pick_a_pic
from diffalign.errors import UserError
from diffalign.playground.captions import draw_claim
from diffalign.playground.scorer import damage
from diffalign.playground.verifier import find, judge
from diffalign.playground.world import draw_scene, render

SHARD_ROWS = 500
FAULTS = ("truncated image", "missing image", "empty caption", "identical images")


@dataclass(kw_only=True)
class SynthConfig:
    """Write train-*.parquet with the columns of Pick-a-Pic from the playground's renderer and verifier.

    In each pair one picture shows the caption and the other fails it; the verifier says so. The options
    add what real sets suffer from. A row is a function of seed and row number.

    Attributes:
        output_dir: folder for the set.
        pairs: rows to write.
        seed: of everything.
        ties: share of rows with two right pictures and an even vote.
        unlabelled: share of rows that nobody voted on.
        damaged: share of rows that can't be used: a cut image, none, no caption, twice the same image.
        repeats: share of rows that show the pair of the row before again, with a vote drawn afresh.
        overwrite: replace pairs that are in output_dir.
    """

    output_dir: str
    pairs: int = 200
    seed: int = 0
    ties: float = 0.0
    unlabelled: float = 0.0
    damaged: float = 0.0
    repeats: float = 0.0
    overwrite: bool = False


@dataclass(frozen=True)
class _Question:
    """Two pictures for one caption."""

    prompt: str
    images: tuple[bytes, bytes]
    label_0: float


def rows(config: SynthConfig) -> Iterator[dict[str, Any]]:
    """The rows of a set, in the columns of Pick-a-Pic."""
    question = _question(config, 0)
    for number in range(config.pairs):
        rng = np.random.default_rng([config.seed, number, 2])
        repeated, unlabelled, damaged = rng.random(3) < (config.repeats, config.unlabelled, config.damaged)
        if repeated and number:
            question = replace(question, label_0=float(rng.integers(2)))
        else:
            question = _question(config, number)
        files: list[bytes | None] = list(question.images)
        prompt = question.prompt
        if damaged:
            fault = FAULTS[rng.integers(len(FAULTS))]
            if fault == "truncated image":
                files[1] = question.images[1][: len(question.images[1]) // 2]
            elif fault == "missing image":
                files[0] = None
            elif fault == "empty caption":
                prompt = ""
            else:
                files[1] = files[0]
        yield pick_a_pic_row(
            str(number),
            prompt,
            files,
            [digest(file) if file else "" for file in files],
            ("renderer", "renderer"),
            None if unlabelled else question.label_0,
        )


def run(config: SynthConfig) -> Path:
    """The command ``diffalign data synth``; returns the folder.

    Raises:
        UserError: a share that is none, or a folder in use.
    """
    if config.pairs < 1:
        raise UserError(f"pairs must be at least 1, not {config.pairs}")
    for name in ("ties", "unlabelled", "damaged", "repeats"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is a share between 0 and 1, not {getattr(config, name)}")
    folder = check_target(config.output_dir, config.overwrite)
    rest = iter(tqdm(rows(config), "rendering", total=config.pairs, unit="pair", disable=None))
    new = folder.with_name(f".{folder.name}.synth")
    new.mkdir(exist_ok=True)
    for shard, first in enumerate(rest):
        path = new / f"train-{shard:05d}.parquet"
        write_pick_a_pic(path, list(chain([first], islice(rest, SHARD_ROWS - 1))))
    put_in_place(new, folder)
    print(f"wrote {config.pairs:,} rows to {folder}")
    return folder


def _question(config: SynthConfig, number: int) -> _Question:
    rng = np.random.default_rng([config.seed, number, 3])
    claim = draw_claim(rng)
    right = render(draw_scene(claim, rng))
    other = draw_scene(claim, rng)
    if rng.random() < config.ties:
        return _Question(str(claim), (_png(right), _png(render(other))), 0.5)
    while judge(claim, *find(wrong := damage(other, rng))).true:
        pass  # not every fault makes a caption false
    images = (_png(right), _png(wrong))
    return (
        _Question(str(claim), images, 1.0) if rng.random() < 0.5 else _Question(str(claim), images[::-1], 0.0)
    )


def _png(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image))[0]
