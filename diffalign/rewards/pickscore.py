"""PickScore (Kirstain et al. 2023): a CLIP tuned on choices between images, ``exp(logit_scale) cos``.

The published weights are a ViT-H/14 and give 18 to 24 for ordinary images; differences of 0.05 matter. Any
other CLIP trained on preferences loads as well, from a folder of transformers or of open_clip.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.rewards.clip import ClipReward, load_clip
from diffalign.rewards.files import local, needed
from diffalign.rewards.preprocess import Preprocess


def load(
    path: str | Path | None = None, *, preprocess: Preprocess = "tensor", name: str = "pickscore"
) -> ClipReward:
    """From a folder or a hub id."""
    where = needed(path, reward=name, example="yuvalkirstain/PickScore_v1")
    return ClipReward(name, load_clip(local(where, reward=name), reward=name), preprocess=preprocess)
