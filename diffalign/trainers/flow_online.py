"""Flow-DPO and Flow-RWR (Liu et al. 2025) on the model's own samples.

A round samples a group of images of each prompt and has them judged. What is learnt from are the *finished*
images, by their denoising error: Flow-DPO takes pairs of each group, as published the best against the
worst, Flow-RWR all of them, weighted by reward. Each is seen ``inner_epochs`` times, under fresh noise and at
another time, and again with the rounds that follow if they keep it.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.likelihood import Errors, add_noise, error_weight, evaluate
from diffalign.losses import sft, sigmoid
from diffalign.models import ModelAdapter
from diffalign.pipelines.guidance import dynamic_shift
from diffalign.pipelines.load import make_scheduler
from diffalign.pipelines.rollout import finished
from diffalign.solvers import SOLVERS
from diffalign.trainers import checkpoint, draws
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.flow_dpo import WEIGHTING_OF, needs_flow
from diffalign.trainers.flow_rwr import REWARD_WEIGHTS, reward_weights
from diffalign.trainers.groups import COMPARISONS
from diffalign.trainers.online import Item, OnlineConfig, OnlineTrainer, Round, Rows, reward_metrics

REFERENCE = "reference"  # folder of the refreshed reference, in the output folder and in checkpoints

W = TypeVar("W", bound="OwnImagesConfig")


@dataclass(kw_only=True)
class OwnImagesConfig(OnlineConfig):
    """Options of a method that learns from its own finished images.

    Args:
        sample_solver: what draws the images: a sampler by its name in diffalign.solvers.SOLVERS, such as
            dpm-solver++, instead of the scheduler's grid in first-order steps (ddim with eta 0, which is
            Euler on a flow, as published). Take it where few steps must do: its images are better, and it
            is what the model will be sampled with.
        sample_solver_options: of that sampler, such as {algorithm_type: sde-dpmsolver++}.
        replay_rounds: items of so many earlier rounds stay in the pool that a round goes through, so an image
            that was paid for once is learnt from again. Their latents stay in host memory, of every process,
            and in checkpoints: prompts_per_round * images_per_prompt of each round.
        timestep_sampling: how times are drawn: uniform, or logit_normal (Esser et al. 2024), shifted as the
            model's scheduler does.
        logit_mean: of logit_normal; above 0 prefers the noisy end.
        logit_std: of logit_normal.
    """

    learning_rate: float = 1e-4
    rank: int = 32
    images_per_prompt: int = 24
    sample_steps: int = 40
    sample_guidance: float = 4.5
    transition_options: dict[str, float] = field(default_factory=lambda: {"eta": 0.0})
    inner_epochs: int = 39
    sample_solver: str | None = None
    sample_solver_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    replay_rounds: int = 0
    timestep_sampling: draws.TimeSampling = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("images_per_prompt", self.images_per_prompt >= 2, "at least 2: they are compared")
        self._need("logit_std", self.logit_std > 0, "above 0")
        self._need("replay_rounds", self.replay_rounds >= 0, "0 or more")
        self._check_solver()
        if self.trained_steps != 1 or self.step_weight != "none":
            raise UserError(
                "trained_steps and step_weight are for methods that learn from trajectories; this one learns "
                "from finished images"
            )
        if self.aggregate == "pareto":
            raise UserError("images are ranked by one score: aggregate must be sum, wco or uwo")

    def _check_solver(self) -> None:
        if self.sample_solver is None:
            self._need("sample_solver_options", not self.sample_solver_options, "empty without sample_solver")
            return
        self._need("sample_solver", self.sample_solver in SOLVERS, f"one of {', '.join(SOLVERS)}")
        own = (self.transition, self.transition_options, self.sample_spacing, self.sample_end)
        if own != ("ddim", {"eta": 0.0}, None, None):
            raise UserError(
                "transition, transition_options, sample_spacing and sample_end are of the sampler that "
                "sample_solver takes the place of; give sample_solver_options, such as timestep_spacing"
            )


class OwnImagesTrainer(OnlineTrainer[W]):
    """Groups of own images in, denoising errors out."""

    needs_density = False
    weighting = "native"

    @abstractmethod
    def image_losses(self, errors: Errors, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each item ``(B,)`` and metrics, each ``(B,)`` without gradient.

        Args:
            errors: of the items' images, ``(sides B,)``: all first ones, then all second ones.
            values: ``(B,)``, of the items' first image.
        """

    def _load_model(self) -> ModelAdapter:
        adapter = super()._load_model()
        if adapter.video:
            raise UserError(
                f"{self.method} samples images; a video model can be trained on pairs or scored clips, with "
                "'diffalign train flow-dpo' or 'flow-rwr'"
            )
        return adapter

    def prepare(self) -> None:
        super().prepare()
        config, adapter = self.config, self.adapter
        self.solver: Any = None
        if config.sample_solver is not None:
            self.solver = make_scheduler(
                config.sample_solver, adapter.pipeline.scheduler.config, **config.sample_solver_options
            )
            self._grid = (
                {"timesteps": config.sample_timesteps}
                if config.sample_timesteps
                else {
                    "num_inference_steps": config.sample_steps,
                    "mu": dynamic_shift(adapter, resolution=config.resolution),
                }
            )

    def sample_rows(self, rows: Rows, after_step: Callable[[], object]) -> tuple[Tensor, None, Tensor]:
        """Finished latents ``(rows, 1, ...)`` and rewards ``(rows, R)``."""
        if self.solver is None:
            states, _, rewards = super().sample_rows(rows, after_step)
            return states[:, -1:].clone(), None, rewards
        latents = finished(
            self.adapter,
            self.solver,
            self.guidance,
            rows.prompts,
            **self.drawn_as(rows, after_step),
            **self._grid,
        )
        return latents[:, None], None, self.judged(latents, rows.texts)

    def _new_round(self, step: int) -> Round:
        earlier, current = self.round, super()._new_round(step)
        if earlier is None or not self.config.replay_rounds:
            return current
        current = joined(earlier, current, self.config.replay_rounds)
        # All at once, as where a run is resumed: in other batches the last bits differ.
        self.encode_prompts(current.prompts)
        return current

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        config, adapter, current = self.config, self.adapter, self.round
        assert current is not None
        device, items = self.accelerator.device, self.items_at(step, slots)
        sides = range(len(items[0].x))
        latents = current.states[[item.x[side] for side in sides for item in items]].to(device)
        numbers = [draws.generator(config.seed, "noise", step, slot) for slot in slots]
        options = {"logit_mean": config.logit_mean, "logit_std": config.logit_std}
        times = [draws.time(n, adapter.schedule, config.timestep_sampling, **options) for n in numbers]
        noise = np.stack([n.standard_normal(latents.shape[1:], dtype=np.float32) for n in numbers])
        shared = torch.from_numpy(noise).to(device).repeat(len(sides), *[1] * (latents.ndim - 1))
        t = torch.tensor(times).repeat(len(sides))
        prompts = torch.tensor([item.prompt for item in items]).to(device).repeat(len(sides))
        cond = {name: values.to(device)[prompts] for name, values in self.guidance.cond.items()}
        weight = error_weight(self.weighting, adapter.schedule, adapter.prediction_type, t)
        errors = evaluate(
            adapter.denoise,
            add_noise(adapter.schedule, adapter.prediction_type, latents, shared, t),
            cond,
            reference=self.needs_reference,
            weight=None if weight is None else weight.to(device),
        )
        values = torch.tensor([item.values[0] if item.values else 0.0 for item in items]).to(device)
        losses, metrics = self.image_losses(errors, values)
        self._names = list(metrics)
        return losses, torch.stack([m.detach().float().sum() for m in metrics.values()])


