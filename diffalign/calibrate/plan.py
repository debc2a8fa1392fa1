"""``diffalign calibrate plan``: a sampler fitted to a pipeline, times and weights of every step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.calibrate import tables
from diffalign.errors import UserError

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from diffalign.solvers.selection import Calibration


@dataclass(frozen=True, kw_only=True)
class CalibratePlanConfig(tables.TablesConfig):
    """Fit a sampler to a pipeline: times and weights of all steps, by gradient descent through the sampler.

    Brings the sampler's end to the converged solution of the same model, prompts and noises. Half of the
    noises are kept out of the fit; a fit that does not beat the best known solver on them is dropped. It
    holds for the guidance scale and the numbers of steps that it was made for. Writes scheduler/, which
    CalibratedScheduler.from_pretrained(output_dir, subfolder="scheduler") loads, and calibration.json with
    the errors before and after.

    Attributes:
        iterations: steps of descent per fit
        fits: so many fits, from the best known solver, from weights fitted step by step, and so on in turn
        trajectory: weights of the states on the way in the loss; of several, each gets a quarter of the
            iterations, and the best goes on
        recompute: evaluate the network again in the backward pass, to save memory
    """

    output_dir: str = "outputs/plan"
    iterations: int = 40
    fits: int = 1
    trajectory: list[float] = field(default_factory=lambda: [0.5])
    recompute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trajectory or min(self.trajectory) < 0:
            raise UserError(f"--trajectory must be one or more numbers from 0, not {self.trajectory}")
        self.at_least(iterations=1, fits=1)


def run(config: CalibratePlanConfig) -> Path:
    """The command; returns the output folder."""
    return tables.run(config, METHOD)


def _fit(
    config: CalibratePlanConfig, task: tables.Task, steps: int, progress: Callable[[], object]
) -> "Calibration":
    from diffalign.solvers import selection

    return selection.calibrate(
        task.problem,
        task.truth,
        tables.known_solvers(task.scheduler_config),
        steps,
        fits=config.fits,
        trajectories=config.trajectory,
        iterations=config.iterations,
        recompute=config.recompute,
        mu=task.mu,
        progress=progress,
    )


def _work(config: CalibratePlanConfig) -> int:
    from diffalign.solvers.selection import descents

    return descents(config.iterations, config.fits, len(config.trajectory))


METHOD = tables.Method("plan", _fit, _work)
