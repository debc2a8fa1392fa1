"""Training the step-aware preference model of SPO (Liang et al. 2024) on preference pairs.

For each pair a time t and one noise for both images are drawn; the frozen denoiser predicts the clean images
from the two noisy ones, with guidance; what it predicts is decoded and judged by the model at time t. The
loss is the cross-entropy of the two scores under the pair's label
(:func:`diffalign.rewards.preference.soft_cross_entropy`), and a prompt with many pairs counts no more than
others: a pair weighs one over the pairs of its prompt, scaled to mean 1 over the data (the published code
scales to sum 1 in each batch, whatever is in it). No gradient passes the decoder or the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.likelihood import add_noise, guided
from diffalign.rewards import step_aware
from diffalign.rewards.clip import unit
from diffalign.rewards.preference import soft_cross_entropy
from diffalign.rewards.step_aware import StepAware
from diffalign.solvers.prediction import convert
from diffalign.trainers.base import TrainResult, run_once
from diffalign.trainers.denoising import Batch
from diffalign.trainers.pairs import PairConfig, PairTrainer
from diffalign.trainers.weights import HALF, ModuleWeights


@dataclass(kw_only=True)
class StepAwareConfig(PairConfig):
    """Train a step-aware preference model, the reward that SPO needs.

    The result is a folder for ``--rewards '[step-aware=<output_dir>]'``. To learn what a reward model prefers
    rather than people, relabel the pairs first with 'diffalign data score --relabel'.

    Args:
        reward_model: what it starts from: folder or hub id of a CLIP (PickScore), playground/scorer, or a
            step-aware model to go on with.
        guidance_scale: of the frozen denoiser's predictions; 1 for none.
        evaluation_timesteps: times at which held-out pairs are judged.
    """

    learning_rate: float = 3e-6
    adam_weight_decay: float = 0.3
    max_train_steps: int = 8000
    rank: int = 0
    ties: Literal["drop", "soft", "error"] = "soft"
    selection: dict[str, int | float | bool | str] = field(default_factory=lambda: {"prompt_weights": True})
    reward_model: str = ""
    guidance_scale: float = 5.0
    evaluation_timesteps: list[int] = field(default_factory=lambda: [0, 251, 501, 701, 951])

    def check(self) -> None:
        super().check()
        self._need("reward_model", bool(self.reward_model), "a folder or hub id, or playground/scorer")
        self._need("guidance_scale", self.guidance_scale >= 1, "at least 1")
        times = self.evaluation_timesteps
        self._need("evaluation_timesteps", all(t >= 0 for t in times) and bool(times), "times from 0 on")
        self._need("rank", self.rank == 0, "0: all weights of the preference model are trained")
        self._need("low_memory", not self.low_memory, "false; use gradient_checkpointing")
        self._need("reference_draws", self.reference_draws == 0, "0: there is no reference")
        self._need("draws_per_example", self.draws_per_example == 1, "1: no errors are averaged")
        self._need("weighting", self.weighting == "native", "native: no denoising error is measured")
        self._need("validation_prompts", not self.validation_prompts, "empty: no generator is trained")
        self._need("clip", not self.clip, "empty: images only")


class Judge(nn.Module):
    """The preference model as the loop runs it: everything goes through ``forward``, nothing is cached."""

    def __init__(self, reward: StepAware) -> None:
        super().__init__()
        self.reward = reward

    def forward(self, pixels: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        """Scores ``(2B,)`` of ``pixels (2B, 3, size, size)``; ``ids (B, L)`` serve both images of a pair."""
        seen = self.reward.images(pixels, timesteps)
        read = unit(self.reward.clip.text_features(ids)).repeat(2, 1)
        return self.reward.clip.scale * (seen * read).sum(-1)


class JudgeWeights(ModuleWeights):
    """All weights of a step-aware model."""

    subfolder = "reward"

    def __init__(self, reward: StepAware) -> None:
        super().__init__(reward, step_aware.load)
        if getattr(reward.clip.model, "logit_bias", None) is not None:
            reward.clip.model.logit_bias.requires_grad_(False)  # SigLIP's; a score has no use for it
        self.refresh()

    def described(self, base: str) -> tuple[str, str]:
        """As :meth:`diffalign.trainers.weights.Weights.described`."""
        kind = f"A step-aware preference model for what {base} predicts at noisy times"
        return kind, 'from diffalign.rewards import load_reward\n\nreward = load_reward("step-aware", ".")'

    def export(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the result; each file appears when it is complete."""
        self.module.forget_texts()
        super().export(folder, state)


