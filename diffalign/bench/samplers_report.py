"""``diffalign bench samplers``: the comparison as JSON, plots and one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from diffalign.output import prepare, write_text

if TYPE_CHECKING:
    from diffalign.bench.samplers import Comparison, Score

MIXTURE = "mixture"


@dataclass(frozen=True)
class SamplersConfig:
    """Compare samplers, ours and diffusers', at equal numbers of network evaluations.

    On a Gaussian mixture, whose exact solution is known, or on any pipeline against its converged solution.
    Writes samplers.json, samplers.md, a PNG plot per guidance and report.html.

    Attributes:
        model: mixture, a pipeline folder, a hub id, or a shipped model such as playground/sd
        output_dir: folder to write to
        solvers: names of ours or diffusers classes, with options after a colon as in
            dpm-solver++:solver_order=3,grid=karras
        steps: numbers of inference steps
        guidance: classifier-free guidance scales, one comparison each
        prompts: what to draw; the playground brings its own
        prompt_file: text file with one prompt a line
        samples: samples of the mixture, or prompts of the playground
        seed: of the first starting noise; sample i uses seed + i
        reference_steps: steps of a pipeline's converged solution
        batch_size: images drawn at once
        device: auto, cpu, cuda, cuda:1, mps
        overwrite: write into a folder that is not empty
    """

    model: str = MIXTURE
    output_dir: str = "outputs/bench/samplers"
    solvers: list[str] = field(
        default_factory=lambda: [
            "ddim",
            "dpm-solver++:solver_order=2",
            "dpm-solver++:solver_order=3",
            "DDIMScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverMultistepScheduler:use_karras_sigmas=true",
            "UniPCMultistepScheduler",
        ]
    )
    steps: list[int] = field(default_factory=lambda: [5, 8, 10, 15, 20, 30])
    guidance: list[float] = field(default_factory=lambda: [1.0, 5.0])
    prompts: list[str] | None = None
    prompt_file: str | None = None
    samples: int = 16
    seed: int = 0
    reference_steps: int = 200
    batch_size: int = 8
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("solvers", "steps", "guidance"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give at least one")
        if min(self.steps) < 1 or self.samples < 1 or self.batch_size < 1:
            raise UserError("--steps, --samples and --batch_size must be at least 1")
        if self.reference_steps < 2 * max(self.steps):
            raise UserError(
                f"--reference_steps {self.reference_steps} is no yardstick for {max(self.steps)} steps; "
                f"give at least {2 * max(self.steps)}"
            )


def run(config: SamplersConfig) -> dict[float, Comparison]:
    """Compare at every guidance scale, write the report; returns the comparisons by guidance scale."""
    out = prepare(config.output_dir, overwrite=config.overwrite)
    results = _on_mixture(config) if config.model == MIXTURE else _on_pipeline(config)
    print(write_report(out, config, results))
    print(f"\nreport: {out / 'report.html'}")
    return results


def _on_mixture(config: SamplersConfig) -> dict[float, Comparison]:
    from diffalign.bench.samplers import compare_on_mixture

    return {
        scale: compare_on_mixture(
            config.solvers, config.steps, guidance=scale, samples=config.samples, seed=config.seed
        )
        for scale in config.guidance
    }


def _on_pipeline(config: SamplersConfig) -> dict[float, Comparison]:
    from diffalign.bench.samplers import build, compare_samplers
    from diffalign.pipelines.load import PLAYGROUND, load_pipeline
    from diffalign.sample import read_prompts

    scores: dict[str, Score] = {}
    prompts = config.prompts
    if config.model.startswith(PLAYGROUND):
        from diffalign.playground.captions import draw_captions

        scores["verifier"] = verifier_score
        if prompts is None and config.prompt_file is None:
            prompts = draw_captions(config.seed, config.samples, held_out=True)
    prompts = read_prompts(prompts, config.prompt_file)
    pipe = load_pipeline(config.model, device=config.device)
    schedulers = build(config.solvers, pipe.scheduler.config)
    return {
        scale: compare_samplers(
            pipe,
            schedulers,
            config.steps,
            prompts,
            seeds=range(config.seed, config.seed + len(prompts)),
            guidance=scale,
            reference_steps=config.reference_steps,
            scores=scores,
            batch_size=config.batch_size,
        )
        for scale in config.guidance
    }


def verifier_score(images: Any, prompts: Sequence[str]) -> list[float]:
    """1 for each image of the playground of which its caption is true, else 0."""
    from diffalign.playground.verifier import verify

    return [float(verify(prompt, image).true) for prompt, image in zip(prompts, images, strict=True)]


def write_report(out: Path, config: SamplersConfig, results: Mapping[float, Comparison]) -> str:
    """Write JSON, table, plots and page into ``out``; returns the table."""
    from diffalign.bench.record import command_line, store
    from diffalign.report import figure_png, figure_uri, render, save_png, versions

    rows = [row for result in results.values() for row in result.table()]
    floors = {str(scale): result.reference_error for scale, result in results.items()}
    shown = [
        {"guidance": f"{scale:g}", "sampler": line["name"]}
        | {f"{n} steps": cell["text"] for n, cell in zip(config.steps, line["cells"], strict=True)}
        for scale, result in results.items()
        for line in _pivot(config, result, lambda row: row.error_median, "{:.1e}", min)
    ]
    table = store(out, "samplers", config, rows, shown, reference_error=floors)
    parts = []
    for scale, result in results.items():
        figure = error_plot(result)
        save_png(out / f"error_guidance_{scale:g}.png", figure_png(figure))
        parts.append(
            {
                "guidance": f"{scale:g}",
                "plot": figure_uri(figure),
                "floor": result.reference_error,
                "table": _pivot(config, result, lambda row: row.error_median, "{:.1e}", min),
                "scores": [
                    {
                        "name": name,
                        "table": _pivot(config, result, lambda r, n=name: r.scores[n], "{:.3f}", max),
                    }
                    for name in result.rows[0].scores
                ],
                "pictures": _pictures(config, result),
            }
        )
    page = render(
        "samplers.html",
        model="a Gaussian mixture" if config.model == MIXTURE else config.model,
        count=config.samples if config.model == MIXTURE else _count(results),
        yardstick="the exact solution" if config.model == MIXTURE else "the model's own converged solution",
        steps=config.steps,
        parts=parts,
        command=command_line("bench samplers", config),
        environment=versions(),
    )
    write_text(out / "report.html", page)
    return table


def error_plot(result: Comparison) -> Any:
    """Median error against network evaluations, both logarithmic: ours in full lines, diffusers' dashed."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    from diffalign.report import new_figure

    figure, axes = new_figure(9.5, 4.2)
    for name in dict.fromkeys(row.sampler for row in result.rows):
        rows = sorted((row for row in result.rows if row.sampler == name), key=lambda row: row.nfe)
        nfe, error = [row.nfe for row in rows], [row.error_median for row in rows]
        style = "--" if "Scheduler" in name else "-"
        axes.plot(nfe, error, style, marker="o", markersize=3.5, linewidth=1.6, label=name)
    if result.reference_error:
        axes.axhline(result.reference_error, color="#8a8f98", linewidth=1, linestyle=":", label="yardstick")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({round(row.nfe) for row in result.rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("relative error (median)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _pivot(
    config: SamplersConfig, result: Comparison, value: Any, style: str, best: Any
) -> list[dict[str, Any]]:
    cells = {(row.sampler, row.steps): value(row) for row in result.rows}
    names = list(dict.fromkeys(row.sampler for row in result.rows))
    winners = {n: best(cells[name, n] for name in names) for n in config.steps}
    return [
        {
            "name": name,
            "cells": [
                {"text": style.format(cells[name, n]), "best": cells[name, n] == winners[n]}
                for n in config.steps
            ],
        }
        for name in names
    ]


def _pictures(config: SamplersConfig, result: Comparison, shown: int = 3) -> list[dict[str, str]]:
    import numpy as np

    from diffalign.report import png_uri, tile

    if not result.images:
        return []
    names = list(dict.fromkeys(row.sampler for row in result.rows))
    converged = result.images["converged", config.reference_steps]
    pictures = []
    for i in range(min(shown, len(converged))):
        grid = [[*(result.images[name, n][i] for n in config.steps), converged[i]] for name in names]
        title = f"Image {i}: a column per number of steps and the converged one; rows: {', '.join(names)}"
        sheet = tile(np.stack([image for row in grid for image in row]), len(config.steps) + 1)
        pictures.append({"image": png_uri(sheet), "title": title})
    return pictures


def _count(results: Mapping[float, Comparison]) -> int:
    return len(next(iter(next(iter(results.values())).images.values())))
