"""Exponential integrators in half log-SNR: what the single- and multistep DPM-Solvers have in common.

The diffusion ODE, and the SDEs that share its marginals, are linear in the sample but for one prediction D of
the network. Solved exactly in the linear part over a step of length h in half log-SNR, with D expanded in the
fraction u of the step, ``D(u) = D + D' u + D'' u^2 / 2``, they read

    x_t = a x_s - P [phi_1(H) D + phi_2(H) D' + phi_3(H) D''] + noise

    form     D    a                           P                  H             variance of the noise
    sample   x0   sigma_t/sigma_s e^{-eta h}  alpha_t            -(1 + eta) h  sigma_t^2 (1 - e^{-2 eta h})
    epsilon  eps  alpha_t/alpha_s             (1 + eta) sigma_t  h             eta sigma_t^2 (e^{2h} - 1)

(DPM-Solver, proposition 3.1; DPM-Solver++, proposition 4.1 and section 6.) eta is the rate of the noise: 0 is
the probability-flow ODE, 1 the reverse of the diffusion itself.

D' and D'' come from the polynomial through D at other points, which are earlier evaluations (multistep,
u < 0) or stages of the same step (singlestep, 0 < u < 1). One formula, :func:`update`, is therefore all of
them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.phi import phis

Array = NDArray[np.float64]

#: How the moments of u over a step, ``k! phi_{k+1}``, enter at k = 0, 1, 2.
#: ``taylor`` is exact; ``midpoint`` (the papers' first form of second order) agrees with it to the order of
#: the method; ``published`` halves D'', as the published multistep code of third order does, which makes it
#: one of second order.
RULES: dict[str, Callable[[float, float, float], tuple[float, float, float]]] = {
    "taylor": lambda phi1, phi2, phi3: (phi1, phi2, 2.0 * phi3),
    "midpoint": lambda phi1, phi2, phi3: (phi1, phi1 / 2.0, 2.0 * phi3),
    "published": lambda phi1, phi2, phi3: (phi1, phi2, phi3),
}

#: What diffusers calls them, as ``solver_type``.
RULE_OF_TYPE = {"midpoint": "midpoint", "heun": "taylor"}


@dataclass(frozen=True)
class Points:
    """The levels (n + 1,) at the evaluations of a run and at its end."""

    alpha: Array
    sigma: Array
    lambda_: Array

    @classmethod
    def at(cls, schedule: NoiseSchedule, times: ArrayLike) -> Points:
        return cls(*schedule.alpha_sigma(times), schedule.lambda_(times))

    def step(self, start: int, end: int) -> float:
        """h from one point to another, infinite to the clean image and from pure noise."""
        return float(self.lambda_[end] - self.lambda_[start])


@dataclass(frozen=True)
class Update:
    """The sample at a point from what earlier ones hold, as in :class:`~diffalign.solvers.plan.Row`.

    Attributes:
        form: of the prediction at the newest point that `m` reads.
        x, m, z: index of a point -> weight of its sample, prediction, and of the noise drawn from it to the
            next.
    """

    form: str
    x: Mapping[int, float]
    m: Mapping[int, float]
    z: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Equation:
    """What is integrated: a row of the module's table.

    Attributes:
        form: ``"sample"`` or ``"epsilon"``.
        eta: rate of the noise; 0 is the ODE.
        s_noise: factor of the noise (1 keeps the marginals).
    """

    form: str
    eta: float = 0.0
    s_noise: float = 1.0

    def linear(self, points: Points, start: int, end: int) -> tuple[float, float, float]:
        """(a, P, H) of the step from one point to another."""
        h = points.step(start, end)
        if self.form == "epsilon":
            carry = points.alpha[end] / points.alpha[start]
            return float(carry), float((1.0 + self.eta) * points.sigma[end]), h
        decay = math.exp(-self.eta * h) if self.eta else 1.0
        carry = points.sigma[end] / points.sigma[start] * decay
        return float(carry), float(points.alpha[end]), -(1.0 + self.eta) * h

    def noise(self, points: Points, path: Sequence[int], end: int) -> dict[int, float]:
        """Weights in ``x_end`` of the independent increments of one Brownian path along the points `path`.

        The noise of a step is the integral, over lambda from its start to its end, of ``sqrt(2 eta)
        e^{eta lambda} dW sigma_end e^{-eta lambda_end}`` (data form) or ``sqrt(2 eta) e^{-lambda} dW
        alpha_end`` (noise form). Stages of one step read the same increments.
        """
        if not self.eta or not self.s_noise or points.sigma[end] == 0.0:
            return {}
        lambda_ = points.lambda_
        weights = {}
        for a, b in itertools.pairwise(path):
            h = float(lambda_[b] - lambda_[a])
            if self.form == "epsilon":
                level = points.alpha[end] * math.exp(-lambda_[b])
                variance = self.eta * math.expm1(2.0 * h)
            else:
                level = points.sigma[end] * math.exp(-self.eta * float(lambda_[end] - lambda_[b]))
                variance = -math.expm1(-2.0 * self.eta * h)
            weights[a] = self.s_noise * float(level) * math.sqrt(variance)
        return weights


def update(points: Points, equation: Equation, nodes: Sequence[int], end: int, rule: str) -> Update:
    """The sample at point `end` from the one at ``nodes[0]``, with D interpolated through all `nodes`.

    The order is the number of nodes, at most 3. Nodes infinitely far away (the prediction at pure noise) tell
    nothing of D's change and are left out. A step of infinite length is taken at first order and in data
    form, which is finite there and exact as the limit of both.

    Args:
        points: all that the indices mean; those from the step's start to `end` are the points at which its
            Brownian path is drawn.
        nodes: the start of the step, then other points where D is known.
        rule: key of :data:`RULES`.
    """
    start = nodes[0]
    h = points.step(start, end)
    if math.isinf(h):
        equation, nodes = Equation("sample", equation.eta, equation.s_noise), nodes[:1]
    others = [node for node in nodes[1:] if math.isfinite(points.step(start, node))]
    carry, scale, signed = equation.linear(points, start, end)
    fractions = [0.0, *(points.step(start, node) / h for node in others)]
    weights = interpolation(fractions, RULES[rule](*phis(signed, 3)))
    return Update(
        form=equation.form,
        x={start: carry},
        m=dict(zip([start, *others], (-scale * w for w in weights), strict=True)),
        z=equation.noise(points, range(start, end + 1), end),
    )


def interpolation(fractions: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w of D at `fractions`, 0 the first, such that ``sum_i w_i u_i^k = moments[k]``.

    By Newton's divided differences; at most three points.
    """
    _, *rest = fractions
    if not rest:
        return [moments[0]]
    if len(rest) == 1:
        slope = moments[1] / rest[0]
        return [moments[0] - slope, slope]
    r1, r2 = rest
    w1 = (moments[1] * r2 - moments[2]) / (r1 * (r2 - r1))
    w2 = (moments[2] - moments[1] * r1) / (r2 * (r2 - r1))
    return [moments[0] - w1 - w2, w1, w2]


