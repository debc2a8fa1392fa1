"""Training on preference pairs through the denoiser likelihood: what all offline pair methods share.

A method adds its options and turns log-ratios into a loss (:meth:`PairTrainer.pair_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.data import ImageDataset, PairDataset, Selection, open_pairs
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers import validation
from diffalign.trainers.deferred import backward_in_turn
from diffalign.trainers.denoising import Batch, DenoisingConfig, DenoisingTrainer

P = TypeVar("P", bound="PairConfig")

TIME_BINS = 4
SIDES = ("chosen", "rejected", "reference_chosen", "reference_rejected")


@dataclass(kw_only=True)
class PairConfig(DenoisingConfig):
    """Options of a method on pairs.

    Args:
        ties: pairs without a winner: drop, soft (trained towards even odds) or error.
        selection: what decides between two images, what becomes of repeated pairs, filters, and weights of
            prompts, such as {votes: share, min_side: 512}: the attributes of diffalign.data.Selection.
        label_flip_probability: share of the pairs that are trained the wrong way round, always the same ones:
            to see what wrong labels do to a method. Held-out pairs stay as they are.
        low_memory: one image at a time, for half the activation memory at little more time; its gradient is
            the same. On top of it, gradient_checkpointing.
    """

    ties: Literal["drop", "soft", "error"] = "drop"
    selection: dict[str, int | float | bool | str] = field(default_factory=dict)
    label_flip_probability: float = 0.0
    low_memory: bool = False

    def check(self) -> None:
        super().check()
        flips = self.label_flip_probability
        self._need("label_flip_probability", 0 <= flips <= 1, "between 0 and 1")


class PairTrainer(DenoisingTrainer[P]):
    """Pairs in, log-ratios out; with ``low_memory``, one image at a time."""

    def open_examples(self, source: Any, limit: int | None) -> PairDataset | ImageDataset:
        config = self.config
        if isinstance(source, PairDataset):
            return source[:limit] if limit else source
        return open_pairs(
            source,
            split=config.dataset_split,
            columns=config.columns or None,
            ties=config.ties,
            limit=limit,
            max_bad=config.max_bad,
            selection=Selection.of(config.selection),
        )

    def open_data(self) -> None:
        super().open_data()
        if self.config.label_flip_probability:
            self.examples = self.pairs.flipped(self.config.label_flip_probability, self.config.seed)

    def check_sharded(self) -> None:
        super().check_sharded()
        if self.config.low_memory:
            raise UserError("low_memory does not work under FSDP or DeepSpeed: use gradient_checkpointing")

    @property
    def pairs(self) -> PairDataset:
        """What is trained on."""
        assert isinstance(self.examples, PairDataset)
        return self.examples

    def pair_loss(self, errors: Errors, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each pair and its logit ``z``, both ``(B,)``, from the errors of 2B rows and what the batch
        says of its pairs; what a method provides, unless it has :meth:`losses` of its own."""
        raise NotImplementedError

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        return validation.summary(errors.policy, errors.reference, self.beta)

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        batch = self.batch(step, slots)
        errors = self._errors(batch)
        losses, logit = self.pair_loss(errors, batch)
        return losses * batch.weight, self._sums(errors, logit.detach(), batch)

    def accumulate(self, step: int, slots: range, own_pairs: int, *, last: bool) -> Tensor:
        if not self.config.low_memory:
            return super().accumulate(step, slots, own_pairs, last=last)
        sums = [
            self._accumulate_pair(step, slot, own_pairs, last=last and slot == slots[-1]) for slot in slots
        ]
        return torch.stack(sums).sum(0)

    def _accumulate_pair(self, step: int, slot: int, own_pairs: int, *, last: bool) -> Tensor:
        """:meth:`accumulate` of one pair with one image's graph alive at a time."""
        batch = self.batch(step, range(slot, slot + 1))

        def errors(side: int) -> Errors:
            with self.accelerator.autocast():
                return self._errors(batch.row(side))

        def loss(both: Errors) -> Tensor:
            with self.accelerator.autocast():
                return (self.pair_loss(both, batch)[0] * batch.weight).sum() / own_pairs

        both = backward_in_turn(
            errors,
            loss,
            self.weights.trainable,
            backward=self.accelerator.backward,
            around=lambda final: self.exchanged(last and final),
        )
        with torch.no_grad(), self.accelerator.autocast():
            losses, logit = self.pair_loss(both, batch)
        return torch.cat([(losses * batch.weight).float(), self._sums(both, logit, batch)])

    # ---------------------------------------------------------------- metrics

    def after_step(self, margin: float, gain: float) -> None:
        """Called once per step, in all processes alike, with the mean of ``|d_chosen - d_rejected|`` and of
        ``d`` over all images."""

    def _sums(self, errors: Errors, logit: Tensor, batch: Batch) -> Tensor:
        """What :meth:`summarise` reads, in its order; stays on the device."""
        sides = _by_side(errors)
        rewards = -0.5 * self.beta * (sides[:2] - sides[2:])
        margin = rewards[0] - rewards[1]
        won = (margin > 0).float() + 0.5 * (margin == 0)
        lost = (margin < 0).float()
        moments = (margin, margin.square(), margin.abs())
        scalars = torch.stack([*rewards, *moments, won, lost, torch.sigmoid(-logit), *sides])
        parts = self.adapter.schedule.fraction(batch.t.reshape(2, -1)) * TIME_BINS
        bins = parts.long().clamp(0, TIME_BINS - 1)
        in_bin = torch.nn.functional.one_hot(bins, TIME_BINS).to(sides)  # (2, B, bins): a time for each image
        by_time = torch.einsum(
            "sb,sbk->sk", _by_side(errors.single or errors), in_bin.repeat(2, 1, 1)
        ).flatten()
        empty = torch.full((1,), float(batch.empty), device=sides.device)
        return torch.cat([scalars.sum(1), in_bin.sum(1).flatten(), by_time, empty])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        means = [value / pairs for value in sums[:12]]
        chosen, rejected, margin, square, size, won, lost, factor = means[:8]
        beta = self.beta
        self.after_step(size / beta, (chosen + rejected) / (2 * beta))
        shown = SIDES if self.needs_reference else SIDES[:2]
        counts, *binned = np.array(sums[12:-1]).reshape(-1, 2, TIME_BINS).tolist()  # of chosen and rejected
        by_time = {
            side: [s / n if n else None for s, n in zip(row, count, strict=True)]
            for side, row, count in zip(shown, chain(*binned), counts * 2, strict=False)
        }
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margin,
            "rewards/margins_std": max(square - margin * margin, 0.0) ** 0.5,
            "rewards/margins_negative": lost,
            "rewards/accuracies": won,
            "gradient_factor": factor,
            "beta": beta,
            "beta_sum": beta / self.elements,  # the same for errors summed over a latent
            **{f"errors/{side}": value for side, value in zip(shown, means[8:], strict=False)},
            "errors_by_time": by_time,
            "empty_captions": sums[-1] / pairs,
            "truncated_captions": self.truncated,
            "skipped_rows": len(self.examples.skipped),
        }


def _by_side(errors: Errors) -> Tensor:
    """Errors of 2B rows as (4, B) float32, in the order of SIDES; zeros without a reference."""
    policy = errors.policy.detach()
    reference = errors.reference if errors.reference is not None else torch.zeros_like(policy)
    return torch.stack([*policy.chunk(2), *reference.chunk(2)]).float()
