"""``diffalign data perturb``: captions that say a little less than they should, for dual-caption training.

DCPO (Saeidi et al. 2025) gives the rejected image a caption of its own that is further from it than the
chosen one's: a rewriting of the prompt or of the image's own caption, at three strengths.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from diffalign.data.convert import CopyConfig, copy
from diffalign.data.pairs import Pair
from diffalign.errors import UserError

Level = Literal["weak", "medium", "strong"]
#: level -> (share of words that the rules change, lexical diversity that DIPPER is asked for, of 100)
LEVELS: dict[str, tuple[float, int]] = {"weak": (0.15, 40), "medium": (0.3, 60), "strong": (0.6, 80)}

WINDOW = 3  # sentences that a paraphraser sees at a time

# Words that can stand for one another in captions without changing much.
_SYNONYMS = (
    ("big", "large", "huge"),
    ("small", "little", "tiny"),
    ("picture", "image", "photo", "photograph"),
    ("beautiful", "pretty", "lovely"),
    ("person", "human"),
    ("woman", "lady"),
    ("man", "guy"),
    ("child", "kid"),
    ("house", "home", "building"),
    ("car", "automobile", "vehicle"),
    ("road", "street"),
    ("forest", "woods"),
    ("ocean", "sea"),
    ("sitting", "seated"),
    ("near", "beside", "by"),
    ("painting", "artwork"),
    ("dark", "dim"),
    ("bright", "vivid"),
    ("old", "ancient"),
    ("detailed", "intricate"),
)
_SYNONYM_OF = {word: [w for w in group if w != word] for group in _SYNONYMS for word in group}


class CaptionPerturber(Protocol):
    """Rewrites captions."""

    def __call__(self, captions: Sequence[str]) -> list[str]:
        """One rewriting for each."""


@dataclass(frozen=True)
class RulePerturber:
    """Synonyms, left-out words and swapped neighbours, without a model.

    A caption's rewriting depends on its text, the level and the seed alone. It differs from the caption
    wherever that has two words or more.
    """

    level: Level = "medium"
    seed: int = 0

    def __call__(self, captions: Sequence[str]) -> list[str]:
        return [self._rewrite(caption) for caption in captions]

    def _rewrite(self, caption: str) -> str:
        words = caption.split()
        if len(words) < 2:
            return caption
        digest = hashlib.sha256(f"{self.seed}\n{self.level}\n{caption}".encode()).digest()
        dice = random.Random(int.from_bytes(digest[:8]))
        for _ in range(math.ceil(LEVELS[self.level][0] * len(words))):
            words = dice.choice(_EDITS)(words, dice)
        changed = " ".join(words)
        return changed if changed != caption else " ".join(words[:-1])


def _replace(words: list[str], dice: random.Random) -> list[str]:
    """One word by a synonym; a swap where no word has one."""
    places = [i for i, word in enumerate(words) if _bare(word) in _SYNONYM_OF]
    if not places:
        return _swap(words, dice)
    place = dice.choice(places)
    bare = _bare(words[place])
    new = words[place].lower().replace(bare, dice.choice(_SYNONYM_OF[bare]))
    return [*words[:place], new, *words[place + 1 :]]


def _drop(words: list[str], dice: random.Random) -> list[str]:
    """One word less; two words stay in any case."""
    if len(words) <= 2:
        return words
    place = dice.randrange(len(words))
    return [*words[:place], *words[place + 1 :]]


def _swap(words: list[str], dice: random.Random) -> list[str]:
    """Two neighbours, unequal where there are such, in the other order."""
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if not places:
        return words
    place = dice.choice(places)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).lower()


_EDITS: tuple[Callable[[list[str], random.Random], list[str]], ...] = (_replace, _drop, _swap)


class DipperPerturber:
    """A paraphraser of the kind of DIPPER (Krishna et al. 2023), as published for DCPO.

    Lexical diversity by level, no reordering, nucleus sampling at 0.75. Three sentences at a time are
    rewritten, with what has been written of the caption so far before them.

    Args:
        path: folder or hub id of a T5 that paraphrases.
        level: weak, medium or strong.
        prefix: what stands before the sentence, such as an instruction.
        seed: of the sampling; captions of one call share it.

    Raises:
        UserError: there is no such model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        level: Level = "medium",
        prefix: str = "",
        max_new_tokens: int = 256,
        batch_size: int = 8,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"no paraphrasing model at {path} ({reason}); give a folder or hub id of a T5 such as "
                "DIPPER, or leave --perturber out for the rules"
            ) from error
        self._model = model.to(device).eval()
        self._level, self._prefix, self._length = level, prefix, max_new_tokens
        self._batch, self._seed = batch_size, seed

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[str]:
        said = [""] * len(captions)
        windows = [_windows(caption) for caption in captions]
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            for number in range(max(map(len, windows), default=0)):
                rows = [row for row, parts in enumerate(windows) if number < len(parts)]
                for first in range(0, len(rows), self._batch):
                    batch = rows[first : first + self._batch]
                    written = self._rewritten([(said[row], windows[row][number]) for row in batch])
                    for row, text in zip(batch, written, strict=True):
                        said[row] = f"{said[row]} {text}".strip()
        return said

    def _rewritten(self, parts: list[tuple[str, str]]) -> list[str]:
        """Of each (what stands before, sentences) the sentences anew."""
        head = f"lexical = {100 - LEVELS[self._level][1]}, order = 100"
        texts = [
            " ".join(f"{head} {self._prefix} {before} <sent> {now} </sent>".split()) for before, now in parts
        ]
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._model.device)
        tokens = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_p=0.75,
            top_k=0,  # no other limit; transformers would take 50
            max_new_tokens=self._length,
        )
        decoded = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in decoded]


