"""``diffalign bench grids``: the evidence for ``grid="auto"``, against every grid of diffusers.

The problems are Gaussian mixtures that the default grid was not fitted to, under guidance, on the noise
schedules of several models; or a pipeline. Two yardsticks: diffusers' own DPMSolverMultistepScheduler on its
grids, which is what a user would have, and our solver on the same grids, where the grid is the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.bench.samplers import relative_errors
from diffalign.errors import UserError
from diffalign.solvers import DPMSolverPPScheduler, GaussianMixture, sample
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import training_target
from diffalign.solvers.sampling import ModelFn

AUTO, THEIRS, SAME = "auto", "diffusers", "same solver"
#: A share of points counts as missed where the error is above this many times that of the best grid.
MISS = 1.1
# What an error counts at most: a diverged run is a miss, however far away it ends.
_DIVERGED = 1e3

SCHEDULES: dict[str, dict[str, Any]] = {
    "sd": {k: SD_SCHEDULER[k] for k in ("beta_schedule", "beta_start", "beta_end")},
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {
        **{k: SD_SCHEDULER[k] for k in ("beta_schedule", "beta_start", "beta_end")},
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}
#: Arguments of :meth:`GaussianMixture.random`; none of these was used to fit the tables of ``grids.py``.
MIXTURES: dict[str, dict[str, Any]] = {
    "6 apart": {"shape": (4, 8, 8), "components": 6, "classes": 3, "spread": 1.0, "seed": 11},
    "10 near": {"shape": (4, 8, 8), "components": 10, "classes": 5, "spread": 0.4, "seed": 12},
    "16 nearer": {"shape": (4, 16, 16), "components": 16, "classes": 4, "spread": 0.2, "seed": 13},
    "6 apart, small": {"shape": (3, 8, 8), "components": 6, "classes": 2, "spread": 1.0, "seed": 14},
    "6 between": {"shape": (4, 16, 16), "components": 6, "classes": 3, "spread": 0.6, "seed": 15},
}
SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@dataclass(frozen=True)
class GridsConfig:
    """Measure the default grid against every grid of diffusers, at second and third order.

    On Gaussian mixtures, whose exact solution is known, or on a pipeline against its converged solution.
    Writes grids.json, grids.md and grids.svg.

    Attributes:
        model: mixtures, a pipeline folder, a hub id, or a shipped model such as playground/sd
        output_dir: folder to write to
        orders: of DPM-Solver++
        steps: numbers of inference steps
        guidance: classifier-free guidance scales
        schedules: noise schedules of the mixtures, of sd, ddpm, cosine, zero snr, flow
        mixtures: how many of the five mixtures
        prompts: what a pipeline draws; the playground brings its own
        prompt_file: text file with one prompt a line
        samples: noises of each mixture and guidance scale, or prompts of the playground
        seed: of the noises
        reference_steps: steps of a pipeline's converged solution
        batch_size: images drawn at once
        device: of a pipeline; auto, cpu, cuda, cuda:1, mps
        overwrite: write into a folder that is not empty
    """

    model: str = "mixtures"
    output_dir: str = "outputs/bench/grids"
    orders: list[int] = field(default_factory=lambda: [2, 3])
    steps: list[int] = field(default_factory=lambda: [4, 5, 6, 8, 10, 12, 15, 20, 30, 50])
    guidance: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 7.5, 12.0])
    schedules: list[str] = field(default_factory=lambda: list(SCHEDULES))
    mixtures: int = len(MIXTURES)
    prompts: list[str] | None = None
    prompt_file: str | None = None
    samples: int = 32
    seed: int = 0
    reference_steps: int = 200
    batch_size: int = 8
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        from diffalign.solvers.options import check_choice

        for name in ("orders", "steps", "guidance", "schedules"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give at least one")
        if not set(self.orders) <= {1, 2, 3}:
            raise UserError(f"--orders may be 1, 2 and 3, not {self.orders}")
        for name in self.schedules:
            check_choice("--schedules", name, tuple(SCHEDULES))
        if not 1 <= self.mixtures <= len(MIXTURES):
            raise UserError(f"--mixtures must lie between 1 and {len(MIXTURES)}, but is {self.mixtures}")
        if min(self.steps) < 1 or self.samples < 2 or self.batch_size < 1:
            raise UserError("--steps and --batch_size must be at least 1, and --samples 2")


@dataclass(frozen=True)
class Point:
    """One problem at one order, number of steps and guidance scale.

    Attributes:
        errors: solver and grid, as in ``"diffusers karras/zero"``, to the mean of ||z - z*|| / ||z*|| over
            the noises; a run that diffusers' class refuses or crashes on is left out.
        spread: the standard error of that mean for the default grid.
    """

    problem: str
    order: int
    steps: int
    guidance: float
    errors: dict[str, float]
    spread: float

    def ratio(self, kind: str = THEIRS) -> float:
        """Error of the default grid over that of the best of `kind`, chosen in hindsight."""
        return self.errors[AUTO] / min(v for name, v in self.errors.items() if name.startswith(kind))


def run(config: GridsConfig) -> list[Point]:
    """Measure, write the report, print the table; returns the points."""
    from dataclasses import asdict

    from diffalign.bench.record import store
    from diffalign.output import prepare, write_text

    out = prepare(config.output_dir, overwrite=config.overwrite)
    points = list(on_mixtures(config) if config.model == "mixtures" else on_pipeline(config))
    print(store(out, "grids", config, [asdict(point) for point in points], table=summary(points)))
    write_text(out / "grids.svg", svg(plot(points)))
    print(f"\nfigure: {out / 'grids.svg'}")
    return points


def schedulers(config: Mapping[str, Any], order: int) -> dict[str, Any]:
    """The default grid, and all of diffusers' for a model with the given config, with both solvers."""
    from diffusers import DPMSolverMultistepScheduler

    flow = NoiseSchedule.from_config(config).is_flow
    spacings: dict[str, dict[str, Any]] = {"flow": {}} if flow else SPACINGS
    found: dict[str, Any] = {AUTO: DPMSolverPPScheduler.from_config(config, solver_order=order)}
    for name, options in spacings.items():
        for final in ("zero", "sigma_min"):
            chosen = {"solver_order": order, "final_sigmas_type": final, **options}
            label = f"{name}/{final}"
            theirs = {**config, **chosen, "algorithm_type": "dpmsolver++"}
            found[f"{THEIRS} {label}"] = DPMSolverMultistepScheduler.from_config(theirs)
            ours = DPMSolverPPScheduler.from_config(config, grid="diffusers", **chosen)
            found[f"{SAME} {label}"] = ours
    return found


