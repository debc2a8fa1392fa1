"""The training loop that every method shares, on accelerate.

A method says how a batch is made and what it costs (:meth:`Trainer.losses`); everything else is here:
adapters or all weights, optimiser, accumulation, mixed precision, checkpoints, exact resume, logs, alarms,
the result.

One optimiser step is one synchronisation with the device: losses, metrics and the gradient norm come back
together. Losses are summed and divided by the number of pairs of the step, so the micro-batch size is a
matter of memory only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffalign import output
from diffalign.errors import RunFailed, UserError
from diffalign.models import LORA_FILE, ModelAdapter, load_adapter
from diffalign.models.base import digest
from diffalign.pipelines.load import resolve_model
from diffalign.trainers import checkpoint, curves, validation, zero
from diffalign.trainers.card import upload, write_card
from diffalign.trainers.config import TrainConfig
from diffalign.trainers.health import Health
from diffalign.trainers.log import JsonLines
from diffalign.trainers.meter import Meter
from diffalign.trainers.setup import accelerator_for, load_vae, optimizer_for, use_xformers
from diffalign.trainers.sharding import gathered, split_as, whole
from diffalign.trainers.weights import Weights

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainConfig)
LOG = "log.jsonl"
EMA = "ema.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.train` gives back.

    ``output_dir`` holds the weights; ``metrics`` are those of the last step (empty if nothing was left to
    do); ``alarms`` are the health alarms of the run, name -> sentence.
    """

    output_dir: Path
    global_step: int
    metrics: dict[str, Any]
    alarms: dict[str, str]


