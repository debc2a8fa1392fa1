"""How results are kept: one JSON with settings, versions and hardware, and a table to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffalign.output import write_json, write_text

Rows = Sequence[Mapping[str, Any]]


def store(
    out: Path, name: str, config: Any, rows: Rows, columns: Sequence[str] | None = None, **more: Any
) -> str:
    """Write ``<name>.json`` and ``<name>.md`` into ``out``; returns the table of the latter.

    Args:
        out: an existing folder.
        name: of the benchmark.
        config: the dataclass of its settings, seeds included.
        rows: the results, one mapping each with the same keys.
        columns: of the table; all by default.
        more: further entries of the JSON.
    """
    from diffalign.report import versions

    table = markdown(rows, columns)
    environment = versions()
    found = {"benchmark": name, "settings": asdict(config), "environment": environment, "rows": list(rows)}
    write_json(out / f"{name}.json", found | more)
    measured = ", ".join(f"{key} {value}" for key, value in environment.items())
    write_text(out / f"{name}.md", f"{table}\n\n{measured}\n")
    return table


def markdown(rows: Rows, columns: Sequence[str] | None = None) -> str:
    """A GitHub table of `columns` (by default the keys of the first row); numbers in four digits."""
    if not rows:
        return "(no rows)"
    names = list(columns or rows[0])
    cells = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
