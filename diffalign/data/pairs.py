"""Preference pairs: two images of one prompt, the better one first."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, overload

from PIL import Image

from diffalign.data import images
from diffalign.data.columns import resolve
from diffalign.data.images import BadImage
from diffalign.data.tables import ListTable, Table, open_table
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

Ties = Literal["drop", "soft", "error"]
# Rows left out because of what the voters said. Everything else that is skipped counts as damage.
NO_VERDICT = ("tie", "no label")
LOUD = 10  # replaced rows that are logged as warnings; the rest are only counted


@dataclass(frozen=True)
class Pair:
    """One preference.

    Attributes:
        id: the row's own id, or where it stands (``line-7``, ``row-6``).
        prompt: caption of both images.
        chosen: the better image, RGB, upright.
        rejected: the other one.
        preference: probability that `chosen` is the better one, 0.5 (a tie kept by ``ties="soft"``) to 1.
        digests: SHA-256 of the encoded bytes of `chosen` and `rejected`.
    """

    id: str
    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    preference: float = 1.0
    digests: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class BadRow:
    """A row that is not used: its number in the source (from 0), its id and why."""

    row: int
    id: str
    reason: str


class _Row(NamedTuple):
    number: int  # in the table
    id: str
    prompt: str
    first_wins: float  # probability that the first image column holds the better image


class PairDataset(Sequence[Pair]):
    """Preference pairs by index; images are decoded when a pair is asked for, never before.

    A row that turns out to be bad on reading does not stop anything: the next good row (cyclically) stands in
    for it, always the same one, and the bad row is counted in `skipped`. Made by :func:`open_pairs` or
    :meth:`from_lists`.
    """

    def __init__(
        self, table: Table, columns: Mapping[str, str], rows: list[_Row], skipped: dict[int, BadRow]
    ) -> None:
        self._table, self._columns, self._rows, self._skipped = table, columns, rows, skipped
        self._sides = ("chosen", "rejected") if "chosen" in columns else ("image_0", "image_1")
        self._told: set[int] = set()

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[str],
        chosen_images: Sequence[Any],
        rejected_images: Sequence[Any],
        *,
        preferences: Sequence[float] | None = None,
        ids: Sequence[str] | None = None,
        ties: Ties = "drop",
        max_bad: float = 0.01,
    ) -> PairDataset:
        """Pairs that are in memory already: PIL images, uint8 arrays (H, W, 3), encoded bytes or paths.

        Raises:
            UserError: lists of unequal length, and as :func:`open_pairs` does for bad rows.
        """
        lists = {"prompt": prompts, "chosen": chosen_images, "rejected": rejected_images}
        lists |= {"preference": [float(p) for p in preferences]} if preferences is not None else {}
        lists |= {"id": ids} if ids is not None else {}
        if len({len(values) for values in lists.values()}) != 1:
            lengths = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
            raise UserError(f"lists of pairs must have one length, got {lengths}")
        return _from_table(ListTable("the lists", lists), ties=ties, max_bad=max_bad)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairDataset: ...
    def __getitem__(self, index: int | slice) -> Pair | PairDataset:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        index = range(len(self))[index]  # IndexError and negative numbers as a list has them
        wanted = self._rows[index]
        for step in range(len(self)):
            pair = self.read((index + step) % len(self))
            if isinstance(pair, Pair):
                if step and wanted.number not in self._told:
                    self._tell(self._skipped[wanted.number], pair)
                return pair
        raise UserError(f"no usable pair in {self._table.name}: {reasons(self.skipped)}")

    def read(self, index: int) -> Pair | BadRow:
        """The pair of row `index` itself, or why there is none."""
        row = self._rows[index]
        if row.number in self._skipped:
            return self._skipped[row.number]
        try:
            payloads = self._payloads(row)
            digests = tuple(map(images.digest, payloads))
            if digests[0] == digests[1]:
                return self._skip(row, "identical images")
            decoded = tuple(map(images.decode, payloads))
        except BadImage as error:
            return self._skip(row, str(error))
        win, lose = (0, 1) if row.first_wins >= 0.5 else (1, 0)
        return Pair(
            id=row.id,
            prompt=row.prompt,
            chosen=decoded[win],
            rejected=decoded[lose],
            preference=self._preference(row),
            digests=(digests[win], digests[lose]),
        )

    def digests(self, index: int) -> tuple[str, str] | None:
        """SHA-256 of the bytes of (chosen, rejected) of row `index` itself, nothing decoded; None if bad."""
        row = self._rows[index]
        if row.number in self._skipped:
            return None
        try:
            first, second = map(images.digest, self._payloads(row))
        except BadImage:
            return None
        if first == second:
            return None
        return (first, second) if row.first_wins >= 0.5 else (second, first)

    def select(self, indices: Iterable[int]) -> PairDataset:
        """The pairs at `indices`, in that order, as a data set of its own."""
        rows = [self._rows[index] for index in indices]
        return PairDataset(self._table, self._columns, rows, self._skipped)

    def split_by_prompt(self, held_out: float, seed: int = 0) -> tuple[PairDataset, PairDataset]:
        """Two sets (rest, held out) that share no prompt; the second gets about the share `held_out` of them.

        A prompt's side depends on its text and `seed` alone, so it stays when the set grows.
        """

        def is_held_out(prompt: str) -> bool:
            hashed = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8]
            return int.from_bytes(hashed) < held_out * 2**64

        sides = [is_held_out(row.prompt) for row in self._rows]
        rest = self.select(i for i, side in enumerate(sides) if not side)
        return rest, self.select(i for i, side in enumerate(sides) if side)

    @property
    def prompts(self) -> list[str]:
        """Prompt of every row, no image touched."""
        return [row.prompt for row in self._rows]

    @property
    def ids(self) -> list[str]:
        """Id of every row."""
        return [row.id for row in self._rows]

    @property
    def preferences(self) -> list[float]:
        """``Pair.preference`` of every row, no image touched."""
        return [self._preference(row) for row in self._rows]

    @property
    def skipped(self) -> list[BadRow]:
        """Rows of the source known so far to be unused, by row number."""
        return sorted(self._skipped.values(), key=lambda bad: bad.row)

    @property
    def source(self) -> str:
        """What was opened, as messages call it."""
        return self._table.name

    def summary(self) -> str:
        """One line: pairs, prompts, and what was left out."""
        used = [row.prompt for row in self._rows if row.number not in self._skipped]
        text = f"{len(used):,} pairs, {len(set(used)):,} prompts"
        return f"{text} (left out: {reasons(self.skipped)})" if self._skipped else text

    def _payloads(self, row: _Row) -> list[bytes | Image.Image]:
        cells = [self._table.cell(row.number, self._columns[role]) for role in self._sides]
        return [images.load(cell, self._table.root) for cell in cells]

    def _preference(self, row: _Row) -> float:
        return max(row.first_wins, 1 - row.first_wins)

    def _skip(self, row: _Row, reason: str) -> BadRow:
        bad = self._skipped[row.number] = BadRow(row.number, row.id, reason)
        return bad

    def _tell(self, bad: BadRow, stand_in: Pair) -> None:
        self._told.add(bad.row)
        level = logging.WARNING if len(self._told) <= LOUD else logging.DEBUG
        logger.log(level, "%s: %s (%s) is replaced by %s", self._table.name, bad.id, bad.reason, stand_in.id)


def open_pairs(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
) -> PairDataset:
    """Open preference pairs, wherever they are.

    Args:
        source: a folder with ``pairs.jsonl`` or ``metadata.jsonl`` (image paths relative to the folder), with
            parquet files, or saved by ``datasets``; a ``.jsonl`` or ``.parquet`` file; ``hf://owner/name``;
            a ``datasets.Dataset`` or ``DatasetDict``. Columns are ``prompt, chosen, rejected`` (optional:
            ``id, preference``) or those of Pick-a-Pic, ``caption, jpg_0, jpg_1, label_0`` (optional:
            ``ranking_id, has_label``).
        split: which split, where the source has several (default ``train``); for JSONL a subfolder.
        columns: role -> column for other names, such as ``{"prompt": "text", "chosen": "winner"}``.
        ties: rows with even votes: ``drop`` them, keep them with preference 0.5 (``soft``), or refuse the
            set (``error``).
        limit: keep the first so many usable rows.
        max_bad: share of damaged rows (ties and missing votes are none) above which the set is refused.
        scan: how many rows, evenly spread, are decoded for that check; 0 checks texts and labels only.

    Raises:
        UserError: nothing there, a column is missing (named, with the columns found), too many bad rows, no
            usable row, or ties with ``ties="error"``.
    """
    table = open_table(source, split)
    return _from_table(table, columns=columns, ties=ties, limit=limit, max_bad=max_bad, scan=scan)


def _from_table(
    table: Table,
    *,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
) -> PairDataset:
    if ties not in get_args(Ties):
        raise UserError(f"ties must be one of {', '.join(get_args(Ties))}, not {ties!r}")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is a share between 0 and 1, not {max_bad}")
    roles = resolve(table.name, table.columns, columns)
    rows: list[_Row] = []
    skipped: dict[int, BadRow] = {}
    for row, reason in _verdicts(table, roles):
        if reason == "tie" and ties == "soft":
            reason = ""
        if reason:
            skipped[row.number] = BadRow(row.number, row.id, reason)
        elif len(rows) == limit:
            break
        else:
            rows.append(row)
    tied = [bad.id for bad in skipped.values() if bad.reason == "tie"]
    if tied and ties == "error":
        raise UserError(f"ties in {table.name}: {len(tied)} (first: {tied[0]}); use ties=drop or ties=soft")
    if not rows:
        why = reasons(skipped.values()) or "it is empty"
        raise UserError(f"no usable pair in {table.name}: {why}")
    dataset = PairDataset(table, roles, rows, skipped)
    _refuse_if_damaged(dataset, max_bad, scan)
    return dataset


def _verdicts(table: Table, roles: Mapping[str, str]) -> Iterable[tuple[_Row, str]]:
    """Every row with why its text or label rules it out, or an empty string. No image is touched."""
    count = len(table)

    def cells(role: str, default: Any) -> list[Any]:
        return table.column(roles[role]) if role in roles else [default] * count

    wins = cells("label_0" if "label_0" in roles else "preference", 1.0)
    labelled, ids = cells("has_label", True), cells("id", None)
    for number, (prompt, win, voted, name) in enumerate(
        zip(cells("prompt", ""), wins, labelled, ids, strict=True)
    ):
        if win is None and "preference" in roles and "label_0" not in roles:
            win = 1.0  # an optional column that this row leaves empty
        is_number = isinstance(win, Real) and not math.isnan(win)
        text = prompt if isinstance(prompt, str) else ""
        if number in table.broken:
            reason = "unreadable line"
        elif not text.strip():
            reason = "empty caption" if prompt is None or text == prompt else "caption is not text"
        elif not voted or not is_number:
            reason = "no label"
        elif not 0 <= win <= 1:
            reason = "label outside 0..1"
        else:
            reason = "tie" if win == 0.5 else ""
        row_id = str(name) if name not in (None, "") else table.row_name(number)
        yield _Row(number, row_id, text, float(win) if is_number else 0.5), reason


def _refuse_if_damaged(dataset: PairDataset, max_bad: float, scan: int) -> None:
    damaged = sum(bad.reason not in NO_VERDICT for bad in dataset.skipped)
    share_of_text = damaged / (damaged + len(dataset))
    count = min(scan, len(dataset))
    sample = [i * len(dataset) // count for i in range(count)]
    found = [bad for bad in map(dataset.read, sample) if isinstance(bad, BadRow)]
    share = share_of_text + (1 - share_of_text) * len(found) / max(count, 1)
    if share > max_bad:
        damage = [bad for bad in dataset.skipped if bad.reason not in NO_VERDICT]
        what = f"{reasons(damage)}; first: {damage[0].id}"
        raise UserError(
            f"{share:.1%} of the rows of {dataset.source} are bad ({what}), more than max_bad={max_bad:g} "
            "allows; `diffalign data check` lists them all, a larger max_bad skips them"
        )


def reasons(rows: Iterable[BadRow]) -> str:
    """``"12 tie, 3 empty caption"``, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in Counter(bad.reason for bad in rows).most_common())
