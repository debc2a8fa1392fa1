"""Gradients through sampling: exact to rounding, memory of one call; the continuous adjoint converges."""

import math
import weakref
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS, GaussianMixture, sample
from diffalign.solvers.adjoint import continuous_sample, differentiable_sample

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

SCHEDULERS = {
    "ddim": lambda: SOLVERS["ddim"](**SD),
    "ddim, stochastic": lambda: SOLVERS["ddim"](**SD, eta=1.0),
    "dpm-solver": lambda: SOLVERS["dpm-solver"](**SD, solver_order=3),
    "dpm-solver++": lambda: SOLVERS["dpm-solver++"](**SD, solver_order=3),
    "dpm-solver++, SDE": lambda: SOLVERS["dpm-solver++"](**SD, algorithm_type="sde-dpmsolver++"),
    "thresholding": lambda: SOLVERS["dpm-solver++"](**SD, thresholding=True, sample_max_value=9.0),
    "pndm": lambda: SOLVERS["pndm"](**SD),
    "unipc": lambda: SOLVERS["unipc"](**SD, solver_order=3),
    "time-shift": lambda: SOLVERS["time-shift"](**SD, data_variance=0.9),
    "flow": lambda: SOLVERS["dpm-solver++"].from_config(FLOW),
    "diffusers: few steps": lambda: diffusers.LCMScheduler(**SD),
    "diffusers: multistep": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "diffusers: ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
}


