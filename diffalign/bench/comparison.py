"""What a comparison of samplers found: a row for each sampler and number of evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffalign.bench.record import markdown
from diffalign.bench.reference import Reference


@dataclass(frozen=True)
class Row:
    """One sampler at one number of network evaluations.

    Attributes:
        sampler: its name in the comparison.
        steps: evaluations that it was allowed.
        inference_steps: the ``num_inference_steps`` that it got for them: fewer for a sampler that evaluates
            several times within a step.
        guidance: classifier-free guidance scale.
        dtype: of the network.
        nfe: network evaluations per image, counted on the network; a guided pair is one.
        seconds: wall time per image, prompts and decoding included.
        outside: the part of ``seconds`` that was not spent in the network.
        values: metric -> its value for each image. ``error`` is ||z - z*|| / ||z*|| with z the final latents
            and z* the yardstick; ``pixel_error`` the mean absolute difference of the decoded images, of 255;
            ``feature_distance`` 1 - cosine of their features, ``lpips`` or what else was asked for;
            ``score/<name>`` a score. All but the first only where there are images.
        images: (at most 8, H, W, 3) uint8, the first ones.
    """

    sampler: str
    steps: int
    inference_steps: int
    guidance: float
    dtype: str
    nfe: float
    seconds: float
    outside: float
    values: dict[str, list[float]]
    images: np.ndarray | None = field(default=None, repr=False)

    def mean(self, metric: str) -> float:
        """Over the images."""
        return float(np.mean(self.values[metric]))

    @property
    def error(self) -> float:
        """Mean over the images."""
        return self.mean("error")

    @property
    def error_se(self) -> float:
        """Standard error of that mean."""
        errors = np.asarray(self.values["error"])
        return float(errors.std(ddof=1) / len(errors) ** 0.5) if len(errors) > 1 else 0.0

    @property
    def error_median(self) -> float:
        """Of the same: a few samples that end at another mode don't move it."""
        return float(np.median(self.values["error"]))

    @property
    def scores(self) -> dict[str, float]:
        """Mean of each score."""
        prefix = "score/"
        return {name.removeprefix(prefix): self.mean(name) for name in self.values if name.startswith(prefix)}


@dataclass(repr=False)
class Comparison:
    """What one comparison found.

    Attributes:
        rows: one per dtype, guidance scale, sampler and number of evaluations.
        references: guidance scale -> the yardstick.
        skipped: what could not be run, and why, a sentence each.
    """

    rows: list[Row] = field(default_factory=list)
    references: dict[float, Reference] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """The table without times, for a prompt or a notebook, and what it leaves out."""
        unsaid = {"inference_steps", "error_se", "seconds", "outside"}
        if len({row.dtype for row in self.rows}) < 2:
            unsaid.add("dtype")
        rows = [{name: cell for name, cell in row.items() if name not in unsaid} for row in self.table()]
        floor = [f"errors below {self.reference_error:.2g} say nothing"] if self.reference_error else []
        return "\n".join([markdown(rows), *floor, *self.skipped])

    @property
    def reference_error(self) -> float:
        """How far the least certain yardstick still moved, as a mean relative error; 0 for exact solutions.

        A sampler's error below it says nothing.
        """
        return max((reference.error for reference in self.references.values()), default=0.0)

    @property
    def samplers(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(row.sampler for row in self.rows))

    def table(self) -> list[dict[str, Any]]:
        """A tidy table: the rows as flat dictionaries, for CSV, JSON or ``pandas.DataFrame``.

        All have the same keys; scores are ``score/<name>``, means over the images like every metric.
        """
        names = [n for row in self.rows[:1] for n in row.values if n != "error"]
        return [
            {
                "sampler": row.sampler,
                "dtype": row.dtype,
                "guidance": row.guidance,
                "steps": row.steps,
                "inference_steps": row.inference_steps,
                "nfe": row.nfe,
                "error": row.error,
                "error_se": row.error_se,
                "error_median": row.error_median,
                **{name: row.mean(name) for name in names},
                "seconds": row.seconds,
                "outside": row.outside,
            }
            for row in self.rows
        ]
