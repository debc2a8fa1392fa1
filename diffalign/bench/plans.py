"""``diffalign bench plans``: fitted samplers against the best uncalibrated one of any library.

The yardstick is unfair on purpose: of every deterministic scheduler here and in diffusers, on every grid, the
one that turns out best on the test noises themselves, for each problem, guidance, number of evaluations and
seed anew, and for the mean and the 90th percentile apart. The plan is fitted on other noises and prompts, or
to other models altogether (``--family``). Every cell lies in a file of its own: an interrupted run goes on.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign import output
from diffalign.bench.grids import SPACINGS, coordinates
from diffalign.bench.kept import open_folder
from diffalign.bench.networks import SD_SCHEDULER
from diffalign.bench.samplers import relative_errors
from diffalign.errors import UserError
from diffalign.solvers import GaussianMixture, sample
from diffalign.solvers.fitting import Problem, Truth, judge, solve
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.sampling import ModelFn

if TYPE_CHECKING:
    from diffalign.bench.family import Family
    from diffalign.solvers.calibrated import Table
    from diffalign.solvers.selection import Calibration

MIXTURE = "mixture-"
#: Ours by name, with their options, on every grid of :data:`GRIDS`.
OURS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(
        (name, {"solver_order": order})
        for name in ("dpm-solver++", "unipc", "dpm-solver")
        for order in (2, 3)
    ),
    ("dpm-solver-v3", {}),
    ("pndm", {"set_alpha_to_one": True}),
    ("ddim", {"set_alpha_to_one": True}),
)
GRIDS = ("auto", "logsnr", "karras", "beta", "time_uniform", "time_quadratic")
#: diffusers' by class, with their options, on every grid of :data:`SPACINGS` that they have.
THEIRS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 2}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}),
    ("DEISMultistepScheduler", {"solver_order": 2}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("DDIMScheduler", {"set_alpha_to_one": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("EulerDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
)
_FREE = ("output_dir", "overwrite", "problems", "mixture_guidance", "guidance", "steps", "seeds", "device")
#: The contest of the uncalibrated: the share of the test noises that they have been tried on, and how many of
#: the best, by mean and by 90th percentile each, go on.
_ROUNDS = ((1 / 16, 16), (1 / 4, 5), (1.0, 1))
_LEAST = 16  # noises in the first round: with fewer, the best would be thrown out by chance


@dataclass(frozen=True)
class PlansConfig:
    """Compare fitted samplers with the best uncalibrated one of any library, chosen in hindsight.

    On Gaussian mixtures (exact network, Stable Diffusion's noise schedule) and on playground models; fitted
    and tested on different noises, and on different captions. Writes plans.json, plans.csv, plans.md and
    plans.png. Called again with the same settings, it goes on.

    Attributes:
        output_dir: folder for the results
        problems: mixture-0, mixture-7, ... (a mixture by its seed), playground/sd, playground/flow, or a
            pipeline folder whose captions are the playground's
        mixture_guidance: classifier-free guidance scales of the mixtures; 1 is none
        guidance: classifier-free guidance scales of the pipelines
        steps: numbers of network evaluations
        seeds: of the noises of fit and test
        noises: of a mixture's fit, with those to choose with
        held_out: of these, to choose with
        test_noises: of a mixture
        samples: noises and captions of a pipeline's fit
        test_samples: held-out captions with noises of their own, of a pipeline
        iterations: steps of descent per fit on mixtures
        pipeline_iterations: the same on pipelines
        fits: so many fits, from the best known solver, from weights fitted step by step, and so on in turn
        trajectory: weights of the states on the way in the loss; of several, each gets a quarter of the
            iterations, and the best goes on
        reference_steps: Runge-Kutta steps of the converged solutions
        recompute: evaluate the network again in the backward pass, to save memory
        family: fit one table per number of steps to all of these together, such as mixture-20 mixture-21, and
            judge it on the problems, which must be others on the same noise schedule; noises, held_out and
            samples are then those of each member at each scale
        family_guidance: classifier-free guidance scales that a family's table is fitted at
        device: of pipelines; auto, cpu, cuda, cuda:1, mps
        overwrite: start anew where other settings have been used
    """

    output_dir: str = "outputs/bench/plans"
    problems: list[str] = field(
        default_factory=lambda: ["mixture-0", "mixture-7", "playground/sd", "playground/flow"]
    )
    mixture_guidance: list[float] = field(default_factory=lambda: [1.0, 7.5])
    guidance: list[float] = field(default_factory=lambda: [4.0])
    steps: list[int] = field(default_factory=lambda: [5, 6, 8, 10])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    noises: int = 1152
    held_out: int = 1024
    test_noises: int = 2048
    samples: int = 32
    test_samples: int = 64
    iterations: int = 150
    pipeline_iterations: int = 24
    fits: int = 2
    trajectory: list[float] = field(default_factory=lambda: [0.1, 0.5])
    reference_steps: int = 60
    recompute: bool = False
    family: list[str] | None = None
    family_guidance: list[float] = field(default_factory=lambda: [1.0, 2.5, 5.0, 7.5])
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        lists = (
            "problems",
            "mixture_guidance",
            "guidance",
            "steps",
            "seeds",
            "trajectory",
            "family_guidance",
        )
        for name in (*lists, *(("family",) if self.family is not None else ())):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give at least one")
        for option in ("problems", "family"):
            for problem in getattr(self, option) or ():
                if problem.startswith(MIXTURE) and not problem.removeprefix(MIXTURE).isdigit():
                    raise UserError(
                        f"--{option}: a mixture is named by its seed, as in mixture-7, not {problem!r}"
                    )
        if seen := sorted(set(self.problems) & set(self.family or ())):
            raise UserError(
                f"--problems has {', '.join(seen)} of --family: its table is judged on what it has not seen"
            )
        if min(self.steps) < 2:
            raise UserError(f"--steps must be 2 or more, not {min(self.steps)}")
        if min((*self.mixture_guidance, *self.guidance, *self.family_guidance)) < 1:
            raise UserError(
                "--guidance, --mixture_guidance and --family_guidance must be 1 or more; 1 is none"
            )
        least = {"noises": 4, "test_noises": 2, "samples": 4, "test_samples": 2, "iterations": 1}
        for name, low in (least | {"pipeline_iterations": 1, "fits": 1, "reference_steps": 10}).items():
            if getattr(self, name) < low:
                raise UserError(f"--{name} must be at least {low}, but is {getattr(self, name)}")
        if not 1 <= self.held_out < self.noises:
            raise UserError(f"--held_out must be at least 1 and below --noises, but is {self.held_out}")


def run(config: PlansConfig) -> list[dict[str, Any]]:
    """The command; returns the rows of the table."""
    from diffusers.utils import logging
    from tqdm.auto import tqdm

    from diffalign.bench.family import Family
    from diffalign.bench.plans_report import write_report
    from diffalign.pipelines.load import resolve_model

    for name in (*config.problems, *(config.family or ())):
        if not name.startswith(MIXTURE):
            resolve_model(name)  # a wrong name should not show after hours on the others
    logging.set_verbosity_error()  # of options that diffusers' classes change for themselves
    folder = open_folder(config, _FREE, "cells")
    jobs = [
        (problem, guidance, seed)
        for problem in config.problems
        for guidance in (config.mixture_guidance if problem.startswith(MIXTURE) else config.guidance)
        for seed in config.seeds
    ]
    families = {seed: Family(config, seed, folder / "cells") for seed in config.seeds if config.family}
    for family in list(families.values())[:1]:  # all have the same models
        family.check()
    cells: list[dict[str, Any]] = []
    with tqdm(total=len(jobs) * len(config.steps), desc="plans", unit="cell") as bar:
        for problem, guidance, seed in jobs:
            bar.set_postfix_str(f"{problem}, guidance {guidance:g}, seed {seed}")
            case = Case(config, problem, guidance, seed, families.get(seed))
            for n in config.steps:
                own = folder / "cells" / f"{_slug(problem)}-{guidance:g}-{seed}-{n}.json"
                if not own.is_file():
                    own.parent.mkdir(exist_ok=True)
                    output.write_json(own, asdict(measured(case, n)))
                cells.append(json.loads(own.read_text()))
                bar.update()
    rows = table(cells, family=config.family is not None)
    print(write_report(folder, config, rows, cells))
    return rows


def _slug(problem: str) -> str:
    return problem.replace("/", "_")


# ------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Case:
    """One problem at one guidance scale with one seed, to fit and to test on; made when first needed.

    Attributes:
        family: whose table is judged, rather than one fitted to the problem itself.
    """

    config: PlansConfig
    name: str
    guidance: float
    seed: int
    family: Family | None = None

    @property
    def on_mixture(self) -> bool:
        return self.name.startswith(MIXTURE)

    @cached_property
    def _pipe(self) -> Any:
        from diffalign.pipelines.load import load_pipeline

        return load_pipeline(self.name, device=self.config.device)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler config of the model."""
        return SD_SCHEDULER if self.on_mixture else self._pipe.scheduler.config

    def _problem(self, *, held_out: bool) -> Problem:
        # Seeds of different runs and of fit and test stay apart.
        seed = 10_000_000 * held_out + 100_000 * self.seed
        if self.on_mixture:
            mixture = GaussianMixture.random(seed=int(self.name.removeprefix(MIXTURE)))
            if held_out:
                return mixture_problem(mixture, self.guidance, self.config.test_noises, seed)
            chosen_with = self.config.held_out
            return mixture_problem(mixture, self.guidance, self.config.noises, seed, held_out=chosen_with)
        from diffalign.calibrate.tables import TablesConfig, problem_of
        from diffalign.models import load_adapter
        from diffalign.playground.captions import draw_captions

        count = self.config.test_samples if held_out else self.config.samples
        settings = TablesConfig(guidance_scale=self.guidance, samples=count, seed=seed)
        return problem_of(load_adapter(self._pipe), draw_captions(seed, count, held_out=held_out), settings)

    def _both(self, *, held_out: bool) -> tuple[Problem, Truth]:
        problem = self._problem(held_out=held_out)
        return problem, solve(problem, self.config.reference_steps)

    @cached_property
    def fit(self) -> tuple[Problem, Truth]:
        """What plans are fitted to."""
        return self._both(held_out=False)

    @cached_property
    def test(self) -> tuple[Problem, Truth]:
        """What they are judged on."""
        return self._both(held_out=True)

    @property
    def mu(self) -> float | None:
        """Shift of a flow model's grid."""
        if self.on_mixture:
            return None
        from diffalign.models import load_adapter
        from diffalign.pipelines.guidance import dynamic_shift

        return dynamic_shift(load_adapter(self._pipe))

    @property
    def iterations(self) -> int:
        """Steps of descent per fit."""
        return self.config.iterations if self.on_mixture else self.config.pipeline_iterations

    def table(self, steps: int) -> Table:
        """The plan that is judged, its ``info`` as of :class:`Calibration`."""
        return calibrated(self, steps).chosen.table if self.family is None else self.family.table(steps)


def mixture_problem(
    mixture: GaussianMixture, guidance: float, count: int, seed: int, *, held_out: int | None = None
) -> Problem:
    """A mixture on Stable Diffusion's noise schedule as something to fit a sampler to."""
    noise, beliefs = coordinates(mixture, [guidance], count, seed)

    def predict(x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, rows: slice) -> Tensor:
        return beliefs(x, alpha, sigma, rows)[0]

    return Problem(
        predict, NoiseSchedule.from_config(SD_SCHEDULER), noise, batch_size=4096, held_out=held_out
    )


# ------------------------------------------------------------------- a cell


@dataclass(frozen=True)
class Cell:
    """What one number of evaluations gave.

    Attributes:
        best_mean, best_p90: the uncalibrated scheduler with the least mean error and 90th percentile.
        mean, p90: their errors, the mean of one and the percentile of the other.
        plan_mean, plan_p90, plan_far: errors of the plan, and the share of noises above 0.3.
        fitted: whether the fit was taken, rather than the best known solver.
        decoupled: whether the network is asked beside the places of the samples.
        tried: number of uncalibrated schedulers that ran.
    """

    problem: str
    guidance: float
    seed: int
    steps: int
    best_mean: str
    mean: float
    best_p90: str
    p90: float
    plan_mean: float
    plan_p90: float
    plan_far: float
    fitted: bool
    decoupled: bool
    tried: int


def measured(case: Case, steps: int) -> Cell:
    """Fit a plan, and judge it and every uncalibrated scheduler on fresh noises."""
    from diffalign.solvers.fitting import FAR

    made = case.table(steps)
    problem, truth = case.test
    plan = judge(problem, truth, made, slice(0, len(problem.noise)))
    kind = case.scheduler.get("prediction_type", "flow_prediction")
    whole, tried = contest(problem, truth.end, dict(uncalibrated(case.scheduler)), steps, kind, case.mu)
    best_mean = min(whole, key=lambda name: float(whole[name].mean()))
    best_p90 = min(whole, key=lambda name: _p90(whole[name]))
    return Cell(
        case.name,
        case.guidance,
        case.seed,
        steps,
        best_mean,
        float(whole[best_mean].mean()),
        best_p90,
        _p90(whole[best_p90]),
        float(plan.mean()),
        _p90(plan),
        float((plan > FAR).mean()),
        bool(made.info["fitted"]),
        made.decoupled,
        tried,
    )


def _p90(errors: np.ndarray) -> float:
    return float(np.quantile(errors, 0.9))


def calibrated(case: Case | Family, steps: int) -> Calibration:
    """The plan, from the noises of the fit; of a family, not decoupled: where another model is best asked
    beside the sample's noise level is its own affair."""
    from diffalign.calibrate.tables import known_solvers
    from diffalign.solvers.selection import calibrate

    config = case.config
    problem, truth = case.fit
    return calibrate(
        problem,
        truth,
        known_solvers(case.scheduler),
        steps,
        fits=config.fits,
        trajectories=config.trajectory,
        iterations=case.iterations,
        recompute=config.recompute,
        mu=case.mu,
        decoupled=isinstance(case, Case),
    )


def uncalibrated(config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and maker of every scheduler to compare with, for a model with this scheduler config."""
    from diffalign.pipelines.load import make_scheduler

    flow = NoiseSchedule.from_config(config).is_flow
    for name, options in OURS:
        end = {} if "set_alpha_to_one" in options else {"final_sigmas_type": "zero"}
        for grid in ("auto",) if flow else GRIDS:
            label = _label(name, options, grid)
            yield label, partial(make_scheduler, name, config, grid=grid, **options, **end)
    for name, options in (("FlowMatchEulerDiscreteScheduler", {}), *THEIRS) if flow else THEIRS:
        for grid, spacing in ({"": {}} if flow else SPACINGS).items():
            chosen = spacing if flow else {"use_karras_sigmas": False} | spacing
            yield _label(name, options, grid), partial(_theirs, name, config, options, chosen)


def _label(name: str, options: Mapping[str, Any], grid: str) -> str:
    shown = [str(v) for k, v in options.items() if k in ("solver_order", "solver_type")]
    return " ".join([name.removesuffix("Scheduler"), *shown, grid]).strip()


def _theirs(name: str, config: Mapping[str, Any], own: Mapping[str, Any], grid: Mapping[str, Any]) -> Any:
    """diffusers' scheduler with the options that it has; UserError where the grid is none of its."""
    import inspect

    from diffalign.pipelines.load import make_scheduler, scheduler_class

    known = inspect.signature(scheduler_class(name).__init__).parameters
    if any(option not in known for option, value in grid.items() if value is not False):
        raise UserError(f"{name} has no such grid")
    options = {k: v for k, v in {**own, **grid}.items() if k in known}
    if "final_sigmas_type" in known:
        options["final_sigmas_type"] = "zero"
    return make_scheduler(name, config, **options)


def contest(
    problem: Problem,
    end: Tensor,
    builders: Mapping[str, Callable[[], Any]],
    steps: int,
    kind: str,
    mu: float | None,
) -> tuple[dict[str, np.ndarray], int]:
    """Errors (B,) on all noises of the schedulers that do best, and how many took part.

    All are tried on a few noises, and those with the least mean error or 90th percentile on more
    (:data:`_ROUNDS`); of schedulers that do the same, one.
    """
    found: dict[str, np.ndarray] = {name: np.empty(0) for name in builders}
    done = tried = 0
    for share, stay in _ROUNDS:
        rows = slice(done, min(max(math.ceil(share * len(problem.noise)), _LEAST), len(problem.noise)))
        part = problem.part(rows)
        for name in list(found) if rows.stop > done else ():
            errors = errors_of(part, end[rows], builders[name], steps, kind, mu)
            if errors is None:
                del found[name]
            else:
                found[name] = np.append(found[name], errors)
        if not done:
            tried = len(found)
            alike: dict[tuple[str, ...], str] = {}
            for name, errors in found.items():
                alike.setdefault(tuple(f"{error:.3g}" for error in errors), name)
            found = {name: found[name] for name in alike.values()}
        best = {
            name
            for measure in (np.mean, _p90)
            for name in sorted(found, key=lambda name, of=measure: float(of(found[name])))[:stay]  # type: ignore[misc]
        }
        found = {name: errors for name, errors in found.items() if name in best}
        done = rows.stop
    return found, tried


def errors_of(
    problem: Problem, end: Tensor, build: Callable[[], Any], steps: int, kind: str, mu: float | None
) -> np.ndarray | None:
    """(B,) relative errors of a scheduler that asks the network no more than `steps` times, or None.

    Methods that ask several times a step get fewer steps. What crashes in diffusers' classes, or does not
    come to a number, takes no part.
    """

    def drawn(network: ModelFn, noise: Tensor, count: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = build()
            ours = type(scheduler).__module__.startswith("diffalign.")
            return sample(network, noise, scheduler, num_inference_steps=count, mu=mu if ours else None)

    def asked(count: int) -> int:
        """Evaluations of so many steps, counted on a network that costs nothing."""
        calls = 0

        def nothing(x: Tensor, t: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        drawn(nothing, problem.noise[:1], count)
        return calls

    try:
        count = next((count for count in range(steps, 0, -1) if asked(count) <= steps), None)
        if count is None:
            return None
        found = drawn(lambda x, t: problem.network(x, t, kind), problem.noise, count)
    except (IndexError, ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError):
        return None
    errors = relative_errors(found.double(), end.double()).cpu().numpy()
    return errors if np.isfinite(errors).all() else None


# ------------------------------------------------------------------- table


def table(cells: Sequence[Mapping[str, Any]], *, family: bool = False) -> list[dict[str, Any]]:
    """A row per problem, guidance scale and number of evaluations: geometric means over the seeds.

    ``ratio`` columns are the plan's error over the best uncalibrated one's, and their worst seed. The goal of
    a family's table is to beat that one at all.
    """
    rows = []
    keys = dict.fromkeys((c["problem"], c["guidance"], c["steps"]) for c in cells)
    for problem, guidance, steps in keys:
        own = [c for c in cells if (c["problem"], c["guidance"], c["steps"]) == (problem, guidance, steps)]

        def mean(name: str, own: Sequence[Mapping[str, Any]] = own) -> float:
            return float(np.exp(np.mean([np.log(max(c[name], 1e-12)) for c in own])))

        ratios = {what: [c[f"plan_{what}"] / c[what] for c in own] for what in ("p90", "mean")}
        goal = {"p90": 0.25, "mean": 0.4} if problem.startswith(MIXTURE) else {"p90": 0.5, "mean": 0.5}
        goal = dict.fromkeys(goal, 1.0) if family else goal
        p90, average = (float(np.exp(np.mean(np.log(ratios[what])))) for what in ("p90", "mean"))
        rows.append(
            {
                "problem": problem,
                "guidance": guidance,
                "steps": steps,
                "best uncalibrated": max(
                    (c["best_p90"] for c in own), key=[c["best_p90"] for c in own].count
                ),
                "p90": mean("p90"),
                "plan p90": mean("plan_p90"),
                "ratio p90": p90,
                "worst p90": max(ratios["p90"]),
                "mean": mean("mean"),
                "plan mean": mean("plan_mean"),
                "ratio mean": average,
                "worst mean": max(ratios["mean"]),
                "far": float(np.mean([c["plan_far"] for c in own])),
                "goal": "met" if p90 <= goal["p90"] and average <= goal["mean"] else "missed",
            }
        )
    return rows
