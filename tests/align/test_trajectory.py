"""The trajectory view against published values, against autograd, and as probability theory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import Gaussian, Transition, guided
from diffalign.solvers.noise import NoiseSchedule
from diffalign.solvers.prediction import PREDICTIONS
from tests.align.goldens import load_online as load

SD = NoiseSchedule.from_config(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
)
FLOW = NoiseSchedule.flow(1000)
TWENTY = np.array([*range(951, 0, -50), -1.0])


def check_step(transition, case, output, *, tolerance):
    """One published transition: the state drawn, both log-probabilities and their gradient."""
    raw = case[f"input/{output}"].clone().requires_grad_()
    x = case["input/sample"]
    step = transition(raw, x, range(len(x)))
    drawn = case["output/prev_sample"]
    given = step.log_prob(case["input/given_prev"])
    (given * case["input/weights"]).sum().backward()
    for actual, wanted in (
        (step.sample(case["input/noise"]), drawn),
        (step.log_prob(drawn), case["output/logprob_of_sampled"]),
        (given, case["output/logprob_of_given"]),
    ):
        torch.testing.assert_close(actual, wanted, rtol=tolerance[0], atol=tolerance[1])
    (wanted,) = (v for k, v in case.items() if k.startswith("output/grad"))
    # Small steps amplify the rounding in float32, in the original as well.
    assert (raw.grad - wanted).abs().max() <= 10 * tolerance[0] * wanted.abs().max()


def levels(alphas_cumprod):
    a = alphas_cumprod.double().numpy()
    return np.sqrt(a), np.sqrt(1 - a)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", (1e-4, 5e-5)), ("float64", (1e-9, 1e-7))])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_as_published(kind, dtype, tolerance, eta):
    """In float32 the original forms 1 - alpha_t^2/alpha_p^2 by a cancellation that costs its std 3e-5."""
    case = load("ddim_logprob", f"d3po_ddim_logprob/{kind}/{dtype}/eta{eta}")
    transition = Transition.between(
        *levels(case["input/alpha_t"]), *levels(case["input/alpha_prev"]), kind, law="ddim", eta=eta
    )
    check_step(transition, case, "model_output", tolerance=tolerance)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_step_as_published_for_spo(kind, eta):
    case = load("ddim_logprob", f"spo_ddim_logprob/{kind}/float32/eta{eta}")
    transition = Transition.between(
        *levels(case["input/alpha_t"]), *levels(case["input/alpha_prev"]), kind, law="ddim", eta=eta
    )
    check_step(transition, case, "model_output", tolerance=(1e-4, 5e-5))


def test_euler_ancestral_step_as_published():
    case = load("pso", "pso_turbo_step")
    s, s_next = case["input/sigma"].double().numpy(), case["input/sigma_next"].double().numpy()
    transition = Transition.between(1.0, s, 1.0, s_next, "epsilon", law="euler_ancestral")
    check_step(transition, case, "model_output", tolerance=(2e-4, 1e-4))


def test_euler_ancestral_is_ddim_at_eta_1():
    """In the variance-preserving variable x / sqrt(1 + s^2); a log-ratio does not see the variable."""
    times = np.array([999.0, 749, 499, 249])
    alpha, sigma = SD.alpha_sigma(times)
    preserving = Transition.along(SD, "epsilon", times, law="ddim", eta=1.0)
    exploding = Transition.between(
        1.0, (sigma / alpha)[:-1], 1.0, (sigma / alpha)[1:], "epsilon", law="euler_ancestral"
    )
    x, raw, other, z = torch.randn(4, 3, 2, 4, 4, dtype=torch.float64)
    a, a_next = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in (alpha[:-1], alpha[1:]))
    steps = range(3)
    one, two = preserving(raw, x, steps), exploding(raw, x / a, steps)
    torch.testing.assert_close(one.sample(z), two.sample(z) * a_next)
    torch.testing.assert_close(
        one.log_ratio(preserving(other, x, steps), one.sample(z)),
        two.log_ratio(exploding(other, x / a, steps), two.sample(z)),
    )


def test_renoising_step_as_published():
    case = load("pso", "pso_x0_renoise_step")
    transition = Transition.between(
        *levels(case["input/alpha_t"]), *levels(case["input/alpha_prev"]), "epsilon", law="renoise"
    )
    check_step(transition, case, "model_output", tolerance=(2e-4, 1e-4))


@pytest.mark.parametrize("shift", ["1.0", "3.0"])
def test_flow_sde_step_as_published(shift):
    case = load("flow", f"flow_sde_step/nl0.7/shift{shift}")
    s, s_next = case["input/sigma"].double().numpy(), case["input/sigma_next"].double().numpy()
    transition = Transition.between(
        1 - s, s, 1 - s_next, s_next, "flow_prediction", law="flow_sde", noise_level=0.7, last_noise=True
    )
    check_step(transition, case, "velocity", tolerance=(2e-4, 2e-5))
    exact = Transition.between(1 - s, s, 1 - s_next, s_next, "flow_prediction", law="flow_sde")
    assert exact.stochastic.tolist() == [0, 1]  # the step to sigma 0 adds no noise


@pytest.mark.parametrize(("method", "beta"), [("d3po", 0.1), ("spo", 10.0)])
def test_end_to_end(method, beta):
    """Guided outputs of policy and reference on both members of a pair -> loss and gradients."""
    case = load("end_to_end", f"{method}_end_to_end")
    transition = Transition.between(
        *levels(case["input/alpha_t"]), *levels(case["input/alpha_prev"]), "epsilon"
    )
    leaves = {k: v.clone().requires_grad_() for k, v in case.items() if k.startswith("input/policy")}
    found = {}
    for member in "01":
        x = case[f"input/latents_{member}"]

        def network(x_t, t, cond, reference=False):
            return cond["output"]

        def step(who, member=member, x=x, network=network):
            source = leaves if who == "policy" else case
            outputs = [{"output": source[f"input/{who}_{b}_{member}"]} for b in ("cond", "uncond")]
            return transition(guided(network, x, case["input/timesteps"], *outputs, 5.0), x, range(len(x)))

        policy, reference = step("policy"), step("ref")
        after = case[f"input/next_{member}"]
        for who, gaussian in (("policy", policy), ("ref", reference)):
            torch.testing.assert_close(
                gaussian.log_prob(after), case[f"output/logp_{who}_{member}"], rtol=1e-8, atol=1e-7
            )
        found[member] = policy.log_ratio(reference, after)
        difference = policy.log_prob(after) - reference.log_prob(after)
        torch.testing.assert_close(found[member], difference, rtol=1e-8, atol=1e-13)
    sign = case["input/prefer"]
    sign = sign.reshape(-1, 2) if sign.numel() == 2 * len(found["0"]) else sign.expand(len(found["0"]), 2)
    clipped = [losses.clip_log_ratio(found[m], 0.1) for m in "01"]
    first, second = (sign[:, i] * clipped[i] for i in range(2))
    loss = losses.sigmoid(first, -second, beta).mean()
    torch.testing.assert_close(loss, case["output/loss"].reshape(()), rtol=1e-8, atol=1e-12)
    loss.backward()
    if method == "spo":  # both members share their state: its gradients come in one sum
        for branch in ("uncond", "cond"):
            total = sum(
                leaves[f"input/policy_{branch}_{m}"].grad
                for m in "01"
                if leaves[f"input/policy_{branch}_{m}"].grad is not None
            )
            torch.testing.assert_close(total, case[f"output/grad_policy_{branch}_0"], rtol=1e-7, atol=1e-12)
    else:
        for name, leaf in leaves.items():
            wanted = case[name.replace("input/", "output/grad_")]
            torch.testing.assert_close(leaf.grad, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("method", "beta"), [("d3po", 0.1), ("spo", 10.0), ("pso_online", 50.0)])
def test_clipped_pair_loss_as_published(method, beta, dtype):
    case = load("pair_losses", f"{method}_loss/{dtype}")
    policy = [case[f"input/logp_policy_{i}"].clone().requires_grad_() for i in range(2)]
    ratios = [policy[i] - case[f"input/logp_ref_{i}"] for i in range(2)]
    clipped = [losses.clip_log_ratio(r, 0.1) for r in ratios]
    sign = case["input/prefer"]
    loss = losses.sigmoid(sign[:, 0] * clipped[0], -sign[:, 1] * clipped[1], beta).mean()
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, case["output/loss"].reshape(()), **close)
    loss.backward()
    for i in range(2):
        torch.testing.assert_close(clipped[i].exp(), case[f"output/ratio_{i}"], **close)
        torch.testing.assert_close(policy[i].grad, case[f"output/grad_logp_policy_{i}"], **close)


def test_policy_gradient_as_published():
    for name in ("ddpo_loss", "flow_grpo_loss"):
        case = load("policy_gradient", name)
        logp = case["input/logp"].clone().requires_grad_()
        loss = losses.policy_gradient(logp - case["input/logp_old"], case["input/advantages"]).mean()
        wanted = case["output/policy_loss" if name == "flow_grpo_loss" else "output/loss"]
        torch.testing.assert_close(loss, wanted.reshape(()), rtol=1e-4, atol=1e-7)
        if name == "flow_grpo_loss":
            mean = case["input/mean_policy"].clone().requires_grad_()
            std = case["input/std_dev_t"].reshape(-1, 1, 1, 1)
            kl = 0.04 * Gaussian(mean, std).kl(Gaussian(case["input/mean_ref"], std)).mean()
            torch.testing.assert_close(kl / 0.04, case["output/kl_loss"].reshape(()), rtol=1e-4, atol=1e-7)
            kl.backward()
            torch.testing.assert_close(mean.grad, case["output/grad_mean_policy"], rtol=1e-4, atol=1e-7)
        loss.backward()
        torch.testing.assert_close(logp.grad, case["output/grad_logp"], rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------- as mathematics


@pytest.mark.parametrize("kind", [k for k in PREDICTIONS if k != "flow_prediction"])
def test_every_prediction_type_gives_the_same_step(kind):
    x0, eps, z = torch.randn(3, 20, 2, 3, 3, dtype=torch.float64)
    alpha, sigma = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in SD.alpha_sigma(TWENTY[:-1]))
    p, q = PREDICTIONS[kind](alpha, sigma)
    x = alpha * x0 + sigma * eps
    step = Transition.along(SD, kind, TWENTY)
    gaussian = step(p * x0 + q * eps, x, range(20))
    reference = Transition.along(SD, "epsilon", TWENTY)(eps, x, range(20))
    torch.testing.assert_close(gaussian.sample(z), reference.sample(z))
    torch.testing.assert_close(step.predicted_x0(p * x0 + q * eps, x, range(20)), x0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), eta=st.floats(0.05, 1.0), law=st.sampled_from(["ddim", "renoise"]))
def test_marginals_are_those_of_the_schedule(seed, eta, law):
    """With the network that knows x0, every state of a trajectory has variance sigma^2 around alpha x0."""
    options = {"eta": eta} if law == "ddim" else {}
    along = Transition.along(SD, "sample", TWENTY, law=law, **options)
    alpha, sigma = SD.alpha_sigma(TWENTY)
    variance = 1.0 - alpha[0] ** 2
    for i in range(len(along)):
        # x' = state x + output x0 + std z
        assert along.state[i] * alpha[i] + along.output[i] == pytest.approx(alpha[i + 1], abs=1e-9)
        variance = along.state[i] ** 2 * variance + along.std[i] ** 2
        assert variance == pytest.approx(sigma[i + 1] ** 2, abs=1e-9)


def test_flow_sde_keeps_the_marginals_to_first_order():
    errors = []
    for steps in (100, 400):
        times = np.linspace(990, 10, steps + 1)
        along = Transition.along(FLOW, "sample", times, law="flow_sde")
        variance = 0.99**2
        for state, std in zip(along.state, along.std, strict=True):
            variance = state**2 * variance + std**2
        errors.append(abs(variance - 0.01**2) / 0.01**2)
    assert errors[1] < errors[0] / 2.5


def test_log_ratio_is_that_of_densities_and_exactly_zero_for_equals():
    torch.manual_seed(0)
    mean, other, x = torch.randn(3, 5, 4, 6, 6, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    one, two = Gaussian(mean, std), Gaussian(other, std)
    torch.testing.assert_close(one.log_ratio(two, x), one.log_prob(x) - two.log_prob(x))
    torch.testing.assert_close(one.log_ratio(two, x, "sum"), 144 * one.log_ratio(two, x))
    for dtype in (torch.float32, torch.float64):
        same = Gaussian(mean.to(dtype), std.to(dtype))
        assert (same.log_ratio(Gaussian(mean.to(dtype), std.to(dtype)), x) == 0).all()
    normal = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(
        one.kl(two, "sum"),
        torch.distributions.kl_divergence(normal, torch.distributions.Normal(other, std)).flatten(1).sum(1),
    )
    torch.testing.assert_close(one.log_prob(x, "sum"), normal.log_prob(x).flatten(1).sum(1))


def test_kl_weight_is_the_bridge_to_the_forward_view():
    along = Transition.along(SD, "epsilon", np.array([*range(951, 0, -50), 0.0]))
    by_time = dict(zip(along.timesteps.astype(int).tolist(), along.kl_weight, strict=True))
    for t, weight in {951: 0.364, 751: 0.256, 451: 0.194, 201: 0.284, 51: 14.7, 1: 0.50}.items():
        assert by_time[t] == pytest.approx(weight, rel=0.02)
    x, raw, other = torch.randn(3, 20, 2, 4, 4, dtype=torch.float64)
    steps = range(20)
    kl = along(raw, x, steps).kl(along(other, x, steps))
    torch.testing.assert_close(kl, torch.tensor(along.kl_weight) * (raw - other).square().flatten(1).mean(1))


def test_half_precision_states_do_not_lose_the_ratio():
    """Small changes of the network's output must show, although log-probabilities in half would hide them."""
    along = Transition.along(SD, "epsilon", np.array([999.0, 749, 499, 249]), law="renoise")
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 8).half()
    raw = torch.randn(3, 4, 8, 8).half()
    policy, reference = along(raw + 2**-9 * torch.sign(raw), x, range(3)), along(raw, x, range(3))
    after = reference.sample(torch.randn(3, 4, 8, 8)).half()
    assert policy.mean.dtype == torch.float32
    exact = along(raw.double() + 2**-9 * torch.sign(raw).double(), x.double(), range(3))
    exact_ratio = exact.log_ratio(along(raw.double(), x.double(), range(3)), after)
    ratio = policy.log_ratio(reference, after)
    assert (ratio != 0).all()
    torch.testing.assert_close(ratio.double(), exact_ratio, rtol=0.05, atol=1e-7)


