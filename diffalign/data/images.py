"""One image cell, whatever a data set keeps there, to an upright 8-bit RGB image."""

from __future__ import annotations

import hashlib
import io
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageSequence

MIN_SIDE = 8  # pixels; below this a cell holds a tracking pixel or a placeholder, not a picture


Clip = tuple[Image.Image, ...]  # frames of a video, all of one size


class BadImage(Exception):
    """The cell gives no usable image; ``str(error)`` is the reason, one of `BAD_IMAGE`."""


BAD_IMAGE = ("missing image", "unreadable image", "tiny image", "too few frames")


def load(cell: Any, root: Path) -> bytes | Image.Image:
    """What a cell holds, not decoded: encoded bytes, or an image that is already in memory.

    `cell` is encoded bytes, a path (relative ones start at `root`), ``{"bytes": ..., "path": ...}`` as
    ``datasets.Image(decode=False)`` gives it, a PIL image, or a uint8 array (H, W, 3).

    Raises:
        BadImage: nothing there, or the file can't be read.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, np.ndarray):
        try:
            return Image.fromarray(cell)
        except (TypeError, ValueError) as error:
            raise BadImage("unreadable image") from error
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, bytes | bytearray | memoryview) and len(cell):
        return bytes(cell)
    if isinstance(cell, str | os.PathLike) and str(cell):
        try:
            data = (root / cell).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            raise BadImage("missing image") from error
        if data:
            return data
    raise BadImage("missing image")


def digest(payload: bytes | Image.Image) -> str:
    """SHA-256 (hex) of the encoded bytes, or of all that decides the look of an image in memory.

    Raises:
        BadImage: an image opened from a broken file that Pillow reads only now.
    """
    if isinstance(payload, bytes):
        return hashlib.sha256(payload).hexdigest()
    try:
        pixels = payload.tobytes()
        orientation = payload.getexif().get(ExifTags.Base.Orientation, 1)
        looks = (
            payload.mode,
            payload.size,
            payload.getpalette(),
            payload.info.get("transparency"),
            orientation,
        )
    except Exception as error:  # as in `decode`
        raise BadImage("unreadable image") from error
    return hashlib.sha256(repr(looks).encode() + pixels).hexdigest()


def size(payload: bytes | Image.Image) -> tuple[int, int]:
    """(width, height) as stored, from the header alone.

    Raises:
        BadImage: not an image.
    """
    if isinstance(payload, Image.Image):
        return payload.size
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return image.size
    except Exception as error:  # as in `decode`
        raise BadImage("unreadable image") from error


def decode(payload: bytes | Image.Image) -> Image.Image:
    """Upright RGB: EXIF rotation applied, transparency put on white, other modes and 16 bit converted.

    Of an animation, the first frame. The result never shares memory with `payload`.

    Raises:
        BadImage: truncated, not an image, or a side below `MIN_SIDE` pixels.
    """
    return decode_clip(payload, 1)[0]


def decode_clip(payload: bytes | Image.Image, frames: int) -> Clip:
    """The first `frames` frames of an animation (WebP, PNG or GIF), each as :func:`decode` gives an image.

    Raises:
        BadImage: as :func:`decode`, or there are fewer frames.
    """
    try:
        image = payload if isinstance(payload, Image.Image) else Image.open(io.BytesIO(payload))
        sequence = islice(ImageSequence.Iterator(image), frames)
        clip = tuple(_to_rgb(ImageOps.exif_transpose(frame)) for frame in sequence)
    except Exception as error:  # decoders of broken files raise nearly anything (OS, Syntax, struct, zlib)
        raise BadImage("unreadable image") from error
    if len(clip) < frames:
        raise BadImage("too few frames")
    if min(clip[0].size) < MIN_SIDE:
        raise BadImage("tiny image")
    return clip


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit PNG or TIFF: Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
