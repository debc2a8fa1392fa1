"""Checkpoints: folders ``checkpoint-<step>`` that are either whole or not there, and hold no pickle.

A checkpoint is written into a hidden folder and renamed when complete, and renamed again before it is
deleted. So a process killed at any moment, or a full disk, leaves nothing that looks like a checkpoint and is
none.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import RunFailed, UserError, describe
from diffalign.trainers.sharding import gathered, split_as

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
PARTIAL = ".part"
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
    there = ", ".join(path.name for path in checkpoints(folder)) or "none"
    raise UserError(f"{choice} is no checkpoint: it has no {STATE} (checkpoints in {folder}: {there})")


def write(folder: Path, step: int, fill: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Let ``fill`` write the weights into a new checkpoint, add ``state`` as JSON, and make it visible.

    Raises:
        RunFailed: it could not be written, above all for want of space; the earlier ones are untouched.
    """
    target = folder / f"{PREFIX}{step}"
    part = _hidden(target)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fill(part)
        (part / STATE).write_text(json.dumps(state, indent=2) + "\n")
        for path in part.rglob("*"):
            if path.is_file():
                _flush(path)
        if target.exists():  # of a run that took another way from an earlier state
            _delete(target)
        part.rename(target)
    except (OSError, SafetensorError) as error:
        last = checkpoints(folder)
        rest = f"--resume_from_checkpoint latest goes on from {last[-1].name}" if last else "it is the first"
        raise RunFailed(f"{target.name} was not written ({rest}): {describe(error)[0]}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _hidden(checkpoint: Path) -> Path:
    """The name under which a checkpoint is written and deleted."""
    return checkpoint.with_name(f".{checkpoint.name}{PARTIAL}")


def _flush(path: Path) -> None:
    """Make sure that the file is on the disk; a network drive may find only now that it is full."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that no part of it looks like one in between."""
    part = _hidden(checkpoint.with_name(f"{checkpoint.name}.old"))
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(part))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON that :func:`write` stored."""
    return json.loads((checkpoint / STATE).read_text())


def rotate(folder: Path, limit: int | None) -> None:
    """Delete all but the newest ``limit`` checkpoints. Called after a new one is complete, never before."""
    for path in checkpoints(folder)[: -limit if limit else 0]:
        _delete(path)


def clear(folder: Path) -> None:
    """Delete every checkpoint, whole or partial."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.is_dir():
            _delete(path)
    rewind(folder, 0)


def rewind(folder: Path, step: int) -> None:
    """Make ``step`` the newest state: delete what killed runs left half done, and set aside later checkpoints
    as ``checkpoint-<step>.old``, since the run that goes on from here writes others in their place."""
    for path in folder.glob(f".{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.old")
            if aside.exists():
                _delete(aside)
            logger.warning("%s is from a later step than %d: now %s", path, step, path.rename(aside).name)


def optimizer_state(
    optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the optimiser's state, whole and on the host where `keep` is true, and the rest of it,
    as JSON values; with weights split over processes all call it together."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                scalars.setdefault(str(number), {})[name] = value
    return gathered(tensors.items(), keep=keep), {"param_groups": state["param_groups"], "scalars": scalars}


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rest: dict[str, Any]) -> None:
    """Inverse of :func:`optimizer_state`, whose tensors lie in ``folder``, exact to the bit.

    Raises:
        UserError: the checkpoint belongs to a run with other trainable weights.
    """
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in rest["scalars"].items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in load_file(folder / OPTIMIZER).items():
        number, name = key.split(".", 1)
        if int(number) < len(parameters) and tensor.shape == parameters[int(number)].shape:
            tensor = split_as(tensor, parameters[int(number)])
        state.setdefault(int(number), {})[name] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except ValueError as error:
        raise UserError(f"{folder} belongs to a run with other trainable weights: {error}") from error
