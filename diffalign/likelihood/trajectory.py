"""The trajectory view: the steps of a stochastic sampler, each a Gaussian around what the network says.

Every published sampler that preference methods train on draws its next state as::

    x' = alpha' x0 + d eps + std z,    z ~ N(0, I)

where ``x0`` and ``eps`` are the network's beliefs at ``x`` and ``(d, std)`` depend on the two noise levels
alone. Such a pair is a *law* (:data:`LAWS`). Both beliefs are affine in the state and in the network's output
whatever its prediction type, hence so is the mean, ``mean = a x + b f(x, t)``: a sampler is three numbers per
step (:class:`Transition`), and the log-ratio of two policies is that of two Gaussians of one width.

Means over the elements of a row, not sums, are what published betas and clip ranges belong to; the true
log-ratio is the number of elements times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from diffalign.errors import UserError, suggestion
from diffalign.likelihood.forward import Conditions, Denoise, Reduce
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import check_prediction_type, coefficients

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, std^2)`` per element.

    ``mean (rows, ...)``, differentiable, and ``std``, broadcastable to it, without gradient; both float32
    (float64 for float64 states). A row of std 0 is a deterministic step: it has no density, and its
    log-probability and log-ratio are NaN or infinite, never clamped to look usable.
    """

    mean: Tensor
    std: Tensor

    def log_prob(self, x: Tensor, reduce: Reduce = "mean") -> Tensor:
        """``-(x - mean)^2 / (2 std^2) - log std - 1/2 log 2 pi``, ``(rows,)``; no gradient through ``x``.

        To compare two policies take :meth:`log_ratio`: their log-probabilities are large and nearly equal.
        """
        z = (x.detach().to(self.mean) - self.mean) / self.std
        return _reduced(-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi), reduce)

    def log_ratio(self, other: Gaussian, x: Tensor, reduce: Reduce = "mean") -> Tensor:
        """``log p(x) - log p_other(x)`` of two Gaussians of the same std, ``(rows,)``: with means m and o,
        ``(m - o) . ((x - m) + (x - o)) / (2 std^2)``, which is exactly 0 where they agree."""
        x = x.detach().to(self.mean)
        product = (self.mean - other.mean) * ((x - self.mean) + (x - other.mean))
        return _reduced(product / (2 * self.std.square()), reduce)

    def kl(self, other: Gaussian, reduce: Reduce = "mean") -> Tensor:
        """``KL(self || other) = (m - o)^2 / (2 std^2)`` of two Gaussians of the same std, ``(rows,)``."""
        return _reduced((self.mean - other.mean).square() / (2 * self.std.square()), reduce)

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std noise``; ``noise (rows, ...)`` or, for k draws from each row, ``(k, rows, ...)``."""
        return self.mean + self.std * noise.to(self.mean)

    def rows(self, index: Sequence[int] | Tensor) -> Gaussian:
        """The rows at ``index``, which may repeat."""
        index = torch.as_tensor(index, device=self.mean.device)
        std = self.std if self.std.shape[0] == 1 else self.std[index]
        return Gaussian(self.mean[index], std)


def _reduced(values: Tensor, reduce: Reduce) -> Tensor:
    flat = values.flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


# ------------------------------------------------------------------------------------------------ laws
# (alpha, sigma) of the state and of the next one -> (d, std), float64 arrays.


def ddim(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array, *, eta: float = 1.0) -> Any:
    """``std = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)``: DDIM (Song et al. 2021, eq. 16).

    At eta 1 this is ancestral sampling, and in the variance-exploding variable x / alpha exactly the
    Euler-ancestral step ``s_up^2 = s'^2 (s^2 - s'^2) / s^2``.
    """
    if not 0 <= eta <= 1:  # beyond, a state would have more noise than belongs to its time
        raise UserError(f"eta must lie between 0 and 1, but is {eta}")
    std = eta * sigma_next * np.sqrt(np.maximum(0.0, 1.0 - (alpha * sigma_next / (alpha_next * sigma)) ** 2))
    return np.sqrt(np.maximum(0.0, sigma_next**2 - std**2)), std


def euler_ancestral(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> Any:
    """:func:`ddim` at eta 1, by the name that few-step models know it by (PSO's SDXL-Turbo)."""
    return ddim(alpha, sigma, alpha_next, sigma_next, eta=1.0)


def renoise(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> Any:
    """``x' = alpha' x0 + sigma' z``: predict the image, noise it anew (LCM, DMD2)."""
    return np.zeros_like(sigma_next), sigma_next


def flow_sde(
    alpha: Array,
    sigma: Array,
    alpha_next: Array,
    sigma_next: Array,
    *,
    noise_level: float = 0.7,
    last_noise: bool = False,
) -> Any:
    """Euler-Maruyama on the SDE that shares the marginals of a rectified flow (Flow-GRPO, Liu et al. 2025,
    eq. 9): ``std^2 = g^2 (sigma - sigma')``, ``g^2 = noise_level^2 sigma / (1 - sigma)``.

    Where sigma is 1 its successor stands in for it in ``1 - sigma``. The mean, written in x and the velocity
    there, is ``alpha' x0 + (sigma' - std^2 / (2 sigma)) eps``. A last step to sigma 0 adds no noise, as
    nothing would take it away again; ``last_noise`` adds it, as published.
    """
    if np.any(np.abs(alpha + sigma - 1) > 1e-6):
        raise UserError("the transition flow_sde is for flow models; choose ddim")
    start = np.where(sigma >= 1.0, sigma_next, sigma)
    variance = noise_level**2 * sigma / (1.0 - start) * (sigma - sigma_next)
    if not last_noise:
        variance = np.where(sigma_next > 0, variance, 0.0)
    return sigma_next - variance / (2.0 * sigma), np.sqrt(variance)


#: name -> law, with its own options as keyword arguments.
LAWS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "renoise": renoise,
    "flow_sde": flow_sde,
}


# ------------------------------------------------------------------------------------------------ steps


@dataclass(frozen=True, eq=False)
class Transition:
    """The n steps of a stochastic sampler: ``x' ~ N(state x + output f, std^2)``.

    Attributes:
        timesteps: ``(n,)`` times at which the network is asked.
        state, output, std: ``(n,)`` float64 coefficients of each step.
        x0_state, x0_output: ``(n,)``, the same for the predicted clean latent.
    """

    timesteps: Array
    state: Array
    output: Array
    std: Array
    x0_state: Array
    x0_output: Array

    @staticmethod
    def along(
        schedule: NoiseSchedule, kind: str, times: ArrayLike, *, law: str = "ddim", **options: float
    ) -> Transition:
        """The steps through ``times``.

        Args:
            schedule, kind: of the model; its prediction type as in :mod:`diffalign.solvers.prediction`.
            times: ``(n + 1,)``, falling: where the network is asked, then where the last step ends. At
                ``schedule.t_clean`` it ends in the clean latent, without noise.
            law, options: a row of :data:`LAWS`, and its keyword arguments (``eta``, ``noise_level``).

        Raises:
            UserError: unknown law or option, times that don't fall.
        """
        along = np.asarray(times, dtype=np.float64)
        if along.ndim != 1 or len(along) < 2 or not np.all(np.diff(along) < 0):
            raise UserError(f"the times of a sampler must fall step by step, but they are {along.tolist()}")
        alpha, sigma = schedule.alpha_sigma(along)
        return Transition.between(
            alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], kind, along[:-1], law=law, **options
        )

    @staticmethod
    def between(
        alpha: ArrayLike,
        sigma: ArrayLike,
        alpha_next: ArrayLike,
        sigma_next: ArrayLike,
        kind: str,
        timesteps: ArrayLike | None = None,
        *,
        law: str = "ddim",
        **options: float,
    ) -> Transition:
        """The steps between given noise levels, each ``(n,)``; they need not form a chain. For
        variance-exploding states alpha is 1 throughout."""
        a, s, a_next, s_next = (
            np.atleast_1d(np.asarray(level, dtype=np.float64))
            for level in (alpha, sigma, alpha_next, sigma_next)
        )
        check_prediction_type(kind)
        if law not in LAWS:
            raise UserError(
                f"unknown transition {law!r}{suggestion(law, list(LAWS))} (known: {', '.join(LAWS)})"
            )
        try:
            direction, std = LAWS[law](a, s, a_next, s_next, **options)
        except TypeError as error:
            raise UserError(f"the transition {law} does not take {', '.join(options)}") from error
        to_x0, to_eps = (coefficients(kind, to, a, s) for to in ("sample", "epsilon"))
        state, output = (a_next * x0 + direction * eps for x0, eps in zip(to_x0, to_eps, strict=True))
        if not np.all(np.isfinite(output)):
            raise UserError("the first step starts from pure noise, where an epsilon model knows no image")
        ones = np.ones_like(a)
        return Transition(
            np.zeros_like(a) if timesteps is None else np.asarray(timesteps, dtype=np.float64),
            state * ones,
            output * ones,
            std * ones,
            to_x0[0] * ones,
            to_x0[1] * ones,
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def stochastic(self) -> NDArray[np.int64]:
        """The steps that have a density, and so can be learnt from."""
        return np.flatnonzero(self.std > 0)

    @cached_property
    def kl_weight(self) -> Array:
        """``(n,)``, the KL of a step per mean square difference of the network's outputs: the bridge to the
        forward view. Infinite where the step is deterministic."""
        with np.errstate(divide="ignore"):
            return self.output**2 / (2 * self.std**2)

    def __call__(self, raw: Tensor, x: Tensor, step: int | Sequence[int] | NDArray[Any]) -> Gaussian:
        """Where the step from ``x`` goes.

        Args:
            raw: the network's output at ``x``, ``(rows, ...)``.
            x: the state it saw, in the dtype it saw.
            step: which one; one number, or one per row.
        """
        state, output, std = self._at(step, raw, x, self.state, self.output, self.std)
        return Gaussian(state * x.to(state) + output * raw.to(state), std)

    def predicted_x0(self, raw: Tensor, x: Tensor, step: int | Sequence[int] | NDArray[Any]) -> Tensor:
        """The network's belief of the clean latent, ``(rows, ...)``; arguments as above."""
        state, output = self._at(step, raw, x, self.x0_state, self.x0_output)
        return state * x.to(state) + output * raw.to(state)

    def times(self, step: int | Sequence[int] | NDArray[Any], like: Tensor) -> Tensor:
        """``(rows,)`` network times of the rows of ``like``: integers where all of the sampler's are."""
        whole = np.all(self.timesteps == np.round(self.timesteps))
        rows = torch.as_tensor(self.timesteps[np.asarray(step)], dtype=torch.long if whole else torch.float32)
        return rows.expand(len(like)).to(like.device)

    @staticmethod
    def _at(step: Any, raw: Tensor, x: Tensor, *tables: Array) -> list[Tensor]:
        """The tables' entries at ``step``, ready to broadcast, in float32 or better, in one transfer."""
        dtype = torch.promote_types(torch.promote_types(raw.dtype, x.dtype), torch.float32)
        rows = np.atleast_1d(np.asarray(step))
        picked = torch.from_numpy(np.stack([table[rows] for table in tables])).to(dtype).to(x.device)
        return list(picked.reshape(len(tables), -1, *[1] * (x.ndim - 1)))


def guided(
    denoise: Denoise,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    uncond: Conditions | None,
    scale: float,
    *,
    reference: bool = False,
    detach_uncond: bool = False,
) -> Tensor:
    """``u + scale (c - u)``, both branches in one call of the network; without ``uncond`` or at scale 1 the
    conditional prediction alone.

    Guidance belongs to the policy whose likelihood is taken: what was sampled with it is trained with it.

    Args:
        denoise, x_t, t, cond: see :class:`~diffalign.likelihood.Denoise`.
        uncond: conditions of the unconditional branch, each ``(rows, ...)``.
        reference: answer as the reference.
        detach_uncond: no gradient through the unconditional branch.

    Returns:
        Prediction, in float32 or better.
    """
    if uncond is None or scale == 1.0:
        raw = denoise(x_t, t, cond, reference=reference)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))
    both = {name: torch.cat([uncond[name].to(values), values]) for name, values in cond.items()}
    raw = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both, reference=reference)
    free, towards = raw.to(torch.promote_types(raw.dtype, torch.float32)).chunk(2)
    if detach_uncond:
        free = free.detach()
    return free + scale * (towards - free)
