"""``diffalign list``: what there is by name, with its formula and source, from the tables themselves."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(kw_only=True)
class ListConfig:
    """What there is by name, with its formula and source.

    In losses z is beta (d_w - d_l), d the log-ratio of policy and reference, w the chosen image and l the
    rejected one, s the sigmoid.
    """


def run_solvers(config: ListConfig) -> None:
    """The command ``diffalign list solvers``."""
    from diffalign.solvers import SOLVERS

    _show((name, cls.__name__, _first_paragraph(cls)) for name, cls in SOLVERS.items())


def run_losses(config: ListConfig) -> None:
    """The command ``diffalign list losses``."""
    from diffalign.losses import LIST_LOSSES, LOSSES

    def settings(*parts: str) -> str:
        return ", ".join(part for part in parts if part)

    _show(
        (
            name,
            settings("" if row.reference else "no reference", *(f"loss_options.{o}" for o in row.options)),
            _first_paragraph(row.fn),
        )
        for name, row in LOSSES.items()
    )
    print("\nOf lists ('diffalign train list-dpo'):\n")
    _show((name, "", _first_paragraph(row.fn)) for name, row in LIST_LOSSES.items())


def run_rewards(config: ListConfig) -> None:
    """The command ``diffalign list rewards``."""
    from diffalign.rewards import REWARDS

    _show((name, "", entry.measures) for name, entry in REWARDS.items())


def _first_paragraph(thing: Any) -> str:
    """Of its docstring, without the marks of code."""
    text = inspect.getdoc(thing.func if isinstance(thing, partial) else thing) or ""
    return " ".join(text.split("\n\n")[0].split()).replace(":func:", "").replace("`", "")


def _show(rows: Iterable[tuple[str, str, str]]) -> None:
    """Names, what belongs to them in brackets, and what they are below."""
    for name, aside, text in rows:
        print(f"{name}  ({aside})" if aside else name)
        print(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
