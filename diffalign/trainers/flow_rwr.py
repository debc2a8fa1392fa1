"""Reward-weighted regression (Flow-RWR, Liu et al. 2025; RWR, Lee et al. 2023): fine-tuning in which better
images of a prompt count for more.

    loss = w (f(x_t, t, c) - y)^2,    w = K softmax(r / tau) over the K images of a prompt

The weight ``exp(r / tau)`` is that of the paper, up to a factor per prompt that makes the mean weight 1: a
prompt counts the same whatever its rewards, and a constant added to them changes nothing. No reference, no
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.data import ImageDataset, open_scored
from diffalign.data.cache import CachedExamples
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import DenoisingConfig, DenoisingTrainer

Array = NDArray[np.float64]


def _softmax(rewards: Array, tau: float) -> Array:
    weights = np.exp((rewards - rewards.max()) / tau)
    return weights / weights.mean()


def _best(rewards: Array, tau: float) -> Array:
    return (rewards == rewards.max()).astype(np.float64)


#: name -> weights of the images of one prompt, from their rewards and tau
REWARD_WEIGHTS: dict[str, Callable[[Array, float], Array]] = {
    "softmax": _softmax,
    "raw": lambda rewards, tau: rewards,
    "best_of_group": _best,
}


def reward_weights(
    rewards: Sequence[float] | Array, groups: Iterable[Any], kind: str = "softmax", *, tau: float = 1.0
) -> Array:
    """How much each image counts, ``(N,)`` float64.

    Args:
        rewards: ``(N,)``, higher is better.
        groups: ``(N,)`` labels; images of one prompt share one.
        kind: ``softmax``: ``K softmax(rewards / tau)`` over the K images of a group, mean 1. As published in
            code: ``raw``, the reward itself (images of negative reward are pushed away, without bound), and
            ``best_of_group``, 1 for the best image of a group, or each of several equal ones, else 0.
        tau: of ``softmax``, in the unit of the rewards; the smaller, the more the best image counts.
    """
    values, weights = np.asarray(rewards, np.float64), np.empty(len(rewards))
    labels = np.unique(np.asarray(list(groups)), return_inverse=True)[1]
    for label in range(labels.max(initial=-1) + 1):
        group = labels == label
        weights[group] = REWARD_WEIGHTS[kind](values[group], tau)
    return weights


@dataclass(kw_only=True)
class FlowRWRConfig(DenoisingConfig):
    """Flow-RWR: fine-tune a model on scored images, the better ones counting for more.

    The data are lists (prompt, images, scores), pairs with scores, or single images with prompt and score;
    'diffalign data score' writes scores. Made for flow models, right for any other.

    Args:
        reward_weights: softmax, the better the more, mean 1 for each prompt; raw, the score itself, and
            best_of_group, the best images of each prompt alone, are what published code does.
        tau: of softmax, in the unit of the scores: a score higher by tau counts e times as much.
    """

    learning_rate: float = 1e-5
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    reward_weights: Literal["softmax", "raw", "best_of_group"] = "softmax"
    tau: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("tau", self.tau > 0, "above 0")
        kinds = ", ".join(REWARD_WEIGHTS)
        self._need("reward_weights", self.reward_weights in REWARD_WEIGHTS, f"one of {kinds}")
        self._need("reference_draws", self.reference_draws == 0, "0: Flow-RWR has no reference")


class FlowRWRTrainer(DenoisingTrainer[FlowRWRConfig]):
    """``FlowRWRTrainer(config, model=pipeline_or_path, dataset=scored_or_path).train()``, with the data from
    :func:`diffalign.data.open_scored`."""

    method = "flow-rwr"
    shardable = True
    needs_reference = False
    watched = ""

    def open_examples(self, source: Any, limit: int | None) -> ImageDataset:
        config = self.config
        if isinstance(source, ImageDataset):
            examples = source[:limit] if limit else source
        else:
            examples = open_scored(
                source,
                split=config.dataset_split,
                columns=config.columns or None,
                limit=limit,
                max_bad=config.max_bad,
            )
        if config.reward_weights != "raw" and len(set(examples.prompts)) == len(examples):
            raise UserError(
                f"every prompt of {examples.source} has one image, so none is better than another: give "
                "several scored images of a prompt"
            )
        # An image of weight 0 would cost a step and teach nothing.
        return examples.select(np.flatnonzero(self._weights(examples)).tolist())

    def _weights(self, examples: ImageDataset) -> Array:
        scores = [score for score in examples.scores if score is not None]
        if len(scores) < len(examples):
            raise UserError(f"{examples.source} has images without a score: open it with open_scored")
        config = self.config
        return reward_weights(scores, examples.prompts, config.reward_weights, tau=config.tau)

    def encode(self) -> None:
        super().encode()
        self.data = self._weighted(self.examples, self.data)
        if self.validation_data is not None:
            self.validation_data = self._weighted(self.held_out, self.validation_data)

    def _weighted(self, examples: Any, data: CachedExamples) -> CachedExamples:
        """By id, since a row may stand in for a damaged one."""
        weight = dict(zip(examples.ids, self._weights(examples), strict=True))
        return replace(data, weight=torch.tensor([weight[row] for row in data.ids], dtype=torch.float32))

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        batch = self.batch(step, slots)
        errors = self._errors(batch).policy
        weight, plain = batch.weight, errors.detach().float()
        empty = torch.tensor(float(batch.empty), device=errors.device)
        sums = [plain.sum(), (weight * plain).sum(), weight.sum(), weight.square().sum(), empty]
        return weight * errors, torch.stack(sums)

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        error, weighted, weight, square, empty = sums
        return {
            "errors/mean": error / pairs,
            "errors/weighted": weighted / pairs,
            "weights/mean": weight / pairs,
            "weights/effective": weight * weight / (pairs * square) if square else 0.0,
            "empty_captions": empty / pairs,
            "truncated_captions": self.truncated,
            "skipped_rows": len(self.examples.skipped),
        }

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        assert self.validation_data is not None
        mean = errors.policy[..., 0].mean(1)
        weight = self.validation_data.weight.to(mean)
        return {
            "validation/errors/mean": mean.mean().item(),
            "validation/errors/weighted": (weight * mean).mean().item(),
        }


def run(config: FlowRWRConfig) -> TrainResult:
    """The command ``diffalign train flow-rwr``."""
    return run_once(FlowRWRTrainer(config))
