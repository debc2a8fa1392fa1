"""Latents and text embeddings of pairs or of single images, computed once.

In a training step the image encoder costs about as much as a forward pass of the denoiser, and its results
never change. An image is known by its content: SHA-256 of its bytes, with crop and flip, in a store named
after encoder, resolution and dtype. So a cache survives reordering, serves a grown data set for the price of
the new rows, and goes on where a killed process left it, with the same batches and so the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.data.pairs import PairDataset
from diffalign.data.shards import ShardedRows, ShardStore, row_shapes
from diffalign.data.transforms import Fitted, PairTransform, size_of
from diffalign.data.unpaired import ImageDataset
from diffalign.data.walk import Visit, content_key, walk
from diffalign.errors import RunFailed, UserError
from diffalign.output import write_json

SHARD_ROWS = 256  # rows that a killed process may lose; SDXL moments of 1024 px in fp16: 128 MB
CLIP_SHARD_ROWS = 16  # likewise of clips
GIB = 2**30

Posterior = Literal["sample", "mean"]
EncodeImages = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
EncodePrompts = Callable[[list[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class CachedExamples:
    """Encoded pairs, or single images, by index.

    Attributes:
        ids: id of each row.
        prompts: prompt of each row.
        sides: images of a row: 2 for pairs, chosen then rejected; 1 for single images.
        preference: (N,) float32, probability that the chosen image is the better one; of a single image, that
            it is a good one.
        keys: content of each row: its images as they are cropped, and its texts.
        weight: (N,) float32 with mean 1, how much each row counts.
        gap: (N,) float32, by how much the chosen image's score is higher; NaN where there are no scores.
        in_memory: whether `latents`, `std` and `cond` are tensors; otherwise use :meth:`batch`.
        joint_flip: whether a drawn flip applies to both images of a pair.
    """

    ids: list[str]
    prompts: list[str]
    keys: list[str]
    sides: int
    preference: Tensor
    weight: Tensor
    gap: Tensor
    in_memory: bool
    joint_flip: bool
    _images: dict[str, Tensor | ShardedRows] = field(repr=False)  # (variants * N * sides, ...)
    _cond: dict[str, Tensor | ShardedRows] = field(repr=False)  # (distinct texts, ...)
    _text_index: Tensor = field(repr=False)  # (N, sides, K) int64: of each image, K texts to draw from
    _text_count: Tensor = field(repr=False)  # (N,) int64: how many of the K are this row's
    _variants: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row of :meth:`batch` without a generator: latents (sides, C, h, w), cond {name: (...)}."""
        row = self.batch([range(len(self))[index]])
        return {
            name: {k: c[0] for k, c in v.items()} if isinstance(v, dict) else v[0] for name, v in row.items()
        }

    def batch(
        self, indices: Iterable[int] | Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """The rows at `indices` (B of them), on the CPU.

        With a CPU `generator`, latents are sampled from their moments (where the encoder gave moments),
        mirrored variants are drawn (where cached), and one of a row's prompts (where it has several);
        without, they are the mean of the unmirrored images with the first prompt.

        Returns:
            ``latents`` (B, sides, C, h, w) float32; ``cond`` {name: (B, ...)} as stored, of all images of the
            row, or of the chosen ones where `own_captions`, which adds ``cond_rejected``; ``preference``,
            ``weight`` and ``gap`` (B,) float32; ``original_size`` and ``crop_top_left`` (B, sides, 2) int64,
            each (height, width) or (top, left) in pixels of an image.
        """
        index = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), dtype=torch.long)
        sides = self.sides
        flip = torch.zeros(len(index), sides, dtype=torch.long)
        if generator is not None and self._variants == 2:
            flip = torch.randint(2, (len(index), sides), generator=generator)
            flip = flip[:, :1].expand(-1, sides) if self.joint_flip else flip
        rows = ((flip * len(self) + index[:, None]) * sides + torch.arange(sides)).flatten()
        images = {name: values[rows].unflatten(0, (-1, sides)) for name, values in self._images.items()}
        latents = images["latents"].float()
        if generator is not None and "std" in images:
            latents += images["std"].float() * torch.randn(latents.shape, generator=generator)
        text = torch.zeros(len(index), dtype=torch.long)
        if generator is not None and self._text_index.shape[2] > 1:
            drawn = torch.rand(len(index), generator=generator, dtype=torch.float64)
            text = (drawn * self._text_count[index]).long()
        texts = self._text_index[index, :, text].T
        conds = {"cond": texts[0]} | ({"cond_rejected": texts[1]} if self.own_captions else {})
        return {
            "latents": latents,
            **{what: {name: c[rows] for name, c in self._cond.items()} for what, rows in conds.items()},
            "preference": self.preference[index],
            "weight": self.weight[index],
            "gap": self.gap[index],
            "original_size": images["original_size"].long(),
            "crop_top_left": images["crop_top_left"].long(),
        }

    @property
    def latents(self) -> Tensor:
        """(N, sides, C, h, w) in the dtype of the cache, unmirrored; means of moments."""
        return self._plain("latents")

    @property
    def std(self) -> Tensor | None:
        """(N, sides, C, h, w), deviation of the encoder's posterior; None if it gave plain latents."""
        return self._plain("std") if "std" in self._images else None

    @property
    def cond(self) -> dict[str, Tensor]:
        """{name: (distinct texts, ...)}; row `prompt_index[i]` belongs to row `i`."""
        return {name: self._whole(values) for name, values in self._cond.items()}

    @property
    def prompt_index(self) -> Tensor:
        """(N,) int64: which row of `cond` each row's (chosen image's) first text is."""
        return self._text_index[:, 0, 0]

    @property
    def own_captions(self) -> bool:
        """Whether any two images of a pair have captions that differ."""
        return not torch.equal(self._text_index[:, 0], self._text_index[:, -1])

    @property
    def draws(self) -> bool:
        """Whether :meth:`batch` draws latents, a flip or a prompt from its generator."""
        return self._variants > 1 or self._text_index.shape[2] > 1 or "std" in self._images

    def _plain(self, name: str) -> Tensor:
        whole = self._whole(self._images[name])
        return whole[: self.sides * len(self)].unflatten(0, (-1, self.sides))

    def _whole(self, values: Tensor | ShardedRows) -> Tensor:
        if isinstance(values, ShardedRows):
            raise RuntimeError("this cache is larger than memory_limit and stays on disk: use batch()")
        return values


