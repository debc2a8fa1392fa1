"""``diffalign data caption``: a caption of its own for each image of every pair, by a captioning model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from diffalign.data.convert import CopyConfig, copy
from diffalign.data.pairs import Pair
from diffalign.errors import UserError


class Captioner(Protocol):
    """Says what images show."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """One caption for each image; `prompts` are what the images were made from."""


@dataclass(kw_only=True)
class CaptionConfig(CopyConfig):
    """Describe both images of every pair and write a copy with caption_chosen and caption_rejected (DCPO).

    Attributes:
        captioner: folder or hub id of a transformers image-to-text model (BLIP, GIT, ...).
        instruction: text that the caption continues or answers, for models that take one; {prompt} stands
            for the prompt of the pair.
        max_new_tokens: longest caption.
        batch_size: images in one call of the model.
        device: cpu, cuda, ...
    """

    captioner: str
    instruction: str = ""
    max_new_tokens: int = 60
    batch_size: int = 8
    device: str = "cpu"
    shard_rows: int = 256


class TransformersCaptioner:
    """A transformers model that turns an image (and an instruction) into text; greedy, so repeatable.

    Args:
        path: folder or hub id.
        instruction, max_new_tokens, batch_size, device: as in :class:`CaptionConfig`.

    Raises:
        UserError: no such model there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        instruction: str = "",
        max_new_tokens: int = 60,
        batch_size: int = 8,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(path)
            self._processor: Any = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"no captioning model at {path} ({reason}); give a folder or hub id of a transformers "
                "image-to-text model, such as BLIP"
            ) from error
        self._model = model.to(device).eval()
        self._instruction, self._length, self._batch = instruction, max_new_tokens, batch_size

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        captions: list[str] = []
        for first in range(0, len(images), self._batch):
            rows = slice(first, first + self._batch)
            texts = [self._instruction.replace("{prompt}", prompt) for prompt in prompts[rows]]
            given = {"text": texts, "padding": True} if self._instruction else {}
            inputs = self._processor(images=list(images[rows]), return_tensors="pt", **given)
            tokens = self._model.generate(
                **inputs.to(self._model.device), max_new_tokens=self._length, do_sample=False
            )
            for text, decoded in zip(
                texts, self._processor.batch_decode(tokens, skip_special_tokens=True), strict=True
            ):
                captions.append(" ".join(decoded.split()).removeprefix(" ".join(text.split())).strip())
        return captions


def add_captions(pairs: list[Pair], captioner: Captioner) -> list[Pair]:
    """The pairs with a caption for each image; where the captioner says nothing, the prompt stays."""
    images = [image for pair in pairs for image in (pair.chosen, pair.rejected)]
    said = captioner(images, [pair.prompt for pair in pairs for _ in range(2)])
    both = list(zip(said[::2], said[1::2], strict=True))
    return [replace(pair, captions=captions) for pair, captions in zip(pairs, both, strict=True)]


def run(config: CaptionConfig) -> Path:
    """The command ``diffalign data caption``; returns the folder.

    Raises:
        UserError: pairs, captioner or output folder can't be used.
    """
    dataset = config.open()
    captioner = TransformersCaptioner(
        config.captioner,
        instruction=config.instruction,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        device=config.device,
    )
    settings = {
        "captioner": config.captioner,
        "instruction": config.instruction,
        "tokens": config.max_new_tokens,
    }
    return copy(config, dataset, lambda pairs: add_captions(pairs, captioner), settings, "caption")
