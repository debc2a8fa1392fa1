"""``diffalign demo``: the main job, end to end and for real, on the embedded playground.

One base model is sampled by two schedulers at few steps, then aligned with Diffusion-DPO on pairs of its own
samples that a learned scorer has labelled, and judged by the exact verifier on new captions.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from diffalign import output
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

OURS, THEIRS = "diffalign DPM-Solver++", "diffusers DPM-Solver++"
Z95 = 1.959964


@dataclass
class DemoConfig:
    """Sample faster and align better on the embedded playground; leaves report.html.

    Args:
        output_dir: folder for report.html, summary.json, pairs/ and lora/.
        model: pipeline folder; playground/sd is the shipped one. Its captions must be the playground's.
        seed: of captions, noise and training; the captions that judge stay the same.
        sampler_prompts: captions of the sampler comparison.
        sampler_steps: numbers of network evaluations to compare at.
        rounds: of pairs and Diffusion-DPO; each samples, and is held to, the model of the round before.
        pair_prompts: captions per round that preference pairs are sampled for.
        pair_images: images per caption, of which the best and the worst make a pair.
        margin: pairs whose scores differ by less are left out.
        train_steps: optimiser steps of Diffusion-DPO per round.
        train_batch_size: pairs per step.
        learning_rate: of the LoRA.
        beta_dpo: how strongly the model is held to the base model.
        rank: of the LoRA.
        eval_prompts: held-out captions that base and aligned model are judged on.
        steps: network evaluations per image for pairs and for judging.
        guidance: classifier-free guidance scale, everywhere.
        overwrite: write into a folder that is not empty; what an earlier demo left there is replaced.
    """

    output_dir: str = "outputs/demo"
    model: str = "playground/sd"
    seed: int = 0
    sampler_prompts: int = 24
    sampler_steps: list[int] = field(default_factory=lambda: [5, 8, 10, 20])
    rounds: int = 2
    pair_prompts: int = 300
    pair_images: int = 4
    margin: float = 1.5
    train_steps: int = 200
    train_batch_size: int = 16
    learning_rate: float = 1e-4
    beta_dpo: float = 2000.0
    rank: int = 16
    eval_prompts: int = 400
    steps: int = 12
    guidance: float = 4.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        least = {
            "rounds": 1,
            "train_steps": 1,
            "sampler_prompts": 1,
            "pair_prompts": 1,
            "pair_images": 2,
            "eval_prompts": 2,
            "steps": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name} must be at least {value}, but is {getattr(self, name)}")
        if not self.sampler_steps or min(self.sampler_steps) < 1:
            raise UserError("--sampler_steps needs at least one number, each at least 1")


@dataclass(frozen=True)
class Contest:
    """Base against aligned model on the same captions and noises.

    Attributes:
        captions: N held-out captions.
        base, aligned: (N, 64, 64, 3) uint8.
        base_true, aligned_true: (N,) bool, by the verifier.
        base_scores, aligned_scores: (N,) float32, by the scorer.
    """

    captions: list[str]
    base: np.ndarray
    aligned: np.ndarray
    base_true: np.ndarray
    aligned_true: np.ndarray
    base_scores: np.ndarray
    aligned_scores: np.ndarray

    def table(self) -> dict[str, Any]:
        """Accuracies with 95 % Wilson intervals, and the paired gains with 95 % normal intervals."""
        gain = self.aligned_true.astype(float) - self.base_true
        score = self.aligned_scores - self.base_scores
        return {
            "n": len(self.captions),
            "verifier_base": share(self.base_true),
            "verifier_aligned": share(self.aligned_true),
            "verifier_gain": mean(gain),
            "scorer_base": float(self.base_scores.mean()),
            "scorer_aligned": float(self.aligned_scores.mean()),
            "scorer_gain": mean(score),
        }


def share(hits: np.ndarray) -> dict[str, float]:
    """A share of hits with its 95 % Wilson interval."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "wilson")
    return {"value": float(hits.mean()), "low": float(interval.low), "high": float(interval.high)}


def mean(values: np.ndarray) -> dict[str, float]:
    """A mean with its 95 % normal interval."""
    middle, half = float(values.mean()), Z95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"value": middle, "low": middle - half, "high": middle + half}


