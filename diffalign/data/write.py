"""Write pairs as a folder with JSONL, as parquet with the columns of Pick-a-Pic, or as tar shards."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from diffalign.data import images
from diffalign.data.pairs import Pair
from diffalign.data.tables import JSONL_NAMES
from diffalign.data.unpaired import LabelledImage
from diffalign.errors import UserError

Format = Literal["folder", "parquet", "tar"]
SHARD_ROWS = 1000
KEPT = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # encoded images that are copied as they are
_ROWS = ".rows-{:05d}.jsonl"  # of a folder that is being written


class Entry(NamedTuple):
    """One pair, or single image, to write: its number in the whole set, and what its images are stored as."""

    number: int
    pair: Any
    payloads: Sequence[bytes | Image.Image]


def write_pairs(
    folder: str | Path, pairs: Iterable[Pair], *, overwrite: bool = False, format: Format = "folder"
) -> Path:
    """Write ``folder/pairs.jsonl`` and ``folder/images/*.png`` (lossless), or shards; returns the folder.

    All or nothing: everything is written beside it and moved into place at the end, so that an interrupted
    call leaves what was there before. `pairs` is read once, one shard in memory at a time.

    Args:
        format: ``folder``, ``parquet`` (``train-*.parquet`` with the columns of Pick-a-Pic) or ``tar``
            (WebDataset).

    Raises:
        UserError: the folder is not empty and `overwrite` is off, or it holds something other than pairs.
    """
    folder = check_target(folder, overwrite)
    write, finish = FORMATS[format]
    rest = iter(pairs)
    with _aside(folder, f"new-{os.getpid()}") as new:
        shards = 0
        for first in rest:
            shard = enumerate(chain([first], islice(rest, SHARD_ROWS - 1)), start=shards * SHARD_ROWS)
            write(new, shards, (Entry(n, pair, (pair.chosen, pair.rejected)) for n, pair in shard), {})
            shards += 1
        finish(new, shards)
        put_in_place(new, folder)
    return folder


@dataclass(frozen=True)
class ScoredImages:
    """Images of one prompt with their scores.

    Attributes:
        id: what messages call the list.
        prompt: of all its images.
        images: K PIL images.
        scores: K numbers, higher is better.
    """

    id: str
    prompt: str
    images: Sequence[Image.Image]
    scores: Sequence[float]


def write_lists(folder: str | Path, lists: Iterable[ScoredImages], *, overwrite: bool = False) -> Path:
    """Write ``folder/pairs.jsonl`` with ``prompt, images, scores`` and ``folder/images/*.png`` (lossless), as
    :func:`diffalign.data.open_scored` and :func:`~diffalign.data.open_pairs` read it; returns the folder.

    All or nothing, as :func:`write_pairs`.

    Raises:
        UserError: likewise.
    """
    folder = check_target(folder, overwrite)
    with _aside(folder, f"new-{os.getpid()}") as new:
        (new / "images").mkdir()
        with (new / JSONL_NAMES[0]).open("w", encoding="utf-8") as lines:
            for number, listed in enumerate(lists):
                files = [f"images/{number:06d}_{i}.png" for i in range(len(listed.images))]
                for file, image in zip(files, listed.images, strict=True):
                    image.save(new / file)
                scores = [float(score) for score in listed.scores]
                row = {"id": listed.id, "prompt": listed.prompt, "images": files, "scores": scores}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        put_in_place(new, folder)
    return folder


def check_target(folder: str | Path, overwrite: bool) -> Path:
    """Refuse to write pairs where something else would be lost.

    Raises:
        UserError: as :func:`write_pairs`.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"can't write pairs to {folder}: it is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder} is not empty; choose another folder or use overwrite")
        pairs = [*(folder / name for name in JSONL_NAMES), *folder.glob("*.parquet"), *folder.glob("*.tar")]
        if not any(path.is_file() for path in pairs):
            raise UserError(f"{folder} holds no pairs, so it is not overwritten; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def put_in_place(new: Path, folder: Path) -> None:
    """Move a finished folder to its name and clear it of hidden working files.

    What was there before is there until then, and again if that fails.
    """
    with _aside(folder, f"old-{os.getpid()}", make=False) as old:
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            for path in folder.glob(".*"):
                path.unlink()
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)


@contextmanager
def _aside(folder: Path, what: str, make: bool = True) -> Iterator[Path]:
    path = folder.with_name(f".{folder.name}.{what}")
    try:
        shutil.rmtree(path, ignore_errors=True)  # of a killed process that had our number
        if make:
            path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def encoded(payload: bytes | Image.Image) -> tuple[bytes, str]:
    """An image as the bytes of a file and its ending: as it is if it is PNG, JPEG or WebP, else as PNG."""
    if isinstance(payload, bytes):
        with Image.open(io.BytesIO(payload)) as opened:
            if opened.format in KEPT:
                return payload, KEPT[opened.format]
    stream = io.BytesIO()
    images.decode(payload).save(stream, "PNG")
    return stream.getvalue(), "png"


def json_row(pair: Pair) -> dict[str, Any]:
    """What a pair says besides its images, in the columns of :func:`diffalign.data.open_pairs`."""
    row: dict[str, Any] = {
        "id": pair.id,
        "prompt": pair.prompt if len(pair.prompts) == 1 else list(pair.prompts),
        "preference": pair.preference,
    }
    own = [None if caption == pair.prompt else caption for caption in pair.captions]
    for what, values in (("caption", own), ("score", pair.scores), ("model", pair.models)):
        for side, value in zip(("chosen", "rejected"), values, strict=True):
            row |= {} if value is None else {f"{what}_{side}": value}
    return row


def _write_folder(
    folder: Path, shard: int, entries: Iterable[Entry], prompt_counts: Mapping[str, int]
) -> int:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for entry in entries:
        row = json_row(entry.pair)
        for side, payload in zip(("chosen", "rejected"), entry.payloads, strict=True):
            data, ending = encoded(payload)
            row[side] = f"images/{entry.number:06d}_{side}.{ending}"
            (folder / row[side]).write_bytes(data)
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / _ROWS.format(shard)).write_text("".join(rows), encoding="utf-8")
    return len(rows)


def _finish_folder(folder: Path, shards: int) -> None:
    with (folder / JSONL_NAMES[0]).open("wb") as lines:
        for shard in range(shards):
            lines.write((folder / _ROWS.format(shard)).read_bytes())
        lines.flush()
        os.fsync(lines.fileno())


def _write_images(
    folder: Path, shard: int, entries: Iterable[Entry], prompt_counts: Mapping[str, int]
) -> int:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for entry in entries:
        image: LabelledImage = entry.pair
        data, ending = encoded(entry.payloads[0])
        file = f"images/{entry.number:06d}.{ending}"
        (folder / file).write_bytes(data)
        rows.append(json.dumps({"prompts": image.prompts, "image": file, "score": image.score}) + "\n")
    (folder / _ROWS.format(shard)).write_text("".join(rows), encoding="utf-8")
    return len(rows)


def _finish_lists(folder: Path, shards: int) -> None:
    """One list per prompt, of its images in their order."""
    lists: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for shard in range(shards):
        for line in (folder / _ROWS.format(shard)).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            lists.setdefault(tuple(row["prompts"]), []).append(row)
    with (folder / JSONL_NAMES[0]).open("w", encoding="utf-8") as lines:
        for prompts, rows in lists.items():
            listed = {
                "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
                "images": [row["image"] for row in rows],
                "scores": [row["score"] for row in rows],
            }
            lines.write(json.dumps(listed, ensure_ascii=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def _write_tar(folder: Path, shard: int, entries: Iterable[Entry], prompt_counts: Mapping[str, int]) -> int:
    count = 0
    with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
        for entry in entries:
            files = {"json": json.dumps(json_row(entry.pair), ensure_ascii=False).encode()}
            for side, payload in zip(("chosen", "rejected"), entry.payloads, strict=True):
                data, ending = encoded(payload)
                files[f"{side}.{ending}"] = data
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{entry.number:06d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    return count


def _write_parquet(
    folder: Path, shard: int, entries: Iterable[Entry], prompt_counts: Mapping[str, int]
) -> int:
    rows = []
    for _, pair, payloads in entries:
        if len(pair.prompts) > 1:
            raise UserError(
                f"row {pair.id} has several prompts, which the columns of Pick-a-Pic can't hold: "
                "use format folder or tar"
            )
        files = [encoded(payload)[0] for payload in payloads]
        uids = [digest or images.digest(data) for digest, data in zip(pair.digests, files, strict=True)]
        row = pick_a_pic_row(
            pair.id, pair.prompt, files, uids, pair.models, pair.preference, prompt_counts.get(pair.prompt)
        )
        own = [None if caption == pair.prompt else caption for caption in pair.captions]
        for side in (0, 1):
            row |= {f"caption_{side}": own[side], f"score_{side}": pair.scores[side]}
        rows.append(row)
    write_pick_a_pic(folder / f"train-{shard:05d}.parquet", rows)
    return len(rows)


def pick_a_pic_row(
    row_id: str,
    prompt: str | None,
    files: Iterable[bytes | None],
    uids: Iterable[str],
    models: Iterable[str | None],
    label_0: float | None,
    examples_of_prompt: int | None = None,
) -> dict[str, Any]:
    """The columns of Pick-a-Pic v2 for one pair; `label_0` is the probability that image 0 is the better."""
    jpg_0, jpg_1 = files
    uid_0, uid_1 = uids
    model_0, model_1 = models
    best = None if label_0 is None or label_0 == 0.5 else uid_0 if label_0 > 0.5 else uid_1
    return {
        "ranking_id": row_id,
        "caption": prompt,
        "jpg_0": jpg_0,
        "jpg_1": jpg_1,
        "label_0": label_0,
        "label_1": None if label_0 is None else 1 - label_0,
        "has_label": label_0 is not None,
        "are_different": uid_0 != uid_1,
        "best_image_uid": best,
        "image_0_uid": uid_0,
        "image_1_uid": uid_1,
        "model_0": model_0,
        "model_1": model_1,
        "num_example_per_prompt": examples_of_prompt,
    }


def write_pick_a_pic(path: Path, rows: list[dict[str, Any]]) -> None:
    """One parquet file of Pick-a-Pic rows, with ``caption_0``, ``score_0``, ... after them.

    All shards of a set have one schema, whatever is empty; row groups are small, so that one image is read
    without its thousand neighbours.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {
        pa.string(): "ranking_id caption best_image_uid image_0_uid image_1_uid model_0 model_1 "
        "caption_0 caption_1",
        pa.binary(): "jpg_0 jpg_1",
        pa.float64(): "label_0 label_1 score_0 score_1",
        pa.bool_(): "has_label are_different",
        pa.int64(): "num_example_per_prompt",
    }
    schema = pa.schema([(name, kind) for kind, names in kinds.items() for name in names.split()])
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=100)


def _nothing_to_finish(folder: Path, shards: int) -> None:
    """Shards stand for themselves."""


WriteShard = Callable[[Path, int, Iterable[Entry], Mapping[str, int]], int]  # gives the rows written
Finish = Callable[[Path, int], None]
LISTS = "lists"  # of single images with scores; the others are of pairs
FORMATS: dict[str, tuple[WriteShard, Finish]] = {
    "folder": (_write_folder, _finish_folder),
    "parquet": (_write_parquet, _nothing_to_finish),
    "tar": (_write_tar, _nothing_to_finish),
    LISTS: (_write_images, _finish_lists),
}
