"""SePPO (Zhang et al. 2024): self-play between good images and samples of the model's earlier selves.

With ``d(x) = ell(x) - ell_ref(x)``, a good image x_w and a sample x_r of the reference under its caption::

    -log s( beta [ d(x_w) - sign(d(x_w)) d(x_r) ] )

While the policy fits the good image worse than the reference does, the sample is pulled up as well instead of
being pushed down: it may not be the worse one. In the first step of a run d is 0 and so is its sign, and what
is left is fine-tuning. References are drawn from all checkpoints of the run. With ``flip`` none and
``reference_pool`` latest this is SPIN-Diffusion (Yuan et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign import losses
from diffalign.likelihood import Errors
from diffalign.trainers import draws
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch
from diffalign.trainers.self_play import SelfPlayConfig, SelfPlayTrainer

ReferencePool = Literal["uniform", "latest", "first"]


@dataclass(kw_only=True)
class SePPOConfig(SelfPlayConfig):
    """SePPO: align a model with good images and captions alone; it makes the other half of each pair itself.

    The data are single images, or pairs, of which only the chosen images are used.

    Args:
        beta_seppo: how strongly the model is held to its reference, for mean-reduced errors.
        flip: what becomes of the sample while the policy fits the good image worse than the reference: it is
            pulled up (sign), left alone (indicator), or pushed down all the same (none).
        reference_pool: which earlier weights are the reference: drawn from all rounds (uniform), those at the
            start of the round (latest), or the initial ones (first).
    """

    learning_rate: float = 1e-5
    beta_seppo: float = 2000.0
    flip: losses.Flip = "sign"
    reference_pool: ReferencePool = "uniform"

    def check(self) -> None:
        super().check()
        self._need("beta_seppo", self.beta_seppo > 0, "above 0")
        for name, kind in (("flip", losses.Flip), ("reference_pool", ReferencePool)):
            self._need(name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")


class SePPOTrainer(SelfPlayTrainer[SePPOConfig]):
    """``SePPOTrainer(config, model=pipeline_or_path, dataset=images_or_path).train()``."""

    method = "seppo"

    @property
    def beta(self) -> float:  # type: ignore[override]
        return self.config.beta_seppo

    def reference_of(self, number: int) -> int:
        drawn = int(draws.generator(self.config.seed, "reference", number).integers(number + 1))
        return {"uniform": drawn, "latest": number, "first": 0}[self.config.reference_pool]

    def pair_loss(self, errors: Errors, batch: Batch) -> tuple[Tensor, Tensor]:
        chosen, rejected = errors.log_ratio().chunk(2)
        logit = losses.seppo_logit(chosen, rejected, self.beta, flip=self.config.flip)
        return -torch.nn.functional.logsigmoid(logit), logit

    def _sums(self, errors: Errors, logit: Tensor, batch: Batch) -> Tensor:
        worse = errors.log_ratio().detach().chunk(2)[0] < 0
        return torch.cat([super()._sums(errors, logit, batch), worse.sum()[None].float()])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        own = {"flip_rate": sums[-1] / pairs, "reference_age": self.age}
        return super().summarise(sums[:-1], pairs) | own


def run(config: SePPOConfig) -> TrainResult:
    """The command ``diffalign train seppo``."""
    return run_once(SePPOTrainer(config))