# ------------------------------------------------------- which points a step reads


def multistep_orders(
    count: int, order: int, *, lower_order_final: bool, euler_at_final: bool = False
) -> list[int]:
    """The order of each of `count` steps: a ramp at the start and, below 15 steps, one at the end."""
    orders = [min(order, k + 1) for k in range(count)]
    if lower_order_final and count < 15:
        orders = [min(p, count - k) for k, p in enumerate(orders)]
    if euler_at_final:
        orders[-1] = 1
    return orders


def multistep(
    points: Points, equation: Equation, orders: Sequence[int], *, solver_type: str, third_order: str
) -> list[Update]:
    """One update per step; step k reads the predictions of the newest ``orders[k]`` evaluations.

    Args:
        solver_type: the rule of second order.
        third_order: the rule of third order.
    """
    rules = (solver_type, solver_type, third_order)
    return [
        update(points, equation, range(k, k - order, -1), k + 1, rules[order - 1])
        for k, order in enumerate(orders)
    ]


def singlestep_orders(count: int, order: int, *, lower_order_final: bool) -> list[int]:
    """How `count` evaluations are shared out among steps; a step of order p takes p of them.

    With `lower_order_final` a third-order run whose count is a multiple of 3 ends in orders 2 and 1, the
    paper's DPM-Solver-fast; else it is as many full steps as there are. What
    is left over is one step of lower order at the end.
    """
    full, rest = divmod(count, order)
    if lower_order_final and order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def split_ends(orders: Sequence[int], *, first: bool, last: bool) -> list[int]:
    """`orders` whose first or last step has order 1, its other evaluations being a step of their own."""
    orders = list(orders)
    if first and orders[0] > 1:
        orders[:1] = [1, orders[0] - 1]
    if last and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def singlestep(
    points: Points, equation: Equation, orders: Sequence[int], *, solver_type: str
) -> list[Update]:
    """One update per evaluation: the stages of each step lie at the points between its start and its end.

    A step of order p interpolates D through its p evaluations, and so does each stage through those before
    it; ``midpoint`` at third order reads the first and the last alone, which is enough where the last is at
    2/3 of the step.
    """
    updates: list[Update] = []
    for order in orders:
        start = len(updates)
        stages = [
            update(points, equation, range(start, start + j), start + j, "taylor") for j in range(1, order)
        ]
        updates += [*stages, singlestep_end(points, equation, range(start, start + order), solver_type)]
    return updates


def singlestep_end(points: Points, equation: Equation, nodes: Sequence[int], solver_type: str) -> Update:
    """The last update of a step whose evaluations are `nodes`; it ends at the point after them."""
    if solver_type == "midpoint" and len(nodes) == 3:
        return update(points, equation, [nodes[0], nodes[2]], nodes[-1] + 1, "taylor")
    return update(points, equation, nodes, nodes[-1] + 1, solver_type)
