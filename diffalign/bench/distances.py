"""How far images are from the converged ones, as eyes would see it: functions of two batches of images.

What they need is loaded when they are made, before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError, suggestion

# (N, H, W, 3) uint8, and the converged images, to (N,) numbers; 0 for equal images
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Networks of LPIPS: that of the published numbers, that of most losses, and the smallest.
LPIPS_NETWORKS = ("alex", "vgg", "squeeze")
#: Rewards that are a CLIP.
_CLIPS = ("playground/scorer", "clip", "pickscore", "hpsv2")
_BATCH = 32


def load_distances(specs: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Distance]:
    """``["lpips", "clip=path"]`` to distances by the name of their metric.

    ``lpips`` (``lpips=vgg`` for another network) is ``lpips``; a CLIP among the rewards, by its name and
    folder, is ``feature_distance``.

    Raises:
        UserError: an unknown name, a reward that is no CLIP, one metric twice, an unknown network, or missing
            weights.
    """
    from diffalign.rewards import REWARDS, load_reward

    found: dict[str, Distance] = {}
    for spec in specs:
        name, _, rest = spec.partition("=")
        known = ["lpips", *_CLIPS]
        if name not in (*known, *REWARDS):
            raise UserError(f"no distance {name!r}{suggestion(name, known)} (known: {', '.join(known)})")
        if name == "lpips":
            metric, distance = "lpips", lpips_distance(rest or LPIPS_NETWORKS[0], device)
        else:
            metric, distance = (
                "feature_distance",
                clip_distance(load_reward(name, rest or None, device=device)),
            )
        if metric in found:
            raise UserError(f"--distances names two for the metric {metric}; give one")
        found[metric] = distance
    return found


def lpips_distance(network: str = "alex", device: str | torch.device = "cpu") -> Distance:
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018), by the authors' package.

    Args:
        network: one of :data:`LPIPS_NETWORKS`. Its ImageNet weights come from torchvision, which downloads
            them once into torch's hub folder.
        device: to run on.

    Raises:
        UserError: the package is not installed, or the weights can neither be found nor downloaded.
    """
    if network not in LPIPS_NETWORKS:
        raise UserError(
            f"LPIPS has no network {network!r}; it has {', '.join(LPIPS_NETWORKS)}"
            f"{suggestion(network, list(LPIPS_NETWORKS))}"
        )
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            "--distances lpips needs the package lpips: pip install 'diffalign[metrics]'"
        ) from error
    try:
        model: Any = lpips.LPIPS(net=network, verbose=False).to(device).requires_grad_(False)
    except OSError as error:
        raise UserError(
            f"LPIPS needs torchvision's ImageNet weights of {network}, which are not in "
            f"{torch.hub.get_dir()}/checkpoints and could not be downloaded: {error}"
        ) from error

    def between(ours: Tensor, exact: Tensor) -> Tensor:
        return model(ours, exact, normalize=True).flatten()

    return _in_batches(between, device)


def clip_distance(reward: Any) -> Distance:
    """One minus the cosine between image features of a CLIP reward.

    Raises:
        UserError: it is no CLIP.
    """
    from diffalign.rewards.clip import ClipReward

    if not isinstance(reward, ClipReward):
        raise UserError(
            f"reward {getattr(reward, 'name', reward)} has no image features; take lpips or one that is a "
            f"CLIP: {', '.join(_CLIPS)}"
        )

    def between(ours: Tensor, exact: Tensor) -> Tensor:
        a, b = (reward.clip.images(reward.square(images)) for images in (ours, exact))
        return 1 - torch.cosine_similarity(a, b)

    return _in_batches(between, reward.device)


def _in_batches(between: Callable[[Tensor, Tensor], Tensor], device: str | torch.device) -> Distance:
    """A distance of (B, 3, H, W) images in [0, 1] on a device, as one of any number of stored images."""

    @torch.no_grad()
    def distance(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(ours), _BATCH):
            pair = (
                torch.from_numpy(images[start : start + _BATCH]).to(device).permute(0, 3, 1, 2).float() / 255
                for images in (ours, exact)
            )
            found.append(between(*pair).double().cpu().numpy())
        return np.concatenate(found)

    return distance
