"""Noise schedules: what alpha, sigma and half-log-SNR are at every time, in float64.

A noisy sample is ``x_t = alpha(t) x0 + sigma(t) z`` with ``z ~ N(0, I)``, and
``lambda(t) = log alpha(t) - log sigma(t)`` grows while sampling. Time ``t`` has the unit in which the network
is given it, so a timestep of a scheduler, fractional or not, is a valid ``t``:

============  ==================================  =====================  ====================
kind          t                                   noisy end ``t_max``    ``t_min``
============  ==================================  =====================  ====================
discrete      index of the training step          N - 1                  0
flow          N * sigma                           N                      1
vp-linear     time_scale * continuous time        time_scale             1e-3 T
vp-cosine     time_scale * continuous time        0.9946 time_scale      1e-3 T
edm           1/4 log s, for ``x0 + s z``         1/4 log sigma_max      1/4 log sigma_min
============  ==================================  =====================  ====================

``t_min`` is the smallest time at which the network is asked; ``t_clean`` (-1 for discrete schedules, -64 for
EDM, 0 for the others) is where sigma is exactly 0, and no time lies beyond it.

The states of an EDM model are what its network is shown, ``c_in (x0 + s z)`` with ``c_in = 1/sqrt(s^2 +
sigma_data^2)`` (Karras et al. 2022, table 1): alpha is c_in and sigma is ``c_in s``. Only at ``t_clean`` the
state is the clean image itself, alpha 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError
from diffalign.solvers.betas import named_betas, zero_terminal_snr

Array = NDArray[np.float64]

# Relative slack for times and lambdas that rounding has put a hair outside the range.
_SLACK = 1e-6


class NoiseSchedule:
    """alpha, sigma and lambda as functions of network time. Build one with the class methods.

    Every method takes a float or an array of any shape and returns float64 of that shape. Instances are
    immutable, picklable and cheap to copy.

    Attributes:
        kind: ``"discrete"``, ``"flow"``, ``"vp-linear"``, ``"vp-cosine"`` or ``"edm"``.
        num_train_timesteps: N, the number of training steps.
        t_clean, t_min, t_max: see the module's table.
        shift: the shift of a flow model's training and sampling grid, 1 elsewhere. It moves grid points
            (:meth:`shifted`), never alpha or sigma at a given time.
        sigma_data: standard deviation that an EDM model takes its data to have, 1 elsewhere.
    """

    kind: str
    num_train_timesteps: int
    t_clean: float
    t_min: float
    t_max: float
    shift: float = 1.0
    sigma_data: float = 1.0

    # ---------------------------------------------------------------- construction

    @staticmethod
    def from_betas(betas: ArrayLike) -> NoiseSchedule:
        """Discrete schedule of N training steps: ``log alpha_n = 1/2 sum_{m<=n} log(1 - beta_m)``.

        Args:
            betas: (N,) values in [0, 1); the last may be 1 (zero terminal SNR).

        Raises:
            UserError: if `betas` is not such an array.
        """
        values = np.asarray(betas, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise UserError(f"betas must be a non-empty list of numbers, but have shape {values.shape}")
        if not np.all((values >= 0) & (values <= 1)) or np.any(values[:-1] == 1):
            raise UserError(
                "betas must lie in [0, 1), where only the last may be exactly 1 (zero terminal SNR)"
            )
        with np.errstate(divide="ignore"):
            return _Discrete(0.5 * np.cumsum(np.log1p(-values)))

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: ArrayLike) -> NoiseSchedule:
        """Discrete schedule from ``alpha_n^2``, which diffusers calls ``alphas_cumprod``, of shape (N,)."""
        values = np.asarray(alphas_cumprod, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.all((values >= 0) & (values <= 1)):
            raise UserError("alphas_cumprod must be a non-empty list of numbers in [0, 1]")
        with np.errstate(divide="ignore"):
            return _Discrete(0.5 * np.log(values))

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of any diffusers scheduler config (a dict, a ``FrozenDict``, the JSON as loaded).

        Missing keys have diffusers' defaults. A config is a flow model's when it says so: prediction type
        ``flow_prediction``, ``use_flow_sigmas``, or a flow-matching class; an EDM model's by ``sigma_data``
        (Playground v2.5) or continuous timesteps (Stable Video Diffusion). Else it is discrete, with
        ``trained_betas`` or one of the named ``beta_schedule`` kinds, and ``rescale_betas_zero_snr``.

        Raises:
            UserError: for an unknown ``beta_schedule``, bad betas, or a kind of noise that is none of these.
        """
        count = int(config.get("num_train_timesteps", 1000))
        if count < 1:
            raise UserError(f"num_train_timesteps must be at least 1, but is {count}")
        edm = edm_options(config)
        if edm:
            return NoiseSchedule.edm(**edm, num_train_timesteps=count)
        if is_flow_config(config):
            shift = config.get("flow_shift") or config.get("shift") or 1.0
            return NoiseSchedule.flow(count, shift=float(shift))
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], dtype=np.float64)
        else:
            betas = named_betas(
                str(config.get("beta_schedule", "linear")),
                count,
                float(config.get("beta_start", 1e-4)),
                float(config.get("beta_end", 0.02)),
            )
        schedule = NoiseSchedule.from_betas(betas)
        if config.get("rescale_betas_zero_snr", False):
            return NoiseSchedule.from_alphas_cumprod(
                zero_terminal_snr(schedule.alpha(np.arange(len(betas))) ** 2)
            )
        return schedule

    @staticmethod
    def vp_linear(
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        time_scale: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> NoiseSchedule:
        """Continuous VP, linear beta: ``log alpha = -s^2 (beta_max - beta_min)/4 - s beta_min/2``, s <= 1.

        The network is given ``t = time_scale * s`` (999 for the published score-SDE models).
        """
        if not 0 < beta_min < beta_max:
            raise UserError(f"need 0 < beta_min < beta_max, but they are {beta_min} and {beta_max}")
        return _VPLinear(beta_min, beta_max, time_scale, num_train_timesteps)

    @staticmethod
    def vp_cosine(
        s: float = 0.008, *, time_scale: float = 1.0, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Continuous VP, ``alpha = cos(pi/2 (u+s)/(1+s)) / cos(pi/2 s/(1+s))``, 0 < u <= 0.9946 (iDDPM)."""
        return _VPCosine(s, time_scale, num_train_timesteps)

    @staticmethod
    def flow(num_train_timesteps: int = 1000, *, shift: float = 1.0) -> NoiseSchedule:
        """Rectified flow: ``alpha = 1 - sigma``, ``t = num_train_timesteps * sigma``."""
        if not shift > 0:
            raise UserError(f"the shift of a flow schedule must be above 0, but is {shift}")
        return _Flow(num_train_timesteps, shift)

    @staticmethod
    def edm(
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        *,
        num_train_timesteps: int = 1000,
    ) -> NoiseSchedule:
        """EDM (Karras et al. 2022): ``x0 + s z`` for s from `sigma_min` to `sigma_max`, as shown to the
        network, with `sigma_data` the standard deviation of x0. `num_train_timesteps` is nominal."""
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"need 0 < sigma_min < sigma_max, but they are {sigma_min} and {sigma_max}")
        if not sigma_data > 0:
            raise UserError(f"sigma_data must be above 0, but is {sigma_data}")
        return _EDM(sigma_min, sigma_max, sigma_data, num_train_timesteps)

    # ---------------------------------------------------------------- the functions of time

    def alpha(self, t: ArrayLike) -> Array:
        """Signal level at time t. Raises UserError outside ``[t_clean, t_max]``, as all functions of t do."""
        return self._alpha_sigma(self._checked_time(t))[0]

    def sigma(self, t: ArrayLike) -> Array:
        """Noise level at time t."""
        return self._alpha_sigma(self._checked_time(t))[1]

    def alpha_sigma(self, t: ArrayLike) -> tuple[Array, Array]:
        """Both levels at time t."""
        return self._alpha_sigma(self._checked_time(t))

    def lambda_(self, t: ArrayLike) -> Array:
        """Half log-SNR ``log alpha - log sigma`` at time t: +inf at ``t_clean``, -inf where alpha is 0."""
        return self._lambda(self._checked_time(t))

    def t_of_lambda(self, lambda_: ArrayLike) -> Array:
        """Inverse of :meth:`lambda_`; +inf gives ``t_clean``. Raises UserError below ``lambda_(t_max)``."""
        value = np.asarray(lambda_, dtype=np.float64)
        lowest = float(self._lambda(np.asarray(self.t_max)))
        if np.any(np.isnan(value)) or np.any(value < lowest - _SLACK * max(1.0, abs(lowest))):
            raise UserError(
                f"lambda must be a number of at least {lowest:.4f} (at t = {self.t_max:g}), but is {value}"
            )
        return np.clip(self._t_of_lambda(np.maximum(value, lowest)), self.t_clean, self.t_max)[()]

    def t_of_sigma(self, sigma: ArrayLike) -> Array:
        """Time of a diffusers noise level: sigma for flow, sigma/alpha for all others."""
        value = np.asarray(sigma, dtype=np.float64)
        if np.any(~(value >= 0)):
            raise UserError(f"sigmas must be numbers of at least 0, but are {value}")
        with np.errstate(divide="ignore"):
            return self.t_of_lambda(-np.log(value))

    def sigma_diffusers(self, t: ArrayLike) -> Array:
        """What diffusers keeps in ``scheduler.sigmas``: sigma for flow, sigma/alpha for all others."""
        with np.errstate(over="ignore"):
            return np.exp(-self.lambda_(t))

    def shifted(self, fraction: ArrayLike, shift: float | None = None) -> Array:
        """Times ``t_max * s u / (1 + (s - 1) u)`` for fractions u in [0, 1] of the noise; s = `shift`."""
        u = np.asarray(fraction, dtype=np.float64)
        s = self.shift if shift is None else shift
        return self.t_max * s * u / (1.0 + (s - 1.0) * u)

    def training_times(self) -> Array:
        """(N,) times that training saw, rising; of continuous schedules N even ones of them."""
        if self.is_discrete:
            return np.arange(self.num_train_timesteps, dtype=np.float64)
        return np.linspace(self.t_min, self.t_max, self.num_train_timesteps)

    def fraction(self, t: Any) -> Any:
        """Where times, numbers or a tensor, lie between the clean end, 0, and the noisy one, 1."""
        if self.kind == "edm":
            return (t - self.t_min) / (self.t_max - self.t_min)
        return t / self.num_train_timesteps

    @property
    def is_flow(self) -> bool:
        return self.kind == "flow"

    @property
    def is_discrete(self) -> bool:
        """Whether training saw whole times only."""
        return self.kind == "discrete"

    def fingerprint(self) -> str:
        """64 hex digits that two schedules share when lambda agrees at all training times to 1e-6.

        Statistics fitted to a model are stored with it and refused on another schedule.
        """
        times = np.linspace(self.t_min, self.t_max, max(self.num_train_timesteps, 2))
        lambdas = np.round(np.clip(self._lambda(times), -50.0, 50.0), 6) + 0.0  # +0.0 turns -0.0 into 0.0
        kind = self.kind if self.sigma_data == 1.0 else f"{self.kind}-{self.sigma_data:.6g}"
        head = f"{kind}:{self.num_train_timesteps}:{self.t_min:.6g}:{self.t_max:.6g}:"
        return hashlib.sha256(head.encode() + lambdas.astype("<f8").tobytes()).hexdigest()

    def __repr__(self) -> str:
        first, last = self._lambda(np.array([self.t_max, self.t_min]))
        return (
            f"NoiseSchedule({self.kind}, N={self.num_train_timesteps}, t={self.t_max:g}..{self.t_min:g}, "
            f"lambda={first:.3f}..{last:.3f})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return self.shift == other.shift and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    # ---------------------------------------------------------------- what a kind provides

    def _alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        raise NotImplementedError

    def _lambda(self, t: Array) -> Array:
        raise NotImplementedError

    def _t_of_lambda(self, lambda_: Array) -> Array:
        raise NotImplementedError

    def _checked_time(self, t: ArrayLike) -> Array:
        value = np.asarray(t, dtype=np.float64)
        slack = _SLACK * (self.t_max - self.t_clean)
        if np.any(~((value >= self.t_clean - slack) & (value <= self.t_max + slack))):
            raise UserError(
                f"time must lie between {self.t_clean:g} (clean) and {self.t_max:g} (noise) for this "
                f"{self.kind} schedule, but is {value}"
            )
        return np.clip(value, self.t_clean, self.t_max)


class _VP(NoiseSchedule):
    """Variance preserving: everything follows from log alpha and its inverse."""

    def _log_alpha(self, t: Array) -> Array:
        raise NotImplementedError

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        raise NotImplementedError

    def _alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        log_alpha = self._log_alpha(t)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2.0 * log_alpha))

    def _lambda(self, t: Array) -> Array:
        log_alpha = self._log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2.0 * log_alpha))

    def _t_of_lambda(self, lambda_: Array) -> Array:
        return self._t_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * lambda_))


class _Discrete(_VP):
    """log alpha piecewise linear in t through the training steps and through (-1, 0), the clean image.

    With zero terminal SNR log alpha ends at -inf; on that last segment *alpha* is linear instead.
    """

    kind = "discrete"

    def __init__(self, log_alpha: Array) -> None:
        if np.any(np.diff(log_alpha) > 0):
            raise UserError("the noise level must not fall from one training step to the next")
        self.num_train_timesteps = len(log_alpha)
        self.t_clean, self.t_min, self.t_max = -1.0, 0.0, len(log_alpha) - 1.0
        self._ends_in_noise = bool(np.isneginf(log_alpha[-1]))
        finite = log_alpha[:-1] if self._ends_in_noise else log_alpha
        self._knots = np.concatenate([[0.0], finite])
        self._times = np.arange(-1.0, len(finite))

    def _log_alpha(self, t: Array) -> Array:
        inner = np.interp(t, self._times, self._knots)
        if not self._ends_in_noise:
            return inner
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = self._knots[-1] + np.log(np.clip(self.t_max - t, 0.0, 1.0))
        return np.where(t > self._times[-1], tail, inner)

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        inner = np.interp(-log_alpha, -self._knots, self._times)
        if not self._ends_in_noise:
            return inner
        tail = self.t_max - np.exp(np.minimum(log_alpha - self._knots[-1], 0.0))
        return np.where(log_alpha < self._knots[-1], tail, inner)


class _VPLinear(_VP):
    kind = "vp-linear"

    def __init__(self, beta_min: float, beta_max: float, time_scale: float, num_train_timesteps: int) -> None:
        self._beta_min, self._slope, self._scale = beta_min, beta_max - beta_min, time_scale
        self.num_train_timesteps = num_train_timesteps
        self.t_clean, self.t_min, self.t_max = 0.0, 1e-3 * time_scale, time_scale

    def _log_alpha(self, t: Array) -> Array:
        s = t / self._scale
        return -0.25 * s * s * self._slope - 0.5 * s * self._beta_min

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        # The root of slope/4 s^2 + beta_min/2 s + log alpha, in the form that does not cancel near s = 0.
        q = -4.0 * self._slope * log_alpha
        return self._scale * q / ((np.sqrt(self._beta_min**2 + q) + self._beta_min) * self._slope)


class _VPCosine(_VP):
    kind = "vp-cosine"

    def __init__(self, s: float, time_scale: float, num_train_timesteps: int) -> None:
        self._s, self._scale = s, time_scale
        self.num_train_timesteps = num_train_timesteps
        self._offset = math.log(math.cos(0.5 * math.pi * s / (1 + s)))
        # Beyond 0.9946 beta would exceed the usual cap (DPM-Solver, appendix D).
        self.t_clean, self.t_min, self.t_max = 0.0, 1e-3 * time_scale, 0.9946 * time_scale

    def _log_alpha(self, t: Array) -> Array:
        angle = 0.5 * math.pi * (t / self._scale + self._s) / (1 + self._s)
        return np.minimum(np.log(np.cos(angle)) - self._offset, 0.0)

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        angle = np.arccos(np.minimum(np.exp(log_alpha + self._offset), 1.0))
        return self._scale * (2.0 * (1 + self._s) / math.pi * angle - self._s)


class _Flow(NoiseSchedule):
    kind = "flow"

    def __init__(self, num_train_timesteps: int, shift: float) -> None:
        self.num_train_timesteps, self.shift = num_train_timesteps, shift
        self.t_clean, self.t_min, self.t_max = 0.0, 1.0, float(num_train_timesteps)

    def _alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        sigma = t / self.num_train_timesteps
        return 1.0 - sigma, sigma

    def _lambda(self, t: Array) -> Array:
        sigma = t / self.num_train_timesteps
        with np.errstate(divide="ignore"):
            return np.log1p(-sigma) - np.log(sigma)

    def _t_of_lambda(self, lambda_: Array) -> Array:
        return self.num_train_timesteps * np.exp(-np.logaddexp(0.0, lambda_))

    def t_of_sigma(self, sigma: ArrayLike) -> Array:
        return self._checked_time(np.asarray(sigma, dtype=np.float64) * self.num_train_timesteps)[()]

    def sigma_diffusers(self, t: ArrayLike) -> Array:
        return self.sigma(t)


class _EDM(NoiseSchedule):
    kind = "edm"

    def __init__(
        self, sigma_min: float, sigma_max: float, sigma_data: float, num_train_timesteps: int
    ) -> None:
        self.num_train_timesteps, self.sigma_data = num_train_timesteps, sigma_data
        # The clean end is at minus infinity; where it is put is exact in float32, as grids are.
        self.t_clean = -64.0
        self.t_min, self.t_max = 0.25 * math.log(sigma_min), 0.25 * math.log(sigma_max)

    def _alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        level = np.where(t > self.t_clean, np.exp(4.0 * t), 0.0)
        alpha = np.where(t > self.t_clean, 1.0 / np.hypot(level, self.sigma_data), 1.0)
        return alpha[()], (alpha * level)[()]

    def _lambda(self, t: Array) -> Array:
        return np.where(t > self.t_clean, -4.0 * t, math.inf)[()]

    def _t_of_lambda(self, lambda_: Array) -> Array:
        return -0.25 * lambda_


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config describes a flow-matching model (see :meth:`NoiseSchedule.from_config`)."""
    return (
        config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas", False))
        or str(config.get("_class_name", "")).startswith("FlowMatch")
        or ("shift" in config and "beta_start" not in config)
    )


def edm_options(config: Mapping[str, Any]) -> dict[str, float]:
    """sigma_min, sigma_max and sigma_data of a scheduler config that describes an EDM model; {} for others.

    Raises:
        UserError: noise levels of another kind that has no training steps either.
    """
    name = str(config.get("_class_name", ""))
    data = config.get("sigma_data")
    if name.startswith(("CMStochastic", "Cosine")) or "clip_denoised" in config:
        data = None  # times of another unit than EDM's, in spite of it
    elif data is None and config.get("timestep_type") == "continuous":
        data = 1.0  # diffusers' Euler scheduler, c_in = 1/sqrt(s^2 + 1)
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if data is not None and low is not None and high is not None:
        return {"sigma_min": float(low), "sigma_max": float(high), "sigma_data": float(data)}
    if data is not None or (high is not None and "beta_start" not in config):
        raise UserError(
            f"this scheduler config{f' of {name}' * bool(name)} has noise levels that are neither those of "
            "training steps (betas), nor a flow's, nor EDM's (sigma_min, sigma_max and sigma_data)"
        )
    return {}


def prediction_of(config: Mapping[str, Any], schedule: NoiseSchedule) -> str:
    """What a network with this scheduler config predicts, a key of
    :data:`~diffalign.solvers.prediction.PREDICTIONS`.

    Flow models predict the velocity unless they say ``sample``. An EDM model's ``epsilon`` is not the noise
    but the network's raw output, which the preconditioning makes an image of: ``edm``.

    Raises:
        UserError: EDM with ``v_prediction`` and a sigma_data other than 1, which no model has.
    """
    told = config.get("prediction_type")
    if schedule.is_flow:
        return "sample" if told == "sample" else "flow_prediction"
    if schedule.kind != "edm":
        return told or "epsilon"
    if told == "v_prediction" and schedule.sigma_data != 1.0:
        raise UserError(
            f"an EDM model of prediction type v_prediction needs sigma_data = 1, not {schedule.sigma_data:g}"
        )
    return "edm" if told in (None, "epsilon") else told
