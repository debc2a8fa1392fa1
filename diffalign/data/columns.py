"""Which column plays which role: names people use, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from diffalign.errors import UserError, suggestion

Names = Mapping[str, tuple[str, ...]]  # role -> names it goes by, the usual one first


class Layout(NamedTuple):
    """Roles that together make a row, and how a message says so."""

    names: Names
    needs: str


_PAIRS_NEED = "pairs need prompt, chosen, rejected, or caption, jpg_0, jpg_1, label_0"
# A pair is (chosen, rejected), or two images with a verdict `label_0` (1, 0, 0.5 or the probability that
# image 0 is the better one: the columns of Pick-a-Pic), or two of a list of images of one prompt, with scores
# (higher is better) or ranks (lower is better).
CHOSEN = Layout(
    {
        "prompt": ("prompt", "caption"),
        "chosen": ("chosen", "chosen_file_name"),
        "rejected": ("rejected", "rejected_file_name"),
    },
    _PAIRS_NEED,
)
LABELLED = Layout(
    {
        "prompt": ("caption", "prompt"),
        "image_0": ("jpg_0", "image_0"),
        "image_1": ("jpg_1", "image_1"),
        "label_0": ("label_0",),
    },
    _PAIRS_NEED,
)
LISTED = Layout(
    {
        "prompt": ("prompt", "caption"),
        "images": ("images", "file_path", "image_path"),  # the latter two: HPDv2, training and test split
        "scores": ("scores", "human_preference"),
    },
    "lists need prompt, images, and scores or ranks",
)
UNPAIRED = Layout(
    {
        "image": ("image", "file_name", "jpg", "png", "image_path"),
        "prompt": ("prompt", "caption", "text"),
    },
    "single images need image (prompt, label, score may be there as well)",
)
PAIRS = (CHOSEN, LABELLED, LISTED)
_SIDES = ("chosen", "rejected", "0", "1")
OPTIONAL: Names = {
    "id": ("id", "ranking_id"),
    "has_label": ("has_label",),  # false: nobody voted
    "preference": ("preference",),  # probability that `chosen` is the better image; 1 where absent
    "nsfw": ("nsfw", "is_nsfw", "NSFW"),
    "ranks": ("ranks", "rank"),  # instead of scores
    "label": ("label", "labels"),  # of a single image: good (1) or bad (0)
    "score": ("score",),  # of a single image
    # Properties of an image: of the chosen or rejected one, of image 0 or 1, or a list of all.
    **{f"{what}_{side}": (f"{what}_{side}",) for what in ("caption", "score", "model") for side in _SIDES},
    **{f"uid_{side}": (f"image_{side}_uid", f"uid_{side}") for side in _SIDES},
    "captions": ("captions",),
    "models": ("models",),
    "uids": ("uids",),
}
ROLES = tuple(
    dict.fromkeys(role for names in (*(x.names for x in (*PAIRS, UNPAIRED)), OPTIONAL) for role in names)
)


def resolve(source: str, found: Sequence[str], wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map roles to the columns `found` in `source`; `wanted` (role -> column) overrides the usual names.

    Returns the roles of one layout, ``prompt, chosen, rejected``, ``prompt, image_0, image_1, label_0`` or
    ``prompt, images, scores`` (or ``ranks``), and those of `OPTIONAL` that are there. ``label_0`` may be
    missing where ``score_0`` and ``score_1`` are there.

    Raises:
        UserError: a needed column is not there, or `wanted` names an unknown role or column.
    """
    wanted = _checked(source, found, wanted)
    optional = _roles(OPTIONAL, found, wanted)
    chosen, labelled, listed = (_roles(layout.names, found, wanted) for layout in PAIRS)
    verdict = "scores" in listed or "ranks" in optional
    images = labelled.keys() - {"prompt"}
    if {"chosen", "rejected"} <= chosen.keys():
        layout, roles, waived = CHOSEN, chosen, set()
    elif "images" in listed and (not images or (verdict and "label_0" not in images)):
        layout, roles, waived = LISTED, listed, {"scores"} if "ranks" in optional else set()
    elif images:
        layout, roles, waived = LABELLED, labelled, set()
        if {"score_0", "score_1"} <= optional.keys():
            waived = {"label_0"}
    else:
        layout, roles, waived = CHOSEN, chosen, set()
    _refuse(source, found, layout, layout.names.keys() - roles.keys() - waived)
    return roles | optional


def resolve_images(
    source: str, found: Sequence[str], wanted: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """As :func:`resolve` for single images: ``image`` and, where there, ``prompt`` and those of `OPTIONAL`.

    None if `source` holds pairs or lists instead.

    Raises:
        UserError: as :func:`resolve`.
    """
    wanted = _checked(source, found, wanted)
    roles = _roles(UNPAIRED.names, found, wanted)
    pairs = [_roles(layout.names, found, wanted).keys() - {"prompt"} for layout in PAIRS]
    if "image" not in wanted and any(len(named) > 1 for named in pairs):
        return None
    _refuse(source, found, UNPAIRED, {"image"} - roles.keys())
    return roles | _roles(OPTIONAL, found, wanted)


def resolve_unjudged(
    source: str, found: Sequence[str], wanted: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """As :func:`resolve_images` for single images, or ``prompt``, ``images`` and those of `OPTIONAL` that are
    there of lists without scores or ranks; None if `source` holds something else.

    Raises:
        UserError: as :func:`resolve`.
    """
    wanted = _checked(source, found, wanted)
    if "image" in _roles(UNPAIRED.names, found, wanted):
        return resolve_images(source, found, wanted)
    roles, optional = _roles(LISTED.names, found, wanted), _roles(OPTIONAL, found, wanted)
    pairs = [_roles(layout.names, found, wanted).keys() - {"prompt"} for layout in (CHOSEN, LABELLED)]
    if "images" not in roles or "scores" in roles or "ranks" in optional or any(pairs):
        return None
    _refuse(source, found, LISTED, {"prompt"} - roles.keys())
    return roles | optional


def _checked(source: str, found: Sequence[str], wanted: Mapping[str, str] | None) -> dict[str, str]:
    for role, column in (wanted or {}).items():
        if role not in ROLES:
            raise UserError(
                f"unknown column role {role!r}{suggestion(role, list(ROLES))} (known: {', '.join(ROLES)})"
            )
        if column not in found:
            raise UserError(
                f"{source} has no column {column!r}, wanted as {role}{suggestion(column, list(found))} "
                f"(found: {_listed(found)})"
            )
    return dict(wanted or {})


def _roles(names: Names, found: Sequence[str], wanted: Mapping[str, str]) -> dict[str, str]:
    columns = {
        role: wanted.get(role) or next((name for name in usual if name in found), None)
        for role, usual in names.items()
    }
    return {role: name for role, name in columns.items() if name is not None}


def _refuse(source: str, found: Sequence[str], layout: Layout, missing: Set[str]) -> None:
    for role, names in layout.names.items():
        if role in missing:
            raise UserError(
                f"{source} has no column {names[0]!r}{suggestion(names[0], list(found))} "
                f"(found: {_listed(found)}); {layout.needs}, "
                f"and other names are given as columns={{{role!r}: ...}}"
            )


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found) or "none"
