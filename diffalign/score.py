"""``diffalign data score``: what a reward thinks of both images of every pair, or of single images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from diffalign.data.convert import CopyConfig, copy, team
from diffalign.data.pairs import Pair
from diffalign.data.rows import Selection
from diffalign.data.scored import open_unscored
from diffalign.data.unpaired import LabelledImage
from diffalign.data.write import LISTS, check_target
from diffalign.errors import UserError
from diffalign.rewards import Aggregate, Ensemble, Member, Reward, RewardSpec, load_rewards, score_images
from diffalign.rewards.preprocess import Preprocess


@dataclass(kw_only=True)
class ScoreConfig(CopyConfig):
    """Score both images of every pair and write a copy with score_chosen and score_rejected.

    Read it with selection.label_by=scores and the better score wins; selection.margin asks for a difference.
    Of single images with prompts, and of lists without scores, a folder of lists is written: the images of
    each prompt with their scores, for flow-rwr, list-dpo and all that learns from pairs.

    Attributes:
        rewards: what scores: names, with the path of the weights after an equals sign where a reward has
            some (pickscore=models/PickScore_v1), or {name: ..., path: ..., weight: ..., at_least: ...,
            options: {...}}. Names: pickscore, clip, hpsv2, aesthetic, image-reward, step-aware, multi-head,
            jpeg-compressibility, jpeg-incompressibility, playground/scorer, playground/verifier.
        aggregate: of several, their weighted sum, the worst (wco), or mean minus variance (uwo).
        coefficient: what uwo multiplies the variance with.
        rejected_score: what an image gets that a gate (at_least) rejects.
        preprocess: tensor, or pil to resize as released scorers do.
        relabel: let the better score be the chosen image in what is written; equal scores are a tie.
        unanimous: leave pairs out of which one reward prefers the one image and another reward the other;
            gates (at_least) have no say in it.
        batch_size: images in one call of the reward.
        device: cpu, cuda, ...
    """

    rewards: list[RewardSpec | str] = field(default_factory=lambda: ["playground/scorer"])
    aggregate: Aggregate = "sum"
    coefficient: float = 1.0
    rejected_score: float | None = None
    preprocess: Preprocess = "tensor"
    relabel: bool = False
    unanimous: bool = False
    batch_size: int = 32
    device: str = "cpu"
    shard_rows: int = 256


def add_scores(
    pairs: list[Pair],
    reward: Reward,
    *,
    relabel: bool = False,
    unanimous: bool = False,
    batch_size: int = 32,
) -> list[Pair | None]:
    """The pairs with a score for each image; with `relabel` the better score is the chosen one. With
    `unanimous`, None in place of those on which the members disagree."""
    images = [image for pair in pairs for image in (pair.chosen, pair.rejected)]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    several = reward if isinstance(reward, Ensemble) else Ensemble([Member(reward)])
    found = [score_images(m.reward, images, prompts, batch_size=batch_size) for m in several.members]
    parts = dict(zip(several.labels, map(torch.from_numpy, found), strict=True))
    scored = [
        replace(pair, scores=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(pairs, several.combine(parts).reshape(-1, 2), strict=True)
    ]
    labelled = [_relabelled(pair) for pair in scored] if relabel else scored
    if not unanimous:
        return list(labelled)
    first, second = ({name: scores[side::2] for name, scores in parts.items()} for side in (0, 1))
    agreed = several.unanimous(first, second).tolist()
    return [pair if agree else None for pair, agree in zip(labelled, agreed, strict=True)]


def add_image_scores(
    images: list[LabelledImage], reward: Reward, *, batch_size: int = 32
) -> list[LabelledImage]:
    """The images with a score each."""
    scores = score_images(
        reward, [i.image for i in images], [i.prompt for i in images], batch_size=batch_size
    )
    return [replace(image, score=float(score)) for image, score in zip(images, scores, strict=True)]


def run(config: ScoreConfig) -> Path:
    """The command ``diffalign data score``; returns the folder.

    Raises:
        UserError: pairs or images, rewards or output folder can't be used.
    """
    if config.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {config.batch_size}")
    team()  # before any model is loaded: each process has a device of its own
    check_target(config.output_dir, config.overwrite)
    images = open_unscored(
        config.dataset, split=config.split, columns=config.columns, limit=config.limit, max_bad=config.max_bad
    )
    if images is not None:
        _needs_no_pairs(config, images.source)
    dataset = config.open() if images is None else images
    reward = load_rewards(
        config.rewards,
        aggregate=config.aggregate,
        coefficient=config.coefficient,
        rejected_score=config.rejected_score,
        device=config.device,
        preprocess=config.preprocess,
    )
    if config.unanimous and sum(bool(m.at_least is None and m.weight) for m in reward.members) < 2:
        raise UserError("unanimous compares rewards: give two or more that are no gates and have a weight")
    decides = ("rewards", "aggregate", "coefficient", "rejected_score", "preprocess", "relabel", "unanimous")
    settings = {name: value for name, value in asdict(config).items() if name in decides}
    if images is not None:
        return copy(
            config,
            images,
            lambda some: add_image_scores(some, reward, batch_size=config.batch_size),
            settings,
            "score",
            LISTS,
        )
    return copy(
        config,
        dataset,
        lambda pairs: add_scores(
            pairs,
            reward,
            relabel=config.relabel,
            unanimous=config.unanimous,
            batch_size=config.batch_size,
        ),
        settings,
        "score",
    )


def _needs_no_pairs(config: ScoreConfig, source: str) -> None:
    """Refuse options of pairs."""
    plain = {
        "format": "folder",
        "ties": "soft",
        "selection": Selection(),
        "relabel": False,
        "unanimous": False,
    }
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name} is for pairs, but {source} holds images that nobody compared: they are written as a "
                "folder with a list of images and scores for each prompt"
            )


def _relabelled(pair: Pair) -> Pair:
    chosen, rejected = pair.scores
    if chosen == rejected:
        return replace(pair, preference=0.5)
    return replace(pair if chosen > rejected else pair.swapped(), preference=1.0)  # type: ignore[operator]
