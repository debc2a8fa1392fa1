"""The language of the playground: what a caption may say, and what it means.

Four kinds of sentence over 6 shapes and 7 colours, at most 9 words::

    one       a red star | a small blue ring | a large green heart
    count     two red stars | three blue rings
    relation  a red star left of a blue ring      (left of, right of, above, below)
    and       a red star and a blue ring
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product

import numpy as np

from diffalign.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
SIZES = ("small", "large")
COUNTS = {"two": 2, "three": 3}
RELATIONS = ("left of", "right of", "above", "below")

KINDS = {"one": 0.30, "count": 0.25, "relation": 0.20, "and": 0.25}
"""Kind of sentence -> its share in the stream of scenes."""

_CS = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_A = r"an?"
_PATTERNS = {
    "one": re.compile(rf"^{_A} (?:({'|'.join(SIZES)}) )?{_CS}$"),
    "count": re.compile(rf"^({'|'.join(COUNTS)}) {_CS}s$"),
    "relation": re.compile(rf"^{_A} {_CS} ({'|'.join(RELATIONS)}) {_A} {_CS}$"),
    "and": re.compile(rf"^{_A} {_CS} and {_A} {_CS}$"),
}


@dataclass(frozen=True)
class Claim:
    """What a caption says.

    Attributes:
        kind: a key of `KINDS`.
        things: (colour, shape) of every object that must be there, in the order of the sentence.
        size: "small" or "large" for the object of a ``one`` sentence, else None.
        relation: how the first thing lies to the second, else None.
    """

    kind: str
    things: tuple[tuple[str, str], ...]
    size: str | None = None
    relation: str | None = None

    def __str__(self) -> str:
        (colour, shape), *others = self.things
        if self.kind == "count":
            number = next(word for word, n in COUNTS.items() if n == len(self.things))
            return f"{number} {colour} {shape}s"
        if self.kind == "one":
            return _with_article(" ".join([*([self.size] if self.size else []), colour, shape]))
        second = _with_article(" ".join(others[0]))
        return f"{_with_article(f'{colour} {shape}')} {self.relation or 'and'} {second}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun.startswith('orange') else 'a'} {noun}"


def parse(caption: str) -> Claim:
    """Read a caption.

    Raises:
        UserError: the sentence is not one of the playground's.
    """
    text = " ".join(caption.lower().split())
    for kind, pattern in _PATTERNS.items():
        found = pattern.match(text)
        if not found:
            continue
        words = found.groups()
        if kind == "one":
            return Claim(kind, ((words[1], words[2]),), size=words[0])
        if kind == "count":
            return Claim(kind, ((words[1], words[2]),) * COUNTS[words[0]])
        if kind == "relation":
            return Claim(kind, ((words[0], words[1]), (words[3], words[4])), relation=words[2])
        return Claim(kind, ((words[0], words[1]), (words[2], words[3])))
    raise UserError(
        f"{caption!r} is no sentence of the playground; say for example 'a red star', 'two blue rings' or "
        f"'a red star left of a blue ring' (colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)})"
    )


def draw_claim(rng: np.random.Generator) -> Claim:
    """Draw a claim: its kind by `KINDS`, everything else uniformly; two things are never the same."""
    return _draw(str(rng.choice(list(KINDS), p=list(KINDS.values()))), rng)


def _draw(kind: str, rng: np.random.Generator) -> Claim:
    def thing() -> tuple[str, str]:
        return COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]

    first = thing()
    if kind == "one":
        return Claim(kind, (first,), size=(None, *SIZES)[rng.integers(3)])
    if kind == "count":
        return Claim(kind, (first,) * int(rng.choice(list(COUNTS.values()))))
    second = thing()
    while second == first:
        second = thing()
    relation = RELATIONS[rng.integers(len(RELATIONS))] if kind == "relation" else None
    return Claim(kind, (first, second), relation=relation)


def change_one_word(claim: Claim, rng: np.random.Generator) -> Claim:
    """A claim that differs in one attribute: a colour, a shape, the count, the size or the relation.

    It is never true where ``claim`` is, except that "a red star" may well be small or large.
    """
    options = ["colour", "shape"]
    options += ["count"] * (claim.kind == "count") + ["size"] * (claim.size is not None)
    options += ["relation"] * (claim.relation is not None)
    while True:
        what, things = options[rng.integers(len(options))], [list(t) for t in claim.things]
        if what == "count":
            number = sum(COUNTS.values()) - len(things)
            return replace(claim, things=claim.things[:1] * number)
        if what == "size":
            return replace(claim, size=SIZES[1 - SIZES.index(str(claim.size))])
        if what == "relation":
            others = [r for r in RELATIONS if r != claim.relation]
            return replace(claim, relation=others[rng.integers(len(others))])
        changed = range(len(things)) if claim.kind == "count" else [rng.integers(len(things))]
        position, names = (0, COLOURS) if what == "colour" else (1, SHAPES)
        word = names[rng.integers(len(names))]
        for i in changed:
            things[i][position] = word
        new = tuple((t[0], t[1]) for t in things)
        if sorted(new) != sorted(claim.things) and len(set(new)) == len(set(claim.things)):
            return replace(claim, things=new)


def all_captions() -> list[str]:
    """Every caption of the language, in a fixed order."""
    things = list(product(COLOURS, SHAPES))
    pairs = [(a, b) for a in things for b in things if a != b]
    claims = [
        *(Claim("one", (t,), size=s) for t in things for s in (None, *SIZES)),
        *(Claim("count", (t,) * n) for t in things for n in COUNTS.values()),
        *(Claim("relation", p, relation=r) for p in pairs for r in RELATIONS),
        *(Claim("and", p) for p in pairs),
    ]
    return [str(c) for c in claims]


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the fifth that no preference training may see (split by hash)."""
    return sha256(caption.encode()).digest()[0] % 5 == 0


def draw_captions(seed: int, n: int, *, held_out: bool, kinds: Sequence[str] = tuple(KINDS)) -> list[str]:
    """``n`` captions of one side of the split, of these kinds, in the shares of `KINDS`.

    Kinds with few sentences ("one" has 126) come back to the same ones: draw other noise for them.

    Raises:
        UserError: a kind that there is not.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"kinds of captions are {', '.join(KINDS)}, not {', '.join(kinds) or 'none'}")
    rng = np.random.default_rng([seed, int(held_out)])
    shares = np.array([KINDS[kind] for kind in kinds])
    chosen: list[str] = []
    while len(chosen) < n:
        kind = str(rng.choice(list(kinds), p=shares / shares.sum()))
        claim = _draw(kind, rng)
        while is_held_out(str(claim)) != held_out:
            claim = _draw(kind, rng)
        chosen.append(str(claim))
    return chosen
