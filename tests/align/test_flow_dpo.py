"""Flow-DPO: Diffusion-DPO on flow models, with the defaults of the published recipe."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign import losses
from diffalign.data import PairDataset
from diffalign.errors import UserError
from diffalign.likelihood import add_noise, error_weight, evaluate
from diffalign.solvers.noise import NoiseSchedule
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer, FlowDPOConfig, FlowDPOTrainer
from tests.align.families import build
from tests.align.goldens import load_online

FLOW = NoiseSchedule.flow()


class Says:
    """A network that gives these velocities, whatever it is asked."""

    def __init__(self, policy, reference):
        self.policy, self.of_reference = policy, reference

    def __call__(self, x_t, t, cond, reference=False):
        return self.of_reference if reference else self.policy


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(0)

    def picture():
        return Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))

    count = 8
    prompts = [f"picture {i % 4}" for i in range(count)]
    return PairDataset.from_lists(prompts, [picture() for _ in prompts], [picture() for _ in prompts])


@pytest.fixture
def run_of(tmp_path, pairs):
    def make(name="sd3", kind=FlowDPOTrainer, config=FlowDPOConfig, folder="run", **options):
        settings = {
            "output_dir": str(tmp_path / folder),
            "train_batch_size": 4,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "checkpointing_steps": 0,
            "progress": False,
        } | options
        return kind(config(**settings), model=build(name), dataset=pairs)

    return make


# -------------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_published_loss_and_its_gradient(dtype):
    case = load_online("flow", f"flow_dpo/{dtype}")
    clean, noise, sigma = (case[f"input/{name}"] for name in ("clean", "noise", "sigma"))
    noised = add_noise(FLOW, "flow_prediction", clean, noise, sigma.double() * 1000)
    torch.testing.assert_close(noised.x_t, case["input/noisy"], rtol=1e-5, atol=1e-6)
    policy = case["input/policy_velocity"].requires_grad_()
    errors = evaluate(Says(policy, case["input/ref_velocity"]), noised, {})
    chosen, rejected = errors.log_ratio().chunk(2)
    loss = losses.sigmoid(chosen, rejected, 100.0)
    loss.mean().backward()
    # Velocities and errors are float32 in the published code, also where its inputs are float64.
    tolerance = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(errors.policy.detach(), case["output/err_policy"], **tolerance)
    torch.testing.assert_close(errors.reference, case["output/err_ref"], **tolerance)
    torch.testing.assert_close(100 * (chosen - rejected).detach(), case["output/inside"], **tolerance)
    torch.testing.assert_close(loss.mean().detach(), case["output/loss"], **tolerance)
    torch.testing.assert_close(policy.grad, case["output/grad_policy_velocity"], **tolerance)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), beta=st.floats(1.0, 500.0))
def test_beta_times_one_minus_s_squared_is_the_error_of_the_noise(seed, beta):
    """The two betas by rescaling the error: the network's noise is x_s + (1 - s) v, so its error is (1 - s)^2
    times the velocity's."""
    generator = torch.Generator().manual_seed(seed)
    x, z, velocity, of_reference = torch.randn(4, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    z = z[:2].repeat(2, 1, 1, 1)
    s = torch.rand(2, generator=generator, dtype=torch.float64).repeat(2)
    noised = add_noise(FLOW, "flow_prediction", x, z, s * 1000)

    def log_ratios(weight):
        return evaluate(Says(velocity, of_reference), noised, {}, weight=weight).log_ratio().chunk(2)

    weighted = losses.sigmoid(*log_ratios(error_weight("eps", FLOW, "flow_prediction", s * 1000)), beta)
    beta_s = beta * (1 - s[:2]) ** 2
    torch.testing.assert_close(weighted, losses.sigmoid(*log_ratios(None), beta_s))

    def noise_of(v):
        return noised.x_t + (1 - s[:, None, None, None]) * v

    def error(v):
        return (noise_of(v) - z).square().flatten(1).mean(1)

    by_noise = -0.5 * (error(velocity) - error(of_reference))
    torch.testing.assert_close(weighted, losses.sigmoid(*by_noise.chunk(2), beta))


# -------------------------------------------------------------------- the trainer


def test_it_is_diffusion_dpo_with_other_defaults(run_of):
    ours = run_of()
    theirs = run_of(
        kind=DiffusionDPOTrainer,
        config=DiffusionDPOConfig,
        folder="dpo",
        beta_dpo=100.0,
        timestep_sampling="logit_normal",
    )
    for run in (ours, theirs):
        run.train()
    for p, q in zip(ours.weights.trainable, theirs.weights.trainable, strict=True):
        assert torch.equal(p, q)
    assert any(p.any() for p in ours.weights.trainable)


@pytest.mark.parametrize("schedule", ["constant", "one_minus_s_squared"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_fresh_lora_costs_log_two_and_pairs_share_noise_and_time(name, schedule, run_of, tmp_path):
    run = run_of(name, beta_schedule=schedule)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[1]["rewards/margins"] != 0
    batch = run.batch(0, range(4))
    for rows in (batch.noise, batch.t):
        assert torch.equal(rows[:4], rows[4:])


def test_the_schedule_weighs_what_is_logged_and_trained(run_of):
    constant, squared = run_of(), run_of(folder="squared", beta_schedule="one_minus_s_squared")
    for run in (constant, squared):
        run.train()
    batch = constant.batch(1, range(4))
    with torch.no_grad():
        plain = constant._errors(batch)
        constant.config.weighting = "eps"
        weighted = constant._errors(batch)
    s = batch.t / 1000
    torch.testing.assert_close(weighted.policy, plain.policy * (1 - s) ** 2)
    torch.testing.assert_close(weighted.reference, plain.reference * (1 - s) ** 2)
    assert not torch.equal(constant.weights.trainable[1], squared.weights.trainable[1])


@pytest.mark.parametrize("options", [{}, {"low_memory": True}])
def test_margins_grow(options, run_of, tmp_path):
    run = run_of(max_train_steps=25, train_batch_size=8, learning_rate=5e-3, **options)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert np.mean([r["rewards/margins"] for r in records[-10:]]) > 0.05
    assert np.mean([r["rewards/accuracies"] for r in records[-10:]]) > 0.8


def test_a_model_without_a_flow_is_refused(run_of):
    with pytest.raises(UserError, match="flow-dpo is for flow models, but this one predicts epsilon"):
        run_of("sd").train()


def test_two_units_of_error_are_refused(run_of):
    with pytest.raises(UserError, match="one_minus_s_squared is weighting eps: leave weighting x0 out"):
        run_of(beta_schedule="one_minus_s_squared", weighting="x0")
    with pytest.raises(UserError, match="beta_schedule must be one of constant, one_minus_s_squared"):
        run_of(beta_schedule="linear")
    assert run_of(weighting="x0").config.weighting == "x0"
