"""The prompts of a data source, without its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.columns import UNPAIRED
from diffalign.data.tables import open_table
from diffalign.errors import UserError


def read_prompts(source: Any, *, split: str | None = None, limit: int | None = None) -> list[str]:
    """Prompts to sample with, in their order, each once.

    Args:
        source: a list of texts; a ``.txt`` file with one prompt per line; or anything that pairs or images
            can be read from, which then needs no more than a caption column.
        split: of a data set that has several.
        limit: at most so many.

    Raises:
        UserError: nothing readable there, no column of captions, or no prompt at all.
    """
    if isinstance(source, str | Path) and Path(source).suffix == ".txt":
        found, where = _lines(Path(source).expanduser()), str(source)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        found, where = list(source), "the list of prompts"
        if not all(isinstance(text, str) for text in found):
            raise UserError("prompts must be texts: give a list of str")
    else:
        table = open_table(source, split)
        where = table.name
        column = next((name for name in UNPAIRED.names["prompt"] if name in table.columns), None)
        if column is None:
            raise UserError(
                f"{where} has no prompts: it needs one of the columns {', '.join(UNPAIRED.names['prompt'])} "
                f"(found: {', '.join(table.columns)})"
            )
        cells = table.column(column)
        found = [cell[0] if isinstance(cell, list | tuple) and cell else cell for cell in cells]
    texts = dict.fromkeys(text.strip() for text in found if isinstance(text, str) and text.strip())
    if not texts:
        raise UserError(f"{where} has no prompts: give a .txt file with one per line, or a set with captions")
    return list(texts)[:limit]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}") from error
