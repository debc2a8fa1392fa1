"""The forward view: noising, errors, references, weights; against published values and as mathematics."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import Errors, Noised, add_noise, denoising_error, error_weight, evaluate
from diffalign.solvers.noise import NoiseSchedule
from tests.align.goldens import DTYPES, assert_golden, assert_golden_gradient, load

SD = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
FLOW = NoiseSchedule.flow(1000)


def predictions_as_denoiser(policy, reference):
    return lambda x_t, t, cond, reference_=reference, reference=False: reference_ if reference else policy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["ddpo_beta2000", "ddpo_beta5000"])
def test_diffusion_dpo_on_published_predictions(case, dtype):
    data = load("diffusion_dpo", f"{case}.{dtype}")
    policy = data["in/policy_pred"].requires_grad_()
    noised = Noised(torch.zeros_like(policy), data["in/target"], torch.zeros(4))
    errors = evaluate(predictions_as_denoiser(policy, data["in/ref_pred"]), noised, {})
    assert_golden(errors.policy, data["out/model_losses"], dtype)
    assert_golden(errors.reference, data["out/ref_losses"], dtype)
    chosen, rejected = errors.log_ratio().chunk(2)
    assert_golden(data["in/beta"] * (chosen - rejected), data["out/inside_term"], dtype)
    loss = losses.sigmoid(chosen, rejected, data["in/beta"]).mean()
    assert_golden(loss, data["out/loss"], dtype)
    loss.backward()
    assert_golden_gradient(policy.grad, data["grad/policy_pred"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_supervised_error(dtype):
    data = load("diffusion_dpo", f"sft.{dtype}")
    policy = data["in/policy_pred"].requires_grad_()
    loss = denoising_error(policy, data["in/target"]).mean()
    assert_golden(loss, data["out/loss"], dtype)
    loss.backward()
    assert_golden_gradient(policy.grad, data["grad/policy_pred"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "fn"), [("sigmoid", losses.sigmoid), ("hinge", losses.hinge), ("ipo", losses.ipo_raw)]
)
def test_lora_script_variants(name, fn, kind, dtype):
    data = load("diffusers_dpo", f"diffusers_{name}_{kind}.{dtype}")
    schedule = NoiseSchedule.from_alphas_cumprod(
        np.sort(data["in/alphas_cumprod_at_t"].numpy().astype(np.float64))[::-1]
    )
    order = torch.argsort(data["in/alphas_cumprod_at_t"], descending=True, stable=True)
    t = torch.argsort(order, stable=True)  # row -> index of its own noise level in this schedule
    noised = add_noise(schedule, kind, data["in/latents"], data["in/noise"], t)
    assert_golden(noised.x_t, data["out/noisy"], dtype)
    assert_golden(noised.target, data["out/target"], dtype)
    policy = data["in/policy_pred"].requires_grad_()
    errors = evaluate(predictions_as_denoiser(policy, data["in/ref_pred"]), noised, {})
    # That script's logit has no half: its log-ratio is twice ours.
    chosen, rejected = (2 * errors.log_ratio()).chunk(2)
    assert_golden(chosen - rejected, data["out/logits"], dtype)
    loss = fn(chosen, rejected, data["in/beta"]).mean()
    assert_golden(loss, data["out/loss"], dtype)
    loss.backward()
    assert_golden_gradient(policy.grad, data["grad/policy_pred"], dtype)


def toy_denoiser(data, kind):
    """tanh(W x + U c + k tau) + x/2, the denoiser of the published end-to-end cases."""

    def denoise(x_t, t, cond, reference=False):
        which = "ref" if reference else "policy"
        w, u = data[f"in/W_{which}"], data[f"in/U_{which}"]
        tau = t.to(x_t.dtype) / 1000
        shift = cond["caption"] @ u.T + tau[:, None] * data["in/k"]
        return torch.tanh(torch.einsum("oc,bchw->bohw", w, x_t) + shift[:, :, None, None]) + 0.5 * x_t

    return denoise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("captions", ["shared", "dual"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_end_to_end_down_to_the_weights(kind, captions, dtype):
    data = load("end_to_end", f"e2e_{kind}_{captions}.{dtype}")
    if kind == "flow":
        schedule, t, kind = FLOW, data["in/sigma"].double() * 1000, "flow_prediction"
    else:
        schedule, t = SD, data["in/timesteps"]
        torch.testing.assert_close(
            torch.as_tensor(schedule.alpha(t.numpy()) ** 2),
            data["in/alphas_cumprod_at_t"].double(),
            rtol=1e-5,
            atol=0,
        )
    weights = [data[f"in/{name}_policy"].requires_grad_() for name in "WU"]
    noised = add_noise(schedule, kind, data["in/latents"], data["in/noise"], t)
    # The published tables are float32 sums of betas, ours float64: 1e-6 apart, whatever the case's precision.
    torch.testing.assert_close(noised.x_t, data["out/xt"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(noised.target, data["out/target"], rtol=2e-5, atol=2e-5)
    exact = Noised(data["out/xt"], data["out/target"], noised.t)
    errors = evaluate(toy_denoiser(data, kind), exact, {"caption": data["in/caption_emb"]})
    chosen, rejected = errors.log_ratio().chunk(2)
    loss = losses.sigmoid(chosen, rejected, data["in/beta"]).mean()
    # beta 5000 on a difference of four means: 1e-8 of rounding in each is 1e-4 in the float32 logit.
    slack = {"rtol": 1e-9, "atol": 1e-12} if dtype == "float64" else {"rtol": 2e-4, "atol": 1e-4}
    logit = data["in/beta"] * (chosen - rejected)
    torch.testing.assert_close(logit, data["out/inside_term"], **slack)
    assert_golden(loss, data["out/loss"], dtype)
    loss.backward()
    for weight, name in zip(weights, "WU", strict=True):
        assert_golden_gradient(weight.grad, data[f"grad/{name}_policy"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_policy_equal_to_its_reference_has_log_ratio_zero(dtype):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(4, 4, 3, padding=1).to(dtype)
    latents, noise = torch.randn(8, 4, 8, 8), torch.randn(4, 4, 8, 8)
    noised = add_noise(SD, "epsilon", latents, noise.repeat(2, 1, 1, 1), torch.arange(4).repeat(2) * 200)
    errors = evaluate(lambda x, t, c, reference=False: net(x.to(dtype)), noised, {})
    chosen, rejected = errors.log_ratio().chunk(2)
    assert chosen.dtype == torch.float32
    assert not (chosen - rejected).any()
    loss = losses.sigmoid(chosen, rejected, 5000.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_subtracted_in_float32(dtype):
    torch.manual_seed(0)
    target = torch.randn(4, 4, 32, 32)
    prediction = (target + 0.3 * torch.randn_like(target)).to(dtype)
    exact = (prediction.double() - target.double()).square().flatten(1).mean(1)
    assert denoising_error(prediction, target).dtype == torch.float32
    torch.testing.assert_close(denoising_error(prediction, target).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", [0.1, 0.3, 0.9])
def test_the_logit_of_a_half_precision_model_is_that_of_exact_sums(dtype, error):
    """At beta 5000, where sums in half precision would put it off by 0.07 to 3.6."""
    torch.manual_seed(0)
    target = torch.randn(16, 4, 64, 64)
    policy = target + error**0.5 * torch.randn_like(target)
    policy, reference = policy.to(dtype), (policy + 0.01 * torch.randn_like(target)).to(dtype)

    def logit(mean):
        ratio = -0.5 * (mean(policy) - mean(reference))
        return 5000 * (ratio[:8] - ratio[8:]).double()

    exact = logit(lambda p: (p.double() - target.double()).square().flatten(1).mean(1))
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(logit(lambda p: denoising_error(p, target)), exact, rtol=0, atol=1e-3)
    halves = logit(lambda p: (p - target.to(dtype)).square().flatten(1).mean(1))
    assert (halves - exact).abs().max() > 0.05


def test_noise_at_the_first_steps_survives_half_precision_latents():
    # A table cast to bf16 would make sigma 0 at t = 0 and 1.
    latents = torch.zeros(2, 1, 64, 64, dtype=torch.bfloat16)
    noised = add_noise(SD, "epsilon", latents, torch.ones(2, 1, 64, 64), torch.tensor([0, 1]))
    assert noised.x_t.dtype == torch.float32
    assert noised.x_t[:, 0, 0, 0].tolist() == pytest.approx(SD.sigma(np.array([0, 1])).tolist(), rel=1e-6)


def test_error_reductions_agree():
    prediction, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    mean, total = (denoising_error(prediction, target, reduce=r) for r in ("mean", "sum"))
    torch.testing.assert_close(mean * 120, total)
    mask = torch.zeros(3, 1, 5, 6)
    mask[..., :2] = 1
    torch.testing.assert_close(
        denoising_error(prediction, target, mask=mask),
        denoising_error(prediction[..., :2], target[..., :2]),
    )
    weight = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(denoising_error(prediction, target, weight=weight), mean * weight)


def test_reference_known_beforehand_equals_reference_run_now():
    data = load("end_to_end", "e2e_epsilon_shared.float64")
    noised = add_noise(SD, "epsilon", data["in/latents"], data["in/noise"], data["in/timesteps"])
    cond, denoise = {"caption": data["in/caption_emb"]}, toy_denoiser(data, "epsilon")
    live = evaluate(denoise, noised, cond)
    again = evaluate(denoise, noised, cond, reference=live.reference)
    assert torch.equal(live.log_ratio(), again.log_ratio())


def test_without_a_reference_none_is_run():
    def denoise(x_t, t, cond, reference=False):
        assert not reference
        return x_t

    noised = Noised(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.zeros(2))
    errors = evaluate(denoise, noised, {}, reference=False)
    assert errors.reference is None
    assert errors.log_ratio().tolist() == [-0.5, -0.5]


def test_the_reference_carries_no_gradient():
    parameter = torch.ones((), requires_grad=True)
    noised = Noised(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.zeros(2))
    errors = evaluate(lambda x, t, c, reference=False: parameter * x, noised, {})
    assert isinstance(errors, Errors)
    assert errors.policy.requires_grad
    assert not errors.reference.requires_grad


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["eps", "x0", "v", "snr_gamma", "elbo"])
def test_a_weighting_gives_one_error_whatever_the_network_predicts(name, kind):
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 6, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([5, 100, 300, 500, 700, 950])
    alpha, sigma = (torch.as_tensor(level)[:, None, None, None] for level in SD.alpha_sigma(t.numpy()))
    believed_x0 = x0 + 0.1 * torch.randn_like(x0)

    def error(kind):
        noised = add_noise(SD, kind, x0, noise, t)
        believed_noise = (noised.x_t - alpha * believed_x0) / sigma
        prediction = {
            "epsilon": believed_noise,
            "sample": believed_x0,
            "v_prediction": alpha * believed_noise - sigma * believed_x0,
        }[kind]
        return denoising_error(prediction, noised.target, weight=error_weight(name, SD, kind, t))

    torch.testing.assert_close(error(kind), error("epsilon"), rtol=1e-9, atol=0)


def test_flow_weighting_reaches_the_epsilon_error():
    t = torch.tensor([100.0, 500.0, 900.0])
    weight = error_weight("eps", FLOW, "flow_prediction", t)
    torch.testing.assert_close(weight, (1 - t.double() / 1000).square())  # err_flow = err_eps / (1 - sigma)^2


def test_x0_weighting_of_an_edm_network_is_the_error_of_its_denoiser():
    """And its own error that with Karras' weight ``(s^2 + sd^2) / (s sd)^2``."""
    torch.manual_seed(0)
    schedule, theirs = NoiseSchedule.edm(), EDMEulerScheduler()
    level = torch.tensor([0.01, 0.3, 2.0, 60.0], dtype=torch.float64)
    x0, noise, output = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    t = theirs.precondition_noise(level)
    noised = add_noise(schedule, "edm", x0, noise, t)
    denoised = theirs.precondition_outputs(x0 + level[:, None, None] * noise, output, level[:, None, None])
    expected = (denoised - x0).square().flatten(1).mean(1)
    weight = error_weight("x0", schedule, "edm", t)
    torch.testing.assert_close(denoising_error(output, noised.target, weight=weight), expected)
    own = expected * (level**2 + 0.25) / (0.5 * level) ** 2
    torch.testing.assert_close(denoising_error(output, noised.target), own)