def joined(earlier: Round, new: Round, rounds: int) -> Round:
    """The new round with the items of the last ``rounds`` rounds that ``earlier`` holds, theirs first; all
    rounds have as many prompts and states as the new one."""
    kept = min(rounds * len(new.prompts), len(earlier.prompts))
    skipped = len(earlier.prompts) - kept
    each = len(new.states) // len(new.prompts)

    def moved(item: Item, by: int) -> Item:
        return item._replace(prompt=item.prompt + by, x=tuple(place + by * each for place in item.x))

    items = [moved(item, -skipped) for item in earlier.items if item.prompt >= skipped]
    return replace(
        new,
        prompts=earlier.prompts[skipped:] + new.prompts,
        states=torch.cat([earlier.states[skipped * each :], new.states]),
        items=items + [moved(item, kept) for item in new.items],
    )


# -------------------------------------------------------------------- Flow-DPO


@dataclass(kw_only=True)
class FlowDPOOnlineConfig(OwnImagesConfig):
    """Flow-DPO online: align a flow model on better and worse ones of its own samples.

    Args:
        compare: which images of a prompt are pairs: best_worst, as published; matched, also the second best
            with the second worst and so on while they differ, which of a yes/no reward makes all pairs
            without a common image; or all that differ. The last two get more out of the same images.
        sft_weight: adds so many times the denoising error of the winner, in units of beta/2: 1 pulls as hard
            as an unsure pair pushes. A guard against winners that get less likely together with the losers,
            as they do at high rates.
        beta_dpo: how strongly the model is held to its reference, for mean errors.
        beta_schedule: how beta depends on the noise s: constant, or one_minus_s_squared, beta (1 - s)^2.
        refresh_steps: every so many optimiser steps the model as it is becomes the reference; 0 keeps the
            initial one.
        equal_groups: what becomes of a prompt whose images have equal rewards: drop, or first_two, the first
            beating the second, as published code does.
    """

    compare: Literal["best_worst", "matched", "all"] = "best_worst"
    sft_weight: float = 0.0
    beta_dpo: float = 100.0
    beta_schedule: Literal["constant", "one_minus_s_squared"] = "constant"
    refresh_steps: int = 40
    equal_groups: Literal["drop", "first_two"] = "drop"

    def check(self) -> None:
        super().check()
        kinds = ("best_worst", "matched", "all")
        self._need("compare", self.compare in kinds, f"one of {', '.join(kinds)}")
        self._need("sft_weight", self.sft_weight >= 0, "0 or more")
        self._need("beta_dpo", self.beta_dpo > 0, "above 0")
        self._need("beta_schedule", self.beta_schedule in WEIGHTING_OF, f"one of {', '.join(WEIGHTING_OF)}")
        self._need("refresh_steps", self.refresh_steps >= 0, "0 or more")
        self._need("equal_groups", self.equal_groups in ("drop", "first_two"), "drop or first_two")


