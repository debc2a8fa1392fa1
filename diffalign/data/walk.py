"""One pass over a preference set for the cache: which images it needs, and those that are not there yet."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from tqdm import tqdm

from diffalign.data.pairs import PairDataset
from diffalign.data.transforms import Fitted, PairTransform, View, fit

DECODERS = min(4, os.cpu_count() or 1)  # threads; decoding and resizing release the interpreter lock


class Visit(NamedTuple):
    """One pair: what it is, and the key of each image.

    ``texts``: what chosen and rejected are described by, several where one is to be drawn; ``keys``: per
    cached variant (plain, mirrored) those of chosen and rejected.
    """

    id: str
    prompt: str
    texts: tuple[tuple[str, ...], tuple[str, ...]]
    preference: float
    keys: list[tuple[str, str]]


def texts_of(prompts: tuple[str, ...], captions: tuple[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Each image's own caption where one of them has one, else all prompts of the row for both."""
    own = captions != (prompts[0], prompts[0])
    return ((captions[0],), (captions[1],)) if own else (prompts, prompts)


def content_key(*parts: object) -> str:
    """SHA-256 (hex) of the parts' text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def walk(
    dataset: PairDataset, transform: PairTransform, known: Callable[[str], bool], progress: bool
) -> Iterator[tuple[Visit, dict[str, Fitted]]]:
    """Every pair in order, with the images that are not `known`, by key.

    With ``transform.random_flip`` both variants are made, plain and mirrored; a random crop is one per pair,
    drawn from the content of its images. A few pairs ahead are read by threads. A pair whose images are all
    known is not decoded: its bytes are hashed, and that they are good was seen when they came in.
    """
    crop = PairTransform(transform.resolution, transform.center_crop, False, transform.joint)
    flips = (False, True) if transform.random_flip else (False,)
    ids, prompts, preferences = dataset.ids, dataset.all_prompts, dataset.preferences
    captions = dataset.captions

    def views(digests: tuple[str, str]) -> list[tuple[View, View]]:
        seed = int(content_key(*digests)[:15], 16)
        one, other = crop.draw(torch.Generator().manual_seed(seed))
        return [(one._replace(flip=flip), other._replace(flip=flip)) for flip in flips]

    def keys_of(digests: tuple[str, str]) -> list[tuple[str, str]]:
        return [
            (content_key(digests[0], *one), content_key(digests[1], *other)) for one, other in views(digests)
        ]

    def visit(index: int) -> tuple[Visit, dict[str, Fitted]]:
        digests = dataset.digests(index)
        if digests is not None:
            keys = keys_of(digests)
            if all(known(key) for two in keys for key in two):
                texts = texts_of(prompts[index], captions[index])
                return Visit(ids[index], prompts[index][0], texts, preferences[index], keys), {}
        pair = dataset[index]
        keys = keys_of(pair.digests)
        images = {
            key: fit(image, transform.resolution, view)
            for two, seen in zip(keys, views(pair.digests), strict=True)
            for key, image, view in zip(two, (pair.chosen, pair.rejected), seen, strict=True)
            if not known(key)
        }
        texts = texts_of(pair.prompts, pair.captions)
        return Visit(pair.id, pair.prompt, texts, pair.preference, keys), images

    ahead: deque[Future[tuple[Visit, dict[str, Fitted]]]] = deque()
    with (
        ThreadPoolExecutor(DECODERS) as pool,
        tqdm(
            total=len(dataset), desc="encode images", unit="pair", disable=None if progress else True
        ) as bar,
    ):
        for index in range(len(dataset)):
            ahead.append(pool.submit(visit, index))
            if len(ahead) > 2 * DECODERS:
                yield ahead.popleft().result()
                bar.update()
        while ahead:
            yield ahead.popleft().result()
            bar.update()
