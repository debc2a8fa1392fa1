"""PNDM (Liu et al. 2022): Runge-Kutta and Adams-Bashforth methods around the transfer of DDIM."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.grids import auto_times
from diffalign.solvers.options import check_choice, scheduler_options
from diffalign.solvers.plan import Plan, Row
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["PNDMScheduler", "SchedulerMixin", "adams_weights", "published_steps"]

#: variant -> (number of predictions combined, evaluations of each of its first steps)
VARIANTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "plms": (4, ()),
    "plms-heun": (4, (2,)),
    "s-pndm": (2, (2,)),
    "f-pndm": (4, (4, 4, 4)),
}
CONVENTIONS = ("consistent", "uniform", "published")

#: Evaluations of a step -> what each transfer from its start combines, by evaluation.
_STAGES: dict[int, tuple[dict[int, float], ...]] = {
    2: ({0: 1.0}, {0: 1 / 2, 1: 1 / 2}),
    4: ({0: 1.0}, {1: 1.0}, {2: 1.0}, {0: 1 / 6, 1: 1 / 3, 2: 1 / 3, 3: 1 / 6}),
}
#: Adams-Bashforth weights of equal steps, newest first.
_UNIFORM: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# Rounding of times to float32 moves a midpoint by less than this part of the step.
_MIDPOINT_SLACK = 1e-2


class PNDMScheduler(PlanScheduler):
    """``x_t = (alpha_t/alpha_s) x + (sigma_t - alpha_t sigma_s/alpha_s) e`` with e combined from several eps.

    That transfer (equation 9) is DDIM, and an exact Euler step of ``dy/dr = eps`` in ``y = x/alpha`` and
    ``r = sigma/alpha``. So the default measures steps in r: variable-step Adams-Bashforth weights, and
    Runge-Kutta stages halfway in r, whatever the grid: S-PNDM then is of second order and F-PNDM of fourth.
    The published weights are those of equal steps in *time*, with which no variant is above second order
    (the paper proves that much), and first order where one step is shorter than the others, as its last is.
    They also diverge with few steps and large guidance, where those of the default stay bounded.

    Args:
        variant: ``plms``, up to four predictions, the first steps at the order that their history allows: no
            evaluation is spent on a start, and few steps with large guidance stay stable; ``plms-heun``, the
            same after one Heun step (what diffusers does); ``s-pndm``, two predictions after one Heun step;
            ``f-pndm``, four after three Runge-Kutta steps of four evaluations each; ``auto``, plms or f-pndm
            by ``skip_prk_steps``. All evaluations are counted in ``num_inference_steps``, so a start leaves
            fewer steps; f-pndm takes fewer Runge-Kutta steps below 13 evaluations. Starts ask twice at one
            time, so ``timesteps`` has repetitions.
        skip_prk_steps: diffusers' name of that choice.
        convention: ``consistent``, as above; ``uniform``, the published weights on any grid, as in diffusers;
            ``published``, those weights, the network asked one training step below the level of the state,
            the level rounded down to a training step, and, with ``grid="auto"``, the published grid
            (:func:`published_steps`).
        set_alpha_to_one: end at the clean image; else at the first training step.
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`).

    The other options are diffusers'. Timesteps or sigmas that the caller passes are the evaluations: nothing
    is added to them, and timesteps that repeat as those of a start do are one. At alpha = 0 no eps is known,
    so a step from there is DDIM's in the data prediction.
    """

    form = "epsilon"
    _grid_with_end = False

    @scheduler_options
    def __init__(
        self,
        variant: str = "auto",
        skip_prk_steps: bool = True,
        convention: str = "consistent",
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "leading",
        **shared: Any,
    ) -> None:
        check_choice("variant", variant, ("auto", *VARIANTS))
        check_choice("convention", convention, CONVENTIONS)

    def _setup(self) -> None:
        super()._setup()
        config = self.config
        if config.convention == "published" and not self.schedule.is_discrete:
            raise UserError(
                "convention='published' counts training steps of a beta schedule, which a flow schedule "
                "does not have; use convention='consistent'"
            )
        variant = config.variant
        if variant == "auto":
            variant = "plms" if config.skip_prk_steps else "f-pndm"
        self._memory, self._starts = VARIANTS[variant]
        #: Index of a step -> its evaluations, of steps with more than one.
        self._planned_starts: dict[int, int] = {}

    # ------------------------------------------------------------ the grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As :meth:`PlanScheduler.set_timesteps`; only a grid made here gets the evaluations of a start.

        `timesteps` may repeat as those of a start do: ``scheduler.timesteps`` of another run can be passed.
        """
        self._planned_starts = {}
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps, sigmas=sigmas, mu=mu)

    def _final(self) -> str:
        published = self.config.convention == "published"
        return "zero" if published or self.config.set_alpha_to_one else "sigma_min"

    def _auto_times(self, count: int, start: float) -> Array:
        # The grid of first-order methods ends latest, which suits a last step that looks back as well.
        return auto_times(self.schedule, count, order=1, final=self._final(), start=start)

    def _grid_times(self, count: int, shift: float | None) -> Array:
        # A start must not reach the end of the grid, where the network is not asked.
        room = count - 1 - self._begins_in_noise()
        starts: list[int] = []
        for evaluations in self._starts:
            if sum(starts) + evaluations <= room:
                starts.append(evaluations)
        self._planned_starts = dict(enumerate(starts, int(self._begins_in_noise())))
        steps = count - sum(starts) + len(starts)
        if self.config.convention == "published" and self.config.grid == "auto":
            points = published_steps(steps, self.schedule.num_train_timesteps)
            return np.append(points, self.schedule.t_clean)
        return super()._grid_times(steps, shift)

    def _begins_in_noise(self) -> bool:
        """Whether the first step is from alpha = 0, where no start is possible."""
        return float(self.schedule.alpha(self._start_time())) == 0.0

    def _evaluations(self, times: Array) -> Array:
        asked: list[float] = []
        for k, (time, end) in enumerate(itertools.pairwise(times)):
            asked.append(time)
            asked += self._stage_times(self._planned_starts.get(k, 1), time, end)
        return np.append(asked, times[-1])

    def _step_starts_among(self, asked: Array) -> Array:
        steps = self._steps(np.append(asked, -np.inf))
        self._planned_starts = {k: n for k, (_, n) in enumerate(steps) if n > 1}
        return asked[[e for e, _ in steps]]

    def _stage_times(self, evaluations: int, time: float, end: float) -> list[float]:
        """Where a step of so many evaluations asks after its first."""
        if evaluations == 4:
            return [self._middle(time, end)] * 2 + [end]
        return [end] * (evaluations - 1)

    def _middle(self, time: float, end: float) -> float:
        """Halfway between two times in the variable of the weights, in the network's float32."""
        if self.config.convention == "consistent":
            alpha, sigma = self.schedule.alpha_sigma(np.array([time, end]))
            return float(np.float32(self.schedule.t_of_lambda(-np.log(np.mean(sigma / alpha)))))
        return float(np.float32((time + end) / 2))

    # ------------------------------------------------------------ the plan

    def _state(self, times: Array) -> Array:
        """Times of the levels that the samples at `times` have."""
        if self.config.convention != "published":
            return times
        if np.any(times >= self.schedule.t_max):
            raise UserError(
                "convention='published' has the sample one training step above the network's time, so times "
                f"must stay below {self.schedule.t_max:g}; use convention='consistent'"
            )
        return np.floor(times) + 1

    def _plan(self, times: Array) -> Plan:
        """Rows for evaluations and the end. The repetitions among `times` tell what a start is.

        ``t, t', t'`` is a Heun step from t to t', and ``t, m, m, t', t'`` with m in the middle a Runge-Kutta
        step. So the rest of a run, wherever it begins, is a plan again.
        """
        return self._plan_of_steps(times, self._steps(times))

    def _steps(self, times: Array) -> list[tuple[int, int]]:
        """First evaluation and number of evaluations of each step between `times`."""
        steps: list[tuple[int, int]] = []
        e = 0
        while e < len(times) - 1:
            steps.append((e, self._step_kind(times[e:])))
            e += steps[-1][1]
        return steps

    def _plan_of_steps(self, times: Array, steps: Sequence[tuple[int, int]]) -> Plan:
        """The rows of `steps` as :meth:`_steps` gives them; `times` may lie anywhere."""
        state = self._state(times)
        alpha, sigma = self.schedule.alpha_sigma(state)
        rows: list[Row] = []
        history: list[int] = []  # evaluations at starts of steps, newest first
        for e, evaluations in steps:
            # Not at alpha = 0, nor where the next step asks again at the same time.
            again = evaluations == 1 and e + 2 < len(times) and times[e] == times[e + 1]
            if alpha[e] > 0 and not again:
                history = [e, *history][: self._memory]
            stages: Sequence[Mapping[int, float]] = _STAGES.get(evaluations, ())
            if not stages:
                stages = [self._weights(alpha, sigma, history, e)]
            for j, combined in enumerate(stages):
                rows.append(self._row(times, state, alpha, sigma, e, j, combined))
        return Plan(tuple(rows))

    def _in_noise(self, times: Array) -> bool:
        return bool(self.schedule.alpha(self._state(times))[0] == 0.0)

    def _step_kind(self, times: Array) -> int:
        """How many evaluations the step takes that begins at the first of `times`."""
        if len(times) >= 3 and times[0] > times[1] == times[2] and not self._in_noise(times[:1]):
            if len(times) >= 5 and times[2] > times[3] == times[4]:
                off = abs(times[1] - self._middle(times[0], times[3]))
                if off <= _MIDPOINT_SLACK * (times[0] - times[3]):
                    return 4
            return 2
        return 1

    def _weights(self, alpha: Array, sigma: Array, history: list[int], e: int) -> dict[int, float]:
        """What the transfer from `e` combines, as weights relative to `e`."""
        if e not in history:
            return {0: 1.0}
        if self.config.convention == "consistent":
            ratio = sigma / np.maximum(alpha, np.finfo(float).tiny)
            weights = adams_weights(ratio[history], float(ratio[e + 1]))
        else:
            weights = _UNIFORM[len(history) - 1]
        return {j - e: w for j, w in zip(history, weights, strict=True)}

    def _row(
        self,
        times: Array,
        state: Array,
        alpha: Array,
        sigma: Array,
        e: int,
        stage: int,
        combined: Mapping[int, float],
    ) -> Row:
        """The transfer from the sample of evaluation `e` that follows its stage's evaluation."""
        at, target = e + stage, e + stage + 1
        time = float(times[at])
        if alpha[e] == 0.0:
            x, weight = float(sigma[target] / sigma[e]), float(alpha[target])
            return Row(time, self._conversion(float(state[at]), "sample"), x={e: x}, m={e: weight})
        x = float(alpha[target] / alpha[e])
        weight = float(sigma[target] - x * sigma[e])
        return Row(
            time,
            self._conversion(float(state[at])),
            x={e: x},
            m={e + j: weight * w for j, w in combined.items()},
        )

    def _transform(self, m: Tensor, sample: Tensor) -> Tensor:
        """Thresholding of the data prediction that belongs to this eps."""
        assert self._times is not None
        assert self._step_index is not None
        time = float(self._state(self._times[[self._step_index]])[0])
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(time))
        if alpha == 0.0:
            return super()._transform(m, sample)
        x0 = super()._transform((sample - sigma * m) / alpha, sample)
        return (sample - alpha * x0) / sigma


def published_steps(count: int, total: int, limit: int | None = None) -> Array:
    """The `count` times of the published code, descending: every ``total // n``-th training step from 0 on.

    n is what its caller asks for, and often less than the steps that come of it: 15 gives 16. So the stride
    is that of the largest n with `count` steps below `limit`, which is ``total - 1`` unless given: the level
    ``t + 1`` must be there. Where no n has them, it is ``total // count``.
    """
    limit = total - 1 if limit is None else limit
    strides = [total // n for n in range(min(count, total), 0, -1)]
    fits = (s for s in strides if (count - 1) * s < limit and count * s >= total)
    return np.arange(count - 1.0, -1.0, -1.0) * next(fits, total // count)


def adams_weights(nodes: Array, end: float) -> tuple[float, ...]:
    """Adams-Bashforth weights of variable steps: means over the step of the Lagrange polynomials.

    Args:
        nodes: (k,) distinct positions of known slopes; the first is where the step begins.
        end: where it ends.

    Returns:
        k weights that sum to 1; of equal steps they are the classical ones.
    """
    u = (np.asarray(nodes, dtype=np.float64) - nodes[0]) / (end - nodes[0])
    weights = []
    for j in range(len(u)):
        others = np.delete(u, j)
        integral = polynomial.polyint(polynomial.polyfromroots(others))
        weights.append(float(polynomial.polyval(1.0, integral) / np.prod(u[j] - others)))
    return tuple(weights)
