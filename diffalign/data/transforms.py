"""Resize, crop and flip of an image or of both images of a pair, to tensors in [-1, 1].

A pair is compared under one noise draw, so by default both images get the same crop and flip; the published
Diffusion-DPO code draws them independently (``joint=False``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.images import Clip


class View(NamedTuple):
    """Which part of an image is seen: where the crop lies in the room it has (0..1), and whether mirrored."""

    vertical: float = 0.5
    horizontal: float = 0.5
    flip: bool = False


class Fitted(NamedTuple):
    """One image, or clip, at the training resolution.

    Attributes:
        pixels: (3, height, width), float32 in [-1, 1]; of a clip, (3, frames, height, width).
        original_size: (height, width) of the image before, in pixels: a condition of SDXL.
        crop_top_left: (top, left) of the crop in the resized (and mirrored) image, in pixels: likewise.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def size_of(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a resolution given as one side of a square or as both."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def fit(
    image: Image.Image | Clip,
    resolution: int | tuple[int, int],
    view: View = View(),  # noqa: B008
) -> Fitted:
    """Scale an RGB `image` until it just covers the resolution (antialiased bilinear) and crop by `view`.

    The frames of a clip are scaled and cropped alike."""
    if not isinstance(image, Image.Image):
        frames = [fit(frame, resolution, view) for frame in image]
        return frames[0]._replace(pixels=torch.stack([frame.pixels for frame in frames], 1))
    height, width = size_of(resolution)
    scale = max(height / image.height, width / image.width)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    scaled = image if image.size == resized else image.resize(resized, Image.Resampling.BILINEAR)
    top = round(view.vertical * (scaled.height - height))
    left = round(view.horizontal * (scaled.width - width))
    array = np.asarray(scaled.crop((left, top, left + width, top + height)))
    if view.flip:
        array, left = array[:, ::-1], scaled.width - width - left
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
    return Fitted(pixels.contiguous(), (image.height, image.width), (top, left))


@dataclass(frozen=True)
class PairTransform:
    """Augmentation of a pair.

    Attributes:
        resolution: side of a square or (height, width), in pixels.
        center_crop: centre of the image; otherwise a random place.
        random_flip: mirror with probability 1/2.
        joint: the same place and flip for both images; otherwise drawn for each.
    """

    resolution: int | tuple[int, int]
    center_crop: bool = True
    random_flip: bool = False
    joint: bool = True

    def draw(self, generator: torch.Generator) -> tuple[View, View]:
        """Views of the two images, drawn from `generator` (always six numbers, whatever the options)."""
        numbers = torch.rand(2, 3, generator=generator, dtype=torch.float64).tolist()

        def view(vertical: float, horizontal: float, coin: float) -> View:
            place = (0.5, 0.5) if self.center_crop else (vertical, horizontal)
            return View(*place, flip=self.random_flip and coin < 0.5)

        first = view(*numbers[0])
        return first, first if self.joint else view(*numbers[1])

    def __call__(
        self, first: Image.Image, second: Image.Image, generator: torch.Generator
    ) -> tuple[Fitted, Fitted]:
        """Both images (RGB) at the training resolution."""
        views = self.draw(generator)
        return fit(first, self.resolution, views[0]), fit(second, self.resolution, views[1])
