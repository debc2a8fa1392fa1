"""Tar shards named as WebDataset does: ``key.json``, ``key.chosen.png``, ... are the cells of row ``key``.

The headers are read once, on opening; after that an image is read by its offset, in any order.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffalign.data.tables import ListTable
from diffalign.errors import UserError

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
TEXT = {"txt": "prompt", "text": "prompt", "caption": "prompt", "cls": "label", "id": "id"}


class Slice(NamedTuple):
    """Bytes of one file inside a tar."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarTable(ListTable):
    """Rows of one or several plain tar files; cells of images are read from the file when asked for."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        rows: list[dict[str, Any]] = []
        names, broken = [], set()
        for path in paths:
            for key, row in _rows(path):
                if row is None:
                    broken.add(len(rows))
                rows.append(row or {})
                names.append(key)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        super().__init__(
            name,
            {column: [row.get(column) for row in rows] for column in columns},
            row_names=names,
            broken=frozenset(broken),
        )

    def cell(self, row: int, name: str) -> Any:
        value = super().cell(row, name)
        if isinstance(value, list):
            return [one.read() if isinstance(one, Slice) else one for one in value]
        return value.read() if isinstance(value, Slice) else value


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every row of one tar with its key; None instead of a row whose JSON is none."""
    key: str | None = None
    row: dict[str, Any] | None = {}
    for member, cell in _members(path):
        folder, slash, file = member.rpartition("/")
        stem, _, ending = file.partition(".")
        if key != folder + slash + stem:
            if key is not None:
                yield key, _with_list(row)
            key, row = folder + slash + stem, {}
        if row is not None:
            found = _cells(ending.lower(), cell)
            row = None if found is None else row | found
    if key is not None:
        yield key, _with_list(row)


def _cells(ending: str, where: Slice) -> dict[str, Any] | None:
    """The cells that one file gives its row; None if it is JSON and can't be read."""
    if ending == "json":
        try:
            value = json.loads(where.read())
        except ValueError:
            return None
        return value if isinstance(value, dict) else None
    if ending in TEXT:
        text = where.read().decode("utf-8", "replace").strip()
        return {TEXT[ending]: _number(text) if ending == "cls" else text}
    stem, _, last = ending.rpartition(".")
    column = (stem if last in IMAGE_ENDINGS else ending) or "image"
    return {f"image_{column}" if column.isdigit() else column: where}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _with_list(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """A row with ``images``, the list of its numbered images, where scores or ranks speak of a list."""
    if row is None or not {"scores", "ranks"} & row.keys():
        return row
    count = sum(name.startswith("image_") and name[6:].isdigit() for name in row)
    return row | {"images": [row.get(f"image_{i}") for i in range(count)]} if count else row


def _members(path: Path) -> Iterator[tuple[str, Slice]]:
    """Every file of a tar in order.

    Raises:
        UserError: compressed, truncated, or damaged somewhere.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                    yield member.name.removeprefix("./"), Slice(path, member.offset_data, member.size)
            # A damaged header ends the listing without a word; a whole tar ends with a block of zeros.
            if Slice(path, tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        packed = path.open("rb").read(2) == b"\x1f\x8b"
        what = "is compressed" if packed else f"is no whole tar file ({error})"
        way_out = "unpack it with gunzip" if packed else "copy or download it again"
        raise UserError(f"{path} {what}; {way_out}") from error
