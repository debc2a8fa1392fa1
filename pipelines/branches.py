"""Sample with a stochastic sampler that branches: at some steps several next states are drawn from one state
and carried on side by side, until a random one of them is the state that the next ones are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.likelihood import Transition
from diffalign.models.base import ModelAdapter
from diffalign.pipelines.guidance import Guidance
from diffalign.pipelines.rollout import RowNoise

#: Predicted clean latents (M, ...), for each its row, and the time of the prediction (0: they are finished)
#: -> scores (M, R)
Judge = Callable[[Tensor, Sequence[int], float], Tensor]


@dataclass(frozen=True)
class Branches:
    """Where trajectories of ``steps`` steps branch, and how their states are laid out.

    A *segment* is what lies between one branching and the next: the state that it starts from, then, after
    each of its steps, one state of every candidate.

    Attributes:
        starts: the steps that draw candidates; their segments end where the next begins, the last at the end.
        steps: of the sampler.
        candidates: how many are drawn.
    """

    starts: tuple[int, ...]
    steps: int
    candidates: int

    @staticmethod
    def every(transition: Transition, candidates: int, *, first: int, inner_steps: int = 0) -> Branches:
        """Branch at step ``first`` and, after ``inner_steps`` ordinary ones, again. A step without noise
        cannot branch; candidates are carried through it."""
        starts = range(first, len(transition), 1 + inner_steps)
        noisy = tuple(step for step in starts if transition.std[step] > 0)
        return Branches(noisy, len(transition), candidates)

    @property
    def segments(self) -> list[range]:
        """The steps of each segment."""
        return [range(a, b) for a, b in zip(self.starts, (*self.starts[1:], self.steps), strict=True)]

    def __len__(self) -> int:
        """States that are kept of a row."""
        return len(self.starts) + self.candidates * (self.steps - self.starts[0])

    def origin(self, segment: int) -> int:
        """Place of the state that a segment starts from."""
        return segment + self.candidates * (self.starts[segment] - self.starts[0])

    def after(self, segment: int, step: int, candidate: int) -> int:
        """Place of a candidate's state after ``step``, one of the segment's."""
        return self.origin(segment) + 1 + self.candidates * (step - self.starts[segment]) + candidate


@torch.no_grad()
def branched_rollout(
    adapter: ModelAdapter,
    transition: Transition,
    guidance: Guidance,
    prompts: Sequence[int],
    branches: Branches,
    judge: Judge,
    *,
    shape: Sequence[int],
    start_seeds: Sequence[int],
    seeds: Sequence[int],
    batch_size: int = 2,
    after_step: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Trees of one trajectory per row, their candidates judged at the end of each segment.

    There the network is asked for all candidates, as it has to be for the next step anyway: what it predicts
    of the clean latent is judged, and the prediction of the one that goes on is used for drawing the next.
    So a tree takes ``len(transition)`` network calls, as a plain trajectory does, of more rows each.

    Args:
        adapter, transition, guidance, prompts, shape, start_seeds, after_step: as in
            :func:`~diffalign.pipelines.rollout.rollout`; states are rounded as there.
        branches: where to branch.
        judge: called once per segment and batch; rows count from the first of ``prompts``.
        seeds: of each row's steps, and of which candidate goes on.
        batch_size: rows at a time; the network sees ``branches.candidates`` times as many.

    Returns:
        States ``(rows, len(branches), ...)`` in host memory, in the network's precision, placed as
        ``branches`` says; and scores ``(rows, segments, candidates, R)`` on the device.
    """
    states, scores = [], []
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        own = slice(rows.start, rows.stop)
        x = RowNoise(start_seeds[own], shape, adapter.device).draw(1).to(adapter.dtype)
        noise = RowNoise(seeds[own], shape, adapter.device)
        kept, found = [], []
        for step in range(branches.steps):
            members = x.shape[:2]  # candidates, rows
            x = x.flatten(0, 1)
            raw = guidance.predict(
                adapter, x, transition.times(step, x), [prompts[row] for row in rows] * members[0]
            )
            if step in branches.starts:
                if step > branches.starts[0]:
                    belief = transition.predicted_x0(raw, x, step)
                    found.append(judge(belief, [*rows] * members[0], float(transition.timesteps[step])))
                    chosen = noise.choose(members[0]) * members[1] + torch.arange(members[1]).to(x.device)
                    x, raw = x[chosen], raw[chosen]
                kept.append(x[None])
                x = transition(raw, x, step).sample(noise.draw(branches.candidates))
            else:
                gaussian = transition(raw, x, step)
                x = gaussian.sample(noise.draw(members[0]).flatten(0, 1)).unflatten(0, members)
            x = x.to(adapter.dtype)
            if step >= branches.starts[0]:
                kept.append(x)
            after_step()
        found.append(judge(x.flatten(0, 1), [*rows] * len(x), 0.0))
        states.append(torch.cat(kept).transpose(0, 1).cpu())
        scores.append(torch.stack(found).unflatten(1, (branches.candidates, len(rows))).permute(2, 0, 1, 3))
    return torch.cat(states), torch.cat(scores)
