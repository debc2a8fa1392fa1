"""``diffalign data score``: what a reward model thinks of both images of every pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffalign.data.convert import CopyConfig, copy
from diffalign.data.pairs import Pair


class Reward(Protocol):
    """How good are images for prompts?"""

    def score(self, prompts: Sequence[str], images: np.ndarray) -> np.ndarray:
        """Rewards, (N,), of (N, H, W, 3) uint8 images; higher is better."""


@dataclass(kw_only=True)
class ScoreConfig(CopyConfig):
    """Score both images of every pair and write a copy with score_chosen and score_rejected.

    Read it with selection.label_by=scores and the better score wins; selection.margin asks for a difference.

    Attributes:
        reward: playground/scorer, or folder or hub id of an open_clip model such as PickScore.
        relabel: let the better score be the chosen image in what is written; equal scores are a tie.
        device: cpu, cuda, ...
    """

    reward: str = "playground/scorer"
    relabel: bool = False
    device: str = "cpu"
    shard_rows: int = 256


def add_scores(pairs: list[Pair], reward: Reward, *, relabel: bool = False) -> list[Pair]:
    """The pairs with a score for each image; with `relabel` the better score is the chosen one."""
    images = [np.asarray(image) for pair in pairs for image in (pair.chosen, pair.rejected)]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, image in enumerate(images):
        by_size[image.shape].append(place)
    scores = np.zeros(len(images))
    for places in by_size.values():
        scores[places] = reward.score([prompts[i] for i in places], np.stack([images[i] for i in places]))
    scored = [
        replace(pair, scores=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(pairs, scores.reshape(-1, 2), strict=True)
    ]
    return [_relabelled(pair) for pair in scored] if relabel else scored


def load_reward(name: str, device: str = "cpu") -> Any:
    """A reward model by name: the playground's scorer, or an open_clip folder or hub id.

    Raises:
        UserError: there is none.
    """
    from diffalign.playground import load_scorer
    from diffalign.rewards.open_clip import OpenCLIPReward

    reward = load_scorer() if name == "playground/scorer" else OpenCLIPReward.from_pretrained(name)
    return reward.to(device)


def run(config: ScoreConfig) -> Path:
    """The command ``diffalign data score``; returns the folder.

    Raises:
        UserError: pairs, reward model or output folder can't be used.
    """
    dataset = config.open()
    reward = load_reward(config.reward, config.device)
    settings = {"reward": config.reward, "relabel": config.relabel}
    return copy(
        config, dataset, lambda pairs: add_scores(pairs, reward, relabel=config.relabel), settings, "score"
    )


def _relabelled(pair: Pair) -> Pair:
    chosen, rejected = pair.scores
    if chosen == rejected:
        return replace(pair, preference=0.5)
    return replace(pair if chosen > rejected else pair.swapped(), preference=1.0)  # type: ignore[operator]
