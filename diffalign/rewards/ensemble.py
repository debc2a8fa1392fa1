"""Several rewards as one: weighted sums, the worst of them, their mean less their disagreement, and gates.

The two conservative ones are those of Coste et al. (2023), *Reward Model Ensembles Help Mitigate
Overoptimization*: a policy that is trained on one reward model learns its mistakes; several seldom make the
same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.spec import Aggregate


@dataclass(frozen=True)
class Member:
    """A reward with its part in an ensemble, see :class:`~diffalign.rewards.spec.RewardSpec`."""

    reward: Reward
    weight: float = 1.0
    at_least: float | None = None


# Of ``(K, B)`` weighted scores and UWO's coefficient.
_AGGREGATES: dict[Aggregate, Callable[[Tensor, float], Tensor]] = {
    "sum": lambda scores, _: scores.sum(0),
    "wco": lambda scores, _: scores.amin(0),
    "uwo": lambda scores, coefficient: scores.mean(0) - coefficient * scores.var(0, unbiased=False),
}


class Ensemble(Reward):
    """One score from those of several rewards.

    Args:
        members: the rewards; those with ``at_least`` are gates.
        aggregate: over the weighted scores of the others, ``sum``, ``wco`` (worst case: the smallest) or
            ``uwo`` (mean minus `coefficient` times their variance).
        coefficient: of ``uwo``.
        rejected_score: what an image gets that a gate rejects; needed with a gate, since no number is bad for
            every reward.

    Attributes:
        labels: what :meth:`parts` calls the members.

    Raises:
        UserError: no reward that counts, a gate without `rejected_score`, an option that is none.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        aggregate: Aggregate = "sum",
        coefficient: float = 1.0,
        rejected_score: float | None = None,
    ) -> None:
        names = [member.reward.name for member in members]
        super().__init__(names[0] if len(names) == 1 else f"{aggregate}({', '.join(names)})")
        scored = [member for member in members if member.at_least is None]
        if aggregate not in get_args(Aggregate):
            raise UserError(f"aggregate must be one of {', '.join(get_args(Aggregate))}, not {aggregate!r}")
        if not scored:
            raise UserError(f"rewards {names} have none that scores: leave at_least out of one of them")
        if len(scored) < len(members) and rejected_score is None:
            raise UserError("a gate (at_least) needs rejected_score: what an image gets that it rejects")
        if aggregate == "uwo" and coefficient < 0:
            raise UserError(f"the coefficient of uwo must be 0 or more, but is {coefficient}")
        self.members = list(members)
        self.aggregate: Aggregate = aggregate
        self.coefficient, self.rejected_score = coefficient, rejected_score
        self.judges = nn.ModuleList(member.reward for member in members)
        self.differentiable = all(member.reward.differentiable for member in scored)
        self.step_aware = any(member.reward.step_aware for member in members)
        repeated = Counter(names)
        self.labels = [
            f"{name}#{names[: i + 1].count(name)}" if repeated[name] > 1 else name
            for i, name in enumerate(names)
        ]

    def score(
        self, images: Tensor, prompts: Sequence[str], timesteps: Tensor | float | None = None
    ) -> Tensor:
        """As :meth:`Reward.score`; members that are step-aware are told ``timesteps``."""
        self._check_input(images, prompts)
        return self._checked(self.combine(self.parts(images, prompts, timesteps)), prompts)

    def parts(
        self, images: Tensor, prompts: Sequence[str], timesteps: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """The score of each member as it is, gates included; two of one name are numbered."""
        found = {}
        for label, member in zip(self.labels, self.members, strict=True):
            given = images if member.at_least is None else images.detach()
            at = {"timesteps": timesteps} if member.reward.step_aware else {}
            found[label] = member.reward.score(given, prompts, **at)
        return found

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine(self.parts(images, prompts))

    def unanimous(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        """Where no two members prefer different images of a pair, ``(B,)`` bool, from :meth:`parts` of the
        first images and of the second. Gates and weights of 0 have no vote, and equal scores are none."""
        voters = zip(self.members, first.values(), second.values(), strict=True)
        votes = torch.stack([m.weight * (one - two) for m, one, two in voters if m.at_least is None])
        return ~((votes > 0).any(0) & (votes < 0).any(0))

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """``(K, B)`` from what :meth:`parts` gave: weight times score of each member that is no gate, or
        ``rejected_score`` from all of them where a gate rejects the image."""
        pairs = list(zip(self.members, parts.values(), strict=True))
        return self._gated(torch.stack([m.weight * score for m, score in pairs if m.at_least is None]), parts)

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        """One score ``(B,)`` from what :meth:`parts` gave."""
        pairs = list(zip(self.members, parts.values(), strict=True))
        weighted = torch.stack([m.weight * score for m, score in pairs if m.at_least is None])
        return self._gated(_AGGREGATES[self.aggregate](weighted, self.coefficient), parts)

    def _gated(self, scores: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """``scores (..., B)``, `rejected_score` where a gate rejects the image."""
        for member, score in zip(self.members, parts.values(), strict=True):
            if member.at_least is not None and self.rejected_score is not None:
                scores = torch.where(score >= member.at_least, scores, self.rejected_score)
        return scores
