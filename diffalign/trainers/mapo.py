"""MaPO (Hong et al. 2024): preference optimisation without a reference, bounded by what a denoiser can err.

With ``e`` the mean denoising error, ``phi(x) = x / (e^x - 1)`` and T training steps, the loss of a pair is

    e_w - beta log s( T (phi(snr e_w) - phi(snr e_l)) )

a fine-tuning term on the chosen image and a margin: no second forward pass, no second network.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffalign import losses
from diffalign.likelihood import Errors
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch
from diffalign.trainers.pairs import PairConfig, PairTrainer


@dataclass(kw_only=True)
class MaPOConfig(PairConfig):
    """MaPO: align a model with preference pairs, without a reference model.

    Args:
        beta_mapo: weight of the preference beside the fine-tuning of the chosen image.
        snr: what errors are multiplied with inside phi, a constant in the published code.
        sft_weight: weight of the fine-tuning term.
    """

    learning_rate: float = 1e-5
    beta_mapo: float = 0.1
    snr: float = 0.5
    sft_weight: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("beta_mapo", self.beta_mapo > 0, "above 0")
        self._need("snr", self.snr > 0, "above 0")
        self._need("sft_weight", self.sft_weight >= 0, "0 or more")
        self._need("reference_draws", self.reference_draws == 0, "0: MaPO has no reference")
        self._need("ties", self.ties != "soft", "drop or error: MaPO has no odds to train towards")


class MaPOTrainer(PairTrainer[MaPOConfig]):
    """``MaPOTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "mapo"
    shardable = True
    needs_reference = False

    @property
    def beta(self) -> float:  # type: ignore[override]
        """Of the logged rewards: with it their margin is the logit, to first order."""
        return self.config.snr * self.adapter.schedule.num_train_timesteps

    def pair_loss(self, errors: Errors, batch: Batch) -> tuple[Tensor, Tensor]:
        config, steps = self.config, self.adapter.schedule.num_train_timesteps
        chosen, rejected = errors.log_ratio().chunk(2)
        options = {"snr": config.snr, "steps": float(steps), "sft_weight": config.sft_weight}
        return losses.mapo(chosen, rejected, config.beta_mapo, **options), losses.mapo_logit(
            chosen, rejected, snr=config.snr, steps=float(steps)
        )


def run(config: MaPOConfig) -> TrainResult:
    """The command ``diffalign train mapo``."""
    return run_once(MaPOTrainer(config))
