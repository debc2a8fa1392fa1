"""Time-shift sampling (Li et al. 2024): the network is told the noise level that the sample seems to have.

For diffusers' own schedulers: :mod:`diffalign.solvers.shifted`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.options import check_choice, check_number, scheduler_options
from diffalign.solvers.plan import Instruction, Plan, compile_plan, working_dtype
from diffalign.solvers.pndm import PNDMScheduler, published_steps
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["SchedulerMixin", "TimeShiftScheduler", "data_variance"]

logger = logging.get_logger(__name__)

MODES = ("corrected", "published", "released")
# Data whose variance is this near to 1 have the same variance at every noise level of a VP schedule.
_NO_INFORMATION = 0.3


class TimeShiftScheduler(PlanScheduler):
    """Any solver here, with the network's time matched to the variance that the sample really has.

    After a step to time t above `cutoff`, the variance of the sample over its coordinates is compared with
    ``alpha^2 v0 + sigma^2`` at the times within ``window / 2`` of t (v0: the variance of clean data); the
    nearest is the time of the next evaluation. One-step solvers (``ddim``) also take their next update from
    there, to the nominal target; the others keep their coefficients, whose spacing in log-SNR would be lost.

    Expect little. On the analytic problem (3072 coordinates, 20 steps of DDIM, outputs 2 % too large) a
    window of 20 took 11 % (published) and 14 % (corrected) off the error; it harms an exact network, and wide
    windows can end in another image. Latents of unit variance have the same variance at all times, so nothing
    can be read from it: with ``|1 - v0| < 0.3``, or v0 unknown, sampling is unshifted, and a warning says so.

    Pipelines hand one time to the network for the whole batch, so by default the variances of the batch are
    averaged (which also makes the estimate less noisy) and the time is written into ``timesteps``, on the
    device and in place, where the pipeline's loop reads it: no step makes the host wait. With
    ``pool="sample"`` each image has its own, in :attr:`next_timesteps`, for loops that hand over (B,) times.

    Args:
        solver: name of the solver in ``SOLVERS``.
        solver_options: options of its own (those that all solvers share belong to this class).
        window: width of the search, in training steps; 0 for none.
        cutoff: time below which nothing is shifted.
        mode: ``corrected``, as above; ``published``, v0 taken as 0; ``released``, what the published code
            does with ddim and pndm: the variance *before* an update chooses the *target* of that update, from
            the second step on, the network's times stay, and the grid starts one stride late.
        data_variance: v0; :func:`data_variance` measures it.
        pool: ``batch`` or ``sample``.

    The other options are diffusers'.
    """

    @scheduler_options
    def __init__(
        self,
        solver: str = "ddim",
        solver_options: dict[str, Any] | None = None,
        window: int = 20,
        cutoff: float = 300.0,
        mode: str = "corrected",
        data_variance: float | None = None,
        pool: str = "batch",
        timestep_spacing: str = "leading",
        **shared: Any,
    ) -> None:
        check_choice("solver", solver, [name for name in SOLVERS if name != "time-shift"])
        check_choice("mode", mode, MODES)
        check_choice("pool", pool, ("batch", "sample"))
        if check_number("window", window) < 0:
            raise UserError(f"window must be 0 or more training steps, but is {window}")
        check_number("cutoff", cutoff)
        if data_variance is not None and not data_variance > 0:
            raise UserError(f"data_variance must be above 0, but is {data_variance}")
        if mode == "released" and solver not in ("ddim", "pndm"):
            raise UserError(f"mode='released' is for the solvers ddim and pndm, not {solver!r}")
        known = _own_options(solver)
        for name in solver_options or {}:
            check_choice(f"option of solver {solver!r}", name, known)
        for name in SOLVERS[solver]._sidecars:  # type: ignore[attr-defined]
            if (solver_options or {}).get(name) is not None:
                raise UserError(
                    f"time-shift has no place for the {name} of {solver}; pass "
                    f"solver_options={{{name!r}: None}}, or use {solver} itself"
                )

    def _setup(self) -> None:
        super()._setup()
        if self.schedule.kind == "edm":
            raise UserError("time shift counts in training steps, which an EDM model does not have")
        config = self.config
        cls = SOLVERS[config.solver]
        shared = set(inspect.signature(cls).parameters) & set(config)
        options = {name: config[name] for name in shared} | dict(config.solver_options or {})
        if config.mode == "released" and config.solver == "pndm":
            cls = _WholeLevels
        self.base: PlanScheduler = cls(**options)
        unneeded = config.data_variance is None and config.mode != "corrected"
        self._shifting = config.window > 0 and (unneeded or tells_time(self.schedule, config.data_variance))
        self._choices: dict[int, _Choice] = {}
        self._shifted: dict[int, Tensor] = {}

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As :meth:`PlanScheduler.from_config`; another scheduler's own options go to the solver."""
        if isinstance(config, Mapping) and "solver" not in config:
            solver = kwargs.get("solver", "ddim")
            theirs = SOLVERS[solver].from_config(config).config  # type: ignore[attr-defined]
            own = {name: theirs[name] for name in _own_options(solver)}
            kwargs["solver_options"] = own | dict(kwargs.get("solver_options") or {})
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # ------------------------------------------------------------ the solver's part

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As :meth:`PlanScheduler.set_timesteps`. ``timesteps`` then changes as the run goes on."""
        if self._shifting and timesteps is not None and sigmas is not None:
            raise UserError("time shift chooses what the network is told; pass timesteps or sigmas, not both")
        self.base.set_timesteps(num_inference_steps, device, timesteps=timesteps, sigmas=sigmas, mu=mu)
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps, sigmas=sigmas, mu=mu)

    def _final(self) -> str:
        return self.base._final()

    def _grid_times(self, count: int, shift: float | None) -> Array:
        times = self.base._grid_times(count, shift)
        if self.config.mode != "released":
            return times
        total = self.schedule.num_train_timesteps
        return np.append(1.0 + published_steps(len(times), total, limit=total)[1:], self.schedule.t_min)

    def _step_starts_among(self, asked: Array) -> Array:
        return self.base._step_starts_among(asked)

    def _evaluations(self, times: Array) -> Array:
        return self.base._evaluations(times)

    def _plan(self, times: Array) -> Plan:
        self.base._times, self.base._origin = self._times, self._origin
        return self.base._plan(times)

    def _transforms(self) -> bool:
        return self.base._transforms()

    def _transform(self, m: Tensor, sample: Tensor) -> Tensor:
        self.base._step_index = self._step_index
        return self.base._transform(m, sample)

    # ------------------------------------------------------------ the shift

    @property
    def next_timesteps(self) -> Tensor:
        """Time of the next evaluation: (1,), or (B,) with ``pool="sample"`` where it is shifted."""
        index = self._step_index or self._begin_index or 0
        return self._shifted.get(index, self.timesteps[index : index + 1])

    def _start_at(self, index: int) -> None:
        super()._start_at(index)
        self._shifted = {}
        # The loop holds this tensor, so an earlier run's shifts are undone in place.
        nominal = torch.tensor(self._host_times, dtype=self.timesteps.dtype)
        if self._shifting:
            self.timesteps.copy_(nominal, non_blocking=True)
            make = self._targets if self.config.mode == "released" else self._sources
            self._choices = {e: c for e in self._step_starts() if (c := make(e)) is not None}

    def _step_starts(self) -> list[int]:
        """Evaluations after the first at which no step is under way, or all where stages are shifted too."""
        rows = self._planned.rows
        if self.config.mode != "released":
            return [self._origin + e for e in range(1, len(rows))]
        return [self._origin + e for e in range(1, len(rows)) if min(rows[e].x) == e]

    def _levels_at(self, times: Array) -> Array:
        v0 = self.config.data_variance if self.config.mode == "corrected" else 0.0
        return variance_at(self.schedule, times, v0)

    def _sources(self, e: int) -> _Choice | None:
        """Times at which evaluation `e` may be done, and for one-step solvers the updates from them."""
        assert self._times is not None
        time, end = self._times[e : e + 2]
        if time <= self.config.cutoff:
            return None
        one_step = all(
            set(row.x) | set(row.m) | set(row.z) <= {k} for k, row in enumerate(self._planned.rows)
        )
        low = max(self.schedule.t_min, float(end)) if one_step else self.schedule.t_min
        times = window_around(float(time), self.config.window, low, self.schedule.t_max + 1e-9)
        levels = self._levels_at(times)
        if not distinct(levels):
            return None
        updates = {}
        if one_step:
            updates[e] = self._table([self._one_row(t, end) for t in times])
        return _Choice(self._on_device(levels), {e: self._on_device(times)}, updates)

    def _targets(self, e: int) -> _Choice | None:
        """Ends that the step from evaluation `e` may have (the released rule)."""
        assert self._times is not None
        rows, nominal = self._planned.rows, self._times[self._origin :]
        first = e - self._origin
        size = 1
        while first + size < len(rows) and min(rows[first + size].x) == first:
            size += 1
        time, end = float(nominal[first]), float(nominal[first + size])
        if end <= self.config.cutoff:
            return None
        # Up to where the step began and beyond it, if the window is as wide. Noise can't be added backwards.
        eta = getattr(self.base, "_eta", 0.0)
        ends = window_around(end, self.config.window, -1.0, time if eta else self.schedule.t_max + 1e-9)
        levels = self._on_device(self._levels_at(ends))
        if not isinstance(self.base, PNDMScheduler):
            return _Choice(levels, {}, {e: self._table([self._one_row(time, t) for t in ends])})
        stages = [self._stages(size, time, float(t)) for t in ends]
        plans = []
        for t, stage in zip(ends, stages, strict=True):
            # What comes after the step is left out: it may lie above an end.
            times = np.array([*nominal[: first + 1], *stage, t])
            starts = [start for start in self.base._steps(nominal) if start[0] <= first]
            step = self.base._plan_of_steps(times, starts).rows[first:]
            # Among the other rows as they are: what the step keeps, and where, is the same for all ends.
            whole = Plan((*rows[:first], *step, *rows[first + size :]))
            plans.append(compile_plan(whole, scaled=not self._hooked)[0][first : first + size])
        return _Choice(
            levels,
            {e + 1 + j: self._on_device(np.array([s[j] for s in stages])) for j in range(size - 1)},
            {e + j: self._table([plan[j] for plan in plans]) for j in range(size)},
        )

    def _one_row(self, time: float, end: float) -> Instruction:
        """The update of a solver that reads one evaluation alone."""
        row = self.base._plan(np.array([time, end])).rows[0]
        return compile_plan(Plan((row,)), scaled=not self._hooked)[0][0]

    def _stages(self, evaluations: int, time: float, end: float) -> list[float]:
        return [] if evaluations == 1 else self.base._stage_times(evaluations, time, end)  # type: ignore[attr-defined]

    def _table(self, instructions: Sequence[Instruction]) -> _Update:
        numbers = [
            [*i.convert, *i.direct, *i.here, *(c for _, c in i.past)]  # plain numbers, for these solvers
            for i in instructions
        ]
        return _Update(instructions[0], self._on_device(np.array(numbers, dtype=np.float64)))

    def _on_device(self, values: Array) -> Tensor:
        device = self.timesteps.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.as_tensor(values, dtype=dtype, device=device)

    def _choose(self, sample: Tensor) -> None:
        """Match the sample that a step has made with a candidate; all on the device."""
        assert self._step_index is not None
        choice = self._choices.get(self._step_index)
        if choice is None:
            return
        dtype = working_dtype(sample)
        variance = sample.detach().to(dtype).flatten(1).var(1)
        if self.config.pool == "batch":
            variance = variance.mean(0, keepdim=True)
        pick = (choice.levels.to(sample.device) - variance[:, None]).abs().argmin(1)
        for index, times in choice.times.items():
            self._shifted[index] = times.to(sample.device).index_select(0, pick)
            if self.config.pool == "batch":
                self.timesteps[index : index + 1].copy_(self._shifted[index])
        if choice.updates:
            assert self._bound is not None
            bound = list(self._bound)
            for index, update in choice.updates.items():
                bound[index - self._origin] = update.at(pick, sample, dtype)
            self._bound = tuple(bound)

    def _locate(self, timestep: float | Tensor) -> int | None:
        # A number near the expected time is that evaluation's, shifted; views are told by their address.
        expected = self._step_index
        if self._choices and not isinstance(timestep, Tensor) and expected is not None:
            near = expected < len(self._host_times) and abs(self._host_times[expected] - timestep)
            if near is not False and near <= self.config.window / 2:
                return expected
        return super()._locate(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """As :meth:`PlanScheduler.step`; then the time of the next evaluation is chosen."""
        result = super().step(
            model_output, timestep, sample, generator=generator, variance_noise=variance_noise
        )
        made = result.prev_sample  # type: ignore[union-attr]
        self._choose(made)
        return result if return_dict else (made,)


class _WholeLevels(PNDMScheduler):
    """With the levels of training steps alone, as the released code: a time between two has the cleaner."""

    def _state(self, times: Array) -> Array:
        return np.floor(times)


@dataclass(frozen=True)
class _Update:
    """A row's instruction with W alternatives of its numbers, (W, L)."""

    template: Instruction
    numbers: Tensor

    def at(self, pick: Tensor, sample: Tensor, dtype: torch.dtype) -> Instruction:
        """The instruction whose numbers are those of `pick`, (1,) or (B,)."""
        chosen = self.numbers.to(sample.device).index_select(0, pick).to(dtype)
        columns = chosen.reshape(len(pick), *[1] * (sample.ndim - 1), -1).unbind(-1)
        convert_x, convert_o, direct_x, direct_o, x, m, z, *past = columns
        return replace(
            self.template,
            convert=(convert_x, convert_o),
            direct=(direct_x, direct_o),
            here=(x, m, z),
            past=tuple((slot, c) for (slot, _), c in zip(self.template.past, past, strict=True)),
        )


