"""Time-shift sampling around diffusers' own schedulers (Li et al. 2024).

For the samplers of this package see :class:`diffalign.solvers.time_shift.TimeShiftScheduler`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule, prediction_of
from diffalign.solvers.options import check_choice, check_number
from diffalign.solvers.plan import working_dtype
from diffalign.solvers.prediction import convert, training_target
from diffalign.solvers.scheduler import PlanScheduler
from diffalign.solvers.time_shift import distinct, tells_time, variance_at, window_around

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["SCHEDULERS", "SchedulerMixin", "ShiftedScheduler"]

#: diffusers' classes whose times are training steps -> whether a step depends on the last evaluation alone.
SCHEDULERS = {
    "DDIMScheduler": True,
    "DDPMScheduler": True,
    "DEISMultistepScheduler": False,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "EulerAncestralDiscreteScheduler": True,
    "EulerDiscreteScheduler": True,
    "FlowMatchEulerDiscreteScheduler": True,
    "FlowMatchHeunDiscreteScheduler": False,
    "HeunDiscreteScheduler": False,
    "KDPM2AncestralDiscreteScheduler": False,
    "KDPM2DiscreteScheduler": False,
    "LMSDiscreteScheduler": False,
    "PNDMScheduler": False,
    "SASolverScheduler": False,
    "UniPCMultistepScheduler": False,
}


class ShiftedScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers, with the network's time matched to the variance that the sample really has.

        pipe.scheduler = ShiftedScheduler.around(pipe.scheduler, data_variance=0.25)

    After a step to time t above `cutoff`, the variance of what the network will be shown (the scaled sample,
    where the scheduler works in sigma; the mean over the batch) is compared with ``alpha^2 v0 + sigma^2`` at
    the times within ``window / 2`` of t. The nearest, t_s, is written into ``timesteps``, in place and on the
    device, where the loop reads it. The scheduler underneath never hears of it: its own times and levels,
    whose spacing multistep coefficients need, stay.

    Where a step depends on the last evaluation alone (DDIM, DDPM, Euler, flow Euler), x0 and epsilon are read
    at the levels of t_s, as published, and the sample that goes into the step is put together from them at
    the levels of t: ``alpha_t x0 + sigma_t eps``. For DDIM this is the published update, from t_s to the
    nominal target. In DDPM the sample's own share of the posterior mean is then that of the level t too.

    What the method can give, and that it can give nothing for latents of unit variance (it is then off, with
    a warning), is said at :class:`~diffalign.solvers.time_shift.TimeShiftScheduler`.

    Args:
        scheduler: the class in diffusers, one of :data:`SCHEDULERS`.
        window: width of the search, in training steps; 0 for none.
        cutoff: time below which nothing is shifted.
        data_variance: v0, which :func:`~diffalign.solvers.time_shift.data_variance` measures; 0 is the
            published rule.
        options: those of `scheduler`. All are kept side by side in the config, so
            ``DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`` leads back.

    Attributes:
        base: the scheduler underneath; whatever it has and this class hasn't is taken from it.

    Raises:
        UserError: for unknown schedulers and options.
    """

    config: Any

    def __init__(
        self,
        scheduler: str = "DDIMScheduler",
        window: int = 20,
        cutoff: float = 300.0,
        data_variance: float | None = None,
        **options: Any,
    ) -> None:
        cls = _class(scheduler)
        for name in options:
            check_choice(f"option of {scheduler}", name, _known(cls))
        if check_number("window", window) < 0:
            raise UserError(f"window must be 0 or more training steps, but is {window}")
        check_number("cutoff", cutoff)
        if data_variance is not None and check_number("data_variance", data_variance) < 0:
            raise UserError(f"data_variance must be 0 or more, but is {data_variance}")
        self.base = cls(**options)
        if self.base.config.get("timestep_type") == "continuous":
            raise UserError(
                "time shift counts in training steps; timestep_type must be 'discrete', not 'continuous'"
            )
        own = {"scheduler": scheduler, "window": window, "cutoff": cutoff, "data_variance": data_variance}
        self.register_to_config(**_options(self.base), **own)
        self.schedule = NoiseSchedule.from_config(self.config)
        self._shifting = window > 0 and tells_time(self.schedule, data_variance)
        self.timesteps: Tensor = self.base.timesteps
        self._index: int | None = None
        self._told: tuple[Tensor, Tensor] | None = None

    @classmethod
    def around(cls, scheduler: Any, **options: Any) -> ShiftedScheduler:
        """A scheduler of diffusers with its options, shifted; `options` are window, cutoff, data_variance."""
        if isinstance(scheduler, PlanScheduler):
            raise UserError(
                "for diffalign's own schedulers use TimeShiftScheduler.from_config(config, solver=...)"
            )
        return cls(type(scheduler).__name__, **options, **_options(scheduler))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler like the one with `config`, which is this class's own, or any with ``scheduler=``."""
        if not isinstance(config, Mapping):
            raise UserError("from_config takes a scheduler's config; from_pretrained takes a folder")
        given = {**config, **kwargs}
        if "scheduler" not in given:
            raise UserError(
                "this config doesn't say what to wrap; pass scheduler= with the class in diffusers, or use "
                "ShiftedScheduler.around(scheduler)"
            )
        name = given.pop("scheduler")
        own = {key: given.pop(key) for key in ("window", "cutoff", "data_variance") if key in given}
        made = cls(name, **own, **_options(_class(name).from_config(given)))
        return (made, {}) if return_unused_kwargs else made

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # asked for before there is one, when copied
            raise AttributeError(name)
        return getattr(self.base, name)

    # Pipelines look at the parameters of these two to see what a scheduler takes: those of the base.

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """As the base's. ``timesteps`` then changes as the run goes on."""
        return functools.wraps(self.base.set_timesteps)(functools.partial(ShiftedScheduler._start, self))

    @property
    def step(self) -> Callable[..., Any]:
        """As the base's; then the time of the next evaluation is chosen."""
        return functools.wraps(self.base.step)(functools.partial(ShiftedScheduler._step, self))

    def _start(self, *args: Any, **kwargs: Any) -> None:
        self.base.set_timesteps(*args, **kwargs)
        self.timesteps = self.base.timesteps.clone()
        self._nominal = [float(t) for t in self.base.timesteps]
        self._index = self._told = None
        # Candidates of every evaluation, on the device beforehand: no step makes the host wait.
        self._candidates = [self._around(t) for t in self._nominal] if self._shifting else []

    def _around(self, time: float) -> Tensor | None:
        """(4, W): times that the network may be told instead, their alpha, sigma and variance."""
        if time <= self.config.cutoff:
            return None
        schedule = self.schedule
        times = window_around(time, self.config.window, schedule.t_min, schedule.t_max + 1e-9)
        levels = variance_at(schedule, times, self.config.data_variance)
        if not distinct(levels):
            return None
        device = self.timesteps.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        table = np.stack([times, *schedule.alpha_sigma(times), levels])
        return torch.as_tensor(table, dtype=dtype, device=device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """As the base's, at the nominal time."""
        return sample if timestep is None else self._shown(sample, self._seek(timestep))

    def _shown(self, sample: Tensor, index: int) -> Tensor:
        """What the network is given at evaluation `index`; the sample itself but for schedulers in sigma."""
        if not hasattr(self.base, "scale_model_input"):
            return sample
        return self.base.scale_model_input(sample, self.base.timesteps[index])

    def _seek(self, timestep: float | Tensor) -> int:
        """Index of the evaluation at `timestep`: after the first, they are counted."""
        if self._index is not None:
            return self._index
        begin = getattr(self.base, "begin_index", None)
        if begin is not None:
            return int(begin)
        return int((self.base.timesteps - timestep).abs().argmin())

    def _step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        index = self._seek(timestep)
        if self._told is not None and SCHEDULERS[self.config.scheduler]:
            model_output, sample = self._restated(model_output, sample, index)
        result = self.base.step(model_output, self.base.timesteps[index], sample, *args, **kwargs)
        self._index, self._told = index + 1, None
        if index + 1 < len(self._candidates):
            self._choose(result[0])
        return result

    def _choose(self, sample: Tensor) -> None:
        """Match the sample that a step has made with a candidate; all on the device."""
        assert self._index is not None
        candidates = self._candidates[self._index]
        if candidates is None:
            return
        shown = self._shown(sample, self._index)
        variance = shown.detach().to(working_dtype(shown)).flatten(1).var(1).mean()
        pick = (candidates[3] - variance).abs().argmin(0, keepdim=True)
        time, alpha, sigma, _ = candidates.index_select(1, pick)
        self.timesteps[self._index : self._index + 1].copy_(time)
        self._told = alpha, sigma

    def _restated(self, output: Tensor, sample: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Output and sample with the x0 and epsilon of the told time, at the levels of the nominal one."""
        assert self._told is not None
        kind = prediction_of(self.config, self.schedule)
        prediction, rest = output[:, : sample.shape[1]], output[:, sample.shape[1] :]
        shown = self._shown(sample, index)
        x0, eps = (
            convert(prediction, shown, *self._told, source=kind, to=to) for to in ("sample", "epsilon")
        )
        alpha, sigma = (float(level) for level in self.schedule.alpha_sigma(self._nominal[index]))
        restated = alpha * x0 + sigma * eps
        if shown is not sample:  # a scheduler in sigma shows the network alpha times its sample
            restated = restated / alpha
        target = training_target(kind, x0, eps, alpha, sigma)
        return torch.cat([target.to(output.dtype), rest], 1), restated.to(sample.dtype)


def _class(name: Any) -> Any:
    check_choice("scheduler", name, list(SCHEDULERS))
    return getattr(diffusers, name)


def _known(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "kwargs"]


def _options(scheduler: Any) -> dict[str, Any]:
    """A scheduler's own options: its config may hold those of other classes, and notes, as well."""
    return {name: scheduler.config[name] for name in _known(type(scheduler)) if name in scheduler.config}
