"""Captions that are longer than a CLIP reads, in windows.

CLIP's text encoder has 77 places, two of them for its marks of start and end. A longer text is cut between
words into windows of at most 75 tokens; each is encoded by itself, with marks of its own, and their hidden
states stand one behind the other, where the network attends to all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError


class Windows:
    """Stands in for ``encode_prompt`` of a Stable Diffusion or SDXL pipeline; takes and gives what that does,
    with `count` times as many tokens.

    All encodings have one length. A text of fewer windows is shown several times: of keys and values that
    come k times each, attention makes exactly what it makes of one. So a caption that fits one window
    conditions the network as it would alone. Where the number of a text's windows does not divide `count`,
    empty ones follow it up to the next number that does. What does not fit `count` windows is cut off. SDXL's
    pooled embedding is that of the first window.

    Args:
        pipeline: whose tokenizers and text encoders read.
        count: windows of an encoding.
    """

    def __init__(self, pipeline: Any, count: int) -> None:
        self.count = count
        self._pipeline = pipeline
        self._one = type(pipeline).encode_prompt.__get__(pipeline)  # the pipeline's own, of one window
        self._signature = inspect.signature(self._one)
        names = ("tokenizer", "tokenizer_2")
        self._tokenizers = [t for t in (getattr(pipeline, name, None) for name in names) if t is not None]
        self._room = min(t.model_max_length - t.num_special_tokens_to_add() for t in self._tokenizers)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As the pipeline's ``encode_prompt``.

        Raises:
            UserError: a prompt for the second encoder alone, or negative prompts that are not as many.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["prompt_embeds"] is not None or given["negative_prompt_embeds"] is not None:
            return self._one(*args, **kwargs)
        for name in ("prompt_2", "negative_prompt_2"):
            if given.get(name):
                raise UserError(f"{name} does not go with prompt_windows: both text encoders read one prompt")
        prompts = [given["prompt"]] if isinstance(given["prompt"], str) else list(given["prompt"])
        shared = {name: given[name] for name in ("device", "lora_scale")}
        told = self._encoded(prompts, clip_skip=given["clip_skip"], **shared)
        without: Sequence[Tensor | None] = [None] * len(told)
        negative = given["negative_prompt"]
        if given["do_classifier_free_guidance"]:
            if negative is None and self._pipeline.config.get("force_zeros_for_empty_prompt"):
                without = [torch.zeros_like(part) for part in told]
            else:
                texts = [negative or ""] * len(prompts) if not isinstance(negative, list) else negative
                if len(texts) != len(prompts):
                    raise UserError(f"{len(texts)} negative prompts for {len(prompts)} prompts: one for each")
                without = self._encoded(texts, clip_skip=None, **shared)  # which diffusers skips for these
        images = given["num_images_per_prompt"]
        both = [part for pair in zip(told, without, strict=True) for part in pair]
        return tuple(None if part is None else part.repeat_interleave(images, 0) for part in both)

    def split(self, text: str) -> list[str]:
        """The windows that all of `text` takes: itself if it fits one."""
        words = [piece for word in text.split() for piece in self._pieces(word)]
        lengths = self._lengths(words)
        if sum(lengths) <= self._room:
            return [text]
        windows: list[list[str]] = [[]]
        free = self._room
        for word, length in zip(words, lengths, strict=True):
            if length > free:
                windows.append([])
                free = self._room
            windows[-1].append(word)
            free -= length
        return [" ".join(words) for words in windows]

    def _pieces(self, word: str) -> list[str]:
        """A word, in halves of halves if it fills more than a window: some scripts have no spaces. No letter
        is more than four tokens, its bytes."""
        if 4 * len(word) <= self._room or self._lengths([word])[0] <= self._room:
            return [word]
        half = len(word) // 2
        return self._pieces(word[:half]) + self._pieces(word[half:])

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text without marks, for the tokenizer that makes most of it."""
        found = []
        for tokenizer in self._tokenizers if texts else ():
            # A learnt word (textual inversion) may stand for several tokens.
            spelt = self._pipeline.maybe_convert_prompt(texts, tokenizer)
            ids = tokenizer(spelt, add_special_tokens=False, truncation=False, verbose=False).input_ids
            found.append([len(row) for row in ids])
        return [max(lengths) for lengths in zip(*found, strict=True)]

    def _shown(self, text: str) -> list[str]:
        """The `count` windows of an encoding."""
        windows = self.split(text)[: self.count]
        fitting = next(n for n in range(len(windows), self.count + 1) if self.count % n == 0)
        windows += [""] * (fitting - len(windows))
        return windows * (self.count // fitting)

    def _encoded(self, texts: Sequence[str], **options: Any) -> list[Tensor]:
        """Hidden states ``(B, count * tokens, width)`` and, of SDXL, pooled embeddings ``(B, width)``."""
        shown = [self._shown(text) for text in texts]
        number = {window: i for i, window in enumerate(dict.fromkeys(w for ws in shown for w in ws))}
        states, _, *pooled = self._one(
            prompt=list(number), num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
        rows = torch.tensor([[number[window] for window in windows] for windows in shown])
        return [states[rows].flatten(1, 2), *(part[rows[:, 0]] for part in pooled[:1])]
