"""The forward view: noise a clean latent, let the network predict, and compare::

    x_t = alpha(t) x0 + sigma(t) eps
    err = w(t) * mean((f(x_t, t, c) - y)^2)          y: the network's training target
    ell = -1/2 err                                   surrogate for log p(x0 | c)

(Wallace et al. 2023; the weight of the evidence lower bound is folded into ``w`` and beta.) Rows of pairs are
ordered ``[chosen_1..chosen_B, rejected_1..rejected_B]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError, suggestion
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import training_target

Conditions = Mapping[str, Tensor]
Reduce = Literal["mean", "sum"]


class Denoise(Protocol):
    """``denoise(x_t, t, cond, reference=False) -> prediction``, of the shape of ``x_t``."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditions, reference: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Noised:
    """Clean latents on their way to the network.

    ``x_t``, ``target``: ``(rows, C, ...)``, float32 (float64 for float64 latents); ``t``: ``(rows,)``, on the
    latents' device.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor


def add_noise(schedule: NoiseSchedule, kind: str, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
    """``x_t = alpha x0 + sigma noise`` and what a network of prediction type ``kind`` should say about it.

    Args:
        schedule: gives alpha and sigma, in float64.
        kind: the model's own prediction type, e.g. ``"epsilon"`` or ``"v_prediction"``.
        x0: ``(rows, C, ...)`` clean latents.
        noise: of the shape of ``x0``.
        t: ``(rows,)`` times in the network's unit, integer or fractional, in host memory (on a GPU they would
            have to be waited for).
    """
    alpha, sigma = (torch.as_tensor(level) for level in schedule.alpha_sigma(t.cpu().numpy()))
    target = training_target(kind, x0, noise, alpha, sigma)  # in float32 or better
    shape = (-1, *[1] * (x0.ndim - 1))
    alpha, sigma = (level.to(target.device, target.dtype).reshape(shape) for level in (alpha, sigma))
    return Noised(alpha * x0.to(target) + sigma * noise.to(target), target, t.to(x0.device))


def denoising_error(
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduce: Reduce = "mean",
) -> Tensor:
    """``w * R[(prediction - target)^2]`` per row, in float32 (float64 if both inputs are).

    Args:
        prediction, target: ``(rows, C, ...)``.
        weight: ``(rows,)`` or None for 1.
        mask: broadcastable to the inputs; only elements where it is non-zero count (for the mean as well).
        reduce: ``"mean"`` over the elements of a row, or ``"sum"``. A beta for sums is the beta for means
            divided by the number of elements (16384 for SD 1.5 at 512 px).

    Returns:
        ``(rows,)``.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square()
    if mask is not None:
        mask = mask.to(dtype).expand_as(error)
        error = error * mask
    error = error.flatten(1).sum(1)
    if reduce == "mean":
        error = error / (target[0].numel() if mask is None else mask.flatten(1).sum(1))
    return error if weight is None else error * weight.to(dtype)


@dataclass(frozen=True)
class Errors:
    """Denoising errors ``(rows,)`` of the policy and, unless there is none, of the reference.

    Where a loss looks at predictions: ``residual`` is ``f - y`` and ``shift`` is ``f - f_ref``, both
    ``(rows, C, ...)`` float32, with the policy's gradient. ``single``: of averages, what was averaged.
    """

    policy: Tensor
    reference: Tensor | None
    residual: Tensor | None = None
    shift: Tensor | None = None
    single: Errors | None = None

    def log_ratio(self) -> Tensor:
        """``ell_policy - ell_reference``, or ``ell_policy`` without a reference; ``(rows,)``."""
        return -0.5 * (self.policy if self.reference is None else self.policy - self.reference)

    def averaged(self, draws: int, sides: int) -> Errors:
        """Means over several draws of noise and time per image: nearer to its likelihood by that much.

        Rows are those of `sides` images, each with `draws` draws, each of the B examples: ``(sides * draws *
        B,)`` become ``(sides * B,)``.
        """
        if draws == 1:
            return self

        def mean(rows: Tensor) -> Tensor:
            return rows.reshape(sides, draws, -1).mean(1).flatten()

        reference = None if self.reference is None else mean(self.reference)
        return Errors(mean(self.policy), reference, single=self)


