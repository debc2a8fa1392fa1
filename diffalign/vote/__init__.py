"""Votes of people on images: a small local page, whose file of votes preference training reads as it is.

from diffalign.data import image_scores, read_votes
from diffalign.vote import vote

file = vote("outputs/samples", mode="rank", annotator="anna")  # opens the browser; ends on request
image_scores(read_votes(file))  # {"00000.png": 0.67, ...}
"""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.tables import JSONL_NAMES
from diffalign.errors import UserError
from diffalign.vote.ballot import Ballot
from diffalign.vote.sets import ImageSet, Mode, absolute, arrange, read_sets, shuffled

__all__ = ["VoteConfig", "run", "vote"]

MOST = 9  # images of a set: each has a number key


@dataclass(frozen=True)
class VoteConfig:
    """Judge images by hand: a page on this machine shows pairs or sets and takes votes from the keyboard.

    Every vote is on disk before the next set comes up, and the same command goes on where it was stopped.
    The file of votes is a preference set: train on it with --dataset_name my_images/votes.jsonl.

    Attributes:
        images: folder with metadata.jsonl (file_name, prompt), as diffalign sample writes it; pairs or lists
            in any form that diffalign data reads; or a folder with one folder of images for each prompt
        out: JSONL file of votes, added to if it is there; votes.jsonl beside the images if not given
        mode: pair (which of two is better), rank (the best of a set, then the next), rate (a mark each)
        annotator: who votes; everybody judges all pairs or sets, in an order of their own
        set_size: images of a set at most, 2 to 9, for rank and rate
        per_prompt: pairs or sets of each prompt at most; all if not given
        scale: best mark, 2 to 9, for rate
        seed: of the choice of pairs, of their order and of what is on the left
        host: address to listen on; 0.0.0.0 lets other devices of the network vote that have the link
        port: port to listen on; 0 takes any free one
        no_open: only print the link, don't open a browser
        until_done: end with the last vote, instead of waiting for Finish or Ctrl-C
    """

    images: str
    out: str | None = None
    mode: Mode = "pair"
    annotator: str = "anonymous"
    set_size: int = MOST
    per_prompt: int | None = None
    scale: int = 5
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8765
    no_open: bool = False
    until_done: bool = False

    def __post_init__(self) -> None:
        for name in ("set_size", "scale"):
            if not 2 <= getattr(self, name) <= MOST:
                raise UserError(f"--{name} must be from 2 to {MOST}, not {getattr(self, name)}")
        if self.per_prompt is not None and self.per_prompt < 1:
            raise UserError(f"--per_prompt must be at least 1, not {self.per_prompt}")
        if not self.annotator.strip():
            raise UserError("--annotator is empty; give a name, or leave it out")
        if ":" in self.host or not self.host:
            raise UserError(f"--host takes an IPv4 address or a name, such as 0.0.0.0, not {self.host!r}")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port must be from 0 to 65535, not {self.port}")


def vote(images: str | Path, out: str | Path | None = None, **options: Any) -> Path:
    """Serve the page until voting is finished (button on the page, Ctrl-C, or ``until_done=True``).

    Args:
        images, out, options: the fields of :class:`VoteConfig`.

    Returns:
        The file of votes; :func:`diffalign.data.read_votes` reads it.

    Raises:
        UserError: bad options, nothing to judge, or a votes file or port in use.
    """
    return run(VoteConfig(images=str(images), out=None if out is None else str(out), **options))


def run(config: VoteConfig) -> Path:
    """The command ``diffalign vote``."""
    from filelock import FileLock, Timeout

    from diffalign.vote.server import serve

    out, tasks = _out(config), _tasks(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out.with_name(f".{out.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another diffalign vote writes to {out}; end it or choose another --out") from error
    with lock:
        ballot = Ballot(tasks, out, mode=config.mode, annotator=config.annotator, scale=config.scale)

        def announce(link: str) -> None:
            print(f"{ballot.judged} of {_count(ballot)} judged by {config.annotator}; votes go to {out}")
            print(f"Vote at {link}  (who has this link can vote; Ctrl-C ends)", flush=True)
            if not config.no_open and _has_screen():
                webbrowser.open(link)

        if ballot.coming or not config.until_done:
            serve(ballot, host=config.host, port=config.port, until_done=config.until_done, announce=announce)
        print(_summary(ballot))
    return out


def _has_screen() -> bool:
    """Without one, the browser found may be a text browser that takes the terminal over."""
    return sys.platform != "linux" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _out(config: VoteConfig) -> Path:
    source = absolute(config.images)
    beside = source if source.is_dir() else source.parent
    out = absolute(config.out) if config.out is not None else beside / "votes.jsonl"
    if out.suffix != ".jsonl" or out.name in JSONL_NAMES:
        raise UserError(f"--out must be a .jsonl file other than {' and '.join(JSONL_NAMES)}, not {out}")
    return out


def _tasks(config: VoteConfig) -> list[ImageSet]:
    sets, left_out = read_sets(config.images)
    tasks = arrange(
        sets, config.mode, set_size=config.set_size, per_prompt=config.per_prompt, seed=config.seed
    )
    why = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
    if not tasks:
        raise UserError(
            f"nothing to judge in {config.images}: no prompt has two images"
            + (f" (left out: {why})" * bool(why))
        )
    if why:
        print(f"left out: {why}")
    return shuffled(tasks, config.annotator, config.seed)


def _count(ballot: Ballot) -> str:
    return f"{len(ballot.tasks)} {'pairs' if ballot.mode == 'pair' else 'sets'}"


def _summary(ballot: Ballot) -> str:
    found = ballot.verdicts
    extra = "".join(f", {what}: {found[what]}" for what in ("ties", "skipped") if found[what])
    left = len(ballot.tasks) - ballot.judged
    rest = f"{left} to go: the same command goes on" if left else "all done"
    return (
        f"{ballot.judged} of {_count(ballot)} judged by {ballot.annotator}{extra}; {rest}.\n"
        f"Votes: {ballot.out}\n"
        f"Train: diffalign train diffusion-dpo --dataset_name {ballot.out} --selection.votes share"
    )
