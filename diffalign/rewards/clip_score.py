"""CLIP score (Hessel et al. 2021): ``100 cos(image, text)``, how well an image fits its caption.

Unlike the published metric it is not cut at 0, which would take the gradient from the worst images.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.rewards.clip import ClipReward, load_clip
from diffalign.rewards.files import local, needed
from diffalign.rewards.preprocess import Preprocess


def load(path: str | Path | None = None, *, preprocess: Preprocess = "tensor") -> ClipReward:
    """From a folder of transformers or open_clip, or a hub id."""
    where = needed(path, reward="clip", example="openai/clip-vit-large-patch14")
    clip = load_clip(local(where, reward="clip"), reward="clip")
    return ClipReward("clip", clip, scale=100.0, preprocess=preprocess)
