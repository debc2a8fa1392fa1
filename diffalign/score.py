"""``diffalign data score``: what a reward thinks of both images of every pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from diffalign.data.convert import CopyConfig, copy
from diffalign.data.pairs import Pair
from diffalign.errors import UserError
from diffalign.rewards import Aggregate, Reward, RewardSpec, load_rewards, score_images
from diffalign.rewards.preprocess import Preprocess


@dataclass(kw_only=True)
class ScoreConfig(CopyConfig):
    """Score both images of every pair and write a copy with score_chosen and score_rejected.

    Read it with selection.label_by=scores and the better score wins; selection.margin asks for a difference.

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
        batch_size: images in one call of the reward.
        device: cpu, cuda, ...
    """

    rewards: list[RewardSpec | str] = field(default_factory=lambda: ["playground/scorer"])
    aggregate: Aggregate = "sum"
    coefficient: float = 1.0
    rejected_score: float | None = None
    preprocess: Preprocess = "tensor"
    relabel: bool = False
    batch_size: int = 32
    device: str = "cpu"
    shard_rows: int = 256


def add_scores(
    pairs: list[Pair], reward: Reward, *, relabel: bool = False, batch_size: int = 32
) -> list[Pair]:
    """The pairs with a score for each image; with `relabel` the better score is the chosen one."""
    images = [image for pair in pairs for image in (pair.chosen, pair.rejected)]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    scores = score_images(reward, images, prompts, batch_size=batch_size).reshape(-1, 2)
    scored = [
        replace(pair, scores=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True)
    ]
    return [_relabelled(pair) for pair in scored] if relabel else scored


def run(config: ScoreConfig) -> Path:
    """The command ``diffalign data score``; returns the folder.

    Raises:
        UserError: pairs, rewards or output folder can't be used.
    """
    if config.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {config.batch_size}")
    dataset = config.open()
    reward = load_rewards(
        config.rewards,
        aggregate=config.aggregate,
        coefficient=config.coefficient,
        rejected_score=config.rejected_score,
        device=config.device,
        preprocess=config.preprocess,
    )
    decides = ("rewards", "aggregate", "coefficient", "rejected_score", "preprocess", "relabel")
    settings = {name: value for name, value in asdict(config).items() if name in decides}
    return copy(
        config,
        dataset,
        lambda pairs: add_scores(pairs, reward, relabel=config.relabel, batch_size=config.batch_size),
        settings,
        "score",
    )


def _relabelled(pair: Pair) -> Pair:
    chosen, rejected = pair.scores
    if chosen == rejected:
        return replace(pair, preference=0.5)
    return replace(pair if chosen > rejected else pair.swapped(), preference=1.0)  # type: ignore[operator]
