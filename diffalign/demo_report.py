"""The page that the demo leaves: pictures, curves, tables, and how to repeat each part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.output import write_text
from diffalign.report import PALETTE, figure_png, figure_uri, new_figure, png_uri, render, save_png, tile

if TYPE_CHECKING:
    from diffalign.bench.samplers import Comparison
    from diffalign.demo import Contest, DemoConfig
    from diffalign.playground.pairs import Candidates


def write_report(
    folder: Path,
    config: DemoConfig,
    summary: dict[str, Any],
    comparison: Comparison,
    candidates: Candidates,
    contest: Contest,
) -> Path:
    """Write report.html, which needs nothing beside it, and its main pictures as PNG files too."""
    error = error_figure(comparison)
    save_png(folder / "sampling_error.png", figure_png(error))
    grids = sampler_grids(config, comparison)
    before_after = contest_sheet(contest)
    save_png(folder / "sampling.png", np.concatenate([g["pixels"] for g in grids]))
    save_png(folder / "aligned.png", before_after)
    page = render(
        "demo.html",
        config=config,
        summary=summary,
        error_plot=figure_uri(error),
        grids=[{**g, "uri": png_uri(g["pixels"])} for g in grids],
        rows=sampler_rows(config, comparison),
        pairs=pair_examples(candidates, config.margin),
        curves=figure_uri(curves_figure(summary["training"]["log"])),
        contest=png_uri(before_after),
        kinds=kind_rows(contest),
        commands=commands(config, folder),
    )
    return write_text(folder / "report.html", page)


def error_figure(comparison: Comparison) -> Any:
    """Mean distance from the converged latents against network evaluations, both logarithmic."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure, axes = new_figure(6.4, 3.6)
    for name, colour in zip(_names(comparison), (PALETTE["ours"], PALETTE["theirs"]), strict=True):
        rows = [row for row in comparison.rows if row.sampler == name]
        nfe, error = np.array([r.nfe for r in rows]), np.array([r.error for r in rows])
        spread = np.array([r.error_se for r in rows])
        axes.fill_between(
            nfe, np.maximum(error - spread, 1e-4), error + spread, color=colour, alpha=0.15, lw=0
        )
        axes.plot(nfe, error, marker="o", markersize=4, color=colour, label=name)
    axes.axhline(comparison.reference_error, color=PALETTE["muted"], lw=1, ls=":", label="yardstick itself")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="relative error of the latents")
    axes.set_xticks(sorted({round(row.nfe) for row in comparison.rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9)
    return figure


def sampler_grids(config: DemoConfig, comparison: Comparison, shown: int = 8) -> list[dict[str, Any]]:
    """One sheet per sampler: a row per number of steps and the converged row, a column per caption."""
    converged = next(images for (name, _), images in comparison.images.items() if name == "converged")[:shown]
    grids = []
    for name in _names(comparison):
        rows = [comparison.images[name, n][:shown] for n in config.sampler_steps]
        sheet = tile(np.concatenate([*rows, converged]), len(converged))
        grids.append({"name": name, "pixels": sheet})
    return grids


def sampler_rows(config: DemoConfig, comparison: Comparison) -> list[dict[str, Any]]:
    """Error of each sampler at each number of steps, and how many times smaller ours is."""
    ours, theirs = _names(comparison)
    error = {(r.sampler, r.steps): r.error for r in comparison.rows}
    return [
        {
            "steps": n,
            "ours": error[ours, n],
            "theirs": error[theirs, n],
            "ratio": error[theirs, n] / error[ours, n],
        }
        for n in config.sampler_steps
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


def curves_figure(log: list[dict[str, float]], window: int = 20) -> Any:
    """Implicit accuracy, margins and rewards of the training run, as running means."""
    figure, axes = new_figure(10, 2.9, columns=3)
    steps = np.array([row["step"] for row in log])

    def draw(ax: Any, key: str, colour: str, label: str | None = None) -> None:
        values = np.array([row[key] for row in log])
        ax.plot(steps, values, color=colour, alpha=0.2, lw=0.8)
        width = min(window, len(values))
        ax.plot(
            steps[width - 1 :],
            np.convolve(values, np.ones(width) / width, "valid"),
            color=colour,
            label=label,
        )

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
    return figure


def contest_sheet(contest: Contest, columns: int = 12) -> np.ndarray:
    """Base above aligned, same caption and noise in a column; the frame says what the verifier says.

    Columns are the first captions on which the two models are told apart, then the first of the rest.
    """
    order = np.argsort(contest.base_true == contest.aligned_true, kind="stable")
    blocks = []
    for start in range(0, min(2 * columns, len(order)), columns):
        chosen = order[start : start + columns]
        images = np.concatenate([contest.base[chosen], contest.aligned[chosen]])
        true = np.concatenate([contest.base_true[chosen], contest.aligned_true[chosen]])
        frames = [PALETTE["good"] if t else PALETTE["bad"] for t in true]
        blocks.append(tile(images, len(chosen), frames=frames))
    width = max(b.shape[1] for b in blocks)
    gap = np.full((10, width, 3), 255, np.uint8)
    padded = [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks]
    return np.concatenate([piece for block in padded for piece in (block, gap)][:-1])


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
    from diffalign.demo import recipe

    steps = " ".join(map(str, config.sampler_steps))
    options = " ".join(f"--{name} {value}" for name, value in recipe(config).items())
    return [
        {
            "title": "compare samplers",
            "line": f"diffalign bench samplers --model {config.model} --steps {steps} "
            f"--guidance {config.guidance:g}",
        },
        {
            "title": "make preference pairs",
            "line": f"diffalign playground pairs --model {config.model} --prompts {config.pair_prompts} "
            f"--images {config.pair_images} --steps {config.steps} --guidance {config.guidance:g} "
            f"--margin {config.margin:g} --seed {config.seed} --output_dir outputs/pairs",
        },
        {
            "title": "align",
            "line": f"diffalign train diffusion-dpo --pretrained_model_name_or_path {config.model} "
            f"--dataset_name {folder / 'pairs'} --seed {config.seed} {options} --output_dir outputs/lora",
        },
        {
            "title": "sample the aligned model",
            "line": f"diffalign sample --model {config.model} --lora {folder / 'lora'} --solver dpm-solver++ "
            f'--steps {config.steps} --guidance {config.guidance:g} --prompts "[two blue rings]"',
        },
    ]


def _names(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.sampler for row in comparison.rows))
