"""``diffalign bench samplers``: the comparison as tables, plots, image grids and one self-contained page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.bench import against
from diffalign.bench.kept import open_folder
from diffalign.errors import UserError
from diffalign.output import write_text
from diffalign.rewards.spec import RewardSpec

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.bench.comparison import Comparison, Row
    from diffalign.bench.distances import Distance
    from diffalign.bench.samplers import Score

MIXTURE = "mixture"
# The comparison, the prompt of each image, and strips of predicted images by title.
_Found = tuple["Comparison", Sequence[str], dict[str, Any]]
DType = Literal["auto", "float64", "float32", "bfloat16", "float16"]
# More of these may be asked for in a folder that holds a part of the answer.
_FREE = {
    "output_dir",
    "overwrite",
    "solvers",
    "steps",
    "guidance",
    "dtypes",
    "rewards",
    "distances",
    "against",
}
_FREE |= {"tolerance", "cache_dir", "batch_size", "device", "trajectories"}


@dataclass(frozen=True)
class SamplersConfig:
    """Compare samplers, ours and diffusers', at equal numbers of network evaluations.

    On a Gaussian mixture, whose exact solution is known, or on any pipeline against its own converged
    solution. Writes samplers.csv (a tidy table), samplers.json (the same with the numbers of every image, and
    with what they were measured), samplers.md, plots and image grids as PNG files, and report.html, which
    needs nothing beside it. The same command again goes on with an interrupted run, and a longer list of
    solvers, steps, scales or dtypes adds to it.

    Attributes:
        model: mixture, a pipeline folder, a hub id, or a shipped model such as playground/sd; also pipelines
            that draw pixels without a prompt
        output_dir: folder to write to
        solvers: names of ours or diffusers classes, with options after a colon as in
            dpm-solver++:solver_order=3,grid=karras
        steps: numbers of network evaluations; a solver that takes several within a step gets fewer steps
        guidance: classifier-free guidance scales; 1 is none
        dtypes: precisions of the network, such as float32 bfloat16, all held against the converged solution
            in the finest; auto is float32 on the CPU, 16 bits on a GPU, and float64 for the mixture
        prompts: what to draw; the playground brings its own
        prompt_file: text file with one prompt a line
        samples: samples of the mixture, prompts of the playground, or images of a model without prompts
        images_per_prompt: images of each prompt, every one from a noise of its own
        seed: of the first starting noise; image i uses seed + i
        rewards: what scores the images, as in diffalign data score; the playground has its scorer and
            verifier by default
        distances: to the converged images: lpips (or lpips=vgg, lpips=squeeze), and a CLIP among the rewards,
            such as clip=path/to/clip, in whose features it is measured; the playground has its scorer by
            default
        reference_steps: most steps of a pipeline's converged solution
        reference_tolerance: its steps are doubled until the latents move by less, relatively
        cache_dir: where converged solutions are kept for other runs; by default
            ~/.cache/diffalign/references
        trajectories: prompts of which the predicted images along the way are shown
        against: samplers.json of an earlier run; the exit code is 1 if something got worse
        tolerance: relative change that is no regression
        batch_size: images drawn at once
        device: auto, cpu, cuda, cuda:1, mps
        overwrite: start anew in a folder that is not empty
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
    dtypes: list[DType] = field(default_factory=lambda: ["auto"])
    prompts: list[str] | None = None
    prompt_file: str | None = None
    samples: int = 16
    images_per_prompt: int = 1
    seed: int = 0
    rewards: list[RewardSpec | str] | None = None
    distances: list[str] | None = None
    reference_steps: int = 400
    reference_tolerance: float = 2e-3
    cache_dir: str | None = None
    trajectories: int = 1
    against: str | None = None
    tolerance: float = 0.05
    batch_size: int = 8
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("solvers", "steps", "guidance", "dtypes"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"--{name} is empty; give at least one")
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names one twice: {' '.join(map(str, values))}")
        for name in ("samples", "images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if min(self.steps) < 1:
            raise UserError(f"--steps must be at least 1, not {min(self.steps)}")
        if self.tolerance < 0 or not self.reference_tolerance > 0 or self.trajectories < 0:
            raise UserError(
                "--tolerance and --trajectories must be 0 or more, and --reference_tolerance above 0"
            )
        if self.reference_steps < 2 * max(self.steps):
            raise UserError(
                f"--reference_steps {self.reference_steps} is no yardstick for {max(self.steps)} steps; "
                f"give at least {2 * max(self.steps)}"
            )
        if self.model == MIXTURE and (self.rewards or self.distances):
            raise UserError(
                "--rewards and --distances judge images, and the mixture has none: give a --model"
            )


def run(config: SamplersConfig) -> "Comparison":
    """Compare, write the report; returns what was found.

    Raises:
        UserError: bad options, or an output folder in use by another comparison.
        Worse: `against` was given, and something got worse.
    """
    from diffalign.bench.samplers import parse_spec
    from diffalign.pipelines.load import scheduler_class

    for spec in config.solvers:
        scheduler_class(parse_spec(spec)[0])  # a wrong name should not cost the loading of a large model
    earlier = against.read(config.against, asdict(config)) if config.against else None
    out = open_folder(config, _FREE, "rows")
    measure = _on_mixture if config.model == MIXTURE else _on_pipeline
    result, prompts, strips = measure(config, out)
    for sentence in result.skipped:
        print(f"skipped: {sentence}")
    if not result.rows:
        raise UserError("no solver could run with any of the --steps; the reasons stand above")
    print(write_report(out, config, result, prompts, strips))
    for sentence in _yardsticks(result, config.reference_tolerance):
        print(sentence)
    print(f"\nreport: {out / 'report.html'}")
    if earlier is not None:
        _judge(earlier, result, config)
    return result


def _on_mixture(config: SamplersConfig, out: Path) -> _Found:
    import torch

    from diffalign.bench.samplers import compare_on_mixture

    dtypes = [getattr(torch, "float64" if name == "auto" else name) for name in config.dtypes]
    result = compare_on_mixture(
        config.solvers,
        config.steps,
        guidance=config.guidance,
        samples=config.samples,
        seed=config.seed,
        dtypes=list(dict.fromkeys(dtypes)),
        folder=out / "rows",
    )
    return result, [], {}


def _on_pipeline(config: SamplersConfig, out: Path) -> _Found:
    import torch

    from diffalign.bench.reference import default_cache, finest
    from diffalign.bench.samplers import build, compare_samplers
    from diffalign.pipelines.generate import denoiser, takes_prompts
    from diffalign.pipelines.load import load_pipeline

    scores, distances = _judges(config)
    named = [getattr(torch, name) for name in config.dtypes if name != "auto"]
    best = str(finest(named)).removeprefix("torch.") if named else "auto"
    pipe = load_pipeline(config.model, device=config.device, dtype=best)
    own = next(denoiser(pipe).parameters()).dtype
    dtypes = [own if name == "auto" else getattr(torch, name) for name in config.dtypes]
    if takes_prompts(pipe):
        prompts = [prompt for prompt in _prompts(config) for _ in range(config.images_per_prompt)]
    else:
        prompts = [""] * config.samples
    schedulers = build(config.solvers, pipe.scheduler.config)
    result = compare_samplers(
        pipe,
        schedulers,
        config.steps,
        prompts,
        seeds=range(config.seed, config.seed + len(prompts)),
        guidance=config.guidance,
        dtypes=list(dict.fromkeys(dtypes)),
        reference_steps=config.reference_steps,
        reference_tolerance=config.reference_tolerance,
        scores=scores,
        distances=distances,
        folder=out / "rows",
        cache_dir=config.cache_dir or default_cache(),
        batch_size=config.batch_size,
    )
    return result, prompts, _trajectories(config, pipe, schedulers, prompts)


def _prompts(config: SamplersConfig) -> list[str]:
    from diffalign.pipelines.load import PLAYGROUND
    from diffalign.sample import read_prompts

    if config.model.startswith(PLAYGROUND) and config.prompts is None and config.prompt_file is None:
        from diffalign.playground.captions import draw_captions

        return draw_captions(config.seed, config.samples, held_out=True)
    return read_prompts(config.prompts, config.prompt_file)


def _judges(config: SamplersConfig) -> tuple[dict[str, "Score"], dict[str, "Distance"]]:
    """The scores and the distances, by name, of the configuration or of the playground."""
    from diffalign.bench.distances import load_distances
    from diffalign.pipelines.load import PLAYGROUND, choose_device
    from diffalign.rewards import load_rewards, score_images

    rewards, distances = config.rewards, config.distances
    if config.model.startswith(PLAYGROUND):
        rewards = ["playground/verifier", "playground/scorer"] if rewards is None else rewards
        distances = ["playground/scorer"] if distances is None else distances
    device = choose_device(config.device)
    scores: dict[str, Score] = {}
    for spec in rewards or []:
        name = spec.partition("=")[0] if isinstance(spec, str) else spec.name
        if name in scores:
            raise UserError(f"--rewards names {name} twice")
        reward = load_rewards([spec], device=device)
        scores[name] = partial(score_images, reward, batch_size=config.batch_size)
    return scores, load_distances(distances or [], device)


def _trajectories(
    config: SamplersConfig, pipe: Any, schedulers: dict[str, Any], prompts: Sequence[str]
) -> dict[str, Any]:
    """Title -> strip of the first prompts at about ten evaluations; none for a family that has no adapter."""
    from diffalign.bench.plots import trajectory_strip
    from diffalign.bench.samplers import inference_steps
    from diffalign.bench.trajectory import predicted_images
    from diffalign.models.base import FAMILIES

    if type(pipe).__name__ not in FAMILIES:
        return {}
    n = min(config.steps, key=lambda steps: abs(steps - 10))
    runnable = {}
    for name, scheduler in schedulers.items():
        try:
            inference_steps(scheduler, n)
        except UserError:
            continue
        runnable[name] = scheduler
    strips = {}
    for i, prompt in list(enumerate(prompts))[:: config.images_per_prompt][: config.trajectories]:
        scale = config.guidance[-1]
        found = predicted_images(pipe, runnable, n, prompt, seed=config.seed + i, guidance=scale)
        strips[f"{prompt} (guidance {scale:g})"] = trajectory_strip(found)
    return strips


def _yardsticks(result: "Comparison", tolerance: float) -> list[str]:
    """How far the converged solutions can be trusted; nothing where the solution is exact."""
    sentences = []
    for scale, found in result.references.items():
        if found.steps:
            known = f"own error {found.error:.1e} (worst {float(found.moved.max()):.1e})"
            short = "" if found.error <= tolerance else f", above --reference_tolerance {tolerance:g}"
            sentences.append(f"converged solution, guidance {scale:g}: {found.steps} steps, {known}{short}")
    return sentences


def _judge(earlier: against.Rows, result: "Comparison", config: SamplersConfig) -> None:
    from diffalign.bench.record import markdown

    now = json.loads(json.dumps(against.per_image(result.rows)))
    both = against.compared(earlier, now)
    if not both:
        raise UserError("--against: the two runs have no solver, scale, dtype and number of steps in common")
    found = against.regressions(earlier, now, tolerance=config.tolerance, floor=result.reference_error)
    if found:
        print(f"\nworse than {config.against}:\n\n{markdown(found)}\n")
        raise against.Worse(f"{len(found)} of {both} compared results got worse than in {config.against}")
    print(f"\nno regression against {config.against}: {both} rows of both runs compared")


# ------------------------------------------------------------------- report

#: Key of the tables in the report -> (title, value of a row, format, whether more is better).
_METRICS: dict[str, tuple[str, str, bool]] = {
    "error": ("median relative error", "{:.1e}", False),
    "pixel_error": ("mean difference of a pixel, of 255", "{:.2f}", False),
    "lpips": ("LPIPS to the converged images", "{:.4f}", False),
    "feature_distance": ("distance of the image features", "{:.4f}", False),
}


def write_report(
    out: Path,
    config: SamplersConfig,
    result: "Comparison",
    prompts: Sequence[str] = (),
    strips: Mapping[str, Any] | None = None,
) -> str:
    """Write tables, pictures and page into ``out``; returns the table of errors."""
    from diffalign.bench.plots import convergence, sampler_strip
    from diffalign.bench.record import command_line, csv_text, store
    from diffalign.report import figure_png, figure_uri, png_uri, render, save_png, versions

    parts, shown = [], []
    steps = sorted({row.steps for row in result.rows})
    for dtype, scale in dict.fromkeys((row.dtype, row.guidance) for row in result.rows):
        rows = [row for row in result.rows if (row.dtype, row.guidance) == (dtype, scale)]
        reference = result.references[scale]
        figure = convergence(rows, reference.error)
        name = f"guidance_{scale:g}" + (f"_{dtype}" if len(config.dtypes) > 1 else "")
        save_png(out / f"error_{name}.png", figure_png(figure))
        pictures = []
        for i in range(min(3, len(rows[0].images) if rows[0].images is not None else 0)):
            title = prompts[i] or f"image {i}"
            sheet = sampler_strip(result, i, guidance=scale, dtype=dtype, title=title)
            save_png(out / f"samples_{name}_{i}.png", sheet)
            pictures.append({"image": png_uri(sheet), "title": title})
        tables = [_table(result, rows, metric) for metric in rows[0].values]
        shown += [
            {"dtype": dtype, "guidance": f"{scale:g}", "sampler": line["name"]}
            | {f"{n} steps": cell["text"] for n, cell in zip(steps, line["cells"], strict=True)}
            for line in tables[0]["lines"]
        ]
        parts.append(
            {
                "title": f"Guidance {scale:g}" + (f", {dtype}" if len(config.dtypes) > 1 else ""),
                "plot": figure_uri(figure),
                "floor": reference.error,
                "reference_steps": reference.steps,
                "tables": tables,
                "costs": _costs(rows),
                "pictures": pictures,
            }
        )
    trajectories = []
    for i, (title, strip) in enumerate((strips or {}).items()):
        save_png(out / f"trajectory_{i}.png", strip)
        trajectories.append({"image": png_uri(strip), "title": title})
    write_text(out / "samplers.csv", csv_text(result.table()))
    floors = {
        str(scale): {"error": found.error, "worst": float(found.moved.max()), "steps": found.steps}
        for scale, found in result.references.items()
    }
    more = {"reference": floors, "skipped": result.skipped, "per_image": against.per_image(result.rows)}
    table = store(out, "samplers", config, result.table(), shown, **more)
    page = render(
        "samplers.html",
        model="a Gaussian mixture" if config.model == MIXTURE else config.model,
        count=len(result.rows[0].values["error"]),
        yardstick="the exact solution" if config.model == MIXTURE else "the model's own converged solution",
        steps=steps,
        parts=parts,
        trajectories=trajectories,
        skipped=result.skipped,
        command=command_line("bench samplers", config),
        environment=versions(),
    )
    write_text(out / "report.html", page)
    return table


def _table(result: "Comparison", rows: Sequence["Row"], metric: str) -> dict[str, Any]:
    """A line per sampler, a cell per number of steps, the best of each column marked."""
    title, style, more = _METRICS.get(metric, (metric.removeprefix("score/"), "{:.3f}", True))
    value = {
        (row.sampler, row.steps): row.error_median if metric == "error" else row.mean(metric) for row in rows
    }
    steps = sorted({row.steps for row in result.rows})
    best = {
        n: (max if more else min)((v for (_, m), v in value.items() if m == n), default=None) for n in steps
    }
    nfe = {(row.sampler, row.steps): row.nfe for row in rows}

    def cell(name: str, n: int) -> dict[str, Any]:
        if (name, n) not in value:
            return {"text": "-", "best": False, "nfe": None}
        found = value[name, n]
        fewer = nfe[name, n] if round(nfe[name, n]) != n else None
        return {"text": style.format(found), "best": found == best[n], "nfe": fewer}

    names = dict.fromkeys(row.sampler for row in rows)
    lines = [{"name": name, "cells": [cell(name, n) for n in steps]} for name in names]
    return {"title": title, "lines": lines}


def _costs(rows: Sequence["Row"]) -> list[dict[str, Any]]:
    """Per sampler: time of an evaluation by that of the cheapest, and the share of it outside the network."""
    each = {
        name: [row for row in rows if row.sampler == name] for name in dict.fromkeys(r.sampler for r in rows)
    }
    per_call = {name: sum(r.seconds for r in own) / sum(r.nfe for r in own) for name, own in each.items()}
    least = min(per_call.values())
    return [
        {
            "name": name,
            "time": f"{per_call[name] / least:.2f}",
            "outside": f"{sum(r.outside for r in own) / sum(r.seconds for r in own):.1%}",
        }
        for name, own in each.items()
    ]