def test_deterministic_steps_are_named_and_never_floored():
    ode = Transition.along(SD, "epsilon", TWENTY, eta=0.0)
    assert len(ode.stochastic) == 0
    sde = Transition.along(SD, "epsilon", TWENTY)
    assert sde.stochastic.tolist() == list(range(19))  # the last ends in the clean latent
    x, raw = torch.randn(2, 1, 2, 4, 4)
    last = sde(raw, x, 19)
    torch.testing.assert_close(last.mean, sde.predicted_x0(raw, x, 19))
    assert not torch.isfinite(last.log_prob(x)).all()


def test_rows_of_one_batch_may_be_at_different_steps():
    along = Transition.along(SD, "epsilon", TWENTY)
    x, raw = torch.randn(2, 3, 2, 4, 4)
    mixed = along(raw, x, [7, 0, 7])
    for row, step in enumerate([7, 0, 7]):
        alone = along(raw[row : row + 1], x[row : row + 1], step)
        assert torch.equal(mixed.rows([row]).mean, alone.mean)
    assert along.times([7, 0, 7], x).tolist() == [601, 951, 601]
    assert along.times(3, x).tolist() == [801] * 3


def test_draws_of_several_candidates_from_one_state():
    along = Transition.along(SD, "epsilon", TWENTY)
    x, raw = torch.randn(2, 3, 2, 4, 4)
    z = torch.randn(5, 3, 2, 4, 4)
    gaussian = along(raw, x, 4)
    candidates = gaussian.sample(z)
    assert candidates.shape == z.shape
    torch.testing.assert_close(candidates[2], gaussian.sample(z[2]))