def test_elbo_weight_is_the_slope_of_the_log_snr():
    t = torch.tensor([50, 500, 900])
    slope = [(SD.lambda_(x - 0.01) - SD.lambda_(x + 0.01)) / 0.02 * 1000 for x in (50.25, 500.25, 900.25)]
    assert error_weight("elbo", SD, "epsilon", t).tolist() == pytest.approx(slope, rel=0.02)
    edm = NoiseSchedule.edm()
    times = torch.tensor([edm.t_min, -0.3, edm.t_max], dtype=torch.float64)
    weight = error_weight("elbo", edm, "epsilon", times)  # lambda falls evenly with time
    assert weight.tolist() == pytest.approx([4 * (edm.t_max - edm.t_min)] * 3)


def test_native_weighting_is_no_weighting_and_typos_are_named():
    assert error_weight("native", SD, "epsilon", torch.tensor([1])) is None
    with pytest.raises(UserError, match="did you mean 'snr_gamma'"):
        error_weight("snr-gamma", SD, "epsilon", torch.tensor([1]))


def test_a_weighting_of_ones_own_is_a_function_of_the_time():
    schedule = NoiseSchedule.from_config({})
    t = torch.tensor([0, 250, 999])
    weight = error_weight(lambda t: 1 - t / 1000, schedule, "epsilon", t.double())
    assert weight.tolist() == pytest.approx([1.0, 0.75, 0.001])
    error = denoising_error(torch.ones(3, 4), torch.zeros(3, 4), weight=weight)
    assert error.tolist() == pytest.approx(weight.tolist())
