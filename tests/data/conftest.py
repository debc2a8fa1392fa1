"""Small images and pair sets."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from diffalign.data import PairDataset


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A noise image of (width, height), its pixels a function of `seed`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jsonl_folder(folder, rows: list) -> object:
    """A folder with pairs.jsonl; cells of bytes become image files, rows that are strings go in as lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            row = dict(row)
            for side, value in row.items():
                if isinstance(value, bytes):
                    row[side] = f"{number}_{side}.png"
                    (folder / row[side]).write_bytes(value)
            row = json.dumps(row)
        lines.append(row)
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def lists(count: int, prompts: int = 3, size: tuple[int, int] = (16, 16)) -> PairDataset:
    """`count` good pairs in memory over a few prompts."""
    return PairDataset.from_lists(
        [f"prompt {i % prompts}" for i in range(count)],
        [picture(2 * i, size) for i in range(count)],
        [picture(2 * i + 1, size) for i in range(count)],
    )


class Helpers:
    """The functions above, for tests to reach through a fixture."""

    picture = staticmethod(picture)
    encoded = staticmethod(encoded)
    jsonl_folder = staticmethod(jsonl_folder)
    lists = staticmethod(lists)


@pytest.fixture(scope="session")
def make() -> type[Helpers]:
    return Helpers


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path, monkeypatch):
    """What `datasets` prepares from parquet stays in the test's own folder."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
