"""``diffalign calibrate timesteps``: where a solver asks the network, searched for a pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.calibrate import tables
from diffalign.errors import UserError
from diffalign.solvers import SOLVERS

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.solvers.evolution import Genome
    from diffalign.solvers.scheduler import PlanScheduler
    from diffalign.solvers.selection import Calibration

Option = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class CalibrateTimestepsConfig(tables.TablesConfig):
    """Search the times at which a solver asks a pipeline's network.

    The solver's weights follow from its times. Evolution (AutoDiffusion) needs no gradients; gradient descent
    through the sampler is the other method. Candidates are judged by the error of their ends against the
    converged solution of the same model, prompts and noises, all on the same half of the noises; the best are
    compared with the solver's own grids on the other half, and if none wins there the best grid is kept.
    Writes scheduler/, which CalibratedScheduler.from_pretrained(output_dir, subfolder="scheduler") loads, and
    calibration.json, in which the times stand as well, for set_timesteps(timesteps=...) of the solver itself.

    Attributes:
        solver: dpm-solver++, dpm-solver, unipc, ddim, dpm-solver-v3 or dc-solver
        solver_options: options of the solver, as in --solver_options.solver_order 3
        method: evolution, or gradient
        population: candidates of a generation
        generations: how many
        iterations: steps of descent, with method gradient
        recompute: evaluate the network again in the backward pass, to save memory, with method gradient
    """

    output_dir: str = "outputs/timesteps"
    solver: str = "dpm-solver++"
    solver_options: dict[str, Option] = field(default_factory=dict)
    method: Literal["evolution", "gradient"] = "evolution"
    population: int = 40
    generations: int = 8
    iterations: int = 80
    recompute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(population=4, generations=1, iterations=1)
        if self.solver not in SOLVERS:
            raise UserError(
                f"--solver must be one of ours ({', '.join(SOLVERS)}), not {self.solver!r}: only these ask "
                "where they are told to"
            )


def run(config: CalibrateTimestepsConfig) -> Path:
    """The command; returns the output folder."""
    return tables.run(config, METHOD)


def on_grids(config: CalibrateTimestepsConfig, scheduler: Mapping[str, Any]) -> dict[str, "PlanScheduler"]:
    """The solver on each of its grids, by name.

    Raises:
        UserError: it has no such option, or cannot be stored as a table.
    """
    from diffalign.pipelines.load import make_scheduler
    from diffalign.solvers.calibrated import trace

    end = {"set_alpha_to_one": True} if config.solver == "ddim" else {"final_sigmas_type": "zero"}
    grids = (
        (str(config.solver_options["grid"]),)
        if "grid" in config.solver_options
        else tables.grids_for(scheduler)
    )
    built = {
        f"{config.solver}, {grid}": make_scheduler(
            config.solver, scheduler, **(end | dict(config.solver_options) | {"grid": grid})
        )
        for grid in grids
    }
    for one in built.values():
        if one._final() != "zero":
            raise UserError("tables end at the clean image: --solver_options.final_sigmas_type must be zero")
        for n in config.num_inference_steps:
            trace(one, n)
    return built


def _search(
    config: CalibrateTimestepsConfig, task: tables.Task, steps: int, progress: Callable[[], object]
) -> "Calibration":
    from diffalign.solvers import fitting, selection
    from diffalign.solvers.calibrated import Table, trace
    from diffalign.solvers.evolution import Space

    solvers = on_grids(config, task.scheduler_config)
    if config.method == "gradient":
        return selection.calibrate(
            task.problem,
            task.truth,
            solvers,
            steps,
            fits=1,
            trajectories=(0.5,),
            iterations=config.iterations,
            recompute=config.recompute,
            follow={name: selection.following(solver) for name, solver in solvers.items()},
            mu=task.mu,
            progress=progress,
        )
    schedule, solver = task.problem.schedule, next(iter(solvers.values()))

    def table_of(genome: "Genome") -> Table:
        times = fitting.times_at(schedule, [place for (place,) in genome])
        told, weights = trace(solver, timesteps=times.tolist())
        return Table(told[:-1], weights)

    baselines = selection.known(task.problem, task.truth, solvers, steps, mu=task.mu)
    starts = {
        name: tuple((float(p),) for p in fitting.places_of(schedule, known.table.times))
        for name, known in baselines.items()
    }
    return selection.search(
        task.problem,
        task.truth,
        baselines,
        Space(((),) * steps),
        starts,
        table_of,
        population=config.population,
        generations=config.generations,
        seed=config.seed,
        progress=progress,
    )


METHOD = tables.Method(
    "timesteps",
    _search,
    lambda config: (
        config.iterations if config.method == "gradient" else config.population * config.generations
    ),
    on_grids,
)
