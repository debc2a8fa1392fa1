"""Gradients through sampling: of a loss on the final sample with respect to noise, conditions or weights.

Two ways. :func:`differentiable_sample` is the *discrete* adjoint: the gradient of the very steps that were
taken, exact to rounding, for every scheduler. Back-propagation through the loop would hold the activations of
every network call; here only a few states are kept, and each call is repeated when its gradient is due.
:func:`continuous_sample` is the *continuous* adjoint of AdjointDPM (Pan et al. 2024), which solves a second
ODE backward and keeps nothing; its gradient has the discretisation error of that ODE. It is here to be
compared with.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from diffalign.errors import UserError
from diffalign.solvers.plan import working_dtype
from diffalign.solvers.prediction import convert
from diffalign.solvers.sampling import ModelFn
from diffalign.solvers.scheduler import Array, PlanScheduler

# The sample before an evaluation, and all attributes that the scheduler has then: its memory is among them.
_State = tuple[Tensor, dict[str, Any]]


def differentiable_sample(
    model_fn: ModelFn,
    noise: Tensor,
    scheduler: Any,
    *,
    checkpoints: int | None = None,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """As :func:`~diffalign.solvers.sampling.sample`, with a gradient that needs the memory of one network
    call.

    The gradient reaches whatever requires one: `noise`, tensors and weights that `model_fn` uses. Nothing has
    to be listed. It equals full back-propagation to rounding, noise of stochastic samplers and dropout
    included: random numbers are drawn again as they were.

    Args:
        checkpoints: states that may be kept, the noise among them; None keeps that before each of the n
            network calls, so that each call is made twice. With k the memory no longer depends on n, and the
            calls are at most ``(r + 1) n + 1``, r the least number with ``binomial(k + r, r) >= n`` (Griewank
            & Walther 2000). A state is the sample and what the scheduler remembers.
        sigmas: custom noise levels, as in ``set_timesteps``.
        model_fn, noise, scheduler, num_inference_steps, timesteps, mu, generator: as there; `scheduler` may
            be of diffusers as well. `model_fn` must do the same when it is called again.

    Returns:
        The sample, bit for bit that of `sample`.

    Raises:
        UserError: `checkpoints` below 1.
    """
    if checkpoints is not None and checkpoints < 1:
        raise UserError(f"checkpoints must be at least 1 (the noise itself), but is {checkpoints}")
    how = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    scheduler.set_timesteps(device=noise.device, **{k: v for k, v in how.items() if v is not None})
    count = len(scheduler.timesteps)
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    takes_generator = bool(generators) and "generator" in inspect.signature(scheduler.step).parameters
    drawn: dict[int, list[Tensor]] = {}  # evaluation -> the generators' states before it

    def step(e: int, state: _State) -> _State:
        x, memory = state
        own = copy.copy(scheduler)
        # Copies, since schedulers write into their buffers; a tensor with a gradient is never written into.
        vars(own).update(tree_map_only(Tensor, lambda t: t if t.requires_grad else t.clone(), memory))
        t = own.timesteps[e]
        # Diffusers' flow schedulers have neither this nor a scale of the noise.
        scale = getattr(own, "scale_model_input", lambda x, t: x)
        output = model_fn(scale(x, t), t)
        given = {}
        if takes_generator:
            again = _replayed(generators, drawn, e)
            given["generator"] = again if isinstance(generator, list) else again[0]
        x = own.step(output, t, x, return_dict=False, **given)[0]
        return x, dict(vars(own))

    def run(first: int, last: int, spare: int, state: _State, keep: bool = True) -> _State:
        """Evaluations `first` to `last`, of which the last is differentiated next.

        All before it are gone through again, from `state` and at most `spare` further ones. Unless `keep`,
        the last is not due yet either.
        """
        while last - first > (1 if keep else 0):
            middle = _split(first, last, spare) if keep or spare else last
            state = _forgotten(run, first, middle, spare, state)
            first, spare = middle, max(spare - 1, 0)
        return step(first, state) if first < last else state

    start = (noise * getattr(scheduler, "init_noise_sigma", 1.0), dict(vars(scheduler)))
    if not torch.is_grad_enabled():
        for e in range(count):
            start = step(e, start)
        return start[0]
    return run(0, count, (checkpoints or count) - 1, start, keep=False)[0]


def _split(first: int, last: int, spare: int) -> int:
    """Where the part of `first` to `last` ends that is gone through again later, by the binomial schedule."""
    repeats = 1
    while math.comb(spare + 1 + repeats, repeats) < last - first:
        repeats += 1
    return max(first + 1, last - math.comb(spare + repeats, spare))


def _forgotten(run: Callable[..., _State], first: int, last: int, spare: int, state: _State) -> _State:
    """`run`, of which only `state` is kept."""
    leaves, form = tree_flatten(state)
    # Tensors go in as arguments: an outer checkpoint then lets go of them.
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def again(*tensors: Tensor) -> _State:
        rest = iter(tensors)
        values = [next(rest) if other is None else other[0] for other in others]
        return run(first, last, spare, tree_unflatten(values, form))

    return checkpoint(again, *tensors, use_reentrant=False)


def _replayed(generators: list[torch.Generator], drawn: dict[int, list[Tensor]], e: int) -> list[Any]:
    """The generators themselves the first time, later copies in the states they had then."""
    if e not in drawn:
        drawn[e] = [g.get_state() for g in generators]
        return generators
    copies = [torch.Generator(g.device) for g in generators]
    for again, state in zip(copies, drawn[e], strict=True):
        again.set_state(state)
    return copies


def continuous_sample(
    model_fn: ModelFn,
    noise: Tensor,
    scheduler: PlanScheduler,
    *,
    inputs: Sequence[Tensor] = (),
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
) -> Tensor:
    """Sample, with the gradient of the ODE instead of that of the steps (AdjointDPM, Pan et al. 2024).

    In ``y = x / alpha`` and ``rho = sigma / alpha`` the probability-flow ODE is ``dy/drho = eps(alpha y, t)``
    without a stiff linear part, so Euler in rho is the exponential integrator of first order (DDIM). The
    adjoint ``a = dL/dy`` obeys ``da/drho = -(d eps/dy)^T a``, and the gradient with respect to anything that
    eps depends on gathers ``(d eps/d .)^T a drho`` on the way. Both are solved from the end to the start, y
    anew: memory does not depend on the number of steps, nor is anything stored, and the error falls with the
    step size to the first power. Below 20 steps it can be large; :func:`differentiable_sample` has none.

    Args:
        model_fn, noise, num_inference_steps, timesteps: as in :func:`~diffalign.solvers.sampling.sample`.
        scheduler: gives the grid and the noise schedule; the sample is DDIM's on it.
        inputs: tensors (conditions, weights) other than `noise` that get a gradient.

    Returns:
        The sample, of the shape and dtype of `noise`.

    Raises:
        UserError: a flow schedule, or one with alpha 0: there y is infinite.
    """
    if not isinstance(scheduler, PlanScheduler):
        raise UserError(
            f"the continuous adjoint takes a scheduler of SOLVERS, not {type(scheduler).__name__}"
        )
    scheduler.set_timesteps(num_inference_steps, noise.device, timesteps=timesteps)
    times = scheduler._times
    assert times is not None
    if scheduler.schedule.is_flow or float(scheduler.schedule.alpha(times[0])) == 0.0:
        raise UserError(
            "the continuous adjoint divides by alpha, which is 0 at the noisy end of this schedule; "
            "use differentiable_sample"
        )
    return _Continuous.apply(_Epsilon(model_fn, scheduler, times), noise, *inputs)


class _Epsilon:
    """eps as a function of y, at the n evaluations and the end of a grid."""

    def __init__(self, model_fn: ModelFn, scheduler: PlanScheduler, times: Array) -> None:
        self.model_fn, self.kind = model_fn, scheduler.config.prediction_type
        self.alpha, sigma = scheduler.schedule.alpha_sigma(times)
        self.rho = sigma / self.alpha
        # The clean end lies beyond the times that the network knows; the nearest of them stands for it.
        self.asked = np.maximum(times, scheduler.schedule.t_min)
        self.levels = scheduler.schedule.alpha_sigma(self.asked)
        self.steps = len(times) - 1

    def __call__(self, y: Tensor, e: int, dtype: torch.dtype) -> Tensor:
        x = (y * float(self.alpha[e])).to(dtype)
        t = torch.tensor(self.asked[e], dtype=torch.float32, device=y.device)
        alpha, sigma = (float(level[e]) for level in self.levels)
        return convert(self.model_fn(x, t), x, alpha, sigma, source=self.kind, to="epsilon").to(y.dtype)


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: _Epsilon, noise: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        y = noise.to(working_dtype(noise)) / float(eps.alpha[0])
        for e in range(eps.steps):
            y = y + float(eps.rho[e + 1] - eps.rho[e]) * eps(y, e, noise.dtype)
        ctx.eps, ctx.dtype = eps, noise.dtype
        ctx.save_for_backward(y, *inputs)
        return (y * float(eps.alpha[-1])).to(noise.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        eps: _Epsilon = ctx.eps
        y, *inputs = ctx.saved_tensors
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        sums = [torch.zeros_like(x, dtype=working_dtype(x)) for x in wanted]
        a = grad.to(y.dtype) * float(eps.alpha[-1])
        for e in range(eps.steps, 0, -1):
            step = float(eps.rho[e - 1] - eps.rho[e])
            # In half precision small adjoints would vanish inside the network.
            size = a.abs().amax().clamp(min=torch.finfo(a.dtype).tiny)
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                slope = eps(y, e, ctx.dtype)
                by_y, *others = torch.autograd.grad(slope, [y, *wanted], a / size, allow_unused=True)
            for total, part in zip(sums, others, strict=True):
                if part is not None:
                    total.sub_(part.to(total.dtype) * (size * step))
            y = y.detach() + step * slope.detach()
            if by_y is not None:
                a = a - (step * size) * by_y
        found = iter(sums)
        return (
            None,
            (a / float(eps.alpha[0])).to(ctx.dtype) if ctx.needs_input_grad[1] else None,
            *(
                next(found).to(x.dtype) if needed else None
                for x, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True)
            ),
        )
