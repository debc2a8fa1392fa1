"""Tiny rewards with random weights, saved to disk as their libraries save them."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

WORDS = 49408  # of CLIP's own vocabulary, which comes with open_clip
OPEN_CLIP_TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clip(size: int = 32) -> CLIPModel:
    """A CLIPModel whose weights are large enough for scores that differ."""
    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**both, vocab_size=WORDS, max_position_embeddings=16).to_dict(),
        vision_config=CLIPVisionConfig(**both, image_size=size, patch_size=8).to_dict(),
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim > 0:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**OPEN_CLIP_TINY)
    halves = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": OPEN_CLIP_TINY, "preprocess_cfg": halves}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def pictures():
    """Photograph-like images of the given sizes: smooth colours and a few edges, (N, 3, H, W) in [0, 1]."""

    def make(n: int = 3, height: int = 48, width: int = 48, seed: int = 0) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        coarse = torch.from_numpy(rng.random((n, 3, 5, 5), np.float32))
        images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        images[:, :, height // 3 : height // 2, width // 4 :] *= 0.3
        return (images * 255).round() / 255

    return make


PROMPTS = ["a red star", "two blue rings on a very long table that does not fit at all", "a red star"]
