"""``diffalign bench align``: every alignment method on the playground, with the same pairs and steps.

Per seed: the base model's own samples are labelled by the learned scorer, each method trains on those pairs,
and base and aligned models draw held-out captions from the same noises, which the exact verifier judges.
Everything lies in a folder per seed and method, whole or absent: an interrupted contest goes on where it was.
A method is one row of :data:`METHODS`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from diffalign import output
from diffalign.errors import UserError, suggestion

Option = int | float | bool | str


@dataclass(frozen=True)
class Method:
    """One row of the contest.

    Attributes:
        config, trainer: ``module:class``.
        options: of the trainer, where the common ones (steps, batch, rank, rate) do not do.
        reference: whether it is held to a reference, and so should beat fine-tuning.
        flow: whether it is for flow models, such as playground/flow, only.
    """

    config: str
    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    flow: bool = False


def _row(
    module: str,
    name: str,
    *,
    reference: bool = True,
    flow: bool = False,
    options: Mapping[str, Any] = {},
) -> Method:
    path = f"diffalign.trainers.{module}:{name}"
    return Method(f"{path}Config", f"{path}Trainer", options, reference, flow)


#: Own samples are drawn as the model is judged; DDO's, whose reference is the model itself, without guidance.
_ROUNDS = {"round_steps": 50, "sampling_steps": 12, "sampling_batch_size": 32}
_GUIDED = _ROUNDS | {"sampling_guidance_scale": 4.0}

METHODS: dict[str, Method] = {
    "sft": _row("sft", "SFT", reference=False),
    "diffusion-dpo": _row("diffusion_dpo", "DiffusionDPO"),
    "flow-dpo": _row("flow_dpo", "FlowDPO", flow=True),
    "sdpo": _row("diffusion_dpo", "DiffusionDPO", options={"sdpo_mu": 0.9}),
    "mapo": _row("mapo", "MaPO", reference=False),
    "diffusion-kto": _row("kto", "DiffusionKTO"),
    "seppo": _row("seppo", "SePPO", options=_GUIDED),
    "spin-diffusion": _row("seppo", "SePPO", options=_GUIDED | {"flip": "none", "reference_pool": "latest"}),
    "ddo": _row("ddo", "DDO", options=_ROUNDS | {"beta_ddo": 1.0, "alpha_ddo": 1.0}),
}


@dataclass(kw_only=True)
class AlignConfig:
    """Compare alignment methods on the playground: verifier accuracy, scorer, implicit accuracy, against SFT.

    Each method gets the same pairs of the base model's own samples, optimiser steps and images per step, and
    is judged on held-out captions by the verifier, which no training sees. Writes align.json, align.csv,
    align.md, gains.png and report.html. Called again with the same settings, it goes on.

    Attributes:
        output_dir: folder for the contest
        model: pipeline folder whose captions are the playground's; playground/sd is the shipped one
        methods: rows of the table: sft, diffusion-dpo, mapo, diffusion-kto, seppo, spin-diffusion, ddo, ...;
            flow-dpo is for flow models alone
        options: options of single methods, such as {diffusion-kto: {beta_kto: 1000}}
        seeds: each with pairs, training, captions and noises of its own
        pair_prompts: captions that pairs are sampled for
        pair_images: images per caption, of which the best and the worst make a pair
        margin: pairs whose scores differ by less are left out
        train_steps: optimiser steps
        train_batch_size: pairs (or single images) per step
        learning_rate: of the LoRA
        rank: of the LoRA
        held_out: share of the pairs' captions that the implicit accuracy is measured on
        eval_prompts: held-out captions per seed
        steps: network evaluations per image for pairs and for judging
        guidance: classifier-free guidance scale, everywhere
        overwrite: start anew where other settings have been used
    """

    output_dir: str = "outputs/bench/align"
    model: str = "playground/sd"
    methods: list[str] = field(default_factory=lambda: [n for n, m in METHODS.items() if not m.flow])
    options: dict[str, dict[str, Option]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    pair_prompts: int = 300
    pair_images: int = 4
    margin: float = 1.5
    train_steps: int = 200
    train_batch_size: int = 16
    learning_rate: float = 1e-4
    rank: int = 16
    held_out: float = 0.15
    eval_prompts: int = 400
    steps: int = 12
    guidance: float = 4.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give at least one")
        for name in (*self.methods, *self.options):
            if name not in METHODS:
                known = ", ".join(METHODS)
                raise UserError(f"unknown method {name!r}{suggestion(name, list(METHODS))} (known: {known})")
        least = {"pair_prompts": 1, "pair_images": 2, "train_steps": 1, "train_batch_size": 1, "rank": 1}
        for name, value in (least | {"eval_prompts": 2, "steps": 1}).items():
            if getattr(self, name) < value:
                raise UserError(f"--{name} must be at least {value}, but is {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out must be between 0 and 1, but is {self.held_out}")


@dataclass(frozen=True)
class Judged:
    """What one model drew for the held-out captions of one seed.

    Attributes:
        true: (N,) bool, whether the verifier finds the caption true.
        score: (N,) float, by the learned scorer.
        facts: of the training: seconds, metrics of the last validation, alarms.
    """

    true: np.ndarray
    score: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        output.write_json(
            path, {"true": self.true.tolist(), "score": self.score.tolist(), "facts": self.facts}
        )

    @classmethod
    def read(cls, path: Path) -> Judged:
        """What :meth:`write` wrote."""
        found = json.loads(path.read_text())
        return cls(np.array(found["true"], bool), np.array(found["score"], float), found["facts"])


def run(config: AlignConfig) -> list[dict[str, Any]]:
    """The command ``diffalign bench align``; returns the rows of the table."""
    from diffusers.utils import logging

    from diffalign.bench.align_report import write_report

    logging.set_verbosity_error()  # of LoRAs without a text encoder's part, which all of these are
    folder = _open(config)
    jobs = [(seed, name) for seed in config.seeds for name in ("base", *config.methods)]
    judged: dict[tuple[int, str], Judged] = {}
    with tqdm(jobs, desc="contest", unit="run") as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            judged[seed, name] = contestant(config, folder / f"seed-{seed}", seed, name)
    rows = table(config, judged)
    print(write_report(folder, config, rows))
    print(f"\nreport: {folder / 'report.html'}")
    return rows


def _open(config: AlignConfig) -> Path:
    """The folder of the contest, if it is new or holds one with the same settings."""
    free = ("output_dir", "overwrite", "methods", "seeds")  # more of these may be added later
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    file = Path(config.output_dir).expanduser() / "settings.json"
    going_on = file.is_file() and json.loads(file.read_text()) == settings
    if file.is_file() and not going_on and not config.overwrite:
        raise UserError(
            f"{str(file.parent)!r} holds a contest with other settings (settings.json): choose another "
            "--output_dir, or start anew with --overwrite"
        )
    folder = output.prepare(config.output_dir, overwrite=going_on or config.overwrite)
    if not going_on:
        for path in folder.glob("seed-*"):
            shutil.rmtree(path)
        output.write_json(file, settings)
    return folder


def contestant(config: AlignConfig, folder: Path, seed: int, name: str) -> Judged:
    """Train and judge one method with one seed, or read what was found before."""
    from diffalign.pipelines.load import load_lora, load_pipeline

    own = folder / name
    result = own / "judged.json"
    if result.is_file():
        return Judged.read(result)
    own.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    pipe = load_pipeline(config.model)
    if name != "base":
        pairs = draw_pairs(config, folder / "pairs", seed)
        facts = train(config, own, pairs, seed, name)
        load_lora(pipe, str(own))
        facts["implicit"] = implicit_accuracy(pipe, pairs, config.held_out)
    judged = judge(pipe, config, seed, facts)
    judged.write(result)
    return judged


def draw_pairs(config: AlignConfig, folder: Path, seed: int) -> Path:
    """Pairs of the base model's own samples, the best against the worst of each caption."""
    from diffalign.pipelines.load import load_pipeline
    from diffalign.playground import load_scorer
    from diffalign.playground.captions import draw_captions
    from diffalign.playground.pairs import draw_candidates, write

    if not folder.is_dir():
        candidates = draw_candidates(
            load_pipeline(config.model),
            load_scorer(),
            draw_captions(seed, config.pair_prompts, held_out=False),
            images=config.pair_images,
            steps=config.steps,
            guidance=config.guidance,
            seed=seed,
            progress="sampling candidates",
        )
        write(candidates, folder, margin=config.margin)
    return folder


