"""Votes of people as numbers: what each voter said, and a score for every image."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from diffalign.data.columns import resolve
from diffalign.data.rows import Cells, Place, Selection, is_number, one_of, pair_roles, paired, texts
from diffalign.data.tables import Table, open_table
from diffalign.errors import UserError


@dataclass(frozen=True)
class Vote:
    """What one person said about two or more images of one prompt.

    Attributes:
        prompt: of all these images.
        images: path of each, with ``/``, relative to the folder of the (first) file.
        scores: of each image, higher is better: its rating, or, where images were compared, the share of the
            others that it beats, 0 to 1, ties half. In a pair that is 1 for the better one.
        annotator: who said it; empty where the file has no such column.
        rated: the scores are ratings, which mean the same from one set of images to the next.
    """

    prompt: str
    images: tuple[str, ...]
    scores: tuple[float, ...]
    annotator: str = ""
    rated: bool = False


def read_votes(*sources: str | Path) -> list[Vote]:
    """Every vote of one or several files, such as those that ``diffalign vote`` writes.

    Any labelled set of image files will do: pairs, or lists with scores or ranks. Skipped sets and damaged
    rows are left out.

    Raises:
        UserError: as :func:`diffalign.data.open_pairs`, or the images are no files.
    """
    tables = [open_table(source, None) for source in sources]
    return [vote for table in tables for vote in _votes(table, tables[0].root)]


def image_scores(votes: Iterable[Vote]) -> dict[str, float]:
    """What people think of each image: the mean of its scores by one annotator, then over annotators.

    That is the mean rating, or, from pairs and rankings, the mean share of other images that it beats (win
    rate, Borda count).

    Returns:
        Path of the image, as in :class:`Vote`, to its score; images that nobody judged are missing.

    Raises:
        UserError: ratings mixed with comparisons, which have no common mean.
    """
    said: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kinds = set()
    for vote in votes:
        kinds.add(vote.rated)
        for image, score in zip(vote.images, vote.scores, strict=True):
            said[image][vote.annotator].append(score)
    if len(kinds) > 1:
        raise UserError("ratings and comparisons have no common mean; read the votes of one mode at a time")
    return {image: fmean(map(fmean, by_annotator.values())) for image, by_annotator in said.items()}


def shares(worth: Sequence[float]) -> tuple[float, ...]:
    """Of each item the share of the others that it exceeds, ties half."""
    return tuple(
        (sum(a > b for b in worth) + (sum(a == b for b in worth) - 1) / 2) / (len(worth) - 1) for a in worth
    )


def _votes(table: Table, root: Path) -> Iterator[Vote]:
    roles = resolve(table.name, table.columns)
    cells = Cells(table, roles)
    who = table.column("annotator") if "annotator" in table.columns else [None] * len(table)
    judged = _of_lists(cells) if "images" in pair_roles(roles) else _of_pairs(cells)
    rated = "scores" in roles and "images" in pair_roles(roles)
    for number, prompt, images, scores in judged:
        paths = tuple(_relative(table, image, root) for image in images)
        yield Vote(prompt, paths, scores, str(who[number] or ""), rated)


def _of_pairs(cells: Cells) -> Iterator[tuple[int, str, list[object], tuple[float, ...]]]:
    for row, reason in paired(cells, Selection()):
        if reason in ("", "tie"):
            images = [cells(place.role)[row.number] for place in row.places]
            yield row.number, row.prompts[0], images, (row.first_wins, 1 - row.first_wins)


def _of_lists(cells: Cells) -> Iterator[tuple[int, str, list[object], tuple[float, ...]]]:
    by_scores = "scores" in cells.roles
    given, images = cells("scores" if by_scores else "ranks"), cells("images")
    for number, _, prompts, reason in texts(cells):
        numbers = given[number] if isinstance(given[number], list | tuple) else []
        judged = [i for i, worth in enumerate(numbers) if is_number(worth)]
        if reason or len(judged) < (1 if by_scores else 2):
            continue
        scores = [float(numbers[i]) for i in judged]
        paths = [one_of(images[number], Place("images", i)) for i in judged]
        yield (number, prompts[0], paths, tuple(scores) if by_scores else shares([-rank for rank in scores]))


def _relative(table: Table, image: object, root: Path) -> str:
    if not isinstance(image, str):
        raise UserError(
            f"{table.name} has images that are no files, so votes can't name them; "
            "write a folder first with diffalign data convert --format folder"
        )
    return Path(os.path.relpath(table.root / image, root)).as_posix()
