"""One sampler for several models: a table fitted to a family of problems, to be judged on others.

``diffalign bench plans --family`` asks whether models have enough in common for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.bench.plans import Case, PlansConfig, calibrated
from diffalign.errors import UserError
from diffalign.solvers.calibrated import Table, Tables
from diffalign.solvers.fitting import Problem, Truth, solve
from diffalign.solvers.noise import NoiseSchedule


@dataclass(frozen=True)
class Family:
    """Problems that one table per number of steps is fitted to; the tables are kept in `folder`."""

    config: PlansConfig
    seed: int
    folder: Path

    @cached_property
    def members(self) -> list[Case]:
        """Each problem at each scale."""
        return [
            Case(self.config, name, guidance, self.seed)
            for name in self.config.family or ()
            for guidance in self.config.family_guidance
        ]

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler config of the first member."""
        return self.members[0].scheduler

    @property
    def mu(self) -> float | None:
        """Shift of a flow model's grid."""
        return self.members[0].mu

    @property
    def iterations(self) -> int:
        """Steps of descent per fit."""
        return min(member.iterations for member in self.members)

    def check(self) -> None:
        """UserError unless members and problems are on one noise schedule, so that a table can serve all."""
        own = NoiseSchedule.from_config(self.scheduler).fingerprint()
        for name in dict.fromkeys((*(self.config.family or ()), *self.config.problems)):
            other = Case(self.config, name, 1.0, self.seed).scheduler
            if NoiseSchedule.from_config(other).fingerprint() != own:
                raise UserError(
                    f"{name} has another noise schedule than {self.members[0].name}: a table serves one "
                    "schedule, so --family and --problems must share theirs"
                )

    @cached_property
    def fit(self) -> tuple[Problem, Truth]:
        """All members as one problem."""
        problem = union([member._problem(held_out=False) for member in self.members])
        return problem, solve(problem, self.config.reference_steps)

    def table(self, steps: int) -> Table:
        """Fitted when first asked for."""
        file = self.folder / f"family-{self.seed}-{steps}.safetensors"
        if not file.is_file():
            table = calibrated(self, steps).chosen.table
            info = {"family": self.config.family, "guidance_scales": self.config.family_guidance}
            schedule = NoiseSchedule.from_config(self.scheduler).fingerprint()
            Tables({steps: table}, schedule, "zero", info).save(file)
        return Tables.load(file).of(steps)


def union(members: Sequence[Problem]) -> Problem:
    """Several problems on one noise schedule as one: the rows to fit of all, then those held out of all.

    A sample is a row of numbers, those of its problem and then zeros, which the networks leave at zero: so
    errors and states are those of the problems themselves, whatever their shapes.
    """
    pieces = [(member, member.parts[half]) for half in (0, 1) for member in members]
    starts = [0]
    for _, part in pieces:
        starts.append(starts[-1] + part.stop - part.start)
    width = max(member.noise[0].numel() for member in members)
    dtype = max((member.noise.dtype for member in members), key=lambda dtype: dtype.itemsize)

    def flat(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return F.pad(x, (0, width - x.shape[1])).to("cpu", dtype)

    def predict(x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, rows: slice) -> Tensor:
        found = []
        for (member, part), first, after in zip(pieces, starts, starts[1:], strict=False):
            low, high = max(rows.start, first), min(rows.stop, after)
            if low >= high:
                continue
            shape = member.noise.shape[1:]
            own = x[low - rows.start : high - rows.start, : shape.numel()].reshape(-1, *shape)
            there = slice(part.start + low - first, part.start + high - first)
            found.append(flat(member.predict(own.to(member.noise), t, alpha, sigma, there)))
        return torch.cat(found)

    return Problem(
        predict,
        members[0].schedule,
        torch.cat([flat(member.noise[part]) for member, part in pieces]),
        batch_size=min(member.batch_size for member in members),
        held_out=sum(part.stop - part.start for _, part in pieces[len(members) :]),
    )
