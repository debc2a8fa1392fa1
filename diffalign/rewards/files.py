"""Where the weights of rewards come from: local folders and files, or the hub when it is asked for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.errors import UserError

# Of a transformers or open_clip repository: one set of weights, its configuration and its tokenizer.
MODEL_FILES = (
    "*config.json",
    "model*.safetensors*",
    "open_clip_model.safetensors",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "step_aware.*",  # of our own rewards
    "heads.*",
)


def local(path: str | Path, *, reward: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """A file or folder on this machine: `path` itself, a model of the playground, or a copy of the hub's
    `files` if it is an id.

    Nothing is downloaded for a path that exists, and only `files` for ``owner/name``.

    Args:
        reward: the reward that wants it, for messages.
        files: patterns of what is fetched from the hub.

    Raises:
        UserError: neither a path nor an id, or the hub has no such thing.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    text = str(path)
    if text.startswith("playground/"):
        from diffalign.playground import model_path

        return model_path(text)
    if len(folder.parts) != 2 or text.startswith(("/", ".", "~")):
        raise UserError(
            f"reward {reward}: nothing is at {text}; give a folder, a file or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"reward {reward}: {text} is no folder here, and could not be read from the hub "
            f"({_cause(error)}); give a folder or file, or an id that you can reach"
        ) from error


def needed(path: str | Path | None, *, reward: str, example: str) -> str | Path:
    """`path`, which must have been given.

    Raises:
        UserError: it was not; `example` says where such weights are.
    """
    if not path:
        raise UserError(
            f"reward {reward} needs weights: give their path, a local folder or file, or the hub id {example}"
        )
    return path


def one_file(path: Path, names: Sequence[str], *, reward: str) -> Path:
    """`path` if it is a file, else the first of `names` in that folder.

    Raises:
        UserError: the folder has none.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"reward {reward}: {path} has none of {', '.join(names)}; give the file itself")


def read_weights(path: Path, *, reward: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a published ``.pt``/``.pth`` (read without unpickling
    anything but tensors); what lies under ``state_dict`` is taken if there is such a key.

    Raises:
        UserError: it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(
            f"reward {reward}: {path} could not be read as weights ({_cause(error)}); give a .safetensors "
            "file, or the published file as it is"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"reward {reward}: {path} holds no tensors by name; give the published file as it is")
    return tensors


def fill(module: nn.Module, state: Mapping[str, Tensor], *, reward: str, path: Path) -> None:
    """Load `state` into `module`: every weight must be there and fit.

    Raises:
        UserError: names what is missing or has another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise UserError(
            f"reward {reward}: {path} is of another model: {len(missing)} weights are missing, such as "
            f"{missing[0]}"
        )
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise UserError(
            f"reward {reward}: {path} is of another model: {wrong[0]} is {tuple(state[wrong[0]].shape)}, "
            f"not {tuple(own[wrong[0]].shape)}"
        )
    module.load_state_dict({name: state[name] for name in own})


def affine(state: Mapping[str, Tensor], *, reward: str, path: Path) -> tuple[Tensor, Tensor]:
    """Fold ``layers.<i>.weight`` and ``.bias``, linear layers with nothing but dropout between them, into
    one: ``x -> x @ weight + bias``.

    Returns:
        ``(inputs, outputs)`` and ``(outputs,)``, float32; multiplied in float64.

    Raises:
        UserError: there are no such layers.
    """
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
    try:
        layers = [(state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()) for i in numbers]
        weight, bias = layers[0][0].T, layers[0][1]
        for matrix, offset in layers[1:]:
            weight, bias = weight @ matrix.T, bias @ matrix.T + offset
    except (IndexError, KeyError, RuntimeError) as error:
        raise UserError(
            f"reward {reward}: {path} has no chain of layers.<i>.weight and layers.<i>.bias; give the "
            "published file as it is"
        ) from error
    return weight.float(), bias.float()


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