# ------------------------------------------------------- mixtures


def on_mixtures(config: GridsConfig) -> Iterator[Point]:
    """Every schedule, mixture, order and number of steps; all guidance scales are one batch."""
    from tqdm.auto import tqdm

    names = list(MIXTURES)[: config.mixtures]
    bar = tqdm(total=len(config.schedules) * len(names) * len(config.orders) * len(config.steps), leave=False)
    with bar, torch.no_grad():
        for schedule_name in config.schedules:
            options = SCHEDULES[schedule_name]
            schedule = NoiseSchedule.from_config(options)
            kind = options.get("prediction_type", "epsilon")
            for name in names:
                bar.set_description(f"{schedule_name}, {name}")
                mixture = GaussianMixture.random(**MIXTURES[name])
                noise, network = reduced(
                    mixture, schedule, kind, config.guidance, config.samples, config.seed
                )
                exact = _exact(network, noise, schedule, options)
                for order in config.orders:
                    candidates = schedulers(options, order)
                    for n in config.steps:
                        errors = {
                            k: found.reshape(len(config.guidance), -1)
                            for k, s in candidates.items()
                            if (found := _errors(network, noise, s, n, exact)) is not None
                        }
                        yield from _points(f"{schedule_name}, {name}", order, n, config.guidance, errors)
                        bar.update()


def _points(
    problem: str, order: int, steps: int, guidance: Sequence[float], errors: Mapping[str, Tensor]
) -> Iterator[Point]:
    """One point per guidance scale from (scales, noises) errors."""
    for i, scale in enumerate(guidance):
        own = errors[AUTO][i]
        spread = float(own.std() / len(own) ** 0.5)
        means = {name: float(f"{float(e[i].mean()):.4g}") for name, e in errors.items()}
        yield Point(problem, order, steps, scale, means, spread)


def _errors(network: ModelFn, noise: Tensor, scheduler: Any, steps: int, exact: Tensor) -> Tensor | None:
    """(B,) relative errors, or None where diffusers' class does not run."""
    try:
        found = sample(network, noise, scheduler, num_inference_steps=steps)
    except (IndexError, ValueError, RuntimeError, AssertionError):
        if isinstance(scheduler, DPMSolverPPScheduler):
            raise
        return None
    return relative_errors(found.double(), exact).nan_to_num(_DIVERGED, _DIVERGED).clamp(max=_DIVERGED)


