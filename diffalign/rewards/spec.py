"""What a configuration says about rewards; light, for options that are read before torch is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Aggregate = Literal["sum", "wco", "uwo"]
Preprocess = Literal["tensor", "pil"]


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a configuration file.

    Attributes:
        name: its name in `REWARDS`.
        path: folder, file or hub id of its weights, where it has any.
        weight: what its score is multiplied with.
        at_least: makes it a gate: it adds nothing to the score, but an image that it scores below this is
            rejected.
        options: what else its loader takes, such as {clip: openai/clip-vit-large-patch14}.
    """

    name: str
    path: str | None = None
    weight: float = 1.0
    at_least: float | None = None
    options: dict[str, str] = field(default_factory=dict)