def cached_examples(
    dataset: PairDataset | ImageDataset,
    folder: str | Path | None = None,
    *,
    encode_images: EncodeImages,
    encode_prompts: EncodePrompts,
    key: Mapping[str, Any],
    prompt_key: Mapping[str, Any] | None = None,
    resolution: int | tuple[int, int],
    center_crop: bool = True,
    random_flip: bool = False,
    joint: bool = True,
    posterior: Posterior = "sample",
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    memory_limit: int = 8 * GIB,
    process: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] | None = None,
    progress: bool = True,
) -> CachedExamples:
    """Encode what the cache in `folder` lacks, and open it.

    Args:
        dataset: pairs or single images. A bad row is replaced as ``dataset[i]`` replaces it.
        folder: where the cache lives; several models, resolutions and data sets may share one. None keeps it
            in memory.
        encode_images: pixels (B, 3, H, W) float32 in [-1, 1] on the CPU (of clips, (B, 3, frames, H, W)) ->
            latents (B, C, h, w) in the units that the denoiser sees, or ``{"mean": ..., "std": ...}`` of the
            same shape and units, which keeps sampling stochastic.
        encode_prompts: B prompts -> {name: (B, ...)}, of a length that does not depend on the prompts.
        key: what the encoders are, as JSON values (model name, weights hash, dtype...): another key, another
            cache entry. Encoders whose weights change must change it.
        prompt_key: likewise, of what concerns prompts alone.
        resolution: side of a square or (height, width), in pixels.
        center_crop: centre; otherwise one place per row, drawn from the images' content.
        random_flip: cache both variants, from which :meth:`CachedExamples.batch` draws.
        joint: same crop and flip for both images of a pair.
        posterior: ``sample`` keeps mean and std where the encoder gives both, ``mean`` only the mean, in half
            the room.
        batch_size: images, or prompts, per call of an encoder.
        dtype: of stored floating-point values; arithmetic after it is float32.
        memory_limit: bytes; images or embeddings that take more stay on disk and are read per batch.
        process: (rank, number) of the processes that build the cache together in one folder, each its share.
            Encoders whose results depend on the batch give last bits that depend on the number.
        barrier: waits for the other processes; needed with more than one.
        progress: show a bar where there is a terminal.

    Raises:
        UserError: `key` is not JSON, or no row is usable.
        RunFailed: an encoder gave a value that is not finite, or too large for `dtype`.
        ValueError: an encoder gave a wrong number of rows, or rows of changing shape.
    """
    if posterior not in get_args(Posterior):
        raise UserError(f"posterior must be one of {', '.join(get_args(Posterior))}, not {posterior!r}")
    rank, processes = process
    if processes > 1 and (folder is None or barrier is None):
        raise ValueError("processes that share a cache need a folder and a barrier")
    transform = PairTransform(resolution, center_crop, random_flip, joint)
    encoders = {"key": dict(key), "dtype": str(dtype).removeprefix("torch.")}
    reading = encoders | ({"prompts": dict(prompt_key)} if prompt_key else {})
    sized: dict[str, Any] = encoders | {"resolution": list(size_of(resolution))}
    sized |= {"posterior": "mean"} if posterior == "mean" else {}
    sized |= {"frames": dataset.frames} if dataset.frames else {}

    def fill(part: PairDataset | ImageDataset) -> tuple[ShardStore, ShardStore, list[Visit], list[str]]:
        """Encode what is missing for a part of the data set."""
        images, texts = open_store(folder, "images", sized), open_store(folder, "prompts", reading)
        visits: list[Visit] = []

        def missing_images() -> Iterator[tuple[str, Fitted]]:
            given: set[str] = set()
            for visit, fitted in walk(part, transform, images.__contains__, progress):
                visits.append(visit)
                yield from ((key, image) for key, image in fitted.items() if key not in given)
                given |= fitted.keys()

        rows = CLIP_SHARD_ROWS if dataset.frames else SHARD_ROWS
        encode = partial(_encode_fitted, encode_images, posterior)
        _fill(images, missing_images(), encode, batch_size, dtype, "image", rows)
        wanted = list(dict.fromkeys(text for visit in visits for side in visit.texts for text in side))
        bar = tqdm(wanted, "encode prompts", disable=None if progress else True, unit="prompt")
        missing = ((content_key(text), text) for text in bar if content_key(text) not in texts)
        _fill(texts, missing, lambda batch: dict(encode_prompts(batch)), batch_size, dtype, "text")
        return images, texts, visits, wanted

    if processes > 1 and barrier is not None:
        share = range(rank, len(dataset), processes)
        if share:
            fill(dataset.select(share))
        barrier()
    images, texts, visits, wanted = fill(dataset)
    by_variant = zip(*(visit.keys for visit in visits), strict=True)
    image_keys = [key for variant in by_variant for row in variant for key in row]
    image_rows = images.rows(image_keys, memory_limit)
    cond = texts.rows([content_key(text) for text in wanted], memory_limit)
    return CachedExamples(
        ids=[visit.id for visit in visits],
        prompts=[visit.prompt for visit in visits],
        keys=[content_key(*visit.keys[0], visit.texts) for visit in visits],
        sides=dataset.sides,
        preference=torch.tensor([visit.preference for visit in visits], dtype=torch.float32),
        weight=torch.tensor(dataset.weights, dtype=torch.float32),
        gap=_gaps(dataset, [visit.id for visit in visits]),
        in_memory=not any(isinstance(rows, ShardedRows) for rows in (image_rows | cond).values()),
        joint_flip=joint,
        _images=image_rows,
        _cond=cond,
        _text_index=_numbered(visits, wanted),
        _text_count=torch.tensor([len(visit.texts[0]) for visit in visits]),
        _variants=1 + random_flip,
    )


