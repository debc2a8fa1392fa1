"""HPSv2 and HPSv2.1 (Wu et al. 2023): a ViT-H/14 fine-tuned on human rankings, plain ``cos(image, text)``.

Images keep their shape: the longer side is brought to 224 and black is put around, before normalising. The
published code resizes float tensors, so ``preprocess="tensor"`` is its own form here; what overshoots [0, 1]
at sharp edges is cut off, there it is not. With torchvision before 0.17 that code did not antialias.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import UserError, suggestion
from diffalign.rewards.clip import ClipReward, OpenClip
from diffalign.rewards.files import fill, local, needed, one_file, read_weights
from diffalign.rewards.preprocess import Preprocess

FILES = {"2": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


def load(
    path: str | Path | None = None,
    *,
    architecture: str = "ViT-H-14",
    version: str = "2.1",
    preprocess: Preprocess = "tensor",
) -> ClipReward:
    """From the published file, a folder with it, or a hub id.

    Args:
        path: the file decides the version; in a folder or on the hub `version` does.
        architecture: the open_clip model that the weights are of.
        version: 2.1 or 2.
    """
    import open_clip

    if version not in FILES:
        raise UserError(f"reward hpsv2: version must be {' or '.join(FILES)}, not {version!r}")
    if architecture not in open_clip.list_models():
        raise UserError(
            f"reward hpsv2: no open_clip architecture {architecture!r}"
            f"{suggestion(architecture, open_clip.list_models())}; the published weights are ViT-H-14"
        )
    files = [FILES[version]]
    where = local(needed(path, reward="hpsv2", example="xswu/HPSv2"), reward="hpsv2", files=files)
    file = one_file(where, files, reward="hpsv2")
    state = read_weights(file, reward="hpsv2")
    model = open_clip.create_model(architecture, pretrained=None)
    fill(model, state, reward="hpsv2", path=file)
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    clip = OpenClip(model, open_clip.get_tokenizer(architecture), config)
    return ClipReward("hpsv2", clip, scale=1.0, fit="pad", preprocess=preprocess)
