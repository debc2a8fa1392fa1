"""From images of any size to the square that a network wants, as tensors with gradient or through PIL."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from diffalign.rewards.spec import Preprocess

Fit = Literal["crop", "center_crop", "pad"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_square(images: Tensor, size: int, *, fit: Fit = "crop", preprocess: Preprocess = "tensor") -> Tensor:
    """``(B, 3, size, size)`` float32 in [0, 1] of ``images (B, 3, H, W)`` in [0, 1], bicubic.

    Args:
        fit: ``crop`` brings the shorter side to `size` and cuts the centre out, as transformers does;
            ``center_crop`` as torchvision does, whose centre is a pixel further where the rest is 3, 7,
            11, ...; ``pad`` brings the longer side to it and puts black around.
        preprocess: ``tensor`` is differentiable; ``pil`` rounds to 8 bits and resizes with Pillow, as
            most released scorers do, and has no gradient. They differ by about a grey level per pixel.
    """
    if preprocess == "pil":
        pictures = [F.to_pil_image(_eight_bit(image)) for image in images]
        squares = [F.to_tensor(_fitted(picture, size, fit)) for picture in pictures]
        return torch.stack(squares).to(images.device) if squares else images.new_zeros((0, 3, size, size))
    return _fitted(images.float(), size, fit).clamp(0, 1)


def _fitted(image, size: int, fit: Fit):  # type: ignore[no-untyped-def]  # a batch or a PIL image
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
    if fit != "pad":
        resized = F.resize(image, [size], InterpolationMode.BICUBIC, antialias=True)
        if fit == "center_crop":
            return F.center_crop(resized, [size, size])
        height, width = resized.shape[-2:] if isinstance(resized, Tensor) else resized.size[::-1]
        return F.crop(resized, (height - size) // 2, (width - size) // 2, size, size)
    scale = size / max(height, width)
    inner = [max(1, round(height * scale)), max(1, round(width * scale))]
    resized = F.resize(image, inner, InterpolationMode.BICUBIC, antialias=True)
    down, across = size - inner[0], size - inner[1]
    return F.pad(resized, [across // 2, down // 2, across - across // 2, down - down // 2])


def _eight_bit(image: Tensor) -> Tensor:
    return (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def eight_bit(images: Tensor) -> Tensor:
    """``(B, H, W, 3)`` uint8 in host memory of ``images (B, 3, H, W)`` in [0, 1]."""
    return _eight_bit(images).permute(0, 2, 3, 1)
