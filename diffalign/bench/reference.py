"""The converged solution of a pipeline: where infinitely many steps would have ended, and how sure that is.

It is drawn by the pipeline itself, so guidance, text encoders and shifts are those of every other sampler,
for any family. The number of steps is doubled until the result stands still, and how far it still moved is
its error estimate. It is kept on disk under a hash of all that it depends on, weights included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffalign.bench.kept import Piece, keep, key
from diffalign.models.base import digest
from diffalign.pipelines.generate import Samples

#: The sampler that converges: third order, the whole range of noise, down to the clean image.
CONVERGING: dict[str, Any] = {"solver_order": 3, "grid": "logsnr"}
_FIRST_STEPS = 25


@dataclass(frozen=True)
class Reference:
    """What every sampler's result is compared with.

    Attributes:
        latents: (N, ...) float32 or float64.
        images: (N, H, W, 3) uint8, or None where nothing is decoded.
        moved: (N,) how far each still moved when the steps were doubled for the last time, as a relative
            error. That is the error of half the steps, so a cautious estimate; 0 for an exact solution.
        steps: of the solution; 0 for an exact one.
    """

    latents: torch.Tensor
    images: np.ndarray | None
    moved: np.ndarray
    steps: int = 0

    @property
    def error(self) -> float:
        """Mean of ``moved``: what a difference between samplers must exceed to mean anything."""
        return float(self.moved.mean())


def relative_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||z - z*|| / ||z*|| of each row: two tensors (N, ...) to (N,)."""
    difference = (latents - reference).flatten(1).norm(dim=1)
    return difference / reference.flatten(1).norm(dim=1)


def ladder(most: int) -> list[int]:
    """Numbers of steps to try, each about twice the one before, the last of them `most`; at least two."""
    steps = [most]
    while steps[0] // 2 >= _FIRST_STEPS or len(steps) < 2:
        steps.insert(0, max(1, steps[0] // 2))
    return steps


def converge(draw: Callable[[int], Samples], *, tolerance: float, most: int) -> Reference:
    """Double the steps until the mean relative movement is at most `tolerance`.

    Args:
        draw: number of steps to samples, always from the same noises.
        tolerance: of the mean over the samples.
        most: steps at which it ends in any case; it also ends where two doublings don't halve the movement,
            which is where rounding takes over.
    """
    steps = ladder(most)
    coarse, history = draw(steps[0]), []
    for n in steps[1:]:
        fine = draw(n)
        moved = relative_errors(coarse.latents, fine.latents).nan_to_num(torch.inf)
        history.append(float(moved.mean()))
        coarse = fine
        if history[-1] <= tolerance or (len(history) > 2 and history[-1] > history[-3] / 2):
            break
    return Reference(fine.latents, fine.images, moved.double().numpy(), n)


def kept_reference(
    folder: Path | None, identity: Mapping[str, Any], make: Callable[[], Reference]
) -> Reference:
    """The reference of a problem with this `identity`, from `folder` if it is there, else made and kept."""

    def made() -> Piece:
        found = make()
        arrays = {"latents": found.latents.numpy(), "moved": found.moved}
        arrays |= {} if found.images is None else {"images": found.images}
        return Piece({"steps": found.steps}, arrays)

    piece = keep(folder, key(identity), made)
    latents = torch.from_numpy(np.array(piece.arrays["latents"]))  # a copy that may be written to
    return Reference(latents, piece.arrays.get("images"), piece.arrays["moved"], piece.facts["steps"])


def default_cache() -> Path:
    """``~/.cache/diffalign/references``, or below ``XDG_CACHE_HOME``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "diffalign" / "references"


def weights_identity(pipe: Any) -> dict[str, Any]:
    """What a pipeline's images depend on beside its scheduler: class, weights, and how LoRAs are mixed in."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    adapters = [
        f"{name}.{place} {module.scaling} {module.active_adapters} {module.disable_adapters}"
        for name, part in parts.items()
        for place, module in part.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "active_adapters")
    ]
    weights = {name: digest(part.state_dict()) for name, part in parts.items()}
    return {"pipeline": type(pipe).__name__, "weights": weights, "adapters": adapters}


@contextmanager
def in_dtype(pipe: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """The pipeline in another precision while the block runs, then the very weights that it had."""
    if dtype is None:
        yield
        return
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = [(tensor, tensor.data) for part in parts for tensor in part.parameters()]
    buffers = [(module, dict(module._buffers)) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.to(dtype)
        yield
    finally:
        for tensor, data in weights:
            tensor.data = data
        for module, own in buffers:
            module._buffers.update(own)


def finest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The most precise of `dtypes`."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
