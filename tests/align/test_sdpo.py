"""Losses that look at predictions: the guard of the chosen image (Diffusion-SDPO) and DSPO."""

import pytest
import torch

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import Errors, denoising_error


def errors_of(prediction, target, reference):
    known = denoising_error(reference, target)
    return Errors(
        denoising_error(prediction, target), known, residual=prediction - target, shift=prediction - reference
    )


@pytest.fixture
def predictions():
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 4, 4, 4, generator=numbers, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("scope", ["pair", "batch"])
def test_only_the_gradient_of_the_rejected_image_is_scaled(trainer, predictions, scope):
    prediction, target, reference = predictions
    target = torch.cat([target[:4], target[:4] + 0.1 * target[4:]])  # alike, so that residuals agree
    found = []
    for mu in (None, 0.6):
        leaf = prediction.clone().requires_grad_()
        run = trainer(f"run{mu}", sdpo_mu=mu, sdpo_scope=scope, beta_dpo=2.0)
        loss, logit = run.pair_loss(errors_of(leaf, target, reference), _Any())
        loss.sum().backward()
        found.append((loss.detach(), logit.detach(), leaf.grad))
    (loss, logit, plain), (guarded, same, scaled) = found
    assert torch.equal(loss, guarded)
    assert torch.equal(logit, same)
    scale = losses.winner_preserving_scale(
        *(prediction - target).chunk(2), mu=0.6, per_pair=scope == "pair"
    ).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(scaled[:4], plain[:4])
    torch.testing.assert_close(scaled[4:], plain[4:] * scale)


class _Any:
    preference = gap = None


def test_dspo_is_its_formula(trainer, predictions):
    prediction, target, reference = predictions
    run = trainer(dspo_beta=0.3, beta_dpo=2.0)
    loss, logit = run.pair_loss(errors_of(prediction, target, reference), _Any())
    d = -0.5 * ((prediction - target).square() - (reference - target).square()).flatten(1).mean(1)
    torch.testing.assert_close(logit, 2 * (d[:4] - d[4:]))
    factor = 0.3 * (1 - torch.sigmoid(logit)).reshape(-1, 1, 1, 1)
    moved = prediction[:4] - target[:4] - factor * (prediction[:4] - reference[:4])
    torch.testing.assert_close(loss, moved.square().flatten(1).mean(1))


def test_at_the_reference_dspo_is_fine_tuning_of_the_chosen_images(trainer, log):
    run = trainer(dspo_beta=1e-3, beta_dpo=1e-3, max_train_steps=2)
    run.train()
    first, second = log(run.folder)
    assert first["loss"] == pytest.approx(first["errors/chosen"], rel=1e-6)
    assert second["rewards/margins"] != 0


def test_one_image_at_a_time_gives_the_guarded_run(trainer, log):
    options = {"sdpo_mu": 0.9, "rank": 0, "beta_dpo": 20.0}  # a larger beta blows rounding up
    one, two = (trainer(f"run{low}", low_memory=low, **options) for low in (True, False))
    one.train()
    two.train()
    for mine, theirs in zip(log(one.folder), log(two.folder), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_guard_changes_what_is_learnt(trainer):
    one, two = (trainer(f"run{mu}", sdpo_mu=mu, rank=0, max_train_steps=2) for mu in (None, 0.9))
    one.train()
    two.train()
    pairs = zip(one.weights.trainable, two.weights.trainable, strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sdpo_mu": 1.5}, "sdpo_mu must be between 0 and 1"),
        ({"sdpo_scope": "step"}, "sdpo_scope must be pair or batch"),
        ({"sdpo_mu": 0.9, "sdpo_scope": "batch", "low_memory": True}, "low_memory takes one by one"),
        ({"dspo_beta": -1.0}, "dspo_beta must be 0 or more"),
        ({"dspo_beta": 0.1, "loss_type": "ipo"}, "dspo_beta is a loss of its own"),
        ({"dspo_beta": 0.1, "low_memory": True}, "dspo_beta is a loss of its own"),
        ({"dspo_beta": 0.1, "reference_draws": 2}, "dspo_beta is a loss of its own"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options)
