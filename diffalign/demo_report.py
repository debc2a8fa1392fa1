"""The page that the demo leaves: pictures, curves, tables, and how to repeat each part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.bench.plots import before_after, draw_errors, name_styles, nfe_axis
from diffalign.output import write_text
from diffalign.report import PALETTE, figure_png, figure_uri, new_figure, png_uri, render, save_png, tile

if TYPE_CHECKING:
    from diffalign.bench.comparison import Comparison
    from diffalign.demo import Contest, DemoConfig
    from diffalign.playground.pairs import Candidates


def write_report(
    folder: Path,
    config: DemoConfig,
    summary: dict[str, Any],
    comparison: Comparison,
    candidates: list[Candidates],
    contest: Contest,
) -> Path:
    """Write report.html, which needs nothing beside it, and its main pictures as PNG files too."""
    error = error_figure(comparison)
    save_png(folder / "sampling_error.png", figure_png(error))
    grids = sampler_grids(config, comparison)
    aligned = before_after(contest.base, contest.aligned, contest.base_true, contest.aligned_true)
    save_png(folder / "sampling.png", np.concatenate([g["pixels"] for g in grids]))
    save_png(folder / "aligned.png", aligned)
    page = render(
        "demo.html",
        config=config,
        summary=summary,
        error_plot=figure_uri(error),
        grids=[{**g, "uri": png_uri(g["pixels"])} for g in grids],
        rows=sampler_rows(comparison),
        pairs=pair_examples(candidates[0], config.margin),
        curves=figure_uri(curves_figure([t["log"] for t in summary["training"]])),
        contest=png_uri(aligned),
        kinds=kind_rows(contest),
        commands=commands(config, folder),
    )
    return write_text(folder / "report.html", page)


def error_figure(comparison: Comparison) -> Any:
    """Median distance from the converged latents, and share of true captions, against network evaluations."""
    from matplotlib.ticker import PercentFormatter

    figure, (left, right) = new_figure(10, 3.5, columns=2)
    draw_errors(left, comparison.rows, comparison.reference_error)
    left.legend(frameon=False, fontsize=9)
    for name, style in name_styles(comparison.samplers).items():
        rows = [row for row in comparison.rows if row.sampler == name]
        right.plot([r.nfe for r in rows], [r.scores["true"] for r in rows], markersize=4.5, **style)
    nfe_axis(right, [row.steps for row in comparison.rows])
    right.set(ylim=(0, 1), xlabel="network evaluations", ylabel="captions true of the image")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def sampler_grids(config: DemoConfig, comparison: Comparison, shown: int = 8) -> list[dict[str, Any]]:
    """One sheet per sampler: a row per number of steps and the converged row, a column per caption."""
    (reference,) = comparison.references.values()
    images = {(row.sampler, row.steps): row.images for row in comparison.rows}
    converged = reference.images
    grids = []
    for name in comparison.samplers:
        drawn = [*(images[name, n] for n in config.sampler_steps), converged]
        rows = [one[:shown] for one in drawn if one is not None]
        grids.append({"name": name, "pixels": tile(np.concatenate(rows), len(rows[0]))})
    return grids


def sampler_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """At each number of steps: median error and share of true captions, ours and theirs."""
    ours, theirs = comparison.samplers
    cells = {(r.sampler, r.steps): r for r in comparison.rows}
    return [
        {
            "steps": n,
            "ours": cells[ours, n].error_median,
            "theirs": cells[theirs, n].error_median,
            "ours_true": cells[ours, n].scores["true"],
            "theirs_true": cells[theirs, n].scores["true"],
        }
        for n in dict.fromkeys(r.steps for r in comparison.rows)
    ]


def pair_examples(candidates: Candidates, margin: float, shown: int = 6) -> list[dict[str, Any]]:
    """The first pairs, with their scores."""
    return [
        {
            "caption": candidates.captions[p],
            "chosen": png_uri(candidates.images[p, best]),
            "rejected": png_uri(candidates.images[p, worst]),
            "scores": (float(candidates.scores[p, best]), float(candidates.scores[p, worst])),
        }
        for p, best, worst in candidates.pairs(margin)[:shown]
    ]


def curves_figure(logs: list[list[dict[str, float]]], window: int = 20) -> Any:
    """Loss, implicit accuracy and rewards of each round, one after the other, as running means."""
    figure, axes = new_figure(10, 2.9, columns=3)
    ends = np.cumsum([len(log) for log in logs])

    def draw(ax: Any, key: str, colour: str, label: str | None = None) -> None:
        for i, (log, end) in enumerate(zip(logs, ends, strict=True)):
            values, steps = np.array([row[key] for row in log]), np.arange(end - len(log), end) + 1
            ax.plot(steps, values, color=colour, alpha=0.2, lw=0.8)
            width = min(window, len(values))
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            ax.plot(steps[width - 1 :], smooth, color=colour, label=label if i == 0 else None)

    draw(axes[0], "loss", PALETTE["ours"])
    axes[0].axhline(np.log(2), color=PALETTE["muted"], ls=":", lw=1)
    axes[0].set_title("loss (dotted: log 2)", fontsize=10)
    draw(axes[1], "rewards/accuracies", PALETTE["ours"])
    axes[1].axhline(0.5, color=PALETTE["muted"], ls=":", lw=1)
    axes[1].set_title("implicit accuracy (dotted: chance)", fontsize=10)
    draw(axes[2], "rewards/chosen", PALETTE["good"], "chosen")
    draw(axes[2], "rewards/rejected", PALETTE["bad"], "rejected")
    axes[2].set_title("implicit rewards", fontsize=10)
    axes[2].legend(frameon=False, fontsize=9)
    for ax in axes:
        ax.set_xlabel("optimiser step")
        for end in ends[:-1]:
            ax.axvline(end, color=PALETTE["muted"], lw=1)
    return figure


def kind_rows(contest: Contest) -> list[dict[str, Any]]:
    """Verifier accuracy of both models by kind of caption."""
    from diffalign.playground.captions import KINDS, parse

    kinds = np.array([parse(c).kind for c in contest.captions])
    return [
        {
            "kind": kind,
            "n": int((kinds == kind).sum()),
            "base": float(contest.base_true[kinds == kind].mean()),
            "aligned": float(contest.aligned_true[kinds == kind].mean()),
        }
        for kind in KINDS
        if (kinds == kind).any()
    ]


def commands(config: DemoConfig, folder: Path) -> list[dict[str, str]]:
    """The command lines that repeat the parts of the demo one by one."""
    from diffalign.demo import lora_of, pairs_of, recipe, round_seed

    model, steps = config.model, " ".join(map(str, config.sampler_steps))
    lines = {
        "compare samplers": f"diffalign bench samplers --model {model} --steps {steps} "
        f"--guidance {config.guidance:g} --solvers dpm-solver++ DPMSolverMultistepScheduler",
    }
    for i in range(config.rounds):
        policy = f" --lora {lora_of(config, i - 1, folder)}" if i else ""
        options = " ".join(f"--{name} {value}" for name, value in recipe(config, i, folder).items())
        lines[f"round {i + 1}: pairs"] = (
            f"diffalign playground pairs --model {model}{policy} --prompts {config.pair_prompts} "
            f"--images {config.pair_images} --steps {config.steps} --guidance {config.guidance:g} "
            f"--margin {config.margin:g} --seed {round_seed(config, i)} "
            f"--output_dir {pairs_of(i, folder)} --overwrite"
        )
        lines[f"round {i + 1}: align"] = (
            f"diffalign train diffusion-dpo --pretrained_model_name_or_path {model} "
            f"--dataset_name {pairs_of(i, folder)} {options} "
            f"--output_dir {lora_of(config, i, folder)} --overwrite"
        )
    lines["sample the aligned model"] = (
        f"diffalign sample --model {model} --lora {folder / 'lora'} --solver dpm-solver++ "
        f'--steps {config.steps} --guidance {config.guidance:g} --prompts "two blue rings"'
    )
    return [{"title": title, "line": line} for title, line in lines.items()]
