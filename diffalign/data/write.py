"""Write pairs as a folder that :func:`diffalign.data.open_pairs` and anybody with a text editor can read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from diffalign.data.pairs import Pair
from diffalign.data.tables import JSONL_NAMES
from diffalign.errors import UserError


def write_pairs(folder: str | Path, pairs: Iterable[Pair], *, overwrite: bool = False) -> Path:
    """Write ``folder/pairs.jsonl`` and ``folder/images/*.png`` (lossless); returns the folder.

    All or nothing: everything is written beside it and moved into place at the end, so that an interrupted
    call leaves what was there before. `pairs` is read once, one pair in memory at a time.

    Raises:
        UserError: the folder is not empty and `overwrite` is off, or it holds something other than pairs.
    """
    folder = Path(folder)
    old = folder.is_dir() and any(folder.iterdir())
    if folder.exists() and not folder.is_dir():
        raise UserError(f"can't write pairs to {folder}: it is a file")
    if old and not overwrite:
        raise UserError(f"{folder} is not empty; choose another folder or use overwrite")
    if old and not any((folder / name).is_file() for name in JSONL_NAMES):
        raise UserError(f"{folder} holds no pairs, so it is not overwritten; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, aside = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        (new / "images").mkdir(parents=True)
        with (new / JSONL_NAMES[0]).open("w", encoding="utf-8") as lines:
            for number, pair in enumerate(pairs):
                lines.write(json.dumps(_write_images(new, number, pair), ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        if folder.exists():
            folder.rename(aside)
        new.rename(folder)
    finally:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        for leftover in (new, aside):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _write_images(folder: Path, number: int, pair: Pair) -> dict[str, str | float]:
    row: dict[str, str | float] = {"id": pair.id, "prompt": pair.prompt}
    for side, image in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        name = f"images/{number:06d}_{side}.png"
        image.save(folder / name)
        row[side] = name
    return row | {"preference": pair.preference}
