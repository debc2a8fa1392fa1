"""SPO (Liang et al. 2024): preferences of single denoising steps instead of whole images.

From one state x several next states are drawn. A reward that knows how noisy things still were judges what
the network makes of each; the best and the worst are a pair, and a random one goes on. The loss is D3PO's on
both, whose likelihoods differ in the state after the step alone::

    r = clamp( p_policy(x' | x) / p_reference(x' | x), 1 - eps, 1 + eps )
    loss = -log s( beta (log r_best - log r_worst) )

So a pair says nothing about how its state was reached, and takes one evaluation of the policy and one of the
reference, as both members share x. A pair is kept if the scores, as logits of two choices, differ by more
than a threshold in probability: ``tanh((s_best - s_worst) / 2) > threshold``.

For SDXL each candidate takes some ordinary steps of its own before it is judged; those are learnt from as
well, with a state of each member.

The network's answer at x is the mean of all candidates, so comparing all of them, not the best and the worst
alone, costs no further evaluation in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import UserError
from diffalign.pipelines.branches import Branches, branched_rollout
from diffalign.rewards import Reward
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.d3po import PairItemConfig, PairItemTrainer
from diffalign.trainers.groups import COMPARISONS
from diffalign.trainers.online import Item, Rows, reward_metrics

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SPOConfig(PairItemConfig):
    """SPO: learn from comparisons of the next states of one state, step by step.

    Defaults are those published for Stable Diffusion 1.5. Give a step-aware reward, such as
    --rewards '[step-aware=models/spm]'; another one judges predicted images as if they were finished.

    Args:
        candidates: next states that are drawn from one state and compared.
        branch_from: the first step that draws candidates, counted from 0.
        inner_steps: ordinary steps of each candidate before it is judged.
        threshold: a pair is kept if its scores, as two choices, differ by more than this in probability.
        compare: best_worst, as published, or all pairs of candidates, at the same price in training.
        images_per_prompt: trajectories of each prompt.
        sample_batch_size: images per network call while sampling, the candidates of a trajectory together.
    """

    learning_rate: float = 6e-5
    beta: float = 10.0
    images_per_prompt: int = 1
    candidates: int = 4
    branch_from: int = 4
    inner_steps: int = 0
    threshold: float = 0.3
    compare: Literal["best_worst", "all"] = "best_worst"

    def check(self) -> None:
        super().check()
        steps = len(self.sample_timesteps) or self.sample_steps
        self._need("candidates", self.candidates >= 2, "at least 2: they are compared")
        self._need("branch_from", 0 <= self.branch_from < steps, f"a step, 0 to {steps - 1}")
        self._need("inner_steps", self.inner_steps >= 0, "0 or more")
        self._need("threshold", 0 <= self.threshold < 1, "at least 0 and below 1")
        self._need("compare", self.compare in ("best_worst", "all"), "best_worst or all")
        if self.aggregate == "pareto":
            raise UserError("SPO takes best and worst by one score: aggregate must be sum, wco or uwo")


def best_and_worst(
    scores: NDArray[np.float64], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Which of the last axis of ``scores (..., k)`` are best and worst, and whether they differ by more than
    ``threshold`` in probability; each ``(...)``."""
    return scores.argmax(-1), scores.argmin(-1), differ(np.ptp(scores, axis=-1), threshold)


def differ(gap: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Whether two scores with this ``gap``, as logits of two choices, differ by more than ``threshold`` in
    probability."""
    return np.tanh(gap / 2) > threshold


class SPOTrainer(PairItemTrainer[SPOConfig]):
    """``SPOTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``.

    ``reward`` may be a :class:`~diffalign.rewards.Reward` that is ``step_aware``; it is told the time.
    """

    method = "spo"

    def prepare(self) -> None:
        super().prepare()
        config = self.config
        self.branches = Branches.every(
            self.transition, config.candidates, first=config.branch_from, inner_steps=config.inner_steps
        )
        if not self.branches.starts or self.branches.starts[0] > self.steps[-1]:
            raise UserError(
                f"branch_from {config.branch_from} leaves no step that adds noise and is trained on: the "
                f"last of {len(self.transition)} is step {self.steps[-1]}"
            )
        self._knows_time = isinstance(self.reward, Reward) and self.reward.step_aware
        if not self._knows_time and self.accelerator.is_main_process:
            logger.warning(
                "%s judges what the network predicts at noisy times as if it were finished; a step-aware "
                "reward (step-aware=...) knows better",
                self.reward.name if isinstance(self.reward, Reward) else "the reward function",
            )

    @property
    def rows_per_call(self) -> int:
        return max(1, self.config.sample_batch_size // self.config.candidates)

    def sample_rows(self, rows: Rows, after_step: Callable[[], object]) -> tuple[Tensor, None, Tensor]:
        """States ``(rows, len(branches), ...)`` and scores ``(rows, segments, candidates, R)``."""

        def judge(latents: Tensor, places: Sequence[int], time: float) -> Tensor:
            at = {"timesteps": time} if self._knows_time else {}
            return self.judged(latents, [rows.texts[place] for place in places], **at)

        states, scores = branched_rollout(
            self.adapter,
            self.transition,
            self.guidance,
            rows.prompts,
            self.branches,
            judge,
            **self.drawn_as(rows, after_step),
        )
        return states, None, scores

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        branches, trained = self.branches, set(self.steps.tolist())
        scores = rewards.sum(-1)
        found = []
        for prompt, image, segment in np.ndindex(scores.shape[:-1]):
            pairs = self._pairs(scores[prompt, image, segment])
            members = list(dict.fromkeys(member for pair in pairs for member in pair))
            placed = tuple((members.index(w), members.index(l)) for w, l in pairs)  # noqa: E741
            own = index[prompt, image]
            before: tuple[int, ...] = (int(own[branches.origin(segment)]),)  # both members'
            for step in branches.segments[segment]:
                after = tuple(int(own[branches.after(segment, step, member)]) for member in members)
                if step in trained and pairs:
                    found.append(Item(step, prompt, before, after, placed))
                before = after
        return found

    def _pairs(self, scores: NDArray[np.float64]) -> list[tuple[int, int]]:
        """Winners and losers among the candidates of one state, whose ``scores (k,)`` differ by enough."""
        found = COMPARISONS[self.config.compare](scores, None)
        return [(w, l) for w, l in found if differ(scores[w] - scores[l], self.config.threshold)]  # noqa: E741

    def round_metrics(self, rewards: np.ndarray) -> dict[str, float]:
        """Rewards of the finished images, and the share of branchings that gave a pair."""
        *_, kept = best_and_worst(rewards.sum(-1), self.config.threshold)
        finished = rewards[:, :, -1].reshape(len(rewards), -1, rewards.shape[-1])
        return {**reward_metrics(finished), "pairs_kept": float(kept.mean())}

    def _why_empty(self, current: Any) -> str:
        if current.items:
            return super()._why_empty(current)
        return f"no best candidate beat the worst by threshold {self.config.threshold}: lower --threshold"


def run(config: SPOConfig) -> TrainResult:
    """The command ``diffalign train spo``."""
    return run_once(SPOTrainer(config))
