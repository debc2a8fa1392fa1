"""``log.jsonl``: one JSON object per optimiser step, readable while the run goes on and after it was
killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class JsonLines:
    """Appends records to ``path``; records of steps after ``last_step`` are dropped first (a resumed run
    computes them again)."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [r for r in read(path) if r["step"] <= last_step] if path.exists() else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        part.replace(path)
        self._file: TextIO = path.open("a", buffering=1)  # a line at a time: nothing is lost with the process

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()
