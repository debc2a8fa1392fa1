"""Training the reward head on noisy latents that guides Flow-NRG (Liu et al. 2025).

    loss = (h(x_t, t, c) - (r - mean) / std)^2,   x_t = alpha_t x0 + sigma_t eps

of scored images x0. The least error has h = E[r | x_t, c], the reward that may be expected of what x_t
becomes, and that is what tilting a distribution by ``exp(w r)`` asks for to the first order in w. The paper's
head learns from people's choices with a Bradley-Terry loss; here a reward model that did so gives the scores.
Nothing passes a decoder, and the generator stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.data import ImageDataset, open_scored
from diffalign.data.cache import CachedExamples
from diffalign.errors import UserError
from diffalign.likelihood import Errors, add_noise
from diffalign.pipelines import latent_reward
from diffalign.pipelines.guidance import guidance_for
from diffalign.pipelines.latent_reward import LatentReward, first_blocks
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch, DenoisingConfig, DenoisingTrainer
from diffalign.trainers.weights import HALF, ModuleWeights


@dataclass(kw_only=True)
class LatentRewardConfig(DenoisingConfig):
    """Train a small reward of noisy latents on a model's first blocks, for guidance by it (Flow-NRG).

    The data are scored images: lists (prompt, images, scores), pairs with scores, or single images with
    prompt and score; 'diffalign data score' writes scores. The result is a folder for
    flow_nrg(noisy_score=...).

    Args:
        width: of the head, a multiple of 4.
        layers: of the head.
        init_head: folder of a head to go on from.
        evaluation_timesteps: times at which held-out images are judged.
    """

    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    train_batch_size: int = 32
    max_train_steps: int = 2000
    rank: int = 0
    width: int = 128
    layers: int = 2
    init_head: str | None = None
    validation_share: float = 0.1
    validation_steps: int = 500
    validation_pairs: int = 256
    evaluation_timesteps: list[int] = field(default_factory=lambda: [51, 251, 501, 701, 951])

    def check(self) -> None:
        super().check()
        self._need("width", self.width >= 4 and self.width % 4 == 0, "a multiple of 4, at least 4")
        self._need("layers", self.layers >= 1, "at least 1")
        times = self.evaluation_timesteps
        self._need("evaluation_timesteps", all(t >= 0 for t in times) and bool(times), "times from 0 on")
        self._need("rank", self.rank == 0, "0: all weights of the head are trained")
        self._need("init_lora", self.init_lora is None, "left out; use init_head")
        self._need("gradient_checkpointing", not self.gradient_checkpointing, "false: the head is small")
        self._need("reference_draws", self.reference_draws == 0, "0: there is no reference")
        self._need("draws_per_example", self.draws_per_example == 1, "1: no errors are averaged")
        self._need("weighting", self.weighting == "native", "native: no denoising error is measured")
        self._need("validation_prompts", not self.validation_prompts, "empty: no generator is trained")
        self._need("clip", not self.clip, "empty: images only")


class HeadWeights(ModuleWeights):
    """All weights of a head."""

    subfolder = "head"

    def described(self, base: str) -> tuple[str, str]:
        """As :meth:`diffalign.trainers.weights.Weights.described`."""
        kind = f"A reward of the noisy latents of {base}, on its first blocks"
        return kind, (
            "from diffalign.pipelines.flow_nrg import flow_nrg\n\n"
            'images = flow_nrg(pipe, prompts, noisy_score=".").images'
        )


class LatentRewardTrainer(DenoisingTrainer[LatentRewardConfig]):
    """``LatentRewardTrainer(config, model=pipeline_or_path, dataset=scored_or_path).train()``, with the data
    from :func:`diffalign.data.open_scored`.

    Attributes after :meth:`train`: ``head``, the trained reward.
    """

    method = "latent-reward"
    unit = "image"
    needs_reference = False

    def open_examples(self, source: Any, limit: int | None) -> ImageDataset:
        config = self.config
        if not isinstance(source, ImageDataset):
            return open_scored(
                source,
                split=config.dataset_split,
                columns=config.columns or None,
                limit=limit,
                max_bad=config.max_bad,
            )
        if any(score is None for score in source.scores):
            raise UserError(f"{source.source} has images without a score: open it with open_scored")
        return source[:limit] if limit else source

    def make_weights(self) -> Any:
        config, adapter = self.config, self.adapter
        latent_reward.check_images(adapter)
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if half := HALF[config.mixed_precision]:
            adapter.module.to(half)
        # New weights come from the seed, and the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(config.seed)
            self.head = self._new_head() if config.init_head is None else latent_reward.load(config.init_head)
        self.head.to(self.accelerator.device)
        self.network = self.head
        return HeadWeights(self.head, latent_reward.load)

    def _new_head(self) -> LatentReward:
        """Of the widths that the model shows, with the mean and spread of the rewards trained on."""
        adapter, config = self.adapter, self.config
        cond = guidance_for(adapter, [""], 1.0).cond
        x = torch.zeros(1, *adapter.latent_shape(), device=adapter.device)
        t = torch.full((1,), adapter.schedule.t_min, device=adapter.device)
        channels = first_blocks(adapter, x, t, cond).shape[-1]
        head = LatentReward(
            channels, cond["prompt_embeds"].shape[-1], width=config.width, layers=config.layers
        )
        examples: Any = self.examples  # of single images, as open_examples made them
        scores = np.array(examples.scores, np.float64)
        if not scores.std() > 0:
            raise UserError(f"all images of {self.examples.source} have the same score: nothing to learn")
        head.mean.fill_(scores.mean())
        head.std.fill_(scores.std())
        return head

    def encode(self) -> None:
        super().encode()
        self.rewards = self._rewards(self.examples, self.data)

    def _rewards(self, examples: Any, data: CachedExamples) -> Tensor:
        """``(N,)`` float32 in standard units, by id, since a row may stand in for a damaged one."""
        score = dict(zip(examples.ids, examples.scores, strict=True))
        raw = torch.tensor([score[row] for row in data.ids], device=self.accelerator.device)
        return (raw - self.head.mean) / self.head.std

    # ---------------------------------------------------------------- a step

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        batch = self.batch(step, slots)
        found, wanted = self._predicted(batch), self.rewards[batch.rows]
        losses = (found - wanted).square() * batch.weight
        p, r = found.detach(), wanted
        sums = torch.stack([p, r, p * p, r * r, p * r]).sum(1).float()
        return losses, sums

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        p, r, pp, rr, pr = (value / pairs for value in sums)
        spread = max((pp - p * p) * (rr - r * r), 0.0) ** 0.5
        return {
            "rewards/mean": p,
            "rewards/correlation": (pr - p * r) / spread if spread else 0.0,
            "skipped_rows": len(self.examples.skipped),
        }

    def _predicted(self, batch: Batch) -> Tensor:
        """Rewards ``(B,)`` in standard units of the batch's noisy latents."""
        adapter = self.adapter
        noised = add_noise(adapter.schedule, adapter.prediction_type, batch.latents, batch.noise, batch.t)
        with torch.no_grad():
            features = first_blocks(adapter, noised.x_t, noised.t, batch.cond)
        return self.network(features, batch.cond["prompt_embeds"], noised.t)

    # ---------------------------------------------------------------- validation

    def _validation_errors(self) -> Tensor:
        """In the place of errors the rewards ``(examples, times, 1)`` of held-out images at the evaluation
        times."""
        data = self.validation_data
        assert data is not None
        config, accelerator = self.config, self.accelerator
        times = config.evaluation_timesteps
        table = torch.zeros(len(data), len(times), device=accelerator.device)
        own = range(accelerator.process_index, len(data), accelerator.num_processes)
        hidden = not (config.progress and accelerator.is_main_process)
        starts = range(0, len(own), config.train_batch_size)
        for first in tqdm(starts, "validation", disable=hidden, leave=False):
            rows = list(own[first : first + config.train_batch_size])
            for place, t in enumerate(times):
                drawn = [self._validation_draw(row, place)._replace(t=t) for row in rows]
                batch = self._assemble(self._views(data, rows, drawn), drawn, rows)
                table[rows, place] = self._predicted(batch)
        if accelerator.num_processes > 1:
            table = accelerator.reduce(table, "sum")
        return table[..., None]

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        """At each evaluation time: the rank correlation (Spearman's) of the head's rewards with the scores,
        and the share of couples of images of one prompt that it puts in order."""
        assert self.validation_data is not None
        scores = self._rewards(self.held_out, self.validation_data).cpu().numpy()
        found = zip(self.config.evaluation_timesteps, errors.policy[..., 0].cpu().numpy().T, strict=True)
        metrics = {}
        for t, rewards in found:
            metrics[f"validation/rank_correlation_t{t}"] = float(spearmanr(rewards, scores).statistic)
            right = order_accuracy(rewards, scores, self.validation_data.prompts)
            if right is not None:
                metrics[f"validation/accuracy_t{t}"] = right
        if self.accelerator.is_main_process and self.config.progress:
            tqdm.write(
                ", ".join(f"{name.removeprefix('validation/')} {v:.3f}" for name, v in metrics.items())
            )
        return metrics


def order_accuracy(found: np.ndarray, scores: np.ndarray, prompts: list[str]) -> float | None:
    """Share of couples of images of one prompt with unequal scores that `found` puts in the same order, half
    for its ties (the area under the ROC curve, within prompts); None without such couples."""
    labels = np.unique(prompts, return_inverse=True)[1]
    better = (labels[:, None] == labels) & (scores[:, None] > scores)
    if not better.any():
        return None
    gap = (found[:, None] - found)[better]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def run(config: LatentRewardConfig) -> TrainResult:
    """The command ``diffalign train latent-reward``."""
    return run_once(LatentRewardTrainer(config))