def recipe(config: AlignConfig, seed: int, name: str) -> dict[str, Any]:
    """Options of the trainer by their command-line names."""
    common = {
        "seed": seed,
        "max_train_steps": config.train_steps,
        "train_batch_size": config.train_batch_size,
        "learning_rate": config.learning_rate,
        "lr_warmup_steps": min(20, config.train_steps // 5),
        "rank": config.rank,
        "validation_share": config.held_out,
        "validation_steps": config.train_steps,
        "checkpointing_steps": max(1, config.train_steps // 4),
        "checkpoints_total_limit": 1,
    }
    known = {option.name for option in fields(_load(METHODS[name].config))}
    common = {option: value for option, value in common.items() if option in known}  # not all hold pairs out
    return common | dict(METHODS[name].options) | config.options.get(name, {})


def train(config: AlignConfig, folder: Path, pairs: Path, seed: int, name: str) -> dict[str, Any]:
    """A LoRA by one method, through the trainer that every user has; what its log says at the end."""
    from diffalign.trainers import log

    method = METHODS[name]
    options = recipe(config, seed, name)
    chosen = _load(method.config)(
        pretrained_model_name_or_path=config.model,
        dataset_name=str(pairs),
        output_dir=str(folder),
        cache_dir=str(folder.parent / "cache"),
        resume_from_checkpoint="auto",
        progress=True,
        **options,
    )
    began = time.perf_counter()
    result = _load(method.trainer)(chosen).train()
    records = log.read(folder / "log.jsonl")
    return {
        "step_seconds": float(np.median([r["step_seconds"] for r in records])),
        "seconds": time.perf_counter() - began,
        "alarms": sorted(result.alarms),
    }


def implicit_accuracy(pipe: Any, folder: Path, held_out: float) -> list[float]:
    """Of each held-out pair, whether the LoRA made the chosen image likelier by more than the rejected one.

    1, 0, or 1/2 if by as much; for all methods at the same times and noises, on captions none trained on.
    """
    import torch

    from diffalign.data import open_pairs
    from diffalign.data.transforms import fit
    from diffalign.likelihood import add_noise, evaluate
    from diffalign.models import load_adapter
    from diffalign.models.reference import adapters_off
    from diffalign.trainers.validation import TIMES

    adapter = load_adapter(pipe)
    adapter.reference = adapters_off
    pairs = open_pairs(folder).split_by_prompt(held_out)[1]
    won = []
    for i, pair in enumerate(tqdm(pairs, desc="held-out pairs", unit="pair", leave=False)):
        pixels = torch.stack([fit(image, adapter.default_resolution).pixels for image in pair.images])
        latents = adapter.encode_images(pixels)["latents"].float().repeat(len(TIMES), 1, 1, 1)
        cond = adapter.encode_prompts([pair.prompt] * len(latents))
        numbers = torch.Generator().manual_seed(i)
        noise = torch.randn(len(TIMES), *latents.shape[1:], generator=numbers).repeat_interleave(2, 0)
        t = torch.tensor([int(part * adapter.schedule.num_train_timesteps) for part in TIMES])
        noised = add_noise(
            adapter.schedule, adapter.prediction_type, latents, noise.to(latents), t.repeat_interleave(2)
        )
        with torch.no_grad():
            ratio = evaluate(adapter.denoise, noised, cond).log_ratio().reshape(-1, 2).mean(0)
        won.append(float(ratio[0] > ratio[1]) + 0.5 * float(ratio[0] == ratio[1]))
    return won


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def judge(pipe: Any, config: AlignConfig, seed: int, facts: dict[str, Any]) -> Judged:
    """Held-out captions from noises that depend on the seed alone, judged by the verifier and the scorer."""
    from diffalign.demo import verified
    from diffalign.pipelines.generate import generate
    from diffalign.pipelines.load import make_scheduler
    from diffalign.playground import load_scorer
    from diffalign.playground.captions import draw_captions
    from diffalign.rewards import score_images

    captions = draw_captions(1000 + seed, config.eval_prompts, held_out=True)
    images = generate(
        pipe,
        captions,
        [10_000_000 + 100_000 * seed + i for i in range(len(captions))],
        steps=config.steps,
        guidance=config.guidance,
        scheduler=make_scheduler("dpm-solver++", pipe.scheduler.config),
        batch_size=40,
        progress="judging",
    ).images
    scores = score_images(load_scorer(), list(images), captions)
    return Judged(verified(captions, images), np.asarray(scores, dtype=np.float64), facts)


# ------------------------------------------------------------------- table


def table(config: AlignConfig, judged: Mapping[tuple[int, str], Judged]) -> list[dict[str, Any]]:
    """A row per method, over all seeds: values, and differences with 95 % intervals.

    Differences are paired by caption and noise, and the intervals are of these; what the seed of the training
    does is seen in ``by_seed``.
    """
    from diffalign.demo import mean, share

    def all_of(name: str, what: str) -> np.ndarray:
        return np.concatenate([getattr(judged[seed, name], what) for seed in config.seeds]).astype(float)

    rows = []
    sft = "sft" if "sft" in config.methods else None
    for name in ("base", *config.methods):
        true, score = all_of(name, "true"), all_of(name, "score")
        row: dict[str, Any] = {"method": name, "verifier": share(true > 0.5), "scorer": float(score.mean())}
        if name != "base":
            facts = [judged[seed, name].facts for seed in config.seeds]
            row |= {
                "gain": mean(true - all_of("base", "true")),
                "scorer_gain": mean(score - all_of("base", "score")),
                "against_sft": mean(true - all_of(sft, "true")) if sft and name != sft else None,
                "by_seed": [
                    float((judged[seed, name].true.astype(float) - judged[seed, "base"].true).mean())
                    for seed in config.seeds
                ],
                "implicit": mean(np.concatenate([fact["implicit"] for fact in facts])),
                "reference": METHODS[name].reference,
                "alarms": sorted({alarm for fact in facts for alarm in fact["alarms"]}),
                "step_seconds": float(np.mean([fact["step_seconds"] for fact in facts])),
                "seconds": float(np.mean([fact["seconds"] for fact in facts])),
            }
            row["verdict"] = verdict(row)
        rows.append(row)
    if sft:
        unit = next(row["step_seconds"] for row in rows if row["method"] == sft)
        for row in rows[1:]:
            row["step_cost"] = row["step_seconds"] / unit
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """What the interval of the difference to SFT says; if that is nothing good, what the run says of why."""
    gap = row["against_sft"]
    if gap is None:
        return "-"
    if gap["low"] > 0:
        return "beats sft"
    found = "worse than sft" if gap["high"] < 0 else "no clear difference to sft"
    implicit = row["implicit"]
    learnt = implicit["low"] > 0.5
    why = (
        f"held-out pairs won {implicit['value']:.0%}, {'more' if learnt else 'not clearly more'} than chance"
    )
    return f"{found}; {why}" + (f"; alarms: {', '.join(row['alarms'])}" if row["alarms"] else "")
