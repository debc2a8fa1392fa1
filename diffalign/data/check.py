"""``diffalign data check``: read a whole preference set and say what is wrong with it, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.data.examples import BadRow, is_damage
from diffalign.data.pairs import PairDataset, open_pairs
from diffalign.errors import UserError
from diffalign.output import write_json


@dataclass
class CheckConfig:
    """Read every row of a preference set, decode every image, and report what can't be used.

    Attributes:
        dataset: folder with pairs.jsonl, parquet or tar shards, or saved by datasets; a .jsonl, .json,
            .parquet or .tar file; or hf://owner/name.
        split: which split, where the set has several.
        columns: other column names, by role: {prompt: text, chosen: winner, rejected: loser}.
        resolution: count the images with a side below this many pixels; training would enlarge them.
        against: another set, as for dataset, that must share no prompt with this one.
        max_bad: share of damaged rows above which the set counts as unusable (exit code 2).
        show: how many of the bad rows to print; the JSON report has them all.
        report: write all findings to this JSON file.
    """

    dataset: str
    split: str | None = None
    columns: dict[str, str] | None = None
    resolution: int | None = None
    against: str | None = None
    max_bad: float = 0.01
    show: int = 20
    report: str | None = None


@dataclass(frozen=True)
class Findings:
    """What a whole reading of a set gave.

    Attributes:
        source: what was read.
        rows: rows in the set.
        pairs: rows that make a usable pair.
        prompts: distinct prompts among those.
        ties: rows without a verdict (tie, no label, no score); no damage.
        damaged: rows that can't be used for any other reason.
        reasons: rows left out, by reason, the most frequent first.
        left_out: each of these rows.
        repeated: pairs that an earlier row holds as well (same prompt, images and winner).
        contradicted: pairs whose verdict is the opposite of an earlier row's.
        repeated_ids: rows with an id that an earlier row has.
        unequal_sizes: pairs whose images differ in size; a preference may be for sharpness.
        below_resolution: images with a side below the resolution asked for; None if none was.
        shortest_side: shortest side of any usable image, in pixels.
        leaked: prompts that the set given as `against` holds as well, but for case and spaces.
    """

    source: str
    rows: int
    pairs: int
    prompts: int
    ties: int
    damaged: int
    reasons: dict[str, int]
    left_out: list[BadRow]
    repeated: int
    contradicted: int
    repeated_ids: int
    unequal_sizes: int
    below_resolution: int | None
    shortest_side: int
    leaked: list[str] = field(default_factory=list)

    @property
    def damaged_share(self) -> float:
        """Damaged rows per row that has a verdict."""
        return self.damaged / max(1, self.damaged + self.pairs)


def check(dataset: PairDataset, *, resolution: int | None = None, progress: bool = True) -> Findings:
    """Read every pair of `dataset`."""
    verdicts: dict[tuple[str, ...], str] = {}  # (prompt, both digests in order) -> digest of the winner
    counts: Counter[str] = Counter()
    prompts, ids = set(), set()
    shortest = 0
    bar = tqdm(range(len(dataset)), "check", unit="pair", disable=None if progress else True)
    for index in bar:
        pair = dataset.read(index)
        if isinstance(pair, BadRow):
            continue
        counts["pairs"] += 1
        prompts.add(pair.prompt)
        counts["repeated_ids"] += pair.id in ids
        ids.add(pair.id)
        question, winner = (pair.prompt, *sorted(pair.digests)), pair.digests[0]
        if question in verdicts:
            counts["repeated" if verdicts[question] == winner else "contradicted"] += 1
        verdicts.setdefault(question, winner)
        sides = [min(pair.chosen.size), min(pair.rejected.size)]
        counts["unequal_sizes"] += pair.chosen.size != pair.rejected.size
        counts["below"] += sum(side < (resolution or 0) for side in sides)
        shortest = min([*sides, shortest or sides[0]])
    left_out = dataset.skipped
    ties = sum(not is_damage(bad) for bad in left_out)
    return Findings(
        source=dataset.source,
        rows=counts["pairs"] + len(left_out),
        pairs=counts["pairs"],
        prompts=len(prompts),
        ties=ties,
        damaged=len(left_out) - ties,
        reasons=dict(Counter(bad.reason for bad in left_out).most_common()),
        left_out=left_out,
        repeated=counts["repeated"],
        contradicted=counts["contradicted"],
        repeated_ids=counts["repeated_ids"],
        unequal_sizes=counts["unequal_sizes"],
        below_resolution=None if resolution is None else counts["below"],
        shortest_side=shortest,
    )


def shared_prompts(dataset: PairDataset, other: PairDataset) -> list[str]:
    """Prompts of `dataset` that `other` has too, but for case and spaces; images stay untouched."""
    theirs = {_plain(prompt) for row in other.all_prompts for prompt in row}
    ours = dict.fromkeys(prompt for row in dataset.all_prompts for prompt in row)
    return [prompt for prompt in ours if _plain(prompt) in theirs]


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def table(findings: Findings, show: int = 20, resolution: int | None = None) -> str:
    """The findings as text: totals, reasons, the first `show` rows, and notes."""
    lines = [
        f"{findings.source}: {findings.rows:,} rows, {findings.pairs:,} usable pairs, "
        f"{findings.prompts:,} prompts"
    ]
    if findings.left_out:
        lines += ["", f"{'left out because of':<22}{'rows':>10}{'share':>9}"]
        for reason, count in findings.reasons.items():
            lines.append(f"{reason:<22}{count:>10,}{count / findings.rows:>9.2%}")
        shown = findings.left_out[:show]
        if shown:
            width = max(len(bad.id) for bad in shown) + 2
            lines += ["", f"{'row':>8}  {'id':<{width}}reason"]
            lines += [f"{bad.row:>8}  {bad.id:<{width}}{bad.reason}" for bad in shown]
        if len(findings.left_out) > show:
            lines.append(
                f"... and {len(findings.left_out) - show:,} more (--show, or all in --report FILE.json)"
            )
    notes = {
        "pairs that repeat an earlier row": findings.repeated,
        "pairs that contradict an earlier row": findings.contradicted,
        "pairs with the id of an earlier row": findings.repeated_ids,
        "pairs of two unequal sizes": findings.unequal_sizes,
        f"images with a side below {resolution} px": findings.below_resolution or 0,
        "prompts shared with the other set": len(findings.leaked),
    }
    noted = [f"{what}: {count:,}" for what, count in notes.items() if count]
    return "\n".join([*lines, "", *noted] if noted else lines)


def run(config: CheckConfig) -> Findings:
    """Check, print, write the report.

    Raises:
        UserError: the set can't be used: columns missing, no usable pair, too many damaged rows, or prompts
            shared with `against`.
    """
    dataset = open_pairs(config.dataset, split=config.split, columns=config.columns, max_bad=1.0, scan=0)
    other = open_pairs(config.against, max_bad=1.0, scan=0) if config.against is not None else None
    findings = check(dataset, resolution=config.resolution)
    if other is not None:
        findings = replace(findings, leaked=shared_prompts(dataset, other))
    print(table(findings, config.show, config.resolution))
    if config.report is not None:
        value: dict[str, Any] = asdict(findings) | {"damaged_share": findings.damaged_share}
        path = Path(config.report).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
        print(f"\nreport: {path}")
    if not findings.pairs:
        raise UserError(f"no usable pair in {findings.source}")
    if findings.damaged_share > config.max_bad:
        raise UserError(
            f"{findings.damaged_share:.1%} of the rows of {findings.source} are damaged, more than --max_bad "
            f"{config.max_bad:g} allows; repair or remove them, or train with a larger max_bad"
        )
    if findings.leaked:
        raise UserError(
            f"{len(findings.leaked):,} prompts of {findings.source} are in {config.against} as well (first: "
            f"{findings.leaked[0]!r}); split one set with PairDataset.split_by_prompt instead"
        )
    print("\nusable")
    return findings
