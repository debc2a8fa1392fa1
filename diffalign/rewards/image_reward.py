"""ImageReward 1.0 (Xu et al. 2023): BLIP reads the prompt while looking at the image; about -2 to 2.

The published file holds a ViT-L/16 and a BERT with cross-attention in the names of the original BLIP. Here
the networks are those of transformers and the names are mapped. On the first token stands a chain of linear
layers, folded into one affine map; the result is standardised by the published mean and deviation. Texts
cannot be encoded ahead, since their encoder sees the image; token ids are made anew for each call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import recompute
from diffalign.rewards.files import affine, fill, local, needed, one_file, read_weights
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, to_square

FILES = ("ImageReward.pt", "ImageReward.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
LENGTH = 35  # tokens, the prompt is cut to and padded to
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# Of the image tower, from the names of the original BLIP (those of timm) to those of transformers. The text
# encoder has the same names in both.
_VISION = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


class ImageReward(Reward):
    """BLIP's first text token through an affine map.

    Args:
        vision, text: ``BlipVisionModel`` and ``BlipTextModel``.
        tokenizer: of transformers; BERT's.
        weight, bias: ``(width of text, 1)`` and ``(1,)``.
    """

    def __init__(
        self,
        vision: Any,
        text: Any,
        tokenizer: Any,
        weight: Tensor,
        bias: Tensor,
        preprocess: Preprocess = "tensor",
    ) -> None:
        super().__init__("image-reward")
        self.vision: Any = vision.float().eval().requires_grad_(False)
        self.text: Any = text.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess: Preprocess = preprocess
        self.differentiable = preprocess == "tensor"
        for name, values in (
            ("weight", weight),
            ("bias", bias),
            ("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1)),
            ("std", torch.tensor(CLIP_STD).view(3, 1, 1)),
        ):
            self.register_buffer(name, values)
        self.weight: Tensor
        self.bias: Tensor
        self.mean: Tensor
        self.std: Tensor

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = to_square(
            images, self.vision.config.image_size, fit="center_crop", preprocess=self.preprocess
        )
        seen = self.vision(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]
        return ((read.float() * self.weight[:, 0]).sum(-1) + self.bias - MEAN) / STD

    def enable_gradient_checkpointing(self) -> None:
        """Keep no activations of the image tower: a third more time, a fraction of the memory."""
        recompute(self.vision.encoder.layers)


def load(
    path: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    preprocess: Preprocess = "tensor",
) -> ImageReward:
    """From the published file, a folder with it, or a hub id.

    Args:
        tokenizer: folder or hub id of BERT's tokenizer (bert-base-uncased); by default the files beside the
            weights.
    """
    reward = "image-reward"
    where = local(needed(path, reward=reward, example="THUDM/ImageReward"), reward=reward, files=FILES)
    file = one_file(where, FILES, reward=reward)
    state = read_weights(file, reward=reward)
    parts = {
        prefix: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    }
    vision, text = blip_of(parts["blip.visual_encoder."], parts["blip.text_encoder."], path=file)
    weight, bias = affine(parts["mlp."], reward=reward, path=file)
    words = _tokenizer(tokenizer or file.parent)
    return ImageReward(vision, text, words, weight, bias, preprocess)


def blip_of(vision: Mapping[str, Tensor], text: Mapping[str, Tensor], *, path: Path) -> tuple[Any, Any]:
    """transformers' BLIP encoders with the weights of an original state dict, whose shapes decide all sizes
    but the heads, which are 64 wide throughout BLIP.

    Raises:
        UserError: weights are missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        patches = vision["patch_embed.proj.weight"]
        places = vision["pos_embed"].shape[1] - 1
        words = text["embeddings.word_embeddings.weight"]
        eyes = BlipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(vision, r"blocks\.(\d+)\."),
            num_attention_heads=max(1, patches.shape[0] // 64),
            image_size=round(places**0.5) * patches.shape[-1],
            patch_size=patches.shape[-1],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        reader = BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=eyes.hidden_size,
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(text, r"encoder\.layer\.(\d+)\."),
            num_attention_heads=max(1, words.shape[1] // 64),
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"reward image-reward: {path} is of another model: it lacks {error}; give ImageReward.pt as it is"
        ) from error
    named = {}
    for name, value in vision.items():
        for pattern, replacement in _VISION:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    towers = BlipVisionModel(eyes), BlipTextModel(reader, add_pooling_layer=False)
    for tower, state in zip(towers, (named, text), strict=True):
        fill(tower, state, reward="image-reward", path=path)
    return towers


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found.group(1)) for name in state if (found := re.match(pattern, name)))


def _tokenizer(path: str | Path) -> Any:
    from transformers import BertTokenizer

    folder = local(path, reward="image-reward", files=TOKENIZER_FILES)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(
            f"reward image-reward: {folder} has no tokenizer: put tokenizer.json or vocab.txt of BERT there, "
            "or give the option tokenizer, a folder or the hub id google-bert/bert-base-uncased"
        )
    return BertTokenizer.from_pretrained(folder, local_files_only=True)
