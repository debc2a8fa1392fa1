"""The pictures of the reports: error curves with slopes, and labelled strips and grids of images.

Curves are matplotlib figures, pictures ``(H, W, 3) uint8`` arrays whose images are left pixel for pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.report import PALETTE, new_figure, tile

if TYPE_CHECKING:
    from diffalign.bench.comparison import Comparison, Row

# Hues that colour-blind eyes tell apart on white (Okabe and Ito, without the yellow), most distant first; a
# marker of its own tells lines apart without any hue.
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX*<>"
_SLOPE_POINTS = 3  # the slope is that of the last ones
_FLOOR_FACTOR = 3.0  # errors nearer to the yardstick's own are not used for slopes


def name_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each line: diffusers' classes, named as such, are dashed."""
    return {
        name: {
            "color": HUES[i % len(HUES)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "--" if "Scheduler" in name or name.startswith("diffusers") else "-",
        }
        for i, name in enumerate(names)
    }


def nfe_axis(axes: Any, evaluations: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each of these numbers of network evaluations."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    ticks: list[int] = []
    for n in sorted(set(evaluations)):
        if not ticks or n >= 1.1 * ticks[-1]:  # nearer ones would overlap
            ticks.append(n)
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def slope(nfe: Sequence[float], error: Sequence[float], floor: float = 0.0) -> float | None:
    """d log error / d log evaluations over the last three points that are clear of the floor.

    Minus the order of the method where it has converged; None with fewer than two such points.
    """
    clear = [(n, e) for n, e in sorted(zip(nfe, error, strict=True)) if math.isfinite(e) and e > floor]
    if len({n for n, _ in clear}) < 2:
        return None
    x, y = np.log(np.array(clear[-_SLOPE_POINTS:])).T
    return float(np.polyfit(x, y, 1)[0])


def draw_errors(axes: Any, rows: Sequence[Row], reference_error: float = 0.0) -> None:
    """Median error against network evaluations, both logarithmic, a line per sampler with its slope."""
    names = list(dict.fromkeys(row.sampler for row in rows))
    for name, style in name_styles(names).items():
        own = sorted((row for row in rows if row.sampler == name), key=lambda row: row.nfe)
        nfe, error = [row.nfe for row in own], [row.error_median for row in own]
        steep = slope(nfe, error, _FLOOR_FACTOR * reference_error)
        label = name if steep is None else f"{name}  ({steep:+.1f})"
        axes.plot(nfe, error, markersize=4.5, linewidth=1.5, label=label, **style)
    if reference_error:
        axes.axhline(reference_error, color=PALETTE["muted"], linewidth=1, linestyle=":")
        axes.annotate(
            "the yardstick's own error",
            (1.0, reference_error),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#60646c",
        )
    axes.set(xlabel="network evaluations", ylabel="relative error (median)", yscale="log")
    nfe_axis(axes, [row.steps for row in rows])


def convergence(rows: Sequence[Row], reference_error: float = 0.0) -> Any:
    """Figure of `draw_errors` with its legend beside it; the number at each name is its slope."""
    names = list(dict.fromkeys(row.sampler for row in rows))
    figure, axes = new_figure(9.5, max(4.2, 1.2 + 0.25 * len(names)))
    draw_errors(axes, rows, reference_error)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title="slope in brackets, of the last points",
        title_fontsize=8,
        alignment="left",
    )
    return figure


def grid(
    images: Sequence[Sequence[np.ndarray | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    least: int = 96,
) -> np.ndarray:
    """A table of images with a name for each row and column.

    Args:
        images: ``images[row][column]`` (H, W, 3) uint8, all of one size; None leaves a place empty.
        rows, columns: names.
        title: above all.
        least: small images are enlarged by a whole factor to at least so many pixels a side.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = next(one.shape[:2] for row in images for one in row if one is not None)
    factor = max(1, math.ceil(least / max(height, width)))
    height, width, gap = factor * height, factor * width, 4
    size = max(13, round(height / 9))
    font = ImageFont.load_default(size)
    line = round(1.5 * size)
    left = math.ceil(max(font.getlength(part) for name in rows for part in _wrapped(name))) + 3 * gap
    top = line * (1 + bool(title))
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, line / 2), title, "#1c2024", font, anchor="lm")
    for j, name in enumerate(columns):
        draw.text((left + j * (width + gap) + width / 2, top - line / 2), name, "#1c2024", font, anchor="mm")
    for i, name in enumerate(rows):
        middle = top + i * (height + gap) + height / 2
        text = "\n".join(_wrapped(name))
        draw.multiline_text((left - 2 * gap, middle), text, "#1c2024", font, anchor="rm", align="right")
        for j, one in enumerate(images[i]):
            if one is not None:
                enlarged = one.repeat(factor, 0).repeat(factor, 1)
                place = (left + j * (width + gap), top + i * (height + gap))
                sheet.paste(Image.fromarray(enlarged), place)
    return np.asarray(sheet)


def _wrapped(name: str) -> list[str]:
    """A sampler's name, its options each on a line of its own."""
    head, _, options = name.partition(":")
    return [head, *filter(None, options.split(","))]


def sampler_strip(
    comparison: Comparison,
    image: int = 0,
    *,
    guidance: float | None = None,
    dtype: str | None = None,
    title: str = "",
) -> np.ndarray:
    """One prompt and noise: a row per sampler, a column per number of evaluations and the converged image.

    Args:
        comparison: of images.
        image: which, of the first that a row keeps.
        guidance, dtype: of which rows; those of the first row by default.
        title: such as the prompt.
    """
    guidance = comparison.rows[0].guidance if guidance is None else guidance
    dtype = dtype or comparison.rows[0].dtype
    rows = [row for row in comparison.rows if (row.guidance, row.dtype) == (guidance, dtype)]
    steps = list(dict.fromkeys(row.steps for row in rows))
    found = {(row.sampler, row.steps): row.images for row in rows}
    exact = comparison.references[guidance].images
    lines = [
        [
            *(None if (drawn := found.get((name, n))) is None else drawn[image] for n in steps),
            None if exact is None else exact[image],
        ]
        for name in comparison.samplers
    ]
    return grid(lines, comparison.samplers, [*(str(n) for n in steps), "converged"], title=title)


def trajectory_strip(predicted: Mapping[str, np.ndarray], *, title: str = "") -> np.ndarray:
    """What each sampler believes the image to be, a column per network evaluation.

    Args:
        predicted: from :func:`diffalign.bench.trajectory.predicted_images`.
        title: such as the prompt.
    """
    most = max(len(images) for images in predicted.values())
    lines = [[*images, *[None] * (most - len(images))] for images in predicted.values()]
    return grid(lines, list(predicted), [str(i + 1) for i in range(most)], title=title, least=64)


def before_after(
    before: np.ndarray,
    after: np.ndarray,
    good_before: np.ndarray,
    good_after: np.ndarray,
    *,
    columns: int = 12,
) -> np.ndarray:
    """Before above after, same caption and noise in a column; framed blue where it is good, else orange.

    Columns are the first captions on which the two are told apart, then the first of the rest, two blocks.

    Args:
        before, after: (N, H, W, 3) uint8.
        good_before, good_after: (N,) bool, what a judge says.
        columns: of a block.
    """
    order = np.argsort(good_before == good_after, kind="stable")
    blocks = []
    for start in range(0, min(2 * columns, len(order)), columns):
        chosen = order[start : start + columns]
        images = np.concatenate([before[chosen], after[chosen]])
        good = np.concatenate([good_before[chosen], good_after[chosen]])
        frames = [HUES[0] if is_good else HUES[1] for is_good in good]
        blocks.append(tile(images, len(chosen), frames=frames))
    width = max(b.shape[1] for b in blocks)
    gap = np.full((10, width, 3), 255, np.uint8)
    padded = [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks]
    return np.concatenate([piece for block in padded for piece in (block, gap)][:-1])
