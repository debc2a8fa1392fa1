"""A person as the judge of a search: images come up on the voting page, their ranking goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def ranked_by_person(folder: str | Path, **options: Any) -> Callable[[Tensor, str, int], list[int]]:
    """A ranker for :func:`diffalign.pipelines.zo_rank.zo_rank_sgd` that asks on the voting page.

    Every question is a folder ``round-0000``, ``round-0001``, ... of images with the votes on them, which
    stays: the rankings are a preference set.

    Args:
        folder: where the rounds go.
        options: of :class:`~diffalign.vote.VoteConfig`, such as ``annotator`` or ``port``.

    Returns:
        ``(images (m, 3, H, W) in [0, 1], prompt, k) -> `` the best, at most k, in order. The person may pick
        fewer.

    Raises:
        UserError: from the ranker, for more images than the page shows, or a page left without a ranking.
    """

    def rank(images: Tensor, prompt: str, count: int) -> list[int]:
        from PIL import Image

        from diffalign.vote import MOST, vote

        if len(images) > MOST:
            raise UserError(f"the voting page shows {MOST} images at most, not {len(images)}: lower queries")
        number = len(list(Path(folder).glob("round-*")))
        place = Path(folder) / f"round-{number:04d}"
        place.mkdir(parents=True)
        (place / "prompt.txt").write_text(prompt)
        pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        for index, picture in enumerate(pixels.numpy()):
            Image.fromarray(picture).save(place / f"{index}.png")
        votes = vote(
            place, place / "votes.jsonl", mode="rank", set_size=len(images), until_done=True, **options
        )
        rows = [json.loads(line) for line in votes.read_text().splitlines()] if votes.exists() else []
        if not rows or rows[-1]["ranks"] is None:
            raise UserError(f"the images in {place} were not ranked; start again to go on")
        ranks = rows[-1]["ranks"]
        order = sorted(
            (rank, int(Path(path).stem)) for rank, path in zip(ranks, rows[-1]["images"], strict=True)
        )
        # Those that were not picked share the last rank.
        return [image for rank, image in order if ranks.count(rank) == 1][:count]

    return rank