def _encode_fitted(
    encode_images: EncodeImages, posterior: Posterior, batch: list[Fitted]
) -> dict[str, Tensor]:
    """What is stored of some images."""
    encoded = encode_images(torch.stack([fitted.pixels for fitted in batch]))
    named = {"latents": encoded} if isinstance(encoded, Tensor) else dict(encoded)
    if "mean" in named:
        named["latents"] = named.pop("mean")
    if not {"latents"} <= set(named) <= {"latents", "std"}:
        raise ValueError(f"encode_images must give latents, or mean and std, not {sorted(named)}")
    if posterior == "mean":
        named.pop("std", None)
    return named | {
        "original_size": torch.tensor([fitted.original_size for fitted in batch], dtype=torch.int32),
        "crop_top_left": torch.tensor([fitted.crop_top_left for fitted in batch], dtype=torch.int32),
    }


def _numbered(visits: list[Visit], wanted: list[str]) -> Tensor:
    """(N, sides, K): places in `wanted` of each image's texts, its first again where others have more."""
    number = {text: i for i, text in enumerate(wanted)}
    most = max(len(side) for visit in visits for side in visit.texts)
    return torch.tensor(
        [
            [[number[text] for text in side] + [number[side[0]]] * (most - len(side)) for side in visit.texts]
            for visit in visits
        ]
    )