class FlowDPOOnlineTrainer(OwnImagesTrainer[FlowDPOOnlineConfig]):
    """``FlowDPOOnlineTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``."""

    method = "flow-dpo-online"

    @property
    def weighting(self) -> str:  # type: ignore[override]
        return WEIGHTING_OF[self.config.beta_schedule]

    def _load_model(self) -> ModelAdapter:
        return needs_flow(super()._load_model(), self.method, "d3po")

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        pairs_of = COMPARISONS[self.config.compare]
        otherwise = [(0, 1)] if self.config.equal_groups == "first_two" else []
        return [
            Item(0, prompt, (int(index[prompt, w, 0]), int(index[prompt, l, 0])), ())
            for prompt, group in enumerate(rewards.sum(2))
            for w, l in pairs_of(group, None) or otherwise  # noqa: E741
        ]

    def image_losses(self, errors: Errors, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        beta = self.config.beta_dpo
        chosen, rejected = errors.log_ratio().chunk(2)
        rewards = beta * torch.stack([chosen, rejected]).detach()
        margin = rewards[0] - rewards[1]
        losses = sigmoid(chosen, rejected, beta)
        if self.config.sft_weight:
            winner, loser = (-0.5 * errors.policy).chunk(2)
            losses = losses + self.config.sft_weight * sft(winner, loser, beta)
        return losses, {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0),
            "gradient_factor": torch.sigmoid(-margin),
            "errors/chosen": errors.policy.detach().chunk(2)[0],
            "errors/rejected": errors.policy.detach().chunk(2)[1],
        }

    # ---------------------------------------------------------------- the reference

    def prepare(self) -> None:
        super().prepare()
        self._refreshed: int | None = None  # the step of it
        self._pool = self.folder / REFERENCE
        if self.accelerator.is_main_process:
            shutil.rmtree(self._pool, ignore_errors=True)  # of an earlier run; checkpoints hold their own

    def begin_step(self, step: int) -> None:
        every = self.config.refresh_steps
        if every and step and step % every == 0:
            self._refresh(step)
        super().begin_step(step)

    def _refresh(self, step: int) -> None:
        """Make the weights as they are the reference."""
        if self.accelerator.is_main_process:
            checkpoint.write(self._pool, step, self.weights.save, {})
        self.accelerator.wait_for_everyone()
        self.weights.reference_from(self._entry(step))
        self._refreshed = step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoint.rotate(self._pool, 1)

    def _entry(self, step: int) -> Path:
        return self._pool / f"{checkpoint.PREFIX}{step}"

    def state(self) -> dict[str, Any]:
        return super().state() | {"refreshed": self._refreshed}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._refreshed = state["refreshed"]

    def save_own(self, folder: Path) -> None:
        super().save_own(folder)
        if self._refreshed is not None:
            shutil.copytree(self._entry(self._refreshed), folder / REFERENCE)

    def load_own(self, folder: Path) -> None:
        super().load_own(folder)
        if self._refreshed is None:
            return
        if not (folder / REFERENCE).is_dir():
            raise UserError(f"{folder} lacks its {REFERENCE}: it is not a whole checkpoint of {self.method}")
        self.weights.reference_from(folder / REFERENCE)
        if self.accelerator.is_main_process:
            shutil.copytree(folder / REFERENCE, self._entry(self._refreshed))


