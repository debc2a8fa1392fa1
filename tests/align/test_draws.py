"""Stratified times and several draws per example: unbiased, reproducible, and of less variance."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.solvers import NoiseSchedule
from diffalign.trainers import (
    DDOConfig,
    DDOTrainer,
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    StepAwareConfig,
    draws,
)

SCHEDULES = {
    "discrete": NoiseSchedule.from_config({}),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
}


# ---------------------------------------------------------------- quantiles and times


@settings(max_examples=30, deadline=None)
@given(places=st.integers(1, 40), seed=st.integers(0, 2**31), step=st.integers(0, 10**6))
def test_places_have_a_part_of_the_interval_each(places, seed, step):
    found = [draws.quantile((seed, "strata", step), place, places) for place in range(places)]
    assert sorted(int(u * places) for u in found) == list(range(places))
    assert all(0 < u < 1 for u in found)


def test_each_place_is_uniform_over_the_steps():
    found = np.array([[draws.quantile((7, step), place, 5) for place in (0, 3)] for step in range(2000)])
    for own in found.T:
        counts = np.histogram(own, bins=10, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 28  # 99.9 % of chi squared with 9 degrees of freedom
    steps = found[1:, 0], found[:-1, 0]
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.08


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_times_of_uniform_numbers_are_distributed_as_the_times_drawn(kind, sampling):
    schedule = SCHEDULES[kind]
    options = {"logit_mean": 0.4, "logit_std": 0.8}
    numbers = np.random.default_rng(0)
    drawn = [draws.time(numbers, schedule, sampling, **options) for _ in range(20000)]
    found = [draws.time_of((k + 0.5) / 20000, schedule, sampling, **options) for k in range(20000)]
    levels = np.linspace(0.05, 0.95, 19)
    slack = 0.02 * (schedule.t_max - schedule.t_min)
    np.testing.assert_allclose(np.quantile(found, levels), np.quantile(drawn, levels), atol=slack)
    assert all(isinstance(t, int if kind == "discrete" else float) for t in found)


def test_noise_levels_of_edm_are_log_normal():
    numbers = np.random.default_rng(0)
    options = {"logit_mean": -1.2, "logit_std": 1.2}  # of the paper
    times = [draws.time(numbers, SCHEDULES["edm"], "logit_normal", **options) for _ in range(20000)]
    logs = np.log(SCHEDULES["edm"].sigma_diffusers(times))
    assert logs.mean() == pytest.approx(-1.2, abs=0.03)
    assert logs.std() == pytest.approx(1.2, abs=0.03)


def test_uniform_quantiles_reach_every_training_step_once():
    schedule = NoiseSchedule.from_config({})
    count = schedule.num_train_timesteps
    times = [draws.time_of((k + 0.5) / count, schedule, "uniform") for k in range(count)]
    assert times == list(range(count))


# ---------------------------------------------------------------- averages


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 4), sides=st.integers(1, 2), examples=st.integers(1, 5))
def test_averages_are_over_the_draws_of_each_image(count, sides, examples):
    policy, reference = torch.randn(2, sides, count, examples)
    got = Errors(policy.flatten(), reference.flatten()).averaged(count, sides)
    torch.testing.assert_close(got.policy, policy.mean(1).flatten())
    torch.testing.assert_close(got.reference, reference.mean(1).flatten())
    assert Errors(policy.flatten(), None).averaged(count, sides).reference is None


def test_the_loss_is_of_the_mean_error_of_the_draws(trainer):
    run, plain = (trainer(f"run{k}", max_train_steps=1, draws_per_example=k, rank=0) for k in (3, 1))
    for each in (run, plain):
        each.train()
    torch.nn.init.normal_(run.weights.trainable[0], std=0.3)
    batch, first = run.batch(5, range(2, 6)), plain.batch(5, range(2, 6))
    assert batch.latents.shape[0] == batch.noise.shape[0] == len(batch.t) == 2 * 3 * 4
    # The first draw is the only one of a run without further ones; the others are of the same images.
    for name in ("latents", "noise", "t"):
        mine = getattr(batch, name).unflatten(0, (2, 3, 4))
        torch.testing.assert_close(mine[:, 0].flatten(0, 1), getattr(first, name))
        if name != "latents":
            assert not torch.equal(mine[:, 1], mine[:, 2])
    assert torch.equal(batch.latents.unflatten(0, (2, 3, 4))[:, 2].flatten(0, 1), first.latents)
    losses, sums = run.losses(5, range(2, 6))
    single = run._errors(batch).single
    chosen, rejected = (-0.5 * (single.policy - single.reference)).reshape(2, 3, 4).mean(1)
    wanted = -torch.nn.functional.logsigmoid(run.beta * (chosen - rejected))
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)  # beta is 2000
    # Errors by time count each draw at its own.
    metrics = run.summarise(sums.tolist(), 4)
    late = batch.t.reshape(2, -1)[0] >= 750
    got = metrics["errors_by_time"]["chosen"][3]
    own = single.policy.detach().chunk(2)[0][late]
    assert got == (pytest.approx(float(own.mean()), rel=1e-4) if late.any() else None)


def test_one_image_at_a_time_gives_the_same_run(trainer, log):
    both = [
        trainer(name, low_memory=low, draws_per_example=2, stratified_times=True)
        for name, low in (("low", True), ("high", False))
    ]
    for run in both:
        run.train()
    mine, theirs = (log(run.folder)[-1] for run in both)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert mine["errors_by_time"]["chosen"] == pytest.approx(theirs["errors_by_time"]["chosen"], rel=1e-4)


@pytest.mark.parametrize("point", ["batch", "mismatched"])
def test_single_images_have_their_draws_too(run_of, log, point):
    kto = partial(run_of, DiffusionKTOConfig, DiffusionKTOTrainer)
    run = kto(draws_per_example=2, stratified_times=True, reference_point=point, learning_rate=0.0)
    run.train()
    assert len(run.batch(0, range(8)).t) == 16
    assert log(run.folder)[-1]["loss"] == pytest.approx(0.5, abs=1e-6)


# ---------------------------------------------------------------- where the draws come from


def test_draws_of_a_step_share_the_times_evenly_however_they_are_split(trainer):
    run = trainer(train_batch_size=10, draws_per_example=2, stratified_times=True, max_train_steps=1)
    run.train()
    whole = run.batch(3, range(10))
    times = whole.t.reshape(2, 2, 10)  # of the images of a pair, the draws, the pairs
    assert torch.equal(times[0], times[1])
    assert (times[0, 0] < 500).all()
    assert (times[0, 1] >= 500).all()
    assert sorted((times[0].flatten() // 50).tolist()) == list(range(20))
    parts = [run.batch(3, range(first, first + 5)) for first in (0, 5)]
    joined = torch.cat([part.t.reshape(2, 2, 5) for part in parts], 2)
    assert torch.equal(joined, times)
    assert not torch.equal(run.batch(4, range(10)).t, whole.t)


def test_images_with_times_of_their_own_are_stratified_apart(run_of):
    run = run_of(DDOConfig, DDOTrainer, stratified_times=True, max_train_steps=1, sampling_steps=2)
    run.train()
    mine, theirs = run.batch(0, range(8)).t.chunk(2)
    for times in (mine, theirs):
        assert sorted((times // 125).tolist()) == list(range(8))
    assert not torch.equal(mine, theirs)


def test_given_times_are_shared_evenly(trainer):
    run = trainer(stratified_times=True, timesteps=[999, 249, 749, 499], max_train_steps=1)
    run.train()
    times = run.batch(0, range(8)).t.chunk(2)[0]
    assert sorted(times.tolist()) == [249, 249, 499, 499, 749, 749, 999, 999]


def test_a_resumed_run_draws_what_the_whole_one_does(trainer, log):
    options = {"draws_per_example": 2, "stratified_times": True, "checkpointing_steps": 2}
    whole = trainer("whole", max_train_steps=4, **options)
    whole.train()
    trainer("cut", max_train_steps=2, **options).train()
    again = trainer("cut", max_train_steps=4, resume_from_checkpoint="latest", **options)
    again.train()
    name = "pytorch_lora_weights.safetensors"
    mine, theirs = (load_file(run.folder / name) for run in (whole, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---------------------------------------------------------------- the gain


def test_the_loss_varies_less(trainer):
    """The same sixteen images at the same weights; only times and noise differ from step to step."""
    variance = {}
    for options in ((False, 1), (True, 1), (False, 2), (True, 2)):
        stratified, count = options
        run = trainer(
            f"run{options}",
            weighting="snr_gamma",
            snr_gamma=1.0,  # makes errors depend on the time, as those of trained networks do
            stratified_times=stratified,
            draws_per_example=count,
            train_batch_size=16,
            max_train_steps=1,
            learning_rate=0.0,
        )
        run.train()
        with torch.no_grad():
            means = [run._errors(run.batch(step, range(16))).policy.mean() for step in range(40)]
        variance[options] = float(torch.stack(means).var())
    # Were nothing gained, a ratio of two such variances would fall below 0.4 once in several hundred runs;
    # the seeds are fixed besides.
    assert variance[True, 1] < 0.4 * variance[False, 1]
    assert variance[True, 2] < 0.4 * variance[False, 2]
    assert variance[False, 2] < 0.9 * variance[False, 1]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (DiffusionDPOConfig, {"draws_per_example": 0}, "draws_per_example"),
        (DiffusionDPOConfig, {"draws_per_example": 2, "reference_draws": 2}, "leave one of them out"),
        (DiffusionDPOConfig, {"stratified_times": True, "reference_draws": 2}, "leave one of them out"),
        (DiffusionDPOConfig, {"draws_per_example": 2, "sdpo_mu": 0.9}, "one prediction per image"),
        (DiffusionDPOConfig, {"draws_per_example": 2, "dspo_beta": 0.1}, "one prediction per image"),
        (StepAwareConfig, {"draws_per_example": 2, "reward_model": "x"}, "draws_per_example"),
    ],
)
def test_what_cannot_work_is_refused(config, options, words):
    with pytest.raises(UserError, match=words):
        config(pretrained_model_name_or_path="m", dataset_name="d", output_dir="o", **options).check()
