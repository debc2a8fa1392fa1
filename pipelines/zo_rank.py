"""ZO-RankSGD (Tang et al. 2024): the starting noise is improved by rankings alone, of a scorer or a person.

No gradient and no numbers are needed, so anything that can order a few images can steer: a reward without a
gradient, an exact check, somebody at the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import UserError
from diffalign.pipelines.steering import Drawing, Score, SteeringOutput, as_type, at_least, frozen

Variant = Literal["pairs", "published"]
#: Images (m, 3, H, W) in [0, 1], their prompt and k -> up to k of 0 .. m - 1, best first, at least one.
Ranker = Callable[[Tensor, str, int], Sequence[int]]


def ranked_by(score: Score) -> Ranker:
    """Ranks by a reward, which needs no gradient; the earlier of equals is better."""

    def rank(images: Tensor, prompt: str, count: int) -> list[int]:
        with torch.no_grad():
            rewards = score(images, [prompt] * len(images))
        return rewards.sort(descending=True, stable=True).indices[:count].tolist()

    return rank


def rank_direction(
    queries: Tensor, start: Tensor, ranking: Sequence[int], variant: Variant = "pairs"
) -> Tensor:
    """Ascent direction from a ranking: ``sum_i c_i (q_i - x)`` over the number of pairs whose order is known.

    With m queries, of which the best k are ranked, that is ``k (k - 1) / 2 + k (m - k)`` pairs. The mean of
    ``q_i - q_j`` over them, i the better one, has ``c = m - 1 - 2 r`` for rank r = 0 .. k - 1 and ``-k`` for
    the rest.

    Args:
        queries: (m, ...).
        start: (...), what they were drawn around.
        ranking: k indices of queries, best first.
        variant: ``published`` has ``m - 2 r``, which adds the sum of the ranked queries, as the authors' code
            does.
    """
    m, k = len(queries), len(ranking)
    top = m if variant == "published" else m - 1
    weights = torch.full((m,), -float(k), dtype=queries.dtype, device=queries.device)
    for rank, query in enumerate(ranking):
        weights[query] = top - 2 * rank
    return torch.tensordot(weights, queries - start, 1) / (k * (k - 1) / 2 + k * (m - k))


def line_search_points(start: Tensor, direction: Tensor, step: float, count: int) -> Tensor:
    """``x + step 2^-j g`` for j = 0 .. count - 1, (count, ...)."""
    scales = step * 0.5 ** torch.arange(count, dtype=start.dtype, device=start.device)
    return start + scales.reshape(-1, *[1] * start.ndim) * direction


def zo_rank_sgd(
    pipe: Any,
    prompt: str | Sequence[str],
    rank: Ranker,
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    rounds: int = 10,
    queries: int = 6,
    top_k: int | None = None,
    smoothing: float = 0.1,
    step_size: float = 1.0,
    variant: Variant = "pairs",
    patience: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
    output_type: str = "pil",
) -> SteeringOutput:
    """Draw images whose starting noise was improved by comparing images.

    A round shows `queries` images near the present one, follows the direction of the better ones, averaged
    since the last success, and lets the ranker choose among points along it, the best query and the present
    image. Choosing the last ends the round without success.

    Args:
        pipe, prompt, seeds, num_inference_steps, guidance_scale, progress, output_type: as in
            :func:`~diffalign.pipelines.reno.reno`.
        rank: see :data:`Ranker`; of a reward by :func:`ranked_by`, of a person by
            :func:`diffalign.vote.ranker.ranked_by_person`.
        rounds: of each image.
        queries: images of a round, m; as many again are compared in its line search.
        top_k: of these, the best that are ranked; None ranks all.
        smoothing: how far queries lie from the present noise, mu.
        step_size: of the line search's first point, in the averaged directions.
        variant: see :func:`rank_direction`.
        patience: an image is done after so many rounds without success.
        batch_size: images per network call.

    Raises:
        UserError: an option out of range, or a ranking that is none.
    """
    k = queries if top_k is None else top_k
    at_least(rounds=(rounds, 1), queries=(queries, 3), top_k=(k, 1), batch_size=(batch_size, 1))
    at_least(patience=(1 if patience is None else patience, 1))
    if k > queries:
        raise UserError(f"top_k must not exceed queries, which is {queries}, but is {k}")
    if variant not in get_args(Variant):
        raise UserError(f"variant must be one of {', '.join(get_args(Variant))}, not {variant!r}")
    if smoothing <= 0 or step_size <= 0:
        raise UserError(f"smoothing and step_size must be above 0, but are {smoothing} and {step_size}")

    with frozen(pipe), torch.no_grad():
        drawing = Drawing(pipe, prompt, seeds, steps=num_inference_steps, guidance=guidance_scale)
        found = drawing.noise.clone()
        bar = tqdm(total=rounds * len(found), desc="ZO-RankSGD", unit="round", disable=not progress)

        def best(points: Tensor, row: int, count: int) -> list[int]:
            images = drawing.images(points, [row] * len(points), batch_size)
            ranking = [int(i) for i in rank(images, drawing.prompts[row], count)]
            known = set(range(len(points)))
            if not ranking or len(set(ranking)) != len(ranking) or not set(ranking) <= known:
                raise UserError(
                    f"a ranking names one or more of {len(points)} images, each once, not {ranking}"
                )
            return ranking[:count]

        with bar:
            for row, seed in enumerate(drawing.seeds):
                # Not the seed itself: the first query must not lie in the direction of the start.
                generator = torch.Generator().manual_seed(seed + 2**32)
                x, directions, idle = drawing.noise[row], [], 0
                for _ in range(rounds):
                    drawn = torch.randn(queries, *x.shape, generator=generator).to(x.device)
                    near = x + smoothing * drawn
                    ranking = best(near, row, k)
                    directions.append(rank_direction(near, x, ranking, variant))
                    mean = torch.stack(directions).mean(0)
                    along = line_search_points(x, mean, step_size, queries - 2)
                    points = torch.cat([along, near[ranking[:1]], x[None]])
                    chosen = best(points, row, 1)[0]
                    success = chosen < len(points) - 1
                    x, directions = points[chosen], [] if success else directions
                    idle = 0 if success else idle + 1
                    bar.update()
                    if patience is not None and idle >= patience:
                        break
                found[row] = x
        images = drawing.images(found, range(len(found)), batch_size)
    return SteeringOutput(images=as_type(images, output_type), noise=found.cpu())


class ZORankSGDPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose call is :func:`zo_rank_sgd`; also as ``custom_pipeline``."""

    __call__ = zo_rank_sgd  # type: ignore[assignment]
