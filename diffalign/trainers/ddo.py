"""DDO (Zheng et al. 2025): the likelihood ratio as the discriminator of a GAN, without a second network.

``Delta(x) = -|f(x_t) - y|^2 + |f_ref(x_t) - y|^2``, summed over the elements of a latent, tells real images
from samples of the reference, and so the policy is trained as a discriminator::

    -log s( beta Delta(x_data) ) - alpha log s( -beta Delta(x_reference) )

Noise and time of the two images are independent. At its optimum with alpha = beta = 1 the policy is the
distribution of the data. The next round starts from it: it is the new reference, samples are made anew and
the optimiser begins afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign import losses
from diffalign.likelihood import Errors
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch
from diffalign.trainers.self_play import SelfPlayConfig, SelfPlayTrainer

FAR = 20.0  # sigmoid inputs beyond it have no gradient left


@dataclass(kw_only=True)
class DDOConfig(SelfPlayConfig):
    """DDO: move a model from its own samples towards real images.

    The data are single images with captions, or pairs, of which only the chosen images are used.

    Args:
        beta_ddo: temperature, for errors summed over the elements of a latent, as in the paper (0.01 to 0.1
            there). The trainer's log gives beta in the convention of the other methods: beta_ddo times twice
            the number of elements.
        alpha_ddo: weight of the model's own samples (0.5 to 50 in the paper).
    """

    learning_rate: float = 1e-5
    beta_ddo: float = 0.05
    alpha_ddo: float = 4.0
    round_steps: int = 200
    sampling_guidance_scale: float = 1.0

    def check(self) -> None:
        super().check()
        self._need("beta_ddo", self.beta_ddo > 0, "above 0")
        self._need("alpha_ddo", self.alpha_ddo > 0, "above 0")


class DDOTrainer(SelfPlayTrainer[DDOConfig]):
    """``DDOTrainer(config, model=pipeline_or_path, dataset=images_or_path).train()``."""

    method = "ddo"
    times: ClassVar[int] = 2

    def encode(self) -> None:
        super().encode()
        self.beta = 2 * self.config.beta_ddo * self.data.batch([0])["latents"].numel()

    def reference_of(self, number: int) -> int:
        return number

    def start_round(self, number: int) -> None:
        if number == 0:
            return
        self.optimizer.state.clear()
        if self.ema:
            self.ema.copy_to(self.weights.trainable)
            self.ema.optimization_step = 0

    def pair_loss(self, errors: Errors, batch: Batch) -> tuple[Tensor, Tensor]:
        chosen, rejected = errors.log_ratio().chunk(2)
        loss = losses.ddo(chosen, rejected, self.beta, fake_weight=self.config.alpha_ddo)
        return loss, self.beta * (chosen - rejected) / 2  # on average the discriminator's logit

    def _sums(self, errors: Errors, logit: Tensor, batch: Batch) -> Tensor:
        far = (self.beta * errors.log_ratio().detach()).abs() > FAR
        return torch.cat([super()._sums(errors, logit, batch), far.sum()[None].float()])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        own = {"logits_far": sums[-1] / (2 * pairs), "round": self._round}
        return super().summarise(sums[:-1], pairs) | own


def run(config: DDOConfig) -> TrainResult:
    """The command ``diffalign train ddo``."""
    return run_once(DDOTrainer(config))
