"""Tensors that belong to a scheduler: a safetensors file beside ``scheduler_config.json``.

A config can't hold tables fitted to a model. It holds a :class:`Record` instead: the name of the file, the
sha256 of its bytes, the version of the format. In memory the record also carries the tensors, so they survive
``from_config``; on disk they lie in the file, and :class:`~diffalign.solvers.scheduler.PlanScheduler` writes
and reads it with the config. A scheduler lists its options of this kind in ``_sidecars``.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.grids import LAMBDA_FLOOR
from diffalign.solvers.noise import NoiseSchedule

Array = NDArray[Any]

FILE = "scheduler_statistics.safetensors"
FORMAT = 1
_HEADER = "diffalign"  # one key, so that equal content gives equal bytes

# Relative to the range of half log-SNR: how far rounding may take a time out of the statistics' range.
RANGE_SLACK = 1e-5


class Record(dict[str, Any]):
    """``{"file", "sha256", "format"}``, which is what JSON keeps, and the content itself while in memory."""

    content: Sidecar | None = None


class Sidecar:
    """Immutable named arrays with JSON metadata. A subclass says how it becomes both and back."""

    kind: ClassVar[str]

    def arrays(self) -> dict[str, Array]:
        """What is saved."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """What is saved in the header; JSON."""
        raise NotImplementedError

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array], metadata: dict[str, Any]) -> Self:
        """The inverse of :meth:`arrays` and :meth:`metadata`."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        from safetensors.numpy import save

        try:
            header = json.dumps({"kind": self.kind, "format": FORMAT, **self.metadata()}, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise UserError(f"the info of statistics must be plain JSON: {error}") from error
        arrays = {name: np.ascontiguousarray(a) for name, a in self.arrays().items()}
        return bytes(save(arrays, metadata={_HEADER: header}))

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def record(self) -> Record:
        """What a config says of it."""
        record = Record(file=FILE, sha256=self.sha256, format=FORMAT)
        record.content = self
        return record

    def save(self, path: str | Path) -> Path:
        """Write the file whole or not at all."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(self.to_bytes())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            UserError: it is missing, damaged, of another kind or of a later format, or its hash differs.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise UserError(f"the statistics file {str(path)!r} is missing; copy it beside the config")
        if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(
                f"{str(path)!r} is not the file that its scheduler_config.json names (the hash differs); "
                "copy both files from the same folder"
            )
        try:
            with safe_open(path, framework="np") as file:
                header = dict(json.loads((file.metadata() or {}).get(_HEADER, "{}")))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, TypeError) as error:  # TypeError: a dtype that numpy lacks
            raise UserError(f"{str(path)!r} is damaged: {error}") from error
        kind, version = header.pop("kind", None), header.pop("format", None)
        if kind != cls.kind or version not in range(1, FORMAT + 1):
            raise UserError(
                f"{str(path)!r} holds {kind!r} in format {version}, not {cls.kind!r} up to format {FORMAT}"
            )
        try:
            return cls.from_arrays(arrays, header)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{str(path)!r} is incomplete: {type(error).__name__} {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@dataclass(frozen=True, eq=False)
class Statistics(Sidecar):
    """The empirical model statistics of DPM-Solver-v3 (Zheng et al. 2023): l, s, b over half log-SNR.

    Per coordinate of the latent; an axis of length 1 serves all of it, so tables of shape ``(C, 1, 1)`` fit
    every resolution. l, s and b belong together: from one estimate, for one model and guidance scale.

    Args:
        lambdas: (N + 1,) uniform and increasing, from the noisy end.
        l, s, b: (N + 1, C, ...) numpy arrays or tensors; float32, or float64 which is kept.
        schedule: fingerprint of the noise schedule they were estimated on; "" if unknown, which is not
            checked.
        info: how they came about, JSON: ``guidance_scale``, ``samples``, ``model``, ``pooled``, ...

    Raises:
        UserError: shapes differ, a number is not finite, or `lambdas` is not uniform.
    """

    lambdas: NDArray[np.float64]
    l: Array  # noqa: E741
    s: Array
    b: Array
    schedule: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "ems"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lambdas", _frozen(self.lambdas, np.float64))
        for name in "lsb":
            value = _frozen(getattr(self, name))
            object.__setattr__(self, name, value)
            if value.shape != self.l.shape or value.ndim < 2 or len(value) != len(self.lambdas):
                raise UserError(
                    f"l, s and b must share the shape ({len(self.lambdas)}, C, ...), one row per lambda, but "
                    f"{name} is {value.shape} and l is {self.l.shape}"
                )
            if not np.all(np.isfinite(value)):
                raise UserError(f"statistics {name} hold numbers that are not finite; estimate them anew")
        gaps = np.diff(self.lambdas)
        # Written so that numbers that are not finite fail as well.
        if len(gaps) < 1 or not (gaps[0] > 0 and np.ptp(gaps) <= 1e-4 * gaps[0]):
            raise UserError("the lambdas of statistics must be two or more, uniform and increasing")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row: the latent's, with 1 for pooled axes."""
        return tuple(self.l.shape[1:])

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """UserError unless they were made for `schedule` and cover its sampling range."""
        if self.schedule and self.schedule != schedule.fingerprint():
            raise UserError(
                "these statistics were estimated on another noise schedule; load those of this model, or "
                "pass statistics=None to sample without"
            )
        low, high = sampling_range(schedule)
        slack = 0.01 * (high - low)
        if self.lambdas[0] > low + slack or self.lambdas[-1] < high - slack:
            raise UserError(
                f"statistics cover half log-SNR {self.lambdas[0]:.3f} to {self.lambdas[-1]:.3f}, but this "
                f"schedule samples from {low:.3f} to {high:.3f}; estimate them on it, or pass statistics=None"
            )

    def check_sample(self, shape: Sequence[int]) -> None:
        """UserError unless they fit samples of `shape` (B, C, ...)."""
        fits = len(shape) == len(self.shape) + 1 and all(
            a in (1, b) for a, b in zip(self.shape, shape[1:], strict=True)
        )
        if not fits:
            raise UserError(
                f"statistics of shape {self.shape} don't fit a latent of shape {tuple(shape[1:])}; sample at "
                "the size they were estimated at, or use statistics.pooled(), which fits every size"
            )

    def pooled(self, over: str = "space") -> Statistics:
        """Means over ``"space"`` (all axes but the channels) or ``"all"``; not in the paper.

        They fit every resolution, and need some hundred times fewer samples.
        """
        if over not in ("space", "all"):
            raise UserError(f"statistics can be pooled over 'space' or 'all', not {over!r}")
        axes = tuple(range(2 if over == "space" else 1, self.l.ndim))
        means = {name: getattr(self, name).mean(axes, dtype=np.float64, keepdims=True) for name in "lsb"}
        arrays = {name: mean.astype(self.l.dtype) for name, mean in means.items()}
        return replace(self, **arrays, info={**self.info, "pooled": over})

    @classmethod
    def from_npz(
        cls,
        l: str | Path,  # noqa: E741
        sb: str | Path,
        *,
        schedule: NoiseSchedule,
        lambdas: ArrayLike | None = None,
        **info: Any,
    ) -> Statistics:
        """Read the published pair of files, ``l.npz`` and ``sb.npz``.

        Args:
            l, sb: the files.
            schedule: of the model.
            lambdas: (N + 1,) of their rows; uniform over the range of `schedule` unless given, as published.
            info: kept with them, such as ``guidance_scale=7.5``.

        Raises:
            UserError: a file is no such archive of numbers. Pickles are never opened.
        """
        arrays = {**_npz(l, "l"), **_npz(sb, "sb")}
        if lambdas is None:
            lambdas = np.linspace(*sampling_range(schedule), len(arrays["l"]))
        rows = arrays["l"], arrays["s"], arrays["b"]
        return cls(np.asarray(lambdas), *rows, schedule=schedule.fingerprint(), info=info)

    def arrays(self) -> dict[str, Array]:
        return {"lambdas": self.lambdas, "l": self.l, "s": self.s, "b": self.b}

    def metadata(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "info": dict(self.info)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array], metadata: dict[str, Any]) -> Statistics:
        rows = arrays["l"], arrays["s"], arrays["b"]
        return cls(arrays["lambdas"], *rows, metadata["schedule"], dict(metadata["info"]))


def sampling_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Half log-SNR from the noisy end, or -5.1 where that is lower, to ``t_min``."""
    low = max(float(schedule.lambda_(schedule.t_max)), LAMBDA_FLOOR)
    return low, float(schedule.lambda_(schedule.t_min))


def _frozen(value: Any, dtype: Any = None) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value if value.dtype == torch.float64 else value.float()).numpy()
    array = np.asarray(value)
    if dtype is None:
        dtype = np.float64 if array.dtype == np.float64 else np.float32
    array = np.array(array, dtype=dtype)
    array.flags.writeable = False
    return array


def _npz(path: str | Path, names: str) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"there is no file {str(path)!r}; the published pair is l.npz and sb.npz") from error
    # A plain .npy file is an array, which is no context manager and has no names.
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"{str(path)!r} is no .npz file with plain arrays {', '.join(names)}") from error