class Network(nn.Module):
    """eps of a point, its time and a condition; counts its calls."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)
        self.condition = nn.Parameter(torch.randn(2, 6, dtype=dtype))
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        time = (t.to(x.dtype) / 1000).expand(2, 1)
        return self.layers(torch.cat([x.squeeze(-1) + self.condition, time], 1))[..., None]


def run(draw, network, scheduler, steps=8, **options):
    """The sample and the gradients of its squared norm by noise, condition and weights."""
    dtype = network.condition.dtype
    noise = torch.randn(2, 6, 1, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x = draw(network, noise, scheduler, num_inference_steps=steps, generator=generators, **options)
    return x, torch.autograd.grad(x.square().sum(), [noise, *network.parameters()])


def worst(found, exact):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("checkpoints", [None, 1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_gradient_is_that_of_full_back_propagation(name, checkpoints):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        network = Network(dtype)
        x, exact = run(sample, network, SCHEDULERS[name]())
        y, found = run(differentiable_sample, network, SCHEDULERS[name](), checkpoints=checkpoints)
        assert torch.equal(x, y)
        assert all(g.norm() > 0 for g in exact)
        assert worst(found, exact) < tolerance


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 30), checkpoints=st.integers(2, 31))
def test_network_calls_stay_below_the_binomial_bound(steps, checkpoints):
    network = Network(torch.float64)
    _, exact = run(sample, network, SCHEDULERS["unipc"](), steps)
    network.calls = 0
    _, found = run(differentiable_sample, network, SCHEDULERS["unipc"](), steps, checkpoints=checkpoints)
    repeats = next(r for r in range(1, 31) if math.comb(checkpoints + r, r) >= steps)
    assert 2 * steps <= network.calls <= (repeats + 1) * steps + 1
    assert worst(found, exact) < 1e-10


def test_each_call_is_made_twice_by_default():
    network = Network(torch.float32)
    run(differentiable_sample, network, SCHEDULERS["ddim"](), 20)
    assert network.calls == 40


def test_dropout_is_drawn_again_as_it_was():
    network = Network(torch.float64)
    network.layers.insert(1, nn.Dropout(0.5))
    torch.manual_seed(5)
    _, exact = run(sample, network, SCHEDULERS["unipc"]())
    torch.manual_seed(5)
    _, found = run(differentiable_sample, network, SCHEDULERS["unipc"](), checkpoints=2)
    assert worst(found, exact) < 1e-10


def test_noise_without_a_generator_is_drawn_again_as_it_was():
    network, scheduler = Network(torch.float64), SCHEDULERS["ddim, stochastic"]()
    noise = torch.randn(2, 6, 1, dtype=torch.float64, requires_grad=True)
    grads = []
    for draw in (sample, differentiable_sample):
        torch.manual_seed(5)
        x = draw(network, noise, scheduler, num_inference_steps=6)
        grads.append(torch.autograd.grad(x.square().sum(), [noise, *network.parameters()]))
    assert worst(grads[1], grads[0]) < 1e-10


def test_without_gradients_nothing_is_repeated():
    network = Network(torch.float32)
    noise = torch.randn(2, 6, 1)
    with torch.no_grad():
        x = differentiable_sample(network, noise, SCHEDULERS["unipc"](), num_inference_steps=5)
        assert torch.equal(x, sample(network, noise, SCHEDULERS["unipc"](), num_inference_steps=5))
    assert network.calls == 10
    assert not x.requires_grad


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors that were made while it ran and lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak(draw, steps, **options):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(4, 48, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 4, 1),
    )
    noise = torch.randn(1, 4, 16, 16, requires_grad=True)
    with LiveBytes() as live:
        x = draw(lambda x, t: layers(x), noise, SCHEDULERS["unipc"](), num_inference_steps=steps, **options)
        x.square().sum().backward()
    return live.peak


def test_memory_does_not_depend_on_the_number_of_steps():
    assert peak(sample, 50) > 5 * peak(sample, 5)
    assert peak(differentiable_sample, 50, checkpoints=5) <= 1.3 * peak(
        differentiable_sample, 5, checkpoints=5
    )
    # All states are kept by default: latents, small beside what a network call keeps.
    assert peak(differentiable_sample, 50) < 0.3 * peak(sample, 50)


def test_what_cannot_work_is_refused():
    noise = torch.randn(2, 6, 1)
    with pytest.raises(UserError, match="checkpoints must be at least 1"):
        differentiable_sample(
            lambda x, t: x, noise, SCHEDULERS["ddim"](), checkpoints=0, num_inference_steps=4
        )
    with pytest.raises(UserError, match="use differentiable_sample"):
        continuous_sample(lambda x, t: x, noise, SCHEDULERS["flow"](), num_inference_steps=4)
    with pytest.raises(UserError, match="a scheduler of SOLVERS"):
        continuous_sample(lambda x, t: x, noise, diffusers.LCMScheduler(), num_inference_steps=4)


def test_the_continuous_adjoint_converges_to_the_discrete_one():
    mixture = GaussianMixture.random((2, 3))
    scheduler = SOLVERS["dpm-solver++"](**SD, solver_order=1, grid="logsnr", final_sigmas_type="sigma_min")
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    noise = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    model = mixture.model(scheduler.schedule)

    def network(x, t):
        return model(x, t) * scale

    def gradients(draw, steps, **options):
        x = draw(network, noise, scheduler, num_inference_steps=steps, **options)
        return x, torch.autograd.grad(x.square().sum(), [noise, scale])

    errors = []
    for steps in (40, 80):
        x, exact = gradients(differentiable_sample, steps)
        y, found = gradients(continuous_sample, steps, inputs=[scale])
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)  # the sample is DDIM's
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert math.log2(a / b) > 0.9, errors  # order one; the limit is met from above


def test_the_continuous_adjoint_of_half_precision_does_not_underflow():
    scheduler = SOLVERS["ddim"](**SD)
    weight = torch.tensor(0.5, dtype=torch.float16, requires_grad=True)
    noise = torch.randn(2, 3, 4, dtype=torch.float16, requires_grad=True)
    x = continuous_sample(
        lambda x, t: torch.tanh(x * weight), noise, scheduler, inputs=[weight], num_inference_steps=20
    )
    small = torch.full_like(x, 2.0**-20)  # times a slope of the network, below what float16 holds
    by_noise, by_weight = torch.autograd.grad(x, [noise, weight], small)
    assert by_noise.abs().min() > 0
    assert by_weight != 0
