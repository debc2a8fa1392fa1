"""Learning from one's own samples: what all on-policy methods share.

A run is a sequence of *rounds*. A round samples images of some prompts with the policy as it is, keeps the
states of their trajectories, and has them judged by a reward; its *items* are then trained on, shuffled, one
per place of the batch, and the next round begins with the policy that came out. A method says what the items
of a round are (:meth:`OnlineTrainer.items`) and what an item costs (:meth:`OnlineTrainer.item_losses`).

Every process holds the whole round in host memory, whoever sampled what, so the order of the items and the
result do not depend on the number of processes. A checkpoint holds the round as well, so that a resumed run
goes on in the middle of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import gather
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffalign.data.prompts import read_prompts
from diffalign.errors import UserError
from diffalign.likelihood import Gaussian
from diffalign.pipelines.guidance import Guidance, guidance_for
from diffalign.pipelines.rollout import SamplerConfig, decoded, rollout, stochastic, transition_for
from diffalign.rewards import Ensemble, Reward, RewardSpec, load_rewards
from diffalign.trainers import draws
from diffalign.trainers.base import Trainer
from diffalign.trainers.config import TrainConfig

O = TypeVar("O", bound="OnlineConfig")  # noqa: E741

#: images (B, 3, H, W) in [0, 1] and their prompts -> (B,) or, of several rewards, (B, R)
RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]

ROUND = "round.safetensors"
EMPTY_ROUNDS = 5  # in a row without an item, after which a run gives up


@dataclass(kw_only=True)
class OnlineConfig(SamplerConfig, TrainConfig):
    """Options of a method that learns from its own samples.

    Args:
        dataset_name: the prompts: a .txt file with one per line, or any data set with captions.
        rewards: what judges an image: names of rewards, with their weights after an equals sign
            (pickscore=models/PickScore_v1), or, in a file, settings of each; docs/rewards.md lists them.
        aggregate: how several make one: sum, wco (the worst), uwo (mean minus variance), or pareto, where an
            image beats another if it is at least as good by all of them.
        coefficient: what uwo multiplies the variance with.
        rejected_score: what an image gets that a gate (at_least) rejects; under pareto, by each reward.
        prompts_per_round: prompts that a round draws, over all processes.
        trained_steps: share of the steps of a trajectory that are trained on, from the noisy end; steps
            without noise never are.
        inner_epochs: how often the items of a round are gone through.
        step_weight: none, or inverse_kl, which gives a difference of the network's outputs the same say at
            every step.
    """

    max_train_steps: int = 1000
    rewards: list[str | RewardSpec] = field(default_factory=list)
    aggregate: Literal["sum", "wco", "uwo", "pareto"] = "sum"
    coefficient: float = 1.0
    rejected_score: float | None = None
    prompts_per_round: int = 8
    trained_steps: float = 1.0
    inner_epochs: int = 1
    step_weight: Literal["none", "inverse_kl"] = "none"

    def check(self) -> None:
        super().check()
        self.check_sampler()
        for name in ("prompts_per_round", "inner_epochs"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        self._need("trained_steps", 0 < self.trained_steps <= 1, "above 0 and at most 1")
        if self.proportion_empty_prompts:
            raise UserError("proportion_empty_prompts is for training on images; this method samples its own")


class Item(NamedTuple):
    """What one place of a batch trains on: steps of trajectories, by places in :attr:`Round.states`.

    ``step``: which step of the sampler; ``prompt``: of the round's prompts; ``x``: the states before it, one
    per member; ``after``: the states after it; ``pairs``: (winner, loser) among the members; ``values``: a
    number per member, such as its advantage.
    """

    step: int
    prompt: int
    x: tuple[int, ...]
    after: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    values: tuple[float, ...] = ()


class Rows(NamedTuple):
    """What a process samples in a round, row by row.

    ``prompts``: of the round's prompts; ``texts``: those; ``start_seeds``: of the starting noise; ``seeds``:
    of all else that is drawn.
    """

    prompts: list[int]
    texts: list[str]
    start_seeds: list[int]
    seeds: list[int]


@dataclass
class Round:
    """One round's samples and what is learnt from them.

    ``states (K, C, ...)`` in host memory, in the network's precision; ``means``: for each state the mean of
    the step that left it, where the method needs it; ``prompts``: the texts; ``metrics``: of the rewards.
    """

    number: int
    first_step: int
    prompts: list[str]
    states: Tensor
    items: list[Item]
    metrics: dict[str, float]
    means: Tensor | None = None


class OnlineTrainer(Trainer[O]):
    """``XTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``.

    A method sets ``needs_means`` if it compares with the policy that drew the samples.

    Args:
        reward: instead of ``config.rewards``, any function of images ``(B, 3, H, W)`` in [0, 1] and their
            prompts that gives ``(B,)``, or ``(B, R)`` for R rewards at once.
    """

    needs_density = True  # learns from steps with noise
    needs_reference = True  # compares with the initial weights
    needs_means = False

    def __init__(
        self, config: O, model: Any = None, dataset: Any = None, reward: RewardFunction | None = None
    ) -> None:
        super().__init__(config, model, dataset)
        if reward is None and not config.rewards:
            raise UserError("nothing judges the samples: give --rewards, such as '[pickscore]'")
        self.reward = reward if reward is not None else _load(config)
        world = self.accelerator.num_processes
        if config.prompts_per_round % world:
            raise UserError(
                f"prompts_per_round {config.prompts_per_round} must be a multiple of the {world} processes"
            )

    # ---------------------------------------------------------------- what a method provides

    @abstractmethod
    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        """What to learn from a round.

        Args:
            index: ``(P, K, n + 1)``, the place of each state: prompt, image, step; the last axis is as
                :meth:`sample_rows` lays a row out.
            rewards: ``(P, K, R)``, or what it gives per row.
            numbers: for random choices.
        """

    def item_losses(self, members: Members) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each item ``(B,)`` and metrics, each ``(B,)`` without gradient; unless a method has
        :meth:`losses` of its own."""
        raise NotImplementedError

    # ---------------------------------------------------------------- data

    def open_data(self) -> None:
        config = self.config
        self.prompts = read_prompts(self._dataset, split=config.dataset_split, limit=config.max_train_samples)
        self.data_length = len(self.prompts)

    def encode(self) -> None:
        """Prompts are encoded round by round."""

    def prepare(self) -> None:
        if self.needs_reference:
            self.weights.use_as_reference()
        config, adapter = self.config, self.adapter
        self.transition = transition_for(adapter, config, resolution=config.resolution)
        if self.needs_density:
            self.transition = stochastic(self.transition, config)
        kept = self.transition.stochastic
        self.steps = kept[kept < max(1, round(config.trained_steps * len(self.transition)))]
        weight = np.ones(len(self.transition))
        if config.step_weight == "inverse_kl":
            weight[self.steps] = 1 / self.transition.kl_weight[self.steps]
            weight /= weight[self.steps].mean()
        self._step_weight = torch.from_numpy(weight).float().to(self.accelerator.device)
        if isinstance(self.reward, Reward):
            self.reward.to(self.accelerator.device)
        self.round: Round | None = None
        self._number = 0

    # ---------------------------------------------------------------- rounds

    def begin_step(self, step: int) -> None:
        """Start the next round when this one is used up."""
        if self.round is not None and step - self.round.first_step < self._length(self.round):
            return
        for _ in range(EMPTY_ROUNDS):
            self.round = current = self._new_round(step)
            if self._length(current):
                return
        raise UserError(
            f"{EMPTY_ROUNDS} rounds in a row gave nothing to learn from: {self._why_empty(current)}"
        )

    def _length(self, current: Round) -> int:
        """Optimiser steps of a round: its items fill so many whole batches."""
        return len(current.items) * self.config.inner_epochs // self.pairs_per_step

    def _why_empty(self, current: Round) -> str:
        if not current.items:
            return "all images of each prompt have equal rewards"
        return (
            f"a round has {len(current.items)} items, fewer than the {self.pairs_per_step} of one optimiser "
            "step; raise --prompts_per_round or --images_per_prompt, or lower --train_batch_size"
        )

    def _new_round(self, step: int) -> Round:
        config, accelerator, adapter = self.config, self.accelerator, self.adapter
        number, count, images = self._number, config.prompts_per_round, config.images_per_prompt
        self._number += 1
        rows = draws.rows_at(
            range(number * count, (number + 1) * count), seed=config.seed, length=len(self.prompts)
        )
        prompts = [self.prompts[row] for row in rows]
        adapter.encoders_to(accelerator.device)
        self.guidance = self._guidance(prompts)
        share = count // accelerator.num_processes
        own = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        states, means, judged = self._sample(number, own, prompts)
        adapter.encoders_to("cpu")
        judged = self._gathered(judged)
        rewards = judged.reshape(count, images, *judged.shape[1:]).double().cpu().numpy()
        states = self._gathered(states).cpu()
        means = None if means is None else self._gathered(means).cpu()
        length = states.shape[1]
        index = np.arange(count * images * length).reshape(count, images, length)
        items = self.items(index, rewards, draws.generator(config.seed, "items", number))
        return Round(
            number,
            step,
            prompts,
            states.flatten(0, 1),
            items,
            self.round_metrics(rewards),
            None if means is None else means.flatten(0, 1),
        )

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Make ``prompts`` those that items name by their numbers."""
        self.adapter.encoders_to(self.accelerator.device)
        self.guidance = self._guidance(prompts)
        self.adapter.encoders_to("cpu")

    def _guidance(self, prompts: Sequence[str]) -> Guidance:
        config = self.config
        return guidance_for(
            self.adapter,
            prompts,
            config.sample_guidance,
            resolution=config.resolution,
            empty_caption=config.empty_caption,
        )

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, in their order."""
        return tensor if self.accelerator.num_processes == 1 else gather(tensor.to(self.accelerator.device))

    def _sample(
        self, number: int, own: range, prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What :meth:`sample_rows` gives for the images of this process's prompts."""
        config, accelerator = self.config, self.accelerator
        cells = [(p, k) for p in own for k in range(config.images_per_prompt)]
        starts = [(p, 0 if config.same_start else k) for p, k in cells]
        rows = Rows(
            [p for p, _ in cells],
            [prompts[p] for p, _ in cells],
            [draws.number(config.seed, "start", number, *cell) for cell in starts],
            [draws.number(config.seed, "steps", number, *cell) for cell in cells],
        )
        batches = -(-len(cells) // self.rows_per_call)
        with (
            tqdm(
                total=batches * len(self.transition),
                desc=f"round {number + 1}",
                unit="step",
                leave=False,
                disable=not (config.progress and accelerator.is_main_process),
            ) as bar,
            accelerator.autocast(),
        ):
            return self.sample_rows(rows, bar.update)

    @property
    def rows_per_call(self) -> int:
        """Rows that are sampled together."""
        return self.config.sample_batch_size

    def sample_rows(
        self, rows: Rows, after_step: Callable[[], object]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sample and judge.

        Returns:
            States ``(rows, n + 1, ...)`` and means ``(rows, n, ...)`` of :func:`rollout`, in host memory, and
            rewards ``(rows, R)``.
        """
        states, means = rollout(
            self.adapter,
            self.transition,
            self.guidance,
            rows.prompts,
            **self.drawn_as(rows, after_step),
            keep_means=self.needs_means,
        )
        return states, means, self.judged(states[:, -1], rows.texts)

    def drawn_as(self, rows: Rows, after_step: Callable[[], object]) -> dict[str, Any]:
        """What the samplers of :mod:`diffalign.pipelines` are told alike: shape, seeds and batches."""
        return {
            "shape": self.adapter.latent_shape(self.config.resolution),
            "start_seeds": rows.start_seeds,
            "seeds": rows.seeds,
            "batch_size": self.rows_per_call,
            "after_step": after_step,
        }

    @torch.no_grad()
    def judged(self, latents: Tensor, prompts: Sequence[str], **at: float) -> Tensor:
        """Rewards ``(rows, R)`` of ``latents (rows, ...)``; all images of a prompt were made together and are
        judged together. ``at`` goes to the reward."""
        images = decoded(self.adapter, latents, self.config.sample_batch_size)
        images, prompts = images.to(self.accelerator.device), list(prompts)
        with torch.autocast(images.device.type, enabled=False):
            rewards = self._asked(images, prompts, **at)
        if rewards.ndim not in (1, 2) or len(rewards) != len(images):
            raise UserError(
                f"the reward gave {tuple(rewards.shape)} for {len(images)} images; it must give one row each"
            )
        if not torch.isfinite(rewards).all():
            bad = int((~torch.isfinite(rewards.reshape(len(rewards), -1)).all(1)).nonzero()[0])
            raise UserError(f"the reward is not finite for an image of {prompts[bad]!r}")
        return rewards.reshape(len(rewards), -1)

    def _asked(self, images: Tensor, prompts: list[str], **at: float) -> Tensor:
        if not isinstance(self.reward, Reward):
            return torch.as_tensor(self.reward(images, prompts)).float()
        if self.config.aggregate == "pareto":
            parts = self.reward.parts(images, prompts)
            if isinstance(self.reward, Ensemble):
                return self.reward.weighted(parts).T
            return torch.stack(list(parts.values()), 1)
        return self.reward.score(images, prompts, **at)

    def round_metrics(self, rewards: np.ndarray) -> dict[str, float]:
        """What the log says of a round's ``rewards``, shaped as :meth:`items` gets them."""
        return reward_metrics(rewards)

    # ---------------------------------------------------------------- training

    def items_at(self, step: int, slots: range) -> list[Item]:
        """The items at places ``slots`` of the global batch of ``step``."""
        current = self.round
        assert current is not None
        order = range(
            (step - current.first_step) * self.pairs_per_step + slots.start,
            (step - current.first_step) * self.pairs_per_step + slots.stop,
        )
        rows = draws.rows_at(
            order, seed=draws.number(self.config.seed, "round", current.number), length=len(current.items)
        )
        return [current.items[row] for row in rows]

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        assert self.round is not None
        members = Members(self, self.round, self.items_at(step, slots))
        losses, metrics = self.item_losses(members)
        losses = losses * self._step_weight[members.item_steps]
        self._names = list(metrics)
        return losses, torch.stack([m.detach().float().sum() for m in metrics.values()])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        assert self.round is not None
        means = {name: value / pairs for name, value in zip(self._names, sums, strict=True)}
        rounds = {"round": float(self.round.number + 1)}
        seen = (self.round.number + 1) * self.config.prompts_per_round / len(self.prompts)
        return {"epoch": seen, **rounds, **self.round.metrics, **means}

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        if self.round is None:
            return {"number": self._number}
        kept = {k: v for k, v in vars(self.round).items() if k not in ("states", "means")}
        return {"number": self._number, "round": kept}

    def load_state(self, state: dict[str, Any]) -> None:
        self._number = state["number"]
        self._kept = state.get("round")

    def save_own(self, folder: Path) -> None:
        if self.round is not None:
            tensors = {"states": self.round.states}
            if self.round.means is not None:
                tensors["means"] = self.round.means
            save_file(tensors, folder / ROUND)

    def load_own(self, folder: Path) -> None:
        if self._kept is None:
            return
        if not (folder / ROUND).is_file():
            raise UserError(f"{folder} has no {ROUND}: it is not a whole checkpoint of {self.method}")
        tensors = load_file(folder / ROUND)
        items = [
            Item(step, prompt, tuple(x), tuple(after), tuple(map(tuple, pairs)), tuple(values))
            for step, prompt, x, after, pairs, values in self._kept["items"]
        ]
        self.round = Round(
            **{**self._kept, "items": items}, states=tensors["states"], means=tensors.get("means")
        )
        self.encode_prompts(self.round.prompts)


class Members:
    """The items of a micro-batch, evaluated: every state once, however many members and pairs share it.

    Attributes:
        items: the items.
        item_of: ``(M,)`` item of each member; ``value (M,)``: its number; both on the device.
        after: ``(M, ...)`` state after the step of each member.
        item_steps: ``(B,)`` step of each item, on the device.
    """

    def __init__(self, trainer: OnlineTrainer[Any], current: Round, items: Sequence[Item]) -> None:
        self.trainer, self.items, self._round = trainer, items, current
        device = trainer.accelerator.device
        members = [(b, item, m) for b, item in enumerate(items) for m in range(len(item.after))]
        # A state with several candidates after it (SPO) stands once in `x`.
        wanted = [(item.x[m % len(item.x)], item.step, item.prompt) for _, item, m in members]
        self._cells = list(dict.fromkeys(wanted))
        place = {cell: row for row, cell in enumerate(self._cells)}
        self._row = torch.tensor([place[cell] for cell in wanted]).to(device)
        self._x = current.states[[x for x, _, _ in self._cells]].to(device, non_blocking=True)
        self.after = current.states[[item.after[m] for _, item, m in members]].to(device, non_blocking=True)
        self.item_of = torch.tensor([b for b, _, _ in members]).to(device)
        values = [item.values[m] if item.values else 0.0 for _, item, m in members]
        self.value = torch.tensor(values).to(device)
        self.item_steps = torch.tensor([item.step for item in items]).to(device)
        first = np.cumsum([0, *(len(item.after) for item in items)])
        pairs = [
            (b, first[b] + w, first[b] + l)
            for b, item in enumerate(items)
            for w, l in item.pairs  # noqa: E741
        ]
        self.pair_item, self.winner, self.loser = torch.tensor(pairs).reshape(-1, 3).long().to(device).T

    def gaussian(self, *, reference: bool = False, detach_uncond: bool = False) -> Gaussian:
        """Where the policy or the reference goes from each state, one row per distinct state."""
        trainer, steps = self.trainer, [step for _, step, _ in self._cells]
        t = trainer.transition.times(steps, self._x)
        prompts = [prompt for _, _, prompt in self._cells]
        raw = trainer.guidance.predict(
            trainer.adapter, self._x, t, prompts, reference=reference, detach_uncond=detach_uncond
        )
        return trainer.transition(raw, self._x, steps)

    def sampled(self) -> Gaussian:
        """Where the policy that drew the samples went: kept, not computed anew."""
        assert self._round.means is not None
        mean = self._round.means[[self._mean_place(x, step) for x, step, _ in self._cells]]
        zero = torch.zeros_like(self._x)
        std = self.trainer.transition(zero, zero, [step for _, step, _ in self._cells]).std
        return Gaussian(mean.to(self._x.device), std)

    def _mean_place(self, x: int, step: int) -> int:
        """Trajectories have one state more than means."""
        length = len(self.trainer.transition)
        return x // (length + 1) * length + step

    def log_ratio(self, policy: Gaussian, other: Gaussian) -> Tensor:
        """``(M,)``: of each member's state after the step."""
        return policy.rows(self._row).log_ratio(other.rows(self._row), self.after)

    def per_item(self, values: Tensor) -> Tensor:
        """Mean over each item's members, ``(B,)``."""
        return self._mean(values, self.item_of)

    def per_state(self, values: Tensor) -> Tensor:
        """Of each distinct state: the mean over the states of each item's members, ``(B,)``."""
        return self._mean(values[self._row], self.item_of)

    def per_pairs(self, values: Tensor) -> Tensor:
        """Mean over each item's pairs, ``(B,)``."""
        return self._mean(values, self.pair_item)

    def _mean(self, values: Tensor, item_of: Tensor) -> Tensor:
        zeros = values.new_zeros(len(self.items))
        count = zeros.index_add(0, item_of, torch.ones_like(values))
        return zeros.index_add(0, item_of, values) / count.clamp(min=1)


def _load(config: OnlineConfig) -> Reward:
    aggregate = "sum" if config.aggregate == "pareto" else config.aggregate
    return load_rewards(
        config.rewards,
        aggregate=aggregate,
        coefficient=config.coefficient,
        rejected_score=config.rejected_score,
    )


def reward_metrics(rewards: np.ndarray) -> dict[str, float]:
    """Of a round's rewards ``(P, K, R)``, those of several rewards added up."""
    total = rewards.sum(2)
    return {
        "reward": float(total.mean()),
        "reward_std": float(total.std()),
        "reward_best": float(total.max(1).mean()),
        "reward_equal": float((np.ptp(total, axis=1) == 0).mean()),
    }
