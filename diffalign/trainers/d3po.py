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

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.losses import clip_log_ratio, sigmoid
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.groups import COMPARISONS
from diffalign.trainers.online import Item, Members, OnlineConfig, OnlineTrainer


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

    Args:
        compare: all pairs of a prompt's images that differ, or best_worst alone; random_reward is the
            published rule of PSO's Turbo script (first two images, one reward at random, ties to the second).
    """

    same_start: bool = True
    compare: Literal["all", "best_worst", "random_reward"] = "all"

    def check(self) -> None:
        super().check()
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

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        compare = COMPARISONS[self.config.compare]
        found = []
        for prompt, group in enumerate(rewards):
            pairs = compare(group, numbers)
            members = sorted({image for pair in pairs for image in pair})
            place = {image: m for m, image in enumerate(members)}
            placed = tuple((place[w], place[l]) for w, l in pairs)  # noqa: E741
            found += [
                Item(
                    int(step),
                    prompt,
                    tuple(index[prompt, members, step].tolist()),
                    tuple(index[prompt, members, step + 1].tolist()),
                    placed,
                )
                for step in self.steps
                if pairs
            ]
        return found


def run(config: D3POConfig) -> TrainResult:
    """The command ``diffalign train d3po``."""
    return run_once(D3POTrainer(config))