def _exact(network: ModelFn, noise: Tensor, schedule: NoiseSchedule, options: Mapping[str, Any]) -> Tensor:
    """The solution, by 400 steps of third order that end far nearer to the clean image than training does."""
    first = max(float(schedule.lambda_(schedule.t_max)), -9.0)
    times = np.atleast_1d(schedule.t_of_lambda(np.linspace(first, 7.0, 400)))
    times[0] = schedule.t_max
    solver = DPMSolverPPScheduler.from_config(options, solver_order=3, lower_order_final=False)
    return sample(network, noise, solver, timesteps=times.tolist())


def reduced(
    mixture: GaussianMixture,
    schedule: NoiseSchedule,
    prediction_type: str,
    guidance: Sequence[float],
    samples: int,
    seed: int,
) -> tuple[Tensor, ModelFn]:
    """A row per guidance scale and noise of :func:`coordinates`, and the ideal network on them.

    Returns:
        Noise (scales * samples, 1, K + 1), and the network, guided per row.
    """
    noise, beliefs = coordinates(mixture, guidance, samples, seed)

    def network(x: Tensor, t: Any) -> Tensor:
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(float(t)))
        data, epsilon = beliefs(x[:, 0].double(), alpha, sigma, slice(None))
        return training_target(prediction_type, data, epsilon, alpha, sigma).to(x.dtype)[:, None]

    return noise[:, None], network


#: ``(x, alpha, sigma, rows) -> E[x0 | x], E[eps | x]`` of x (rows, K + 1).
Beliefs = Callable[[Tensor, Any, Any, slice], tuple[Tensor, Tensor]]


def coordinates(
    mixture: GaussianMixture, guidance: Sequence[float], samples: int, seed: int
) -> tuple[Tensor, Beliefs]:
    """The mixture in the coordinates that matter, a row per guidance scale and noise.

    Every sample stays in the span of the means and of its own noise outside that span, and solvers are
    linear: so K numbers along the means and one across are the whole problem, exactly.

    Returns:
        Noise (scales * samples, K + 1), and what the ideal network believes, guided per row; alpha and sigma
        are numbers or 0-d tensors, and it is differentiable in these and in x.
    """
    means = torch.from_numpy(mixture.means)
    basis, triangle = torch.linalg.qr(means.T)
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(samples, means.shape[1], dtype=torch.float64, generator=generator)
    along = whole @ basis
    across = (whole - along @ basis.T).norm(dim=1, keepdim=True)
    noise = torch.cat([along, across], 1).repeat(len(guidance), 1)
    centres = torch.cat([triangle.T, torch.zeros(len(means), 1, dtype=torch.float64)], 1)
    labels = torch.from_numpy(np.asarray(mixture.labels))
    targets = labels.unique()[torch.arange(samples) % len(labels.unique())].repeat(len(guidance))
    scale = torch.tensor(guidance, dtype=torch.float64).repeat_interleave(samples)[:, None]
    variances, log_weights = torch.from_numpy(mixture.stds).square(), torch.from_numpy(mixture.weights).log()
    outside = torch.zeros(len(targets), len(labels), dtype=torch.float64)
    outside[labels[None] != targets[:, None]] = -torch.inf

    def beliefs(y: Tensor, alpha: Any, sigma: Any, rows: slice) -> tuple[Tensor, Tensor]:
        variance = alpha**2 * variances + sigma**2
        distance = (y[:, None] - alpha * centres).square().sum(-1)
        logits = log_weights - 0.5 * means.shape[1] * variance.log() - distance / (2 * variance)
        free = logits.softmax(1)
        # Guidance of predictions is guidance of what they are linear in.
        share = (free + scale[rows] * ((logits + outside[rows]).softmax(1) - free)) / variance
        pull, weight = share @ centres, share.sum(1, keepdim=True)
        data = sigma**2 * pull + alpha * (share @ variances)[:, None] * y
        epsilon = sigma * (weight * y - alpha * pull)
        return data, epsilon

    return noise, beliefs


# ------------------------------------------------------- a pipeline


def on_pipeline(config: GridsConfig) -> Iterator[Point]:
    """The same points on a pipeline, against its converged solution."""
    from diffalign.bench.samplers import compare_samplers
    from diffalign.calibrate.prompts import calibration_prompts
    from diffalign.pipelines.load import load_pipeline

    prompts = calibration_prompts(
        config.model, config.prompts, config.prompt_file, samples=config.samples, seed=config.seed
    )
    pipe = load_pipeline(config.model, device=config.device)
    seeds = range(config.seed, config.seed + len(prompts))
    for order in config.orders:
        for scale in config.guidance:
            rows = compare_samplers(
                pipe,
                schedulers(pipe.scheduler.config, order),
                config.steps,
                prompts,
                seeds=seeds,
                guidance=scale,
                reference_steps=config.reference_steps,
                batch_size=config.batch_size,
            ).rows
            for n in config.steps:
                here = {row.sampler: row for row in rows if row.steps == n}
                errors = {name: row.error for name, row in here.items()}
                yield Point(config.model, order, n, scale, errors, here[AUTO].error_se)


