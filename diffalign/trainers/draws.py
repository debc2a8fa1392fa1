"""Randomness without a state: every number of a run is a function of the seed and of what it is for.

The noise of a pair depends on (seed, step, place in the global batch), never on the process that computes
it, on the micro-batch it falls into, or on what was drawn before. So a resumed run needs no generator states
and replays nothing, and two processes draw what one would.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def generator(*purpose: int | str) -> np.random.Generator:
    """An independent generator for each purpose, e.g. ``generator(seed, "noise", step, slot)``."""
    key = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key)))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(length)


def rows_at(positions: range, *, seed: int, length: int) -> list[int]:
    """Rows at ``positions`` of the endless sequence: one permutation of ``length`` rows after another."""
    return [int(_epoch(seed, p // length, length)[p % length]) for p in positions]


def number(*purpose: int | str) -> int:
    """A seed below 2^63 for generators of other libraries."""
    return int(generator(*purpose).integers(2**63))
