"""Geometry of resize, crop and flip."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.transforms import PairTransform, View, fit


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, by one per pixel."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def levels(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round().int()


def test_an_image_of_the_right_size_is_only_scaled_to_the_range():
    fitted = fit(ramp(32, 24), (24, 32))
    assert fitted.pixels.shape == (3, 24, 32)
    assert fitted.pixels.dtype == torch.float32
    assert torch.equal(levels(fitted.pixels)[0, 0], torch.arange(32, dtype=torch.int32))
    white = fit(Image.new("RGB", (8, 8), "white"), 8).pixels
    assert (white == 1).all()
    assert (fit(Image.new("RGB", (8, 8), "black"), 8).pixels == -1).all()


@pytest.mark.parametrize(
    ("view", "left", "top"),
    [(View(), 20, 0), (View(0, 0), 0, 0), (View(1, 1), 40, 0), (View(0.5, 0.25), 10, 0)],
)
def test_crop_of_a_wide_image(view, left, top):
    fitted = fit(ramp(72, 32), 32, view)
    assert fitted.crop_top_left == (top, left)
    assert fitted.original_size == (32, 72)
    assert levels(fitted.pixels)[0, 0].tolist() == list(range(left, left + 32))


def test_flip_mirrors_pixels_and_the_crop_corner():
    plain, flipped = fit(ramp(72, 32), 32, View(0, 0.25)), fit(ramp(72, 32), 32, View(0, 0.25, flip=True))
    assert torch.equal(flipped.pixels, plain.pixels.flip(-1))
    assert (plain.crop_top_left, flipped.crop_top_left) == ((0, 10), (0, 72 - 32 - 10))


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (65, 64), (9, 9), (64, 64), (1000, 8)])
@pytest.mark.parametrize("resolution", [64, (48, 80)])
def test_every_size_covers_the_resolution(size, resolution):
    height, width = (64, 64) if resolution == 64 else resolution
    for view in (View(), View(1, 1, flip=True)):
        fitted = fit(ramp(*size), resolution, view)
        assert fitted.pixels.shape == (3, height, width)
        assert min(fitted.crop_top_left) >= 0


def test_downscaling_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
    assert fit(stripes, 16).pixels.abs().max() < 0.1  # grey, not black or white


def test_pairs_share_crop_and_flip_unless_told_otherwise():
    generator = torch.Generator().manual_seed(0)
    joint = PairTransform(32, center_crop=False, random_flip=True)
    views = [joint.draw(generator) for _ in range(50)]
    assert all(a == b for a, b in views)
    assert 10 < sum(a.flip for a, _ in views) < 40
    assert len({a for a, _ in views}) == 50
    apart = PairTransform(32, center_crop=False, random_flip=True, joint=False)
    views = [apart.draw(generator) for _ in range(50)]
    assert all(a[:2] != b[:2] for a, b in views)
    assert any(a.flip != b.flip for a, b in views)


def test_a_pair_is_a_function_of_the_generator():
    transform = PairTransform(32, center_crop=False, random_flip=True)
    runs = [transform(ramp(72, 40), ramp(40, 72), torch.Generator().manual_seed(3)) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.pixels, b.pixels)
    assert PairTransform(32).draw(torch.Generator())[0] == View()
