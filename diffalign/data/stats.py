"""``diffalign data stats``: what is in a set of pairs: sizes, scores, captions, prompts, generators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffalign.data import images
from diffalign.data.images import BadImage
from diffalign.data.pairs import PairDataset, open_pairs
from diffalign.data.rows import NO_VERDICT, Selection
from diffalign.errors import UserError
from diffalign.output import write_json, write_text

CLIP_TOKENS = 77  # with begin and end: what a CLIP text encoder reads of a caption
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}

CountTokens = Callable[[str], int]


@dataclass(kw_only=True)
class StatsConfig:
    """Describe a preference set: counts, sizes, score gaps, caption lengths, repeated prompts, generators.

    Attributes:
        dataset: folder, .jsonl, .json, .parquet or .tar file, folder saved by datasets, or hf://owner/name.
        split: which split, where the set has several.
        columns: other column names, by role: {prompt: text, chosen: winner, rejected: loser}.
        selection: what decides between two images, what becomes of repeated pairs, and filters.
        tokenizer: folder or hub id of a transformers tokenizer that counts tokens; CLIP's own by default.
        max_tokens: what the text encoder reads, begin and end included; longer captions are cut off.
        image_sizes: read the header of every image (no image is decoded).
        report: write all numbers to this JSON file.
        html: write a page with charts to this file.
    """

    dataset: str
    split: str | None = None
    columns: dict[str, str] | None = None
    selection: Selection = field(default_factory=Selection)
    tokenizer: str | None = None
    max_tokens: int = CLIP_TOKENS
    image_sizes: bool = True
    report: str | None = None
    html: str | None = None


@dataclass(frozen=True)
class Stats:
    """Numbers of a set of pairs. A distribution is ``{min, p10, median, p90, max, mean}``.

    Attributes:
        source: what was read.
        rows: rows of the source, or pairs of its lists.
        pairs: those that make a pair by text and label; images are not looked into.
        left_out: the others, by reason.
        ties: rows without a verdict.
        soft_labels: pairs with a preference between 0.5 and 1.
        prompts: distinct prompts.
        pairs_per_prompt: distribution.
        several_prompts: rows with more than one prompt to draw from.
        own_captions: pairs whose images have captions that differ from the prompt.
        tokens: distribution over distinct captions, begin and end included.
        cut_off: share of distinct captions longer than the text encoder reads.
        score_gap: distribution of score(chosen) - score(rejected); empty without score columns.
        against_label: share of scored pairs in which the rejected image has the higher score.
        generators: images by what made them, the most frequent first; empty where the set does not say.
        one_generator: share of pairs whose images have the same known generator; None likewise.
        shortest_side: distribution over images, in pixels; empty if sizes were not asked for.
        unequal_sizes: share of pairs whose images differ in size; None likewise.
    """

    source: str
    rows: int
    pairs: int
    left_out: dict[str, int]
    ties: int
    soft_labels: int
    prompts: int
    pairs_per_prompt: dict[str, float]
    several_prompts: int
    own_captions: int
    tokens: dict[str, float]
    cut_off: float
    score_gap: dict[str, float]
    against_label: float | None
    generators: dict[str, int]
    one_generator: float | None
    shortest_side: dict[str, float]
    unequal_sizes: float | None


@dataclass(frozen=True)
class Samples:
    """The numbers behind the distributions, for charts."""

    pairs_per_prompt: list[int]
    tokens: list[int]
    score_gap: list[float]
    shortest_side: list[int]


def stats(
    dataset: PairDataset,
    count_tokens: CountTokens,
    *,
    max_tokens: int = CLIP_TOKENS,
    image_sizes: bool = True,
    progress: bool = True,
) -> tuple[Stats, Samples]:
    """Describe `dataset`; decodes nothing, and with ``image_sizes=False`` touches no image at all."""
    per_prompt = Counter(dataset.prompts)
    captions = dataset.captions
    own = sum(both != (prompt, prompt) for both, prompt in zip(captions, dataset.prompts, strict=True))
    texts = {text for both in captions for text in both} | {t for row in dataset.all_prompts for t in row}
    tokens = [count_tokens(text) for text in texts]
    gaps = [a - b for a, b in dataset.properties("score") if a is not None and b is not None]
    models = dataset.properties("model")
    known = [(a, b) for a, b in models if a is not None and b is not None]
    sizes = _sizes(dataset, progress) if image_sizes else []
    reasons = Counter(bad.reason for bad in dataset.skipped)
    samples = Samples(list(per_prompt.values()), tokens, gaps, [min(size) for two in sizes for size in two])
    return Stats(
        source=dataset.source,
        rows=len(dataset) + len(dataset.skipped),
        pairs=len(dataset),
        left_out=dict(reasons.most_common()),
        ties=sum(reasons[reason] for reason in NO_VERDICT),
        soft_labels=sum(p < 1 for p in dataset.preferences),
        prompts=len(per_prompt),
        pairs_per_prompt=distribution(samples.pairs_per_prompt),
        several_prompts=sum(len(row) > 1 for row in dataset.all_prompts),
        own_captions=own,
        tokens=distribution(tokens),
        cut_off=sum(n > max_tokens for n in tokens) / max(1, len(tokens)),
        score_gap=distribution(gaps),
        against_label=sum(gap < 0 for gap in gaps) / len(gaps) if gaps else None,
        generators=dict(Counter(model for two in models for model in two if model is not None).most_common()),
        one_generator=sum(a == b for a, b in known) / len(known) if known else None,
        shortest_side=distribution(samples.shortest_side),
        unequal_sizes=sum(a != b for a, b in sizes) / len(sizes) if sizes else None,
    ), samples


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Quantiles and mean; empty of no values."""
    if not values:
        return {}
    found = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return found | {"mean": float(np.mean(values))}


