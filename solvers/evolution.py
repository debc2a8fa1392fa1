"""Evolutionary search over samplers: where the network is asked and, if wanted, how each step is made.

A genome is a tuple with one tuple per step: its place in the range of half log-SNR, 0 the noisy end and 1 the
first training step, and then one choice for each option of the step. :class:`Space` says what may stand where
and how genomes change; :func:`evolve` selects. Nothing here knows what a genome means or how it is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: ``((place, choice, ...), ...)``, a step each; places rise from 0.
Genome = tuple[tuple[Any, ...], ...]

_TRIES = 50  # to make a genome that has not been seen


@dataclass(frozen=True)
class Space:
    """Genomes of n steps.

    Attributes:
        choices: what each option of each step may be, (n, options) tuples of values; without options,
            ``((),) * n``, places alone are searched.
        gap: by which places differ at least.
        rate: probability that a mutation changes a place, or a choice.
    """

    choices: tuple[tuple[tuple[Any, ...], ...], ...]
    gap: float = 1e-4
    rate: float = 0.15

    def __len__(self) -> int:
        return len(self.choices)

    def random(self, rng: np.random.Generator) -> Genome | None:
        """Places uniform, choices too; None if two places fall together."""
        choices = [[_pick(rng, values) for values in step] for step in self.choices]
        return self._genome(np.sort(rng.random(len(self) - 1)), choices)

    def mutated(self, rng: np.random.Generator, genome: Genome) -> Genome | None:
        """Some places drawn anew or, as often, moved by about half the distance to a neighbour; some choices
        drawn anew."""
        places = np.array([step[0] for step in genome])
        around = np.append(places, 1.0)
        moved = places.copy()
        for k in range(1, len(self)):
            if rng.random() < self.rate:
                nearest = min(around[k] - around[k - 1], max(around[k + 1] - around[k], self.gap))
                moved[k] = rng.random() if rng.random() < 0.5 else places[k] + 0.5 * nearest * rng.normal()
        choices = [
            [
                _pick(rng, values) if rng.random() < self.rate else old
                for values, old in zip(*pair, strict=True)
            ]
            for pair in zip(self.choices, (step[1:] for step in genome), strict=True)
        ]
        return self._genome(np.sort(moved[1:]), choices)

    def crossed(self, rng: np.random.Generator, one: Genome, other: Genome) -> Genome | None:
        """Each step from either parent; None if their places do not rise."""
        steps = [pair[int(rng.integers(2))] for pair in zip(one, other, strict=True)]
        return self._genome(np.array([step[0] for step in steps[1:]]), [list(step[1:]) for step in steps])

    def _genome(self, places: Any, choices: Sequence[Sequence[Any]]) -> Genome | None:
        whole = np.concatenate([[0.0], places])
        if np.any(np.diff(whole) < self.gap) or whole[-1] > 1.0:
            return None
        return tuple((float(p), *c) for p, c in zip(whole, choices, strict=True))


def _pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


@dataclass
class Evolved:
    """What has been judged.

    Attributes:
        scores: genome -> its score, lower is better; infinite where it was not a number.
    """

    scores: dict[Genome, float] = field(default_factory=dict)

    def best(self, count: int) -> list[Genome]:
        """The `count` best, best first."""
        return sorted(self.scores, key=self.scores.__getitem__)[:count]


def evolve(
    space: Space,
    evaluate: Callable[[Genome], float],
    starts: Iterable[Genome],
    *,
    population: int = 50,
    generations: int = 10,
    parents: int = 10,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Evolved:
    """The search of AutoDiffusion (Li et al. 2023): the best of all generations, their mutants and crossings.

    The first generation has the starts, mutants of them up to half of it, and random genomes. Each later one
    has half mutants and a fifth crossings of the `parents` best so far, and random genomes. No genome is
    judged twice, and all on what `evaluate` holds fixed (the same noises), so that none is chosen by luck of
    the draw.

    Args:
        evaluate: genome -> score, lower is better.
        starts: genomes that are known to be good; all of them are judged.
        population: genomes in a generation.
        parents: how many of the best breed.
        seed: of everything random.
        progress: called after each evaluation.
    """
    rng = np.random.default_rng(seed)
    found = Evolved()

    def judged(genomes: Iterable[Genome]) -> None:
        for genome in genomes:
            score = evaluate(genome)
            found.scores[genome] = score if math.isfinite(score) else math.inf
            progress()

    def fresh(count: int, make: Callable[[], Genome | None]) -> Iterator[Genome]:
        for _ in range(count):
            made = (make() for _ in range(_TRIES))
            new = next((genome for genome in made if genome is not None and genome not in found.scores), None)
            if new is not None:
                yield new

    first = list(dict.fromkeys(starts))
    judged(first)
    for generation in range(generations):
        pool = found.best(parents) if generation else first
        room = population if generation else max(population - len(first), 0)
        mutants = room // 2 if pool else 0
        crossings = room // 5 if generation and len(pool) > 1 else 0
        judged(fresh(mutants, lambda: space.mutated(rng, _pick(rng, pool))))  # noqa: B023
        judged(fresh(crossings, lambda: space.crossed(rng, _pick(rng, pool), _pick(rng, pool))))  # noqa: B023
        judged(fresh(room - mutants - crossings, lambda: space.random(rng)))
    return found
