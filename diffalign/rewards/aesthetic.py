"""LAION's aesthetic predictor (Schuhmann 2022): how pretty is an image, about 1 to 10, whatever its prompt.

A chain of linear layers without activations on the unit image vector of CLIP L/14, which is one affine map
and is folded into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import Clip, load_clip
from diffalign.rewards.files import affine, local, needed, one_file, read_weights
from diffalign.rewards.preprocess import Preprocess, to_square

FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth", "aesthetic.safetensors")


class Aesthetic(Reward):
    """``unit(image) @ weight + bias``.

    Args:
        clip: the model whose image vectors the map was fitted to.
        weight, bias: ``(D, 1)`` and ``(1,)``.
    """

    def __init__(self, clip: Clip, weight: Tensor, bias: Tensor, preprocess: Preprocess = "tensor") -> None:
        super().__init__("aesthetic")
        self.clip = clip
        self.preprocess: Preprocess = preprocess
        self.differentiable = preprocess == "tensor"
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        square = to_square(images, self.clip.size, fit="center_crop", preprocess=self.preprocess)
        return (self.clip.images(square) * self.weight[:, 0]).sum(-1) + self.bias


def load(
    path: str | Path | None = None, *, clip: str | Path | None = None, preprocess: Preprocess = "tensor"
) -> Aesthetic:
    """From the published state dict (file, folder with it, or hub id) and the CLIP that it belongs to.

    Args:
        clip: folder or hub id of CLIP ViT-L/14 of OpenAI.
    """
    reward = "aesthetic"
    where = local(
        needed(path, reward=reward, example="trl-lib/ddpo-aesthetic-predictor"), reward=reward, files=FILES
    )
    file = one_file(where, FILES, reward=reward)
    weight, bias = affine(read_weights(file, reward=reward), reward=reward, path=file)
    if not clip:
        raise UserError(
            "reward aesthetic stands on CLIP ViT-L/14: give the option clip, a local folder or the hub id "
            "openai/clip-vit-large-patch14"
        )
    model = load_clip(local(clip, reward=reward), reward=reward)
    width = model.images(model.mean.new_zeros(1, 3, model.size, model.size)).shape[-1]
    if weight.shape != (width, 1):
        raise UserError(
            f"reward aesthetic: {file} maps {weight.shape[0]} numbers to {weight.shape[1]}, but {clip} gives "
            f"{width}; it belongs to CLIP ViT-L/14 (768)"
        )
    return Aesthetic(model, weight, bias, preprocess)
