"""What a run asks of the network, counted on the network and not by trust."""

from __future__ import annotations

from typing import Any

from torch import nn


class Meter:
    """Counts the evaluations of a network: a row of a batch is one, or three if a gradient will go back
    through it, which costs twice the way there.

    Copies of the network that are made later, such as a frozen reference, count as well. A row that is
    evaluated twice to save memory counts twice, but blocks that gradient checkpointing runs again do not.
    """

    def __init__(self, network: nn.Module) -> None:
        self.total = 0

        # A function, and not a method, since a copy of the network would copy the meter of a method.
        def count(_network: nn.Module, _inputs: Any, output: Any) -> None:
            rows = output[0]
            self.total += len(rows) * (3 if rows.requires_grad else 1)

        network.register_forward_hook(count)
