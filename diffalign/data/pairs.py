"""Preference pairs: two images of one prompt, the better one first."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from PIL import Image

from diffalign.data import images
from diffalign.data.columns import resolve
from diffalign.data.examples import BadRow, Examples, reasons, sorted_out
from diffalign.data.images import BadImage, Clip
from diffalign.data.rows import (
    CHOICES,
    NO_VERDICT,
    Cells,
    PairRow,
    Place,
    Selection,
    column_role,
    one_of,
    pair_rows,
)
from diffalign.data.tables import ListTable, Table, open_table
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

Ties = Literal["drop", "soft", "error"]
__all__ = ["CHOICES", "NO_VERDICT", "BadRow", "Pair", "PairDataset", "Selection", "open_pairs", "reasons"]


@dataclass(frozen=True)
class Pair:
    """One preference.

    Attributes:
        id: the row's own id, or where it stands (``line-7``, ``row-6``).
        prompt: prompt of both images.
        chosen: the better image, RGB, upright.
        rejected: the other one.
        preference: probability that `chosen` is the better one, 0.5 (a tie kept by ``ties="soft"``) to 1.
        digests: SHA-256 of the encoded bytes of `chosen` and `rejected`.
        captions: what each image shows; the prompt where an image has no caption of its own.
        prompts: all prompts of the row, `prompt` first.
        scores: of each image, higher is better; None where there is none.
        models: what made each image; None where it is not said.
        clips: both as clips, where the set was opened so (:meth:`PairDataset.as_clips`); `chosen` and
            `rejected` are their first frames.
    """

    id: str
    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    preference: float = 1.0
    digests: tuple[str, str] = ("", "")
    captions: tuple[str, str] = ("", "")
    prompts: tuple[str, ...] = ()
    scores: tuple[float | None, float | None] = (None, None)
    models: tuple[str | None, str | None] = (None, None)
    clips: tuple[Clip, Clip] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", tuple(caption or self.prompt for caption in self.captions))
        object.__setattr__(self, "prompts", self.prompts or (self.prompt,))

    @property
    def images(self) -> tuple[Image.Image | Clip, Image.Image | Clip]:
        """Chosen and rejected, as clips where they are."""
        return self.clips or (self.chosen, self.rejected)

    def swapped(self) -> Pair:
        """The opposite verdict: the images change places, with all that belongs to them."""
        turned = {name: getattr(self, name)[::-1] for name in ("digests", "captions", "scores", "models")}
        turned |= {"clips": self.clips and self.clips[::-1]}
        return replace(self, chosen=self.rejected, rejected=self.chosen, **turned)


class PairDataset(Examples[Pair, PairRow]):
    """Preference pairs by index; images are decoded when a pair is asked for, never before.

    A row that turns out to be bad on reading does not stop anything: the next good row (cyclically) stands in
    for it, always the same one, and the bad row is counted in `skipped`. Made by :func:`open_pairs` or
    :meth:`from_lists`.
    """

    what = "pair"
    sides = 2
    prompt_weights = False

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
        return pairs_of(ListTable("the lists", lists), ties=ties, max_bad=max_bad)

    def digests(self, index: int) -> tuple[str, ...] | None:
        found = super().digests(index)
        return None if found is None or found[0] == found[1] else found

    def select(self, indices: Iterable[int]) -> Self:
        selected = super().select(indices)
        selected.prompt_weights = self.prompt_weights
        return selected

    def flipped(self, share: float, seed: int = 0) -> Self:
        """The same pairs, of which about `share` have their images, with all that belongs to them, in the
        other order. Which ones depends on their ids and `seed` alone."""

        def turned(row: PairRow) -> bool:
            hashed = hashlib.sha256(f"{seed}\n{row.number}\n{row.id}".encode()).digest()[:8]
            return int.from_bytes(hashed) < share * 2**64

        dataset = self.select(range(len(self)))
        dataset._rows = [
            row._replace(first_wins=1 - row.first_wins) if turned(row) else row for row in self._rows
        ]
        return dataset

    @property
    def preferences(self) -> list[float]:
        """``Pair.preference`` of every row, no image touched."""
        return [_preference(row) for row in self._rows]

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """``Pair.captions`` of every row, no image touched."""
        return [
            (_caption(chosen, row), _caption(rejected, row))
            for (chosen, rejected), row in zip(self.properties("caption"), self._rows, strict=True)
        ]

    def properties(self, what: str) -> list[tuple[Any, Any]]:
        """``caption``, ``score``, ``model`` or ``uid`` of both images of every row, chosen first.

        None where there is none; no image is touched.
        """
        cells = Cells(self._table, self._columns)
        places = ((row.number, *self._places(row)) for row in self._rows)
        return [(cells.of(what, n, chosen), cells.of(what, n, rejected)) for n, chosen, rejected in places]

    @property
    def weights(self) -> list[float]:
        """Weight of every row, mean 1; all 1 unless ``prompt_weights`` was asked for."""
        if not self.prompt_weights:
            return [1.0] * len(self)
        count = Counter(self.prompts)
        return [len(self) / len(count) / count[prompt] for prompt in self.prompts]

    def _places(self, row: PairRow) -> tuple[Place, Place]:
        first, second = row.places
        return (first, second) if row.first_wins >= 0.5 else (second, first)

    def _example(self, row: PairRow, payloads: list[bytes | Image.Image]) -> Pair:
        digests = tuple(map(images.digest, payloads))
        if digests[0] == digests[1]:
            raise BadImage("identical images")
        chosen, rejected = (images.decode_clip(payload, self.frames or 1) for payload in payloads)
        captions, scores, models = (self._both(row, what) for what in ("caption", "score", "model"))
        return Pair(
            id=row.id,
            prompt=row.prompts[0],
            chosen=chosen[0],
            rejected=rejected[0],
            preference=_preference(row),
            digests=(digests[0], digests[1]),
            captions=(_caption(captions[0], row), _caption(captions[1], row)),
            prompts=row.prompts,
            scores=scores,
            models=models,
            clips=(chosen, rejected) if self.frames else None,
        )

    def _both(self, row: PairRow, what: str) -> tuple[Any, Any]:
        """A property of the chosen and of the rejected image, None where there is none."""
        found = []
        for place in self._places(row):
            role = column_role(what, place.role, self._columns, lambda: self._label(row))
            column = self._columns.get(role)
            found.append(one_of(self._table.cell(row.number, column), place) if column else None)
        return found[0], found[1]

    def _label(self, row: PairRow) -> Any:
        return self._table.cell(row.number, self._columns["label_0"])


def open_pairs(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
    selection: Selection | None = None,
) -> PairDataset:
    """Open preference pairs, wherever they are.

    Args:
        source: a folder with ``pairs.jsonl`` or ``metadata.jsonl`` (image paths relative to the folder), with
            parquet files or tar shards (named as WebDataset does), or saved by ``datasets``; a ``.jsonl``,
            ``.json``, ``.parquet`` or ``.tar`` file; ``hf://owner/name``; a ``datasets.Dataset`` or
            ``DatasetDict``. Columns are ``prompt, chosen, rejected`` (optional: ``preference``), or those of
            Pick-a-Pic, ``caption, jpg_0, jpg_1, label_0`` (optional: ``has_label``), or lists, ``prompt,
            images, scores`` (or ``ranks``). Optional everywhere: ``id`` and, for each image, its own caption,
            score, model and uid (``caption_chosen``, ``score_0``, ...).
        split: which split, where the source has several (default ``train``); for JSONL a subfolder.
        columns: role -> column for other names, such as ``{"prompt": "text", "chosen": "winner"}``.
        ties: rows with even votes: ``drop`` them, keep them with preference 0.5 (``soft``), or refuse the
            set (``error``).
        limit: keep the first so many usable pairs.
        max_bad: share of damaged rows (ties and missing votes are none) above which the set is refused.
        scan: how many rows, evenly spread, are decoded for that check; 0 checks texts and labels only.
        selection: what decides between the images, what becomes of repeated pairs, and filters.

    Raises:
        UserError: nothing there, a column is missing (named, with the columns found), too many bad rows, no
            usable row, or ties with ``ties="error"``.
    """
    return pairs_of(
        open_table(source, split),
        columns=columns,
        ties=ties,
        limit=limit,
        max_bad=max_bad,
        scan=scan,
        selection=selection,
    )


def pairs_of(
    table: Table,
    *,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
    selection: Selection | None = None,
) -> PairDataset:
    """:func:`open_pairs` of a table."""
    selection = selection or Selection()
    if ties not in get_args(Ties):
        raise UserError(f"ties must be one of {', '.join(get_args(Ties))}, not {ties!r}")
    check_limits(limit, max_bad)
    roles = resolve(table.name, table.columns, columns)
    selection.check(table.name, roles)
    no_reason = "tie" if ties == "soft" else None
    found = pair_rows(table, roles, selection)
    rows, skipped = sorted_out(((row, "" if why == no_reason else why) for row, why in found), limit)
    tied = [bad.id for bad in skipped.values() if bad.reason == "tie"]
    if tied and ties == "error":
        raise UserError(f"ties in {table.name}: {len(tied)} (first: {tied[0]}); use ties=drop or ties=soft")
    if not rows:
        why = reasons(skipped.values()) or "it is empty"
        raise UserError(f"no usable pair in {table.name}: {why}")
    dataset = PairDataset(table, roles, rows, skipped, min_side=selection.min_side)
    dataset.prompt_weights = selection.prompt_weights
    dataset.refuse_if_damaged(max_bad, scan)
    return dataset


def check_limits(limit: int | None, max_bad: float) -> None:
    """Refuse a limit or a share that is none."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is a share between 0 and 1, not {max_bad}")


def _preference(row: PairRow) -> float:
    return max(row.first_wins, 1 - row.first_wins)


def _caption(own: Any, row: PairRow) -> str:
    return own if isinstance(own, str) and own.strip() else row.prompts[0]
