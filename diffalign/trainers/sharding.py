"""Weights that are split over processes (FSDP2): from the parts to the whole and back.

A plain tensor passes through unchanged, so callers need not know which kind they hold.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that `tensor` is a part of, on its device; all processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole `tensor` on the device of `like`, split over the processes as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gathered(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name in host memory, where `keep` is true; all processes call it together."""
    found = {}
    for name, tensor in named:
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found
