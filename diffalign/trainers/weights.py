"""What is trained: a LoRA on the denoiser or all of its weights; how it is stored, resumed and given away."""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models import ModelAdapter
from diffalign.models.base import digest
from diffalign.models.reference import adapters_off, frozen, frozen_copy, named_adapter
from diffalign.trainers.config import TrainConfig
from diffalign.trainers.sharding import gathered

logger = logging.getLogger(__name__)

POLICY = "default"  # the adapter name that readers of LoRA files expect
REFERENCE = "reference"
HALF = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Weights:
    """The trainable weights of ``adapter.module``, float32 whatever the precision of the rest.

    Dropout is off throughout: policy and reference must be the same function where their weights agree.

    Attributes:
        trainable: the parameters that the optimiser updates; ``names``: their names, in the same order.

    Raises:
        UserError: a LoRA that fits no layer, a pipeline that carries adapters already, no LoRA at init_lora.
    """

    def __init__(self, adapter: ModelAdapter, config: TrainConfig) -> None:
        self.adapter, self.lora = adapter, config.rank > 0
        self._continues = config.init_lora is not None
        module = adapter.module
        self._kind = type(module)
        if getattr(module, "peft_config", None):
            raise UserError(
                f"the pipeline already carries the adapters {', '.join(module.peft_config)}: call "
                "unload_lora_weights() first, or give the LoRA to go on from as init_lora"
            )
        for part in adapter.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        # A LoRA's frozen base may be half precision; what is trained never is.
        wanted = HALF[config.mixed_precision] if self.lora else torch.float32
        if wanted not in (None, module.dtype):
            _cast(module, wanted)
        if self.lora:
            self._add_lora(config)
            cast_training_params(module, torch.float32)
        else:
            module.requires_grad_(True)
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        self.refresh()

    def refresh(self) -> None:
        """Look up the trainable parameters again, after something has put others in their place."""
        named = [(name, p) for name, p in self.adapter.module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.trainable = [p for _, p in named]

    def use_as_reference(self, *, on_host: bool = False) -> None:
        """Make the weights as they are now the reference policy, in the cheapest way that holds; a copy of
        all weights lies in host memory if `on_host`."""
        if not self.lora:
            self.adapter.reference = frozen_copy(self.adapter.module, on_host=on_host)
        elif self._continues:
            self.adapter.reference = named_adapter(REFERENCE)
        else:
            self.adapter.reference = adapters_off

    def movable_reference(self) -> list[Tensor]:
        """Make a copy of the weights as they are now the reference; its tensors, in the order of `trainable`,
        may be changed in place."""
        module, copies = self.adapter.module, {}
        if self.lora:
            self._second_adapter()
            named = dict(module.named_parameters())
            for name in self.names:
                copies[name] = named[name.replace(f".{POLICY}.", f".{REFERENCE}.")]
            self.adapter.reference = named_adapter(REFERENCE)
        else:
            twin = copy.deepcopy(module)
            copies = dict(twin.named_parameters())
            self.adapter.reference = frozen(twin)
        for name, parameter in zip(self.names, self.trainable, strict=True):
            copies[name].data.copy_(parameter.data)
        return [copies[name].data for name in self.names]

    def _second_adapter(self) -> None:
        """A LoRA of the policy's shape beside it, in float32 as that is, which takes no gradient."""
        module = self.adapter.module
        if REFERENCE not in module.peft_config:
            settings = {k: v for k, v in module.peft_config[POLICY].to_dict().items() if k in _SHAPE}
            self._attach(REFERENCE, settings, seed=0)
            module.set_adapter(POLICY)
        for name, parameter in module.named_parameters():
            if f".{REFERENCE}." in name:
                parameter.requires_grad_(False).data = parameter.data.float()

    def reference_from(self, folder: Path) -> None:
        """Make what :meth:`save` wrote into ``folder`` the reference, beside the weights in training."""
        if not self.lora:
            self.adapter.reference = frozen(self._stored(folder).to(self.adapter.device))
            return
        self._second_adapter()
        self._set_lora(self.adapter.load_lora(folder)[0], REFERENCE, folder)
        self.adapter.reference = named_adapter(REFERENCE)

    def reference_identity(self) -> dict[str, str]:
        """What the answers of the initial weights depend on: digests of the network as it came and of the
        LoRA to go on from."""
        state = {k.replace(".base_layer", ""): v for k, v in self.adapter.module.state_dict().items()}
        base = digest({name: v for name, v in state.items() if ".lora_" not in name})
        own = {name: v for name, v in state.items() if f".{POLICY}." in name and self._continues}
        return {"network": base, "lora": digest(own) if own else ""}

    def gather(self, *, keep: bool) -> dict[str, Tensor]:
        """What :meth:`save` wants where weights are split over processes: whole ones on the host, where
        `keep` is true. All processes call it together."""
        state = self.adapter.module.state_dict().items()
        return gathered(((k, v) for k, v in state if not self.lora or f".{POLICY}." in k), keep=keep)

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the weights in diffusers' format: a LoRA file, or the folder of the denoiser.

        Args:
            state: from :meth:`gather`, where the module itself has only parts.
        """
        module = self.adapter.module
        if self.lora:
            settings = module.peft_config[POLICY].to_dict()
            settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
            lora = get_peft_model_state_dict(module, state_dict=state, adapter_name=POLICY)
            self.adapter.save_lora(folder, lora, settings)
        else:
            network = module if state is None else self._whole(state)
            network.save_pretrained(folder / self.adapter.denoiser_name)

    def _whole(self, state: dict[str, Tensor]) -> Any:
        """A network of the denoiser's class that holds `state`."""
        with torch.device("meta"):
            network = self._kind.from_config(self.adapter.module.config)
        network.load_state_dict(state, assign=True)
        return network

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, exact to the bit.

        Raises:
            UserError: the checkpoint holds other weights.
        """
        module = self.adapter.module
        if self.lora:
            state, settings = self.adapter.load_lora(folder)
            if settings and settings.get("r") != module.peft_config[POLICY].r:
                raise UserError(
                    f"{folder} has rank {settings['r']}, this run has rank {module.peft_config[POLICY].r}"
                )
            self._set_lora(state, POLICY, folder)
        else:
            module.load_state_dict(self._stored(folder).state_dict())

    def _stored(self, folder: Path) -> Any:
        """The network that :meth:`save` wrote."""
        name = self.adapter.denoiser_name
        try:
            return self._kind.from_pretrained(folder / name)
        except OSError as error:
            raise UserError(f"{folder} has no {name} to resume from") from error

    def described(self, base: str) -> tuple[str, str]:
        """For the model card: what :meth:`export` writes, and the lines that load it on top of `base`."""
        start = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained"
        if self.lora:
            return "A LoRA", f'{start}("{base}")\npipe.load_lora_weights(".")'
        return "All weights of the denoiser", f'{start}(".")'

    def export(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the result: a LoRA file, or a whole pipeline. Each file or folder appears when complete.

        Args:
            state: as of :meth:`save`.
        """
        part = folder / ".result.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if self.lora:
            self.save(part, state)
        else:
            if state is not None:
                setattr(self.adapter.pipeline, self.adapter.denoiser_name, self._whole(state))
            self.adapter.pipeline.save_pretrained(part)
        for path in part.iterdir():
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.rename(target)
        part.rmdir()

    # ---------------------------------------------------------------- LoRA

    def _add_lora(self, config: TrainConfig) -> None:
        targets: Any = config.lora_targets or list(self.adapter.lora_targets)
        if config.init_lora is None:
            settings = {"r": config.rank, "lora_alpha": config.rank, "target_modules": targets}
            self._attach(POLICY, settings, config.seed)
            return
        folder = Path(config.init_lora).expanduser()
        state, settings = self.adapter.load_lora(folder)
        settings = _shape_of(state) | {k: v for k, v in settings.items() if k in _SHAPE and v}
        state, settings = _with_alpha_of_rank(state, settings)
        if settings["r"] != config.rank:
            logger.warning(
                "init_lora has rank %d, which takes the place of rank=%d", settings["r"], config.rank
            )
        for name in (POLICY, REFERENCE):
            self._attach(name, settings, config.seed)
            self._set_lora(state, name, folder)
        module = self.adapter.module
        module.set_adapter(POLICY)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name)

    def _attach(self, name: str, settings: dict[str, Any], seed: int) -> None:
        # New weights come from the seed, and the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second one, on purpose
            torch.manual_seed(seed)
            try:
                self.adapter.module.add_adapter(
                    LoraConfig(init_lora_weights="gaussian", **settings), adapter_name=name
                )
            except ValueError as error:
                raise UserError(
                    f"no layer of this model is called {settings['target_modules']}: {error}"
                ) from error

    def _set_lora(self, state: dict[str, Tensor], name: str, folder: Path) -> None:
        problem: Any
        try:
            loaded: Any = set_peft_model_state_dict(self.adapter.module, state, adapter_name=name)
            problem = loaded.unexpected_keys or [k for k in loaded.missing_keys if f".{name}." in k]
        except RuntimeError as error:
            problem = [" ".join(str(error).split())]
        if problem:
            raise UserError(f"the LoRA in {folder} does not fit this model: {str(problem[0])[:200]}")