def _windows(caption: str) -> list[str]:
    """The caption in parts of :data:`WINDOW` sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    return [" ".join(sentences[k : k + WINDOW]) for k in range(0, len(sentences), WINDOW)]


@dataclass(kw_only=True)
class PerturbConfig(CopyConfig):
    """Rewrite captions of rejected images; write a copy with caption_chosen and caption_rejected (DCPO).

    Attributes:
        of: what is rewritten: the prompt (then the chosen image keeps it), or the rejected image's own
            caption (then the chosen image keeps its own; make them with 'diffalign data caption').
        level: weak, medium or strong.
        perturber: folder or hub id of a paraphrasing T5 such as DIPPER; rules without a model unless given.
        prefix: what the paraphraser is told before each caption, such as an instruction.
        seed: of the rewriting.
        device: cpu, cuda, ...
    """

    of: Literal["prompt", "caption"] = "prompt"
    level: Level = "medium"
    perturber: str | None = None
    prefix: str = ""
    seed: int = 0
    device: str = "cpu"


def perturb(pairs: list[Pair], perturber: CaptionPerturber, of: str = "prompt") -> list[Pair]:
    """The pairs with the rejected image's caption rewritten; where nothing comes back, it stays."""
    sources = [(p.prompt, p.prompt) if of == "prompt" else p.captions for p in pairs]
    said = perturber([rejected for _, rejected in sources])
    return [
        replace(pair, captions=(chosen, text or rejected))
        for pair, (chosen, rejected), text in zip(pairs, sources, said, strict=True)
    ]


def run(config: PerturbConfig) -> Path:
    """The command ``diffalign data perturb``; returns the folder.

    Raises:
        UserError: pairs, paraphraser or output folder can't be used.
    """
    dataset = config.open()
    if config.of == "caption" and all(a == b for a, b in dataset.captions):
        raise UserError(
            f"the images of {config.dataset} have no captions of their own; make them with 'diffalign data "
            "caption', or rewrite the prompt with --of prompt"
        )
    perturber: CaptionPerturber
    if config.prefix and config.perturber is None:
        raise UserError("prefix is told to a paraphrasing model: give --perturber as well")
    if config.perturber is None:
        perturber = RulePerturber(config.level, config.seed)
    else:
        perturber = DipperPerturber(
            config.perturber,
            level=config.level,
            prefix=config.prefix,
            device=config.device,
            seed=config.seed,
        )
    settings = {name: getattr(config, name) for name in ("of", "level", "perturber", "prefix", "seed")}
    return copy(config, dataset, lambda pairs: perturb(pairs, perturber, config.of), settings, "perturb")