class Trainer(ABC, Generic[C]):
    """Base of the methods.

    Args:
        config: the options; checked here.
        model: a pipeline (trained in place), a folder, a hub id or ``playground/<name>``, instead of
            ``config.pretrained_model_name_or_path``.
        dataset: data instead of ``config.dataset_name``.

    Attributes after :meth:`train`: ``pipeline``, with the trained weights in it.

    Raises:
        UserError: options that cannot work, an output folder in use.
    """

    method: ClassVar[str]  # as on the command line
    unit: ClassVar[str] = "pair"  # what the data are made of, for the model card
    engine: Any = None  # of DeepSpeed, around the network in training
    network: Any = None  # what trains in place of the denoiser, set by make_weights
    watched: ClassVar[str] = ""  # the metric that `patience` waits for to rise, if the method has one
    shardable: ClassVar[bool] = False  # whether it runs where processes hold parts of the state
    #: If not, why: split weights answer only when all processes ask, as often as each other.
    whole_because: ClassVar[str] = "its processes draw samples or scores each at its own pace"

    def __init__(self, config: C, model: Any = None, dataset: Any = None) -> None:
        config.check()
        self.config = config
        self._model = model if model is not None else config.pretrained_model_name_or_path
        if isinstance(self._model, str | Path) and str(self._model):
            self._model = resolve_model(str(self._model))
        self._dataset = dataset if dataset is not None else config.dataset_name
        if isinstance(self._model, str) and not self._model:
            raise UserError("no model to train: give --pretrained_model_name_or_path, a folder or a hub id")
        if isinstance(self._dataset, str) and not self._dataset:
            raise UserError("no data to train on: give --dataset_name, a folder, file or hf://owner/name")
        if config.patience and not self.watched:
            raise UserError(f"patience must be 0: {self.method} has no metric of held-out data to wait for")
        self._best: float | None = None  # of the watched metric
        self._worse = 0  # validations since then
        self.accelerator = accelerator_for(config)
        if self.divided:
            self.check_sharded()
        self.folder = Path(config.output_dir).expanduser()
        self._resume: Path | None = None
        if config.resume_from_checkpoint:
            self._resume = checkpoint.resolve(config.resume_from_checkpoint, self.folder)
        if self.accelerator.is_main_process:
            self._claim_folder()
        self.accelerator.wait_for_everyone()

    @property
    def sharded(self) -> bool:
        """Whether the weights are split over the processes."""
        return self.accelerator.is_fsdp2

    @property
    def divided(self) -> bool:
        """Whether processes hold parts of the state: of the weights (FSDP2) or of the optimiser's (ZeRO)."""
        return self.sharded or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def check_sharded(self) -> None:
        """Refuse what does not work where the state is :attr:`divided`.

        Raises:
            UserError: names it.
        """
        config = self.config
        if not self.shardable:
            raise UserError(
                f"{self.method} does not run under FSDP or DeepSpeed, since {self.whole_because}: run it "
                "data-parallel, see configs/accelerate/ddp.yaml"
            )
        if config.mixed_precision == "fp16" or config.use_8bit_adam or config.use_adafactor:
            raise UserError(
                "under FSDP and DeepSpeed, mixed_precision must be bf16 or no, and use_8bit_adam and "
                "use_adafactor false"
            )

    # ---------------------------------------------------------------- what a method provides

    @abstractmethod
    def open_data(self) -> None:
        """Open and check the data; called before the model is loaded."""

    @abstractmethod
    def encode(self) -> None:
        """Encode the data with ``self.adapter``; all processes call it, and may share the work."""

    @abstractmethod
    def prepare(self) -> None:
        """Set up what the steps need, the reference above all; the weights are still the initial ones."""

    @abstractmethod
    def losses(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        """The pairs at places ``slots`` of the global batch of ``step`` (counted from 0).

        Returns:
            Loss of each pair ``(len(slots),)``, differentiable, and sums over the pairs of whatever
            :meth:`summarise` reads, ``(K,)`` float32 without gradient.
        """

    @abstractmethod
    def summarise(self, sums: list[float], pairs: int) -> dict[str, Any]:
        """Metrics of a step from the ``K`` sums of all its ``pairs``."""

    def begin_step(self, step: int) -> None:
        """Called before the first micro-batch of ``step``, in all processes: get what it will train on."""

    def make_weights(self) -> Weights:
        """The weights in training, of the model that has just been loaded."""
        return Weights(self.adapter, self.config)

    @property
    def trained(self) -> Any:
        """The network in training: bare, or as accelerate wraps it while the loop runs."""
        return self.adapter.denoiser if self.network is None else self.network

    @trained.setter
    def trained(self, network: Any) -> None:
        if self.network is None:
            self.adapter.denoiser = network
        else:
            self.network = network

    # ---------------------------------------------------------------- the loop

    def train(self) -> TrainResult:
        """Run to ``max_train_steps``; write checkpoints, log, weights and model card.

        Raises:
            UserError: data or model that cannot be used.
            RunFailed: a loss that is not finite; the state before it is saved as a checkpoint.
        """
        config, accelerator = self.config, self.accelerator
        if self._resume:
            self._check_resume(self._resume)
        self.open_data()
        self.adapter = self._load_model()
        self.pipeline = self.adapter.pipeline
        self.origin = self._origin()
        if self._resume:
            self._check_origin(self._resume)
        self.meter = Meter(self.adapter.module)
        # Weights come before the data: an init_lora that does not fit should not wait for a whole encoding.
        self.weights = self.make_weights()
        self.adapter.module.to(accelerator.device)
        if config.enable_xformers_memory_efficient_attention:  # before the reference is copied from it
            use_xformers(self.adapter.module, accelerator.device, config.mixed_precision)
        self.adapter.encoders_to(accelerator.device)
        self.encode()
        self.pictures = self._pictures()
        self.adapter.encoders_to("cpu")
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        self.prepare()
        if self._resume:  # while the network is whole
            self.weights.load(self._resume)
        self._prepare_optimisation()
        start = self._restore(self._resume) if self._resume else 0
        if accelerator.is_main_process:
            checkpoint.rewind(self.folder, start)
        self._start_trackers()
        log = JsonLines(self.folder / LOG, start) if accelerator.is_main_process else None
        metrics: dict[str, Any] = {}
        alarms: dict[str, str] = {}
        end, health = max(start, config.max_train_steps), Health()
        try:
            with self._bar(start) as bar:
                for step in range(start, config.max_train_steps):
                    metrics = self._optimiser_step(step)
                    every = config.validation_steps
                    if every and ((step + 1) % every == 0 or step + 1 == config.max_train_steps):
                        metrics |= self._validate(step + 1)
                        self._note(metrics)
                    fired = health.update(metrics)
                    for name, sentence in fired.items():
                        logger.warning("step %d: %s: %s", step + 1, name, sentence)
                    alarms |= fired
                    accelerator.log({k: v for k, v in metrics.items() if isinstance(v, float)}, step=step + 1)
                    if log:
                        log.write(metrics | ({"alarms": sorted(fired)} if fired else {}))
                    bar.set_postfix(self._shown(metrics), refresh=False)
                    bar.update()
                    every = config.checkpointing_steps
                    if every and (step + 1) % every == 0:
                        self._save_checkpoint(step + 1)
                        if accelerator.is_main_process:
                            curves.draw_log(self.folder)
                    if self._tired(metrics):
                        end = step + 1
                        break
        except KeyboardInterrupt as stop:
            last = checkpoint.checkpoints(self.folder)
            go_on = "--resume_from_checkpoint latest goes on from"
            way = f"{go_on} {last[-1].name}" if last else "there is no checkpoint yet"
            raise KeyboardInterrupt(way) from stop
        finally:
            if log:
                log.close()
            for tracker in accelerator.trackers:
                tracker.finish()
        self._finish(metrics, alarms)
        return TrainResult(self.folder, end, metrics, alarms)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimiser step, over all processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _optimiser_step(self, step: int) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        started, before = time.perf_counter(), self.meter.total
        self.begin_step(step)
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        own_pairs = config.train_batch_size * config.gradient_accumulation_steps
        total: Tensor | None = None
        for micro in range(config.gradient_accumulation_steps):
            first = (micro * accelerator.num_processes + accelerator.process_index) * config.train_batch_size
            last = micro == config.gradient_accumulation_steps - 1
            # Data parallel averages gradients over processes, so each divides by its own pairs.
            sums = self.accumulate(step, range(first, first + config.train_batch_size), own_pairs, last=last)
            total = sums if total is None else total + sums
        assert total is not None
        if self.engine:  # It clips, and takes no step with a gradient that is not finite.
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        else:
            norm = accelerator.clip_grad_norm_(self.weights.trainable, config.max_grad_norm)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")
        norm = whole(torch.as_tensor(norm, device=total.device)).float()
        values = torch.cat([total, norm[None]]).tolist()
        loss = values[0] / self.pairs_per_step
        # A GradScaler meets infinite gradients on purpose and skips those steps by itself.
        if not math.isfinite(loss) or (config.mixed_precision != "fp16" and not math.isfinite(values[-1])):
            self._fail(step, "loss" if not math.isfinite(loss) else "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(self.weights.trainable)
        return {
            "step": step + 1,
            "epoch": self._epoch(step + 1),
            "loss": loss,
            **self.summarise(values[1:-1], self.pairs_per_step),
            "grad_norm": values[-1] if math.isfinite(values[-1]) else None,
            "learning_rate": rate,
            "evaluations": (self.meter.total - before) * accelerator.num_processes,
            "step_seconds": time.perf_counter() - started,
        }

    def _epoch(self, steps: int) -> float:
        """How often the data have been gone through after so many steps."""
        return steps * self.pairs_per_step / self.data_length

    def accumulate(self, step: int, slots: range, own_pairs: int, *, last: bool) -> Tensor:
        """Add the gradient of the pairs at ``slots``, divided by ``own_pairs``, to that of the step.

        Args:
            last: whether the processes exchange their gradients after this.

        Returns:
            Sums over the pairs, ``(1 + K,)``: of the loss, and what :meth:`losses` gives.
        """
        with self.exchanged(last):
            with self.accelerator.autocast():
                losses, sums = self.losses(step, slots)
            self.backward(losses.sum() / own_pairs, last=last)
        return torch.cat([losses.detach().sum()[None].float(), sums])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` as of :meth:`accumulate`."""
        if self.engine:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss)
        else:
            self.accelerator.backward(loss)

    def exchanged(self, last: bool) -> AbstractContextManager[Any]:
        """Where a backward pass belongs: processes exchange gradients in the last one of a step only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.trained)

    data_length: int  # pairs of the data; set by open_data or prepare
    data_hash: str | None = None  # digest of what is trained on, where the method knows it

    # ---------------------------------------------------------------- validation

    def validate(self) -> dict[str, Any]:
        """Metrics of held-out data, for methods that hold some out; all processes take part."""
        return {}

    @torch.no_grad()
    def _validate(self, step: int) -> dict[str, Any]:
        main = self.accelerator.is_main_process
        with self.accelerator.autocast(), self._averaged():
            metrics = self.validate()
            # Every process has a part of split weights, so all of them draw.
            images = self.pictures.draw() if self.pictures and (self.sharded or main) else []
            if images and main:
                path = self.folder / "validation" / f"step-{step:06d}.png"
                validation.save_pictures(images, path)
                for tracker in self.accelerator.trackers:
                    if hasattr(tracker, "log_images"):
                        tracker.log_images(
                            {"validation": np.stack([np.asarray(i) for i in images])}, step=step
                        )
        self.accelerator.wait_for_everyone()
        return metrics

    def _note(self, metrics: dict[str, Any]) -> None:
        """Count validations that were no better than the best before."""
        if self.watched in metrics:
            value = metrics[self.watched]
            better = self._best is None or value > self._best
            self._best, self._worse = (value, 0) if better else (self._best, self._worse + 1)

    def _tired(self, metrics: dict[str, Any]) -> bool:
        """Whether the run is to end after a step with these metrics."""
        patience = self.config.patience
        if not patience or self.watched not in metrics or self._worse < patience:
            return False
        logger.warning(
            "step %d: %s has not risen above %g for %d validations: the run ends",
            metrics["step"],
            self.watched,
            self._best,
            patience,
        )
        return True

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The weights that the run would give away now: their moving average, if there is one."""
        if not self.ema:
            yield
            return
        self.ema.store(self.weights.trainable)
        self.ema.copy_to(self.weights.trainable)
        try:
            yield
        finally:
            self.ema.restore(self.weights.trainable)

    # ---------------------------------------------------------------- set-up

    def _claim_folder(self) -> None:
        if self.config.resume_from_checkpoint:
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        overwrite = self.config.overwrite
        if checkpoint.checkpoints(self.folder) and not overwrite:
            raise UserError(
                f"output folder {str(self.folder)!r} is not empty: it has checkpoints of a run; go on with "
                "--resume_from_checkpoint latest, start anew with --overwrite, or choose another --output_dir"
            )
        output.prepare(self.folder, overwrite=overwrite or self._only_a_cache())
        checkpoint.clear(self.folder)
        for name in (LOG, LORA_FILE, "README.md"):
            (self.folder / name).unlink(missing_ok=True)

    def _only_a_cache(self) -> bool:
        """Whether the folder holds nothing but encodings, of a run that ended before it began to train."""
        return self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {"cache"}

    def _pictures(self) -> validation.Pictures | None:
        config = self.config
        if not config.validation_prompts:
            return None
        return validation.Pictures(
            self.adapter,
            config.validation_prompts,
            guidance_scale=config.validation_guidance_scale,
            steps=config.validation_inference_steps,
            seed=config.seed,
        )

    def _load_model(self) -> ModelAdapter:
        config = self.config
        parts = {}
        if config.pretrained_vae_model_name_or_path:
            parts["vae"] = load_vae(config.pretrained_vae_model_name_or_path)
        adapter = load_adapter(self._model, revision=config.revision, variant=config.variant, **parts)
        adapter.read_in_windows(config.prompt_windows)
        return adapter

    def _prepare_optimisation(self) -> None:
        config, accelerator = self.config, self.accelerator
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.base_rate = config.learning_rate * (self.pairs_per_step if config.scale_lr else 1)
        if config.scale_lr and accelerator.is_main_process:
            logger.warning(
                "learning rate %g x %d pairs per step = %g",
                config.learning_rate,
                self.pairs_per_step,
                self.base_rate,
            )
        optimizer = optimizer_for(config, self.weights.trainable, self.base_rate)
        # A function of the step, counted in optimiser steps: nothing of it has to be saved.
        self._lr_factor = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        ).lr_lambdas[0]
        self.trained, self.optimizer = accelerator.prepare(self.trained, optimizer)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.engine = self.trained
        self.weights.refresh()
        self.ema = EMAModel(self.weights.trainable, decay=config.ema_decay) if config.use_ema else None
        if self.ema:
            self.ema.to(accelerator.device)

    def _learning_rate(self, step: int) -> float:
        # The schedule's own step 0 has rate 0 during warm-up; the first update should do something.
        warming = step < self.config.lr_warmup_steps
        return self.base_rate * self._lr_factor(step + 1 if warming else step)

    def _start_trackers(self) -> None:
        if self.accelerator.log_with:
            options = {k: v for k, v in asdict(self.config).items() if isinstance(v, str | int | float)}
            self.accelerator.init_trackers("diffalign", config=options)

    @contextlib.contextmanager
    def _bar(self, start: int) -> Iterator[Any]:
        hidden = not (self.config.progress and self.accelerator.is_main_process)
        with tqdm(
            total=self.config.max_train_steps, initial=start, desc=self.method, disable=hidden, unit="step"
        ) as bar:
            yield bar

    @staticmethod
    def _shown(metrics: dict[str, Any]) -> dict[str, str]:
        shown = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}
        return {short: f"{metrics[name]:.3f}" for name, short in shown.items() if name in metrics}

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """What a method keeps between steps beside the weights, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""

    def save_own(self, folder: Path) -> None:
        """Write what a method keeps in tensors into a checkpoint; called in the main process."""

    def load_own(self, folder: Path) -> None:
        """Read what :meth:`save_own` wrote, after :meth:`load_state`."""

    def _save_checkpoint(self, step: int) -> None:
        """Processes hold the same state, or parts of one, so the main one writes it; the others wait."""
        main, averages = self.accelerator.is_main_process, {}
        if main or self.divided:
            weights = self.weights.gather(keep=main) if self.sharded else None
            if self.engine:
                moments, optimizer = zero.optimizer_state(self.engine, self.weights.trainable, keep=main)
            else:
                moments, optimizer = checkpoint.optimizer_state(self.optimizer, keep=main)
            if self.ema:
                averages = gathered(zip(self.weights.names, self.ema.shadow_params, strict=True), keep=main)
        if main:
            rest: dict[str, Any] = {"step": step, "method": self.method, "options": asdict(self.config)}
            rest |= {"epoch": self._epoch(step), "examples": step * self.pairs_per_step}
            rest |= {"origin": self.origin, "data": self.data_hash, "own": self.state()}
            rest["watched"] = [self._best, self._worse]

            def fill(folder: Path) -> None:
                self.weights.save(folder, weights)
                self.save_own(folder)
                rest["optimizer"] = optimizer
                save_file(moments, folder / checkpoint.OPTIMIZER)
                if self.ema:
                    save_file(averages, folder / EMA)
                    rest["ema_step"] = self.ema.optimization_step
                if self.accelerator.scaler is not None:
                    rest["scaler"] = self.accelerator.scaler.state_dict()

            checkpoint.write(self.folder, step, fill, rest)
            checkpoint.rotate(self.folder, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _check_resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        if state["method"] != self.method:
            raise UserError(f"{folder} is a checkpoint of {state['method']}, not of {self.method}")
        self._warn_of_changes(state["options"])

    def _origin(self) -> dict[str, str]:
        """Digests of the weights that the run starts from, which are its reference as well."""
        found = {"network": digest(self.adapter.module.state_dict())}
        lora = getattr(self.config, "init_lora", None)
        if lora and (file := Path(lora).expanduser() / LORA_FILE).is_file():
            found["lora"] = digest(load_file(file))
        return found

    def _check_origin(self, folder: Path) -> None:
        """A reference that is not the one of the steps before would change what the run is held to.

        Raises:
            UserError: the run started from other weights.
        """
        before = checkpoint.read_state(folder).get("origin", self.origin)
        if before != self.origin:
            raise UserError(
                f"{folder} is of a run that started from other weights: give the model, and the init_lora, "
                "that it was started with, since they are its reference"
            )

    def _restore(self, folder: Path) -> int:
        """Take up all but the weights; returns the step."""
        state = checkpoint.read_state(folder)
        if state.get("data", self.data_hash) != self.data_hash and self.accelerator.is_main_process:
            logger.warning("resuming on other data than before")
        if self.engine:
            zero.load_optimizer(self.engine, self.weights.trainable, folder, state["optimizer"])
        else:
            checkpoint.load_optimizer(self.optimizer, folder, state["optimizer"])
        if self.ema:
            if not (folder / EMA).is_file():
                raise UserError(f"{folder} has no moving average; resume without --use_ema")
            averages = load_file(folder / EMA)
            for shadow, name in zip(self.ema.shadow_params, self.weights.names, strict=True):
                shadow.copy_(split_as(averages[name], shadow))
            self.ema.optimization_step = state["ema_step"]
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._best, self._worse = state.get("watched", (None, 0))
        self.load_state(state.get("own", {}))
        self.load_own(folder)
        return state["step"]

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        free = {"output_dir", "overwrite", "resume_from_checkpoint", "progress", "report_to", "cache_dir"}
        free |= {"checkpointing_steps", "checkpoints_total_limit"}
        now = json.loads(json.dumps(asdict(self.config)))
        changed = [k for k, v in now.items() if k not in free and before.get(k) != v]
        if changed and self.accelerator.is_main_process:
            logger.warning("resuming with other options than before: %s", ", ".join(changed))

    def _fail(self, step: int, what: str) -> None:
        if self._resume is None or checkpoint.read_state(self._resume)["step"] != step:  # it is there already
            self._save_checkpoint(step)
        raise RunFailed(
            f"the {what} is not finite in step {step + 1}; the state before it is in "
            f"{self.folder / f'{checkpoint.PREFIX}{step}'}: resume from there with a lower --learning_rate, "
            "or with --mixed_precision bf16 instead of fp16"
        )

    # ---------------------------------------------------------------- result

    def _finish(self, metrics: dict[str, Any], alarms: dict[str, str]) -> None:
        self.trained = self.accelerator.unwrap_model(self.trained)
        if self.ema:
            self.ema.copy_to(self.weights.trainable)
        main = self.accelerator.is_main_process
        weights = self.weights.gather(keep=main) if self.sharded else None
        if main:
            self.weights.export(self.folder, weights)
            curves.draw_log(self.folder)
            write_card(self, metrics, alarms)
            if self.config.push_to_hub:
                upload(self.folder, self.config.push_to_hub)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()


def run_once(trainer: Trainer[Any]) -> TrainResult:
    """Train in a process that ends afterwards: the process group is taken down as well."""
    try:
        result = trainer.train()
        if trainer.accelerator.is_main_process:
            print(f"step {result.global_step}: weights, curves.png and log.jsonl are in {result.output_dir}")
        return result
    finally:
        trainer.accelerator.state.destroy_process_group()
