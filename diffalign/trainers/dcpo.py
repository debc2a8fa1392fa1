"""DCPO (Saeidi et al. 2025): Diffusion-DPO in which each image of a pair has a caption of its own.

    z = beta [ (ell - ell_ref)(chosen | its caption) - (ell - ell_ref)(rejected | its caption) ]

With a prompt that both images share, a pair's images are often too alike for it to tell them apart; captions
that describe each image, or a rewriting of the prompt for the rejected one, widen the margin. The prompts'
partition functions no longer cancel, so read it as a heuristic. Where both captions are one it is
Diffusion-DPO, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.errors import UserError
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer


@dataclass(kw_only=True)
class DCPOConfig(DiffusionDPOConfig):
    """DCPO: align a text-to-image model with pairs whose images have captions of their own.

    The data need the columns caption_chosen and caption_rejected: 'diffalign data caption' describes both
    images, 'diffalign data perturb' rewrites the prompt (or the caption) for the rejected one, and the two in
    turn are the hybrid that did best in the paper.
    """

    beta_dpo: float = 500.0

    def check(self) -> None:
        super().check()
        self._need(
            "proportion_empty_prompts",
            self.proportion_empty_prompts == 0,
            "0: a pair without captions has none to tell its images apart",
        )


class DCPOTrainer(DiffusionDPOTrainer):
    """``DCPOTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``."""

    method = "dcpo"

    def open_data(self) -> None:
        super().open_data()
        if not any(chosen != rejected for chosen, rejected in self.pairs.captions):
            raise UserError(
                "no image of this data has a caption of its own; make them with 'diffalign data caption' or "
                "'diffalign data perturb', or train with diffusion-dpo"
            )


def run(config: DCPOConfig) -> TrainResult:
    """The command ``diffalign train dcpo``."""
    return run_once(DCPOTrainer(config))
