"""A denoising problem with known answers: data from a Gaussian mixture, whose ideal network is a formula.

The sampler tests and benchmarks measure against it: the exact prediction at any time and noise level, with or
without guidance, and the probability-flow ODE solved to nearly machine precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import training_target

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianMixture:
    """``x0 ~ sum_k weights_k N(means_k, stds_k^2 I)`` over flattened samples of D numbers.

    Attributes:
        means: (K, D).
        stds, weights: (K,); the weights sum to 1.
        labels: (K,) ints, the class of each component.
        shape: of one sample, with product D.
    """

    means: Array
    stds: Array
    weights: Array
    labels: NDArray[np.int64]
    shape: tuple[int, ...]

    @classmethod
    def random(
        cls,
        shape: Sequence[int] = (4, 8, 8),
        *,
        components: int = 6,
        classes: int = 3,
        spread: float = 1.0,
        seed: int = 0,
    ) -> GaussianMixture:
        """A mixture drawn from `seed`: means ``spread N(0, I)``, stds in [0.15, 0.45], labels in turn."""
        rng = np.random.default_rng(seed)
        means = spread * rng.standard_normal((components, math.prod(shape)))
        stds = 0.15 + 0.3 * rng.random(components)
        weights = 0.5 + rng.random(components)
        return cls(means, stds, weights / weights.sum(), np.arange(components) % classes, tuple(shape))

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """(count, *shape) float64 draws of x0."""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size=count, p=self.weights)
        x = self.means[k] + self.stds[k, None] * rng.standard_normal((count, self.means.shape[1]))
        return torch.from_numpy(x.reshape(count, *self.shape))

    def posterior(
        self, x: Tensor, alpha: float, sigma: float, classes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The exact ``E[x0 | x]`` and ``E[eps | x]`` at ``x = alpha x0 + sigma eps``, computed in float64.

        Args:
            x: (B, *shape) of any floating dtype, which the results have too. Differentiable in x.
            alpha, sigma: levels of x; either may be 0.
            classes: one class per sample, to which the mixture is restricted; None for all of it.
        """
        flat = x.reshape(len(x), -1).double()
        means, stds, log_weights = (
            torch.as_tensor(v, dtype=torch.float64, device=x.device)
            for v in (self.means, self.stds, np.log(self.weights))
        )
        variance = alpha**2 * stds**2 + sigma**2
        centred = flat[:, None, :] - alpha * means
        logits = log_weights - 0.5 * flat.shape[1] * variance.log()
        logits = logits - centred.square().sum(-1) / (2 * variance)
        if classes is not None:
            other = torch.as_tensor(self.labels)[None, :] != torch.as_tensor(classes)[:, None]
            logits = logits.masked_fill(other.to(x.device), -torch.inf)
        responsibility = logits.softmax(-1)
        scaled = (responsibility / variance)[:, :, None] * centred
        data = responsibility @ means + alpha * (stds.square()[:, None] * scaled).sum(1)
        return data.reshape(x.shape).to(x.dtype), (sigma * scaled.sum(1)).reshape(x.shape).to(x.dtype)

    def model(
        self,
        schedule: NoiseSchedule,
        *,
        prediction_type: str = "epsilon",
        guidance_scale: float | None = None,
        classes: Sequence[int] | None = None,
    ) -> Callable[[Tensor, Tensor | float], Tensor]:
        """The ideal network ``(x, t) -> prediction`` for `schedule`; t may be fractional.

        Args:
            schedule: what t means.
            prediction_type: of the output.
            guidance_scale: classifier-free guidance ``eps_u + scale (eps_c - eps_u)`` towards `classes`.
            classes: one class per sample; conditional without guidance if no scale is given.
        """
        if guidance_scale is not None and classes is None:
            raise UserError("guidance needs classes, one per sample")

        def network(x: Tensor, t: Tensor | float) -> Tensor:
            alpha, sigma = (float(v) for v in schedule.alpha_sigma(float(t)))
            data, epsilon = self._guided(x, alpha, sigma, guidance_scale, classes)
            return training_target(prediction_type, data, epsilon, alpha, sigma).to(x.dtype)

        return network

    def _guided(
        self, x: Tensor, alpha: float, sigma: float, scale: float | None, classes: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        data, epsilon = self.posterior(x, alpha, sigma, classes)
        if scale is None:
            return data, epsilon
        free_data, free_epsilon = self.posterior(x, alpha, sigma)
        return free_data + scale * (data - free_data), free_epsilon + scale * (epsilon - free_epsilon)

    def solve(
        self,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        t_start: float | None = None,
        t_end: float | None = None,
        guidance_scale: float | None = None,
        classes: Sequence[int] | None = None,
        tolerance: float = 1e-11,
    ) -> Tensor:
        """The probability-flow ODE from `noise` at `t_start` to `t_end`, by DOP853 in half log-SNR.

        Args:
            noise: (B, *shape), the state at `t_start`; float64 in, float64 out.
            schedule: its lambda must be finite at `t_start`.
            t_start, t_end: ``t_max`` and the clean image unless given. The clean end is taken at
                sigma/alpha = 1e-6, where x differs from x0 by that much.
            guidance_scale, classes: as in :meth:`model`.
            tolerance: relative and absolute.
        """
        from scipy.integrate import solve_ivp

        t_end = schedule.t_clean if t_end is None else t_end
        start = float(schedule.lambda_(schedule.t_max if t_start is None else t_start))
        end = min(float(schedule.lambda_(t_end)), -math.log(1e-6))
        if not math.isfinite(start):
            raise UserError("the ODE cannot start where alpha is 0: pass t_start below the noisy end")

        def levels(lambda_: float) -> tuple[float, float]:
            alpha, sigma = schedule.alpha_sigma(schedule.t_of_lambda(lambda_))
            return float(alpha), float(sigma)

        def slope(lambda_: float, y: Array) -> Array:
            # y = x / alpha obeys dy/dlambda = -exp(-lambda) eps for every schedule.
            alpha, sigma = levels(lambda_)
            x = torch.from_numpy(alpha * y).reshape(noise.shape)
            _, epsilon = self._guided(x, alpha, sigma, guidance_scale, classes)
            return -math.exp(-lambda_) * epsilon.numpy().reshape(-1)

        y0 = noise.double().cpu().numpy().reshape(-1) / levels(start)[0]
        solution = solve_ivp(slope, (start, end), y0, method="DOP853", rtol=tolerance, atol=tolerance)
        x = float(schedule.alpha(t_end)) * solution.y[:, -1]
        return torch.from_numpy(x.reshape(noise.shape)).to(noise)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` over all numbers of the batch."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())
