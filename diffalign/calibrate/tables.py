"""What the commands that make tables for ``CalibratedScheduler`` share: all but how a table is found."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from diffalign.calibrate.prompts import calibration_prompts
from diffalign.errors import UserError
from diffalign.output import prepare, write_json

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.models import ModelAdapter
    from diffalign.solvers.calibrated import Table, Tables
    from diffalign.solvers.fitting import Problem, Truth
    from diffalign.solvers.scheduler import PlanScheduler
    from diffalign.solvers.selection import Calibration

RECORD = "calibration.json"
# What may differ between an interrupted run and the one that goes on: each number of steps has its own table.
_FREE = ("output_dir", "num_inference_steps", "save_pipeline", "batch_size", "device", "overwrite")
#: Solvers that searches start from and are compared with: order x grid of both multistep methods.
SOLVERS = ("dpm-solver++", "unipc")
GRIDS = ("auto", "logsnr", "karras", "time_uniform", "time_quadratic")


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Options of every command that makes tables.

    Attributes:
        model: pipeline folder, hub id (owner/name), or a shipped model such as playground/sd
        output_dir: folder to write to
        num_inference_steps: numbers of steps to make tables for
        guidance_scale: classifier-free guidance scale; 1 is none
        prompts: what to draw; the playground brings its own
        prompt_file: text file with one prompt a line
        samples: starting noises, of which half are held out; prompts are used in turn
        seed: of the first noise; sample i uses seed + i
        reference_steps: Runge-Kutta steps of the converged solution, four evaluations each
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
    output_dir: str = "outputs/tables"
    num_inference_steps: list[int] = field(default_factory=lambda: [5, 8])
    guidance_scale: float = 5.0
    prompts: list[str] | None = None
    prompt_file: str | None = None
    samples: int = 32
    seed: int = 0
    reference_steps: int = 50
    resolution: int | None = None
    save_pipeline: bool = False
    batch_size: int = 16
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    variant: str | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if not steps or len(set(steps)) < len(steps) or min(steps) < 2:
            raise UserError(
                f"--num_inference_steps must be one or more different numbers from 2, not {steps}"
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1.0):
            raise UserError(f"--guidance_scale must be 1 or more, not {self.guidance_scale}")
        self.at_least(samples=4, batch_size=1, reference_steps=10)

    def at_least(self, **least: int) -> None:
        """UserError unless each option has at least that value."""
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name} must be at least {low}, not {getattr(self, name)}")


C = TypeVar("C", bound=TablesConfig)


@dataclass(frozen=True)
class Task:
    """One pipeline at one guidance scale, and its converged solution.

    Attributes:
        scheduler_config: what the pipeline came with.
        mu: shift of a flow model's grid for the size of the images, or None.
    """

    problem: "Problem"
    truth: "Truth"
    scheduler_config: Mapping[str, Any]
    mu: float | None


@dataclass(frozen=True)
class Method(Generic[C]):
    """A way to find tables.

    Attributes:
        name: of the command, ``diffalign calibrate <name>``.
        search: ``(config, task, steps, progress) -> Calibration``; progress is called as work is done,
        work: ``(config) -> int``, so often.
        check: ``(config, scheduler_config)``, refuses what cannot be before anything is computed.
    """

    name: str
    search: Callable[[C, Task, int, Callable[[], object]], "Calibration"]
    work: Callable[[C], int]
    check: Callable[[C, Mapping[str, Any]], object] = lambda config, scheduler: None


def run(config: C, method: Method[C]) -> Path:
    """Find tables, store them, and print what was gained; returns the output folder.

    Raises:
        UserError: no prompts, unknown model, or an output folder in use.
    """
    prompts = calibration_prompts(
        config.model, config.prompts, config.prompt_file, samples=config.samples, seed=config.seed
    )
    earlier = None if config.overwrite else _earlier(config, method.name)
    out = prepare(config.output_dir, overwrite=config.overwrite or earlier is not None)

    from diffalign.pipelines.load import load_pipeline
    from diffalign.report import versions
    from diffalign.solvers.calibrated import CalibratedScheduler, Tables
    from diffalign.solvers.noise import NoiseSchedule

    pipe = load_pipeline(
        config.model,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        variant=config.variant,
    )
    source = pipe.scheduler.config
    info = {
        "guidance_scale": config.guidance_scale,
        "prediction_type": CalibratedScheduler.from_config(source).config.prediction_type,
        "model": config.model,
        "method": method.name,
    }

    def scheduler_with(tables: Mapping[int, "Table"]) -> Any:
        content = Tables(dict(tables), NoiseSchedule.from_config(source).fingerprint(), "zero", info)
        # The tables hold the shift of the size that they were fitted at.
        return CalibratedScheduler.from_config(source, tables=content, use_dynamic_shifting=False)

    def keep(tables: Mapping[int, "Table"]) -> None:
        scheduler_with(tables).save_pretrained(out / "scheduler")
        results = {
            n: {**table.info, "timesteps": table.times.tolist()} for n, table in sorted(tables.items())
        }
        record = {"method": method.name, "settings": asdict(config), "results": results}
        write_json(out / RECORD, record | {"versions": versions()})

    found = tabled(pipe, prompts, config, method, earlier=earlier.tables if earlier else {}, keep=keep)
    if config.save_pipeline:
        pipe.scheduler = scheduler_with(found)
        pipe.save_pretrained(out)
    print(report(found))
    print(f'\nload it with CalibratedScheduler.from_pretrained("{out}", subfolder="scheduler")')
    return out


def tabled(
    pipe: Any,
    prompts: list[str],
    config: C,
    method: Method[C],
    *,
    earlier: Mapping[int, "Table"],
    keep: Callable[[Mapping[int, "Table"]], None] = lambda tables: None,
) -> dict[int, "Table"]:
    """The tables of every number of steps that ``config`` names, those of ``earlier`` as they are.

    Args:
        keep: called with all tables so far after each search.
    """
    from tqdm.auto import tqdm

    from diffalign.models import load_adapter
    from diffalign.pipelines.guidance import dynamic_shift
    from diffalign.solvers.fitting import solve

    tables = dict(earlier)
    missing = [n for n in config.num_inference_steps if n not in tables]
    if not missing:
        return tables
    method.check(config, pipe.scheduler.config)
    adapter = load_adapter(pipe)
    problem = problem_of(adapter, prompts, config)
    with tqdm(desc="converged solution", total=config.reference_steps, unit="step", leave=False) as bar:
        truth = solve(problem, config.reference_steps, bar.update)
    mu = dynamic_shift(adapter, resolution=config.resolution)
    task = Task(problem, truth, pipe.scheduler.config, mu)
    for place, n in enumerate(missing, 1):
        title = f"{place} of {len(missing)}: {n} steps"
        with tqdm(desc=title, total=method.work(config), leave=False) as bar:
            result = method.search(config, task, n, bar.update)
        for sentence in result.warnings:
            print(f"warning: {sentence}")
        tables[n] = result.chosen.table
        keep(tables)
    return tables


def problem_of(adapter: "ModelAdapter", prompts: list[str], config: TablesConfig) -> "Problem":
    """The model's network, its prompts and noises, as something to fit a sampler to."""
    import torch

    from diffalign.calibrate.guided import guided_network, starting_noise
    from diffalign.solvers.fitting import Problem
    from diffalign.solvers.prediction import coefficients

    adapter.module.requires_grad_(False)
    network = guided_network(
        adapter,
        [prompts[i % len(prompts)] for i in range(config.samples)],
        guidance_scale=config.guidance_scale,
        resolution=config.resolution,
    )

    def predict(x: Any, t: Any, alpha: Any, sigma: Any, rows: slice) -> Any:
        output = network(x, t, torch.arange(rows.start, rows.stop))
        c_x, c_o = coefficients(adapter.prediction_type, "sample", alpha, sigma)
        return x * c_x + output * c_o

    seeds = range(config.seed, config.seed + config.samples)
    noise = starting_noise(adapter, seeds, resolution=config.resolution)
    return Problem(predict, adapter.schedule, noise, batch_size=config.batch_size)


