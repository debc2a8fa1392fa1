"""Reward models: how good is an image for a prompt?

    from diffalign.rewards import load_reward

    reward = load_reward("pickscore", "models/PickScore_v1", device="cuda")
    scores = reward.score(images, prompts)  # (B, 3, H, W) in [0, 1] and B texts -> (B,), differentiable

`REWARDS` is the table of names. Nothing is downloaded unless a hub id is given.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffalign.errors import UserError, suggestion
from diffalign.rewards.spec import Aggregate, Preprocess, RewardSpec

if TYPE_CHECKING:
    from diffalign.rewards.base import Reward, score_images
    from diffalign.rewards.ensemble import Ensemble, Member

__all__ = [
    "Aggregate",
    "Ensemble",
    "Member",
    "REWARDS",
    "Reward",
    "RewardSpec",
    "load_reward",
    "load_rewards",
    "score_images",
]


# These need torch; each loads its module on first use.
_LAZY = {"Reward": "base", "score_images": "base", "Ensemble": "ensemble", "Member": "ensemble"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Entry:
    """A row of `REWARDS`: who loads it ("module:function") and what it measures."""

    loader: str
    measures: str


REWARDS: dict[str, Entry] = {
    "pickscore": Entry("pickscore:load", "which of two images people choose"),
    "clip": Entry("clip_score:load", "how well an image fits its caption"),
    "hpsv2": Entry("hpsv2:load", "how people rank images of one prompt"),
    "aesthetic": Entry("aesthetic:load", "how pretty an image is, whatever the prompt"),
    "image-reward": Entry("image_reward:load", "what experts prefer, text and image read together"),
    "step-aware": Entry("step_aware:load", "what people choose, of images predicted at a noisy time"),
    "multi-head": Entry("multi_head:load", "several aspects, standardised and added"),
    "jpeg-compressibility": Entry("jpeg:compressibility", "how small the image is as JPEG"),
    "jpeg-incompressibility": Entry("jpeg:incompressibility", "how large the image is as JPEG"),
    "playground/scorer": Entry("playground:scorer", "the playground's learned preference"),
    "playground/verifier": Entry("playground:Verifier", "whether a playground caption is true, exactly"),
}


def load_reward(
    name: str,
    path: str | Path | None = None,
    *,
    device: Any = "cpu",
    preprocess: Preprocess = "tensor",
    **options: Any,
) -> Reward:
    """A reward by its name in `REWARDS`.

    Args:
        path: folder, file or hub id of the weights, for those that have some.
        device: where it goes.
        preprocess: ``tensor`` (differentiable) or ``pil`` (as released scorers do), for those that resize.
        options: what else the loader takes, such as ``clip=`` of ``aesthetic``.

    Raises:
        UserError: no such reward, an option that it does not have, or weights that cannot be used.
    """
    if name not in REWARDS:
        raise UserError(f"no reward {name!r}{suggestion(name, list(REWARDS))} (known: {', '.join(REWARDS)})")
    if preprocess not in get_args(Preprocess):
        raise UserError(f"preprocess must be one of {', '.join(get_args(Preprocess))}, not {preprocess!r}")
    module, _, function = REWARDS[name].loader.partition(":")
    loader = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    known = inspect.signature(loader).parameters
    given = options | ({"path": path} if path else {})
    if "preprocess" in known:
        given["preprocess"] = preprocess
    for option in given:
        if option not in known or option == "name":
            takes = ", ".join(k for k in known if k != "name") or "none"
            raise UserError(f"reward {name} has no option {option!r} (its options: {takes})")
    return loader(**given).to(device)


def load_rewards(
    rewards: Sequence[str | RewardSpec],
    *,
    aggregate: Aggregate = "sum",
    coefficient: float = 1.0,
    rejected_score: float | None = None,
    device: Any = "cpu",
    preprocess: Preprocess = "tensor",
) -> Ensemble:
    """The rewards of a configuration as one.

    Args:
        rewards: specs, or names, with their weights after an equals sign: ``pickscore=models/PickScore_v1``.
        aggregate, coefficient, rejected_score: see :class:`Ensemble`.
        device, preprocess: see :func:`load_reward`; a spec's own ``options`` come first.

    Raises:
        UserError: as :func:`load_reward` and :class:`Ensemble`.
    """
    from diffalign.rewards.ensemble import Ensemble, Member

    members = []
    for given in rewards:
        spec = _spec(given) if isinstance(given, str) else given
        options: dict[str, Any] = {"preprocess": preprocess} | spec.options
        reward = load_reward(spec.name, spec.path, device=device, **options)
        members.append(Member(reward, spec.weight, spec.at_least))
    if not members:
        raise UserError(f"rewards must name at least one of {', '.join(REWARDS)}")
    return Ensemble(members, aggregate=aggregate, coefficient=coefficient, rejected_score=rejected_score).to(
        device
    )


def _spec(text: str) -> RewardSpec:
    if text.startswith(("{", "[")):  # a mapping of other keys or types arrives as it was written
        raise UserError(
            f"rewards: {text} is not of the form {{name: ..., path: ..., weight: ..., at_least: ..., "
            "options: {...}} (all but name may be left out)"
        )
    name, _, path = text.partition("=")
    return RewardSpec(name, path or None)
