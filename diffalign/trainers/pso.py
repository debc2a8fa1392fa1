"""PSO, pairwise sample optimisation (Miao et al. 2024): preference training of few-step distilled models that
leaves them few-step models.

*Online*: D3PO's clipped loss on the n - 1 noisy transitions of an n-step sampler, between two images of a
prompt from different noise. *Offline*: target images against the model's own samples of the same prompts,
noised to the times that the sampler visits and to no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffalign.errors import UserError
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.d3po import D3POConfig, D3POTrainer
from diffalign.trainers.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer, LossTerm

#: Where few-step models are asked in four steps: ``(4 - j) 1000 / 4 - 1``.
FOUR_STEPS = (999.0, 749.0, 499.0, 249.0)


@dataclass(kw_only=True)
class PSOConfig(D3POConfig):
    """PSO: align a few-step distilled model on its own samples.

    The last step of such a sampler adds no noise and is not trained, so it needs two or more. Without
    sample_timesteps they are those of sample_steps trailing steps: 999, 749, 499, 249 for four. (Where
    sample_steps does not divide 1000 the published script for DMD2 starts a few steps lower.)
    """

    learning_rate: float = 1e-5
    adam_weight_decay: float = 1e-6
    rank: int = 32
    beta: float = 50.0
    same_start: bool = False
    sample_steps: int = 4
    sample_guidance: float = 1.0
    sample_spacing: str | None = "trailing"
    transition: str = "renoise"


@dataclass(kw_only=True)
class PSOOfflineConfig(DiffusionDPOConfig):
    """PSO offline: teach a few-step distilled model a subject or style from pairs of target and own sample.

    Args:
        beta_dpo: of half errors; published recipes say 5 of whole ones.
        loss_type: pso_db, a hinge without reference, as in all released recipes; or pso.
        negative_weight: how hard own samples are pushed away, against targets.
        prior_weight: of the error of own samples, which keeps what the model could before; 0.5 as published.
        timesteps: those that the sampler visits, by value.
    """

    learning_rate: float = 1e-4
    rank: int = 16
    beta_dpo: float = 10.0
    weighting: str = "eps"
    loss_type: Literal["pso", "pso_db"] = "pso_db"  # type: ignore[assignment]
    negative_weight: float = 0.1
    prior_weight: float = 0.0
    timesteps: list[float] = field(default_factory=lambda: list(FOUR_STEPS))

    def check(self) -> None:
        if self.loss_type not in ("pso", "pso_db"):
            raise UserError(f"loss_type must be pso or pso_db, but is {self.loss_type!r}")
        self._need("negative_weight", self.negative_weight >= 0, "0 or more")
        self._need("prior_weight", self.prior_weight >= 0, "0 or more")
        super().check()

    def terms(self) -> list[LossTerm]:
        options = {"negative_weight": self.negative_weight}
        main = LossTerm(name=self.loss_type, options=options)
        # Half of beta times the error: beta 2 is the error itself.
        kept = LossTerm(name="prior", weight=self.prior_weight, beta=2.0)
        return [main, kept] if self.prior_weight else [main]


class PSOTrainer(D3POTrainer):
    """``PSOTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``."""

    method = "pso"


class PSOOfflineTrainer(DiffusionDPOTrainer):
    """``PSOOfflineTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "pso-offline"


def run(config: PSOConfig) -> TrainResult:
    """The command ``diffalign train pso``."""
    return run_once(PSOTrainer(config))


def run_offline(config: PSOOfflineConfig) -> TrainResult:
    """The command ``diffalign train pso-offline``."""
    return run_once(PSOOfflineTrainer(config))
