"""D3PO (Yang et al. 2024): DPO on the steps by which the policy made its own images.

A pair of images of one prompt, sampled from the same noise, gives at every step two transitions; the better
image's sign is that of all its steps::

    r = clamp( p_policy(x' | x) / p_reference(x' | x), 1 - eps, 1 + eps )
    loss = -log s( beta (log r_winner - log r_loser) )                        (their eq. 9)

Likelihoods are means over the elements of a latent. With the published beta 0.1 and eps 0.1 the argument
stays within 0.02 and the loss within log 2 +- 0.01: it says next to nothing; look at the reward, the
log-ratios and the share of clipped ones instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.data.trajectories import Trajectories
from diffalign.data.votes import image_scores, read_votes
from diffalign.errors import UserError
from diffalign.losses import clip_log_ratio, sigmoid
from diffalign.pipelines.rollout import sampler_settings
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.groups import COMPARISONS
from diffalign.trainers.online import Item, Members, OnlineConfig, OnlineTrainer, RewardFunction, Rows


@dataclass(kw_only=True)
class PairItemConfig(OnlineConfig):
    """Options of the clipped loss on pairs of steps.

    Args:
        beta: how strongly a pair pulls.
        clip: a likelihood ratio counts within 1 +- this, and has no gradient outside; 0 does not clip.
    """

    learning_rate: float = 3e-5
    adam_weight_decay: float = 1e-4
    rank: int = 4
    beta: float = 0.1
    clip: float = 0.1

    def check(self) -> None:
        super().check()
        self._need("beta", self.beta > 0, "above 0")
        self._need("clip", 0 <= self.clip < 1, "at least 0 and below 1")


P = TypeVar("P", bound=PairItemConfig)


@dataclass(kw_only=True)
class D3POConfig(PairItemConfig):
    """D3PO: learn from comparisons of one's own samples, at every step of their trajectories.

    Instead of a reward, people can judge: sample with 'diffalign rollout', vote with 'diffalign vote', and
    give both results here. Nothing is sampled then.

    Args:
        trajectories: folder of 'diffalign rollout'; the options of the sampler must be those it was made
            with.
        votes: file of 'diffalign vote' on its images.
        compare: all pairs of a prompt's images that differ, or best_worst alone; random_reward is the
            published rule of PSO's Turbo script (first two images, one reward at random for each step, ties
            to the second).
    """

    same_start: bool = True
    compare: Literal["all", "best_worst", "random_reward"] = "all"
    trajectories: str | None = None
    votes: str | None = None

    def check(self) -> None:
        super().check()
        if bool(self.trajectories) != bool(self.votes):
            raise UserError("trajectories and votes belong together: give both, or neither and rewards")
        if self.trajectories and self.rewards:
            raise UserError("votes judge the images of trajectories: leave rewards out")
        self._need("images_per_prompt", self.images_per_prompt >= 2, "at least 2: they are compared")


class PairItemTrainer(OnlineTrainer[P]):
    """Winners against losers among the steps of trajectories, in the clipped form of D3PO, SPO and PSO."""

    def item_losses(self, members: Members) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        with torch.no_grad():
            reference = members.gaussian(reference=True)
        policy = members.gaussian()
        ratio = members.log_ratio(policy, reference)
        held = clip_log_ratio(ratio, config.clip) if config.clip else ratio
        winner, loser = held[members.winner], held[members.loser]
        losses = members.per_pairs(sigmoid(winner, loser, config.beta))
        ratio = ratio.detach()
        margin = ratio[members.winner] - ratio[members.loser]
        clipped = (held.detach() != ratio).float()
        return losses, {
            "rewards/chosen": members.per_pairs(config.beta * ratio[members.winner]),
            "rewards/rejected": members.per_pairs(config.beta * ratio[members.loser]),
            "rewards/margins": members.per_pairs(config.beta * margin),
            "rewards/accuracies": members.per_pairs((margin > 0).float() + 0.5 * (margin == 0)),
            "clipped": members.per_item(clipped),
            "kl": members.per_state(policy.kl(reference).detach()),
        }


class D3POTrainer(PairItemTrainer[D3POConfig]):
    """``D3POTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``."""

    method = "d3po"

    def __init__(
        self,
        config: D3POConfig,
        model: Any = None,
        dataset: Any = None,
        reward: RewardFunction | None = None,
    ) -> None:
        self.recorded: Trajectories | None = None
        if config.trajectories and config.votes:
            self.recorded = Trajectories(config.trajectories)
            dataset, reward = _voted(self.recorded, config.votes), _never
        super().__init__(config, model, dataset, reward)

    def prepare(self) -> None:
        super().prepare()
        if self.recorded is None:
            return
        own = sampler_settings(self.config, self.config.resolution, self.transition)
        for name, value in self.recorded.settings.items():
            if own[name] != value:
                raise UserError(
                    f"the trajectories were sampled with {name} {value}, but this run has {own[name]}: "
                    "a policy is trained as it was sampled"
                )
        scores = image_scores(read_votes(str(self.config.votes)))
        self._scores = {prompt: _row(images, scores) for prompt, images in self._images().items()}

    def _images(self) -> dict[str, list[str]]:
        """Prompt -> its images, as the votes call them."""
        assert self.recorded is not None
        where = Path(str(self.config.votes)).expanduser().parent
        return {
            prompt: [Path(os.path.relpath(self.recorded.folder / name, where)).as_posix() for name in names]
            for prompt, names in self.recorded.images.items()
        }

    def sample_rows(
        self, rows: Rows, after_step: Callable[[], object]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.recorded is None:
            return super().sample_rows(rows, after_step)
        prompts = rows.texts[:: self.config.images_per_prompt]
        states = torch.cat([self.recorded.states(prompt) for prompt in prompts])
        scores = torch.cat([self._scores[prompt] for prompt in prompts])
        return states.to(self.adapter.dtype), None, scores[:, None]

    def round_metrics(self, rewards: np.ndarray) -> dict[str, float]:
        return super().round_metrics(rewards) if self.recorded is None else {}

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        compare = COMPARISONS[self.config.compare]
        found = []
        for prompt, group in enumerate(rewards):
            for step in self.steps:
                pairs = compare(group, numbers)
                if not pairs:
                    continue
                members = sorted({image for pair in pairs for image in pair})
                place = {image: m for m, image in enumerate(members)}
                found.append(
                    Item(
                        int(step),
                        prompt,
                        tuple(index[prompt, members, step].tolist()),
                        tuple(index[prompt, members, step + 1].tolist()),
                        tuple((place[w], place[l]) for w, l in pairs),  # noqa: E741
                    )
                )
        return found


def _voted(recorded: Trajectories, votes: str) -> list[str]:
    """The prompts with a vote."""
    prompts = {vote.prompt for vote in read_votes(votes)}
    found = [prompt for prompt in recorded.images if prompt in prompts]
    if not found:
        raise UserError(f"no vote in {votes} is about a prompt of {recorded.folder}")
    return found


def _row(images: list[str], scores: Mapping[str, float]) -> Tensor:
    """Scores ``(K,)``, NaN where nobody judged: such an image is in no pair."""
    return torch.tensor([scores.get(image, math.nan) for image in images])


def _never(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise AssertionError("images of trajectories are judged by people")


def run(config: D3POConfig) -> TrainResult:
    """The command ``diffalign train d3po``."""
    return run_once(D3POTrainer(config))
