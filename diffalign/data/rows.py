"""From the text and label columns of a table to rows: what each says, or why it says nothing.

No image is touched, but to tell repeated pairs apart where images have neither uids nor paths.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, get_args

from diffalign.data import images
from diffalign.data.tables import Table
from diffalign.errors import UserError, suggestion

# Rows left out because of what the voters said, or by an option. Everything else that is skipped is damage.
NO_VERDICT = ("tie", "no label", "no score")
CHOICES = (
    *NO_VERDICT,
    "repeated pair",
    "small margin",
    "other generator",
    "two generators",
    "not safe",
    "below min_side",
    "below chosen_at_least",
)

LabelBy = Literal["votes", "scores"]
Votes = Literal["separate", "majority", "share"]
Lists = Literal["best_worst", "all"]


@dataclass(frozen=True)
class Selection:
    """What makes a pair of a row, and which pairs are kept.

    Attributes:
        label_by: what decides which image is the better one: the label (votes) or the score columns (scores).
        votes: several rows with one prompt and the same two images: keep them apart (separate), one pair for
            the majority (majority), or one pair with the share of votes as its preference (share).
        lists: which pairs of a list of images: the best with the worst (best_worst), or any two that differ
            (all).
        margin: least difference of the two scores; needs score columns.
        chosen_at_least: keep pairs whose better image has this score or more, whatever the other one has:
            with the scores of a judge (of safety, of faithfulness) no image is taught that the judge rejects.
        same_generator: keep pairs whose images come from one model (columns model_0 and model_1).
        generator: keep pairs of which both images come from this model.
        min_side: keep pairs whose images have no side below this many pixels.
        drop_nsfw: leave rows out that the nsfw column marks.
        prompt_weights: weigh every pair by 1 / pairs of its prompt, so that every prompt counts alike.
    """

    label_by: LabelBy = "votes"
    votes: Votes = "separate"
    lists: Lists = "best_worst"
    margin: float = 0.0
    chosen_at_least: float | None = None
    same_generator: bool = False
    generator: str | None = None
    min_side: int = 0
    drop_nsfw: bool = False
    prompt_weights: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Selection:
        """From names and values, as a configuration file has them.

        Raises:
            UserError: an unknown name.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(
                    f"unknown selection {name!r}{suggestion(name, known)} (known: {', '.join(known)})"
                )
        return cls(**options)

    def check(self, source: str, roles: Mapping[str, str]) -> None:
        """Refuse what is no option, and options that need columns which are not there.

        Raises:
            UserError: names the option and the columns.
        """
        for name, choices in (("label_by", LabelBy), ("votes", Votes), ("lists", Lists)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise UserError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name in ("margin", "min_side"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}")
        needs = {
            "label_by=scores": (self.label_by == "scores", "score"),
            "margin": (self.margin > 0, "score"),
            "chosen_at_least": (self.chosen_at_least is not None, "score"),
            "same_generator": (self.same_generator, "model"),
            "generator": (self.generator is not None, "model"),
        }
        for option, (used, what) in needs.items():
            if used and not all(property_role(what, role) in roles for role in pair_roles(roles)):
                usual = ", ".join(property_role(what, role) for role in pair_roles(roles))
                raise UserError(f"{option} needs the columns {usual}, which {source} lacks")
        if self.drop_nsfw and "nsfw" not in roles:
            raise UserError(f"drop_nsfw needs a column nsfw, which {source} lacks; name it with columns")


class Place(NamedTuple):
    """Where an image is: its role and, in a list of images, its number."""

    role: str
    item: int | None = None


class Row(Protocol):
    """What every kind of row has."""

    @property
    def number(self) -> int:
        """In the table."""

    @property
    def id(self) -> str: ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """The first is the one of evaluation."""

    @property
    def key(self) -> tuple[int, str]: ...


class PairRow(NamedTuple):
    """Two images of one prompt."""

    number: int
    id: str
    prompts: tuple[str, ...]
    places: tuple[Place, Place]
    first_wins: float  # probability that the image of the first place is the better one

    @property
    def key(self) -> tuple[int, str]:
        return self.number, self.id


class ImageRow(NamedTuple):
    """One image."""

    number: int
    id: str
    prompts: tuple[str, ...]
    place: Place
    label: float | None  # probability that the image is a good one
    score: float | None = None  # higher is better

    @property
    def key(self) -> tuple[int, str]:
        return self.number, self.id


class Cells:
    """Columns of a table by role, each read once, and the properties of an image by its place."""

    def __init__(self, table: Table, roles: Mapping[str, str]) -> None:
        self.table, self.roles = table, roles
        self._read: dict[str, list[Any]] = {}

    def __call__(self, role: str, default: Any = None) -> list[Any]:
        """All cells of a role; `default` in every row where there is no such column."""
        if role not in self.roles:
            return [default] * len(self.table)
        if role not in self._read:
            self._read[role] = self.table.column(self.roles[role])
        return self._read[role]

    def of(self, what: str, number: int, place: Place) -> Any:
        """Property `what` (caption, score, model, uid) of the image at a place, None where there is none."""
        role = column_role(what, place.role, self.roles, lambda: self("label_0")[number])
        return one_of(self(role)[number], place) if role in self.roles else None


def property_role(what: str, role: str) -> str:
    """The role that holds property `what` of the images of a role: score_0 for image_0, scores for images."""
    if role == "images":
        return "ranks" if what == "rank" else f"{what}s"
    return what if role == "image" else f"{what}_{role.removeprefix('image_')}"


def column_role(what: str, role: str, roles: Mapping[str, str], label_0: Callable[[], Any]) -> str:
    """:func:`property_role`, or, where two labelled images are described by verdict (``caption_chosen``,
    ``caption_rejected``), the one of them that the label gives to this image."""
    direct = property_role(what, role)
    if direct in roles or role not in ("image_0", "image_1") or "label_0" not in roles:
        return direct
    won = label_0()
    if not is_number(won):
        return direct
    return f"{what}_chosen" if (won >= 0.5) == (role == "image_0") else f"{what}_rejected"


def pair_roles(roles: Mapping[str, str]) -> tuple[str, ...]:
    """The roles of the images of a layout."""
    layouts = (("chosen", "rejected"), ("images",), ("image_0", "image_1"))
    if "label_0" in roles:
        return layouts[2]
    return next(layout for layout in layouts if set(layout) <= roles.keys())


def one_of(cell: Any, place: Place) -> Any:
    """The part of a cell that belongs to a place: all of it, or one of a list; None where the list ends."""
    if place.item is None:
        return cell
    return cell[place.item] if isinstance(cell, list | tuple) and place.item < len(cell) else None


def pair_rows(table: Table, roles: Mapping[str, str], selection: Selection) -> list[tuple[PairRow, str]]:
    """Every row (of lists, every pair) with why it is ruled out, or an empty string."""
    cells = Cells(table, roles)
    verdicts = _listed(cells, selection) if "images" in pair_roles(roles) else paired(cells, selection)
    rows = [(row, reason or _choice(cells, row, selection)) for row, reason in verdicts]
    return _merged(cells, rows, selection.votes) if selection.votes != "separate" else rows


def image_rows(table: Table, roles: Mapping[str, str], drop_nsfw: bool) -> Iterator[tuple[ImageRow, str]]:
    """Every row of single images with why it is ruled out, or an empty string."""
    cells = Cells(table, roles)
    place = Place("image")
    labels = cells("label")
    for number, row_id, prompts, reason in texts(cells, needed="prompt" in roles):
        label: float | None
        label, wrong = _probability(labels[number]) if "label" in roles else (None, "")
        if drop_nsfw and not reason and _is_nsfw(cells("nsfw")[number]):
            reason = "not safe"
        yield ImageRow(number, row_id, prompts, place, label), reason or wrong


def texts(cells: Cells, needed: bool = True) -> Iterator[tuple[int, str, tuple[str, ...], str]]:
    """Number, id, prompts and reason of every row."""
    table = cells.table
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # a prompt has many rows: one copy of it in memory
    for number, (prompt, name) in enumerate(zip(cells("prompt"), cells("id"), strict=True)):
        prompts, reason = _prompts(prompt) if needed else (("",), "")
        if number in table.broken:
            reason = "unreadable line"
        row_id = str(name) if name not in (None, "") else table.row_name(number)
        yield number, row_id, shared.setdefault(prompts, prompts), reason


def _prompts(cell: Any) -> tuple[tuple[str, ...], str]:
    """All captions of a row that are not blank, and what is wrong if there is none."""
    texts = list(cell) if isinstance(cell, list | tuple) else [cell]
    if not all(text is None or isinstance(text, str) for text in texts):
        return ("",), "caption is not text"
    prompts = tuple(text for text in texts if text and text.strip())
    return (prompts, "") if prompts else (("",), "empty caption")


def paired(cells: Cells, selection: Selection) -> Iterator[tuple[PairRow, str]]:
    first, second = (Place(role) for role in pair_roles(cells.roles))
    by_scores = selection.label_by == "scores" or not {"label_0", "chosen"} & cells.roles.keys()
    wins = cells("label_0" if "label_0" in cells.roles else "preference", 1.0)
    labelled = cells("has_label", True)
    for number, row_id, prompts, reason in texts(cells):
        if by_scores:
            win, wrong = _by_scores(*(cells.of("score", number, place) for place in (first, second)))
        else:
            given = wins[number]
            if given is None and "label_0" not in cells.roles:
                given = 1.0  # an optional column that this row leaves empty
            win, wrong = _probability(given if labelled[number] else None)
        uids = [cells.of("uid", number, place) for place in (first, second)]
        if uids[0] == uids[1] and uids[0] not in (None, "") and wrong in ("", "tie"):
            wrong = "identical images"
        yield PairRow(number, row_id, prompts, (first, second), win), reason or wrong


def _listed(cells: Cells, selection: Selection) -> Iterator[tuple[PairRow, str]]:
    scores, sign = (cells("scores"), 1) if "scores" in cells.roles else (cells("ranks"), -1)
    for number, row_id, prompts, reason in texts(cells):
        given = scores[number] if isinstance(scores[number], list | tuple) else []
        worth = {i: sign * float(s) for i, s in enumerate(given) if is_number(s)}
        order = sorted(worth, key=lambda i: (-worth[i], i))
        if reason or len(order) < 2:
            places = (Place("images", 0), Place("images", 1))
            yield PairRow(number, row_id, prompts, places, 0.5), reason or "no label"
            continue
        pairs = [(order[0], order[-1])]
        if selection.lists == "all" and worth[order[0]] > worth[order[-1]]:
            pairs = [(i, j) for i, j in combinations(order, 2) if worth[i] > worth[j]]
        for i, j in pairs:
            name = row_id if selection.lists == "best_worst" else f"{row_id}:{i}>{j}"
            win, wrong = (1.0, "") if worth[i] > worth[j] else (0.5, "tie")
            if wrong == "" and worth[i] - worth[j] < selection.margin:
                wrong = "small margin"
            yield PairRow(number, name, prompts, (Place("images", i), Place("images", j)), win), wrong


def _choice(cells: Cells, row: PairRow, selection: Selection) -> str:
    """Why an option leaves a pair out, or an empty string."""
    if selection.drop_nsfw and _is_nsfw(cells("nsfw")[row.number]):
        return "not safe"
    if selection.same_generator or selection.generator is not None:
        models = [cells.of("model", row.number, place) for place in row.places]
        if selection.generator is not None and models != [selection.generator] * 2:
            return "other generator"
        if models[0] is None or models[0] != models[1]:
            return "two generators"
    if selection.chosen_at_least is not None:
        score = cells.of("score", row.number, row.places[row.first_wins < 0.5])
        if not is_number(score) or score < selection.chosen_at_least:
            return "below chosen_at_least"
    if selection.margin and "images" not in cells.roles:
        scores = [cells.of("score", row.number, place) for place in row.places]
        if not all(map(is_number, scores)) or abs(scores[0] - scores[1]) < selection.margin:
            return "small margin"
    return ""


def _merged(cells: Cells, rows: Iterable[tuple[PairRow, str]], votes: Votes) -> list[tuple[PairRow, str]]:
    """Rows of one prompt and the same two images as one row, the first of them; the others are left out."""
    merged: list[tuple[PairRow, str]] = []
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)  # votes for the image that sorts first
    first_of: dict[tuple[Any, ...], tuple[int, bool]] = {}
    for row, reason in rows:
        if reason and reason != "tie":
            merged.append((row, reason))
            continue
        one, two = (_identity(cells, row, place) for place in row.places)
        turned = one > two
        key = (row.prompts, *sorted((one, two)))
        groups[key].append(1 - row.first_wins if turned else row.first_wins)
        if key in first_of:
            merged.append((row, "repeated pair"))
        else:
            first_of[key] = (len(merged), turned)
            merged.append((row, reason))
    for key, (position, turned) in first_of.items():
        share = math.fsum(groups[key]) / len(groups[key])
        if votes == "majority":
            share = 0.5 if share == 0.5 else float(share > 0.5)
        win = 1 - share if turned else share
        row = merged[position][0]._replace(first_wins=win)
        merged[position] = (row, "tie" if win == 0.5 else "")
    return merged


