"""Diffusion-DPO (Wallace et al. 2023) and the family of losses on its log-ratios.

With shared noise and time in a pair, ``z = beta [ (ell - ell_ref)(chosen) - (ell - ell_ref)(rejected) ]``,
``ell = -1/2 mean((f - y)^2)``, and the loss is ``-log s(z)`` or any row of :data:`diffalign.losses.LOSSES`.
Beta has this halved convention of the paper's code; diffusers' LoRA research script, which leaves the half
out, has the same strength at half the beta.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffalign.errors import UserError, suggestion
from diffalign.likelihood import Errors
from diffalign.losses import automatic_beta, get_loss
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.pairs import PairConfig, PairTrainer

MARGIN_MEMORY = 0.95  # of the running mean that an automatic beta follows


@dataclass(kw_only=True)
class DiffusionDPOConfig(PairConfig):
    """Diffusion-DPO: align a text-to-image model with preference pairs.

    Args:
        beta_dpo: how strongly the model is held to its reference, for mean-reduced errors; 500 to 5000. The
            gradient grows with it: learning_rate times beta_dpo is what sets the pace.
        beta_target: if above 0, beta follows the margins so that the mean gradient factor stays near this,
            such as 0.2; beta_dpo is where it starts.
        loss_type: a row of diffalign.losses.LOSSES: sigmoid, robust, ipo, hinge, exo_pair, nca_pair,
            apo_zero, sppo, dpop, alpha_dpo, ...; simpo, cpo, alphapo, orpo and mapo need no reference.
        label_smoothing: probability that a label is wrong; for sigmoid, robust, exo_pair, aot and a few
            more.
        loss_options: further settings of a loss, such as penalty for dpop or gamma for simpo.
        sft_weight: adds so many times the denoising error of the chosen image, in units of beta/2: 1 pulls as
            hard as an unsure pair pushes. A guard against falling winners.
    """

    learning_rate: float = 1e-5
    beta_dpo: float = 2000.0
    beta_target: float = 0.0
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    loss_options: dict[str, float] = field(default_factory=dict)
    sft_weight: float = 0.0

    def check(self) -> None:
        super().check()
        self._need("beta_dpo", self.beta_dpo > 0, "above 0")
        self._need("beta_target", 0 <= self.beta_target < 0.5, "at least 0 and below 0.5")
        self._need("label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5")
        self._need("sft_weight", self.sft_weight >= 0, "0 or more")
        loss = get_loss(self.loss_type)
        for name in self.options():
            if name not in loss.options:
                allowed = ", ".join(loss.options) or "none"
                raise UserError(
                    f"loss_type {self.loss_type} has no setting {name!r}"
                    f"{suggestion(name, list(loss.options))} (it has: {allowed})"
                )
        if "gap" in loss.inputs:
            raise UserError(f"loss_type {self.loss_type} needs score gaps, which this trainer does not read")
        if self.low_memory and loss.batchwise:
            raise UserError(
                f"loss_type {self.loss_type} compares the pairs of a batch, which low_memory takes one by one"
            )
        if self.reference_draws and not loss.reference:
            raise UserError(f"loss_type {self.loss_type} needs no reference, so reference_draws must be 0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return smoothing | self.loss_options


class DiffusionDPOTrainer(PairTrainer[DiffusionDPOConfig]):
    """``DiffusionDPOTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "diffusion-dpo"

    def __init__(self, config: DiffusionDPOConfig, model: Any = None, dataset: Any = None) -> None:
        super().__init__(config, model, dataset)
        self.loss = get_loss(config.loss_type)
        self.needs_reference = self.loss.reference
        self.beta = config.beta_dpo
        self._margin: float | None = None

    def after_step(self, margin: float) -> None:
        if self.config.beta_target and margin > 0:
            before = margin if self._margin is None else self._margin
            self._margin = MARGIN_MEMORY * before + (1 - MARGIN_MEMORY) * margin
            self.beta = automatic_beta(self._margin, target=self.config.beta_target)

    def state(self) -> dict[str, Any]:
        return {"margin": self._margin, "beta": self.beta} if self.config.beta_target else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.config.beta_target and state:
            self._margin, self.beta = state["margin"], state["beta"]

    def pair_loss(self, errors: Errors, preference: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        policy = -0.5 * errors.policy
        reference = None if errors.reference is None else -0.5 * errors.reference

        def losses_of(policy: Tensor, reference: Tensor | None) -> Tensor:
            return self.loss(policy, reference, self.beta, preference=preference, **config.options())

        losses = losses_of(policy, reference)
        if config.ties == "soft" and "preference" not in self.loss.inputs:
            # The chosen one won only with this probability.
            swapped = losses_of(swap(policy), None if reference is None else swap(reference))
            losses = preference * losses + (1 - preference) * swapped
        if config.sft_weight:
            losses = losses + config.sft_weight * 0.5 * self.beta * errors.policy.chunk(2)[0]
        chosen, rejected = errors.log_ratio().chunk(2)
        return losses, self.beta * (chosen - rejected)


def swap(rows: Tensor) -> Tensor:
    """``[chosen, rejected]`` as ``[rejected, chosen]``."""
    return rows.roll(len(rows) // 2)


def run(config: DiffusionDPOConfig) -> TrainResult:
    """The command ``diffalign train diffusion-dpo``."""
    return run_once(DiffusionDPOTrainer(config))
