"""Pieces of a self-contained HTML report: image tiles, figures as data URIs, a jinja2 template each."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One hue per role, readable for colour-blind eyes on white: ours, theirs, reference, good, bad.
PALETTE = {"ours": "#1a6fdf", "theirs": "#d9742b", "muted": "#8a8f98", "good": "#1f9d55", "bad": "#c93a3a"}


def png_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 to a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 as a PNG file, whole or not at all."""
    from PIL import Image

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(image).save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def figure_uri(figure: Figure) -> str:
    """A matplotlib figure to an SVG data URI (sharp at any zoom, text stays text)."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_png(figure: Figure, dpi: int = 150) -> np.ndarray:
    """A matplotlib figure to an (H, W, 3) uint8 image; the figure stays open."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return np.asarray(Image.open(buffer).convert("RGB"))


def new_figure(
    width: float = 6.0, height: float = 3.4, columns: int = 1, rows: int = 1
) -> tuple[Figure, Any]:
    """A figure and its axes in the report's style; never opens a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    for ax in np.atleast_1d(axes).flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def tile(
    images: np.ndarray,
    columns: int,
    *,
    frames: Sequence[str] | None = None,
    pad: int = 3,
) -> np.ndarray:
    """Lay images out in rows.

    Args:
        images: (N, H, W, 3) uint8, row by row.
        columns: images per row.
        frames: N colours as ``#rrggbb`` for a frame ``pad`` pixels wide around each; None leaves white.
        pad: pixels around each image.

    Returns:
        One (H', W', 3) uint8 image; missing places at the end are white.
    """
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    cell = np.array([height + 2 * pad + 2, width + 2 * pad + 2])
    sheet = np.full((rows * cell[0], columns * cell[1], 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * cell[0] + 1, (i % columns) * cell[1] + 1
        if frames is not None:
            sheet[top : top + height + 2 * pad, left : left + width + 2 * pad] = _rgb(frames[i])
        sheet[top + pad : top + pad + height, left + pad : left + pad + width] = image
    return sheet


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def render(template: str, **context: Any) -> str:
    """Fill ``diffalign/templates/<template>``; a name missing from the context is an error, not a blank."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).resolve().parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=True)
    environment.filters["percent"] = lambda x, digits=1: f"{100 * x:.{digits}f} %"
    environment.filters["points"] = lambda x: f"{100 * x:+.1f}"
    environment.filters["sci"] = lambda x: f"{x:.2e}"
    return environment.get_template(template).render(**context)


def versions() -> dict[str, str]:
    """Versions, processor and threads: what a number in a report depends on."""
    import platform
    from importlib import metadata

    import torch

    names = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "open-clip-torch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found | {
        "python": platform.python_version(),
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