def run_dpo(config: FlowDPOOnlineConfig) -> TrainResult:
    """The command ``diffalign train flow-dpo-online``."""
    return run_once(FlowDPOOnlineTrainer(config))


# -------------------------------------------------------------------- Flow-RWR


@dataclass(kw_only=True)
class FlowRWROnlineConfig(OwnImagesConfig):
    """Flow-RWR online: fine-tune a model on its own samples, the better ones counting for more.

    Args:
        reward_weights: softmax, the better the more, mean 1 for each prompt; raw, the reward itself, and
            best_of_group, the best images of each prompt alone, are what published code does.
        tau: of softmax, in the unit of the reward: a reward higher by tau counts e times as much.
    """

    reward_weights: Literal["softmax", "raw", "best_of_group"] = "softmax"
    tau: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("tau", self.tau > 0, "above 0")
        kinds = ", ".join(REWARD_WEIGHTS)
        self._need("reward_weights", self.reward_weights in REWARD_WEIGHTS, f"one of {kinds}")


class FlowRWROnlineTrainer(OwnImagesTrainer[FlowRWROnlineConfig]):
    """``FlowRWROnlineTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``."""

    method = "flow-rwr-online"
    needs_reference = False

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        """Images of weight 0 teach nothing, nor do groups of equal rewards, unless the reward is the
        weight."""
        weights = self._weights(rewards)
        told_apart = (np.ptp(rewards.sum(2), axis=1, keepdims=True) > 0) | (
            self.config.reward_weights == "raw"
        )
        return [
            Item(0, int(p), (int(index[p, k, 0]),), (), values=(float(weights[p, k]),))
            for p, k in np.argwhere((weights != 0) & told_apart)
        ]

    def _weights(self, rewards: np.ndarray) -> np.ndarray:
        """``(P, K)``."""
        total, config = rewards.sum(2), self.config
        groups = np.repeat(np.arange(len(total)), total.shape[1])
        return reward_weights(total.ravel(), groups, config.reward_weights, tau=config.tau).reshape(
            total.shape
        )

    def image_losses(self, errors: Errors, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        plain = errors.policy.detach()
        metrics = {"errors/mean": plain, "errors/weighted": values * plain, "weights/mean": values}
        return values * errors.policy, metrics

    def round_metrics(self, rewards: np.ndarray) -> dict[str, float]:
        weights = self._weights(rewards)
        square = float(np.square(weights).mean())
        return {
            **reward_metrics(rewards),
            "weights/effective": float(weights.mean() ** 2 / square) if square else 0.0,
        }


def run_rwr(config: FlowRWROnlineConfig) -> TrainResult:
    """The command ``diffalign train flow-rwr-online``."""
    return run_once(FlowRWROnlineTrainer(config))