def test_guidance_is_one_call_and_its_branch_can_be_detached():
    calls = []
    weight = torch.tensor([1.0], requires_grad=True)

    def network(x_t, t, cond, reference=False):
        calls.append(len(x_t))
        return weight * cond["c"]

    x = torch.zeros(2, 1, 1, 1)
    c, u = torch.full((2, 1, 1, 1), 3.0), torch.ones(2, 1, 1, 1)
    for detach, slope in ((False, 1 + 5 * (3 - 1)), (True, 5 * 3)):
        raw = guided(network, x, torch.zeros(2), {"c": c}, {"c": u}, 5.0, detach_uncond=detach)
        torch.testing.assert_close(raw, torch.full_like(raw, 11.0))
        (grad,) = torch.autograd.grad(raw.mean(), weight)
        assert grad.item() == pytest.approx(slope)
    assert calls == [4, 4]
    assert (guided(network, x, torch.zeros(2), {"c": c}, {"c": u}, 1.0) == c).all()
    assert calls == [4, 4, 2]


def test_clipped_ratios_have_no_gradient_on_either_side():
    d = torch.tensor([-0.2, -0.05, 0.05, 0.2], requires_grad=True)
    losses.clip_log_ratio(d, 0.1).sum().backward()
    assert d.grad.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(losses.clip_log_ratio(d, 0.1).exp(), d.exp().clamp(0.9, 1.1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"law": "dimm"}, "did you mean 'ddim'"),
        ({"law": "renoise", "eta": 1.0}, "renoise does not take eta"),
        ({"eta": 1.2}, "eta must lie between 0 and 1, but is 1.2"),
        ({"eta": -1.0}, "eta must lie between 0 and 1, but is -1.0"),
        ({"law": "flow_sde"}, "for flow models"),
    ],
)
def test_wrong_laws_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        Transition.along(SD, "epsilon", TWENTY, **arguments)


def test_times_must_fall():
    with pytest.raises(UserError, match="must fall step by step"):
        Transition.along(SD, "epsilon", [1.0, 951.0])
