"""A store of tensors under content keys: safetensors files, whole or absent, checked on opening."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
HOUR = 3600.0  # seconds


class ShardStore:
    """Rows of named tensors by key, in shards of ``{name: (rows, ...)}``.

    With a folder every shard is one safetensors file, written under another name and moved into place, with
    its keys and a SHA-256 of its tensors in the header. Opening verifies all of them; a damaged one is
    deleted with a line in the log, so that its keys are missing and get made again. Without a folder the
    shards live in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._shards: list[Path | dict[str, Tensor]] = []
        self._where: dict[str, tuple[int, int]] = {}  # key -> (shard, row)
        self._row_shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.safetensors")):
                self._open(path)
            for path in folder.glob(f"*{PARTIAL}"):  # left by a killed process, not being written by another
                if time.time() - path.stat().st_mtime > HOUR:
                    path.unlink(missing_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all tensors together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._row_shapes.values())

    def add(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Store one shard: row ``i`` of every tensor belongs to ``keys[i]``.

        Raises:
            ValueError: rows of another shape or type than those already there.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        self._check_shapes(held)
        if self._folder is None:
            self._register(keys, held)
            return
        path = self._folder / f"{_sha256(*map(str.encode, keys))[:24]}.safetensors"
        metadata = {"format": "pt", "keys": json.dumps(list(keys)), "sha256": _checksum(held)}
        # Of this process and thread, should several build one cache.
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        try:
            save_file(held, partial, metadata=metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._register(keys, path)

    def rows(self, keys: Sequence[str], memory_limit: int) -> dict[str, Tensor | ShardedRows]:
        """Every tensor with its rows in the order of `keys`, (len(keys), ...).

        In memory if that takes at most `memory_limit` bytes; otherwise read from the files as asked for.
        """
        where = [self._where[key] for key in keys]
        if self._folder is not None and len(keys) * self.row_bytes > memory_limit:
            shards = [shard for shard in self._shards if isinstance(shard, Path)]
            return {name: ShardedRows(name, shards, where) for name in self._row_shapes}
        out = {
            name: torch.empty((len(keys), *shape), dtype=dtype)
            for name, (shape, dtype) in self._row_shapes.items()
        }
        by_shard: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for position, (shard, row) in enumerate(where):
            by_shard[shard].append((position, row))
        for shard, pairs in by_shard.items():
            positions, rows = torch.tensor(pairs).T
            held = self._shards[shard]
            tensors = _read(held)[0] if isinstance(held, Path) else held
            for name, target in out.items():
                target[positions] = tensors[name][rows]
        return dict(out)

    def _open(self, path: Path) -> None:
        try:
            tensors, metadata = _read(path)
            keys = json.loads(metadata["keys"])
            if metadata["sha256"] != _checksum(tensors):
                raise ValueError("checksum")
            self._check_shapes(tensors)
        except (SafetensorError, OSError, KeyError, ValueError):
            logger.warning("cache file %s is damaged; what it held is made again", path)
            path.unlink(missing_ok=True)
            return
        self._register(keys, path)

    def _register(self, keys: Sequence[str], shard: Path | dict[str, Tensor]) -> None:
        self._where |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
        self._shards.append(shard)

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        shapes = row_shapes(tensors)
        if self._row_shapes and shapes != self._row_shapes:
            raise ValueError(
                f"rows of one cache must be alike: got {shapes} after {self._row_shapes}; "
                "encoders that changed need another key"
            )
        self._row_shapes = shapes


class ShardedRows:
    """Rows that stay in their files; indexing with a 1-D tensor of positions reads just those."""

    def __init__(self, name: str, shards: Sequence[Path], where: Sequence[tuple[int, int]]) -> None:
        self._name, self._shards, self._where = name, shards, where
        self._mapped: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, positions: Tensor) -> Tensor:
        read = []
        for position in positions.tolist():
            shard, row = self._where[position]
            if shard not in self._mapped:
                self._mapped[shard] = safe_open(self._shards[shard], "pt")
            read.append(self._mapped[shard].get_slice(self._name)[row : row + 1])
        return torch.cat(read)


def row_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of one row of each tensor, by name in order."""
    return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in sorted(tensors.items())}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return _sha256(
        *(
            part
            for name, tensor in sorted(tensors.items())
            for part in (
                f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(),
                tensor.contiguous().view(torch.uint8).numpy(),
            )
        )
    )


def _sha256(*parts: Any) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
