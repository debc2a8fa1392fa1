"""``diffalign bench align``: every alignment method on the playground, for the same price.

Per seed: the base model's own samples are labelled by the learned scorer, each method trains on those pairs,
or on samples of its own that the same scorer judges, and base and aligned models draw held-out captions from
the same noises, which the exact verifier judges. The price is optimiser steps, network evaluations or time.
Everything lies in a folder per seed and method, whole or absent: an interrupted contest goes on where it was.
A method is one row of :data:`METHODS`.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from diffalign import output
from diffalign.bench.align_judge import Judged, implicit_accuracy, judge
from diffalign.bench.kept import open_folder
from diffalign.errors import UserError, suggestion

Option = int | float | bool | str


@dataclass(frozen=True)
class Method:
    """One row of the contest.

    Attributes:
        config, trainer: ``module:class``.
        options: of the trainer, where the common ones (steps, batch, rank, rate) do not do.
        few_step: further ones on a few-step model, whose sampler noises its predicted image anew.
        reference: whether it is held to a reference, and so should beat fine-tuning.
        own: whether it samples what it learns from by itself, and has the scorer judge it.
        on: the models that it is for: any, flow (playground/flow) or few-step (playground/few-step).
        data: what it learns from, unless `own`: pairs; pairs whose rejected image has a perturbed caption
            (captions); or all images of the pairs' captions with their scores (lists).
    """

    config: str
    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    few_step: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    own: bool = False
    on: Literal["any", "flow", "few-step"] = "any"
    data: Literal["pairs", "captions", "lists"] = "pairs"


def _row(module: str, name: str, **rest: Any) -> Method:
    path = f"diffalign.trainers.{module}:{name}"
    return Method(f"{path}Config", f"{path}Trainer", **rest)


#: Own samples are drawn as the model is judged; DDO's, whose reference is the model itself, without guidance.
_ROUNDS = {"round_steps": 50, "sampling_steps": 12, "sampling_batch_size": 32}
_GUIDED = _ROUNDS | {"sampling_guidance_scale": 4.0}
#: Two optimiser steps a round: the verdict on one image says little about any one of its steps, so batches
#: are large. Counted in items, one prompt at one step with all its images.
_OWN = {"prompts_per_round": 64, "images_per_prompt": 4, "sample_batch_size": 64, "learning_rate": 7e-4}
_STEPS = _OWN | {"same_start": True, "trained_steps": 0.5, "gradient_accumulation_steps": 4}
_IMAGES = _OWN | {"inner_epochs": 4, "learning_rate": 1e-4, "sample_solver": "dpm-solver++"}
#: A few-step model has few noisy steps, and all of them decide content.
_FEW_STEP = {"transition": "renoise", "sample_spacing": "trailing", "trained_steps": 1.0}
#: Candidates go on to the end of the sampler before they are judged: in the middle they all look wrong.
_FINISHED = {"images_per_prompt": 1, "branch_from": 0, "inner_steps": 1000, "compare": "all"}
OWN_CAPTIONS = 4000  # that on-policy methods draw their prompts from

METHODS: dict[str, Method] = {
    "sft": _row("sft", "SFT", reference=False),
    "diffusion-dpo": _row("diffusion_dpo", "DiffusionDPO"),
    "flow-dpo": _row("flow_dpo", "FlowDPO", on="flow"),
    "sdpo": _row("diffusion_dpo", "DiffusionDPO", options={"sdpo_mu": 0.9}),
    "dcpo": _row("dcpo", "DCPO", data="captions"),
    "list-dpo": _row("list_dpo", "ListDPO", data="lists"),
    "mapo": _row("mapo", "MaPO", reference=False),
    "diffusion-kto": _row("kto", "DiffusionKTO"),
    "seppo": _row("seppo", "SePPO", options=_GUIDED),
    "spin-diffusion": _row("seppo", "SePPO", options=_GUIDED | {"flip": "none", "reference_pool": "latest"}),
    "ddo": _row("ddo", "DDO", options=_ROUNDS | {"beta_ddo": 1.0, "alpha_ddo": 1.0}),
    "d3po": _row(
        "d3po",
        "D3PO",
        own=True,
        options=_STEPS | {"train_batch_size": 48},
        few_step=_FEW_STEP | {"train_batch_size": 24},
    ),
    "spo": _row(
        "spo",
        "SPO",
        own=True,
        options=_STEPS | _FINISHED | {"train_batch_size": 32},
        few_step=_FEW_STEP | {"train_batch_size": 16},
    ),
    "pso": _row(
        "pso", "PSO", own=True, on="few-step", options=_STEPS | {"trained_steps": 1.0, "train_batch_size": 24}
    ),
    "ddpo": _row(
        "ddpo",
        "DDPO",
        own=True,
        reference=False,
        options=_STEPS | {"train_batch_size": 192},
        few_step=_FEW_STEP | {"train_batch_size": 96},
    ),
    "flow-grpo": _row("ddpo", "FlowGRPO", own=True, on="flow", options=_STEPS | {"train_batch_size": 192}),
    "flow-dpo-online": _row(
        "flow_online",
        "FlowDPOOnline",
        own=True,
        on="flow",
        options=_IMAGES | {"compare": "matched", "sft_weight": 0.2, "learning_rate": 5e-4},
    ),
    "flow-rwr-online": _row(
        "flow_online",
        "FlowRWROnline",
        own=True,
        on="flow",
        options=_IMAGES | {"sample_steps": 32},  # it learns the sampler's error as well as the images
        reference=False,
    ),
}


@dataclass(kw_only=True)
class AlignConfig:
    """Compare alignment methods on the playground: verifier accuracy, scorer, distance from the base, cost.

    Offline methods get the same pairs of the base model's own samples, on-policy ones sample their own, and
    one scorer labels both. All train for the same number of optimiser steps, or for the same number of
    network evaluations or seconds, what the pairs cost included. The verifier, which no training sees, judges
    held-out captions. Writes align.json, align.csv, align.md, gains.png and report.html. Called again with
    the same settings, it goes on.

    Attributes:
        output_dir: folder for the contest
        model: pipeline folder whose captions are the playground's; playground/sd is the shipped one
        methods: rows of the table: sft, diffusion-dpo, dcpo (on prompts perturbed by rule for the rejected
            image), list-dpo (on all images of the pairs' captions), mapo, diffusion-kto, seppo,
            spin-diffusion, ddo, d3po, spo, ddpo, ...; flow-dpo, flow-dpo-online, flow-rwr-online and
            flow-grpo are for playground/flow, pso for playground/few-step
        options: options of single methods, such as {diffusion-kto: {beta_kto: 1000}}
        seeds: each with pairs, training, captions and noises of its own
        pair_prompts: captions that pairs are sampled for
        pair_images: images per caption, of which the best and the worst make a pair, and all a list
        margin: pairs whose scores differ by less are left out
        equal: what is the same for all: steps, evaluations or seconds
        budget: with equal evaluations or seconds, how many of a run; a row with a gradient counts as three
        train_steps: optimiser steps; with equal evaluations or seconds, the first of them say what one costs
        train_batch_size: pairs, lists, single images or, on-policy, steps of a prompt's images per optimiser
            step
        learning_rate: of the LoRA
        rank: of the LoRA
        held_out: share of the pairs' captions that the implicit accuracy is measured on
        eval_prompts: held-out captions per seed
        steps: network evaluations per image for pairs and for judging
        guidance: classifier-free guidance scale, everywhere
        overwrite: start anew in a folder that holds a contest
    """

    output_dir: str = "outputs/bench/align"
    model: str = "playground/sd"
    methods: list[str] = field(
        default_factory=lambda: [n for n, m in METHODS.items() if m.on == "any" and not m.own]
    )
    options: dict[str, dict[str, Option]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    pair_prompts: int = 300
    pair_images: int = 4
    margin: float = 1.5
    equal: Literal["steps", "evaluations", "seconds"] = "steps"
    budget: float = 0.0
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
        if (self.equal == "steps") != (self.budget == 0) or self.budget < 0:
            raise UserError(
                "--budget is what --equal evaluations or --equal seconds gives each method, and 0 with "
                f"--equal steps; it is {self.budget:g} with {self.equal}"
            )
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out must be between 0 and 1, but is {self.held_out}")


_FREE = ("output_dir", "overwrite", "methods", "seeds")  # more of these may be added later


def run(config: AlignConfig) -> list[dict[str, Any]]:
    """The command ``diffalign bench align``; returns the rows of the table."""
    from diffusers.utils import logging

    from diffalign.bench.align_report import write_report

    logging.set_verbosity_error()  # of LoRAs without a text encoder's part, which all of these are
    folder = open_folder(config, _FREE, "seed-*")
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
        pairs = draw_pairs(config, folder / "pairs", seed, lists=METHODS[name].data == "lists")
        facts = train(config, own, pairs, seed, name)
        load_lora(pipe, str(own))
        facts["implicit"] = implicit_accuracy(pipe, pairs, config.held_out)
    judged = judge(pipe, config, seed, facts)
    judged.write(result)
    return judged


COST = "cost.json"


def draw_pairs(config: AlignConfig, folder: Path, seed: int, *, lists: bool = False) -> Path:
    """Pairs of the base model's own samples, the best against the worst of each caption; beside them, all
    samples of these captions as ``lists``, which are drawn once more if the folder is older than they."""
    from diffalign.pipelines.generate import denoiser
    from diffalign.pipelines.load import load_pipeline
    from diffalign.playground import load_scorer
    from diffalign.playground.captions import draw_captions
    from diffalign.playground.pairs import draw_candidates, write, write_as_lists
    from diffalign.trainers.meter import Meter

    whole = folder.with_name("lists")
    if not (folder / COST).is_file() or (lists and not (whole / COST).is_file()):
        pipe = load_pipeline(config.model)
        meter, began = Meter(denoiser(pipe)), time.perf_counter()
        candidates = draw_candidates(
            pipe,
            load_scorer(),
            draw_captions(seed, config.pair_prompts, held_out=False),
            images=config.pair_images,
            steps=config.steps,
            guidance=config.guidance,
            seed=seed,
            progress="sampling candidates",
        )
        cost = {"evaluations": meter.total, "seconds": time.perf_counter() - began}
        for target, written in ((whole, write_as_lists), (folder, write)):
            if not (target / COST).is_file():
                written(candidates, target, margin=config.margin, overwrite=True)
                output.write_json(target / COST, cost)
    return folder


def learnt_from(method: Method, pairs: Path, seed: int) -> Path:
    """The data of an offline method, made of the drawn ones where they are not there yet.

    Perturbing asks no network, so it costs nothing; nor does it look at the images, so that neither the
    verifier nor the scorer has a say in it.
    """
    from diffalign.data import open_pairs, write_pairs
    from diffalign.data.perturb import RulePerturber, perturb

    if method.data == "pairs":
        return pairs
    folder = pairs.with_name(method.data)
    if method.data == "captions" and not folder.is_dir():
        write_pairs(folder, perturb(list(open_pairs(pairs)), RulePerturber(seed=seed)))
    return folder


def recipe(config: AlignConfig, seed: int, name: str) -> dict[str, Any]:
    """Options of the trainer by their command-line names."""
    common = {
        "seed": seed,
        **_length(config.train_steps),
        "train_batch_size": config.train_batch_size,
        "learning_rate": config.learning_rate,
        "lr_warmup_steps": min(20, config.train_steps // 5),
        "rank": config.rank,
        "validation_share": config.held_out,
        "list_length": config.pair_images,
        "checkpoints_total_limit": 1,
        "sample_steps": config.steps,
        "sample_guidance": config.guidance,
    }
    method = METHODS[name]
    common = _known(method, common)  # not all hold pairs out, or take lists
    own = {**method.options, **(method.few_step if _few_step(config.model) else {})}
    return common | own | config.options.get(name, {})


def _length(steps: int) -> dict[str, int]:
    """Options of a run of so many steps: checkpoints are for a contest that is interrupted."""
    return {
        "max_train_steps": steps,
        "validation_steps": steps,
        "checkpointing_steps": max(1, steps // 4),
    }


def _known(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that the method's trainer has."""
    known = {option.name for option in fields(_load(method.config))}
    return {option: value for option, value in options.items() if option in known}


def _few_step(model: str) -> bool:
    """Whether the model is sampled as consistency models are."""
    from diffusers import DiffusionPipeline

    from diffalign.pipelines.load import resolve_model

    return DiffusionPipeline.load_config(resolve_model(model))["scheduler"][1] == "LCMScheduler"


def train(config: AlignConfig, folder: Path, pairs: Path, seed: int, name: str) -> dict[str, Any]:
    """A LoRA by one method, through the trainer that every user has; what its log says at the end.

    With equal evaluations or seconds, the first ``train_steps`` say what a step costs and so how many the
    budget buys; the run then goes on to that number, as a resumed run does, and is asked again: a round of
    own samples is paid before its first step, and steps get cheaper the more of it is used.

    Raises:
        UserError: the budget is spent before training has begun, or before its steps have been measured.
    """
    method = METHODS[name]
    options = recipe(config, seed, name)
    paid = {"evaluations": 0.0, "seconds": 0.0}
    if not method.own:
        paid = json.loads((pairs / COST).read_text())
        pairs = learnt_from(method, pairs, seed)
    facts = _train(config, folder, pairs, method, options, seed)
    while config.equal != "steps":
        per_step = facts[config.equal] / facts["steps"]
        steps = int((config.budget - paid[config.equal]) / per_step)
        if steps < options["max_train_steps"]:
            raise UserError(
                f"{name}: pairs and the first {facts['steps']} steps took "
                f"{paid[config.equal] + facts[config.equal]:.0f} {config.equal}, more than --budget "
                f"{config.budget:g}; raise it, or lower --train_steps"
            )
        if steps <= facts["steps"]:
            break
        facts = _train(config, folder, pairs, method, options | _known(method, _length(steps)), seed)
    return facts | {what: facts[what] + paid[what] for what in paid}


def _train(
    config: AlignConfig, folder: Path, pairs: Path, method: Method, options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    from diffalign.playground.captions import draw_captions
    from diffalign.rewards import load_reward
    from diffalign.trainers import log

    common = {
        "pretrained_model_name_or_path": config.model,
        "output_dir": str(folder),
        "resume_from_checkpoint": "auto",
        "progress": True,
        **options,
    }
    if method.own:
        captions = draw_captions(seed, OWN_CAPTIONS, held_out=False)
        data: dict[str, Any] = {"dataset": captions, "reward": load_reward("playground/scorer")}
    else:
        common |= {"dataset_name": str(pairs), "cache_dir": str(folder.parent / "cache")}
        data = {}
    result = _load(method.trainer)(_load(method.config)(**common), **data).train()
    records = log.read(folder / "log.jsonl")
    return {
        "steps": len(records),
        "seconds": float(np.sum([r["step_seconds"] for r in records])),
        "evaluations": int(np.sum([r["evaluations"] for r in records])),
        "alarms": sorted(result.alarms),
    }


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------- table


MEASURED = ("drift", "steps", "evaluations", "seconds")  # of each run


def table(config: AlignConfig, judged: Mapping[tuple[int, str], Judged]) -> list[dict[str, Any]]:
    """A row per method, over all seeds: values, and differences with 95 % intervals.

    Differences are paired by caption and noise, and the intervals are of these; what the seed of the training
    does is seen in ``by_seed``. ``diversity`` is a share of the base's, in whose row it is absolute.
    """
    from diffalign.demo import mean, share

    def all_of(name: str, what: str) -> np.ndarray:
        return np.concatenate([getattr(judged[seed, name], what) for seed in config.seeds]).astype(float)

    rows: list[dict[str, Any]] = []
    sft = "sft" if "sft" in config.methods else None
    for name in ("base", *config.methods):
        true, score = all_of(name, "true"), all_of(name, "score")
        facts = [judged[seed, name].facts for seed in config.seeds]
        row: dict[str, Any] = {"method": name, "verifier": share(true > 0.5), "scorer": float(score.mean())}
        row["diversity"] = float(np.mean([fact["diversity"] for fact in facts]))
        if name != "base":
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
                "diversity": row["diversity"] / rows[0]["diversity"],
                **{what: float(np.mean([fact[what] for fact in facts])) for what in MEASURED},
            }
            row["verdict"] = verdict(row)
        rows.append(row)
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
