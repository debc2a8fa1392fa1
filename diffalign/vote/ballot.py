"""The votes file: one JSON object a line, whole on disk before the next set is shown."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from diffalign.data import images
from diffalign.errors import UserError
from diffalign.output import write_text
from diffalign.vote.sets import ImageSet, Mode, absolute


class AlreadyJudged(Exception):
    """The set was judged before, in another tab."""


def _pair(value: Any, count: int, scale: int) -> float:
    if type(value) not in (int, float) or value not in (0, 0.5, 1):
        raise ValueError("the verdict on a pair is 1 (the first is better), 0 or 0.5 (a tie)")
    return float(value)


def _rank(value: Any, count: int, scale: int) -> list[int]:
    """From numbers of images, best first, to ranks from 1; all that are not picked share the last one."""
    numbers = range(count)
    picked = isinstance(value, list) and all(type(i) is int and i in numbers for i in value)
    if not picked or not value or len(set(value)) != len(value):
        raise ValueError(f"a ranking names one or more of the {count} images, each once")
    return [value.index(i) + 1 if i in value else len(value) + 1 for i in numbers]


def _rate(value: Any, count: int, scale: int) -> list[int]:
    rated = isinstance(value, list) and all(type(r) is int and 1 <= r <= scale for r in value)
    if not rated or len(value) != count:
        raise ValueError(f"{count} ratings from 1 to {scale} are needed")
    return value


# Mode -> column of the verdict, and the check that a verdict from the page passes through.
VERDICTS: dict[Mode, tuple[str, Callable[[Any, int, int], Any]]] = {
    "pair": ("label_0", _pair),
    "rank": ("ranks", _rank),
    "rate": ("scores", _rate),
}

# Columns that name the images and the SHA-256 of their bytes.
_PAIR, _PAIR_UIDS, _LIST, _LIST_UIDS = ("image_0", "image_1"), ("uid_0", "uid_1"), "images", "uids"


class Ballot:
    """What one annotator has judged and has yet to judge. Safe to use from several threads.

    The file holds rows that :func:`diffalign.data.open_pairs` reads: ``prompt, image_0, image_1, label_0`` of
    pairs, ``prompt, images`` and ``ranks`` or ``scores`` of larger sets, images in the order in which they
    were shown (``image_0`` on the left), with ``uid_0, uid_1`` or ``uids`` (SHA-256 of each file),
    ``annotator`` and ``time`` (UTC). A skipped set has no verdict (null).

    Args:
        tasks: what is to be judged, in this order; what this annotator has judged already is passed over.
        out: the votes file; votes in it are kept.
        scale: best rating.

    Raises:
        UserError: `out` cannot be read, holds votes of another mode, or votes on images that were replaced.
    """

    def __init__(
        self, tasks: Sequence[ImageSet], out: Path, *, mode: Mode, annotator: str, scale: int = 5
    ) -> None:
        self.tasks, self.out, self.mode, self.annotator, self.scale = tasks, out, mode, annotator, scale
        self._column, self._check = VERDICTS[mode]
        self._lock = Lock()
        self._rows = _read(out, self._column)
        self._refuse_replaced()
        of_key = {task.key: number for number, task in enumerate(tasks)}
        # Task number -> this annotator's row, in the order of the file.
        self._judged = {
            of_key[key]: row
            for row in self._rows
            if row.get("annotator") == annotator and (key := self._key(row)) in of_key
        }
        self._open = deque(number for number in range(len(tasks)) if number not in self._judged)

    @property
    def coming(self) -> list[int]:
        """Numbers of the set to be judged now and of the one after it, as far as there are any."""
        with self._lock:
            return list(self._open)[:2]

    @property
    def judged(self) -> int:
        """How many sets this annotator has judged or skipped."""
        return len(self._judged)

    @property
    def verdicts(self) -> Counter[str]:
        """How many of them were judged, called a tie, and skipped."""
        with self._lock:
            values = [row[self._column] for row in self._judged.values()]
        return Counter("skipped" if v is None else "ties" if v == 0.5 else "judged" for v in values)

    def cast(self, number: int, value: Any) -> None:
        """Write the verdict on task `number`; None skips it.

        Args:
            value: of a pair 1 (first image), 0 (second) or 0.5; of a ranking the numbers of the images, best
                first, all of them or only the best; of ratings one from 1 to `scale` per image.

        Raises:
            ValueError: no such task, or no such verdict.
            AlreadyJudged: it has one, which stays.
            OSError: it could not be written, and does not count.
        """
        if type(number) is not int or not 0 <= number < len(self.tasks):
            raise ValueError(f"there is no set number {number!r}")
        task, pair = self.tasks[number], self.mode == "pair"
        verdict = None if value is None else self._check(value, len(task.images), self.scale)
        paths = [Path(os.path.relpath(image, self.out.parent)).as_posix() for image in task.images]
        uids = [_digest(image) for image in task.images]
        if None in uids and value is not None:
            raise ValueError("an image can't be read any more; skip this set")
        row = {
            "prompt": task.prompts[0] if len(task.prompts) == 1 else list(task.prompts),
            **(dict(zip(_PAIR, paths, strict=True)) if pair else {_LIST: paths}),
            self._column: verdict,
            **(dict(zip(_PAIR_UIDS, uids, strict=True)) if pair else {_LIST_UIDS: uids}),
            "annotator": self.annotator,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._lock:
            if number in self._judged:
                raise AlreadyJudged
            self._write([*self._rows, row])
            self._judged[number] = row
            self._open.remove(number)

    def undo(self) -> None:
        """Take this annotator's last vote back; its set is the next one again. Without votes, do nothing."""
        with self._lock:
            if self._judged:
                number, last = next(reversed(self._judged.items()))
                self._write([row for row in self._rows if row is not last])
                del self._judged[number]
                self._open.appendleft(number)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._rows = rows

    def _images(self, row: dict[str, Any]) -> list[Path]:
        paths = row[_LIST] if _LIST in row else [row[name] for name in _PAIR]
        return [absolute(self.out.parent / path) for path in paths]

    def _key(self, row: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[Path]]:
        prompt = row["prompt"]
        prompts = tuple(prompt) if isinstance(prompt, list) else (prompt,)
        return ImageSet(prompts, tuple(self._images(row))).key

    def _refuse_replaced(self) -> None:
        """Votes must not be taken for votes on other images that were written over the judged ones."""
        for row in self._rows:
            uids = row.get(_LIST_UIDS) or [row.get(name) for name in _PAIR_UIDS]
            judged_at = datetime.fromisoformat(row["time"]).timestamp() if "time" in row else 0.0
            for image, uid in zip(self._images(row), uids, strict=False):
                newer = uid and image.is_file() and image.stat().st_mtime >= judged_at
                if newer and _digest(image) != uid:
                    raise UserError(
                        f"{image} is no longer the image that {self.out} has a vote on; choose another --out"
                    )


def _digest(image: Path) -> str | None:
    """SHA-256 of the file, None if it can't be read."""
    try:
        return images.digest(images.load(str(image), image.parent))
    except images.BadImage:
        return None


def _read(out: Path, column: str) -> list[dict[str, Any]]:
    """The rows of a votes file; none if there is no such file."""
    needed = {"prompt", column, *(_PAIR if column == "label_0" else (_LIST,))}
    rows = []
    for number, line in enumerate(out.read_bytes().split(b"\n") if out.exists() else (), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not needed <= row.keys():
                raise UserError(
                    f"line {number} of {out} is no vote of this --mode (with {', '.join(sorted(needed))}); "
                    "choose another --out"
                )
            rows.append(row)
    return rows
