"""Single images: good ones only, or good and bad ones that were not compared with one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffalign.data import images
from diffalign.data.columns import resolve_images
from diffalign.data.examples import BadRow, Examples, reasons, sorted_out
from diffalign.data.images import Clip
from diffalign.data.pairs import PairDataset, check_limits, pairs_of
from diffalign.data.rows import ImageRow, Place, image_rows
from diffalign.data.tables import Table, open_table
from diffalign.errors import UserError


@dataclass(frozen=True)
class LabelledImage:
    """One image.

    Attributes:
        id: the row's own id, or where it stands.
        prompt: its caption; empty where the set has none.
        prompts: all captions of the row, `prompt` first.
        image: RGB, upright.
        label: probability that it is a good one, 0 to 1; None where nobody judged.
        digest: SHA-256 of the encoded bytes.
        score: how good it is, higher is better; None where nobody scored.
        clip: its frames, where the set was opened so (:meth:`ImageDataset.as_clips`).
    """

    id: str
    prompt: str
    image: Image.Image
    label: float | None = None
    digest: str = ""
    score: float | None = None
    clip: Clip | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", self.prompts or (self.prompt,))

    @property
    def images(self) -> tuple[Image.Image | Clip]:
        """The image or clip, as one of a pair's would be."""
        return (self.clip or self.image,)

    @property
    def digests(self) -> tuple[str]:
        """That of the image."""
        return (self.digest,)

    @property
    def captions(self) -> tuple[str]:
        """The prompt."""
        return (self.prompt,)

    @property
    def preference(self) -> float:
        """The label; 1 where nobody judged."""
        return 1.0 if self.label is None else self.label


class ImageDataset(Examples[LabelledImage, ImageRow]):
    """Single images by index, decoded when asked for; bad ones are replaced as in :class:`PairDataset`."""

    what = "image"
    sides = 1

    @property
    def labels(self) -> list[float | None]:
        """``LabelledImage.label`` of every row, no image touched."""
        return [row.label for row in self._rows]

    @property
    def scores(self) -> list[float | None]:
        """Score of every row, higher is better; None where there is none."""
        return [row.score for row in self._rows]

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The prompt of every row."""
        return [(prompt,) for prompt in self.prompts]

    @property
    def preferences(self) -> list[float]:
        """``LabelledImage.preference`` of every row, no image touched."""
        return [1.0 if label is None else label for label in self.labels]

    def _places(self, row: ImageRow) -> tuple[Place]:
        return (row.place,)

    def _example(self, row: ImageRow, payloads: list[bytes | Image.Image]) -> LabelledImage:
        clip = images.decode_clip(payloads[0], self.frames or 1)
        return LabelledImage(
            id=row.id,
            prompt=row.prompts[0],
            prompts=row.prompts,
            image=clip[0],
            label=row.label,
            digest=images.digest(payloads[0]),
            score=row.score,
            clip=clip if self.frames else None,
        )


def open_images(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    min_side: int = 0,
    drop_nsfw: bool = False,
    max_bad: float = 0.01,
    scan: int = 256,
) -> ImageDataset:
    """Open single images, wherever they are.

    Args:
        source: as for :func:`diffalign.data.open_pairs`, or pairs that are open already. Columns are
            ``image`` (or ``file_name``, as imagefolder sets have it) and, optionally, ``prompt``, ``label``
            and ``id``. A set of pairs gives its chosen images with label 1 and its rejected ones with label
            0.
        split, columns, limit, max_bad, scan: likewise.
        min_side: leave images out that have a side below this many pixels.
        drop_nsfw: leave rows out that the nsfw column marks.

    Raises:
        UserError: as :func:`diffalign.data.open_pairs`.
    """
    check_limits(limit, max_bad)
    if isinstance(source, PairDataset):
        return _apart(source, limit, min_side, max_bad, scan)
    table = open_table(source, split)
    roles = resolve_images(table.name, table.columns, columns)
    if roles is None:
        return _apart(pairs_of(table, columns=columns, max_bad=1.0, scan=0), limit, min_side, max_bad, scan)
    if drop_nsfw and "nsfw" not in roles:
        raise UserError(f"drop_nsfw needs a column nsfw, which {table.name} lacks; name it with columns")
    rows, skipped = sorted_out(image_rows(table, roles, drop_nsfw), limit)
    return opened(table, roles, rows, skipped, min_side, max_bad, scan)


def _apart(pairs: PairDataset, limit: int | None, min_side: int, max_bad: float, scan: int) -> ImageDataset:
    """Both images of every pair."""
    rows = [
        ImageRow(row.number, f"{row.id}:{side}", row.prompts, place, label)
        for row in pairs._rows
        for place, side, label in zip(pairs._places(row), ("chosen", "rejected"), (1.0, 0.0), strict=True)
    ]
    return opened(pairs._table, pairs._columns, rows[:limit], pairs._skipped, min_side, max_bad, scan)


def opened(
    table: Table,
    roles: Mapping[str, str],
    rows: list[ImageRow],
    skipped: dict[tuple[int, str], BadRow],
    min_side: int,
    max_bad: float,
    scan: int,
) -> ImageDataset:
    """A data set of `rows`, unless too many are damaged."""
    if not rows:
        raise UserError(f"no usable image in {table.name}: {reasons(skipped.values()) or 'it is empty'}")
    dataset = ImageDataset(table, roles, rows, skipped, min_side=min_side)
    dataset.refuse_if_damaged(max_bad, scan)
    return dataset