def _cast(module: Any, dtype: torch.dtype) -> None:
    """To another precision; what a family keeps in float32 stays so, as where diffusers loads it."""
    kept: set[str] = set()
    if dtype != torch.float32:
        kept.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, weights in chain(module.named_parameters(), module.named_buffers()):
        if weights.is_floating_point() and kept.isdisjoint(name.split(".")):
            weights.data = weights.data.to(dtype)


_SHAPE = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")


def _shape_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of a LoRA file without metadata; alpha = rank, as readers without metadata assume."""
    down = {key.split(".lora_A", 1)[0]: value for key, value in state.items() if ".lora_A" in key}
    if not down:
        raise UserError("init_lora has no LoRA for the denoiser")
    ranks = {name: value.shape[0] for name, value in down.items()}
    rank = max(ranks.values())
    pattern = {name: r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(down),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def _with_alpha_of_rank(
    state: dict[str, Tensor], settings: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same LoRA with alpha = rank in every layer: another scale goes into the weights, since many readers
    of LoRA files take no notice of alpha."""
    alphas = settings["alpha_pattern"]
    scaled = {}
    for key, value in state.items():
        if ".lora_B" in key:
            rank = value.shape[1]
            own = get_pattern_key(list(alphas), key.split(".lora_B", 1)[0])
            alpha = alphas.get(own, settings["lora_alpha"])
            scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            if scale != 1:
                scaled[key] = value * scale
    if scaled:
        logger.warning("init_lora has an alpha other than its rank, which goes into its weights")
    plain = {"lora_alpha": settings["r"], "alpha_pattern": settings["rank_pattern"], "use_rslora": False}
    return state | scaled, settings | plain


class ModuleWeights:
    """All weights of a network that stands beside the generator, in the place of :class:`Weights`.

    Args:
        module: has ``save_pretrained(folder)``.
        load: reads what that wrote.
    """

    lora = False
    subfolder = "module"  # of checkpoints

    def __init__(self, module: Any, load: Callable[[Path], nn.Module]) -> None:
        self.module, self._load = module.requires_grad_(True), load
        self.refresh()

    def refresh(self) -> None:
        """Look up the trainable parameters."""
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.trainable = [p for _, p in named]

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Into a folder of the checkpoint ``folder``."""
        self.module.save_pretrained(folder / self.subfolder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, exact to the bit."""
        self.module.load_state_dict(self._load(folder / self.subfolder).state_dict())

    def export(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the result; each file appears when it is complete."""
        part = folder / ".result.part"
        shutil.rmtree(part, ignore_errors=True)
        self.module.requires_grad_(False).save_pretrained(part)
        for path in part.iterdir():
            path.rename(folder / path.name)
        part.rmdir()
