"""DDO: the likelihood ratio as a discriminator, its fixed point, and rounds that begin afresh."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers import DDOConfig, DDOTrainer
from tests.align.families import build

SMALL = {"round_steps": 2, "sampling_steps": 2, "train_batch_size": 4, "max_train_steps": 3}


@pytest.fixture
def ddo(run_of):
    return partial(run_of, DDOConfig, DDOTrainer, **SMALL)


def test_at_the_reference_the_loss_is_that_of_a_coin(ddo, log):
    run = ddo(alpha_ddo=3.0)
    run.train()
    first, _, third = log(run.folder)
    assert first["loss"] == pytest.approx(4 * math.log(2), abs=1e-5)
    assert third["loss"] == pytest.approx(4 * math.log(2), abs=1e-5)  # the next round starts at its reference
    assert (first["round"], third["round"], first["logits_far"]) == (0, 1, 0)


def test_beta_is_of_sums_over_the_latent(ddo):
    run = ddo(max_train_steps=1, beta_ddo=0.5, alpha_ddo=2.0)
    run.train()
    elements = run.data.batch([0])["latents"].numel()
    assert run.beta == 2 * 0.5 * elements
    errors = Errors(torch.tensor([0.30, 0.50]), torch.tensor([0.32, 0.49]))
    loss, logit = run.pair_loss(errors, None)
    delta_data, delta_own = elements * 0.02, -elements * 0.01
    wanted = math.log1p(math.exp(-0.5 * delta_data)) + 2 * math.log1p(math.exp(0.5 * delta_own))
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    assert float(logit) == pytest.approx((0.5 * delta_data - 0.5 * delta_own) / 2, rel=1e-4)


def test_a_model_with_the_noise_of_edm(tmp_path, singles, log):
    """As the paper's are: samples of its own, and noise levels drawn as in its training."""
    config = DDOConfig(
        **SMALL,
        output_dir=str(tmp_path / "run"),
        resolution=8,
        rank=2,
        timestep_sampling="logit_normal",
        logit_mean=-0.4,
        checkpointing_steps=0,
        progress=False,
    )
    run = DDOTrainer(config, model=build("playground-v2.5"), dataset=singles)
    run.train()
    first, second, _ = log(run.folder)
    assert first["loss"] == pytest.approx((1 + config.alpha_ddo) * math.log(2), abs=1e-4)
    assert math.isfinite(second["loss"])
    assert second["loss"] != first["loss"]
    numbers = np.random.default_rng(0)
    levels = run.adapter.schedule.sigma_diffusers([run._time(numbers) for _ in range(2000)])
    assert math.log(float(np.median(levels))) == pytest.approx(-0.4, abs=0.1)


def test_data_and_samples_have_noise_and_time_of_their_own(ddo):
    run = ddo(max_train_steps=1, train_batch_size=8)
    run.train()
    batch = run.batch(0, range(8))
    assert len(batch.noise.unique(dim=0)) == 16
    mine, theirs = batch.t.chunk(2)
    assert not torch.equal(mine, theirs)
    # Errors by time count each image at its own.
    errors = run._errors(batch)
    _, logit = run.pair_loss(errors, batch)
    metrics = run.summarise(run._sums(errors, logit.detach(), batch).tolist(), 8)
    early = theirs < 250
    own = errors.policy.detach().chunk(2)[1][early]
    got = metrics["errors_by_time"]["rejected"][0]
    assert got == (pytest.approx(float(own.mean()), rel=1e-4) if early.any() else None)


def test_a_round_begins_with_a_new_optimiser_and_the_averaged_weights(ddo):
    run = ddo(use_ema=True, ema_decay=0.5)
    seen = {}
    start = run.start_round

    def watch(number):
        start(number)
        seen[number] = (
            dict(run.optimizer.state),
            [p.detach().clone() for p in run.weights.trainable],
            [p.clone() for p in run.ema.shadow_params],
        )

    run.start_round = watch
    run.train()
    state, weights, averages = seen[1]
    assert not state
    assert all(torch.equal(p, q) for p, q in zip(weights, averages, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(weights, seen[0][1], strict=True))


def test_resumed_at_the_border_of_rounds_it_ends_with_the_same_weights(ddo):
    options = {"use_ema": True, "ema_decay": 0.5, "checkpointing_steps": 2, "max_train_steps": 4}
    whole = ddo("whole", **options)
    whole.train()
    ddo("cut", **options | {"max_train_steps": 2}).train()
    again = ddo("cut", resume_from_checkpoint="latest", **options)
    again.train()
    for p, q in zip(whole.weights.trainable, again.weights.trainable, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 0.5)])
def test_the_fixed_point_of_exact_likelihoods(alpha, beta):
    """beta log(p / p_ref) = log p_data - log p_ref - log alpha, where every category has its own logit."""
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    ratio = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ratio], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        real = losses.ddo(ratio, torch.zeros_like(ratio), beta, fake_weight=0.0)
        fake = losses.ddo(torch.zeros_like(ratio), ratio, beta, fake_weight=alpha) + torch.log(
            torch.tensor(0.5)
        )
        loss = (data * real).sum() + (reference * fake).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = (data.log() - reference.log() - math.log(alpha)) / beta
    torch.testing.assert_close(ratio.detach(), wanted, rtol=1e-5, atol=1e-6)
    if alpha == beta == 1:
        torch.testing.assert_close(reference * ratio.detach().exp(), data, rtol=1e-5, atol=1e-6)


def test_logits_beyond_the_sigmoid_set_off_an_alarm():
    from diffalign.trainers.health import PATIENCE, Health

    health = Health()
    fired = [health.update({"logits_far": 0.9}) for _ in range(PATIENCE)]
    assert "lower --beta_ddo" in fired[-1]["beyond the sigmoid"]
    assert not any(fired[:-1])


@pytest.mark.parametrize("name", ["beta_ddo", "alpha_ddo"])
def test_options_that_cannot_work_are_refused(ddo, name):
    with pytest.raises(UserError, match=f"{name} must be above 0"):
        ddo(**{name: 0.0})
