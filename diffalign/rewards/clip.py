"""CLIP models behind one face, and the reward that is a cosine in their space (Radford et al. 2021)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.errors import UserError
from diffalign.output import write_json
from diffalign.rewards.base import Reward
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit, Preprocess, to_square

CACHED_PROMPTS = 10_000  # text features kept; 40 MB of ViT-H/14
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


class Clip(nn.Module, ABC):
    """A CLIP, frozen: images and texts as unit vectors of one space.

    Args:
        model: the network as its library made it.
        tokenizer: ``list[str]`` -> ``(N, L)`` token ids; knows ``save_pretrained`` if it has files.
        size: side in pixels of the images that the network takes.
        mean, std: of each channel, taken out of pixels in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.model: Any = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def images(self, pixels: Tensor) -> Tensor:
        """``(B, D)`` float32 unit vectors of ``pixels (B, 3, size, size)`` in [0, 1]."""
        return unit(self.image_features(self.normalise(pixels)))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """``(B, D)`` float32 unit vectors of `prompts`, cut to the model's length."""
        return unit(self.text_features(self.tokenizer(list(prompts)).to(self.mean.device)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the image tower is fed with."""
        return (pixels - self.mean) / self.std

    @property
    def scale(self) -> Tensor:
        """``exp(logit_scale)``, float32."""
        return self.model.logit_scale.float().exp()

    @abstractmethod
    def image_features(self, normalised: Tensor) -> Tensor:
        """``(B, D)`` of normalised images."""

    @abstractmethod
    def text_features(self, ids: Tensor) -> Tensor:
        """``(B, D)`` of token ids ``(B, L)``."""

    @abstractmethod
    def image_blocks(self) -> Iterable[nn.Module]:
        """The layers of the image tower, which :func:`recompute` may be told of."""

    def save(self, folder: Path) -> None:
        """Write what :func:`load_clip` reads."""
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)


class TransformersClip(Clip):
    """A ``CLIPModel`` of transformers."""

    def image_features(self, normalised: Tensor) -> Tensor:
        return _vector(self.model.get_image_features(pixel_values=normalised))

    def text_features(self, ids: Tensor) -> Tensor:
        return _vector(self.model.get_text_features(input_ids=ids))

    def image_blocks(self) -> Iterable[nn.Module]:
        return self.model.vision_model.encoder.layers

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.model.save_pretrained(folder)
        mean, std = (values.flatten().tolist() for values in (self.mean, self.std))
        write_json(folder / "preprocessor_config.json", {"image_mean": mean, "image_std": std})


class OpenClip(Clip):
    """A model of open_clip.

    Args:
        config: what ``open_clip_config.json`` says of it: ``model_cfg`` and ``preprocess_cfg``.
    """

    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor], config: dict[str, Any]) -> None:
        visual = model.visual
        size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
        mean, std = (getattr(visual, name, None) for name in ("image_mean", "image_std"))
        super().__init__(model, tokenizer, size, mean or CLIP_MEAN, std or CLIP_STD)
        self.config = config

    def image_features(self, normalised: Tensor) -> Tensor:
        return self.model.encode_image(normalised)

    def text_features(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    def image_blocks(self) -> Iterable[nn.Module]:
        from open_clip.modified_resnet import Bottleneck
        from open_clip.transformer import ResidualAttentionBlock

        visual = self.model.visual
        return [m for m in visual.modules() if isinstance(m, Bottleneck | ResidualAttentionBlock)] or [visual]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        super().save(folder)
        write_json(folder / OPEN_CLIP_CONFIG, self.config)
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(state, folder / OPEN_CLIP_WEIGHTS)


def load_clip(folder: Path, *, reward: str) -> Clip:
    """The CLIP in a folder of transformers (``config.json``, ``model.safetensors``) or of open_clip
    (``open_clip_config.json``, ``open_clip_model.safetensors``); of the former if it is both.

    Tokenizer files may be missing: the vocabulary of CLIP comes with open_clip.

    Raises:
        UserError: the folder holds neither, or one that is broken.
    """
    config = folder / "config.json"
    try:
        if config.is_file() and json.loads(config.read_text()).get("model_type") == "clip":
            return _load_transformers(folder)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return _load_open_clip(folder)
    except Exception as error:  # the libraries raise a dozen kinds, some without a word about the folder
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"reward {reward}: the CLIP model at {folder} could not be loaded: {cause}"
        ) from error
    raise UserError(
        f"reward {reward}: no CLIP model at {folder}; give a folder of transformers (config.json, "
        f"model.safetensors) or of open_clip ({OPEN_CLIP_CONFIG}, {OPEN_CLIP_WEIGHTS}), or a hub id"
    )


def _load_transformers(folder: Path) -> TransformersClip:
    from transformers import CLIPModel

    loaded: Any = CLIPModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"]:  # they would be random
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    length, words = (getattr(model.config.text_config, n) for n in ("max_position_embeddings", "vocab_size"))
    found = _read(folder / "preprocessor_config.json")
    mean, std = found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)
    return TransformersClip(
        model, _tokenizer(folder, length, words), model.config.vision_config.image_size, mean, std
    )


def _load_open_clip(folder: Path) -> OpenClip:
    import open_clip

    name = f"local-dir:{folder.resolve()}"
    model = open_clip.create_model(name)
    return OpenClip(model, open_clip.get_tokenizer(name), _read(folder / OPEN_CLIP_CONFIG))


class _Tokenizer:
    """A transformers tokenizer that pads and cuts to the model's length."""

    def __init__(self, folder: Path, length: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._length = length

    def __call__(self, texts: list[str]) -> Tensor:
        return self._tokenizer(
            texts, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        ).input_ids

    def save_pretrained(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def _tokenizer(folder: Path, length: int, words: int) -> Callable[[list[str]], Tensor]:
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return _Tokenizer(folder, length)
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=length)
    if tokenizer.vocab_size != words:
        raise ValueError(
            f"there is no tokenizer, and its vocabulary of {words} is not CLIP's: put tokenizer.json there"
        )
    return tokenizer


class ClipReward(Reward):
    """``scale * cos(image, text)``; texts are encoded once.

    Args:
        name: see :class:`Reward`.
        clip: the model.
        scale: ``logit`` for the model's own ``exp(logit_scale)``, or a number.
        fit, preprocess: as in :func:`to_square`.
    """

    def __init__(
        self,
        name: str,
        clip: Clip,
        *,
        scale: float | Literal["logit"] = "logit",
        fit: Fit = "crop",
        preprocess: Preprocess = "tensor",
    ) -> None:
        super().__init__(name)
        self.clip = clip
        self.scale = scale
        self.fit: Fit = fit
        self.preprocess: Preprocess = preprocess
        self.differentiable = preprocess == "tensor"
        self._known: dict[str, Tensor] = {}

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.clip.images(self.square(images))
        scale = self.clip.scale if self.scale == "logit" else self.scale
        return scale * (seen * self.texts(prompts)).sum(-1)

    def square(self, images: Tensor) -> Tensor:
        """Images at the size that the network takes, still in [0, 1]."""
        return to_square(images, self.clip.size, fit=self.fit, preprocess=self.preprocess)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """``(B, D)`` unit vectors of `prompts`; each text is encoded once, the latest are kept."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            self._known |= zip(missing, self.clip.texts(missing), strict=True)
        vectors = torch.stack([self._known[prompt] for prompt in prompts])
        for old in list(self._known)[: max(0, len(self._known) - CACHED_PROMPTS)]:
            del self._known[old]
        return vectors

    def enable_gradient_checkpointing(self) -> None:
        """Keep no activations of the image tower: a third more time, a fraction of the memory."""
        recompute(self.clip.image_blocks())

    def forget_texts(self) -> None:
        """Encode texts anew from now on; to be called when the weights have changed."""
        self._known.clear()

    def _apply(self, *args: Any, **options: Any) -> Any:
        self.forget_texts()  # `.to` was called: what is kept is elsewhere, or of another precision
        return super()._apply(*args, **options)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep only the input of each block for the backward pass, whatever the module's own mode."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def unit(vectors: Tensor) -> Tensor:
    """Float32 vectors of length 1."""
    return F.normalize(vectors.float(), dim=-1)


def _vector(output: Any) -> Tensor:
    """transformers 5 wraps projected features into an output object, earlier ones give the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