def _identity(cells: Cells, row: PairRow, place: Place) -> str:
    """What tells an image from others: its uid, its path, or the hash of its bytes."""
    uid = cells.of("uid", row.number, place)
    if uid not in (None, ""):
        return str(uid)
    cell = one_of(cells.table.cell(row.number, cells.roles[place.role]), place)
    if isinstance(cell, str):
        return cell
    try:
        return images.digest(images.load(cell, cells.table.root))
    except images.BadImage:
        return f"row {row.number} {place}"


def _by_scores(first: Any, second: Any) -> tuple[float, str]:
    if not is_number(first) or not is_number(second):
        return 0.5, "no score"
    return (0.5, "tie") if first == second else (float(first > second), "")


def _probability(value: Any) -> tuple[float, str]:
    """A verdict as the probability that the (first) image is the good one, and why it is none."""
    if not is_number(value):
        return 0.5, "no label"
    if not 0 <= value <= 1:
        return 0.5, "label outside 0..1"
    return float(value), "tie" if value == 0.5 else ""


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_nsfw(value: Any) -> bool:
    """A boolean, a probability (from 0.5 on), or a word such as LAION has."""
    if isinstance(value, str):
        return value.strip().lower() in ("nsfw", "unsafe", "likely", "true", "yes", "1")
    return is_number(value) and value >= 0.5
