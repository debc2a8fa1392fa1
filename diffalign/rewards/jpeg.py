"""The size of an image as JPEG (Black et al. 2024): rewards whose right answer is known without a network."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.preprocess import eight_bit


class JpegSize(Reward):
    """``sign`` times the size in kB (1000 bytes) of the image as JPEG. No gradient.

    Args:
        sign: -1 rewards images that compress well, +1 those that do not.
        quality: of the JPEG.
    """

    differentiable = False

    def __init__(self, name: str, sign: float, quality: int = 95) -> None:
        super().__init__(name)
        self.sign, self.quality = sign, quality

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.sign * torch.tensor(
            [self._kilobytes(Image.fromarray(array)) for array in eight_bit(images).numpy()],
            dtype=torch.float32,
            device=images.device,
        )

    def _kilobytes(self, image: Image.Image) -> float:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=self.quality)
        return stream.tell() / 1000


def compressibility() -> JpegSize:
    """The smaller the file, the better."""
    return JpegSize("jpeg-compressibility", -1.0)


def incompressibility() -> JpegSize:
    """The larger the file, the better."""
    return JpegSize("jpeg-incompressibility", 1.0)