@dataclass(frozen=True)
class _Choice:
    """What the variance of a sample decides: the nearest of `levels` (W,) is picked.

    Attributes:
        levels: variances to compare with.
        times: evaluation -> (W,) its time.
        updates: evaluation -> its update.
    """

    levels: Tensor
    times: dict[int, Tensor]
    updates: dict[int, _Update]


def data_variance(samples: Tensor) -> float:
    """v0: the mean over clean samples (B, ...) of the variance over each one's coordinates."""
    return float(samples.detach().double().flatten(1).var(1).mean())


def tells_time(schedule: NoiseSchedule, variance: float | None) -> bool:
    """Whether the variance of a sample tells its noise level, given that of clean data; else a warning."""
    if variance is None:
        logger.warning("time shift is off: it needs data_variance (diffalign.solvers.time_shift measures it)")
        return False
    if not schedule.is_flow and abs(1 - variance) < _NO_INFORMATION:
        logger.warning(
            "time shift is off: data of variance %.3g have nearly that variance at every noise level",
            variance,
        )
        return False
    return True


def window_around(centre: float, width: float, low: float, high: float) -> Array:
    """Candidate times: whole steps around `centre`, strictly between `low` and `high`."""
    half = width // 2
    times = centre + np.arange(-half, half + 1)
    return times[(times > low) & (times < high)]


def variance_at(schedule: NoiseSchedule, times: Array, v0: float) -> Array:
    """``alpha^2 v0 + sigma^2``, what the variance of a sample should be at `times`."""
    alpha, sigma = schedule.alpha_sigma(times)
    return alpha**2 * v0 + sigma**2


def distinct(levels: Array) -> bool:
    """Whether there is a choice, and no two times have one variance (as in flow models near the end)."""
    return len(levels) > 1 and len(set(np.sign(np.diff(levels)))) == 1


def _own_options(solver: str) -> list[str]:
    """Options of a solver that are not shared by all."""
    shared = set(inspect.signature(TimeShiftScheduler).parameters)
    return [name for name in inspect.signature(SOLVERS[solver]).parameters if name not in shared]