def _gaps(dataset: PairDataset | ImageDataset, ids: list[str]) -> Tensor:
    """Score of the chosen image less that of the rejected one, NaN without both; by `ids`, since a row may
    stand in for another."""
    if not isinstance(dataset, PairDataset):
        return torch.full((len(ids),), math.nan)
    scores = zip(dataset.ids, dataset.properties("score"), strict=True)
    gaps = {row: _number(chosen) - _number(rejected) for row, (chosen, rejected) in scores}
    return torch.tensor([gaps[row] for row in ids], dtype=torch.float32)


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _fill(
    store: ShardStore,
    items: Iterable[tuple[str, Any]],
    encode: Callable[[list[Any]], dict[str, Tensor]],
    batch_size: int,
    dtype: torch.dtype,
    what: str,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Encode `items` into shards of `shard_rows`.

    No batch crosses a shard, so that a resumed run makes the same batches as an undisturbed one.
    """
    keys: list[str] = []
    waiting: list[Any] = []
    encoded: list[dict[str, Tensor]] = []

    def encode_waiting() -> None:
        if waiting:
            with torch.no_grad():
                named = encode(waiting)
            encoded.append({k: _stored(k, v, len(waiting), dtype, what) for k, v in named.items()})
            first, last = row_shapes(encoded[0]), row_shapes(encoded[-1])
            if first != last:
                raise ValueError(f"the {what} encoder must give rows of one shape, got {last} after {first}")
            waiting.clear()

    def write() -> None:
        encode_waiting()
        if keys:
            store.add(keys, {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]})
            keys.clear()
            encoded.clear()

    for key, item in items:
        keys.append(key)
        waiting.append(item)
        if len(waiting) == batch_size:
            encode_waiting()
        if len(keys) == shard_rows:
            write()
    write()


def _stored(name: str, values: Tensor, rows: int, dtype: torch.dtype, what: str) -> Tensor:
    if values.shape[:1] != (rows,):
        raise ValueError(f"the {what} encoder gave {name} of shape {tuple(values.shape)} for {rows} inputs")
    if not values.is_floating_point():
        return values.cpu()
    values = values.detach().to("cpu", dtype)
    if not values.isfinite().all():
        raise RunFailed(
            f"the {what} encoder gave {name} that are not finite in {dtype}; load it in float32 "
            "(the SDXL autoencoder overflows in float16) or keep the cache in another dtype"
        )
    return values


def open_store(folder: str | Path | None, kind: str, settings: dict[str, Any]) -> ShardStore:
    """The store ``<kind>-<hash of settings>`` in a cache folder; in memory without one.

    Raises:
        UserError: `settings` is not JSON.
    """
    try:
        text = json.dumps(settings, sort_keys=True)
    except TypeError as error:
        raise UserError(f"the key of a cache must be JSON values: {error}") from error
    if folder is None:
        return ShardStore(None)
    place = Path(folder) / f"{kind}-{content_key(text)[:16]}"
    store = ShardStore(place)
    if not (place / "settings.json").is_file():  # for people; other processes may be reading beside us
        with contextlib.suppress(FileNotFoundError):  # one of them was faster
            write_json(place / "settings.json", settings)
    return store
