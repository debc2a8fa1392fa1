"""A reference that moves while the policy learns, and runs in stages.

Every ``reference_update_steps`` steps the reference becomes, weight by weight,

- ``m policy + (1 - m) reference``: TR-DPO (Gorbatovski et al. 2024), which found m 0.6 and 512 steps for
  language models; or
- ``policy + a (policy - policy at the update before)``: accelerated preference optimisation (He et al. 2024),
  whose extrapolated likelihood ``p (p / p_before)^a`` this is to first order.

At the end of a warm start on both images of every pair (the idea of OPA-DPO, Yang et al. 2025: preferences
teach most where the data are what the model itself makes), and of every stage of a curriculum (Curry-DPO,
Pattnaik et al. 2024), it becomes the policy itself. Of a LoRA the factors are moved, not their product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.trainers import draws
from diffalign.trainers.pairs import PairConfig, PairTrainer

M = TypeVar("M", bound="MovingConfig")

FILE = "reference.safetensors"  # of a checkpoint: a reference that has moved cannot be had from the model


@dataclass(kw_only=True)
class MovingConfig(PairConfig):
    """Options of a method whose reference may move.

    Args:
        reference_update_steps: move the reference every so many steps; 0 leaves it where it is.
        reference_mix: how far it goes towards the policy, from 0 to 1.
        reference_momentum: if above 0, it goes beyond the policy instead: by this times the way that the
            policy has come since the reference moved before.
        warm_start_sft_steps: for so many steps at first, fine-tune on both images of every pair; what comes
            of it is the reference.
        curriculum_stages: split the run into so many equal stages, the first on the pairs with the largest
            gaps between their scores, the last on those with the smallest; the reference of each is the
            policy that the one before left. 0 takes all pairs throughout.
    """

    reference_update_steps: int = 0
    reference_mix: float = 0.6
    reference_momentum: float = 0.0
    warm_start_sft_steps: int = 0
    curriculum_stages: int = 0

    def check(self) -> None:
        super().check()
        for name in ("reference_update_steps", "warm_start_sft_steps", "curriculum_stages"):
            self._need(name, getattr(self, name) >= 0, "0 or more")
        self._need("reference_mix", 0 < self.reference_mix <= 1, "above 0 and at most 1")
        self._need("reference_momentum", self.reference_momentum >= 0, "0 or more")
        for name in ("warm_start_sft_steps", "curriculum_stages"):
            self._need(name, getattr(self, name) <= self.max_train_steps, "max_train_steps at most")
        if self.reference_momentum and not self.reference_update_steps:
            raise UserError("reference_momentum acts when the reference moves: set reference_update_steps")
        if self.reference_moves and (self.reference_draws or self.reference_device != "same"):
            raise UserError(
                "reference_draws and reference_device are of a reference that stays as it is: leave them out"
            )
        if self.reference_update_steps and not self.needs_reference():
            raise UserError("reference_update_steps has no reference to move: the loss needs none")

    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return True

    @property
    def reference_moves(self) -> bool:
        """Whether the reference is not the initial weights throughout."""
        changes = self.reference_update_steps or self.warm_start_sft_steps or self.curriculum_stages > 1
        return bool(changes) and self.needs_reference()

    @property
    def stage_steps(self) -> int:
        """Steps of one stage of the curriculum."""
        return math.ceil(self.max_train_steps / max(self.curriculum_stages, 1))


class MovingReferenceTrainer(PairTrainer[M]):
    """Pairs in, log-ratios to a reference that may move out."""

    warming = False  # whether the step is one of the warm start

    def check_sharded(self) -> None:
        super().check_sharded()
        if self.config.reference_moves:
            raise UserError("a reference that moves does not work under FSDP or DeepSpeed: run data-parallel")

    # ---------------------------------------------------------------- the reference

    def make_reference(self) -> None:
        if not self.config.reference_moves:
            super().make_reference()
            return
        self._reference = self.weights.movable_reference()
        self._before = [tensor.clone() for tensor in self._reference]

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        config = self.config
        self.warming = step < config.warm_start_sft_steps
        self.needs_reference = config.needs_reference() and not self.warming
        if not config.reference_moves or step == 0 or self.warming:
            return
        every = config.reference_update_steps
        if step == config.warm_start_sft_steps or step % config.stage_steps == 0:
            self._move(mix=1.0, momentum=0.0)
        elif every and (step - config.warm_start_sft_steps) % every == 0:
            self._move(mix=config.reference_mix, momentum=config.reference_momentum)

    @torch.no_grad()
    def _move(self, *, mix: float, momentum: float) -> None:
        for reference, before, policy in zip(
            self._reference, self._before, self.weights.trainable, strict=True
        ):
            if momentum:
                reference.copy_(policy + momentum * (policy - before))
            else:
                reference.lerp_(policy, mix)
            before.copy_(policy)

    def save_own(self, folder: Path) -> None:
        super().save_own(folder)
        if self.config.reference_moves:
            kinds = {"reference": self._reference, "before": self._before}
            named = {
                f"{kind}.{name}": tensor.detach().cpu().contiguous()
                for kind, tensors in kinds.items()
                for name, tensor in zip(self.weights.names, tensors, strict=True)
            }
            save_file(named, folder / FILE)

    @torch.no_grad()
    def load_own(self, folder: Path) -> None:
        super().load_own(folder)
        if not self.config.reference_moves:
            return
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} is of a run whose reference did not move: resume without its options")
        held = load_file(folder / FILE)
        for kind, tensors in (("reference", self._reference), ("before", self._before)):
            for name, tensor in zip(self.weights.names, tensors, strict=True):
                tensor.copy_(held[f"{kind}.{name}"])

    # ---------------------------------------------------------------- data

    def encode(self) -> None:
        super().encode()
        stages = self.config.curriculum_stages
        if stages > len(self.data):
            raise UserError(f"curriculum_stages {stages} are more than the {len(self.data)} pairs")
        order = self.data.gap.argsort(descending=True, stable=True).tolist()
        parts = max(stages, 1)
        self._stages = [order[len(order) * k // parts : len(order) * (k + 1) // parts] for k in range(parts)]

    def rows_at(self, positions: range) -> list[int]:
        if not self.config.curriculum_stages:
            return super().rows_at(positions)
        return [self._staged(position) for position in positions]

    def _staged(self, position: int) -> int:
        steps = self.config.stage_steps * self.pairs_per_step
        stage, within = divmod(position, steps)
        rows = self._stages[stage]
        order = draws.rows_at(
            range(within, within + 1), seed=draws.number(self.config.seed, "stage", stage), length=len(rows)
        )
        return rows[order[0]]

    # ---------------------------------------------------------------- metrics

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        found = super().summarise(sums, pairs)
        if not self.warming:
            return found
        return {k: v for k, v in found.items() if not k.startswith("rewards/") and k != "gradient_factor"}