def grids_for(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The grids to start from, for a model with this scheduler config."""
    from diffalign.solvers.noise import NoiseSchedule

    return ("auto",) if NoiseSchedule.from_config(config).is_flow else GRIDS


def known_solvers(config: Mapping[str, Any]) -> dict[str, "PlanScheduler"]:
    """Every solver that a search may start from, for a model with this scheduler config."""
    from diffalign.pipelines.load import make_scheduler

    return {
        solver_name(solver, order, grid): make_scheduler(
            solver, config, solver_order=order, grid=grid, final_sigmas_type="zero"
        )
        for solver in SOLVERS
        for order in (2, 3)
        for grid in grids_for(config)
    }


def solver_name(solver: str, order: int, grid: str) -> str:
    """The name of a known solver in reports."""
    return f"{solver} of order {order}, {grid}"


def _earlier(config: TablesConfig, method: str) -> "Tables | None":
    """Tables in the output folder that another run with these settings left."""
    from diffalign.solvers.calibrated import Tables
    from diffalign.solvers.statistics import FILE

    out = Path(config.output_dir).expanduser()
    if not (out / RECORD).is_file():
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        settings, made_by = record["settings"], record.get("method")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out / RECORD} is damaged: start afresh with --overwrite") from error
    wanted = json.loads(json.dumps(asdict(config)))
    other = [name for name, value in wanted.items() if name not in _FREE and settings.get(name) != value]
    if made_by != method:
        other = ["method"]
    if other:
        raise UserError(
            f"{out} was calibrated with another {', '.join(other)}: go on as before, start afresh with "
            "--overwrite, or choose another --output_dir"
        )
    return Tables.load(out / "scheduler" / FILE)


def report(tables: Mapping[int, "Table"]) -> str:
    """What was gained on the held-out noises, as a table to print."""
    lines = [
        "relative errors on the held-out noises; what does not beat the best known solver there is not kept",
        f"{'steps':>5}  {'best known solver':>36}  {'its error':>9}  {'found':>9}  {'90 % below':>19}  kept",
    ]
    for n, table in sorted(tables.items()):
        info = table.info
        p90 = f"{info['best_known_p90']:.4f} -> {info['held_out_p90']:.4f}"
        lines.append(
            f"{n:>5}  {info['best_known']:>36}  {info['best_known_error']:>9.4f}  "
            f"{info['held_out_error']:>9.4f}  {p90:>19}  {'yes' if info['fitted'] else 'no'}"
        )
    return "\n".join(lines)
