"""Trajectories on disk: images to be judged, and the states that led to them.

A folder has, for image k of prompt p, ``images/00003-1.png``; ``trajectories/00003.safetensors`` with
``states (K, n + 1, C, h, w)`` of all images of a prompt; ``metadata.jsonl``, which makes it a data set that
``diffalign vote`` and ``diffalign data score`` take; and ``rollout.json``: how it was sampled. A prompt is
there when its line in ``metadata.jsonl`` is, so a folder whose writing was cut off can be gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.output import write_json, write_text

METADATA = "metadata.jsonl"
SETTINGS = "rollout.json"


class Trajectories:
    """A folder of trajectories.

    Attributes:
        folder: where it is.
        settings: how they were sampled.
        images: prompt -> its images, as paths relative to the folder, in the order of the states.

    Raises:
        UserError: it is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            before_windows = {"prompt_windows": 1}  # of folders that are older than this setting
            self.settings: dict[str, Any] = before_windows | json.loads((self.folder / SETTINGS).read_text())
            lines = (self.folder / METADATA).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            self.images: dict[str, list[str]] = {}
            self._files: dict[str, str] = {}
            for row in rows:
                self.images.setdefault(row["prompt"], []).append(row["file_name"])
                self._files[row["prompt"]] = row["trajectory"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no trajectories ({error}): write some with 'diffalign rollout'"
            ) from error

    def states(self, prompt: str) -> Tensor:
        """``(K, n + 1, C, ...)`` of a prompt's images, in the precision of the network that saw them.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / self._files[prompt]
        try:
            return load_file(path)["states"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): sample this prompt again") from error


def start(folder: Path, settings: Mapping[str, Any]) -> set[str]:
    """Begin a folder, or go on with one that was sampled in the same way; the prompts that it has.

    Raises:
        UserError: it was sampled in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).is_file():
        write_json(folder / SETTINGS, dict(settings))  # first: what is cut off is known by it
    for name in ("images", "trajectories"):
        (folder / name).mkdir(exist_ok=True)
    if not (folder / METADATA).is_file():
        write_text(folder / METADATA, "")
    found = Trajectories(folder)
    wanted = json.loads(json.dumps(dict(settings)))
    other = [name for name, value in wanted.items() if found.settings.get(name) != value]
    if other:
        raise UserError(
            f"{folder} was sampled with another {', '.join(other)}: go on as before, or choose another folder"
        )
    return set(found.images)


def add(folder: Path, number: int, prompt: str, images: Sequence[Image.Image], states: Tensor) -> None:
    """Write the images and states of one prompt, its lines last."""
    name = f"trajectories/{number:05d}.safetensors"
    part = folder / f"{name}.part"
    save_file({"states": states.contiguous()}, part)
    part.replace(folder / name)
    rows = []
    for k, image in enumerate(images):
        file = f"images/{number:05d}-{k}.png"
        image.save(folder / file)
        rows.append({"file_name": file, "prompt": prompt, "trajectory": name})
    known = (folder / METADATA).read_text(encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / METADATA, known + lines)
