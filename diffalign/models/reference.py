"""Who plays the reference policy. Each kind is a context manager over the network in training that yields the
network to call, and puts everything back when it ends, also when it ends with an exception.

Adapters are switched by the two plain attributes that every peft layer reads in its forward. peft's own
``disable_adapters`` also flips ``requires_grad`` of every parameter, which would make a frozen second adapter
trainable and upsets data-parallel wrappers; it takes 8 ms where this takes 20 us.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Reference = Callable[[nn.Module], AbstractContextManager[nn.Module]]


def _adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[nn.Module]:
    """The network without its adapters: the reference of a LoRA that started from zero."""
    layers = _adapter_layers(module)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield module
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def named_adapter(name: str) -> Reference:
    """The network with adapter ``name`` alone: the reference of a LoRA that goes on from another one."""

    @contextmanager
    def switched(module: nn.Module) -> Iterator[nn.Module]:
        layers = _adapter_layers(module)
        before = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = [name]
        try:
            yield module
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer._active_adapter = value

    return switched


def frozen_copy(module: nn.Module, *, on_host: bool = False) -> Reference:
    """A copy of ``module`` as it is now: the reference of full fine-tuning. Costs its weights once more,
    where those are or, with `on_host`, in host memory; what it says then comes back to where it was asked."""
    reference = frozen(twin := copy.deepcopy(module))
    if not on_host:
        return reference
    place = next(module.parameters()).device
    twin.to("cpu")
    twin.register_forward_pre_hook(
        lambda _, args, named: (send_to_device(args, "cpu"), send_to_device(named, "cpu")), with_kwargs=True
    )
    twin.register_forward_hook(lambda _, inputs, output: send_to_device(output, place))

    @contextmanager
    def on_the_host(network: nn.Module) -> Iterator[nn.Module]:
        # In the precision of the policy's device, or margins would be the difference between two of them.
        kind = place.type
        precision = torch.autocast(
            "cpu", torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        with precision, reference(network) as copied:
            yield copied

    return on_the_host


def frozen(twin: nn.Module) -> Reference:
    """Another network in place of the one in training."""
    twin.requires_grad_(False).eval()

    @contextmanager
    def twin_instead(_: nn.Module) -> Iterator[nn.Module]:
        yield twin

    return twin_instead
