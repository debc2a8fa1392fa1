"""Diffusion-DPO (Wallace et al. 2023) and the family of losses on its log-ratios.

With shared noise and time in a pair, ``z = beta [ (ell - ell_ref)(chosen) - (ell - ell_ref)(rejected) ]``,
``ell = -1/2 mean((f - y)^2)``, and the loss is ``-log s(z)`` or any row of :data:`diffalign.losses.LOSSES`.
Beta has this halved convention of the paper's code; diffusers' LoRA research script, which leaves the half
out, has the same strength at half the beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError, suggestion
from diffalign.likelihood import Errors
from diffalign.losses import (
    LOSSES,
    automatic_beta,
    dspo_residual,
    get_loss,
    nats_per_unit,
    scale_gradient,
    winner_preserving_scale,
)
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch
from diffalign.trainers.moving import MovingConfig, MovingReferenceTrainer

# Of the running means of margins (of an automatic beta), of gains (of the loss bco) and of their squares (of
# losses that exponentiate them).
MEMORY = 0.95


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One term of a weighted sum of losses.

    Args:
        name: a row of diffalign.losses.LOSSES.
        weight: how much it counts.
        beta: a beta of its own instead of beta_dpo.
        options: settings of the loss.
    """

    name: str
    weight: float = 1.0
    beta: float | None = None
    options: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: names the loss, or its setting, and the nearest known one.
        """
        loss = get_loss(self.name)
        for name in self.options:
            if name not in loss.options:
                allowed = ", ".join(loss.options) or "none"
                raise UserError(
                    f"loss_type {self.name} has no setting {name!r}"
                    f"{suggestion(name, list(loss.options))} (it has: {allowed})"
                )
        if self.beta is not None and self.beta <= 0:
            raise UserError(f"beta of {self.name} must be above 0, but is {self.beta}")


@dataclass(kw_only=True)
class DiffusionDPOConfig(MovingConfig):
    """Diffusion-DPO: align a text-to-image model with preference pairs.

    Args:
        beta_dpo: how strongly the model is held to its reference, for mean-reduced errors; 500 to 5000. The
            gradient grows with it: learning_rate times beta_dpo is what sets the pace.
        beta_target: if above 0, beta follows the margins so that the mean gradient factor stays near this,
            such as 0.2; beta_dpo is where it starts.
        loss_type: a row of diffalign.losses.LOSSES: sigmoid, robust, ipo, hinge, exo_pair, nca_pair,
            apo_zero, sppo, dpop, alpha_dpo, ...; simpo, cpo, alphapo, orpo and mapo need no reference; modpo,
            odpo and soft_labels need scores of both images (diffalign data score).
        label_smoothing: probability that a label is wrong; for sigmoid, robust, exo_pair, aot and a few
            more.
        loss_options: further settings of a loss, such as penalty for dpop or gamma for simpo. The scale that
            forward_kl, js and alpha_divergence multiply log-ratios with follows their running size, so that
            it comes to about 1, and beta_dpo keeps its meaning, unless scale is given here; then beta_dpo is
            for log-ratios times that scale.
        sft_weight: adds so many times the denoising error of the chosen image, in units of beta/2: 1 pulls as
            hard as an unsure pair pushes. A guard against falling winners.
        sdpo_mu: if set, the gradient of the rejected image's error is scaled down as far as it must be for a
            step not to raise the chosen image's error (Diffusion-SDPO): 0 is the bare bound, larger values
            keep clear of it. Published: 0.9 for SD 1.5, 0.6 for SDXL.
        sdpo_scope: a scale for each pair, or, as published, one for all pairs of a forward pass (batch).
        dspo_beta: if above 0, the loss is DSPO's: the chosen image's error, from whose residual dspo_beta
            s(-z) times the way from the reference's prediction is taken. The published code has 0.001 for it
            and for beta_dpo.
        losses: a weighted sum of losses in place of loss_type, each with a weight (1), a beta (beta_dpo) and
            options of its own, such as [{name: sigmoid}, {name: sft, weight: 0.1}].
    """

    learning_rate: float = 1e-5
    beta_dpo: float = 2000.0
    beta_target: float = 0.0
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    loss_options: dict[str, float] = field(default_factory=dict)
    sft_weight: float = 0.0
    sdpo_mu: float | None = None
    sdpo_scope: Literal["pair", "batch"] = "pair"
    dspo_beta: float = 0.0
    losses: list[LossTerm] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        self._need("beta_dpo", self.beta_dpo > 0, "above 0")
        self._need("beta_target", 0 <= self.beta_target < 0.5, "at least 0 and below 0.5")
        self._need("label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5")
        self._need("sft_weight", self.sft_weight >= 0, "0 or more")
        alone = self.loss_type != "sigmoid" or self.label_smoothing or self.loss_options or self.sft_weight
        if self.losses and alone:
            raise UserError(
                "losses take the place of loss_type, label_smoothing, loss_options and sft_weight: write "
                "those as terms such as {name: robust, options: {label_smoothing: 0.1}} and {name: sft}"
            )
        self._need("sdpo_mu", self.sdpo_mu is None or 0 <= self.sdpo_mu <= 1, "between 0 and 1")
        self._need("sdpo_scope", self.sdpo_scope in ("pair", "batch"), "pair or batch")
        if self.low_memory and self.sdpo_mu is not None and self.sdpo_scope == "batch":
            raise UserError(
                "sdpo_scope batch looks at all pairs of a batch, which low_memory takes one by one"
            )
        self._need("dspo_beta", self.dspo_beta >= 0, "0 or more")
        if self.dspo_beta and (self.losses or alone or self.low_memory or self.reference_draws):
            raise UserError(
                "dspo_beta is a loss of its own, on predictions of policy and reference: leave out losses, "
                "loss_type, label_smoothing, loss_options, sft_weight, low_memory and reference_draws"
            )
        if self.draws_per_example > 1 and (self.sdpo_mu is not None or self.dspo_beta):
            raise UserError(
                "sdpo_mu and dspo_beta look at one prediction per image: draws_per_example must be 1"
            )
        for term in self.terms():
            term.check()
            if self.low_memory and LOSSES[term.name].batchwise:
                raise UserError(
                    f"loss_type {term.name} compares the pairs of a batch, which low_memory takes one by one"
                )
        if self.reference_draws and not self.needs_reference():
            names = ", ".join(term.name for term in self.terms())
            raise UserError(f"loss_type {names} needs no reference, so reference_draws must be 0")

    def terms(self) -> list[LossTerm]:
        """The sum that is trained: `losses`, or what the options for a single loss amount to."""
        if self.losses:
            return self.losses
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        main = LossTerm(name=self.loss_type, options=smoothing | self.loss_options)
        return [main] + ([LossTerm(name="sft", weight=self.sft_weight)] if self.sft_weight else [])

    def needs_reference(self) -> bool:
        """Whether any term compares with a reference."""
        return any(get_loss(term.name).reference for term in self.terms())


class DiffusionDPOTrainer(MovingReferenceTrainer[DiffusionDPOConfig]):
    """``DiffusionDPOTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "diffusion-dpo"
    shardable = True

    def __init__(self, config: DiffusionDPOConfig, model: Any = None, dataset: Any = None) -> None:
        super().__init__(config, model, dataset)
        self.terms = config.terms()
        self.needs_reference = config.needs_reference()
        self.needs_predictions = config.sdpo_mu is not None or config.dspo_beta > 0
        self.beta = config.beta_dpo
        self._margin: float | None = None
        self._gain = 0.0
        self._square = 0.0
        self._exponential = any(LOSSES[t.name].exponential and "scale" not in t.options for t in self.terms)

    def after_step(self, margin: float, gain: float) -> None:
        if self.warming:
            return
        self._gain = MEMORY * self._gain + (1 - MEMORY) * gain
        if self.config.beta_target and margin > 0:
            before = margin if self._margin is None else self._margin
            self._margin = MEMORY * before + (1 - MEMORY) * margin
            self.beta = automatic_beta(self._margin, target=self.config.beta_target)

    def state(self) -> dict[str, Any]:
        return {"margin": self._margin, "beta": self.beta, "gain": self._gain, "square": self._square}

    def load_state(self, state: dict[str, Any]) -> None:
        self._gain, self._square = state.get("gain", 0.0), state.get("square", 0.0)
        if self.config.beta_target and state:
            self._margin, self.beta = state["margin"], state["beta"]

    @property
    def nats(self) -> float:
        """How many nats a log-ratio of 1 is taken for, from the steps so far; the same in all processes."""
        return nats_per_unit(self._square)

    def _sums(self, errors: Errors, logit: Tensor, batch: Batch) -> Tensor:
        sums = super()._sums(errors, logit, batch)
        if not self._exponential:
            return sums
        return torch.cat([sums, errors.log_ratio().detach().float().square().sum()[None]])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        if not self._exponential:
            return super().summarise(sums, pairs)
        used, square = self.nats, sums[-1] / (2 * pairs)
        if square > 0 and not self.warming:  # all are 0 at the reference, which says nothing of their size
            before = self._square or square
            self._square = MEMORY * before + (1 - MEMORY) * square
        return super().summarise(sums[:-1], pairs) | {"log_ratio_scale": used}

    def open_data(self) -> None:
        super().open_data()
        asking = [f"loss_type {term.name}" for term in self.terms if "gap" in LOSSES[term.name].inputs]
        asking += ["curriculum_stages"] if self.config.curriculum_stages else []
        if not asking:
            return
        scores = self.pairs.properties("score")
        missing = sum(not all(isinstance(s, int | float) and math.isfinite(s) for s in two) for two in scores)
        if missing:
            raise UserError(
                f"{asking[0]} wants a score of both images of every pair, which {missing} of "
                f"{len(self.pairs)} pairs lack: write them with 'diffalign data score'"
            )

    def pair_loss(self, errors: Errors, batch: Batch) -> tuple[Tensor, Tensor]:
        config = self.config
        if self.warming:
            chosen, rejected = errors.log_ratio().chunk(2)
            return errors.policy.reshape(2, -1).mean(0), self.beta * (chosen - rejected)
        if config.sdpo_mu is not None and errors.residual is not None:
            errors = spare_winner(errors, errors.residual, config.sdpo_mu, config.sdpo_scope == "pair")
        if config.dspo_beta:
            return self._dspo(errors)
        policy = -0.5 * errors.policy
        reference = None if errors.reference is None else -0.5 * errors.reference
        terms = [term.weight * self._term(term, policy, reference, batch) for term in self.terms]
        chosen, rejected = errors.log_ratio().chunk(2)
        return torch.stack(terms).sum(0), self.beta * (chosen - rejected)

    def _dspo(self, errors: Errors) -> tuple[Tensor, Tensor]:
        """DSPO (Zhu et al. 2025), whose loss is a mean square over the elements of the chosen image."""
        assert errors.residual is not None
        assert errors.shift is not None
        chosen, rejected = errors.log_ratio().chunk(2)
        logit = self.beta * (chosen - rejected)
        residual, shift = (values.chunk(2)[0] for values in (errors.residual, errors.shift))
        moved = dspo_residual(residual, shift, logit, self.config.dspo_beta)
        return moved.square().flatten(1).mean(1), logit

    def _term(self, term: LossTerm, policy: Tensor, reference: Tensor | None, batch: Batch) -> Tensor:
        """One loss ``(B,)`` of log-likelihoods ``(2B,)``."""
        loss, preference, gap = LOSSES[term.name], batch.preference, batch.gap
        beta = self.beta if term.beta is None else term.beta
        reference = reference if loss.reference else None
        together = loss.batchwise and self.accelerator.num_processes > 1
        if together:
            policy, preference, gap = self._all(policy, 2), self._all(preference), self._all(gap)
            reference = None if reference is None else self._all(reference, 2)
        options: dict[str, Any] = {"reward_mean": beta * self._gain, "nats": self.nats, **term.options}
        losses = loss(policy, reference, beta, preference=preference, gap=gap, **options)
        if self.config.ties == "soft" and "preference" not in loss.inputs:
            # The chosen one won only with this probability.
            turned = (swap(policy), None if reference is None else swap(reference))
            swapped = loss(*turned, beta, preference=preference, gap=-gap, **options)
            losses = preference * losses + (1 - preference) * swapped
        if not together:
            return losses
        # Each process has the loss of all pairs and the gradient of its own: their mean is to be the whole.
        mean = (losses * self._all(batch.weight)).mean() / batch.weight
        return scale_gradient(mean, torch.full_like(mean, self.accelerator.num_processes))

    def _all(self, rows: Tensor, sides: int = 1) -> Tensor:
        """Rows ``(sides * B,)`` of all processes, side by side, with the gradient of this one's own."""
        own, rank = rows.reshape(1, sides, -1), self.accelerator.process_index
        gathered = self.accelerator.gather(own.detach())
        return torch.cat([gathered[:rank], own, gathered[rank + 1 :]]).transpose(0, 1).flatten()


def spare_winner(errors: Errors, residual: Tensor, mu: float, per_pair: bool) -> Errors:
    """The same errors, with the gradient of the rejected ones scaled as Diffusion-SDPO does."""
    chosen, rejected = errors.policy.chunk(2)
    scale = winner_preserving_scale(*residual.chunk(2), mu=mu, per_pair=per_pair)
    return replace(errors, policy=torch.cat([chosen, scale_gradient(rejected, scale)]))


def swap(rows: Tensor) -> Tensor:
    """``[chosen, rejected]`` as ``[rejected, chosen]``."""
    return rows.roll(len(rows) // 2)


def run(config: DiffusionDPOConfig) -> TrainResult:
    """The command ``diffalign train diffusion-dpo``."""
    return run_once(DiffusionDPOTrainer(config))
