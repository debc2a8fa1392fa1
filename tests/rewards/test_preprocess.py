"""Images to a square: shapes, gradients, and agreement with the libraries whose resizing it stands for."""

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from diffalign.rewards.preprocess import eight_bit, to_square

SIDES = st.integers(3, 90)


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(eight_bit(image[None])[0].numpy())


@settings(deadline=None, max_examples=40)
@given(
    SIDES,
    SIDES,
    st.integers(1, 40),
    st.sampled_from(["crop", "center_crop", "pad"]),
    st.sampled_from(["tensor", "pil"]),
)
def test_any_image_becomes_the_square(height, width, size, fit, preprocess):
    square = to_square(torch.rand(2, 3, height, width), size, fit=fit, preprocess=preprocess)
    assert square.shape == (2, 3, size, size)
    assert square.dtype == torch.float32
    assert 0 <= square.min() <= square.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(48, 48), (60, 44), (31, 90)])
def test_crop_is_that_of_transformers_and_pil_of_its_8_bits(pictures, height, width):
    images = pictures(2, height, width)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, do_normalize=False)
    wanted = processor([as_pil(image) for image in images], return_tensors="pt").pixel_values
    through_pil = to_square(images, 32, preprocess="pil")
    assert (through_pil - wanted).abs().max() < 1.5 / 255
    difference = (to_square(images, 32) - wanted).abs()
    assert difference.max() < 6 / 255
    assert difference.mean() < 1 / 255


@pytest.mark.parametrize(("height", "width"), [(48, 48), (70, 50), (31, 90)])
def test_pad_is_open_clips_longest_side(pictures, height, width):
    images = pictures(2, height, width)
    transform = open_clip.image_transform(
        32, is_train=False, resize_mode="longest", mean=[0] * 3, std=[1] * 3
    )
    wanted = torch.stack([transform(as_pil(image)) for image in images])
    assert (to_square(images, 32, fit="pad", preprocess="pil") - wanted).abs().max() < 1e-6
    assert (to_square(images, 32, fit="pad") - wanted).abs().mean() < 1 / 255


@pytest.mark.parametrize("width", range(32, 40))  # with 3 and 7 columns too many, centres differ
def test_center_crop_is_torchvisions(pictures, width):
    (image,) = images = pictures(1, 32, width)
    wanted = torchvision.transforms.CenterCrop(32)(image)
    for preprocess in ("tensor", "pil"):
        found = to_square(images, 32, fit="center_crop", preprocess=preprocess)[0]
        assert (found - wanted).abs().max() < 0.6 / 255
        same = (to_square(images, 32, preprocess=preprocess)[0] - found).abs().max() == 0
        assert same == (width - 32 not in (3, 7))


def test_pad_keeps_what_crop_cuts_off():
    image = torch.zeros(1, 3, 20, 40)
    image[..., :5] = 1  # at the left edge
    assert to_square(image, 20, fit="crop").max() < 0.2
    padded = to_square(image, 20, fit="pad")
    assert padded.max() > 0.9
    assert padded[..., :5, :].max() == padded[..., 15:, :].max() == 0  # black above and below


def test_an_image_of_the_right_size_is_untouched(pictures):
    images = pictures(2, 32, 32)
    for fit in ("crop", "pad"):
        assert torch.equal(to_square(images, 32, fit=fit), images)
        assert torch.allclose(to_square(images, 32, fit=fit, preprocess="pil"), images, atol=1e-6)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_tensor_path_has_the_right_gradient(fit):
    images = (0.2 + 0.6 * torch.rand(1, 3, 7, 5)).requires_grad_()
    weights = torch.rand(1, 3, 4, 4)
    (to_square(images, 4, fit=fit) * weights).sum().backward()
    step = torch.zeros_like(images)
    step[0, 1, 3, 2] = 1e-2
    with torch.no_grad():
        slope = (
            (to_square(images + step, 4, fit=fit) - to_square(images - step, 4, fit=fit)) * weights
        ).sum()
    assert float(images.grad[0, 1, 3, 2]) == pytest.approx(float(slope) / 2e-2, abs=1e-3)


def test_half_precision_is_widened(pictures):
    images = pictures(1)
    assert to_square(images.half(), 32).dtype == torch.float32
    assert np.array_equal(eight_bit(images)[0], eight_bit(images.half())[0])