class StepAwareTrainer(PairTrainer[StepAwareConfig]):
    """``StepAwareTrainer(config, model=pipeline_or_path, dataset=pairs_or_path).train()``.

    Attributes after :meth:`train`: ``reward``, the trained model.
    """

    method = "step-aware"
    needs_reference = False
    beta = 1.0

    def make_weights(self) -> Any:
        config, device = self.config, self.accelerator.device
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if half := HALF[config.mixed_precision]:
            self.adapter.module.to(half)
        # New weights come from the seed, and the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.reward = step_aware.load(config.reward_model).to(device)
        if config.gradient_checkpointing:
            self.reward.enable_gradient_checkpointing()
        self.network = Judge(self.reward)
        return JudgeWeights(self.reward)

    def encode(self) -> None:
        super().encode()
        self.uncond = self.adapter.empty_caption(self.config.empty_caption)

    def prepare(self) -> None:
        super().prepare()
        self.pipeline.vae.to(self.accelerator.device)  # the encoders have been put aside, and it decodes

    # ---------------------------------------------------------------- a step

    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        batch = self.batch(step, slots)
        chosen, rejected = self._scores(batch, [self.data.prompts[row] for row in batch.rows])
        losses = soft_cross_entropy(chosen, rejected, batch.preference) * batch.weight
        margin = (chosen - rejected).detach()
        won = (margin > 0).float() + 0.5 * (margin == 0)
        sides = torch.stack([chosen.detach(), rejected.detach(), margin, won])
        return losses, sides.sum(1).float()

    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        means = {name: value / pairs for name, value in zip(names, sums, strict=True)}
        return means | {"skipped_rows": len(self.examples.skipped)}

    def _scores(self, batch: Batch, prompts: list[str], *, finished: bool = False) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected images, each ``(B,)``."""
        latents = batch.latents if finished else self.predicted(batch)
        pixels = (self.adapter.decode(latents).float() / 2 + 0.5).clamp(0, 1)
        ids = self.reward.clip.tokenizer(prompts).to(pixels.device)
        times = batch.t.to(pixels.device)
        chosen, rejected = self.network(self.reward.square(pixels), ids, times).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def predicted(self, batch: Batch) -> Tensor:
        """Clean latents ``(2B, ...)`` that the denoiser predicts from the batch's noisy ones."""
        adapter, kind = self.adapter, self.adapter.prediction_type
        noised = add_noise(adapter.schedule, kind, batch.latents, batch.noise, batch.t)
        rows = len(noised.x_t)
        uncond = {
            name: self.uncond[name].to(values).expand(rows, *values.shape[1:])
            if name in self.uncond
            else values
            for name, values in batch.cond.items()
        }
        raw = guided(adapter.denoise, noised.x_t, noised.t, batch.cond, uncond, self.config.guidance_scale)
        alpha, sigma = (
            torch.as_tensor(level).to(raw) for level in adapter.schedule.alpha_sigma(batch.t.numpy())
        )
        return convert(raw, noised.x_t, alpha, sigma, source=kind, to="sample")

    # ---------------------------------------------------------------- validation

    def validate(self) -> dict[str, Any]:
        """Share of the held-out pairs with a winner that the model gets right, at each evaluation time; at 0
        the images themselves are judged, as the autoencoder gives them back."""
        data = self.validation_data
        if data is None:
            return {}
        config, accelerator = self.config, self.accelerator
        decided = [row for row in range(len(data)) if data.preference[row] != 0.5]
        if not decided:
            raise UserError("the held-out pairs are ties without exception: choose others")
        own = decided[accelerator.process_index :: accelerator.num_processes]
        starts = range(0, len(own), config.train_batch_size)
        right = torch.zeros(len(config.evaluation_timesteps), device=accelerator.device)
        hidden = not (config.progress and accelerator.is_main_process)
        for first in tqdm(starts, "validation", disable=hidden, leave=False):
            rows = own[first : first + config.train_batch_size]
            for place, t in enumerate(config.evaluation_timesteps):
                drawn = [self._validation_draw(row, 0)._replace(t=t) for row in rows]
                batch = self._assemble(self._views(data, rows, drawn), drawn, rows)
                chosen, rejected = self._scores(batch, [data.prompts[row] for row in rows], finished=t == 0)
                right[place] += ((chosen > rejected).float() + 0.5 * (chosen == rejected)).sum()
        if accelerator.num_processes > 1:
            right = accelerator.reduce(right, "sum")
        shares = (right / len(decided)).tolist()
        named = {
            f"validation/accuracy_t{t}": s for t, s in zip(config.evaluation_timesteps, shares, strict=True)
        }
        return named | {"validation/rewards/accuracies": sum(shares) / len(shares)}


def run(config: StepAwareConfig) -> TrainResult:
    """The command ``diffalign train step-aware``."""
    return run_once(StepAwareTrainer(config))
