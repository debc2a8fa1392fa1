"""``diffalign calibrate dc``: DC-Solver's ratios for a pipeline."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.calibrate.prompts import calibration_prompts
from diffalign.errors import UserError
from diffalign.output import prepare, write_json

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.solvers.dc_search import Cascade, DCRatios

RECORD = "calibration.json"
# What may differ between an interrupted run and the one that goes on. Steps and scales may: each pair of them
# is a search of its own.
_FREE = (
    "output_dir",
    "num_inference_steps",
    "guidance_scale",
    "save_pipeline",
    "batch_size",
    "device",
    "overwrite",
)


@dataclass(frozen=True)
class CalibrateDCConfig:
    """Find DC-Solver's compensation ratios for a pipeline: better images in few steps, at no cost per step.

    Searches one ratio per step so that the sampler meets the converged solution of the same model, prompts
    and noises; half of the noises are kept out of the search, and ratios that don't help there are dropped.
    Run again, an interrupted search goes on, and more steps or scales can be added. Writes
    scheduler/, which DCSolverScheduler.from_pretrained(output_dir, subfolder="scheduler") loads, and
    calibration.json with the losses before and after.

    Attributes:
        model: pipeline folder, hub id (owner/name), or a shipped model such as playground/sd
        output_dir: folder to write to
        num_inference_steps: numbers of steps to find ratios for
        guidance_scale: classifier-free guidance scale; with three or more scales and numbers of steps a
            polynomial through all ratios is stored instead, which also serves those in between
        prompts: what to draw; the playground brings its own
        prompt_file: text file with one prompt a line
        samples: starting noises, half of them for the search; prompts are used in turn
        seed: of the first noise; sample i uses seed + i
        predictor: solver that is compensated
        solver_order: order of the solver
        dc_order: degree of the interpolant, 1 to 3
        grid: of times; ratios belong to the grid on which they were found
        evaluations: network evaluations spent on a ratio, at most
        reference_steps: steps of the converged solution
        resolution: side of the images in pixels; the model's own if not given
        save_pipeline: write the whole pipeline with its new scheduler, not the scheduler alone
        batch_size: samples in the network at once
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the model; auto is float32 on the CPU and 16 bits on a GPU
        variant: of the weight files, such as fp16
        revision: of a hub repository
        overwrite: start afresh in a folder that is not empty
    """

    model: str = "playground/sd"
    output_dir: str = "outputs/dc"
    num_inference_steps: list[int] = field(default_factory=lambda: [5, 8, 10])
    guidance_scale: list[float] = field(default_factory=lambda: [5.0])
    prompts: list[str] | None = None
    prompt_file: str | None = None
    samples: int = 16
    seed: int = 0
    predictor: Literal["unipc", "dpm-solver++", "ddim"] = "unipc"
    solver_order: int = 2
    dc_order: int = 2
    grid: str = "auto"
    evaluations: int = 12
    reference_steps: int = 100
    resolution: int | None = None
    save_pipeline: bool = False
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    variant: str | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "guidance_scale"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} must have one or more different numbers, not {values}")
        if len(self.guidance_scale) > 1 and min(len(self.guidance_scale), len(self.num_inference_steps)) < 3:
            raise UserError(
                "several guidance scales need a polynomial: give at least 3 of --guidance_scale and of "
                "--num_inference_steps, or one guidance scale"
            )
        if min(self.num_inference_steps) <= self.dc_order:
            raise UserError(
                f"--num_inference_steps must be above --dc_order {self.dc_order}: the first steps are not "
                "compensated"
            )
        if not all(math.isfinite(g) and g >= 1.0 for g in self.guidance_scale):
            raise UserError(f"--guidance_scale must be 1 or more, not {self.guidance_scale}")
        for name, least in (("samples", 2), ("evaluations", 3), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.reference_steps < 2 * max(self.num_inference_steps):
            raise UserError(
                f"--reference_steps {self.reference_steps} is no yardstick for "
                f"{max(self.num_inference_steps)} steps; give at least {2 * max(self.num_inference_steps)}"
            )


def run(config: CalibrateDCConfig) -> Path:
    """Search, store, and print what was gained; returns the output folder.

    Raises:
        UserError: no prompts, unknown model, options that the scheduler refuses, or an output folder in use.
    """
    prompts = calibration_prompts(
        config.model, config.prompts, config.prompt_file, samples=config.samples, seed=config.seed
    )
    earlier = [] if config.overwrite else _earlier(config)
    out = prepare(config.output_dir, overwrite=config.overwrite or bool(earlier))

    from diffalign.pipelines.load import load_pipeline, make_scheduler
    from diffalign.report import versions
    from diffalign.solvers.dc_search import fit_cascade

    pipe = load_pipeline(
        config.model,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        variant=config.variant,
    )
    options: dict[str, Any] = {
        name: getattr(config, name) for name in ("predictor", "solver_order", "dc_order", "grid")
    }

    def keep(found: list["DCRatios"], cascade: "Cascade | None" = None) -> None:
        record = {
            "settings": asdict(config),
            "results": [asdict(result) for result in found],
            "cascade": None if cascade is None else asdict(cascade),
            "versions": versions(),
        }
        write_json(out / RECORD, record)

    plain = make_scheduler("dc-solver", pipe.scheduler.config, **options)
    found = search(pipe, plain, prompts, config, earlier=earlier, keep=keep)
    cascade = fit_cascade(found, order=config.dc_order) if len(config.guidance_scale) > 1 else None
    scheduler = make_scheduler("dc-solver", pipe.scheduler.config, **options, **_stored(found, cascade))
    if config.save_pipeline:
        pipe.scheduler = scheduler
        pipe.save_pretrained(out)
    else:
        scheduler.save_pretrained(out / "scheduler")
    keep(found, cascade)
    print(_table(found))
    if cascade is not None:
        print(f"\none polynomial through all of them, root mean square error {cascade.error:.3f}")
    print(f'\nload it with DCSolverScheduler.from_pretrained("{out}", subfolder="scheduler")')
    return out


def search(
    pipe: Any,
    scheduler: Any,
    prompts: list[str],
    config: CalibrateDCConfig,
    *,
    earlier: Sequence["DCRatios"] = (),
    keep: Callable[[list["DCRatios"]], None] = lambda found: None,
) -> list["DCRatios"]:
    """The ratios of every guidance scale and number of steps that `config` names.

    Args:
        pipe: the pipeline.
        scheduler: the solver and grid.
        prompts: used in turn.
        config: the settings.
        earlier: results that needn't be searched again.
        keep: called with all results so far after each search.
    """
    from tqdm.auto import tqdm

    from diffalign.calibrate.guided import guided_model, guided_network, starting_noise
    from diffalign.models import load_adapter
    from diffalign.pipelines.guidance import dynamic_shift
    from diffalign.solvers.dc_search import search_dc_ratios

    adapter = load_adapter(pipe)
    seeds = range(config.seed, config.seed + config.samples)
    noise = starting_noise(adapter, seeds, resolution=config.resolution)
    mu = dynamic_shift(adapter, resolution=config.resolution)
    known = {(result.guidance_scale, result.num_inference_steps): result for result in earlier}
    pairs = [(scale, n) for scale in config.guidance_scale for n in config.num_inference_steps]
    for place, (scale, n) in enumerate(pairs, 1):
        if (scale, n) in known:
            continue
        network = guided_network(
            adapter,
            [prompts[i % len(prompts)] for i in range(config.samples)],
            guidance_scale=scale,
            resolution=config.resolution,
        )
        title = f"{place} of {len(pairs)}: {n} steps, guidance {scale:g}"
        with tqdm(desc=title, total=_evaluations(config, n), unit="evaluation", leave=False) as bar:
            known[scale, n] = search_dc_ratios(
                guided_model(network, range(config.samples), batch_size=config.batch_size),
                scheduler,
                noise,
                num_inference_steps=n,
                mu=mu,
                guidance_scale=scale,
                evaluations=config.evaluations,
                reference_steps=config.reference_steps,
                callback=bar.update,
            )
        keep(list(known.values()))
    return [known[pair] for pair in pairs]


def _evaluations(config: CalibrateDCConfig, n: int) -> int:
    """About how many network evaluations the search for n steps takes."""
    searched = n - 1 - config.dc_order if config.predictor == "unipc" else 0
    return config.reference_steps + 2 * n + searched * (config.evaluations + 1)


def _earlier(config: CalibrateDCConfig) -> list["DCRatios"]:
    """Results in the output folder that another run with these settings left.

    Raises:
        UserError: those there are of other settings.
    """
    from diffalign.solvers.dc_search import DCRatios

    file = Path(config.output_dir).expanduser() / RECORD
    if not file.is_file():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        results = [DCRatios(**result) for result in record["results"]]
        same = _settings(record["settings"]) == _settings(asdict(config))
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise UserError(
            f"output folder {str(file.parent)!r} is not empty: it holds a calibration with other settings; "
            "add --overwrite or choose another --output_dir"
        )
    return results


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _FREE}


def _stored(found: list["DCRatios"], cascade: "Cascade | None") -> dict[str, Any]:
    """The scheduler's options that hold the results."""
    if cascade is not None:
        return cascade.options()
    return {
        "dc_ratios": {str(result.num_inference_steps): result.ratios for result in found},
        "guidance_scale": found[0].guidance_scale,
    }


def _table(found: list["DCRatios"]) -> str:
    lines = [f"{'guidance':>8}  {'steps':>5}  {'held-out loss':>20}  {'less by':>7}  {'kept':>4}  ratios"]
    for result in found:
        before, after = result.held_out_before, result.held_out_after
        assert before is not None
        assert after is not None
        gain = f"{100 * (1 - after / before):.0f} %" if before else "-"
        ratios = " ".join(f"{r:.2f}" for r in result.ratios)
        lines.append(
            f"{result.guidance_scale:>8g}  {result.num_inference_steps:>5}  "
            f"{f'{before:.3g} -> {after:.3g}':>20}  {gain:>7}  {result.kept:>4}  {ratios}"
        )
    return "\n".join(lines)
