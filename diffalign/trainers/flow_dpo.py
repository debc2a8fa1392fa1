"""Flow-DPO (Liu et al. 2025): Diffusion-DPO for flow models.

On the path ``x_s = (1 - s) x0 + s z`` a network predicts the velocity ``v = z - x0``. With noise and s shared
in a pair and ``e = mean((v_hat - v)^2)``, the loss is

    -log s( -beta_s/2 [ (e_w - e_w,ref) - (e_l - e_l,ref) ] )

The velocity's error is the noise's error over ``(1 - s)^2``: ``beta_s = beta (1 - s)^2`` mirrors
Diffusion-DPO, a constant ``beta_s = beta`` is what the authors found to work better. Both are Diffusion-DPO
on a flow model, in the units of noise or of velocity; what is here are the published recipe's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffalign.errors import UserError
from diffalign.models import ModelAdapter
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer

#: beta_schedule -> what the error of a velocity is measured in.
WEIGHTING_OF = {"constant": "native", "one_minus_s_squared": "eps"}


@dataclass(kw_only=True)
class FlowDPOConfig(DiffusionDPOConfig):
    """Flow-DPO: align a flow model (SD3, Flux, Wan, ...) with preference pairs.

    Args:
        beta_schedule: how beta depends on the noise s: constant, or one_minus_s_squared, beta (1 - s)^2, the
            form that mirrors Diffusion-DPO's.
    """

    beta_dpo: float = 100.0
    beta_schedule: Literal["constant", "one_minus_s_squared"] = "constant"
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"

    def __post_init__(self) -> None:
        if self.weighting == "native" and self.beta_schedule in WEIGHTING_OF:
            self.weighting = WEIGHTING_OF[self.beta_schedule]

    def check(self) -> None:
        super().check()
        self._need("beta_schedule", self.beta_schedule in WEIGHTING_OF, f"one of {', '.join(WEIGHTING_OF)}")
        if self.beta_schedule != "constant" and self.weighting != WEIGHTING_OF[self.beta_schedule]:
            raise UserError(
                f"beta_schedule {self.beta_schedule} is weighting {WEIGHTING_OF[self.beta_schedule]}: leave "
                f"weighting {self.weighting} out, or keep beta_schedule constant"
            )


class FlowDPOTrainer(DiffusionDPOTrainer):
    """``FlowDPOTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "flow-dpo"

    def _load_model(self) -> ModelAdapter:
        return needs_flow(super()._load_model(), "flow-dpo", "diffusion-dpo")


def needs_flow(adapter: ModelAdapter, method: str, instead: str) -> ModelAdapter:
    """The adapter, if its network predicts the velocity of a flow.

    Raises:
        UserError: it predicts something else.
    """
    if adapter.prediction_type != "flow_prediction":
        raise UserError(
            f"{method} is for flow models, but this one predicts {adapter.prediction_type}: train it with "
            f"'diffalign train {instead}'"
        )
    return adapter


def run(config: FlowDPOConfig) -> TrainResult:
    """The command ``diffalign train flow-dpo``."""
    return run_once(FlowDPOTrainer(config))
