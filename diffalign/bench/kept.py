"""Finished pieces of a long run, each a file whole or absent: how a benchmark goes on after a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError


@dataclass(frozen=True)
class Piece:
    """What is kept of one piece of work: facts that JSON can hold, and arrays by name."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def keep(folder: Path | None, name: str, make: Callable[[], Piece]) -> Piece:
    """The piece `name` of `folder`; made and stored if it is not there, or cannot be read.

    Args:
        folder: created when the first piece is stored; None stores nothing.
        name: of the file, best a :func:`key` of all that decides what is in it.
        make: does the work.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder is None:
        return make()
    path = folder / f"{name}.safetensors"
    return _read(path) or _write(path, make())


def key(identity: Mapping[str, Any]) -> str:
    """32 hex digits of what JSON can hold of `identity`, the same for the same content."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path) -> Piece | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            return Piece(facts, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, piece: Piece) -> Piece:
    from safetensors.numpy import save_file

    part = path.with_name(f".{path.name}.part")
    # safetensors takes no file without a tensor, and writes the memory of a view as if it were whole.
    arrays = {name: np.ascontiguousarray(values) for name, values in piece.arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays or {"none": np.zeros(1)}, part, metadata={"facts": json.dumps(piece.facts)})
        part.replace(path)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write to {str(path.parent)!r}; choose another folder") from error
    finally:
        part.unlink(missing_ok=True)
    return piece
