"""What a trainer or sampler may ask of a model, whatever its family, and how the family is found."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.likelihood import Conditions
from diffalign.models.reference import Reference
from diffalign.solvers import import_schedulers
from diffalign.solvers.noise import NoiseSchedule, prediction_of
from diffalign.solvers.prediction import check_prediction_type

#: Where a LoRA lies in a folder of it, by diffusers' convention.
LORA_FILE = "pytorch_lora_weights.safetensors"

#: The attention of transformers that join image and text tokens (SD3, Flux).
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)

#: pipeline class -> "module:adapter class"
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "diffalign.models.sd:SDAdapter",
    "StableDiffusionXLPipeline": "diffalign.models.sdxl:SDXLAdapter",
    "StableDiffusionXLImg2ImgPipeline": "diffalign.models.sdxl:SDXLAdapter",
    "StableDiffusion3Pipeline": "diffalign.models.sd3:SD3Adapter",
    "FluxPipeline": "diffalign.models.flux:FluxAdapter",
    "WanPipeline": "diffalign.models.video:WanAdapter",
}

EmptyCaption = Literal["as_pipeline", "encode", "zeros"]


class ModelAdapter(ABC):
    """One loaded pipeline behind the operations that training and sampling share.

    Attributes:
        pipeline: the diffusers pipeline; its parts are used in place.
        denoiser: the network that :meth:`denoise` calls. A trainer may put a wrapper here (data parallel).
        schedule: alpha and sigma at the network's times.
        prediction_type: what the network was trained to predict.
        reference: who answers ``denoise(..., reference=True)``; None until someone is chosen.
        lora_targets: names of the layers that a LoRA attaches to by default.
    """

    denoiser_name: ClassVar[str]  # the attribute of the pipeline, which is also the folder of its weights
    lora_targets: ClassVar[tuple[str, ...]]
    encoder_names: ClassVar[tuple[str, ...]]  # needed for encoding only, may leave the device afterwards
    distilled_guidance: ClassVar[bool] = False  # told its guidance as a condition, ``guidance (rows,)``
    video: ClassVar[bool] = False  # whether what it makes has a time axis: (rows, C, frames, H, W)

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline  # Any: which parts it has is known to the family, not to the type
        config = pipeline.scheduler.config
        self.schedule = NoiseSchedule.from_config(config)
        self.prediction_type = check_prediction_type(prediction_of(config, self.schedule))
        self.denoiser: nn.Module = self.module
        self.reference: Reference | None = None

    @property
    def module(self) -> Any:
        """The network itself, never a wrapper."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def denoise(self, x_t: Tensor, t: Tensor, cond: Conditions, reference: bool = False) -> Tensor:
        """The network's prediction of its own ``prediction_type`` at ``x_t``.

        Args:
            x_t: ``(rows, C, ...)``; cast to the network's dtype here and nowhere before.
            t: ``(rows,)`` times.
            cond: from :meth:`encode_prompts`, each tensor ``(rows, ...)``.
            reference: answer as the reference policy.
        """
        if not reference:
            return self.forward(self.denoiser, x_t, t, cond)
        if self.reference is None:
            raise RuntimeError("this model has no reference policy; set adapter.reference first")
        # Through the same wrapper as the policy, so that both see the same autocast and kernels.
        with self.reference(self.denoiser) as network:
            return self.forward(network, x_t, t, cond)

    @abstractmethod
    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """One call of ``network``, a module of this family."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of :meth:`denoise` for each prompt, every tensor ``(len(prompts), ...)``; no
        gradient."""

    def empty_caption(self, mode: EmptyCaption = "as_pipeline") -> dict[str, Tensor]:
        """Conditions ``(1, ...)`` of no caption: the encoded empty string, zeros, or whichever of the two the
        pipeline takes for its unconditional branch."""
        encoded = self.encode_prompts([""])
        if mode == "zeros" or (mode == "as_pipeline" and self._zeros_when_empty):
            return {name: torch.zeros_like(values) for name, values in encoded.items()}
        return encoded

    @property
    def _zeros_when_empty(self) -> bool:
        return False

    @property
    def time_share(self) -> float:
        """Share of the times, from the clean end on, that the network knows: below 1 for a refiner, which
        starts from images that another model has made."""
        return 1.0

    def check_clip(self, clip: Sequence[int]) -> None:
        """Refuse a size (frames, height, width) that the model cannot be shown; empty stands for images.

        Raises:
            UserError: says which sizes there are.
        """
        if clip:
            raise UserError(f"clip is for video models, but {type(self.pipeline).__name__} makes images")

    def size_conditions(
        self, original_size: Tensor, crop_top_left: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """What the network is told of an image's size and crop: nothing, for most families.

        Args:
            original_size, crop_top_left, target: ``(rows, 2)`` pixels, height or top first.
        """
        return {}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """``{"latents": (B, C, h, w)}`` of ``pixels (B, 3, H, W)`` in [-1, 1], as the denoiser sees them;
        deterministic, no gradient."""
        vae = self.pipeline.vae
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        shift, scale = self._latent_units(mean)
        return {"latents": (mean - shift) * scale}

    @torch.no_grad()
    def encode_posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """As :meth:`encode_images`, ``{"mean": ..., "std": ...}`` of what the autoencoder thinks likely."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift, scale = self._latent_units(posterior.mean)
        return {"mean": (posterior.mean - shift) * scale, "std": posterior.std * scale}

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """:meth:`encode_prompts` of one prompt, every tensor ``(1, ...)``."""
        return self.encode_prompts([prompt])

    def encode_image(self, image: Tensor) -> Tensor:
        """Latents ``(C, h, w)`` of one image ``(3, H, W)`` in [-1, 1], as :meth:`encode_images` has them."""
        return self.encode_images(image[None])["latents"][0]

    @property
    def prompt_windows(self) -> int:
        """In how many windows prompts are read, see :meth:`read_in_windows`."""
        return 1

    def read_in_windows(self, count: int) -> None:
        """Let the pipeline read prompts in up to `count` windows of what its text encoders have room for, and
        so :meth:`encode_prompts` and the pipeline's own call; 1 cuts longer ones off.

        Raises:
            UserError: below 1, or a model that has other readers than CLIP.
        """
        if count != 1:
            raise UserError(
                f"prompt_windows must be 1 for a {type(self.pipeline).__name__}, but is {count}: windows are "
                "for Stable Diffusion and SDXL, which only CLIP reads for; a T5 has room for long captions"
            )

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` have more tokens than the shortest of the text encoders reads."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        found = [getattr(self.pipeline, name, None) for name in names]
        tokenizer = min((t for t in found if t is not None), key=lambda t: t.model_max_length)
        ids = tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return sum(len(row) > tokenizer.model_max_length for row in ids)

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """Pixels ``(B, 3, H, W)`` in [-1, 1] of ``latents``; without a gradient unless it is asked for."""
        vae = self.pipeline.vae
        latents = latents.to(vae.device, vae.dtype)
        shift, scale = self._latent_units(latents)
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            return vae.decode(latents / scale + shift).sample

    def _latent_units(self, like: Tensor) -> tuple[Any, Any]:
        """(shift, scale) from the autoencoder's latents to the denoiser's."""
        config = self.pipeline.vae.config
        scale = config.get("scaling_factor") or 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(config[name]).view(1, -1, *[1] * (like.ndim - 2)).to(like)
                for name in ("latents_mean", "latents_std")
            )
            return mean, scale / std
        return config.get("shift_factor") or 0.0, scale

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's first weight: ``module.dtype`` walks all of them, 3 ms each time."""
        return next(self.module.parameters()).dtype

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that this model makes by default."""
        size = self.module.config.get("sample_size") or self.pipeline.default_sample_size
        return size * self.pipeline.vae_scale_factor

    @property
    def patch_size(self) -> int:
        """How many latents a side one token of the network is; 1 for convolutions."""
        return 1 if self.denoiser_name == "unet" else getattr(self.pipeline, "patch_size", 2)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of a square image of that side, by default the model's own.

        Raises:
            UserError: a size that the model cannot draw.
        """
        unit = self.pipeline.vae_scale_factor * self.patch_size
        side = self.default_resolution if resolution is None else resolution
        if side < unit or side % unit:
            raise UserError(f"the resolution must be a multiple of {unit} for this model, not {side}")
        side //= self.pipeline.vae_scale_factor
        return (self.pipeline.vae.config.latent_channels, side, side)

    def save_lora(self, folder: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the LoRA ``state`` (peft names) as ``pytorch_lora_weights.safetensors`` in diffusers'
        format."""
        name = self.denoiser_name
        options = {f"{name}_lora_layers": self._file_names(state), f"{name}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, **options)

    def _file_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with the names that LoRA files of this family have."""
        return state

    def load_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`save_lora` or any diffusers script wrote: state in peft names and the adapter's
        settings (empty where the file has none).

        Raises:
            UserError: there is no such file.
        """
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"there is no LoRA at {folder}: it has no {LORA_FILE}")
        state, *_, metadata = self.pipeline.lora_state_dict(
            folder, weight_name=LORA_FILE, return_lora_metadata=True, use_safetensors=True
        )
        prefix = f"{self.denoiser_name}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        settings = {k.removeprefix(prefix): v for k, v in (metadata or {}).items() if k.startswith(prefix)}
        return convert_unet_state_dict_to_peft(own), settings

    def encoders_to(self, device: torch.device | str) -> None:
        """Move the parts that only encode (text, images) to ``device``."""
        for encoder in self._encoders().values():
            encoder.to(device)

    def identity(self) -> dict[str, str]:
        """What cached encodings depend on: a digest of each encoder's weights, and the latents' units."""
        found = {name: digest(encoder.state_dict()) for name, encoder in self._encoders().items()}
        units = self._latent_units(torch.zeros(1, 1))
        return found | {"units": digest({str(i): torch.as_tensor(unit) for i, unit in enumerate(units)})}

    def _encoders(self) -> dict[str, nn.Module]:
        """Those that the pipeline has: some may be left out, like the T5 of SD3."""
        found = {name: getattr(self.pipeline, name) for name in self.encoder_names}
        return {name: encoder for name, encoder in found.items() if encoder is not None}


def digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits of named weights: exact for small ones, of 4096 evenly spread elements of larger
    tensors."""
    import hashlib

    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        flat = flat[:: max(1, flat.numel() // 4096)]
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + flat.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def load_adapter(
    model: str | Path | Any,
    *,
    revision: str | None = None,
    variant: str | None = None,
    **components: Any,
) -> ModelAdapter:
    """The adapter of a pipeline, chosen by the pipeline's class.

    Args:
        model: a folder with ``model_index.json``, a model id on the hub, or a loaded pipeline.
        revision, variant: as in diffusers' ``from_pretrained``.
        components: parts to use instead of the pipeline's own, such as ``vae=``.

    Raises:
        UserError: nothing loadable there, or a pipeline class that no family knows.
    """
    if isinstance(model, str | Path):
        pipeline = _load(str(model), revision=revision, variant=variant, **components)
    else:
        pipeline = model
    names = [cls.__name__ for cls in type(pipeline).__mro__]  # of a family's class made from it, too
    family = next((name for name in names if name in FAMILIES), names[0])
    module, _, name = FAMILIES[_known(family, str(model))].partition(":")
    return getattr(importlib.import_module(module), name)(pipeline)


def _known(class_name: str, where: str) -> str:
    if class_name in FAMILIES:
        return class_name
    raise UserError(f"{where} is a {class_name}, which is not supported yet (known: {', '.join(FAMILIES)})")


def _load(path: str, **options: Any) -> Any:
    folder = Path(path).expanduser()
    index = folder / "model_index.json"
    if folder.is_dir() and not index.is_file():
        raise UserError(f"{path} is no pipeline folder: it has no model_index.json")
    if not folder.exists() and (len(folder.parts) != 2 or path.startswith(("/", ".", "~"))):
        raise UserError(
            f"there is no model at {path}: give a diffusers pipeline folder or a hub id such as owner/name"
        )
    if index.is_file():
        _known(json.loads(index.read_text()).get("_class_name", "pipeline of unknown class"), path)
        path = str(folder)
    options = {name: value for name, value in options.items() if value is not None}
    import_schedulers()
    try:
        # safetensors only: a .bin file is a pickle, and may run what it likes.
        return DiffusionPipeline.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        where = "" if folder.exists() else " (there is no such folder, so it was looked for on the hub)"
        raise UserError(f"the model {path}{where} could not be loaded: {cause}") from error
