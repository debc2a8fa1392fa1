"""A solver fitted to one model: times and weights of every step from a table.

In data prediction every linear multistep method, correctors included, is a table of times and weights::

    x_{k+1} = (sigma_{k+1} / sigma_k) x_k + alpha_{k+1} (1 - e^{-h_k}) sum_{j<=k} w_kj m_j,    sum_j w_kj = 1

with ``m_j`` the network's belief of the clean image at evaluation j and ``h_k`` the step in half log-SNR; a
step to the clean image is ``sum_j w_kj m_j`` alone. Rows that sum to 1 make a table exact for a constant
belief, hence consistent to first order, whatever else is in it. :mod:`diffalign.solvers.selection` finds
tables, ``diffalign calibrate plan`` writes them for a pipeline, and the scheduler here runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from diffusers.utils import logging
from numpy.typing import NDArray

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice, scheduler_options
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin
from diffalign.solvers.statistics import Sidecar

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["CalibratedScheduler", "SchedulerMixin", "Table", "Tables", "trace"]

_ROUNDING = 1e-9  # by which a row may miss a sum of 1
_REACH = 2.5  # guidance scales that differ by more are another problem
logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Table:
    """One sampler of n evaluations.

    Args:
        times: (n,) float64, falling: the noise levels of the samples.
        weights: (n, n) float64, lower triangular, rows sum to 1.
        info: how it came about, JSON: ``guidance_scale``, ``start``, errors before and after, ...
        told: (n,) float64, falling: the times that the network is told, if others than those of the samples;
            its output is read as at these.

    Raises:
        UserError: it is no such table.
    """

    times: NDArray[np.float64]
    weights: NDArray[np.float64]
    info: Mapping[str, Any] = field(default_factory=dict)
    told: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if np.size(self.told) == 0:
            object.__setattr__(self, "told", self.times)
        for name in ("times", "weights", "told"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
        n = len(self.times)
        if self.times.shape != (n,) or n == 0 or self.weights.shape != (n, n) or self.told.shape != (n,):
            raise UserError(f"a table needs n times and n x n weights, but has {n} and {self.weights.shape}")
        if not all(np.all(np.isfinite(values)) for values in (self.times, self.weights, self.told)):
            raise UserError("a table holds numbers that are not finite: calibrate anew")
        if np.any(np.diff([self.times, self.told]) >= 0) or np.any(np.triu(self.weights, 1)):
            raise UserError("the times of a table must fall, and no row may read later evaluations")
        if np.any(np.abs(self.weights.sum(1) - 1) > _ROUNDING):
            raise UserError("each row of a table's weights must sum to 1")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def decoupled(self) -> bool:
        """Whether the network is told other times than those of the samples."""
        return not np.array_equal(self.told, self.times)


@dataclass(frozen=True, eq=False)
class Tables(Sidecar):
    """The tables of a model, one for each number of steps.

    Args:
        tables: number of steps -> table.
        schedule: fingerprint of the noise schedule that they were fitted on.
        final: where they end, the clean image (``zero``) or the first training step (``sigma_min``).
        info: how they came about, JSON; ``guidance_scale`` and ``prediction_type`` of the model, if known.
    """

    tables: Mapping[int, Table]
    schedule: str
    final: str = "zero"
    info: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "tables"

    def __post_init__(self) -> None:
        check_choice("final", self.final, ("zero", "sigma_min"))
        if not self.tables or any(n != len(table) for n, table in self.tables.items()):
            raise UserError("tables must be given by their number of steps, at least one of them")

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """UserError unless they were fitted on `schedule`."""
        if self.schedule != schedule.fingerprint():
            raise UserError(
                "these tables were fitted on another noise schedule, so to another model: calibrate this one "
                "with 'diffalign calibrate plan', or take dpm-solver++"
            )

    def check_prediction(self, prediction_type: str) -> None:
        """UserError if they were fitted to a network that predicts something else."""
        known = self.info.get("prediction_type", prediction_type)
        if known != prediction_type:
            raise UserError(
                f"these tables were fitted to a model that predicts {known}, not {prediction_type}, so to "
                "another one: calibrate this one with 'diffalign calibrate plan', or take dpm-solver++"
            )

    def of(self, count: int) -> Table:
        """The table of `count` steps; UserError, with the nearest, if there is none."""
        if count not in self.tables:
            known = sorted(self.tables)
            nearest = min(known, key=lambda n: (abs(n - count), n))
            raise UserError(
                f"there is no table of {count} steps: this scheduler has {', '.join(map(str, known))}, the "
                f"nearest is {nearest}; or calibrate for {count}"
            )
        return self.tables[count]

    def arrays(self) -> dict[str, Array]:
        return {
            f"{name}_{n}": getattr(table, name)
            for n, table in sorted(self.tables.items())
            for name in ("times", "weights", *(("told",) if table.decoupled else ()))
        }

    def metadata(self) -> dict[str, Any]:
        infos = {str(n): dict(table.info) for n, table in sorted(self.tables.items())}
        return {"schedule": self.schedule, "final": self.final, "info": dict(self.info), "tables": infos}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array], metadata: dict[str, Any]) -> Tables:
        tables = {
            int(n): Table(
                arrays[f"times_{n}"],
                arrays[f"weights_{n}"],
                info,
                arrays.get(f"told_{n}", arrays[f"times_{n}"]),
            )
            for n, info in metadata["tables"].items()
        }
        return cls(tables, metadata["schedule"], metadata["final"], metadata["info"])


class CalibratedScheduler(PlanScheduler):
    """Runs the table that was fitted to the model for the number of steps asked for.

    It serves the model, guidance scale and numbers of steps that it was calibrated for. Other models and
    numbers are refused as far as their noise schedule or what they predict tells them apart; the guidance,
    which a scheduler does not know, is in ``tables.info``, and :meth:`check_guidance` warns. From any
    pipeline::

        diffalign calibrate plan --model my-pipeline --num_inference_steps 5 8 --guidance_scale 5

    Args:
        tables: a :class:`Tables`.

    The other options are diffusers'; ``grid`` has no effect, as the tables bring their times.
    """

    _sidecars: ClassVar[dict[str, type[Sidecar]]] = {"tables": Tables}

    @scheduler_options
    def __init__(self, tables: Any = None, **shared: Any) -> None:
        if isinstance(tables, Tables):
            tables = tables.record()
        if tables is not None and not (isinstance(tables, Mapping) and "sha256" in tables):
            raise UserError(
                f"tables must be a Tables object or None, not {type(tables).__name__}; Tables.load(file) "
                "reads one"
            )
        self.register_to_config(tables=tables)

    def _setup(self) -> None:
        super()._setup()
        if self.tables is not None:
            self.tables.check_schedule(self.schedule)
            self.tables.check_prediction(self.config.prediction_type)
        self._warned = False

    def check_guidance(self, scale: float) -> None:
        """Warn, once, if the tables were fitted at a guidance scale that is more than 2.5 away."""
        own = self._known().info.get("guidance_scale")
        if own is not None and abs(scale - own) > _REACH and not self._warned:
            self._warned = True
            logger.warning(
                "these tables were fitted at guidance %g and may be poor at %g: calibrate for that, or take "
                "dpm-solver++",
                own,
                scale,
            )

    @property
    def tables(self) -> Tables | None:
        """The tables in use."""
        return getattr(self.config.tables, "content", None)

    def _known(self) -> Tables:
        if self.tables is not None:
            return self.tables
        if self.config.tables is not None:
            raise UserError(
                "this config was saved with tables that are not here; load the scheduler with "
                "from_pretrained from its folder, or pass tables=..."
            )
        raise UserError("this scheduler has no tables: fit some with 'diffalign calibrate plan'")

    def _final(self) -> str:
        return self._known().final

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As :meth:`PlanScheduler.set_timesteps`; only numbers of steps that there are tables for.

        Raises:
            UserError: no such table, custom times, or a shift of the grid.
        """
        if timesteps is not None or sigmas is not None:
            raise UserError("a calibrated sampler brings its own times: pass num_inference_steps")
        if mu is not None and self.config.use_dynamic_shifting:
            raise UserError("a calibrated sampler cannot shift its times with the size of the image")
        super().set_timesteps(num_inference_steps, device)

    def _grid_times(self, count: int, shift: float | None) -> Array:
        end = self.schedule.t_clean if self._final() == "zero" else self.schedule.t_min
        return np.append(self._known().of(count).times, end)

    def _told(self, times: Array) -> Array:
        return self._known().of(len(times) - 1).told

    def _plan(self, times: Array) -> Plan:
        assert self.num_inference_steps is not None
        first = self.num_inference_steps + 1 - len(times)
        table = self._known().of(self.num_inference_steps)
        weights = started_late(table.weights, first)
        return Plan(rows_of(self.schedule, times, weights, self._conversion, told=table.told[first:]))


