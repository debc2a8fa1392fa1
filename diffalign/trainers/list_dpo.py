"""DPO on lists: K images of one prompt in the order of their scores, in place of a pair.

With noise and time shared by all images of a list and ``d_i = ell_i - ell_ref,i``, the loss is a row of
:data:`diffalign.losses.LIST_LOSSES`: the likelihood of the whole ranking (Plackett-Luce, as in Rafailov et
al. 2023, appendix A.3), pairs weighted by what a swap does to the discounted gain (TPO, Liao et al. 2024), or
the scores as soft targets (BRAIn, Pandey et al. 2024). A list of two under Plackett-Luce is a pair of
Diffusion-DPO.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.data import ImageDataset, open_scored
from diffalign.data.cache import CachedExamples
from diffalign.errors import UserError, suggestion
from diffalign.likelihood import Errors
from diffalign.losses import LIST_LOSSES
from diffalign.trainers import draws
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch, DenoisingConfig, DenoisingTrainer, Draw

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ListDPOConfig(DenoisingConfig):
    """List DPO: align a model with several scored images of each prompt.

    The data are lists (prompt, images, scores), pairs with scores, or single images with prompt and score;
    'diffalign data score' writes scores. train_batch_size counts lists.

    Args:
        beta_dpo: how strongly the model is held to its reference, for mean-reduced errors.
        list_length: images in a list; of a prompt that has more, so many from the best to the worst, evenly
            spread. Prompts with fewer are left out.
        list_loss: plackett_luce (the whole ranking), lambda_rank (pairs, weighted by scores and ranks: keep
            scores within a few units, it takes two to their power) or soft_targets (the softmax of scores).
        loss_options: settings of the loss: temperature of soft_targets, in the unit of the scores.
    """

    learning_rate: float = 1e-5
    beta_dpo: float = 2000.0
    list_length: int = 4
    list_loss: str = "plackett_luce"
    loss_options: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        self._need("beta_dpo", self.beta_dpo > 0, "above 0")
        self._need("list_length", self.list_length >= 2, "at least 2")
        self._need("reference_draws", self.reference_draws == 0, "0: the noise of a list is its own")
        known = list(LIST_LOSSES)
        if self.list_loss not in known:
            near = suggestion(self.list_loss, known)
            raise UserError(f"unknown list_loss {self.list_loss!r}{near} (known: {', '.join(known)})")
        for name, value in self.loss_options.items():
            allowed = LIST_LOSSES[self.list_loss].options
            if name not in allowed:
                raise UserError(
                    f"list_loss {self.list_loss} has no setting {name!r} "
                    f"(it has: {', '.join(allowed) or 'none'})"
                )
            if value <= 0:
                raise UserError(f"{name} of {self.list_loss} must be above 0, but is {value}")


class ListDPOTrainer(DenoisingTrainer[ListDPOConfig]):
    """``ListDPOTrainer(config, model=pipeline_or_path, dataset=scored_or_path).train()``, with the data from
    :func:`diffalign.data.open_scored`."""

    method = "list-dpo"
    unit = "list"
    shardable = True

    @property
    def beta(self) -> float:  # type: ignore[override]
        return self.config.beta_dpo

    # ---------------------------------------------------------------- data

    def open_examples(self, source: Any, limit: int | None) -> ImageDataset:
        """All scored images; `limit` counts lists, whose images stand in the order of their lists."""
        config = self.config
        if not isinstance(source, ImageDataset):
            source = open_scored(
                source,
                split=config.dataset_split,
                columns=config.columns or None,
                max_bad=config.max_bad,
            )
        if any(score is None for score in source.scores):
            raise UserError(f"{source.source} has images without a score: open it with open_scored")
        lists = listed(source.prompts, source.scores, config.list_length)
        short = len(set(source.prompts)) - len(lists)
        if not lists:
            raise UserError(
                f"no prompt of {source.source} has {config.list_length} images whose scores differ: give "
                "more images of a prompt, or a smaller list_length"
            )
        if short and self.accelerator.is_main_process:
            logger.warning("%d prompts have fewer than %d images, or equal ones", short, config.list_length)
        return source.select([row for rows in lists[:limit] for row in rows])

    @property
    def rows_of_example(self) -> int:
        return self.config.list_length

    def encode(self) -> None:
        super().encode()
        self._lists, self._scores = self._found(self.examples, self.data)
        self.data_length = len(self._lists)
        if self.validation_data is not None:
            self._held, self._held_scores = self._found(self.held_out, self.validation_data)
            self._list_of = {row: number for number, rows in enumerate(self._held) for row in rows}

    def _found(self, examples: Any, data: CachedExamples) -> tuple[list[list[int]], Tensor]:
        """Rows of the data list by list, and the score of each row; a list with an image that another stands
        in for is left out."""
        length = self.config.list_length
        own = [wanted == read for wanted, read in zip(examples.ids, data.ids, strict=True)]
        starts = range(0, len(own) - length + 1, length)
        lists = [list(range(k, k + length)) for k in starts if all(own[k : k + length])]
        if not lists:
            raise UserError(f"no list of {examples.source} has {length} images that can be read")
        return lists, torch.tensor(examples.scores, dtype=torch.float32)

    def batch(self, step: int, slots: range) -> Batch:
        """The lists at places ``slots``, as rows: list by list, from the best image to the worst; noise, time
        and a dropped caption are those of the list."""
        first = step * self.pairs_per_step
        places = draws.rows_at(
            range(first + slots.start, first + slots.stop), seed=self.config.seed, length=len(self._lists)
        )
        rows = [row for place in places for row in self._lists[place]]
        drawn = [
            self._draw(step, slot, place, number)
            for number in range(self.config.draws_per_example)
            for slot, place in zip(slots, places, strict=True)
            for _ in range(self.config.list_length)
        ]
        return self._assemble(self._views(self.data, rows, drawn[: len(rows)]), drawn, rows)

    # ---------------------------------------------------------------- loss

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        config = self.config
        batch = self.batch(step, slots)
        errors, length = self._errors(batch), config.list_length
        gain = errors.log_ratio().reshape(-1, length)
        rewards = self._scores[batch.rows].reshape(-1, length).to(gain)
        loss = LIST_LOSSES[config.list_loss](gain, self.beta, rewards, **config.loss_options)
        assert errors.reference is not None
        gain = gain.detach().float()
        right, factor = in_order(gain, rewards, self.beta)
        ends = [x.detach().float().reshape(-1, length)[:, [0, -1]] for x in (errors.policy, errors.reference)]
        ends = [self.beta * gain[:, [0, -1]], *ends]
        columns = [*torch.cat(ends, 1).unbind(1), right, factor]
        sums = torch.stack([column.sum() for column in columns])
        return loss, torch.cat([sums, sums.new_tensor([batch.empty / length])])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        best, worst, *errors, right, factor, empty = (value / pairs for value in sums)
        names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
        return {
            "rewards/chosen": best,
            "rewards/rejected": worst,
            "rewards/margins": best - worst,
            "rewards/accuracies": right,
            "gradient_factor": factor,
            "beta": self.beta,
            "beta_sum": self.beta / self.elements,
            **{f"errors/{name}": value for name, value in zip(names, errors, strict=True)},
            "empty_captions": empty,
            "truncated_captions": self.truncated,
            "skipped_rows": len(self.examples.skipped),
        }

    # ---------------------------------------------------------------- validation

    def _validation_draw(self, row: int, number: int) -> Draw:
        return super()._validation_draw(self._list_of.get(row, row), number)

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        rows = torch.tensor(self._held)
        gain = self.beta * errors.log_ratio()[..., 0].mean(1)[rows]
        right, _ = in_order(gain, self._held_scores[rows].to(gain), 1.0)
        return {
            "validation/rewards/accuracies": right.mean().item(),
            "validation/rewards/margins": (gain[:, 0] - gain[:, -1]).mean().item(),
            "validation/rewards/chosen": gain[:, 0].mean().item(),
            "validation/rewards/rejected": gain[:, -1].mean().item(),
        }


def listed(prompts: list[str], scores: list[Any], length: int) -> list[list[int]]:
    """Rows of each prompt with `length` images or more, from the best to the worst, evenly spread."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    lists = []
    for rows in groups.values():
        order = sorted(rows, key=lambda row: (-scores[row], row))
        if len(order) >= length:
            chosen = [order[round(k * (len(order) - 1) / (length - 1))] for k in range(length)]
            lists += [chosen] if scores[chosen[0]] > scores[chosen[-1]] else []
    return lists


def in_order(gain: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of each list ``(B, K)``: the share of its couples of unequal score that `gain` puts in their order, and
    their mean gradient factor."""
    differences = gain[:, :, None] - gain[:, None, :]
    better = (rewards[:, :, None] > rewards[:, None, :]).to(gain)
    right = (differences > 0).to(gain) + 0.5 * (differences == 0)
    count = better.sum((1, 2))
    factor = torch.sigmoid(-beta * differences)
    return (right * better).sum((1, 2)) / count, (factor * better).sum((1, 2)) / count


def run(config: ListDPOConfig) -> TrainResult:
    """The command ``diffalign train list-dpo``."""
    return run_once(ListDPOTrainer(config))
