"""``--against``: is a comparison of samplers worse than an earlier one?

The same prompts and noises are compared with themselves, so that what counts is the spread of the differences
and not that of the images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import RunFailed, UserError

Rows = Sequence[Mapping[str, Any]]

#: What makes two runs comparable: the same problem and the same noises.
SAME = ("model", "prompts", "prompt_file", "samples", "images_per_prompt", "seed")
_CELL = ("sampler", "dtype", "guidance", "steps")
#: Standard errors of the mean difference that a change must exceed.
_STANDARD_ERRORS = 2.0


class Worse(RunFailed):
    """Something got worse; the command line exits with 1."""

    exit_code = 1


def read(path: str, settings: Mapping[str, Any]) -> Rows:
    """The rows of an earlier samplers.json with the same problem.

    Raises:
        UserError: no such file, of another benchmark, or of another problem.
    """
    file = Path(path).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows, earlier = found["per_image"], dict(found["settings"])
    except OSError as error:
        raise UserError(f"--against: {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against takes the samplers.json of an earlier run, and {str(file)!r} is none"
        ) from error
    for name in SAME:
        if earlier.get(name) != settings[name]:
            raise UserError(
                f"--against: {str(file)!r} was measured with another --{name} ({earlier.get(name)!r}, not "
                f"{settings[name]!r}); the same images can't be compared"
            )
    return rows


def per_image(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """What an earlier run must have left of its rows."""
    return [{name: getattr(row, name) for name in (*_CELL, "nfe", "values")} for row in rows]


def regressions(old: Rows, new: Rows, *, tolerance: float, floor: float = 0.0) -> list[dict[str, Any]]:
    """Cells of both runs in which the mean of a metric got worse, a row each.

    Args:
        old, new: from :func:`per_image`.
        tolerance: relative change that is allowed.
        floor: error of the yardstick: errors may change by so much.

    A change counts where it is more than `tolerance` of the old mean, more than two standard errors of the
    mean difference, image by image, and more than the floor. Scores are better where they are higher, all
    else where it is lower; more network evaluations than before are always worse. Times are not compared:
    they depend on the machine.
    """
    known = {_cell(row): row for row in old}
    worse = []
    for row in new:
        before = known.get(_cell(row))
        if before is None:
            continue
        cell = {name: row[name] for name in _CELL}
        if row["nfe"] > before["nfe"]:
            worse.append(cell | _change("nfe", before["nfe"], row["nfe"], 0.0))
        for metric in row["values"].keys() & before["values"].keys():
            was, now = (_numbers(values["values"][metric]) for values in (before, row))
            if found := _worse(metric, was, now, tolerance, floor if metric == "error" else 0.0):
                worse.append(cell | found)
    return sorted(worse, key=lambda found: [str(found[name]) for name in (*_CELL, "metric")])


def compared(old: Rows, new: Rows) -> int:
    """How many cells both runs have."""
    return len({_cell(row) for row in old} & {_cell(row) for row in new})


def _worse(
    metric: str, old: np.ndarray, new: np.ndarray, tolerance: float, floor: float
) -> dict[str, Any] | None:
    sign = -1.0 if metric.startswith("score/") else 1.0
    if np.isinf(new).sum() > np.isinf(old).sum():
        return _change(metric, _mean(old), _mean(new), math.inf)
    both = np.isfinite(old) & np.isfinite(new)
    if not both.any():
        return None
    difference = sign * (new - old)[both]
    se = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    allowed = max(tolerance * abs(float(old[both].mean())), _STANDARD_ERRORS * se, floor)
    if difference.mean() <= allowed:
        return None
    return _change(metric, float(old[both].mean()), float(new[both].mean()), se)


def _change(metric: str, old: float, new: float, se: float) -> dict[str, Any]:
    return {"metric": metric, "before": float(old), "now": float(new), "standard error": float(se)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CELL)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """JSON knows no infinity: what diverged is written as null."""
    return np.array([math.inf if value is None else value for value in values], dtype=float)