def evaluate(
    denoise: Denoise,
    noised: Noised,
    cond: Conditions,
    *,
    reference: bool | Tensor = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduce: Reduce = "mean",
    predictions: bool = False,
) -> Errors:
    """Errors of policy and reference on the very same ``x_t``, conditions and rows.

    The reference comes first and leaves nothing behind but its errors, so it adds nothing to the peak memory
    of the policy's graph.

    Args:
        denoise: see :class:`Denoise`; the policy's call is differentiated.
        noised: from :func:`add_noise`.
        cond: what the network is conditioned on, each tensor ``(rows, ...)``.
        reference: True runs it, a tensor ``(rows,)`` is its errors known beforehand, before
            weighting, False is no reference.
        weight, mask, reduce: see :func:`denoising_error`.
        predictions: give ``residual`` and, where the reference is run, ``shift`` as well.
    """

    def predict(as_reference: bool) -> Tensor:
        prediction = denoise(noised.x_t, noised.t, cond, reference=as_reference)
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def error(prediction: Tensor) -> Tensor:
        return denoising_error(prediction, noised.target, weight=weight, mask=mask, reduce=reduce)

    known, before = None, None
    if isinstance(reference, Tensor):
        known = reference if weight is None else reference * weight.to(reference.dtype)
    if reference is True:
        with torch.no_grad():
            before = predict(True)
            known = error(before)
            before = before if predictions else None
    after = predict(False)
    return Errors(
        error(after),
        known,
        residual=after - noised.target if predictions else None,
        shift=None if before is None else after - before,
    )


# What turns the error of each prediction type into the error of epsilon, for one and the same denoiser at the
# same x_t: a change d(x0) of its belief changes eps by -(alpha/sigma) d(x0), and the rest follows.
_TO_EPSILON: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "epsilon": lambda a, s: np.ones_like(a),
    "sample": lambda a, s: (a / s) ** 2,
    "v_prediction": lambda a, s: (a / (a * a + s * s)) ** 2,
    "flow_prediction": lambda a, s: (a / (a + s)) ** 2,
    "edm": lambda a, s: 1.0 - s * s,
}
WEIGHTINGS = ("native", "eps", "x0", "v", "flow", "snr_gamma", "elbo")
_TARGET_OF = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}


def error_weight(
    name: str | Callable[[Tensor], Tensor],
    schedule: NoiseSchedule,
    kind: str,
    t: Tensor,
    *,
    gamma: float = 5.0,
) -> Tensor | None:
    """``w(t)`` that makes the error of a ``kind`` network what ``name`` says.

    Args:
        name: ``native``: 1, the network's own error (what every published trainer uses; puts far more weight
            on high noise for v and flow models than for epsilon models). ``eps``, ``x0``, ``v``, ``flow``:
            the error the same denoiser would have in that parametrisation. ``snr_gamma``: ``min(SNR,
            gamma)/SNR`` on the epsilon error (Hang et al. 2023). ``elbo``: ``1/2 |d log SNR / d(t/N)|`` on
            it (Kingma et al. 2021; t/N is an EDM model's share of its range of log sigma). A function of
            ``t`` gives ``(rows,)`` weights of its own on the network's own error.
        schedule, kind: of the model.
        t: ``(rows,)`` times in host memory.
        gamma: of ``snr_gamma``.

    Returns:
        ``(rows,)`` float64 on the host, None for ``native``, or what the function gives.

    Raises:
        UserError: unknown name.
    """
    if callable(name):
        return name(t)
    if name not in WEIGHTINGS:
        raise UserError(
            f"unknown weighting {name!r}{suggestion(name, list(WEIGHTINGS))} (known: {', '.join(WEIGHTINGS)})"
        )
    if name == "native":
        return None
    times = t.cpu().numpy().astype(np.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    weight = _TO_EPSILON[kind](alpha, sigma)
    if name in _TARGET_OF:
        weight = weight / _TO_EPSILON[_TARGET_OF[name]](alpha, sigma)
    elif name == "snr_gamma":
        weight = weight * np.minimum(1.0, gamma * (sigma / alpha) ** 2)
    else:
        whole = 1.0 / (schedule.fraction(1.0) - schedule.fraction(0.0))  # all of the schedule, in its unit
        half = 0.5 * whole / schedule.num_train_timesteps
        low, high = (np.clip(times + step, schedule.t_min, schedule.t_max) for step in (-half, half))
        slope = (schedule.lambda_(low) - schedule.lambda_(high)) / (high - low)
        weight = weight * slope * whole
    return torch.as_tensor(weight)