def token_counter(tokenizer: str | None) -> CountTokens:
    """Counts tokens, begin and end included: CLIP's byte pairs, or a transformers tokenizer.

    Raises:
        UserError: no tokenizer there.
    """
    if tokenizer is None:
        from open_clip.tokenizer import SimpleTokenizer

        clip = SimpleTokenizer()
        return lambda text: len(clip.encode(text)) + 2
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {tokenizer}; give a folder or hub id, or leave it out") from error
    return lambda text: len(loaded(text).input_ids)


def table(found: Stats, max_tokens: int = CLIP_TOKENS) -> str:
    """The numbers as text."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.items()) or "none"
    lines = [
        f"{found.source}: {found.rows:,} rows, {found.pairs:,} pairs, {found.prompts:,} prompts",
        f"left out             {left_out}",
        f"soft labels          {found.soft_labels:,}",
        f"several prompts      {found.several_prompts:,}",
        f"own captions         {found.own_captions:,}",
        f"over {max_tokens} tokens       {found.cut_off:.1%} of the captions are cut off",
    ]
    if found.against_label is not None:
        lines.append(f"scores against label {found.against_label:.1%} of the pairs")
    if found.one_generator is not None:
        lines.append(f"one generator        {found.one_generator:.1%} of the pairs")
    if found.unequal_sizes is not None:
        lines.append(f"unequal sizes        {found.unequal_sizes:.1%} of the pairs")
    names = ("pairs_per_prompt", "tokens", "score_gap", "shortest_side")
    shown = {name: getattr(found, name) for name in names if getattr(found, name)}
    if shown:
        heads = [*QUANTILES, "mean"]
        lines += ["", f"{'':<18}" + "".join(f"{head:>10}" for head in heads)]
        lines += [
            f"{name.replace('_', ' '):<18}" + "".join(f"{values[head]:>10.4g}" for head in heads)
            for name, values in shown.items()
        ]
    if found.generators:
        lines += ["", "images by generator"]
        lines += [f"{count:>10,}  {model}" for model, count in list(found.generators.items())[:20]]
    return "\n".join(lines)


def page(found: Stats, samples: Samples, max_tokens: int = CLIP_TOKENS) -> str:
    """A self-contained HTML page: the table and a histogram of each distribution."""
    from diffalign.report import PALETTE, figure_uri, new_figure, render

    charts = []
    for name in ("pairs_per_prompt", "tokens", "score_gap", "shortest_side"):
        values = getattr(samples, name)
        if values:
            figure, axes = new_figure(5.0, 2.6)
            axes.hist(values, bins=40, color=PALETTE["ours"])
            axes.set_xlabel(name.replace("_", " "))
            axes.set_yscale("log" if name == "pairs_per_prompt" else "linear")
            if name == "tokens":
                axes.axvline(max_tokens, color=PALETTE["bad"])
            charts.append(figure_uri(figure))
    return render("data_stats.html", title=found.source, text=table(found, max_tokens), charts=charts)


def run(config: StatsConfig) -> Stats:
    """The command ``diffalign data stats``.

    Raises:
        UserError: the set can't be opened.
    """
    count_tokens = token_counter(config.tokenizer)
    dataset = open_pairs(
        config.dataset,
        split=config.split,
        columns=config.columns,
        ties="drop",
        max_bad=1.0,
        scan=0,
        selection=config.selection,
    )
    found, samples = stats(
        dataset, count_tokens, max_tokens=config.max_tokens, image_sizes=config.image_sizes
    )
    print(table(found, config.max_tokens))
    for name, write in (
        (config.report, lambda path: write_json(path, asdict(found))),
        (config.html, lambda path: write_text(path, page(found, samples, config.max_tokens))),
    ):
        if name is not None:
            path = Path(name).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f"wrote {path}")
    return found


def _sizes(dataset: PairDataset, progress: bool) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(width, height) of both images of every pair whose headers can be read."""
    sizes = []
    for index in tqdm(range(len(dataset)), "stats", unit="pair", disable=None if progress else True):
        payloads = dataset.payloads(index)
        try:
            chosen, rejected = (images.size(payload) for payload in payloads or ())
        except (BadImage, ValueError):  # ValueError: a bad row has no two payloads
            continue
        sizes.append((chosen, rejected))
    return sizes
