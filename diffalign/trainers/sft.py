"""Fine-tuning on the chosen images alone: what every preference method should beat.

The loss is the denoising error of the chosen image; rejected ones are encoded, but never seen by the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.pairs import PairConfig, PairTrainer


@dataclass(kw_only=True)
class SFTConfig(PairConfig):
    """SFT: fine-tune a model on the chosen images of preference pairs."""

    learning_rate: float = 1e-5

    def check(self) -> None:
        super().check()
        self._need("reference_draws", self.reference_draws == 0, "0: fine-tuning has no reference")
        self._need("low_memory", not self.low_memory, "false: fine-tuning has one image per pair anyway")
        self._need("ties", self.ties != "soft", "drop or error: a tie has no chosen image")


class SFTTrainer(PairTrainer[SFTConfig]):
    """``SFTTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "sft"
    shardable = True
    needs_reference = False
    watched = "validation/rewards/chosen"
    beta = 1.0

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        batch = self.batch(step, slots)
        errors = self._errors(batch.row(0)).policy
        empty = torch.tensor(float(batch.empty), device=errors.device)
        return errors, torch.stack([errors.detach().sum().float(), empty])

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        return {
            "errors/chosen": sums[0] / pairs,
            "empty_captions": sums[1] / pairs,
            "truncated_captions": self.truncated,
            "skipped_rows": len(self.pairs.skipped),
        }


def run(config: SFTConfig) -> TrainResult:
    """The command ``diffalign train sft``."""
    return run_once(SFTTrainer(config))
