"""Finished pieces of a long run, each a file whole or absent: how a benchmark goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffalign import output
from diffalign.errors import UserError

SETTINGS = "settings.json"


def open_folder(config: Any, free: Collection[str], pieces: str) -> Path:
    """The output folder of a long run, if it is new or holds a part of the same run.

    Args:
        config: dataclass of the settings, with ``output_dir`` and ``overwrite``.
        free: settings that may differ from those of the part that is there.
        pieces: pattern of what ``overwrite`` removes from the folder.

    Raises:
        UserError: a run with other settings is there, or something else is.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    settings = json.loads(json.dumps(settings))
    file = Path(config.output_dir).expanduser() / SETTINGS
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is not None and list(file.parent.iterdir()) == [file]:  # of a run that got nowhere
        file.unlink()
        known = None
    if known is not None:  # options that came later were at their defaults
        known = {name: value for name, value in _defaults(config).items() if name in settings} | known
    if known is not None and known != settings and not config.overwrite:
        other = [f"--{name}" for name, value in settings.items() if known.get(name) != value]
        raise UserError(
            f"{str(file.parent)!r} holds a run with other settings ({', '.join(other)}): choose another "
            "--output_dir, or start anew with --overwrite"
        )
    folder = output.prepare(config.output_dir, overwrite=known is not None or config.overwrite)
    if config.overwrite:
        for path in folder.glob(pieces):
            shutil.rmtree(path)
    output.write_json(folder / SETTINGS, settings)
    return folder


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of the options that have one, as JSON holds them."""
    found = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(config)
        if one.default is not MISSING or one.default_factory is not MISSING
    }
    return dict(json.loads(json.dumps(found, default=asdict)))


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
