"""How results are kept: one JSON with settings, versions and hardware, and a table to read."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from diffalign.output import write_json, write_text

Rows = Sequence[Mapping[str, Any]]


def store(out: Path, name: str, config: Any, rows: Rows, table: Rows | None = None, **more: Any) -> str:
    """Write ``<name>.json`` and ``<name>.md`` into ``out``; returns the table of the latter.

    Args:
        out: an existing folder.
        name: of the benchmark.
        config: the dataclass of its settings, seeds included.
        rows: the results, one mapping each with the same keys.
        table: what the table shows; the results by default.
        more: further entries of the JSON.
    """
    from diffalign.report import versions

    text = markdown(rows if table is None else table)
    environment = versions()
    found = {"benchmark": name, "settings": asdict(config), "environment": environment, "rows": list(rows)}
    write_json(out / f"{name}.json", found | more)
    measured = ", ".join(f"{key} {value}" for key, value in environment.items())
    write_text(out / f"{name}.md", f"{text}\n\n{measured}\n")
    return text


def markdown(rows: Rows) -> str:
    """A GitHub table with a column per key of the first row; numbers in four significant digits."""
    if not rows:
        return "(no rows)"
    names = list(rows[0])
    cells = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def csv_text(rows: Rows) -> str:
    """Comma-separated values with a column per key of the first row; numbers in full."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def command_line(name: str, config: Any) -> str:
    """The command line that repeats a run: every option of ``config`` that differs from its default."""

    def text(value: Any) -> str:
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, dict):
            return json.dumps(value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    default, words = type(config)(), ["diffalign", *name.split()]
    for option, value in vars(config).items():
        if value != getattr(default, option):
            values = value if isinstance(value, list) else [value]
            words += [f"--{option}", *(shlex.quote(text(v)) for v in values)]
    return " ".join(words)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
