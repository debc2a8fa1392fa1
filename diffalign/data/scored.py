"""Single images with scores, or to be scored: every image of lists, of pairs or of a set of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffalign.data.columns import resolve, resolve_images, resolve_unjudged
from diffalign.data.examples import sorted_out
from diffalign.data.pairs import check_limits
from diffalign.data.rows import Cells, ImageRow, Place, is_number, pair_roles, property_role, texts
from diffalign.data.tables import Table, open_table
from diffalign.data.unpaired import ImageDataset, opened
from diffalign.errors import UserError


def open_scored(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
) -> ImageDataset:
    """Open every image of a set that has scores, higher is better; :attr:`ImageDataset.scores` holds them.

    Args:
        source: as for :func:`diffalign.data.open_pairs`: lists (``prompt, images, scores``), pairs with the
            columns ``score_chosen`` and ``score_rejected`` (or ``score_0`` and ``score_1``), or single images
            with ``prompt`` and ``score``. 'diffalign data score' writes scores.
        split, columns, max_bad, scan: likewise.
        limit: keep the first so many usable images.

    Raises:
        UserError: as :func:`diffalign.data.open_pairs`, and where there are no scores.
    """
    check_limits(limit, max_bad)
    table = open_table(source, split)
    single = resolve_images(table.name, table.columns, columns)
    roles = resolve(table.name, table.columns, columns) if single is None else single
    places = ("image",) if single is not None else pair_roles(roles)
    needed = [*(property_role("score", role) for role in places), "prompt"]
    if not set(needed) <= roles.keys():
        raise UserError(
            f"scored images need the columns {', '.join(needed)} (found: {', '.join(table.columns)}): "
            f"score {table.name} with 'diffalign data score', or name them with columns"
        )
    rows, skipped = sorted_out(_rows(table, roles, places), limit)
    return opened(table, roles, rows, skipped, 0, max_bad, scan)


def open_unscored(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad: float = 0.01,
    scan: int = 256,
) -> ImageDataset | None:
    """Open single images (``image`` or ``file_name``, with ``prompt``), or every image of lists without
    scores (``prompt, images``), for a reward to score; None if `source` holds pairs or judged lists.

    Args:
        source, split, columns, limit, max_bad, scan: as for :func:`open_scored`.

    Raises:
        UserError: as :func:`diffalign.data.open_pairs`, and where images have no prompt.
    """
    check_limits(limit, max_bad)
    table = open_table(source, split)
    roles = resolve_unjudged(table.name, table.columns, columns)
    if roles is None:
        return None
    if "prompt" not in roles:
        raise UserError(
            f"{table.name} has no column 'prompt' (found: {', '.join(table.columns)}): a reward judges an "
            "image for a prompt; name its column with columns"
        )
    places = ("image",) if "image" in roles else ("images",)
    rows, skipped = sorted_out(_rows(table, roles, places, scored=False), limit)
    return opened(table, roles, rows, skipped, 0, max_bad, scan)


def _rows(
    table: Table, roles: Mapping[str, str], places: tuple[str, ...], *, scored: bool = True
) -> Iterator[tuple[ImageRow, str]]:
    """Every image with its score, and why it is left out, or an empty string."""
    cells = Cells(table, roles)
    for number, name, prompts, reason in texts(cells):
        if places == ("images",):
            listed = cells("images")[number]
            here = [Place("images", i) for i in range(len(listed) if isinstance(listed, list | tuple) else 0)]
        else:
            here = [Place(role) for role in places]
        for item, place in enumerate(here):
            score = cells.of("score", number, place)
            row_id = name if places == ("image",) else f"{name}:{item}"
            known = float(score) if is_number(score) else None
            row = ImageRow(number, row_id, prompts, place, None, known)
            yield row, reason or ("no score" if scored and known is None else "")