# ------------------------------------------------------- what is shown


def summary(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row per order and number of steps: how often and how far the default grid is behind the best."""
    rows = []
    for order, steps in sorted({(p.order, p.steps) for p in points}):
        chosen = [p for p in points if (p.order, p.steps) == (order, steps)]
        theirs, same = (np.array([p.ratio(kind) for p in chosen]) for kind in (THEIRS, SAME))
        default = [
            p.errors[name] / p.errors[AUTO]
            for p in chosen
            for name in (f"{THEIRS} linspace/zero", f"{THEIRS} flow/zero")
            if name in p.errors
        ]
        rows.append(
            {
                "order": order,
                "steps": steps,
                "points": len(chosen),
                f"above {MISS}": f"{100 * np.mean(theirs > MISS):.0f} %",
                "geometric mean": f"{_geometric(theirs):.2f}",
                "worst": f"{theirs.max():.1f}",
                f"same solver: above {MISS}": f"{100 * np.mean(same > MISS):.0f} %",
                "same solver: geometric mean": f"{_geometric(same):.2f}",
                "better than diffusers' default, median": f"{np.median(default):.1f}",
            }
        )
    return rows


def _geometric(values: Any) -> float:
    return float(np.exp(np.log(np.maximum(values, 1e-12)).mean()))


def svg(figure: Any) -> str:
    """A figure as SVG whose text stays text, and which is closed."""
    import io

    import matplotlib
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def plot(points: Sequence[Point]) -> Any:
    """Per order: the error of every grid against the steps, and below it the ratio to the best of diffusers'.

    Errors are geometric means over the problems and guidance scales that have all grids; the band of the
    ratio holds the middle 80 %.
    """
    from matplotlib.ticker import NullLocator

    from diffalign.bench.plots import nfe_axis
    from diffalign.report import PALETTE, new_figure

    orders = sorted({p.order for p in points})
    columns = {order: [p for p in points if p.order == order] for order in orders}
    figure, axes = new_figure(4.2 * len(orders), 5.2, columns=len(orders), rows=2)
    axes = np.reshape(axes, (2, len(orders)))
    for column, order in enumerate(orders):
        mine = columns[order]
        steps = sorted({p.steps for p in mine})
        upper, lower = axes[0][column], axes[1][column]
        most = max(len(p.errors) for p in mine)
        full = [p for p in mine if len(p.errors) == most]
        names = [n for n in full[0].errors if n.startswith(THEIRS) and n.endswith("/zero")]
        for k, name in enumerate([*names, AUTO]):
            own = name == AUTO
            style = (
                {"color": PALETTE["ours"], "linewidth": 2.4} if own else {"linewidth": 1.0, "color": f"C{k}"}
            )
            shown = [n for n in steps if any(p.steps == n for p in full)]
            error = [_geometric([p.errors[name] for p in full if p.steps == n]) for n in shown]
            label = name if own else name.removeprefix(f"{THEIRS} ").removesuffix("/zero")
            upper.plot(shown, error, label=label, **style)
        upper.set_title(f"order {order}", fontsize=10)
        upper.set_ylabel("relative error")
        for kind, colour in ((THEIRS, PALETTE["ours"]), (SAME, PALETTE["muted"])):
            ratios = [np.array([p.ratio(kind) for p in mine if p.steps == n]) for n in steps]
            lower.plot(steps, [_geometric(r) for r in ratios], color=colour, label=f"best of {kind}")
            if kind == THEIRS:
                low, high = np.transpose([np.quantile(r, (0.1, 0.9)) for r in ratios])
                lower.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        lower.axhline(1.0, color=PALETTE["bad"], linewidth=1, linestyle=":")
        lower.set_ylabel("error of auto / best grid's")
        lower.set_xlabel("network evaluations")
        for ax in (upper, lower):
            nfe_axis(ax, steps)
            ax.set_yscale("log")
            ax.tick_params(labelsize=8)
        lower.set_yticks([0.125, 0.25, 0.5, 1, 2, 4], ["1/8", "1/4", "1/2", "1", "2", "4"])
        lower.yaxis.set_minor_locator(NullLocator())
    for ax in axes[:, -1]:
        ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
