"""Diffusion-KTO (Li et al. 2024): single images that somebody liked or did not, nothing compared.

With ``d = ell - ell_ref`` of each image, at noise and time of its own, and U one of the paper's utilities
(section 4: Kahneman and Tversky's, loss averse, risk seeking), the loss is

    w (1 - U( +-beta (d - Q) ))        + for good images, - for bad ones

Q, the reference point, is what an image gains on average: the mean of d, never below 0, without gradient.
Beta has the halved convention of the other trainers: the published code's, which has no half, is half of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign import losses
from diffalign.data import ImageDataset, open_images
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers import draws
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch, DenoisingConfig, DenoisingTrainer

ReferencePoint = Literal["batch", "balanced", "mismatched"]
KINDS = ("chosen", "rejected")  # what TRL calls the good and the bad ones


@dataclass(kw_only=True)
class DiffusionKTOConfig(DenoisingConfig):
    """Diffusion-KTO: align a model with images that were judged one by one.

    The data need a column label (true or 1 for good ones); of pairs, every image is taken by itself.

    Args:
        beta_kto: how strongly the model is held to its reference, for mean-reduced errors.
        utility: sigmoid (Kahneman and Tversky's), loss_averse or risk_seeking.
        reference_point: what the gain of an image is compared with: the mean over the images of one forward
            pass on all devices (batch), the mean of the means of good and bad ones (balanced), or the mean
            with each image under the caption of another, for two more forward passes (mismatched).
        good_share: share of good images in what is trained on; by default as in the data.
        weight_good: weight of good images.
        weight_bad: weight of bad ones.
    """

    learning_rate: float = 1e-5
    beta_kto: float = 2000.0
    utility: losses.Utility = "sigmoid"
    reference_point: ReferencePoint = "batch"
    good_share: float | None = None
    weight_good: float = 1.0
    weight_bad: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("beta_kto", self.beta_kto > 0, "above 0")
        for name, kind in (("utility", losses.Utility), ("reference_point", ReferencePoint)):
            self._need(name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        share = self.good_share
        self._need("good_share", share is None or 0 < share < 1, "between 0 and 1")
        for name in ("weight_good", "weight_bad"):
            self._need(name, getattr(self, name) >= 0, "0 or more")
        if self.reference_point == "mismatched":
            self._need("train_batch_size", self.train_batch_size >= 2, "at least 2 to swap captions")
            self._need("reference_draws", not self.reference_draws, "0 where captions are swapped")


class DiffusionKTOTrainer(DenoisingTrainer[DiffusionKTOConfig]):
    """``DiffusionKTOTrainer(config, model=pipeline_or_path, dataset=images_or_path).train()``."""

    method = "diffusion-kto"
    shardable = True
    unit = "image"
    watched = "validation/accuracies_by_pair"

    @property
    def beta(self) -> float:  # type: ignore[override]
        return self.config.beta_kto

    # ---------------------------------------------------------------- data

    def open_examples(self, source: Any, limit: int | None) -> ImageDataset:
        config = self.config
        if not isinstance(source, ImageDataset):
            source = open_images(
                source,
                split=config.dataset_split,
                columns=config.columns or None,
                max_bad=config.max_bad,
            )
        judged = [i for i, label in enumerate(source.labels) if label is not None and label != 0.5]
        return source.select(judged[:limit])

    def open_data(self) -> None:
        super().open_data()
        for what, examples in (("trained on", self.examples), ("held out", self.held_out)):
            good = 0 if examples is None else sum(p > 0.5 for p in examples.preferences)
            if examples is not None and not 0 < good < len(examples):
                raise UserError(
                    f"of the images of {examples.source} that are {what}, {good} have a good label and "
                    f"{len(examples) - good} a bad one, but diffusion-kto learns from both; with good ones "
                    "alone train with ddo or seppo"
                )

    def encode(self) -> None:
        super().encode()
        good = self.data.preference > 0.5
        self._rows_of = {kind: torch.nonzero(good == kind).flatten().tolist() for kind in (True, False)}

    def rows_at(self, positions: range) -> list[int]:
        share = self.config.good_share
        if share is None:
            return super().rows_at(positions)
        return [self._row_at(position, share) for position in positions]

    def _row_at(self, position: int, share: float) -> int:
        """Good rows at those positions where ``position * share`` passes a whole number: no state to keep."""
        before = int(position * share)
        good = int((position + 1) * share) > before
        place = before if good else position - before
        rows = self._rows_of[good]
        order = draws.rows_at(range(place, place + 1), seed=2 * self.config.seed + good, length=len(rows))
        return rows[order[0]]

    # ---------------------------------------------------------------- loss

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        config, batch = self.config, self.batch(step, slots)
        errors = self._errors(batch)
        gain, good = errors.log_ratio(), batch.preference > 0.5
        point = self._reference_point(gain.detach(), good, batch)
        loss = losses.kto(
            gain,
            good,
            self.beta,
            kl=point,
            weight_good=config.weight_good,
            weight_bad=config.weight_bad,
            utility=config.utility,
        )
        return loss * batch.weight, self._sums(errors, good, point, batch.empty)

    def _reference_point(self, gain: Tensor, good: Tensor, batch: Batch) -> Tensor:
        """Q, over all processes: the same number in each."""
        if self.config.reference_point == "mismatched":
            moved = {name: values.roll(1, 0) for name, values in batch.cond.items()}
            with torch.no_grad():
                gain = self._errors(replace(batch, cond=moved)).log_ratio()
        masks = torch.stack([good, ~good]).to(gain)
        sums = torch.cat([masks @ gain, masks.sum(1)])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        total, count = sums.chunk(2)
        if self.config.reference_point == "balanced":
            means = total / count.clamp(min=1)
            return losses.reference_point(means.sum() / (count > 0).sum())
        return losses.reference_point(total.sum() / count.sum())

    # ---------------------------------------------------------------- metrics

    def _sums(self, errors: Errors, good: Tensor, point: Tensor, empty: int) -> Tensor:
        """What :meth:`summarise` reads: of good and of bad ones their number, gain and errors; the rest."""
        assert errors.reference is not None
        gain = errors.log_ratio().detach().float()
        value = self.beta * torch.where(good, gain - point, point - gain)
        right = (value > 0).float() + 0.5 * (value == 0)
        masks = torch.stack([good, ~good]).float()
        policy = errors.policy.detach().float()
        columns = torch.stack([torch.ones_like(gain), gain, policy, errors.reference.float()], 1)
        rest = torch.stack([right.sum(), torch.sigmoid(-value).sum(), point.float() * len(gain)])
        return torch.cat([(masks @ columns).flatten(), rest, torch.full_like(rest[:1], float(empty))])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        kinds = dict(zip(KINDS, (sums[:4], sums[4:8]), strict=True))
        found = {kind: [value / k[0] for value in k[1:]] for kind, k in kinds.items() if k[0]}
        rewards = {f"rewards/{kind}": self.beta * means[0] for kind, means in found.items()}
        if len(rewards) == len(KINDS):
            rewards["rewards/margins"] = rewards["rewards/chosen"] - rewards["rewards/rejected"]
        right, factor, point, empty = (value / pairs for value in sums[8:])
        return {
            **rewards,
            "rewards/accuracies": right,
            "kl": self.beta * point,
            "gradient_factor": factor,
            "beta": self.beta,
            "beta_sum": self.beta / self.elements,
            **{f"errors/{kind}": means[1] for kind, means in found.items()},
            **{f"errors/reference_{kind}": means[2] for kind, means in found.items()},
            "good_share": sums[0] / pairs,
            "empty_captions": empty,
            "truncated_captions": self.truncated,
            "skipped_rows": len(self.examples.skipped),
        }

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        """``accuracies_by_pair``: how often a good image gained more than a bad one, over all couples."""
        assert self.validation_data is not None
        gain = self.beta * errors.log_ratio()[..., 0].mean(1)
        good = (self.validation_data.preference > 0.5).to(gain.device)
        gap = gain[good][:, None] - gain[~good]
        return {
            "validation/rewards/chosen": gain[good].mean().item(),
            "validation/rewards/rejected": gain[~good].mean().item(),
            "validation/rewards/margins": gap.mean().item(),
            "validation/accuracies_by_pair": ((gap > 0).double() + 0.5 * (gap == 0)).mean().item(),
        }


def run(config: DiffusionKTOConfig) -> TrainResult:
    """The command ``diffalign train diffusion-kto``."""
    return run_once(DiffusionKTOTrainer(config))
