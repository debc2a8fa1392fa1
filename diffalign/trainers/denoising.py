"""Images in, log-ratios out: what all offline methods share, on pairs or on single images.

A method says which data it opens (:meth:`DenoisingTrainer.open_examples`) and turns errors of the denoiser
into a loss.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.data import ImageDataset, PairDataset
from diffalign.data.cache import CachedExamples, cached_examples, open_store
from diffalign.data.transforms import size_of
from diffalign.data.walk import content_key
from diffalign.errors import UserError
from diffalign.likelihood import WEIGHTINGS, Errors, add_noise, denoising_error, error_weight, evaluate
from diffalign.models import ModelAdapter
from diffalign.models.base import EmptyCaption
from diffalign.trainers import draws, validation
from diffalign.trainers.base import Trainer
from diffalign.trainers.config import TrainConfig
from diffalign.trainers.table import reference_table

logger = logging.getLogger(__name__)

D = TypeVar("D", bound="DenoisingConfig")
Examples = PairDataset | ImageDataset

CLIPS_READ = 16  # before the model is loaded, to see whether they can be


@dataclass(kw_only=True)
class DenoisingConfig(TrainConfig):
    """Options of a method that reads images and asks how likely the denoiser finds them.

    Args:
        timestep_sampling: how times are drawn: uniform, or logit_normal (Esser et al. 2024). Flow models
            shift what is drawn as their scheduler does; a refiner is shown the last fifth of the times only.
            Of an EDM model the logarithm of the noise level is uniform or normal, as Karras et al. 2022 draw
            it (logit_mean -1.2, logit_std 1.2).
        logit_mean: of logit_normal; above 0 prefers the noisy end.
        logit_std: of logit_normal.
        stratified_times: spread the times of a step evenly: each draw of the global batch has its own part of
            the distribution, at random. Unbiased, with less variance than independent times.
        draws_per_example: average an example's errors over so many draws of noise and time before the loss,
            for so many times the cost; with stratified_times one from each part of the distribution.
        timesteps: draw from these times only, instead: those that a few-step model is asked at.
        joint_augmentation: the same crop and flip for both images of a pair; otherwise drawn for each, as the
            code of the Diffusion-DPO paper does.
        sample_latents: draw the latents of an image anew each time from what the autoencoder says of it, as
            published scripts do, for twice the room in the cache; otherwise they are their mean.
        time_ids: what SDXL is told of an image's size and crop: its own (image), that of an uncropped
            image at the training resolution (resolution), as the published code does, or zeros (none).
        empty_caption: what a dropped caption becomes: the pipeline's own unconditional input
            (as_pipeline), the encoded empty string (encode) or zeros.
        weighting: what the denoising error is measured in: native, eps, x0, v, flow, snr_gamma or elbo.
        snr_gamma: gamma of weighting snr_gamma.
        columns: which column holds what, where names differ, such as {prompt: text, chosen: good}.
        clip: frames, height and width of what a video model is shown, such as [81, 480, 832], from animated
            WebP, PNG or GIF files; empty for images.
        max_bad: share of damaged rows (unreadable images, empty captions) that a data set may have.
        reference_draws: 0 runs the reference in every step. N > 0 gives each example N fixed draws of noise
            and time and computes the reference's errors on them once, into the cache, where later runs find
            them; a step then costs what fine-tuning costs, but sees no other noise.
        reference_device: where the frozen copy of full training lives: with the model (same), or in host
            memory (cpu), where its forward passes are slow and rounded differently, so that the first margins
            are only nearly 0. A LoRA needs no copy, reference_draws neither.
        validation_dataset: held-out pairs for the validations; accuracy and margin on them, always at the
            same times and noise, tell more than those of the steps.
        validation_share: instead, the share of the data's prompts that is held out, 0.05 for example.
        validation_pairs: at most so many of them.
    """

    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    stratified_times: bool = False
    draws_per_example: int = 1
    timesteps: list[float] = field(default_factory=list)
    joint_augmentation: bool = True
    sample_latents: bool = False
    time_ids: Literal["image", "resolution", "none"] = "image"
    empty_caption: EmptyCaption = "as_pipeline"
    weighting: str = "native"
    snr_gamma: float = 5.0
    columns: dict[str, str] = field(default_factory=dict)
    clip: list[int] = field(default_factory=list)
    max_bad: float = 0.01
    reference_draws: int = 0
    reference_device: Literal["same", "cpu"] = "same"
    validation_dataset: str | None = None
    validation_share: float = 0.0
    validation_pairs: int = 64

    def check(self) -> None:
        super().check()
        self._need("reference_draws", self.reference_draws >= 0, "0 or more")
        self._need("reference_device", self.reference_device in ("same", "cpu"), "same or cpu")
        if self.reference_device == "cpu" and (self.rank or self.reference_draws):
            raise UserError(
                "reference_device cpu is for the frozen copy of full training (--rank 0) with a live "
                "reference: a LoRA and reference_draws have no copy"
            )
        self._need("time_ids", self.time_ids in ("image", "resolution", "none"), "image, resolution or none")
        self._need("draws_per_example", self.draws_per_example >= 1, "at least 1")
        if self.reference_draws and (self.stratified_times or self.draws_per_example > 1):
            raise UserError(
                "stratified_times and draws_per_example draw anew in every step, where reference_draws has "
                "fixed draws: leave one of them out"
            )
        self._need("validation_share", 0 <= self.validation_share < 1, "at least 0 and below 1")
        self._need("validation_pairs", self.validation_pairs >= 1, "at least 1")
        if self.validation_share and self.validation_dataset:
            raise UserError("give validation_share or validation_dataset, not both")
        if self.patience and not (self.validation_share or self.validation_dataset):
            raise UserError("patience looks at held-out data: give validation_share or validation_dataset")
        if (self.validation_share or self.validation_dataset) and not self.validation_steps:
            raise UserError("held-out pairs are judged every validation_steps steps: set it as well")
        self._need("logit_std", self.logit_std > 0, "above 0")
        self._need("clip", len(self.clip) in (0, 3) and min(self.clip, default=1) > 0, "three whole numbers")
        if self.clip and (self.resolution or self.validation_prompts):
            raise UserError(
                "clip says the size of what a video model is shown, and no videos are drawn on the way: "
                "leave resolution and validation_prompts out"
            )
        self._need("max_bad", 0 <= self.max_bad <= 1, "between 0 and 1")
        self._need("snr_gamma", self.snr_gamma > 0, "above 0")
        self._need("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B pairs on the device, as 2B rows: chosen ones first; or of B single images.

    With K draws per example there are 2KB rows: of each side all examples with their first draw, then with
    their second.

    ``latents (2KB, C, h, w)`` float32; ``noise``: likewise, equal for both rows of a pair; ``t (2KB,)`` in
    host memory; ``cond``: each ``(2KB, ...)``; ``preference (B,)``, ``weight (B,)`` and ``gap (B,)``, by how
    much the chosen image's score is higher (NaN without scores); ``empty``: pairs without their caption;
    ``rows``: indices of the pairs; ``draws (KB)``: which fixed draw each row of a side used, -1 for a fresh
    one; ``sides``: which images are there, chosen (0) and rejected (1).
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    cond: dict[str, Tensor]
    preference: Tensor
    weight: Tensor
    gap: Tensor
    empty: int
    rows: list[int]
    draws: list[int]
    sides: tuple[int, ...] = (0, 1)

    def row(self, side: int) -> Batch:
        """The chosen (0) or rejected (1) rows alone; what is said of pairs stays."""
        length = len(self.draws)
        own = slice(side * length, (side + 1) * length)
        return replace(
            self,
            latents=self.latents[own],
            noise=self.noise[own],
            t=self.t[own],
            cond={name: values[own] for name, values in self.cond.items()},
            sides=(side,),
        )


class DenoisingTrainer(Trainer[D]):
    """Images in, log-ratios out.

    Attributes:
        needs_reference: whether the loss compares with a reference; if not, none is run or kept.
        needs_predictions: whether the loss looks at predictions, not at their errors alone.
        noises, times: draws for an example: 1 is shared by the images of a pair, 2 are independent.
        beta: what a log-ratio is multiplied with for the logged rewards.
    """

    needs_reference = True
    needs_predictions = False
    watched: ClassVar[str] = "validation/rewards/accuracies"
    noises: ClassVar[int] = 1
    times: ClassVar[int] = 1
    beta: float

    # ---------------------------------------------------------------- data

    @abstractmethod
    def open_examples(self, source: Any, limit: int | None) -> Examples:
        """The first ``limit`` examples of ``source``: opened data, or where they are."""

    def open_data(self) -> None:
        config = self.config
        self.examples = self._open(self._dataset, config.max_train_samples)
        self.held_out: Examples | None = None
        if config.validation_dataset:
            self.held_out = self._open(config.validation_dataset, config.validation_pairs)
        elif config.validation_share:
            self.examples, held_out = self.examples.split_by_prompt(config.validation_share)
            self.held_out = held_out[: config.validation_pairs * self.rows_of_example]
            if not len(self.examples) or not len(self.held_out):
                raise UserError(
                    f"validation_share {config.validation_share} leaves {len(self.examples)} examples to "
                    f"train on and {len(self.held_out)} to judge: choose another share"
                )
        self.data_length = len(self.examples)

    def _open(self, source: Any, limit: int | None) -> Examples:
        examples = self.open_examples(source, limit)
        if self.config.clip:
            examples = examples.as_clips(self.config.clip[0])
            examples.refuse_if_damaged(self.config.max_bad, CLIPS_READ)
        return examples

    def _load_model(self) -> ModelAdapter:
        adapter = super()._load_model()
        adapter.check_clip(self.config.clip)
        schedule = adapter.schedule
        if any(not schedule.t_min <= t <= schedule.t_max for t in self.config.timesteps):
            raise UserError(
                f"timesteps must be times of the model, {schedule.t_min:g} to {schedule.t_max:g}, but they "
                f"are {self.config.timesteps}"
            )
        return adapter

    @property
    def rows_of_example(self) -> int:
        """How many rows of the data one example is made of."""
        return 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the model is shown."""
        if self.config.clip:
            return self.config.clip[1], self.config.clip[2]
        return size_of(self.config.resolution or self.adapter.default_resolution)

    def encode(self) -> None:
        config, adapter = self.config, self.adapter
        self.data = self._encoded(self.examples)
        self.data_hash = content_key(*self.data.keys)[:16]
        self.elements = self.data.batch([0])["latents"][0, 0].numel()  # of the latent of one image
        self.validation_data = self._encoded(self.held_out) if self.held_out else None
        self.no_caption = (
            adapter.empty_caption(config.empty_caption) if config.proportion_empty_prompts else {}
        )
        texts = {text for row in self.examples.all_prompts for text in row}
        texts |= {text for row in self.examples.captions for text in row}
        self.truncated = adapter.count_truncated(sorted(texts)) / len(texts)  # share of distinct captions
        if self.truncated and self.accelerator.is_main_process:
            logger.warning(
                "%.1f %% of the captions are longer than a text encoder reads, which cuts them off",
                100 * self.truncated,
            )

    @property
    def cache_folder(self) -> Path:
        """Where encodings and errors of the reference are kept."""
        return Path(self.config.cache_dir).expanduser() if self.config.cache_dir else self.folder / "cache"

    def _encoded(self, examples: Examples) -> CachedExamples:
        config, adapter = self.config, self.adapter
        return cached_examples(
            examples,
            self.cache_folder,
            encode_images=adapter.encode_posterior if config.sample_latents else adapter.encode_images,
            encode_prompts=adapter.encode_prompts,
            key={"family": type(adapter).__name__, **adapter.identity()}
            | ({"posterior": "sample"} if config.sample_latents else {}),
            prompt_key=self._reading,
            resolution=self.size,
            batch_size=1 if config.clip else 8,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            joint=config.joint_augmentation,
            dtype=torch.float32 if config.mixed_precision == "no" else torch.float16,
            process=(self.accelerator.process_index, self.accelerator.num_processes),
            barrier=self.accelerator.wait_for_everyone,
            progress=config.progress and self.accelerator.is_main_process,
        )

    @property
    def _reading(self) -> dict[str, Any]:
        """What captions' encodings depend on beside the encoders, as a cache is told it."""
        windows = self.adapter.prompt_windows
        return {"prompt_windows": windows} if windows > 1 else {}

    def batch(self, step: int, slots: range) -> Batch:
        """The examples at places ``slots`` of the global batch of ``step``, with noise and times."""
        positions = range(step * self.pairs_per_step + slots.start, step * self.pairs_per_step + slots.stop)
        rows = self.rows_at(positions)
        drawn = [
            self._draw(step, slot, row, number)
            for number in range(self.config.draws_per_example)
            for slot, row in zip(slots, rows, strict=True)
        ]
        return self._assemble(self.read(step, slots, rows), drawn, rows)

    def rows_at(self, positions: range) -> list[int]:
        """Which rows of the data stand at ``positions`` of the endless sequence that a run reads."""
        return draws.rows_at(positions, seed=self.config.seed, length=len(self.data))

    def read(self, step: int, slots: range, rows: list[int]) -> dict[str, Any]:
        """A :meth:`CachedExamples.batch` of the ``rows`` at places ``slots`` of ``step``."""
        drawn = [self._draw(step, slot, row) for slot, row in zip(slots, rows, strict=True)]
        return self._views(self.data, rows, drawn)

    def _views(self, data: CachedExamples, rows: list[int], drawn: list[Draw]) -> dict[str, Any]:
        """Rows of the data, mirrored and under one of their prompts as drawn; as they are in a validation."""
        if not data.draws or any(draw.t is not None for draw in drawn):
            return data.batch(rows)
        seed = self.config.seed  # one generator per row, so that its flip does not depend on its neighbours
        return _stacked(
            data.batch([row], torch.Generator().manual_seed(draws.number(seed, "view", *draw.purpose)))
            for row, draw in zip(rows, drawn, strict=True)
        )

    def _assemble(self, found: dict[str, Any], drawn: list[Draw], rows: list[int]) -> Batch:
        """A :meth:`CachedExamples.batch` of B examples and K draws for each, as a batch on the device."""
        sides, count = found["latents"].shape[1], len(drawn) // len(rows)
        noises, times, without = zip(*(self._made(d, found["latents"].shape[2:]) for d in drawn), strict=True)
        noise = torch.from_numpy(np.stack(noises)).expand(-1, sides, *found["latents"].shape[2:])
        t, empty = torch.tensor(times).expand(-1, sides), torch.tensor(without[: len(rows)])
        device = self.accelerator.device

        def each(tensor: Tensor, times: int = sides * count) -> Tensor:
            return tensor.to(device, non_blocking=True).repeat(times, *[1] * (tensor.ndim - 1))

        def by_row(tensor: Tensor) -> Tensor:
            return each(tensor, len(drawn) // len(tensor)).transpose(0, 1).flatten(0, 1)

        def dropped(cond: dict[str, Tensor]) -> dict[str, Tensor]:
            """Both images of a pair lose their caption together."""
            if not empty.any():
                return cond
            return {k: torch.where(_like(empty, v), self.no_caption[k].to(v), v) for k, v in cond.items()}

        cond = {name: each(values) for name, values in dropped(found["cond"]).items()}
        for name, values in dropped(found.get("cond_rejected", {})).items():  # captions of each image's own
            cond[name][len(drawn) :] = each(values, count)

        original, corner = found["original_size"], found["crop_top_left"]
        target = torch.tensor(self.size).expand_as(original)
        if self.config.time_ids == "resolution":
            original, corner = target, torch.zeros_like(corner)
        if self.config.time_ids == "none":
            original = corner = target = torch.zeros_like(target)
        sizes = self.adapter.size_conditions(by_row(original), by_row(corner), by_row(target))
        return Batch(
            latents=by_row(found["latents"]),
            noise=by_row(noise),
            t=t.T.flatten(),
            cond=cond | sizes,
            preference=found["preference"].to(device, non_blocking=True),
            weight=found["weight"].to(device, non_blocking=True),
            gap=found["gap"].to(device, non_blocking=True),
            empty=int(empty.sum()),
            rows=rows,
            draws=[d.number for d in drawn],
            sides=tuple(range(sides)),
        )

    def _draw(self, step: int, slot: int, row: int, number: int = 0) -> Draw:
        """The draw for the example at a place of a step, or one of several."""
        config, count = self.config, self.config.reference_draws
        if count:
            return self._fixed(row, int(draws.generator(config.seed, "draw", step, slot).integers(count)))
        draw = Draw(("noise", step, slot, number) if number else ("noise", step, slot))
        if not config.stratified_times:
            return draw
        # Of K draws the k-th lies in the k-th part of (0, 1), which the examples of the step share evenly.
        parts = (("strata", step, side, number) for side in range(self.times))
        shares = (draws.quantile((config.seed, *part), slot, self.pairs_per_step) for part in parts)
        return draw._replace(quantiles=tuple((number + u) / config.draws_per_example for u in shares))

    def _fixed(self, row: int, number: int) -> Draw:
        return Draw(("fixed", self.data.keys[row], number), number)

    def _made(self, draw: Draw, shape: torch.Size) -> tuple[np.ndarray, tuple[float, ...], bool]:
        """Noise ``(1 or sides, C, h, w)``, times, and whether the caption is dropped."""
        numbers = draws.generator(self.config.seed, *draw.purpose)
        if draw.t is not None:
            return numbers.standard_normal((1, *shape), dtype=np.float32), (draw.t,), False
        empty = numbers.random() < self.config.proportion_empty_prompts
        t = tuple(self._time(numbers) for _ in range(self.times))
        if draw.quantiles:
            t = tuple(self._time_of(u) for u in draw.quantiles)
        return numbers.standard_normal((self.noises, *shape), dtype=np.float32), t, empty

    def _time(self, numbers: np.random.Generator) -> float:
        config, schedule = self.config, self.adapter.schedule
        if config.timesteps:
            t = float(numbers.choice(config.timesteps))
            return int(t) if schedule.is_discrete else t
        return self._known(draws.time(numbers, schedule, config.timestep_sampling, **self._logit))

    def _time_of(self, u: float) -> float:
        """:meth:`_time` for a uniform number."""
        config, schedule = self.config, self.adapter.schedule
        if config.timesteps:
            t = float(sorted(config.timesteps)[int(u * len(config.timesteps))])
            return int(t) if schedule.is_discrete else t
        return self._known(draws.time_of(u, schedule, config.timestep_sampling, **self._logit))

    def _known(self, t: float) -> float:
        """A time of the whole schedule, moved into the part that the network knows."""
        share = self.adapter.time_share
        return t if share == 1 else int(share * t)

    @property
    def _logit(self) -> dict[str, float]:
        return {"logit_mean": self.config.logit_mean, "logit_std": self.config.logit_std}

    # ---------------------------------------------------------------- likelihood

    def prepare(self) -> None:
        self._table: Tensor | None = None
        self._validation_reference: Tensor | None = None
        if not self.needs_reference:
            return
        # The policy has not moved yet: what it says is what the reference says.
        if self.validation_data is not None:
            self._validation_reference = self._validation_errors()
        if not self.config.reference_draws:
            self.make_reference()
            return
        count = self.config.reference_draws
        folder = self.cache_folder if self.accelerator.is_main_process else None
        self._table = reference_table(
            open_store(folder, "reference", self._decides_the_table()),
            self.data.keys,
            (count, self.data.sides),
            lambda rows: self._fixed_errors(self.data, rows, count, self._fixed, label="reference"),
            self.accelerator,
        )

    def make_reference(self) -> None:
        """Let the weights as they are now answer as the reference in every step."""
        self.weights.use_as_reference(on_host=self.config.reference_device == "cpu")

    def _decides_the_table(self) -> dict[str, Any]:
        """All that the errors of the reference depend on beside the content of a row, as JSON values."""
        config = self.config
        names = ["seed", "reference_draws", "timestep_sampling", "logit_mean", "logit_std", "timesteps"]
        names += ["proportion_empty_prompts", "empty_caption", "time_ids", "mixed_precision", "random_flip"]
        names += ["joint_augmentation", "sample_latents"]
        return {
            "family": type(self.adapter).__name__,
            "weights": self.weights.reference_identity(),
            "encoders": self.adapter.identity(),
            "size": list(self.size),
            "sides": self.data.sides,  # pairs and single images may share their content
            "draws": [self.noises, self.times],
            **self._reading,
            **{name: getattr(config, name) for name in names},
        }

    def validate(self) -> dict[str, Any]:
        if self.validation_data is None:
            return {}
        errors = self._validation_errors()
        return self.validation_metrics(Errors(errors, self._validation_reference))

    @abstractmethod
    def validation_metrics(self, errors: Errors) -> dict[str, Any]:
        """Metrics of the held-out examples from their errors ``(examples, times, sides)``."""

    def _validation_errors(self) -> Tensor:
        """Weighted errors ``(examples, times, sides)`` of the held-out examples."""
        assert self.validation_data is not None
        config, adapter, data = self.config, self.adapter, self.validation_data
        count = len(validation.TIMES)
        errors = self._fixed_errors(data, range(len(data)), count, self._validation_draw, label="validation")
        weight = error_weight(
            config.weighting,
            adapter.schedule,
            adapter.prediction_type,
            torch.tensor([self._validation_time(k) for k in range(count)]),
            gamma=config.snr_gamma,
        )
        return errors if weight is None else errors * weight.to(errors)[:, None]

    def _validation_draw(self, row: int, number: int) -> Draw:
        return Draw(("validation", row, number), number, self._validation_time(number))

    def _validation_time(self, number: int) -> float:
        return self._known(draws.time_at(self.adapter.schedule, validation.TIMES[number]))

    def _fixed_errors(
        self,
        data: CachedExamples,
        rows: Sequence[int],
        count: int,
        draw: Callable[[int, int], Draw],
        *,
        label: str,
    ) -> Tensor:
        """Unweighted errors, under the weights as they are, of some rows at their ``count`` draws,
        ``(rows, count, sides)`` float32; processes share the work."""
        config, accelerator = self.config, self.accelerator
        table = torch.zeros(len(rows) * count, data.sides, device=accelerator.device)
        own = range(accelerator.process_index, len(table), accelerator.num_processes)
        most = range(0, math.ceil(len(table) / accelerator.num_processes), config.train_batch_size)
        hidden = not (config.progress and accelerator.is_main_process)
        for first in tqdm(most, label, disable=hidden, leave=False):
            # A process without work does some again: split weights need all of them in every call.
            cells = list(own[first : first + config.train_batch_size]) or [0]
            shown = [rows[cell // count] for cell in cells]
            drawn = [draw(row, cell % count) for row, cell in zip(shown, cells, strict=True)]
            batch = self._assemble(self._views(data, shown, drawn), drawn, shown)
            noised = add_noise(
                self.adapter.schedule, self.adapter.prediction_type, batch.latents, batch.noise, batch.t
            )
            with torch.no_grad(), accelerator.autocast():
                prediction = self.adapter.denoise(noised.x_t, noised.t, batch.cond)
            if first < len(own):
                table[cells] = denoising_error(prediction, noised.target).reshape(data.sides, -1).T.float()
        if accelerator.num_processes > 1:
            table = accelerator.reduce(table, "sum")
        return table.reshape(len(rows), count, data.sides)

    def _reference_errors(self, batch: Batch) -> bool | Tensor:
        """What :func:`diffalign.likelihood.evaluate` is told of the reference."""
        if self._table is None:
            return self.needs_reference
        return self._table[batch.rows, batch.draws].T[list(batch.sides)].flatten()

    def _errors(self, batch: Batch) -> Errors:
        config, adapter = self.config, self.adapter
        noised = add_noise(adapter.schedule, adapter.prediction_type, batch.latents, batch.noise, batch.t)
        weight = error_weight(
            config.weighting, adapter.schedule, adapter.prediction_type, batch.t, gamma=config.snr_gamma
        )
        errors = evaluate(
            adapter.denoise,
            noised,
            batch.cond,
            reference=self._reference_errors(batch),
            weight=None if weight is None else weight.to(noised.x_t.device),
            predictions=self.needs_predictions,
        )
        return errors.averaged(len(batch.draws) // len(batch.rows), len(batch.sides))


class Draw(NamedTuple):
    """Where the randomness of an example comes from: its place in the run, or one of its fixed draws."""

    purpose: tuple[int | str, ...]
    number: int = -1  # of the fixed draw
    t: float | None = None  # the time, where it is not drawn
    quantiles: tuple[float, ...] = ()  # what decides the times, where they are stratified


def _stacked(batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one pair each as one batch."""
    parts = list(batches)
    return {
        name: torch.cat([p[name] for p in parts])
        if isinstance(value, Tensor)
        else {k: torch.cat([p[name][k] for p in parts]) for k in value}
        for name, value in parts[0].items()
    }


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (values.ndim - 1))
