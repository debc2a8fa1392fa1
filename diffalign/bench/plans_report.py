"""The comparison of fitted samplers as JSON, CSV, table and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.bench.plots import name_styles
from diffalign.bench.record import csv_text, store
from diffalign.output import write_text
from diffalign.report import PALETTE, figure_png, new_figure, save_png

if TYPE_CHECKING:
    from diffalign.bench.plans import PlansConfig

Row = Mapping[str, Any]


def write_report(folder: Path, config: PlansConfig, rows: Sequence[Row], cells: Sequence[Row]) -> str:
    """Write everything into ``folder``; returns the table."""
    text = store(folder, "plans", config, rows, [shown(row) for row in rows], cells=list(cells))
    write_text(folder / "plans.csv", csv_text(cells))
    save_png(folder / "plans.png", figure_png(plot(rows)))
    return text


def shown(row: Row) -> dict[str, str]:
    """A row as people read it."""
    guidance = f"{row['guidance']:g}"

    def pair(what: str) -> str:
        return f"{row[what]:.4f} -> {row[f'plan {what}']:.4f}"

    def ratio(what: str) -> str:
        return f"{row[f'ratio {what}']:.2f} ({row[f'worst {what}']:.2f})"

    return {
        "problem": row["problem"],
        "guidance": guidance,
        "NFE": str(row["steps"]),
        "best uncalibrated": row["best uncalibrated"],
        "90th percentile": pair("p90"),
        "ratio (worst seed)": ratio("p90"),
        "mean": pair("mean"),
        "its ratio (worst seed)": ratio("mean"),
        "far": f"{row['far']:.2%}",
        "goal": row["goal"],
    }


def plot(rows: Sequence[Row]) -> Any:
    """Ratio of the 90th percentile and of the mean against the number of evaluations, a line a problem."""
    figure, axes = new_figure(9.0, 3.6, columns=2)
    groups = dict.fromkeys((row["problem"], row["guidance"]) for row in rows)
    styles = name_styles([f"{problem}, guidance {guidance:g}" for problem, guidance in groups])
    for ax, what in zip(axes, ("p90", "mean"), strict=True):
        for (problem, guidance), (label, style) in zip(groups, styles.items(), strict=True):
            own = [row for row in rows if (row["problem"], row["guidance"]) == (problem, guidance)]
            ax.plot(
                [row["steps"] for row in own], [row[f"ratio {what}"] for row in own], label=label, **style
            )
        ax.axhline(1.0, color=PALETTE["bad"], lw=1, ls=":")
        ax.set_yscale("log")
        ax.set_xticks(sorted({row["steps"] for row in rows}))
        ax.set_xlabel("network evaluations")
        ax.set_title("90th percentile" if what == "p90" else "mean", fontsize=10)
    axes[0].set_ylabel("fitted / best uncalibrated")
    axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