def started_late(weights: Array, first: int) -> Array:
    """The rows from evaluation `first` on, with what they give to earlier ones given to their own."""
    later = weights[first:, first:].copy()
    later[np.diag_indices(len(later))] += weights[first:, :first].sum(1)
    return later


def rows_of(
    schedule: NoiseSchedule, times: Array, weights: Array, conversion: Any, told: Array | None = None
) -> tuple[Row, ...]:
    """A table as rows of a plan; `times` has the end as well."""
    scale_x, scale_m = step_scales(schedule, times)
    asked = times if told is None else told
    return tuple(
        Row(
            time=float(asked[k]),
            convert=conversion(asked[k]),
            x={k: float(scale_x[k])} if scale_x[k] else {},
            m={j: float(scale_m[k] * w) for j, w in enumerate(weights[k, : k + 1]) if w},
        )
        for k in range(len(weights))
    )


def step_scales(schedule: NoiseSchedule, times: Array) -> tuple[Array, Array]:
    """``sigma' / sigma`` and ``alpha' (1 - e^{-h})`` of each step through `times`."""
    alpha, sigma = schedule.alpha_sigma(times)
    ratio = sigma[1:] / sigma[:-1]
    # 1 - e^{-h} without lambda, which is infinite at the clean end
    return ratio, alpha[1:] - ratio * alpha[:-1]


