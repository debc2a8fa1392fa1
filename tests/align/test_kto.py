"""Diffusion-KTO: images one by one, what they are compared with, and how many of each are seen."""

import math
from functools import partial

import pytest
import torch

from diffalign import losses
from diffalign.data import open_images
from diffalign.errors import UserError
from diffalign.trainers import DiffusionKTOConfig, DiffusionKTOTrainer


@pytest.fixture
def kto(run_of):
    return partial(run_of, DiffusionKTOConfig, DiffusionKTOTrainer)


@pytest.mark.parametrize(
    ("rank", "utility"), [(0, "sigmoid"), (4, "sigmoid"), (4, "loss_averse"), (4, "risk_seeking")]
)
def test_at_the_reference_the_loss_is_that_of_no_gain(kto, log, rank, utility):
    run = kto(rank=rank, utility=utility, max_train_steps=1, learning_rate=0.0)
    run.train()
    record = log(run.folder)[0]
    none = {"sigmoid": 0.5, "loss_averse": 1 + math.log(2), "risk_seeking": 1 - math.log(2)}
    assert record["loss"] == pytest.approx(none[utility], abs=1e-6)
    assert (record["kl"], record["rewards/accuracies"], record["gradient_factor"]) == (0, 0.5, 0.5)


def test_noise_and_time_are_each_images_own(kto):
    run = kto(max_train_steps=1)
    run.train()
    batch = run.batch(0, range(8))
    assert batch.latents.shape[0] == batch.t.shape[0] == 8
    assert len(batch.noise.unique(dim=0)) == 8
    assert len(set(batch.t.tolist())) > 4
    wanted = run.adapter.encode_prompts([run.examples.prompts[row] for row in batch.rows])
    torch.testing.assert_close(batch.cond["prompt_embeds"], wanted["prompt_embeds"])
    assert batch.preference.tolist() == [run.examples.labels[row] for row in batch.rows]


@pytest.mark.parametrize(
    ("utility", "point"), [("sigmoid", "batch"), ("loss_averse", "balanced"), ("risk_seeking", "mismatched")]
)
def test_every_utility_parts_good_from_bad_images(kto, utility, point):
    """On one batch with its noise, as often as it takes: of fresh noise a few steps say little."""
    run = kto(
        rank=0,
        max_train_steps=1,
        learning_rate=0.0,
        train_batch_size=16,
        beta_kto=200.0,
        utility=utility,
        reference_point=point,
    )
    run.train()
    optimizer = torch.optim.Adam(run.weights.trainable, lr=3e-3)
    for _ in range(50):
        loss, sums = run.losses(0, range(16))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    metrics = run.summarise(sums.tolist(), 16)
    assert metrics["rewards/accuracies"] > 0.8
    assert metrics["rewards/chosen"] > metrics["rewards/rejected"] + 1


