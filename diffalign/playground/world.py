"""The world of the playground: small scenes of flat shapes, drawn from a seed and rendered at 64 px.

Every scene is a function of ``(seed, index)`` alone, so a data stream needs no files and can be entered
anywhere. A pixel belongs to an object if its smallest channel is below 0.5: backgrounds, shadows included,
stay above.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from diffalign.playground.captions import Claim, draw_claim

SIZE = 64
"""Side of an image in pixels."""

PALETTE = {
    "red": (0.88, 0.15, 0.17),
    "orange": (0.98, 0.53, 0.10),
    "yellow": (0.96, 0.84, 0.14),
    "green": (0.16, 0.65, 0.27),
    "blue": (0.14, 0.38, 0.88),
    "purple": (0.56, 0.20, 0.74),
    "black": (0.11, 0.11, 0.13),
}

RADII = {
    ("one", "small"): (7.5, 9.0),
    ("one", "large"): (13.0, 16.0),
    ("one", None): (8.0, 15.0),
    ("count", None): (7.5, 10.5),
    ("relation", None): (8.0, 11.5),
    ("and", None): (8.0, 11.5),
}
"""(kind, size) -> range of the radius in pixels. ``small`` and ``large`` leave a gap on purpose."""

_GAP = 3.0  # clear pixels between two objects, so that they are two components
_MARGIN = 2.0
_DOMINANCE = 1.5  # a relation's axis is at least this many times the other
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: centre and radius in pixels, y pointing down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption that is true, the objects that make it true, and how the background looks."""

    claim: Claim
    things: tuple[Thing, ...]
    background: tuple[float, float, float]
    tilt: tuple[float, float]

    @property
    def caption(self) -> str:
        return str(self.claim)


def scene(seed: int, index: int) -> Scene:
    """Scene ``index`` of the stream ``seed``."""
    rng = np.random.default_rng([seed, index])
    return draw_scene(draw_claim(rng), rng)


def draw_scene(claim: Claim, rng: np.random.Generator) -> Scene:
    """A scene in which ``claim`` is true."""
    low, high = RADII[claim.kind, claim.size]
    radii = rng.uniform(low, high, len(claim.things))
    while True:
        room = _MARGIN + radii
        centres = np.stack([rng.uniform(room, SIZE - room), rng.uniform(room, SIZE - room)], axis=1)
        if _legal(claim, centres, radii):
            break
    background = rng.uniform(0.78, 0.99, 3)
    return Scene(
        claim,
        tuple(
            _thing(named, centre, radius)
            for named, centre, radius in zip(claim.things, centres, radii, strict=True)
        ),
        (float(background[0]), float(background[1]), float(background[2])),
        (float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.05))),
    )


def relation_of(dx: float, dy: float) -> str:
    """How something lies to something else when it is ``(dx, dy)`` pixels away from it (y down)."""
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _legal(claim: Claim, centres: np.ndarray, radii: np.ndarray) -> bool:
    for i in range(len(radii)):
        for j in range(i):
            distance = np.hypot(*(centres[i] - centres[j]))
            if distance < 1.12 * (radii[i] + radii[j]) + _GAP:
                return False
            pair = [_thing(claim.things[k], centres[k], radii[k]) for k in (i, j)]
            if distance < sum(_reach(thing) for thing in pair) + _GAP and _touch(*pair):
                return False
    if claim.relation is None:
        return True
    dx, dy = centres[0] - centres[1]
    near, far = sorted([abs(dx), abs(dy)])
    return far >= _DOMINANCE * near and relation_of(dx, dy) == claim.relation


def _thing(named: tuple[str, str], centre: np.ndarray, radius: float) -> Thing:
    return Thing(*named, x=float(centre[0]), y=float(centre[1]), radius=float(radius))


def _reach(thing: Thing) -> float:
    """How far its farthest corner is from its centre."""
    return thing.radius * float(np.hypot(*outline(thing.shape).T).max())


def _touch(one: Thing, other: Thing) -> bool:
    """Whether two things, corner to corner perhaps, have pixels in common or next to one another."""
    return bool((ndimage.binary_dilation(coverage(one) > 0, np.ones((3, 3))) & (coverage(other) > 0)).any())


@lru_cache
def outline(shape: str) -> np.ndarray:
    """(n, 2) corners of the outline of radius 1, centred on its bounding box, y down."""
    if shape == "square":
        points = 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -1.0), (1.1, 0.95), (-1.1, 0.95)])
    elif shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        points = np.where(np.arange(10) % 2, 0.52, 1.15)[:, None] * _circle(angles)
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y], axis=1) / 15.0
    else:
        points = _circle(np.linspace(0, 2 * np.pi, 60, endpoint=False))
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    return np.asarray(points - middle)


def _circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def coverage(thing: Thing) -> np.ndarray:
    """(64, 64) share of every pixel that the object covers, in [0, 1]."""
    big = Image.new("L", (SIZE * _OVERSAMPLING,) * 2)
    pen = ImageDraw.Draw(big)
    corners = outline(thing.shape)

    def fill(scale: float, value: int) -> None:
        points = (corners * thing.radius * scale + (thing.x, thing.y)) * _OVERSAMPLING
        pen.polygon([(float(x), float(y)) for x, y in points], fill=value)

    fill(1.0, 255)
    if thing.shape == "ring":
        fill(0.5, 0)
    return np.asarray(big.reduce(_OVERSAMPLING), dtype=np.float32) / 255


def render(scene: Scene) -> np.ndarray:
    """(64, 64, 3) uint8 picture of a scene."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    slope = scene.tilt[0] * (xs / SIZE - 0.5) + scene.tilt[1] * (ys / SIZE - 0.5)
    image = np.asarray(scene.background, dtype=np.float32) * (1 + 2 * slope[..., None])
    for thing in scene.things:
        dx, dy = (xs - thing.x) / thing.radius, (ys - thing.y - 0.95 * thing.radius) / (0.3 * thing.radius)
        image *= 1 - 0.13 * np.clip(1.3 - np.hypot(dx, dy), 0, 1)[..., None]
    for thing in scene.things:
        share = coverage(thing)[..., None]
        light = np.clip(((thing.x - xs) + (thing.y - ys)) / (2 * thing.radius), -1, 1)[..., None]
        colour = np.asarray(PALETTE[thing.colour], dtype=np.float32) * (1 + 0.10 * light)
        image = (1 - share) * image + share * colour
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
