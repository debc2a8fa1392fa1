"""From what people have to what is shown: images by prompt, then the pairs or sets to be judged."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from PIL import Image

from diffalign.data.columns import LISTED, resolve, resolve_images
from diffalign.data.images import MIN_SIDE
from diffalign.data.rows import Cells, pair_roles, texts
from diffalign.data.tables import JSONL_NAMES, Table, open_table
from diffalign.errors import UserError

Mode = Literal["pair", "rank", "rate"]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})  # of images in folders without a table
MOST_TASKS = 100_000
Row = tuple[tuple[str, ...], tuple[Path, ...], str]  # prompts, image files, why it can't be used if so
_NO_FILES = "the images of {} are no files to name in votes; write a folder first with diffalign data convert"


def absolute(path: str | Path) -> Path:
    """One name for one file: absolute, without ``..``, links as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))


class ImageSet(NamedTuple):
    """Images of one prompt; ``prompts`` has all its wordings, the first of which is shown."""

    prompts: tuple[str, ...]
    images: tuple[Path, ...]

    @property
    def key(self) -> tuple[tuple[str, ...], frozenset[Path]]:
        """The same for the same images in another order."""
        return self.prompts, frozenset(self.images)


def read_sets(source: str | Path) -> tuple[list[ImageSet], Counter[str]]:
    """Images by prompt, and how many images or rows are left out for which reason.

    Args:
        source: a folder with ``metadata.jsonl`` (columns ``file_name``, ``prompt``); pairs or lists in any
            form of :func:`diffalign.data.open_pairs` whose images are files, labelled or not; a folder with
            a folder of images for each prompt, or one such folder. Its prompt is in ``prompt.txt``, else
            its name, with spaces for underscores.

    Raises:
        UserError: nothing there, no prompts, or images that are not files.
    """
    if str(source).startswith("hf://"):
        raise UserError(_NO_FILES.format(source))
    path = absolute(source)
    if path.is_dir() and not any((path / name).is_file() for name in JSONL_NAMES) and any(_folders(path)):
        rows = _folders(path)
    else:
        rows = _rows(open_table(path, None))
    sets: list[ImageSet] = []
    left_out: Counter[str] = Counter()
    faults: dict[Path, str] = {}
    for prompts, images, reason in rows:
        good = []
        for image in () if reason else dict.fromkeys(images):
            if image not in faults:
                faults[image] = _fault(image)
                left_out[faults[image]] += 1
            if not faults[image]:
                good.append(image)
        left_out[reason] += 1
        if good:
            sets.append(ImageSet(prompts, tuple(good)))
    del left_out[""]
    return sets, left_out


def arrange(
    sets: Sequence[ImageSet], mode: Mode, *, set_size: int, per_prompt: int | None, seed: int
) -> list[ImageSet]:
    """The pairs (``pair``) or sets (``rank``, ``rate``) to be judged, the same for every annotator.

    Pairs of a prompt start with neighbours in a circle of its images, in the order drawn by `seed`, then
    take the next but one, and so on: with `per_prompt` no image comes up much oftener than another. Larger
    sets are cut into about equal parts of at most `set_size`.

    Raises:
        UserError: more than anybody can judge.
    """
    arranged: dict[tuple[tuple[str, ...], frozenset[Path]], ImageSet] = {}
    for prompts, images in sets:
        order = Random(f"{seed}/{prompts[0]}").sample(sorted(images), len(images))
        parts = _pairs(order) if mode == "pair" else _parts(order, set_size)
        fit = (part for part in parts if len(part) >= (1 if mode == "rate" else 2))
        for part in islice(fit, per_prompt):
            task = ImageSet(prompts, part)
            arranged[task.key] = task
            if len(arranged) > MOST_TASKS:
                raise UserError(f"more than {MOST_TASKS} pairs or sets, too many to judge; give --per_prompt")
    return list(arranged.values())


def _pairs(order: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    n = len(order)
    for distance in range(1, n // 2 + 1):
        for i in range(n if 2 * distance < n else distance):
            yield order[i], order[(i + distance) % n]


def _parts(order: Sequence[Path], most: int) -> Iterator[tuple[Path, ...]]:
    number = -(-len(order) // most)
    for i in range(number):
        part = order[i::number]
        # One image alone can't be compared: three in sets of two make two sets.
        yield tuple(part if len(part) > 1 else dict.fromkeys((*part, order[0])))


def shuffled(tasks: Sequence[ImageSet], annotator: str, seed: int) -> list[ImageSet]:
    """Tasks in an order of this annotator's own, and the images of each in places of their own."""
    random = Random(f"{seed}/{annotator}")
    tasks = random.sample(list(tasks), len(tasks))
    return [task._replace(images=tuple(random.sample(task.images, len(task.images)))) for task in tasks]


def _rows(table: Table) -> Iterator[Row]:
    """Pairs and lists as they are, single images as one row for each prompt."""
    listed = any(
        isinstance(table.cell(0, name), list)
        for name in LISTED.names["images"]
        if name in table.columns and len(table)
    )
    found = [*table.columns, "scores" if listed else "label_0"]  # a verdict need not be there yet
    single = resolve_images(table.name, found)
    roles = single or resolve(table.name, found)
    if "prompt" not in roles:
        raise UserError(f"{table.name} has no column 'prompt', without which nobody can judge its images")
    cells = Cells(table, roles)
    groups: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for number, _, prompts, reason in texts(cells):
        given = [cells(role)[number] for role in (("image",) if single else pair_roles(roles))]
        if listed:
            given = given[0] if isinstance(given[0], list) else []
        images = tuple(_file(table, cell) for cell in given if cell is not None)
        if single and not reason:
            groups[prompts] += images
        else:
            yield prompts, images, reason
    yield from ((prompts, tuple(images), "") for prompts, images in groups.items())


def _file(table: Table, cell: object) -> Path:
    if not isinstance(cell, str):
        raise UserError(_NO_FILES.format(table.name))
    return absolute(table.root / cell)


def _folders(path: Path) -> Iterator[Row]:
    """A folder and those in it, where they hold images."""
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        images = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if images:
            note = folder / "prompt.txt"
            prompt = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
            yield (prompt or folder.resolve().name.replace("_", " "),), tuple(images), ""


def _fault(image: Path) -> str:
    """Why an image can't be shown, seen from its header, or an empty string."""
    if not image.is_file():
        return "missing image"
    try:
        with Image.open(image) as opened:
            return "tiny image" if min(opened.size) < MIN_SIDE else ""
    except Exception:  # of a broken file a decoder raises nearly anything
        return "unreadable image"