def test_the_step_is_the_loss_of_its_arithmetic(kto):
    run = kto(max_train_steps=2, beta_kto=300.0, weight_bad=0.25, reference_point="batch")
    run.train()
    batch = run.batch(5, range(8))
    gain, good = run._errors(batch).log_ratio().detach(), batch.preference > 0.5
    assert gain.abs().max() > 0
    kl = gain.mean().clamp(min=0)
    wanted = losses.kto(gain, good, 300.0, kl=kl, weight_bad=0.25)
    got, sums = run.losses(5, range(8))
    torch.testing.assert_close(got.detach(), wanted)
    metrics = run.summarise(sums.tolist(), 8)
    assert metrics["rewards/chosen"] == pytest.approx(300 * float(gain[good].mean()), rel=1e-4, abs=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(300 * float(gain[~good].mean()), rel=1e-4, abs=1e-6)
    assert metrics["good_share"] == good.float().mean()


@pytest.mark.parametrize(
    ("kind", "wanted"), [("batch", 0.1), ("balanced", (0.3 - 0.1) / 2), ("batch below 0", 0.0)]
)
def test_the_reference_point(kto, kind, wanted):
    run = kto(reference_point=kind.split()[0])
    gain = torch.tensor([0.5, 0.1, -0.2, 0.0])
    if kind == "batch below 0":
        gain = gain - 1
    good = torch.tensor([True, True, False, False])
    point = run._reference_point(gain, good, None)
    assert float(point) == pytest.approx(wanted)


def test_one_kind_of_image_in_a_batch_is_enough(kto, log):
    run = kto(train_batch_size=1, max_train_steps=2, reference_point="balanced")
    run.train()
    records = log(run.folder)
    assert all(math.isfinite(record["loss"]) for record in records)
    assert sum("rewards/chosen" in record for record in records) in (0, 1, 2)
    assert all("rewards/margins" not in record for record in records)


def test_a_share_of_good_images_is_kept_and_all_are_seen(kto):
    run = kto(good_share=0.8, max_train_steps=1)
    run.train()
    rows = run.rows_at(range(200))
    good = [run.examples.labels[row] == 1 for row in rows]
    assert sum(good) == 160
    assert all(abs(sum(good[:n]) - 0.8 * n) <= 1 for n in range(1, 200))
    assert len(set(rows)) == len(run.examples)
    assert rows[40:60] == run.rows_at(range(40, 60))


def test_known_reference_errors_give_what_a_live_reference_gives(kto):
    run = kto(reference_draws=3, max_train_steps=2)
    run.train()
    batch = run.batch(4, range(8))
    known = run._errors(batch).reference
    run._table = None
    run.weights.use_as_reference()
    torch.testing.assert_close(known, run._errors(batch).reference, rtol=1e-5, atol=1e-7)


def test_validation_compares_every_good_with_every_bad_image(kto, log):
    run = kto(validation_share=0.3, validation_steps=2, max_train_steps=2)
    run.train()
    record = log(run.folder)[1]
    assert not set(run.examples.prompts) & set(run.held_out.prompts)
    assert 0 <= record["validation/accuracies_by_pair"] <= 1
    margin = record["validation/rewards/chosen"] - record["validation/rewards/rejected"]
    assert record["validation/rewards/margins"] == pytest.approx(margin, abs=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(kto):
    whole = kto(max_train_steps=4, checkpointing_steps=2, good_share=0.6)
    whole.train()
    cut = kto(
        max_train_steps=4, good_share=0.6, resume_from_checkpoint=str(whole.folder / "checkpoint-2"), name="b"
    )
    cut.train()
    for p, q in zip(whole.weights.trainable, cut.weights.trainable, strict=True):
        assert torch.equal(p, q)
    assert "`diffalign train diffusion-kto` on 32 images" in (whole.folder / "README.md").read_text()


def test_images_without_a_verdict_are_left_out_and_one_kind_alone_is_refused(kto, tmp_path, singles, pairs):
    rows = tmp_path / "images"
    rows.mkdir()
    lines = []
    for i, label in enumerate(["true", "false", "null", "0.5"]):
        pairs[i].chosen.save(rows / f"{i}.png")
        lines.append(f'{{"image": "{i}.png", "prompt": "p", "label": {label}}}')
    (rows / "metadata.jsonl").write_text("\n".join(lines))
    run = kto(dataset=open_images(rows))
    run.open_data()
    assert run.examples.labels == [1, 0]
    with pytest.raises(UserError, match="2 have a good label and 0 a bad one"):
        kto("second", dataset=singles.select([0, 2]), overwrite=True).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_kto": 0.0}, "beta_kto must be above 0"),
        ({"utility": "greedy"}, "utility must be one of sigmoid, loss_averse, risk_seeking"),
        ({"reference_point": "zero"}, "reference_point must be one of"),
        ({"good_share": 1.0}, "good_share must be between 0 and 1"),
        ({"weight_good": -1.0}, "weight_good must be 0 or more"),
        ({"reference_point": "mismatched", "train_batch_size": 1}, "at least 2 to swap captions"),
        ({"reference_point": "mismatched", "reference_draws": 2}, "0 where captions are swapped"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(kto, options, words):
    with pytest.raises(UserError, match=words):
        kto(**options)
