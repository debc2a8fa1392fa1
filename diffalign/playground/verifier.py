"""Is a caption true of an image? Decided by looking at the pixels, with nothing learnt.

Objects are the connected components of dark or saturated pixels (`world`: smallest channel below 0.5). Each
gets its colour from the median of its interior, its shape from the best overlap with templates drawn by the
renderer. A caption is true if exactly the objects that it names are there, of the right colours, shapes,
size and relation, and nothing else is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from diffalign.playground.captions import KINDS, SHAPES, Claim, parse
from diffalign.playground.world import PALETTE, SIZE, Thing, coverage, relation_of

FOREGROUND = 0.5  # a pixel whose smallest channel is below this belongs to an object
MIN_PIXELS = 20  # smaller components are specks ...
MAX_SPECKS = 10  # ... of which an image may hold this many pixels in all
MIN_IOU = 0.76
MAX_COLOUR_DISTANCE = 0.30
MIN_COLOUR_SHARE = 0.8
ASPECT = (0.72, 1.4)
SMALL_BELOW = 21.5  # box side in pixels that parts small from large
_STRETCHED = 20


@dataclass(frozen=True)
class Found:
    """One object in an image.

    Attributes:
        colour, shape: names, or None where nothing fits well enough.
        iou: overlap with the best template, in [0, 1]: a graded measure of how well-formed it is.
        x, y: centre of its box in pixels (y down). box: larger side of the box in pixels.
    """

    colour: str | None
    shape: str | None
    iou: float
    x: float
    y: float
    box: float


@dataclass(frozen=True)
class Verdict:
    """Whether the caption holds, and each part of the answer (a part not asked for counts as right)."""

    true: bool
    count: bool
    colours: bool
    shapes: bool
    size: bool
    relation: bool
    clean: bool


def find(image: np.ndarray) -> tuple[list[Found], bool]:
    """All objects of an image, and whether the rest of it is clean.

    Args:
        image: (64, 64, 3) uint8, or float in [0, 1].
    """
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"an image of the playground is ({SIZE}, {SIZE}, 3), got {image.shape}")
    pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    labels, n = ndimage.label(pixels.min(axis=2) < FOREGROUND, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    found, specks = [], 0
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if sizes[label] < MIN_PIXELS:
            specks += int(sizes[label])
        else:
            found.append(_describe(pixels[box], labels[box] == label, box))
    return found, specks <= MAX_SPECKS


def verify(caption: str, image: np.ndarray) -> Verdict:
    """Judge one image.

    Args:
        caption: a sentence of the playground.
        image: (64, 64, 3) uint8, or float in [0, 1].

    Raises:
        UserError: the caption is not of the playground's language.
    """
    return judge(parse(caption), *find(image))


def judge(claim: Claim, found: Sequence[Found], clean: bool) -> Verdict:
    """Hold a claim against what `find` found."""
    told = [(f.colour, f.shape) for f in found]
    count = len(found) == len(claim.things)
    colours = Counter(c for c, _ in told) == Counter(c for c, _ in claim.things)
    shapes = Counter(s for _, s in told) == Counter(s for _, s in claim.things)
    bound = Counter(told) == Counter(claim.things)
    size = claim.size is None or (
        len(found) == 1 and claim.size == ("small" if found[0].box < SMALL_BELOW else "large")
    )
    relation = claim.relation is None
    if claim.relation is not None and bound:
        first, second = (found[told.index(thing)] for thing in claim.things)
        relation = relation_of(first.x - second.x, first.y - second.y) == claim.relation
    return Verdict(bound and size and relation and clean, count, colours, shapes, size, relation, clean)


def accuracy(captions: Sequence[str], images: np.ndarray) -> dict[str, float]:
    """Shares of true captions: over all, by kind of sentence, and of every part of the verdict."""
    verdicts = [verify(c, i) for c, i in zip(captions, images, strict=True)]
    kinds = [parse(c).kind for c in captions]
    table = {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in Verdict.__annotations__}
    for kind in KINDS:
        of_kind = [v.true for v, k in zip(verdicts, kinds, strict=True) if k == kind]
        table[kind] = float(np.mean(of_kind)) if of_kind else float("nan")
    return table


def _describe(pixels: np.ndarray, mask: np.ndarray, box: tuple[slice, slice]) -> Found:
    height, width = mask.shape
    shape, iou = _shape(mask)
    return Found(
        colour=_colour(pixels, mask),
        shape=shape if iou >= MIN_IOU and ASPECT[0] <= width / height <= ASPECT[1] else None,
        iou=iou,
        x=(box[1].start + box[1].stop) / 2,
        y=(box[0].start + box[0].stop) / 2,
        box=float(max(height, width)),
    )


def _colour(pixels: np.ndarray, mask: np.ndarray) -> str | None:
    inner = ndimage.binary_erosion(mask)
    values = pixels[inner if inner.sum() >= 5 else mask]
    palette = np.array(list(PALETTE.values()), dtype=np.float32)
    distance = np.linalg.norm(palette - np.median(values, axis=0), axis=1)
    nearest = int(distance.argmin())
    own = np.linalg.norm(values[:, None] - palette, axis=2).argmin(axis=1)
    if distance[nearest] > MAX_COLOUR_DISTANCE or (own == nearest).mean() < MIN_COLOUR_SHARE:
        return None
    return list(PALETTE)[nearest]


def _shape(mask: np.ndarray) -> tuple[str, float]:
    names, templates = _templates()
    own = _stretch(mask)
    shared = np.minimum(templates, own).sum(axis=1)
    iou = shared / (templates.sum(axis=1) + own.sum() - shared)
    best = int(iou.argmax())
    return names[best], float(iou[best])


def _stretch(mask: np.ndarray) -> np.ndarray:
    """A mask, cut to its box, as 20 x 20 values in [0, 1], flat."""
    zoom = (_STRETCHED / mask.shape[0], _STRETCHED / mask.shape[1])
    stretched = ndimage.zoom(mask.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
    return (stretched > 0.5).astype(np.float32).ravel()


@lru_cache
def _templates() -> tuple[list[str], np.ndarray]:
    names, masks = [], []
    for shape in SHAPES:
        for radius in (7.5, 8.5, 9.5, 11.0, 13.0, 15.5):
            for offset in (0.0, 0.5):
                mask = coverage(Thing("black", shape, 32 + offset, 32 + offset, radius)) > 0.45
                masks.append(_stretch(mask[ndimage.find_objects(mask.astype(int))[0]]))
                names.append(shape)
    return names, np.stack(masks)