def trace(
    scheduler: PlanScheduler,
    count: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> tuple[Array, Array]:
    """Times (n + 1,) and weights (n, n) of the table that a scheduler amounts to.

    Its rows are run on unit vectors: what a step in noise form, a corrector or a stage does to the sample is
    a combination of the data predictions so far. Methods in noise form read all of these.

    Args:
        count: of evaluations on the scheduler's own grid.
        timesteps: custom times in place of it.
        mu: shift of a flow model's grid, as in ``set_timesteps``.

    Raises:
        UserError: its steps are of another form (stochastic, per coordinate, times that do not fall).
    """
    scheduler.set_timesteps(count, timesteps=timesteps, mu=mu)
    plan, name = scheduler.plan, type(scheduler).__name__
    assert scheduler._times is not None
    times = np.append(plan.times, scheduler._times[-1])
    n = len(plan.rows)
    numbers = [c for row in plan.rows for c in (*row.convert, *row.x.values(), *row.m.values())]
    plain = all(np.ndim(c) == 0 for c in numbers) and not any(
        row.z or row.bias is not None for row in plan.rows
    )
    plain = plain and np.allclose(plan.times, scheduler._times[:-1])
    if not plain or np.any(np.diff(times) >= 0):
        raise UserError(f"{name} is no linear multistep method: its steps are no rows of numbers")
    ratio, scale_m = step_scales(scheduler.schedule, times)
    # Entry 0 of a vector is the first sample's part, entry j + 1 that of data prediction j.
    samples, kept = [np.eye(n + 1)[0]], []
    weights = np.zeros((n, n))
    for k, row in enumerate(plan.rows):
        to_data = scheduler._conversion(row.time, "sample")
        part = row.convert[1] / to_data[1]
        rest = row.convert[0] - part * to_data[0]
        kept.append(part * np.eye(n + 1)[k + 1] + rest * samples[k])
        over = row.x.get(k, 0.0) - ratio[k]
        step = sum((c * samples[j] for j, c in row.x.items() if j != k), np.zeros(n + 1))
        step = step + sum(c * kept[j] for j, c in row.m.items())
        # A difference that is rounding would spread old predictions over all later rows.
        step = step + (over if abs(over) > 1e-13 else 0.0) * samples[k]
        samples.append(ratio[k] * samples[k] + step)
        weights[k] = step[1:] / scale_m[k]
        if abs(step[0]) > 1e-6 or abs(weights[k].sum() - 1) > 1e-6:
            raise UserError(f"{name} is no linear multistep method: it is not exact for constant predictions")
    return times, weights / weights.sum(1, keepdims=True)
