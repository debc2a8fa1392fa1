"""Which column plays which role: names people use, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffalign.errors import UserError, suggestion

# Role -> names it goes by, the usual one first. A pair is either (chosen, rejected), or two images and
# label_0, the verdict (1, 0, 0.5) or probability that image 0 is the better one: the columns of Pick-a-Pic.
CHOSEN = {
    "prompt": ("prompt", "caption"),
    "chosen": ("chosen", "chosen_file_name"),
    "rejected": ("rejected", "rejected_file_name"),
}
LABELLED = {
    "prompt": ("caption", "prompt"),
    "image_0": ("jpg_0", "image_0"),
    "image_1": ("jpg_1", "image_1"),
    "label_0": ("label_0",),
}
OPTIONAL = {
    "id": ("id", "ranking_id"),
    "has_label": ("has_label",),  # false: nobody voted
    "preference": ("preference",),  # probability that `chosen` is the better image; 1 where absent
}
ROLES = (*CHOSEN, "image_0", "image_1", "label_0", *OPTIONAL)


def resolve(source: str, found: Sequence[str], wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map roles to the columns `found` in `source`; `wanted` (role -> column) overrides the usual names.

    Returns the roles of one layout, ``prompt, chosen, rejected`` or ``prompt, image_0, image_1, label_0``,
    and those of `OPTIONAL` that are there.

    Raises:
        UserError: a needed column is not there, or `wanted` names an unknown role or column.
    """
    wanted = dict(wanted or {})
    for role, column in wanted.items():
        if role not in ROLES:
            raise UserError(
                f"unknown column role {role!r}{suggestion(role, list(ROLES))} (known: {', '.join(ROLES)})"
            )
        if column not in found:
            raise UserError(
                f"{source} has no column {column!r}, wanted as {role}{suggestion(column, list(found))} "
                f"(found: {_listed(found)})"
            )

    def column_of(role: str, names: Sequence[str]) -> str | None:
        return wanted.get(role) or next((name for name in names if name in found), None)

    labelled = {role: column_of(role, names) for role, names in LABELLED.items()}
    chosen = {role: column_of(role, names) for role, names in CHOSEN.items()}
    label_roles = [labelled[role] for role in LABELLED if role != "prompt"]
    layout = labelled if any(label_roles) and not (chosen["chosen"] and chosen["rejected"]) else chosen
    for role, name in layout.items():
        if name is None:
            usual = (LABELLED if layout is labelled else CHOSEN)[role][0]
            near = suggestion(usual, list(found))
            raise UserError(
                f"{source} has no column {usual!r}{near} (found: {_listed(found)}); pairs need "
                "prompt, chosen, rejected, or caption, jpg_0, jpg_1, label_0, "
                f"and other names are given as columns={{{role!r}: ...}}"
            )
    optional = {role: column_of(role, names) for role, names in OPTIONAL.items()}
    return {role: name for role, name in (layout | optional).items() if name is not None}


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found) or "none"
