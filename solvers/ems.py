"""Estimating DPM-Solver-v3's statistics for any network (Zheng et al. 2023, section 3.2 and appendix).

At noisy points ``x = alpha x0 + sigma z`` of each lambda, with ``f = (sigma eps - l x) / alpha`` and primes
for total derivatives along the probability-flow ODE,

    l = mean of diag(sigma d eps / d x),        s = cov(f, f') / var(f),        b = mean f' - s mean f

per coordinate. f and f' are combinations of ``p = e^{-lambda} eps``, ``q = e^{-lambda} eps'`` and
``y = x / alpha`` with coefficients that don't depend on the point,

    f = p - l y,        f' = (l - 1) p + q - (dl/dlambda) y,

so sums of products of the three are all one needs, l included: :class:`Sums` of one pass over the points,
which add over batches, machines and interruptions. No code was published for this part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.noise import Array, NoiseSchedule
from diffalign.solvers.prediction import check_prediction_type, coefficients
from diffalign.solvers.statistics import Sidecar, Statistics, sampling_range

#: ``(x, t, items) -> output``: the network, guided if it is to be used so, at the points that belong to the
#: data ``items`` ((B,) indices, for their prompts). t is a 0-d tensor.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]

_NAMES = ("trace", "p", "q", "y", "pp", "pq", "py", "qy", "yy")
# Finite differences: the perturbation of x, relative to its size.
_SPACE_STEP = 1e-3
# Derivatives of the two kinds agree to this when forward mode does what it should.
_PROBE_TOLERANCE = 0.1
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Sums(Sidecar):
    """Sums over points, float64, one row per lambda; add those of different points with ``+``.

    Attributes:
        lambdas: (N + 1,).
        moments: (9, N + 1, C, ...) in the order trace, p, q, y, pp, pq, py, qy, yy (see the module).
        count: points per row.
        info: what must agree for sums to be added: schedule, guidance, ...
    """

    lambdas: Array
    moments: Array
    count: int
    info: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "ems-sums"

    def __add__(self, other: Sums) -> Sums:
        if self.info != other.info or not np.array_equal(self.lambdas, other.lambdas):
            raise UserError("these sums are of different models, schedules or settings and cannot be added")
        return replace(self, moments=self.moments + other.moments, count=self.count + other.count)

    def arrays(self) -> dict[str, Array]:
        return {"lambdas": self.lambdas, "moments": self.moments}

    def metadata(self) -> dict[str, Any]:
        return {"count": self.count, "info": self.info}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array], metadata: dict[str, Any]) -> Sums:
        return cls(arrays["lambdas"], arrays["moments"], metadata["count"], metadata["info"])

    def statistics(self, pooled: str | None = "space", dtype: type = np.float32) -> Statistics:
        """l, s and b of the points so far.

        Args:
            pooled: average them over ``"space"`` or ``"all"`` (:meth:`Statistics.pooled`), or None.
            dtype: ``np.float32``, or ``np.float64``.

        Raises:
            UserError: fewer than two points.
        """
        if self.count < 2:
            raise UserError("statistics need at least two points per row; use more samples")
        trace, p, q, y, pp, pq, py, qy, yy = self.moments / self.count
        l = trace  # noqa: E741
        slope = np.gradient(l, self.lambdas, axis=0)
        mean, rate = p - l * y, (l - 1.0) * p + q - slope * y
        square = pp - 2.0 * l * py + l**2 * yy
        product = (l - 1.0) * pp + pq - slope * py - l * ((l - 1.0) * py + qy - slope * yy)
        variance = np.maximum(square - mean**2, _LEAST_VARIANCE * np.maximum(square, 1e-30))
        s = (product - mean * rate) / variance
        info = {**self.info, "samples": self.count, "intervals": len(self.lambdas) - 1}
        schedule = info.pop("schedule", "")
        l, s, b = (v.astype(dtype) for v in (l, s, rate - s * mean))  # noqa: E741
        found = Statistics(self.lambdas, l, s, b, schedule, info)
        return found if pooled is None else found.pooled(pooled)


def estimate(
    network: Network,
    x0: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    intervals: int = 60,
    seed: int = 0,
    batch_size: int = 16,
    derivative: str = "auto",
    shard: tuple[int, int] = (0, 1),
    resume: Sums | None = None,
    info: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Callable[[Sums], None] | None = None,
) -> Sums:
    """Sums over one noisy point per row and datum; ``.statistics()`` of them is what the sampler takes.

    Noise and probe of datum i depend on `seed` and i alone, so batches, shards and interruptions change
    nothing but the order of additions.

    Args:
        network: see :data:`Network`; float32 or float64.
        x0: (K, C, ...) clean latents: data, or samples of the model itself at the guidance in question.
        schedule: of the model.
        prediction_type: of the network's output.
        intervals: N of the uniform lambda grid.
        seed: of noise and probes.
        batch_size: points in the network at once.
        derivative: ``"jvp"`` (forward mode), ``"difference"``, or ``"auto"``: forward mode where it works and
            agrees with differences at a first batch.
        shard: (k, n): only every n-th datum, from the k-th on. Add the sums of all shards.
        resume: sums of an interrupted call with the same arguments.
        info: kept with the sums; sums add only where it agrees.
        progress: called as ``progress(done, total)`` in points.
        checkpoint: called with the sums after each batch.

    Raises:
        UserError: an argument is out of range, or a number of the network is not finite.
    """
    check_prediction_type(prediction_type)
    if derivative not in ("auto", "jvp", "difference"):
        raise UserError(f"derivative must be auto, jvp or difference, not {derivative!r}")
    if intervals < 2 or batch_size < 1 or not 0 <= shard[0] < shard[1]:
        raise UserError(
            "intervals must be at least 2, batch_size at least 1, and shard (k, n) with 0 <= k < n"
        )
    lambdas = np.linspace(*sampling_range(schedule), intervals + 1)
    info = {**(info or {}), "schedule": schedule.fingerprint(), "seed": seed, "shards": shard[1]}
    items = torch.arange(len(x0))[shard[0] :: shard[1]]
    sums = resume or Sums(lambdas, np.zeros((9, len(lambdas), *x0.shape[1:])), 0, info)
    if sums.info != info or sums.moments.shape[1:] != (len(lambdas), *x0.shape[1:]):
        raise UserError("the sums to resume from belong to other settings; start afresh")
    rule = Derivatives(network, schedule, prediction_type, float(np.diff(lambdas)[0]) / 2)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if derivative == "auto":
            part = items[: min(4, batch_size)]
            middle = float(lambdas[len(lambdas) // 2])
            x, probe = _points(x0, part, schedule, [middle], seed)
            rule = rule.chosen(x[0], middle, probe[0], part)
        else:
            rule = replace(rule, forward=(derivative == "jvp",) * 2)
        for first in range(sums.count, len(items), batch_size):
            part = items[first : first + batch_size]
            x, probe = _points(x0, part, schedule, lambdas, seed)
            batch = np.stack(
                [
                    _row_moments(rule, x[j], float(lambda_), probe[j], part)
                    for j, lambda_ in enumerate(lambdas)
                ],
                axis=1,
            )
            if not np.all(np.isfinite(batch)):
                raise UserError("the network gave numbers that are not finite; run it in float32")
            sums = replace(sums, moments=sums.moments + batch, count=sums.count + len(part))
            if progress is not None:
                progress(sums.count, len(items))
            if checkpoint is not None:
                checkpoint(sums)
    return sums


def _points(
    x0: Tensor, items: Tensor, schedule: NoiseSchedule, lambdas: Any, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Noisy points and Rademacher probes per lambda, each (B, C, ...), from one generator per datum."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + int(i)) for i in items]
    clean = x0[items.to(x0.device)]
    points, probes = [], []
    for lambda_ in lambdas:
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(schedule.t_of_lambda(lambda_)))
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
        signs = torch.stack([torch.randint(0, 2, x0.shape[1:], generator=g) for g in generators])
        points.append(alpha * clean + sigma * noise)
        probes.append((2 * signs - 1).to(x0))
    return points, probes


def _row_moments(rule: Derivatives, x: Tensor, lambda_: float, probe: Tensor, items: Tensor) -> Array:
    """(9, C, ...) sums over the batch."""
    trace, eps, rate = rule(x, lambda_, probe, items)
    alpha = float(rule.schedule.alpha(rule.schedule.t_of_lambda(lambda_)))
    decay = np.exp(-lambda_)
    p, q, y = (v.double() * c for v, c in ((eps, decay), (rate, decay), (x, 1.0 / alpha)))
    moments = (trace.double(), p, q, y, p * p, p * q, p * y, q * y, y * y)
    return np.stack([m.sum(0).cpu().numpy() for m in moments])


@dataclass(frozen=True)
class Derivatives:
    """What a row needs of the network at points x of one lambda.

    Attributes:
        network, schedule, prediction_type: as in :func:`estimate`.
        path_step: in lambda, of finite differences along the ODE.
        forward: whether the derivative in x, and the one along the ODE, are taken in forward mode.
    """

    network: Network
    schedule: NoiseSchedule
    prediction_type: str
    path_step: float
    forward: tuple[bool, bool] = (True, True)

    def __call__(
        self, x: Tensor, lambda_: float, probe: Tensor, items: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``v sigma J v``, eps and its total derivative d eps / d lambda along the ODE; all like x."""
        level = self._level(lambda_)
        time = torch.tensor(level[0], dtype=x.dtype, device=x.device)
        sigma = float(self.schedule.sigma(level[0]))
        if self.forward[0]:
            output, slope = _jvp(lambda z: self.network(z, time, items), (x,), (probe,))
        else:
            step = _SPACE_STEP * float(x.square().mean().sqrt())
            output = self.network(x, time, items)
            ends = [self.network(x + sign * step * probe, time, items) for sign in (1.0, -1.0)]
            slope = (ends[0] - ends[1]) / (2.0 * step)
        _, c_x, c_o, _ = level
        eps = c_x * x + c_o * output
        trace = sigma * probe * (c_x * probe + c_o * slope)
        # dx/dlambda = (d log alpha / dlambda) x - sigma eps, for every schedule.
        t_rate, x_rate, o_rate, growth = self._level_rates(lambda_)
        tangent = growth * x - sigma * eps
        if self.forward[1]:
            dt = torch.full_like(time, t_rate)
            _, change = _jvp(lambda z, t: self.network(z, t, items), (x, time), (tangent, dt))
            return trace, eps, x_rate * x + c_x * tangent + o_rate * output + c_o * change
        low, high = sampling_range(self.schedule)
        ends_at = max(lambda_ - self.path_step, low), min(lambda_ + self.path_step, high)
        before, after = (self._eps(x + (at - lambda_) * tangent, at, items) for at in ends_at)
        return trace, eps, (after - before) / (ends_at[1] - ends_at[0])

    def chosen(self, x: Tensor, lambda_: float, probe: Tensor, items: Tensor) -> Derivatives:
        """This rule in forward mode where that works and agrees with finite differences."""
        by_difference = replace(self, forward=(False, False))(x, lambda_, probe, items)
        usable = []
        for forward, index in (((True, False), 0), ((False, True), 2)):
            try:
                found = replace(self, forward=forward)(x, lambda_, probe, items)[index]
            except (RuntimeError, NotImplementedError, TypeError):
                usable.append(False)
                continue
            error = (found - by_difference[index]).norm() / by_difference[index].norm()
            usable.append(bool(error < _PROBE_TOLERANCE))
        return replace(self, forward=(usable[0], usable[1]))

    def _eps(self, x: Tensor, lambda_: float, items: Tensor) -> Tensor:
        t, c_x, c_o, _ = self._level(lambda_)
        return c_x * x + c_o * self.network(x, torch.tensor(t, dtype=x.dtype, device=x.device), items)

    def _level(self, lambda_: float) -> Array:
        """Time, the two coefficients of eps, and log alpha."""
        time = float(self.schedule.t_of_lambda(lambda_))
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(time))
        return np.array([time, *coefficients(self.prediction_type, "epsilon", alpha, sigma), np.log(alpha)])

    def _level_rates(self, lambda_: float, step: float = 1e-3) -> Array:
        """d/dlambda of :meth:`_level`, by a polynomial through five points inside the range."""
        low, high = sampling_range(self.schedule)
        centre = min(max(lambda_, low + 2 * step), high - 2 * step)
        nodes = np.arange(-2.0, 3.0)
        values = np.stack([self._level(centre + step * k) for k in nodes])
        fit = np.polynomial.polynomial.polyfit(nodes, values, 4)
        at = (lambda_ - centre) / step
        slope = np.polynomial.polynomial.polyval(at, np.polynomial.polynomial.polyder(fit))
        return np.asarray(slope) / step


def _jvp(function: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    output, tangent, *_ = torch.func.jvp(function, primals, tangents)
    return output, tangent
