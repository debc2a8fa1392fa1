"""Checkpoints: folders ``checkpoint-<step>`` that are either whole or not there, and hold no pickle.

A checkpoint is written into a hidden folder and renamed when complete, so a process killed at any moment
leaves the earlier ones as they were.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError

PREFIX = "checkpoint-"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted((p for p in found if (p / STATE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def resolve(choice: str, folder: Path) -> Path | None:
    """What ``resume_from_checkpoint`` means: ``latest``, ``auto`` (None if there is no checkpoint), or a
    path.

    Raises:
        UserError: there is no such checkpoint.
    """
    if choice in ("latest", "auto"):
        found = checkpoints(folder)
        if not found and choice == "latest":
            raise UserError(
                f"there is no checkpoint in {folder} to resume from; leave out --resume_from_checkpoint, or "
                "set it to auto to start from the beginning in that case"
            )
        return found[-1] if found else None
    for path in (Path(choice).expanduser(), folder / choice):
        if (path / STATE).is_file():
            return path
    raise UserError(f"{choice} is no checkpoint: it has no {STATE}")


def write(folder: Path, step: int, fill: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Let ``fill`` write the weights into a new checkpoint, add ``state`` as JSON, and make it visible."""
    target = folder / f"{PREFIX}{step}"
    part = folder / f".{PREFIX}{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    (part / STATE).write_text(json.dumps(state, indent=2) + "\n")
    if target.exists():  # a run that resumed from an earlier one writes it again
        shutil.rmtree(target)
    part.rename(target)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON that :func:`write` stored."""
    return json.loads((checkpoint / STATE).read_text())


def rotate(folder: Path, limit: int | None) -> None:
    """Delete all but the newest ``limit`` checkpoints. Called after a new one is complete, never before."""
    for path in checkpoints(folder)[: -limit if limit else 0]:
        shutil.rmtree(path)


def clear(folder: Path) -> None:
    """Delete every checkpoint, whole or partial."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*.part")]:
        if path.is_dir():
            shutil.rmtree(path)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Write the tensors of the optimiser's state; returns the rest of it, as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(number), {})[name] = value
    save_file(tensors, folder / OPTIMIZER)
    return {"param_groups": state["param_groups"], "scalars": scalars}


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rest: dict[str, Any]) -> None:
    """Inverse of :func:`save_optimizer`, exact to the bit.

    Raises:
        UserError: the checkpoint belongs to a run with other trainable weights.
    """
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in rest["scalars"].items()}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except ValueError as error:
        raise UserError(f"{folder} belongs to a run with other trainable weights: {error}") from error


def save_named(names: Iterable[str], tensors: Iterable[Tensor], path: Path) -> None:
    """Write tensors under their names."""
    save_file({n: t.detach().cpu().contiguous() for n, t in zip(names, tensors, strict=True)}, path)
