"""``diffalign data convert``: any readable set of pairs to a folder with JSONL, to parquet or to tar."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from diffalign.data.examples import BadRow, Examples, reasons
from diffalign.data.pairs import PairDataset, Ties, open_pairs
from diffalign.data.rows import Selection
from diffalign.data.write import FORMATS, SHARD_ROWS, Entry, Format, check_target, put_in_place
from diffalign.errors import UserError
from diffalign.output import write_json

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=6)  # of a process that waits for others
DECODED = 32  # pairs in memory at a time; at 1024 px they take 200 MB
Annotate = Callable[[list[Any]], Sequence[Any]]  # of pairs, or of single images


@dataclass(kw_only=True)
class CopyConfig:
    """Options of every command that writes a set of pairs from another.

    Attributes:
        dataset: what 'diffalign data check' reads: a folder, .jsonl, .json, .parquet or .tar file, or
            hf://owner/name.
        output_dir: folder to write; an interrupted command goes on where it stopped when it is given again.
        format: folder (pairs.jsonl and images), parquet (the columns of Pick-a-Pic) or tar (WebDataset).
        split: which split, where the set has several.
        columns: other column names, by role, such as {prompt: text, chosen: winner, rejected: loser}.
        ties: pairs without a winner: keep them (soft), drop or error.
        selection: what decides between two images, what becomes of repeated pairs, and filters.
        limit: the first so many usable pairs.
        max_bad: share of damaged rows above which nothing is written; damaged rows are left out.
        shard_rows: rows in one file, and what an interrupted command may lose.
        overwrite: replace pairs that are in output_dir.
    """

    dataset: str
    output_dir: str
    format: Format = "folder"
    split: str | None = None
    columns: dict[str, str] | None = None
    ties: Ties = "soft"
    selection: Selection = field(default_factory=Selection)
    limit: int | None = None
    max_bad: float = 0.01
    shard_rows: int = SHARD_ROWS
    overwrite: bool = False

    def open(self) -> PairDataset:
        """The pairs to copy, after a look at where they go.

        Raises:
            UserError: as :func:`open_pairs`, or `output_dir` is in use.
        """
        team()  # before any model is loaded: each process has a device of its own
        check_target(self.output_dir, self.overwrite)
        return open_pairs(
            self.dataset,
            split=self.split,
            columns=self.columns,
            ties=self.ties,
            limit=self.limit,
            max_bad=self.max_bad,
            selection=self.selection,
        )


@dataclass(kw_only=True)
class ConvertConfig(CopyConfig):
    """Write a preference set in another format; encoded images are copied byte for byte."""


def convert(
    dataset: Examples[Any, Any],
    folder: str | Path,
    *,
    format: str = "folder",
    annotate: Annotate | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_rows: int = SHARD_ROWS,
    overwrite: bool = False,
    process: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] | None = None,
    progress: bool = True,
    what: str = "convert",
) -> int:
    """Write the good rows of `dataset` to `folder`; returns their number.

    The folder appears when it is whole. Until then shards gather beside it, in ``.<name>.partial``; the same
    call goes on with those that are missing.

    Args:
        dataset: pairs, or single images with scores.
        format: folder, parquet or tar; of single images ``LISTS``, a folder with a list per prompt.
        annotate: adds to some pairs, swaps images (see :meth:`Pair.swapped`), or gives None for a pair that
            is left out; called with at most `DECODED` pairs of one shard.
        settings: what decides the result of `annotate`, as JSON values: an interrupted call with others
            starts again.
        process: (rank, number) of the processes that write the set together, each some of its shards. The
            number of rows is that of all of them in the first, and of its own in the others.
        barrier: waits for the other processes; needed with more than one.

    Raises:
        UserError: the folder is in use, or no pair is usable.
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if shard_rows < 1:
        raise UserError(f"shard_rows must be at least 1, not {shard_rows}")
    rank, processes = process
    if processes > 1 and barrier is None:
        raise ValueError("processes that write one set need a barrier")
    wait = barrier if barrier is not None else (lambda: None)
    folder = check_target(folder, overwrite)
    write, finish = FORMATS[format]
    counts = Counter(dataset.prompts)
    if rank:
        wait()  # for the first to make or clear the place
    new = _partial(folder, dataset, {"format": format, "shard_rows": shard_rows, "annotate": settings})
    if not rank:
        wait()
    shards = -(-len(dataset) // shard_rows)
    hidden = None if progress and not rank else True
    bar = tqdm(total=len(dataset) // processes, desc=what, unit=dataset.what, disable=hidden)
    written = 0
    for shard in range(rank, shards, processes):
        done = new / f".done-{shard:05d}"
        indices = range(shard * shard_rows, min((shard + 1) * shard_rows, len(dataset)))
        if not done.is_file():
            write_json(done, write(new, shard, _entries(dataset, indices, annotate), counts))
        written += json.loads(done.read_text())
        bar.update(len(indices))
    bar.close()
    wait()
    if rank:
        return written
    written = sum(json.loads((new / f".done-{shard:05d}").read_text()) for shard in range(shards))
    if not written:
        why = reasons(dataset.skipped) or "all were left out"
        raise UserError(f"no usable {dataset.what} in {dataset.source}: {why}")
    finish(new, shards)
    put_in_place(new, folder)
    return written


def team() -> Any:
    """The processes that run this command together: under ``torchrun`` or ``accelerate launch`` they share
    its work, and "cuda" is a device of each's own. An ``accelerate.PartialState``."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def _entries(dataset: Examples[Any, Any], indices: range, annotate: Annotate | None) -> Iterator[Entry]:
    """The good rows at `indices`, few of them decoded at a time."""
    for first in range(indices.start, indices.stop, DECODED):
        read = ((i, dataset.read(i), dataset.payloads(i)) for i in indices[first - indices.start :][:DECODED])
        good = [(i, pair, p) for i, pair, p in read if not isinstance(pair, BadRow) and p is not None]
        pairs = [pair for _, pair, _ in good]
        annotated: Sequence[Any] = annotate(pairs) if annotate and pairs else pairs
        for (index, before, payloads), pair in zip(good, annotated, strict=True):
            if pair is None:
                continue
            same = pair.digests == before.digests
            yield Entry(index, pair, payloads if same else payloads[::-1])


def _partial(folder: Path, dataset: Examples[Any, Any], settings: dict[str, Any]) -> Path:
    """Where the shards of a set gather, with those that an earlier call of the same kind left."""
    new = folder.with_name(f".{folder.name}.partial")
    rows = hashlib.sha256()
    for row in zip(dataset.ids, dataset.all_prompts, dataset.preferences, strict=True):
        rows.update(repr(row).encode())
    state = json.loads(json.dumps({"source": dataset.source, "rows": rows.hexdigest(), **settings}))
    file = new / ".state.json"
    if new.exists() and (not file.is_file() or json.loads(file.read_text()) != state):
        logger.warning("%s is of another source or other options: started again", new)
        shutil.rmtree(new)
    if not new.exists():
        new.mkdir()
        write_json(file, state)
    elif any(new.glob(".done-*")):
        logger.info("going on with %s", new)
    return new


def run(config: ConvertConfig) -> Path:
    """The command ``diffalign data convert``; returns the folder.

    Raises:
        UserError: as :func:`convert`.
    """
    return copy(config, config.open())


def copy(
    config: CopyConfig,
    dataset: Examples[Any, Any],
    annotate: Annotate | None = None,
    settings: Mapping[str, Any] | None = None,
    what: str = "convert",
    format: str | None = None,
) -> Path:
    """:func:`convert` with the options of a command, and a line about what was written."""
    processes = team()
    written = convert(
        dataset,
        config.output_dir,
        format=format or config.format,
        annotate=annotate,
        settings=settings,
        shard_rows=config.shard_rows,
        overwrite=config.overwrite,
        process=(processes.process_index, processes.num_processes),
        barrier=processes.wait_for_everyone,
        what=what,
    )
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()
        if not processes.is_main_process:
            return Path(config.output_dir)
    among = f" of {len(dataset):,}" if written < len(dataset) else ""
    left_out = f" (left out: {reasons(dataset.skipped)})" if dataset.skipped else ""
    print(f"wrote {written:,} {dataset.what}s{among} to {config.output_dir}{left_out}")
    return Path(config.output_dir)