def run(config: DemoConfig) -> dict[str, Any]:
    """The command ``diffalign demo``; returns what it writes to summary.json."""
    folder = output.prepare(config.output_dir, overwrite=config.overwrite)
    # A warning of the libraries about their own defaults helps nobody here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.perf_counter()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    from diffalign.demo_report import sampler_rows, write_report
    from diffalign.pipelines.load import load_pipeline
    from diffalign.playground import load_scorer
    from diffalign.report import versions

    seconds: dict[str, float] = {}
    with part(seconds, "load", "loading the model"):
        pipe, scorer = load_pipeline(config.model), load_scorer()
    parts = 2 * config.rounds + 2
    with part(seconds, "samplers", f"1/{parts} sampling faster"):
        comparison = compare(pipe, config)
    candidates, trained, policy = [], [], pipe
    for i in range(config.rounds):
        with part(seconds, f"pairs {i + 1}", f"{2 * i + 2}/{parts} pairs of the model's own samples"):
            candidates.append(draw_pairs(policy, scorer, config, i, folder))
        with part(seconds, f"train {i + 1}", f"{2 * i + 3}/{parts} Diffusion-DPO"):
            trained.append(train(config, i, folder))
            policy = load_pipeline(config.model, lora=str(lora_of(config, i, folder)))
    with part(seconds, "judge", f"{parts}/{parts} base against aligned on held-out captions"):
        contest = judge(pipe, policy, scorer, config)
    seconds["total"] = time.perf_counter() - began
    verdict = contest.table()
    summary = {
        "verifier": {k.removeprefix("verifier_"): v for k, v in verdict.items() if k.startswith("verifier")},
        "scorer": {k.removeprefix("scorer_"): v for k, v in verdict.items() if k.startswith("scorer")},
        "eval_prompts": verdict["n"],
        "samplers": comparison.table(),
        "converged_moved": comparison.reference_error,
        "pairs": [pair_facts(c, config.margin) for c in candidates],
        "training": trained,
        "nfe": {
            "samplers": sum(r.nfe for r in comparison.rows) * config.sampler_prompts,
            "pairs": config.rounds * config.steps * config.pair_prompts * config.pair_images,
            "judge": 2 * config.steps * config.eval_prompts,
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "config": vars(config),
        "versions": versions(),
    }
    output.write_json(folder / "summary.json", summary)
    page = write_report(folder, config, summary, comparison, candidates, contest)
    base, aligned, gain = (verdict[f"verifier_{k}"] for k in ("base", "aligned", "gain"))
    low, high = (f"{100 * gain[k]:+.1f}" for k in ("low", "high"))
    print(
        f"\nverifier accuracy on {verdict['n']} held-out captions: {base['value']:.1%} -> "
        f"{aligned['value']:.1%} ({100 * gain['value']:+.1f} points, 95 % interval {low} to {high})"
    )
    for row in sampler_rows(comparison):
        print(
            f"{row['steps']:2d} steps: captions true {row['ours_true']:.0%} with diffalign's sampler, "
            f"{row['theirs_true']:.0%} with diffusers' default; "
            f"median error {row['ours']:.3f} and {row['theirs']:.3f}"
        )
    print(f"report: {page}")
    return summary


@contextmanager
def part(seconds: dict[str, float], name: str, title: str) -> Iterator[None]:
    """Say what comes, and keep how long it took."""
    tqdm.write(title)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def compare(pipe: Any, config: DemoConfig) -> Any:
    """Part 1: the same captions and noises with both schedulers at every number of steps."""
    from diffusers import DPMSolverMultistepScheduler

    from diffalign.bench.samplers import compare_samplers
    from diffalign.playground.captions import draw_captions
    from diffalign.solvers import DPMSolverPPScheduler

    base = pipe.scheduler.config
    return compare_samplers(
        pipe,
        {
            OURS: DPMSolverPPScheduler.from_config(base),
            THEIRS: DPMSolverMultistepScheduler.from_config(base),
        },
        config.sampler_steps,
        draw_captions(config.seed + 1, config.sampler_prompts, held_out=True),
        guidance=config.guidance,
        reference_steps=max(120, 4 * max(config.sampler_steps)),
        scores={"true": lambda images, prompts: verified(prompts, images).astype(float).tolist()},
        batch_size=config.sampler_prompts,
    )


def pairs_of(i: int, folder: Path) -> Path:
    """Folder of the pairs of round ``i``, counted from 0."""
    return folder / "pairs" / f"round-{i + 1}"


def lora_of(config: DemoConfig, i: int, folder: Path) -> Path:
    """Folder of the LoRA of round ``i``; that of the last round is the result."""
    return folder / "lora" if i == config.rounds - 1 else folder / "lora-rounds" / f"round-{i + 1}"


def round_seed(config: DemoConfig, i: int) -> int:
    return config.seed * 100 + i


def draw_pairs(policy: Any, scorer: Any, config: DemoConfig, i: int, folder: Path) -> Any:
    """Part 2: candidates of captions that are not held out, new ones in each round; the pairs are written."""
    from diffalign.playground.captions import draw_captions
    from diffalign.playground.pairs import draw_candidates, write

    seed = round_seed(config, i)
    candidates = draw_candidates(
        policy,
        scorer,
        draw_captions(seed, config.pair_prompts, held_out=False),
        images=config.pair_images,
        steps=config.steps,
        guidance=config.guidance,
        seed=seed,
        progress="sampling candidates",
    )
    target = pairs_of(i, folder)
    write(candidates, target, margin=config.margin, overwrite=target.exists())
    return candidates


def train(config: DemoConfig, i: int, folder: Path) -> dict[str, Any]:
    """Part 3: a LoRA by Diffusion-DPO, through the trainer that every user has; its curve and facts."""
    from diffalign.trainers import log
    from diffalign.trainers.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer

    result = DiffusionDPOTrainer(
        DiffusionDPOConfig(
            pretrained_model_name_or_path=config.model,
            dataset_name=str(pairs_of(i, folder)),
            output_dir=str(lora_of(config, i, folder)),
            overwrite=config.overwrite,
            **recipe(config, i, folder),
        )
    ).train()
    records = log.read(result.output_dir / "log.jsonl")
    return {
        "steps": result.global_step,
        "alarms": result.alarms,
        "final": result.metrics,
        "log": [{k: r[k] for k in CURVES if k in r} for r in records],
    }


CURVES = ("step", "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def recipe(config: DemoConfig, i: int, folder: Path) -> dict[str, Any]:
    """Options of the trainer that differ from its defaults, by their command-line names."""
    going_on = {"init_lora": str(lora_of(config, i - 1, folder))} if i else {}
    return going_on | {
        "seed": round_seed(config, i),
        "max_train_steps": config.train_steps,
        "train_batch_size": config.train_batch_size,
        "learning_rate": config.learning_rate,
        "beta_dpo": config.beta_dpo,
        "rank": config.rank,
        "lr_warmup_steps": min(20, config.train_steps // 5),
        "checkpointing_steps": 0,
    }


def judge(pipe: Any, aligned: Any, scorer: Any, config: DemoConfig) -> Contest:
    """Part 4: both models draw the same held-out captions from the same noises."""
    from diffalign.pipelines.load import make_scheduler
    from diffalign.playground.captions import draw_captions
    from diffalign.rewards import score_images

    captions = draw_captions(1000, config.eval_prompts, held_out=True)
    seeds = [10_000_000 + i for i in range(len(captions))]
    drawn = [
        draw(model, captions, seeds, make_scheduler("dpm-solver++", pipe.scheduler.config), config, label)
        for model, label in ((pipe, "base"), (aligned, "aligned"))
    ]
    true = [verified(captions, images) for images in drawn]
    scores = [score_images(scorer, images, captions) for images in drawn]
    return Contest(captions, drawn[0], drawn[1], true[0], true[1], scores[0], scores[1])


def draw(
    pipe: Any, captions: list[str], seeds: list[int], scheduler: Any, config: DemoConfig, label: str
) -> np.ndarray:
    """(N, 64, 64, 3) uint8."""
    from diffalign.pipelines.generate import generate

    return generate(
        pipe,
        captions,
        seeds,
        steps=config.steps,
        guidance=config.guidance,
        scheduler=scheduler,
        batch_size=40,
        progress=label,
    ).images


def verified(captions: Sequence[str], images: np.ndarray) -> np.ndarray:
    """(N,) bool: is each caption true of its image?"""
    from diffalign.playground.verifier import verify

    return np.array([verify(c, i).true for c, i in zip(captions, images, strict=True)])


def pair_facts(candidates: Any, margin: float) -> dict[str, Any]:
    """How many pairs, and how often the verifier, where it tells the two apart, agrees with the scorer."""
    chosen = candidates.pairs(margin)
    captions = [candidates.captions[p] for p, _, _ in chosen]
    best = verified(captions, candidates.images[[p for p, _, _ in chosen], [b for _, b, _ in chosen]])
    worst = verified(captions, candidates.images[[p for p, _, _ in chosen], [w for _, _, w in chosen]])
    told = best != worst
    return {
        "pairs": len(chosen),
        "chosen_true": float(best.mean()),
        "rejected_true": float(worst.mean()),
        "verifier_tells_apart": int(told.sum()),
        "scorer_agrees": float((best & ~worst).sum() / max(told.sum(), 1)),
    }
