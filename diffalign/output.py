"""Output folders: nothing of a user's is lost by accident, and no file is left half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffalign.errors import UserError


def prepare(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Create an output folder and make sure that it can be written before any work is done.

    With `overwrite` a folder in use is taken as it is: files of the same name are replaced, others stay.

    Raises:
        UserError: it holds files and `overwrite` is off, is not a folder, or cannot be written.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(not _left_over(file.name) for file in path.iterdir()):
            raise UserError(
                f"output folder {str(path)!r} is not empty; add --overwrite or choose another --output_dir"
            )
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{str(path)!r} is not a folder; choose another --output_dir") from error
    except PermissionError as error:
        raise UserError(f"no permission to write to {str(path)!r}; choose another --output_dir") from error
    return path


def _left_over(name: str) -> bool:
    """Whether a file is one of ours that a killed process left."""
    return name.startswith(".write-") or (name.startswith(".") and name.endswith(".part"))


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all: a full disk, Ctrl-C or a power cut leaves what was there."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_text` of indented JSON; NaN and infinity become null, which every reader accepts."""
    return write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if not isinstance(value, dict | list | tuple | str | int | float | bool | None):
        return str(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
