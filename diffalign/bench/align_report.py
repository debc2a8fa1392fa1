"""The contest of alignment methods as JSON, CSV, table, plot and one self-contained page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.bench.record import command_line, store
from diffalign.output import write_text
from diffalign.report import PALETTE, figure_png, figure_uri, new_figure, render, save_png, versions

if TYPE_CHECKING:
    from diffalign.bench.align import AlignConfig

Row = Mapping[str, Any]

LINEAR = 5.0  # points up to which gains are drawn to scale
MARKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)


def write_report(folder: Path, config: AlignConfig, rows: Sequence[Row]) -> str:
    """Write everything into ``folder``; returns the table."""
    shown = [shown_row(row) for row in rows]
    text = store(folder, "align", config, rows, shown)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(shown[0]))
    writer.writeheader()
    writer.writerows(shown)
    write_text(folder / "align.csv", buffer.getvalue())
    figure = gains(rows)
    save_png(folder / "gains.png", figure_png(figure))
    page = render(
        "align.html",
        config=config,
        rows=shown,
        plot=figure_uri(figure),
        pictures=len(config.seeds) * config.eval_prompts,
        command=command_line("bench align", config),
        environment=versions(),
    )
    write_text(folder / "report.html", page)
    return text


def shown_row(row: Row) -> dict[str, str]:
    """A row as people read it: points with 95 % intervals; a dash where there is nothing."""
    base = row["method"] == "base"

    def interval(name: str) -> str:
        found = row.get(name)
        if found is None:
            return "-"
        return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"

    return {
        "method": row["method"] + (" *" if row.get("reference") else ""),
        "verifier": f"{row['verifier']['value']:.1%}",
        "gain": interval("gain"),
        "by seed": "-" if base else ", ".join(f"{100 * gain:+.1f}" for gain in row["by_seed"]),
        "against sft": interval("against_sft"),
        "scorer": f"{row['scorer']:.2f}",
        "pairs won": "-" if base else f"{row['implicit']['value']:.0%}",
        "drift": "-" if base else f"{row['drift']:.1%}",
        "diversity": "1" if base else f"{row['diversity']:.2f}",
        "steps": "-" if base else f"{row['steps']:.0f}",
        "evaluations": "-" if base else f"{row['evaluations'] / 1000:.0f}k",
        "minutes": "-" if base else f"{row['seconds'] / 60:.1f}",
        "verdict": row.get("verdict", "-"),
    }


def gains(rows: Sequence[Row]) -> Any:
    """Left, gain in verifier accuracy with its interval, best on top, a stroke for each seed; right, what it
    cost in distance from the base."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    ranked = sorted(rows[1:], key=lambda row: row["gain"]["value"])
    figure, (left, right) = new_figure(11, max(3.2, 0.45 * len(ranked) + 1.3), columns=2)
    left.axvline(0, color=PALETTE["muted"], lw=1, ls=":")
    right.axhline(0, color=PALETTE["muted"], lw=1, ls=":")
    for place, row in enumerate(ranked):
        gain, drift = row["gain"], 100 * row["drift"]
        colour = PALETTE["ours" if row["reference"] else "theirs"]
        spread = [[100 * abs(gain[end] - gain["value"])] for end in ("low", "high")]
        left.errorbar(100 * gain["value"], place, xerr=spread, fmt="o", color=colour, capsize=3)
        seeds = [100 * one for one in row["by_seed"]]
        left.plot(seeds, [place + 0.2] * len(seeds), "|", color=colour)
        right.errorbar(drift, 100 * gain["value"], yerr=spread, fmt="o", color=colour, capsize=3, alpha=0.8)
    left.set_yticks(range(len(ranked)), [row["method"] for row in ranked])
    left.set_xlabel("gain in verifier accuracy over the base model, points")
    right.set_xlabel("distance from the base model: change of the network's output, %")
    right.set_ylabel("gain, points")
    # Linear up to a few points, logarithmic beyond: one method that ruins the model should not hide the rest.
    left.set_xscale("symlog", linthresh=LINEAR)
    right.set_yscale("symlog", linthresh=LINEAR)
    right.set_xscale("symlog", linthresh=1.0)
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(FixedLocator(MARKS))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    right.set_xlim(0, 2 * max(100 * row["drift"] for row in ranked) or 1)
    _label(right, {row["method"]: (100 * row["drift"], 100 * row["gain"]["value"]) for row in ranked})
    return figure


def _label(axes: Any, points: Mapping[str, tuple[float, float]], gap: float = 11.0) -> None:
    """Names beside `points`, in data units, each `gap` points of print or more above the one below it."""
    lowest = -math.inf
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axes.transData.transform(point)
        lowest = max(y, lowest + gap * axes.figure.dpi / 72)
        place = axes.transData.inverted().transform((x + 12 * axes.figure.dpi / 72, lowest))
        axes.annotate(
            name,
            point,
            place,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": PALETTE["muted"], "lw": 0.6, "shrinkB": 3},
        )
