"""What every scheduler of this package shares: the diffusers contract, written once over a plan.

A subclass lists its own options in ``__init__`` (decorated with
:func:`~diffalign.solvers.options.scheduler_options`, which adds the shared ones) and implements
``_plan(times)``. Everything else is here: configs, grids, timesteps, the step, noising.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import UserError, suggestion
from diffalign.solvers import grids
from diffalign.solvers.noise import NoiseSchedule, edm_options, prediction_of
from diffalign.solvers.options import check_choice
from diffalign.solvers.plan import Coefficient, Instruction, Plan, bind, compile_plan, execute, working_dtype
from diffalign.solvers.prediction import check_prediction_type, coefficients, training_target
from diffalign.solvers.statistics import Record, Sidecar

logger = logging.get_logger(__name__)
Array = NDArray[np.float64]

# Of schedules that reach alpha = 0 (zero terminal SNR), where no data can be read from epsilon. diffusers
# uses alphas_cumprod = 2^-24 there. Others may have smaller ones: the cosine schedule ends at 5e-5.
_ALPHA_FLOOR = 2.0**-12
# What from_pretrained hands on to a download.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers: computes a plan in ``set_timesteps``, executes one row of it in ``step``.

    Attributes:
        schedule: the :class:`~diffalign.solvers.noise.NoiseSchedule` of the config.
        timesteps: (n,) on the device given to ``set_timesteps``: int64 where all are whole numbers, else
            float32. ``n == num_inference_steps`` is the number of network evaluations.
        sigmas: (n + 1,) float32 on the host, in diffusers' unit.
    """

    config: Any
    # Whose configs are taken over without a warning about options that have no meaning here.
    _compatibles: ClassVar[list[str]] = [
        *(e.name for e in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "LCMScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ]
    order = 1

    #: Options whose value is a :class:`~diffalign.solvers.statistics.Sidecar`, saved in a file of its own.
    _sidecars: ClassVar[dict[str, type[Sidecar]]] = {}
    #: The kind of prediction that the rows combine: "sample" (data form) or "epsilon" (noise form).
    form: str = "sample"
    #: Whether diffusers' grid of this method leaves out the end point of n + 1 (its multistep classes do).
    _grid_with_end: ClassVar[bool] = True

    # ------------------------------------------------------------ construction and configs

    def _setup(self) -> None:
        """Check the shared options and get ready; ``scheduler_options`` calls it after ``__init__``."""
        config = self.config
        check_prediction_type(config.prediction_type)
        check_choice("grid", config.grid, grids.GRIDS)
        check_choice("timestep_spacing", config.timestep_spacing, ("linspace", "leading", "trailing"))
        grids.flagged_grid(config)
        self.schedule = NoiseSchedule.from_config(config)
        prediction_of(config, self.schedule)  # refuses what there is no model of
        if self.schedule.is_flow and config.prediction_type == "epsilon":
            raise UserError("a flow schedule needs prediction_type='flow_prediction' (or 'sample')")
        if config.grid == "flow" and not self.schedule.is_flow:
            raise UserError("grid='flow' is for flow models; use 'auto' for this noise schedule")
        if self.schedule.is_flow and not config.use_flow_sigmas:
            # Pipelines of flow models read this flag to know that the scheduler makes its own sigmas.
            self.register_to_config(use_flow_sigmas=True)
        if not 0.0 < config.dynamic_thresholding_ratio <= 1.0:
            raise UserError(
                f"dynamic_thresholding_ratio must lie in (0, 1], but is {config.dynamic_thresholding_ratio}"
            )
        if config.sample_max_value < 1.0:
            raise UserError(f"sample_max_value must be at least 1, but is {config.sample_max_value}")
        if not 0.0 < config.sample_min_value <= config.sample_max_value:
            raise UserError(
                f"sample_min_value must lie above 0 and not above sample_max_value = "
                f"{config.sample_max_value}, but is {config.sample_min_value}; the published dynamic "
                f"thresholding has sample_max_value=inf"
            )
        if self.schedule.t_max <= self.schedule.t_min:
            raise UserError("num_train_timesteps must be at least 2 (as many as trained_betas has, if given)")
        if self._start_time() <= self.schedule.t_min:
            raise UserError(
                f"lambda_min_clipped = {config.lambda_min_clipped} leaves no training step to start from; "
                f"half log-SNR goes up to {self.schedule.lambda_(self.schedule.t_min):.4f} here"
            )
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        times = self.schedule.training_times()[::-1]
        whole = bool(np.all(times == np.round(times)))
        self.timesteps = torch.tensor(times.copy(), dtype=torch.int64 if whole else torch.float32)
        self.sigmas = self._diffusers_sigmas(self.timesteps.double().numpy())
        self._times: Array | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def _translated(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Another scheduler's config in the terms of this class."""
        if config.get("invert_sigmas"):
            raise UserError("flow schedulers with inverted sigmas (Mochi) are not supported")
        # diffusers would drop every value that its own class happened to have as default, edited or not.
        config.pop("_use_default_values", None)
        # Here, before diffusers drops the keys that tell them, kinds without training steps are refused.
        schedule = NoiseSchedule.from_config(config)
        if schedule.is_flow:
            config.update(
                prediction_type="sample" if config.get("prediction_type") == "sample" else "flow_prediction",
                use_flow_sigmas=True,
                flow_shift=schedule.shift,
            )
        if schedule.kind == "edm":
            config.update(edm_options(config), final_sigmas_type="zero", set_alpha_to_one=True)
            config.setdefault("use_exponential_sigmas", config.get("sigma_schedule") == "exponential")
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``scheduler_config.json`` and, beside it, the tensors that belong to this scheduler."""
        # Those of another class too, which a config handed on keeps.
        for record in self.config.values():
            if isinstance(record, Record) and record.content is not None:
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                record.content.save(Path(save_directory) / record["file"])
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers; reads the tensors beside the config as well.

        Raises:
            UserError: a file that the config names is missing, damaged or another one. The option passed by
                hand, as in ``statistics=None``, is taken instead.
        """
        hub = {k: v for k, v in kwargs.items() if k in _HUB_OPTIONS}
        source: Any = pretrained_model_name_or_path
        loaded: Any = cls.load_config(source, subfolder=subfolder, return_unused_kwargs=True, **kwargs)
        config, kwargs = loaded
        for option, sidecar in cls._sidecars.items():
            record = config.get(option)
            if isinstance(record, Mapping) and option not in kwargs:
                if not {"file", "sha256"} <= set(record):
                    raise UserError(
                        f"the entry {option!r} of scheduler_config.json does not say which file it means; "
                        f"pass {option}=None to do without"
                    )
                path = _beside(source, subfolder, str(record["file"]), hub)
                kwargs[option] = sidecar.load(path, str(record["sha256"]))
        made, unused = cls.from_config(config, return_unused_kwargs=True, **kwargs)
        # Such as the torch_dtype of a pipeline, which diffusers' schedulers overlook too.
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the options of any diffusers scheduler's config; ``kwargs`` override.

        Options in ``kwargs`` that only other schedulers have are read as if `config` had them, with a
        warning: a flow scheduler's ``shift`` counts, most others mean nothing here.

        Raises:
            UserError: an option in ``kwargs`` that no scheduler has, or a bad value.
        """
        known = _options(cls)
        unknown = [] if return_unused_kwargs else [option for option in kwargs if option not in known]
        if unknown:
            theirs = super()._get_compatibles()  # type: ignore[misc]
            elsewhere = {option for other in theirs for option in _options(other)}
            for option in unknown:
                if option not in elsewhere:
                    raise UserError(f"{cls.__name__} has no option {option!r}{suggestion(option, known)}")
            foreign = {option: kwargs.pop(option) for option in unknown}
            config = {**config, **foreign}
            logger.warning(
                "%s has no option %s: read as of another scheduler's config, where it may mean nothing",
                cls.__name__,
                ", ".join(foreign),
            )
        if isinstance(config, Mapping):
            config = cls._translated(dict(config))
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """diffusers knows only its own; a config may come from another class here, which is loaded then."""
        ours = [PlanScheduler]
        for known in ours:
            ours += [sub for sub in known.__subclasses__() if sub not in ours]
        whole = [one for one in ours if "__init__" in vars(one)]  # others are parts that classes share
        return [*super()._get_compatibles(), *whole]  # type: ignore[misc]

    @property
    def prediction(self) -> str:
        """What the network predicts, a key of :data:`~diffalign.solvers.prediction.PREDICTIONS`."""
        return prediction_of(self.config, self.schedule)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(N,) float32: alpha^2 at :meth:`NoiseSchedule.training_times`."""
        return torch.from_numpy(self.schedule.alpha(self.schedule.training_times()) ** 2).float()

    @property
    def betas(self) -> Tensor:
        """(N,) float32: ``1 - alpha_n^2 / alpha_{n-1}^2`` of the training steps."""
        squared = np.append(1.0, self.schedule.alpha(self.schedule.training_times()) ** 2)
        return torch.from_numpy(1.0 - squared[1:] / squared[:-1]).float()

    # ------------------------------------------------------------ what a subclass decides

    def _plan(self, times: Array) -> Plan:
        """The rows for ``times``: n evaluations and the end, strictly decreasing."""
        raise NotImplementedError

    def _check_sample(self, sample: Tensor) -> None:
        """Refuse a sample that the plan doesn't fit; called once a run, at its first step."""

    def _final(self) -> str:
        """``"zero"`` or ``"sigma_min"``: where sampling ends."""
        return self.config.final_sigmas_type

    def _auto_times(self, count: int, start: float) -> Array:
        """What ``grid="auto"`` means for this method."""
        order = min(self.config.get("solver_order", 1), 3)
        return grids.auto_times(self.schedule, count, order=order, final=self._final(), start=start)

    def _transform(self, m: Tensor, sample: Tensor) -> Tensor:
        """Applied to the prediction in :attr:`form`, before it is used or kept, where :meth:`_transforms`."""
        config = self.config
        return threshold(
            m, config.dynamic_thresholding_ratio, config.sample_max_value, config.sample_min_value
        )

    def _transforms(self) -> bool:
        return bool(self.config.thresholding)

    def _conversion(self, time: float, form: str | None = None) -> tuple[Coefficient, Coefficient]:
        """``(convert_x, convert_o)`` of the network's output at `time` to `form`, or :attr:`form`."""
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(time))
        if self.prediction == "epsilon" and self.schedule.alpha(self.schedule.t_max) == 0.0:
            alpha = max(alpha, _ALPHA_FLOOR)
        return coefficients(self.prediction, form or self.form, alpha, sigma)

    # ------------------------------------------------------------ timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times of a run and plan it. Forgets the last run.

        Args:
            num_inference_steps: number of network evaluations.
            device: of ``timesteps``.
            timesteps: custom times, decreasing, fractional ones included, used as they are.
            sigmas: custom noise levels in diffusers' unit (sigma/alpha; sigma for flow); a last 0 is the end.
                For a flow model with `timesteps` as well, which are then only what the network is told
                (CogView4, whose times are those before the shift).
            mu: resolution-dependent shift of a flow model's grid, and of `sigmas` where both are given. As in
                diffusers, whose Flux pipeline passes it in any case, it counts with ``use_dynamic_shifting``.

        Raises:
            UserError: unless exactly one of the three says how many steps there are, and for bad values.
        """
        given = [n for n, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None]
        if len(given) == 2 and not self.schedule.is_flow:
            raise UserError("pass timesteps or sigmas to set_timesteps, not both; flow models take both")
        if not given and num_inference_steps is None:
            raise UserError("set_timesteps needs num_inference_steps, timesteps or sigmas")
        if mu is not None and not self.schedule.is_flow:
            raise UserError("mu shifts the grid of a flow model, but this is not a flow schedule")
        shift = self._shift_of_mu(mu) if mu is not None and self.config.use_dynamic_shifting else None
        if sigmas is not None:
            times = grids.custom_sigmas(self.schedule, _host(sigmas), final=self._final(), shift=shift)
        elif timesteps is not None:
            starts = self._step_starts_among(_host(timesteps).reshape(-1))
            times = grids.custom_times(self.schedule, starts, final=self._final())
        else:
            times = self._grid_times(_positive_int(num_inference_steps), shift)
        self._times = self._evaluations(grids.checked(times))
        if self.schedule.kind == "edm" and self._times[-1] > self.schedule.t_clean:
            raise UserError(
                "with an EDM model sampling ends at the clean image: leave final_sigmas_type at 'zero' and "
                "set_alpha_to_one at True"
            )
        told = self._told(self._times) if len(given) < 2 else grids.checked(_host(timesteps).reshape(-1))
        if len(told) != len(self._times) - 1:
            raise UserError(
                f"timesteps and sigmas belong together, but there are {len(told)} timesteps and "
                f"{len(self._times) - 1} evaluations"
            )
        self.num_inference_steps = len(told)
        self._host_times = [float(t) for t in told]
        whole = bool(np.all(told == np.round(told)))
        self.timesteps = torch.tensor(told, dtype=torch.int64 if whole else torch.float32, device=device)
        self.sigmas = self._diffusers_sigmas(self._times)
        self._begin_index = None
        self._step_index = None
        self._start_at(0)

    def _step_starts_among(self, asked: Array) -> Array:
        """Those of a caller's evaluations that are grid points; :meth:`_evaluations` adds the others."""
        return asked

    def _evaluations(self, times: Array) -> Array:
        """Times at which the network is asked, and the end, for grid points `times`; stages may be added."""
        return times

    def _told(self, times: Array) -> Array:
        """The times that the network is told where the samples are at `times`, the end among these."""
        return times[:-1]

    def _grid_times(self, count: int, shift: float | None) -> Array:
        config, schedule, final = self.config, self.schedule, self._final()
        start = self._start_time()
        name = config.grid
        if name == "auto" and not schedule.is_flow:
            name = grids.flagged_grid(config) or name
        if name == "flow" or (schedule.is_flow and name in ("auto", "diffusers")):
            return grids.flow_times(
                schedule,
                count,
                final=final,
                shift=schedule.shift if shift is None else shift,
                shift_terminal=config.get("shift_terminal"),
            )
        if name == "auto":
            return self._auto_times(count, start)
        if name == "diffusers":
            return grids.diffusers_times(
                schedule, count, config, final=final, start=start, with_end=self._grid_with_end
            )
        return grids.named_times(schedule, name, count, final=final, start=start)

    def _start_time(self) -> float:
        """The noisy end: ``t_max``, or the last training step with lambda above ``lambda_min_clipped``."""
        clip = self.config.get("lambda_min_clipped", -math.inf)
        if math.isinf(clip) or clip <= self.schedule.lambda_(self.schedule.t_max):
            return self.schedule.t_max
        return math.floor(float(self.schedule.t_of_lambda(clip)))

    def _shift_of_mu(self, mu: float) -> float:
        return float(mu) if self.config.get("time_shift_type") == "linear" else math.exp(mu)

    def _diffusers_sigmas(self, times: Array) -> Tensor:
        return torch.from_numpy(np.minimum(self.schedule.sigma_diffusers(times), 4096.0)).float()

    # ------------------------------------------------------------ where we are

    @property
    def step_index(self) -> int | None:
        """Index of the evaluation that the next ``step`` completes; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation, where :meth:`set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at evaluation `begin_index` (image-to-image): the rest is planned anew, with its warm-up."""
        if self._times is None:
            raise UserError("call set_timesteps before set_begin_index")
        begin_index = int(begin_index)
        if not 0 <= begin_index < len(self._host_times):
            raise UserError(
                f"begin_index must lie between 0 and {len(self._host_times) - 1}, but is {begin_index}"
            )
        self._begin_index = begin_index
        self._step_index = None
        self._start_at(begin_index)

    def _start_at(self, index: int) -> None:
        """Plan the evaluations from `index` on, with empty history."""
        assert self._times is not None
        self._origin = index
        self._planned = self._plan(self._times[index:])
        self._hooked = self._transforms()
        self._instructions, size = compile_plan(self._planned, scaled=not self._hooked)
        self._bound: tuple[Instruction, ...] | None = None
        self._slots: list[Tensor | None] = [None] * size

    @property
    def plan(self) -> Plan:
        """The rows of this run, from its first evaluation on."""
        if self._times is None:
            raise UserError("call set_timesteps first: a plan belongs to a grid")
        return self._planned

    def _locate(self, timestep: float | Tensor) -> int | None:
        """Index of the evaluation at `timestep`, or None where only a device synchronisation could tell."""
        if isinstance(timestep, Tensor):
            grid = self.timesteps
            if timestep.device == grid.device and timestep.dtype == grid.dtype:
                # An element of ``timesteps``, as loops hand it back: its address tells.
                offset = timestep.data_ptr() - grid.data_ptr()
                if 0 <= offset < grid.numel() * grid.element_size():
                    return offset // grid.element_size()
            if timestep.device.type != "cpu":
                return None
            timestep = float(timestep.reshape(-1)[0])
        expected = self._step_index
        times = self._host_times
        if expected is not None and expected < len(times) and times[expected] == timestep:
            return expected
        return min(range(len(times)), key=lambda i: abs(times[i] - timestep))

    def _seek(self, timestep: float | Tensor) -> int:
        """The index of this step. A timestep that is not the expected one starts afresh from there."""
        if self._times is None:
            raise UserError("call set_timesteps before step: the scheduler has no grid yet")
        found = self._locate(timestep)
        expected = self._step_index
        if expected is None:
            expected = self._begin_index
            if expected is None:
                if found is None:  # a foreign device tensor: read once, at the start of a loop
                    found = self._locate(float(timestep))
                expected = found
        elif found is not None and found != expected:
            expected = found
            self._start_at(found)
        assert expected is not None
        if expected >= len(self._host_times):
            raise UserError("all steps of this run are done; call set_timesteps to start another")
        if self._step_index is None and expected != self._origin:
            self._start_at(expected)
        return expected

    # ------------------------------------------------------------ the step

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: the network takes ``x_t`` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From ``x_t`` and the network's output there to the next sample.

        Args:
            model_output: (B, C, ...) in the config's prediction type; channels beyond C (a learned variance)
                are left out.
            timestep: the element of ``timesteps`` this belongs to.
            sample: (B, C, ...).
            generator: one, or one per image, for methods with noise.
            variance_noise: that noise itself, like `sample`.
            return_dict: False for a tuple.

        Returns:
            ``prev_sample`` in the dtype of `sample`; the arithmetic is float32, or float64 for such samples.

        Raises:
            UserError: before ``set_timesteps``, or after the last step.
        """
        index = self._seek(timestep)
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if self._bound is None:
            self._check_sample(sample)
            self._bound = bind(self._instructions, sample)
        instruction = self._bound[index - self._origin]
        noise = None
        if instruction.draws:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    tuple(sample.shape),
                    generator=generator,
                    device=sample.device,
                    dtype=working_dtype(sample),
                )
        self._step_index = index  # for the hook
        result = execute(
            instruction,
            model_output,
            sample,
            self._slots,
            noise,
            self._transform if self._hooked else None,
        )
        self._step_index = index + 1
        if not return_dict:
            return (result,)
        return SchedulerOutput(prev_sample=result)

    # ------------------------------------------------------------ noising

    def _levels(self, timesteps: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `timesteps`, (B, 1, ...) in the working precision of `like`."""
        dtype = working_dtype(like)
        times = torch.as_tensor(timesteps)
        index = self._locate_view(times)
        if index is not None:
            assert self._times is not None
            host = self._times[index : index + 1]
        else:
            host = self._schedule_times(_host(times).reshape(-1))
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = self.schedule.alpha_sigma(host)
        return (
            torch.as_tensor(alpha, dtype=dtype, device=like.device).reshape(shape),
            torch.as_tensor(sigma, dtype=dtype, device=like.device).reshape(shape),
        )

    def _schedule_times(self, told: Array) -> Array:
        """The schedule's times for times that the network is told, where the two differ."""
        if self._times is None or np.array_equal(self._host_times, self._times[:-1]):
            return told
        return np.interp(told, self._host_times[::-1], self._times[-2::-1])

    def _locate_view(self, times: Tensor) -> int | None:
        if self._times is None or times.numel() != 1 or times.dtype != self.timesteps.dtype:
            return None
        return self._locate(times) if times.device == self.timesteps.device else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha(t) x0 + sigma(t) noise`` at any times in the schedule's range, fractional ones included.

        Args:
            original_samples, noise: (B, ...).
            timesteps: (B,) or (1,).

        Returns:
            The noisy samples, in the dtype of `original_samples`.
        """
        alpha, sigma = self._levels(timesteps, original_samples)
        noisy = alpha * original_samples + sigma * noise
        return noisy.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` by the name and in the argument order of diffusers' flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The ``v_prediction`` target for clean `sample`; shapes as in :meth:`add_noise`."""
        alpha, sigma = self._levels(timesteps, sample)
        return training_target("v_prediction", sample, noise, alpha, sigma).to(sample.dtype)


def threshold(x0: Tensor, ratio: float, maximum: float, minimum: float = 1.0) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022): ``clamp(x0, -s, s) / s``, per image.

    s is the `ratio` quantile of ``|x0|``, held between `minimum` and `maximum`. With 1 and infinity it is the
    published method; with 1 and 1, diffusers' defaults, plain clipping; the published code of DPM-Solver has
    a free `minimum`, which it calls ``max_val``, and infinity. The result lies in [-1, 1].
    """
    if minimum == maximum:
        return x0.clamp(-maximum, maximum) / maximum
    flat = x0.flatten(1)
    # The interpolated quantile by selection: torch.quantile sorts, and refuses large images.
    magnitude = flat.abs()
    rank = ratio * (flat.shape[1] - 1)
    low = magnitude.kthvalue(int(rank) + 1, dim=1, keepdim=True).values
    high = magnitude.kthvalue(min(int(rank) + 2, flat.shape[1]), dim=1, keepdim=True).values
    s = torch.lerp(low, high, rank - int(rank)).clamp(minimum, maximum)
    return (torch.clamp(flat, -s, s) / s).reshape(x0.shape)


def _beside(folder: Any, subfolder: str | None, name: str, hub: dict[str, Any]) -> Path:
    """Where the file `name` of a local folder or hub repository lies; a bare name cannot leave the folder."""
    name = Path(name).name
    if Path(folder).is_dir():
        return Path(folder, subfolder or "", name)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(folder), name, subfolder=subfolder, **hub))


def _options(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]


def _positive_int(value: Any) -> int:
    if value != int(value) or value < 1:
        raise UserError(f"num_inference_steps must be a whole number, at least 1, but is {value}")
    return int(value)


def _host(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
