"""Learning from good images against samples of one's own earlier self: what SePPO and DDO share.

A run is a sequence of *rounds* of ``round_steps`` optimiser steps. At the start of a round the weights go
into a pool; one entry of it becomes the reference (:meth:`SelfPlayTrainer.reference_of`), which samples an
image for each good image of the round, under the same caption. The two make a pair whose noises are
independent. Samples stay latents: they are neither decoded nor encoded.

Everything of a round follows from the pool, the seed and the round's number, so a killed run goes on in the
middle of it: pool and samples lie in ``<output_dir>/self-play``, each file whole or absent.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.data import ImageDataset, open_images
from diffalign.data.cache import SHARD_ROWS
from diffalign.data.shards import ShardStore
from diffalign.data.walk import content_key
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.pipelines.guidance import Guidance
from diffalign.pipelines.rollout import RowNoise
from diffalign.solvers import DPMSolverPPScheduler, sample
from diffalign.trainers import checkpoint, draws
from diffalign.trainers.pairs import PairConfig, PairTrainer

S = TypeVar("S", bound="SelfPlayConfig")

FOLDER = "self-play"
MEMORY = 8 * 2**30  # bytes of a round's samples; beyond it they are read from disk


@dataclass(kw_only=True)
class SelfPlayConfig(PairConfig):
    """Options of a method that compares good images with the model's own.

    Args:
        round_steps: optimiser steps between two refreshments of reference and samples. The weights of every
            round stay in <output_dir>/self-play/pool: a LoRA file each, with rank 0 the whole network.
        sampling_steps: network evaluations per sample (DPM-Solver++).
        sampling_guidance_scale: guidance of the samples; 1 for none.
        sampling_batch_size: samples per network call.
    """

    round_steps: int = 30
    sampling_steps: int = 20
    sampling_guidance_scale: float = 7.5
    sampling_batch_size: int = 8

    def check(self) -> None:
        super().check()
        for name in ("round_steps", "sampling_steps", "sampling_batch_size"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        self._need("sampling_guidance_scale", self.sampling_guidance_scale >= 0, "0 or more")
        self._need("reference_draws", self.reference_draws == 0, "0: the reference changes with the rounds")
        self._need("reference_device", self.reference_device == "same", "same: the reference makes samples")
        self._need("label_flip_probability", self.label_flip_probability == 0, "0: samples are never chosen")
        self._need("ties", self.ties == "drop", "drop: of pairs, only the chosen images are used")
        self._need("selection", not self.selection, "empty: the data are read as single images")


class SelfPlayTrainer(PairTrainer[S]):
    """Good images in, paired with own samples; a method gives :meth:`pair_loss` and :meth:`reference_of`.

    Attributes:
        examples: the good images: those without a label or with one above 1/2; of pairs, the chosen ones.
    """

    unit = "image"
    watched = "validation/rewards/chosen"
    noises: ClassVar[int] = 2
    shardable = True

    def check_sharded(self) -> None:
        super().check_sharded()
        # Processes sample at their own pace, which split weights cannot; a whole copy of earlier ones can.
        if self.config.rank or not self.sharded:
            raise UserError(
                f"{self.method} runs data-parallel, or under FSDP with all weights (--rank 0); "
                "not with a LoRA under FSDP, nor under DeepSpeed"
            )

    @abstractmethod
    def reference_of(self, number: int) -> int:
        """Which entry of the pool, 0 to ``number``, is the reference of round ``number``. Entry k are the
        weights at the start of round k."""

    def start_round(self, number: int) -> None:
        """Called at the start of round ``number``, before its weights go into the pool."""

    # ---------------------------------------------------------------- data

    def open_examples(self, source: Any, limit: int | None) -> ImageDataset:
        config = self.config
        if not isinstance(source, ImageDataset):
            source = open_images(
                source, split=config.dataset_split, columns=config.columns or None, max_bad=config.max_bad
            )
        good = [i for i, preference in enumerate(source.preferences) if preference > 0.5]
        if not good:
            raise UserError(f"{source.source} has no good image: all labels are 1/2 or less")
        return source.select(good[:limit])

    def read(self, step: int, slots: range, rows: list[int]) -> dict[str, Any]:
        found = super().read(step, slots, rows)
        places = torch.tensor([self._place[row] for row in rows])
        whole = torch.tensor(self.size)
        own = {
            "latents": self._own[places].float(),
            "original_size": whole.expand(len(rows), 2),
            "crop_top_left": torch.zeros(len(rows), 2, dtype=torch.long),
        }
        found |= {name: torch.cat([found[name], values[:, None]], 1) for name, values in own.items()}
        if self.data.draws:  # samples are of the first prompt, whichever was drawn for the image
            found["cond_rejected"] = self.data.batch(rows)["cond"]
        return found

    # ---------------------------------------------------------------- rounds

    def prepare(self) -> None:
        super().prepare()
        self._round = -1

    def begin_step(self, step: int) -> None:
        number, within = divmod(step, self.config.round_steps)
        if within == 0:
            self.start_round(number)
            main = self.accelerator.is_main_process
            with self._averaged():
                whole = self.weights.gather(keep=main) if self.sharded else None
                if main:
                    checkpoint.write(self._pool, number, lambda folder: self.weights.save(folder, whole), {})
            self.accelerator.wait_for_everyone()
        if number != self._round:
            self._begin(number)

    @property
    def _pool(self) -> Path:
        return self.folder / FOLDER / "pool"

    def _begin(self, number: int) -> None:
        """Take up the reference of round ``number`` and its samples."""
        entry = self.reference_of(number)
        weights = self._pool / f"{checkpoint.PREFIX}{entry}"
        if not weights.is_dir():
            raise UserError(
                f"{self.folder} lacks the weights {weights.name} that round {number} is held to: resume a "
                "run in its own --output_dir, or start anew"
            )
        self.weights.reference_from(weights)
        self._round, self.age = number, number - entry
        self._own, self._place = self._samples(number, _digest(weights))

    def _samples(self, number: int, reference: str) -> tuple[Any, dict[int, int]]:
        """Latents ``(n, C, h, w)`` of the round's own samples, and the place of each row among them."""
        config, accelerator = self.config, self.accelerator
        # Of the whole round, also where the run ends before: so batches, and their last bits, stay the same.
        length = config.round_steps * self.pairs_per_step
        rows = list(dict.fromkeys(self.rows_at(range(number * length, (number + 1) * length))))
        settings = (reference, config.seed, number, config.sampling_steps, config.sampling_guidance_scale)
        keys = {row: content_key(*settings, row, self.data.prompts[row]) for row in rows}
        folder = self.folder / FOLDER / f"round-{number}"
        if accelerator.num_processes > 1:
            self._fill(ShardStore(folder), rows[accelerator.process_index :: accelerator.num_processes], keys)
            accelerator.wait_for_everyone()
        store = ShardStore(folder)
        self._fill(store, rows, keys)
        if accelerator.is_main_process:
            for earlier in folder.parent.glob("round-*"):
                if earlier != folder:
                    shutil.rmtree(earlier)
        own = store.rows([keys[row] for row in rows], MEMORY)["latents"]
        return own, {row: place for place, row in enumerate(rows)}

    def _fill(self, store: ShardStore, rows: list[int], keys: dict[int, str]) -> None:
        """Sample what the store lacks, shard by shard: what a killed process has stored is not made again."""
        config = self.config
        missing = [row for row in rows if keys[row] not in store]
        hidden = not (config.progress and self.accelerator.is_main_process)
        half = torch.float32 if config.mixed_precision == "no" else torch.float16
        with tqdm(total=len(missing), desc="own samples", unit="image", disable=hidden, leave=False) as bar:
            for start in range(0, len(missing), SHARD_ROWS):
                shard = missing[start : start + SHARD_ROWS]
                drawn = []
                for at in range(0, len(shard), config.sampling_batch_size):
                    batch = shard[at : at + config.sampling_batch_size]
                    drawn.append(self._draw_own(batch).to("cpu", half))
                    bar.update(len(batch))
                store.add([keys[row] for row in shard], {"latents": torch.cat(drawn)})

    @torch.no_grad()
    def _draw_own(self, rows: list[int]) -> Tensor:
        """``(len(rows), C, h, w)`` float32: samples of the reference under the captions of ``rows``."""
        config, adapter, device = self.config, self.adapter, self.accelerator.device
        found = self.data.batch(rows)
        size = torch.tensor(self.size)

        def told(count: int) -> dict[str, Tensor]:
            sizes = size.expand(count, 2)
            return adapter.size_conditions(sizes, torch.zeros_like(sizes), sizes)

        uncond = None if config.sampling_guidance_scale == 1.0 else self._uncond | told(1)
        guidance = Guidance(found["cond"] | told(len(rows)), uncond, config.sampling_guidance_scale)
        seeds = [draws.number(config.seed, "own", self._round, row) for row in rows]
        noise = RowNoise(seeds, found["latents"].shape[2:], device).draw()

        def network(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(device).expand(len(x))
            return guidance.predict(adapter, x, times, range(len(rows)), reference=True).float()

        scheduler = DPMSolverPPScheduler.from_config(adapter.pipeline.scheduler.config)
        with self.accelerator.autocast():
            return sample(network, noise, scheduler, num_inference_steps=config.sampling_steps)

    def encode(self) -> None:
        super().encode()
        self._uncond = self.adapter.empty_caption(self.config.empty_caption)

    # ---------------------------------------------------------------- metrics

    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        """How much likelier held-out good images have become than under the initial weights."""
        return {"validation/rewards/chosen": self.beta * errors.log_ratio().mean().item()}


def _digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()
