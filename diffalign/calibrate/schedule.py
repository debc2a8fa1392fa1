"""``diffalign calibrate schedule``: how each step is made, searched for a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.calibrate import tables

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.solvers.evolution import Genome
    from diffalign.solvers.selection import Calibration


@dataclass(frozen=True, kw_only=True)
class CalibrateScheduleConfig(tables.TablesConfig):
    """Search how each step of a pipeline's sampler is made: place, order, form, derivatives, corrector.

    The space of the unified sampling framework (USF) holds DPM-Solver, DPM-Solver++ and UniPC on every grid,
    which the search starts from, and what lies between: another solver in each step. It needs no gradients.
    Candidates are judged by the error of their ends against the converged solution of the same model, prompts
    and noises, all on the same half of the noises; the best are compared with the known solvers on the other
    half, and if none wins there the best known one is kept. Writes scheduler/, which
    CalibratedScheduler.from_pretrained(output_dir, subfolder="scheduler") loads, and calibration.json, in
    which the choices of each step stand as well.

    Attributes:
        population: candidates of a generation
        generations: how many
    """

    output_dir: str = "outputs/schedule"
    population: int = 50
    generations: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(population=4, generations=1)


def run(config: CalibrateScheduleConfig) -> Path:
    """The command; returns the output folder."""
    return tables.run(config, METHOD)


def _search(
    config: CalibrateScheduleConfig, task: tables.Task, steps: int, progress: Callable[[], object]
) -> "Calibration":
    import math

    from diffalign.solvers import fitting, selection
    from diffalign.solvers.calibrated import Table
    from diffalign.solvers.evolution import Space
    from diffalign.solvers.unified import choices, known_steps, table_of

    schedule = task.problem.schedule
    solvers = tables.known_solvers(task.scheduler_config)
    baselines = selection.known(task.problem, task.truth, solvers, steps, mu=task.mu)

    def table(genome: "Genome") -> Table:
        times = fitting.times_at(schedule, [step[0] for step in genome])
        return table_of(schedule, times, [step[1:] for step in genome])  # type: ignore[misc]

    def described(genome: "Genome") -> dict[str, Any]:
        names = ("form", "order", "derivative", "corrector")
        return {"steps": [dict(zip(names, step[1:], strict=True)) for step in genome]}

    starts = {}
    for solver in tables.SOLVERS:
        for order in (2, 3):
            for grid in tables.grids_for(task.scheduler_config):
                name = tables.solver_name(solver, order, grid)
                places = fitting.places_of(schedule, baselines[name].table.times)
                own = known_steps(solver, order, steps)
                starts[name] = tuple((float(p), *c) for p, c in zip(places, own, strict=True))
    return selection.search(
        task.problem,
        task.truth,
        baselines,
        Space(choices(steps, pure_noise=not math.isfinite(schedule.lambda_(schedule.t_max)))),
        starts,
        table,
        more=described,
        population=config.population,
        generations=config.generations,
        seed=config.seed,
        progress=progress,
    )


METHOD = tables.Method("schedule", _search, lambda config: config.population * config.generations)
