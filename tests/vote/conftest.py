"""Small folders of images to vote on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.vote.ballot import Ballot
from diffalign.vote.sets import ImageSet, arrange, read_sets


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """A noise image of (width, height), its pixels a function of `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def sampled(folder: Path, prompts: dict[str, int]) -> Path:
    """What ``diffalign sample`` writes: so many images of each prompt and metadata.jsonl."""
    rows = [{"prompt": prompt} for prompt, number in prompts.items() for _ in range(number)]
    for number, row in enumerate(rows):
        row["file_name"] = picture(folder / f"{number:05d}.png", number).name
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tasks_of(source: Path, mode: str = "pair", **options) -> list[ImageSet]:
    """What there is to judge, in a fixed order."""
    return arrange(read_sets(source)[0], mode, **{"set_size": 9, "per_prompt": None, "seed": 0} | options)


def ballot_of(folder: Path, mode: str = "pair", annotator: str = "anna", **options) -> Ballot:
    """A ballot on all of a folder, that writes to its votes.jsonl."""
    return Ballot(tasks_of(folder, mode), folder / "votes.jsonl", mode=mode, annotator=annotator, **options)


def rows_of(file: Path) -> list[dict]:
    """The rows of a votes file; every line of it is whole."""
    data = file.read_bytes() if file.exists() else b""
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


class Helpers:
    """The functions above, for tests to reach through a fixture."""

    picture = staticmethod(picture)
    sampled = staticmethod(sampled)
    tasks_of = staticmethod(tasks_of)
    ballot_of = staticmethod(ballot_of)
    rows_of = staticmethod(rows_of)


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of one prompt, two of another: four pairs, two sets."""
    return sampled(tmp_path / "images", {"a red star": 3, "two blue rings": 2})
