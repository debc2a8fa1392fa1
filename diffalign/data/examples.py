"""What pairs and single images share: rows by index, decoded when asked for, bad ones replaced."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, overload

from PIL import Image

from diffalign.data import images
from diffalign.data.images import BadImage, Clip
from diffalign.data.rows import CHOICES, Place, Row
from diffalign.data.tables import Table
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

LOUD = 10  # replaced rows that are logged as warnings; the rest are only counted


class Example(Protocol):
    """What a pair and a single image have in common: `sides` images, what they show and how good they are."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> tuple[Image.Image | Clip, ...]: ...
    @property
    def digests(self) -> tuple[str, ...]: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def preference(self) -> float: ...


T = TypeVar("T", bound=Example)
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class BadRow:
    """A row that is not used: its number in the source (from 0), its id and why."""

    row: int
    id: str
    reason: str


class Examples(Sequence[T], Generic[T, R]):
    """Examples by index; images are decoded when one is asked for, never before.

    A row that turns out to be bad on reading does not stop anything: the next good row (cyclically) stands in
    for it, always the same one, and the bad row is counted in `skipped`.
    """

    def __init__(
        self,
        table: Table,
        columns: Mapping[str, str],
        rows: list[R],
        skipped: dict[tuple[int, str], BadRow],
        *,
        min_side: int = 0,
    ) -> None:
        self._table, self._columns, self._rows, self._skipped = table, columns, rows, skipped
        self._min_side = min_side
        self._told: set[tuple[int, str]] = set()

    what = "example"  # as messages call one
    sides: ClassVar[int]  # images of an example
    frames = 0  # of each image, if they are clips

    @abstractmethod
    def _example(self, row: R, payloads: list[bytes | Image.Image]) -> T:
        """The example of a row whose images are loaded but not decoded; BadImage if that fails."""

    @abstractmethod
    def _places(self, row: R) -> tuple[Place, ...]:
        """Where the images of a row are, in the order of the example."""

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        index = range(len(self))[index]  # IndexError and negative numbers as a list has them
        wanted = self._rows[index]
        for step in range(len(self)):
            stand_in = (index + step) % len(self)
            found = self.read(stand_in)
            if not isinstance(found, BadRow):
                if step and wanted.key not in self._told:
                    self._tell(self._skipped[wanted.key], self._rows[stand_in].id)
                return found
        raise UserError(f"no usable {self.what} in {self._table.name}: {reasons(self.skipped)}")

    def read(self, index: int) -> T | BadRow:
        """The example of row `index` itself, or why there is none."""
        row = self._rows[index]
        if row.key in self._skipped:
            return self._skipped[row.key]
        try:
            return self._example(row, self._checked(row))
        except BadImage as error:
            bad = self._skipped[row.key] = BadRow(row.number, row.id, str(error))
            return bad

    def payloads(self, index: int) -> list[bytes | Image.Image] | None:
        """Images of row `index` itself as they are stored, not decoded; None if it is a bad row."""
        row = self._rows[index]
        if row.key in self._skipped:
            return None
        try:
            return self._checked(row)
        except BadImage:
            return None

    def digests(self, index: int) -> tuple[str, ...] | None:
        """SHA-256 of the bytes of each image of row `index` itself, nothing decoded; None if it is bad."""
        payloads = self.payloads(index)
        try:
            return None if payloads is None else tuple(map(images.digest, payloads))
        except BadImage:
            return None

    def select(self, indices: Iterable[int]) -> Self:
        """The examples at `indices`, in that order, as a data set of its own."""
        rows = [self._rows[index] for index in indices]
        selected = type(self)(self._table, self._columns, rows, self._skipped, min_side=self._min_side)
        selected.frames = self.frames
        return selected

    def as_clips(self, frames: int) -> Self:
        """The same examples with the first `frames` frames of each animation in place of its first image; a
        row with fewer is a bad one."""
        clips = self.select(range(len(self)))
        clips.frames, clips._skipped = frames, dict(self._skipped)
        return clips

    def split_by_prompt(self, held_out: float, seed: int = 0) -> tuple[Self, Self]:
        """Two sets (rest, held out) that share no prompt; the second gets about the share `held_out` of them.

        A prompt's side depends on its text and `seed` alone, so it stays when the set grows.
        """

        def is_held_out(prompt: str) -> bool:
            hashed = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8]
            return int.from_bytes(hashed) < held_out * 2**64

        sides = [is_held_out(row.prompts[0]) for row in self._rows]
        rest = self.select(i for i, side in enumerate(sides) if not side)
        return rest, self.select(i for i, side in enumerate(sides) if side)

    @property
    def prompts(self) -> list[str]:
        """Prompt of every row (the first, where a row has several), no image touched."""
        return [row.prompts[0] for row in self._rows]

    @property
    def all_prompts(self) -> list[tuple[str, ...]]:
        """All prompts of every row."""
        return [row.prompts for row in self._rows]

    @property
    @abstractmethod
    def captions(self) -> list[tuple[str, ...]]:
        """What each image of every row shows, no image touched."""

    @property
    @abstractmethod
    def preferences(self) -> list[float]:
        """``preference`` of every row, no image touched."""

    @property
    def weights(self) -> list[float]:
        """Weight of every row, mean 1."""
        return [1.0] * len(self)

    @property
    def ids(self) -> list[str]:
        """Id of every row."""
        return [row.id for row in self._rows]

    @property
    def skipped(self) -> list[BadRow]:
        """Rows of the source known so far to be unused, by row number."""
        return sorted(self._skipped.values(), key=lambda bad: bad.row)

    @property
    def source(self) -> str:
        """What was opened, as messages call it."""
        return self._table.name

    def summary(self) -> str:
        """One line: examples, prompts, and what was left out."""
        used = [row.prompts[0] for row in self._rows if row.key not in self._skipped]
        text = f"{len(used):,} {self.what}s, {len(set(used)):,} prompts"
        return f"{text} (left out: {reasons(self.skipped)})" if self._skipped else text

    def refuse_if_damaged(self, max_bad: float, scan: int) -> None:
        """Decode `scan` rows, evenly spread, and refuse a set with more than the share `max_bad` of damage.

        Raises:
            UserError: says the share, the reasons and the first bad row.
        """
        damaged = sum(bad.reason not in CHOICES for bad in self.skipped)
        share_of_text = damaged / (damaged + len(self))
        count = min(scan, len(self))
        sample = [i * len(self) // count for i in range(count)]
        found = [bad for bad in map(self.read, sample) if isinstance(bad, BadRow) and is_damage(bad)]
        share = share_of_text + (1 - share_of_text) * len(found) / max(count, 1)
        if share > max_bad:
            damage = [bad for bad in self.skipped if is_damage(bad)]
            what = f"{reasons(damage)}; first: {damage[0].id}"
            raise UserError(
                f"{share:.1%} of the rows of {self.source} are bad ({what}), more than max_bad={max_bad:g} "
                "allows; `diffalign data check` lists them all, a larger max_bad skips them"
            )

    def _checked(self, row: R) -> list[bytes | Image.Image]:
        payloads = [self._payload(row, place) for place in self._places(row)]
        if self._min_side and any(min(images.size(payload)) < self._min_side for payload in payloads):
            raise BadImage("below min_side")
        return payloads

    def _payload(self, row: R, place: Place) -> bytes | Image.Image:
        cell: Any = self._table.cell(row.number, self._columns[place.role])
        if place.item is not None:
            if not isinstance(cell, Sequence) or isinstance(cell, str | bytes) or len(cell) <= place.item:
                raise BadImage("missing image")
            cell = cell[place.item]
        return images.load(cell, self._table.root)

    def _tell(self, bad: BadRow, stand_in: str) -> None:
        self._told.add((bad.row, bad.id))
        level = logging.WARNING if len(self._told) <= LOUD else logging.DEBUG
        logger.log(level, "%s: %s (%s) is replaced by %s", self._table.name, bad.id, bad.reason, stand_in)


def sorted_out(
    found: Iterable[tuple[R, str]], limit: int | None
) -> tuple[list[R], dict[tuple[int, str], BadRow]]:
    """The first `limit` rows without a reason against them, and the bad ones before those."""
    rows: list[R] = []
    skipped: dict[tuple[int, str], BadRow] = {}
    for row, reason in found:
        if reason:
            skipped[row.key] = BadRow(row.number, row.id, reason)
        elif len(rows) == limit:
            break
        else:
            rows.append(row)
    return rows, skipped


def is_damage(bad: BadRow) -> bool:
    """Whether a row is broken, rather than left out by its voters or by an option."""
    return bad.reason not in CHOICES


def reasons(rows: Iterable[BadRow]) -> str:
    """``"12 tie, 3 empty caption"``, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in Counter(bad.reason for bad in rows).most_common())
