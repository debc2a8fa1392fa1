"""A run's curves in one picture: is it learning, and is it healthy?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.report import PALETTE, figure_png, new_figure, save_png
from diffalign.trainers import log

Record = Mapping[str, Any]


def _rise(side: str) -> Callable[[Record], float | None]:
    """How far the error of `side` has risen over the reference's, in percent."""

    def value(record: Record) -> float | None:
        reference = record.get(f"errors/reference_{side}")
        return None if not reference else 100 * (record[f"errors/{side}"] / reference - 1)

    return value


def _metric(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.get(name)


#: title -> (level of a run that has learnt nothing, {label: (colour, value of a record)}). A panel or line
#: without a value is left out; validation is drawn with dots.
PANELS: dict[str, tuple[float | None, dict[str, tuple[str, Callable[[Record], float | None]]]]] = {
    "reward of own samples": (
        None,
        {"mean": ("ours", _metric("reward")), "best of each prompt": ("good", _metric("reward_best"))},
    ),
    "loss": (None, {"loss": ("muted", _metric("loss"))}),
    "pairs won (implicit accuracy)": (
        0.5,
        {
            "training": ("ours", _metric("rewards/accuracies")),
            "held out": ("theirs", _metric("validation/accuracies_by_pair")),
        },
    ),
    "reward: healthy while chosen stays above 0": (
        0.0,
        {
            "chosen": ("good", _metric("rewards/chosen")),
            "rejected": ("bad", _metric("rewards/rejected")),
            "margin, held out": ("theirs", _metric("validation/rewards/margins")),
        },
    ),
    "error against the reference, %": (
        0.0,
        {"chosen": ("good", _rise("chosen")), "rejected": ("bad", _rise("rejected"))},
    ),
    "divergence from the reference, per element": (0.0, {"KL of a step": ("theirs", _metric("kl"))}),
    "ratios clipped: unhealthy above a half": (0.5, {"clipped": ("bad", _metric("clipped"))}),
}


def draw(records: Sequence[Record], path: Path) -> Path | None:
    """Write the curves of a log as a PNG; None, and no file, for a log without a curve.

    Thin lines are the steps, thick ones their running mean over a tenth of the run; triangles are alarms.
    """
    panels = {}
    for title, (level, lines) in PANELS.items():
        series = {label: (colour, *_series(records, value)) for label, (colour, value) in lines.items()}
        drawn = {label: line for label, line in series.items() if len(line[1]) > 1}
        if drawn:
            panels[title] = level, drawn
    if not panels:
        return None
    figure, axes = new_figure(4.2 * len(panels), 3.0, columns=len(panels))
    for ax, (title, (level, drawn)) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        if level is not None:
            ax.axhline(level, color=PALETTE["muted"], linewidth=0.8, linestyle="--")
        for label, (colour, steps, values) in drawn.items():
            if "held out" in label:
                ax.plot(steps, values, "o-", color=PALETTE[colour], markersize=4, label=label)
                continue
            ax.plot(steps, values, color=PALETTE[colour], linewidth=0.6, alpha=0.35)
            ax.plot(steps, _running_mean(values), color=PALETTE[colour], linewidth=1.8, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        if len(drawn) > 1:
            ax.legend(frameon=False, fontsize=8)
    first = np.atleast_1d(axes)[0]
    foot = first.get_xaxis_transform()  # x in steps, y from the bottom (0) to the top (1) of the panel
    for record in records:
        for name in record.get("alarms", []):
            first.plot(record["step"], 0.0, "^", color=PALETTE["bad"], clip_on=False, transform=foot)
            first.text(record["step"], 0.05, name, fontsize=7, rotation=90, ha="center", transform=foot)
    save_png(path, figure_png(figure))
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


def draw_log(folder: Path) -> Path | None:
    """``curves.png`` of the ``log.jsonl`` in `folder`."""
    return draw(log.read(folder / "log.jsonl"), folder / "curves.png")


def _series(
    records: Sequence[Record], value: Callable[[Record], float | None]
) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], y) for record in records if (y := value(record)) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the run, over what there is of it at the ends."""
    half = max(1, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
