"""One pass over a data set for the cache: which images it needs, and those that are not there yet."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from diffalign.data.examples import Examples
from diffalign.data.transforms import Fitted, PairTransform, View, fit

DECODERS = min(4, os.cpu_count() or 1)  # threads; decoding and resizing release the interpreter lock


class Visit(NamedTuple):
    """One pair or image: what it is, and the key of each of its images.

    ``texts``: what each image is described by, several where one is to be drawn; ``keys``: per cached variant
    (plain, mirrored) those of the images, chosen before rejected.
    """

    id: str
    prompt: str
    texts: tuple[tuple[str, ...], ...]
    preference: float
    keys: list[tuple[str, ...]]


def texts_of(prompts: tuple[str, ...], captions: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Each image's own caption where one of them has one, else all prompts of the row for each."""
    own = any(caption != prompts[0] for caption in captions)
    return tuple((caption,) for caption in captions) if own else (prompts,) * len(captions)


def content_key(*parts: object) -> str:
    """SHA-256 (hex) of the parts' text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def walk(
    dataset: Examples[Any, Any], transform: PairTransform, known: Callable[[str], bool], progress: bool
) -> Iterator[tuple[Visit, dict[str, Fitted]]]:
    """Every pair or image in order, with the images that are not `known`, by key.

    With ``transform.random_flip`` both variants are made, plain and mirrored; a random crop is one per row,
    drawn from the content of its images. A few rows ahead are read by threads. A row whose images are all
    known is not decoded: its bytes are hashed, and that they are good was seen when they came in.
    """
    crop = PairTransform(transform.resolution, transform.center_crop, False, transform.joint)
    flips = (False, True) if transform.random_flip else (False,)
    ids, prompts, preferences = dataset.ids, dataset.all_prompts, dataset.preferences
    captions = dataset.captions

    def views(digests: tuple[str, ...]) -> list[list[View]]:
        seed = int(content_key(*digests)[:15], 16)
        drawn = crop.draw(torch.Generator().manual_seed(seed))[: len(digests)]
        return [[view._replace(flip=flip) for view in drawn] for flip in flips]

    def keys_of(digests: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [
            tuple(content_key(digest, *view) for digest, view in zip(digests, seen, strict=True))
            for seen in views(digests)
        ]

    def visit(index: int) -> tuple[Visit, dict[str, Fitted]]:
        digests = dataset.digests(index)
        if digests is not None:
            keys = keys_of(digests)
            if all(known(key) for variant in keys for key in variant):
                texts = texts_of(prompts[index], captions[index])
                return Visit(ids[index], prompts[index][0], texts, preferences[index], keys), {}
        example = dataset[index]
        keys = keys_of(example.digests)
        images = {
            key: fit(image, transform.resolution, view)
            for variant, seen in zip(keys, views(example.digests), strict=True)
            for key, image, view in zip(variant, example.images, seen, strict=True)
            if not known(key)
        }
        texts = texts_of(example.prompts, example.captions)
        return Visit(example.id, example.prompt, texts, example.preference, keys), images

    ahead: deque[Future[tuple[Visit, dict[str, Fitted]]]] = deque()
    with (
        ThreadPoolExecutor(DECODERS) as pool,
        tqdm(
            total=len(dataset), desc="encode images", unit=dataset.what, disable=None if progress else True
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
