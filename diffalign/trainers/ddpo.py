"""Policy gradients on one's own samples: DDPO (Black et al. 2023) and, on flow models with their SDE,
Flow-GRPO (Liu et al. 2025). Kept to compare preference methods with.

    A = (r - mean of the prompt's rewards) / std          how much better an image is than its siblings
    q = p_policy(x' | x) / p_sampling(x' | x)
    loss = max(-A q, -A clamp(q, 1 - clip, 1 + clip)) + kl_weight KL(policy || reference)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.losses import policy_gradient
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.groups import advantages
from diffalign.trainers.online import Item, Members, OnlineConfig, OnlineTrainer


@dataclass(kw_only=True)
class DDPOConfig(OnlineConfig):
    """DDPO: policy gradient on one's own samples.

    Args:
        clip: the likelihood ratio counts within 1 +- this; 1e-4 belongs to likelihoods that are means.
        advantage_clip: advantages are held within +- this.
        advantage_scale: std of the prompt's own images (group) or of the whole round (global).
        kl_weight: of the divergence from the starting model, mean over the elements; 0 runs no reference.
        detach_uncond: no gradient through the unconditional branch of guidance.
    """

    learning_rate: float = 3e-5
    adam_weight_decay: float = 1e-4
    rank: int = 4
    images_per_prompt: int = 8
    clip: float = 1e-4
    advantage_clip: float = 5.0
    advantage_scale: Literal["group", "global"] = "group"
    kl_weight: float = 0.0
    detach_uncond: bool = False

    def check(self) -> None:
        super().check()
        self._need("clip", 0 < self.clip < 1, "above 0 and below 1")
        self._need("advantage_clip", self.advantage_clip > 0, "above 0")
        self._need("kl_weight", self.kl_weight >= 0, "0 or more")
        self._need("images_per_prompt", self.images_per_prompt >= 2, "at least 2: they are compared")


@dataclass(kw_only=True)
class FlowGRPOConfig(DDPOConfig):
    """Flow-GRPO: policy gradient on a flow model's own samples, drawn by its SDE.

    Defaults are those published for SD3.5-M; clip, advantage and KL options as in DDPO.
    """

    learning_rate: float = 3e-4
    rank: int = 32
    sample_steps: int = 10
    sample_guidance: float = 4.5
    images_per_prompt: int = 24
    transition: str = "flow_sde"
    transition_options: dict[str, float] = field(default_factory=lambda: {"noise_level": 0.7})
    trained_steps: float = 0.99
    advantage_scale: Literal["group", "global"] = "global"
    kl_weight: float = 0.04


class DDPOTrainer(OnlineTrainer[DDPOConfig]):
    """``DDPOTrainer(config, model=pipeline_or_path, dataset=prompts, reward=function).train()``."""

    method = "ddpo"
    needs_means = True

    def items(self, index: np.ndarray, rewards: np.ndarray, numbers: np.random.Generator) -> list[Item]:
        prompts, images, _ = index.shape
        groups = np.repeat(np.arange(prompts), images)
        total = rewards.sum(2).flatten()
        value = advantages(total, groups, scale=self.config.advantage_scale).reshape(prompts, images)
        return [
            Item(
                int(step),
                p,
                (int(index[p, k, step]),),
                (int(index[p, k, step + 1]),),
                values=(float(value[p, k]),),
            )
            for p in range(prompts)
            for k in range(images)
            for step in self.steps
            if value[p, k] != 0
        ]

    def item_losses(self, members: Members) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        policy = members.gaussian(detach_uncond=config.detach_uncond)
        ratio = members.log_ratio(policy, members.sampled())
        loss = policy_gradient(ratio, members.value, clip=config.clip, advantage_clip=config.advantage_clip)
        losses = members.per_item(loss)
        metrics = {
            "log_ratio": members.per_item(ratio.detach().abs()),
            "clipped": members.per_item((ratio.detach().expm1().abs() > config.clip).float()),
        }
        if config.kl_weight:
            with torch.no_grad():
                reference = members.gaussian(reference=True, detach_uncond=config.detach_uncond)
            kl = members.per_state(policy.kl(reference))
            losses = losses + config.kl_weight * kl
            metrics["kl"] = kl.detach()
        return losses, metrics


class FlowGRPOTrainer(DDPOTrainer):
    """DDPO with Flow-GRPO's defaults."""

    method = "flow-grpo"


def run(config: DDPOConfig) -> TrainResult:
    """The command ``diffalign train ddpo``."""
    return run_once(DDPOTrainer(config))


def run_flow_grpo(config: FlowGRPOConfig) -> TrainResult:
    """The command ``diffalign train flow-grpo``."""
    return run_once(FlowGRPOTrainer(config))
