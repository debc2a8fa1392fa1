"""Any image cell becomes an upright RGB image, or a reason."""

import numpy as np
import pytest
from PIL import Image

from diffalign.data.images import BadImage, decode, digest, load


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


def test_exif_rotation_is_applied(make):
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 8, 16))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    upright = decode(make.encoded(image, "PNG", exif=exif))
    assert upright.size == (16, 32)
    assert corner(upright) == (0, 0, 255)
    assert upright.getpixel((0, 31)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", (0, 255, 255)),
        (Image.new("L", (16, 16), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (16, 16), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (Image.new("LA", (16, 16), (10, 0)), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((16, 16), 0x80FF, np.uint16)), "PNG", (128, 128, 128)),
    ],
    ids=["cmyk", "grey", "bitmap", "transparent", "opaque", "grey-alpha", "16-bit"],
)
def test_modes(make, image, kind, expected):
    rgb = decode(make.encoded(image, kind))
    assert rgb.mode == "RGB"
    assert np.abs(np.subtract(corner(rgb), expected)).max() <= 3  # JPEG rounds


def test_palette_with_and_without_transparency(make):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert corner(decode(make.encoded(image))) == (200, 100, 50)
    assert corner(decode(make.encoded(image, transparency=1))) == (255, 255, 255)


def test_first_frame_of_an_animation(make):
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    assert corner(decode(make.encoded(red, "GIF", save_all=True, append_images=[blue]))) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_unreadable(make, kind):
    data = make.encoded(make.picture(0, (64, 64)), kind)
    for length in (5, 40, len(data) // 2, len(data) - len(data) // 8):
        with pytest.raises(BadImage, match="unreadable image"):
            decode(data[:length])


def test_not_an_image_and_a_bomb_are_unreadable(make, monkeypatch):
    with pytest.raises(BadImage, match="unreadable image"):
        decode(b"<html>404</html>")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="unreadable image"):
        decode(make.encoded(make.picture(0, (64, 64))))


def test_tiny_images_are_refused(make):
    with pytest.raises(BadImage, match="tiny image"):
        decode(make.encoded(Image.new("RGB", (1, 1))))


@pytest.mark.parametrize(
    "cell", [None, b"", "", "nowhere.png", {"bytes": None, "path": None}, "a\0b", 3, "."]
)
def test_missing_cells(tmp_path, cell):
    with pytest.raises(BadImage, match="missing image"):
        load(cell, tmp_path)


def test_every_kind_of_cell_gives_the_same_pixels(make, tmp_path):
    image = make.picture(5)
    data = make.encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    array = np.asarray(image)
    for cell in (data, "a.png", tmp_path / "a.png", {"bytes": data, "path": None}, image, array):
        assert np.array_equal(np.asarray(decode(load(cell, tmp_path))), array)


def test_arrays_that_are_no_image(tmp_path):
    with pytest.raises(BadImage, match="unreadable image"):
        load(np.zeros((4, 4, 7)), tmp_path)


def test_digest_sees_all_that_decides_the_look(make):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    other = image.copy()
    other.putpalette([0, 0, 0, 200, 100, 51])
    assert digest(image) == digest(image.copy()) != digest(other)
    assert digest(make.picture(1)) != digest(make.picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def test_digest_of_a_lazily_opened_broken_file(make, tmp_path):
    data = make.encoded(make.picture(0, (64, 64)))
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "half.png") as image, pytest.raises(BadImage, match="unreadable image"):
        digest(image)


def test_decoding_leaves_the_original_alone(make):
    image = make.picture(3)
    decode(image).paste("red", (0, 0, 16, 16))
    assert np.array_equal(np.asarray(image), np.asarray(make.picture(3)))
