"""Contrastive rewards through open_clip: the similarity of a prompt and an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError


class OpenCLIPReward(nn.Module):
    """Reward = logit_scale * cos(text, image) of a CLIP-like model (Radford et al. 2021), as in PickScore.

    Args:
        model: an open_clip model with ``encode_image`` and ``encode_text``.
        tokenizer: list[str] -> (N, length) token ids.
    """

    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        visual = model.visual
        self.size = tuple(np.broadcast_to(visual.image_size, 2).tolist())
        mean = getattr(visual, "image_mean", None) or (0.5, 0.5, 0.5)
        std = getattr(visual, "image_std", None) or (0.5, 0.5, 0.5)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> OpenCLIPReward:
        """Load an open_clip folder (``open_clip_config.json`` with safetensors beside it) or a hub id.

        Raises:
            UserError: a path that is neither.
        """
        import open_clip

        name = f"local-dir:{Path(path).resolve()}" if Path(path).is_dir() else f"hf-hub:{path}"
        try:
            model = open_clip.create_model(name)
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the library raises a dozen kinds, some without a word about the path
            raise UserError(
                f"no open_clip model at {path}: {error}; give a folder with open_clip_config.json and "
                f"open_clip_model.safetensors, or a hub id"
            ) from error
        return cls(model, tokenizer)

    def forward(self, prompts: Sequence[str], pixels: Tensor) -> Tensor:
        """Rewards, (N,) float32, differentiable in the pixels.

        Args:
            prompts: N prompts.
            pixels: (N, 3, H, W) in [0, 1]; resized to the model's size if need be.
        """
        if len(prompts) != len(pixels):
            raise ValueError(f"{len(prompts)} prompts for {len(pixels)} images: give one prompt per image")
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        unique = list(dict.fromkeys(prompts))
        ids = self.tokenizer(unique).to(pixels.device)
        text = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        rows = torch.tensor([unique.index(p) for p in prompts], device=pixels.device)
        image = F.normalize(self.model.encode_image((pixels - self.mean) / self.std).float(), dim=-1)
        return self.model.logit_scale.exp().float() * (text[rows] * image).sum(-1)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Rewards of (N, H, W, 3) uint8 images, (N,) float32."""
        device = self.mean.device
        parts = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2).float() / 255
            parts.append(self(list(prompts[rows]), pixels).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)
