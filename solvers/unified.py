"""A multistep sampler whose every step is made in a way of its own (the framework of USF, Liu et al. 2023).

For each step are chosen: where it starts, whether data or noise predictions are integrated, the order, how
derivatives are estimated, and whether and how the state is corrected once the next prediction is there. With
``y = x / sigma``, ``E = e^lambda``, step h and predictions m (data) or ``eps = y - E m`` (noise), a step is::

    data:   y' = y - E' sum_k h^k phi_{k+1}(-h) m^(k)
    noise:  y' = E'/E y - sum_k h^k phi_{k+1}(h) eps^(k)

``m^(k)`` from the predictions so far. All of it is linear in m, so that any such schedule of solvers, mixed
forms and correctors included, is one :class:`~diffalign.solvers.calibrated.Table`: :func:`table_of` makes
the steps on unit vectors. DPM-Solver (2, 3), DPM-Solver++ and UniPC are points of this space
(:func:`known_steps`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffalign.solvers.calibrated import Table
from diffalign.solvers.dpm_solver_v3 import derivative_weights
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.phi import phis
from diffalign.solvers.scheduler import Array

FORMS = ("sample", "epsilon")
#: ``taylor``: of the polynomial through all nodes; ``half``: the same, but one derivative weighs half the
#: step's weight of the prediction itself (midpoint of DPM-Solver++, B(h) = e^h - 1 of UniPC); ``pseudo``:
#: divided differences, each of the nodes it needs (DPM-Solver-v3).
DERIVATIVES = ("taylor", "half", "pseudo")
CORRECTORS = ("none", *DERIVATIVES)

#: Form, order, derivative and corrector of one step.
Choice = tuple[str, int, str, str]


def choices(count: int, *, pure_noise: bool) -> tuple[tuple[tuple[object, ...], ...], ...]:
    """What each step of `count` that end at the clean image may choose.

    The order is at most the number of predictions, and the last step, onto the clean image, is of first
    order, so that the state before it needs no correction.

    Args:
        pure_noise: the first step starts where no data can be read, as in flow models.
    """
    if count == 1:
        return ((("sample",), (1,), ("taylor",), ("none",)),)
    rows: list[tuple[tuple[object, ...], ...]] = []
    for k in range(count):
        last = k == count - 1
        orders = (1,) if last else tuple(range(1, min(k + 1, 3) + 1))
        rows.append(
            (
                ("sample",) if last or (pure_noise and k == 0) else FORMS,
                orders,
                DERIVATIVES if max(orders) > 1 else ("taylor",),
                CORRECTORS if k < count - 2 else ("none",),
            )
        )
    return tuple(rows)


def known_steps(solver: str, order: int, count: int) -> list[Choice]:
    """The choices that make DPM-Solver++ (``dpm-solver++``), DPM-Solver (``dpm-solver``) or UniPC (``unipc``)
    of `order` 2 or 3, with this project's defaults, `count` steps to the clean image."""
    steps: list[Choice] = []
    for k in range(count):
        own = min(order, k + 1, count - k)
        form = "epsilon" if solver == "dpm-solver" and k < count - 1 else "sample"
        corrected = solver == "unipc" and 2 <= k < count - 2
        steps.append((form, own, "half" if own > 1 else "taylor", "half" if corrected else "none"))
    return steps


def table_of(schedule: NoiseSchedule, times: Sequence[float] | Array, steps: Sequence[Choice]) -> Table:
    """The table of a schedule of solvers.

    Args:
        schedule: of the noise.
        times: (n,) falling, where the steps start; the last step ends at the clean image.
        steps: (n,) what is chosen for each. Orders above the number of usable predictions are lowered; a
            step from pure noise is of first order, in data form.
    """
    times = np.asarray(times, dtype=np.float64)
    n = len(times)
    lambda_ = schedule.lambda_(times)
    growth = np.exp(lambda_)
    # Vectors of y in terms of the first state (entry 0) and of the data predictions.
    data = np.eye(n + 1)[1:]
    asked = np.eye(n + 1)[0]  # the state handed to evaluation k
    state = asked  # the same, corrected
    noise = np.zeros((n, n + 1))
    weights = np.zeros((n, n))
    redo: tuple[Array, list[int], Choice] | None = None
    for k in range(n):
        noise[k] = asked - growth[k] * data[k]
        if redo is not None:
            before, nodes, choice = redo
            state = _advanced(before, nodes, k, choice[0], choice[3], lambda_, data, noise)
        if k == n - 1:
            weights[k, k] = 1.0
            break
        form, order, derivative, corrector = steps[k]
        nodes = [k - i for i in range(min(order, k + 1)) if math.isfinite(lambda_[k - i])] or [k]
        if not math.isfinite(lambda_[k]):
            form, nodes = "sample", [k]
        after = _advanced(state, nodes, k + 1, form, derivative, lambda_, data, noise)
        row = (after - asked)[1:] / (growth[k + 1] - growth[k])
        weights[k, : k + 1] = row[: k + 1] / row[: k + 1].sum()
        can = corrector != "none" and math.isfinite(lambda_[k])
        # The newest prediction stands next to the base, where differences of low order see it.
        redo = (state, [k, k + 1, *nodes[1:]], (form, order, derivative, corrector)) if can else None
        asked = state = after
    return Table(times, weights)


def _advanced(
    state: Array,
    nodes: Sequence[int],
    target: int,
    form: str,
    derivative: str,
    lambda_: Array,
    data: Array,
    noise: Array,
) -> Array:
    """The state `nodes[0]` is left from, taken to `target` with predictions at `nodes`."""
    base = nodes[0]
    h = float(lambda_[target] - lambda_[base])
    if form == "sample":
        held, own, scale, step = data, 1.0, math.exp(lambda_[target]), -h
    else:
        held, own, scale, step = noise, math.exp(h), 1.0, h
    phi = phis(step, len(nodes))
    # An infinite step, from pure noise, has one node and so no powers.
    moments = [-scale * p * (h**k if k else 1.0) for k, p in enumerate(phi)]
    if derivative == "half" and len(nodes) == 2:
        moments[1] = -scale * h * phi[0] / 2
    offsets = np.array([lambda_[j] - lambda_[base] if j != base else 0.0 for j in nodes])
    per_node = np.array(moments) @ derivative_weights(offsets, derivative == "pseudo")
    return own * state + per_node @ held[list(nodes)]
