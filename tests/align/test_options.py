"""Options of the offline trainers that decide what the network is shown, and who answers as the reference."""

import logging
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from diffalign.data import PairDataset
from diffalign.errors import UserError
from diffalign.likelihood import add_noise, evaluate
from diffalign.models import load_adapter, reference
from tests.align.families import build


def trained(run):
    run.train()
    return run


# -------------------------------------------------------------------- what the network is shown


def test_flips_of_the_two_images_are_drawn_apart_on_request(trainer):
    plain = trained(trainer("plain", max_train_steps=1))

    def unmoved(run):
        batches = [(run.batch(step, range(8)), plain.batch(step, range(8))) for step in range(4)]
        same = torch.cat([(one.latents == other.latents).flatten(1).all(1) for one, other in batches])
        return same.reshape(4, 2, 8).transpose(0, 1).flatten(1)

    joint = unmoved(trained(trainer("joint", max_train_steps=1, random_flip=True)))
    assert torch.equal(joint[0], joint[1])
    apart = unmoved(trained(trainer("apart", max_train_steps=1, random_flip=True, joint_augmentation=False)))
    assert 0 < (apart[0] == apart[1]).sum() < 32


def test_latents_are_drawn_from_the_autoencoder_on_request(trainer):
    run = trained(trainer(sample_latents=True, max_train_steps=1, validation_share=0.3, validation_steps=1))
    first, again, later = (run.batch(step, range(8)) for step in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    encoded = run.data.batch(first.rows)["latents"].transpose(0, 1).flatten(0, 1)
    spread = run.data.std[first.rows].transpose(0, 1).flatten(0, 1)
    deviations = (first.latents - encoded) / spread
    assert abs(deviations.std() - 1) < 0.15
    assert not torch.equal(first.latents[0], run.data.batch([first.rows[0]])["latents"][0, 0])
    assert not torch.equal(deviations, (later.latents - encoded) / spread)
    draws = [run._validation_draw(row, 0) for row in (0, 1)]
    assert torch.equal(
        run._views(run.validation_data, [0, 1], draws)["latents"], run.validation_data.latents[:2].float()
    )


def test_moments_are_in_the_denoisers_units():
    adapter = load_adapter(build("sd3"))
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    moments, config = adapter.encode_posterior(pixels), adapter.pipeline.vae.config
    posterior = adapter.pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(moments["mean"], adapter.encode_images(pixels)["latents"])
    torch.testing.assert_close(moments["std"], posterior.std.detach() * config.scaling_factor)
    torch.testing.assert_close(adapter.encode_image(pixels[1]), moments["mean"][1], rtol=1e-4, atol=1e-5)
    prompt = adapter.encode_prompt("a red star")
    assert all(torch.equal(v, prompt[k]) for k, v in adapter.encode_prompts(["a red star"]).items())


def test_known_reference_errors_see_the_same_draws_as_a_live_reference(trainer):
    options = {"sample_latents": True, "random_flip": True, "joint_augmentation": False}
    run = trained(trainer(reference_draws=2, max_train_steps=1, **options))
    run.weights.use_as_reference()
    for step in range(2):
        batch = run.batch(step, range(8))
        noised = add_noise(run.adapter.schedule, "epsilon", batch.latents, batch.noise, batch.t)
        with torch.no_grad():
            live = evaluate(run.adapter.denoise, noised, batch.cond).reference
        torch.testing.assert_close(run._reference_errors(batch), live, rtol=1e-5, atol=1e-6)


def test_captions_that_are_cut_off_are_counted(trainer, pairs, log, caplog):
    rows = [
        replace(pairs[i], prompt=pairs[i].prompt * (4 if i % 8 < 2 else 1), prompts=()) for i in range(16)
    ]
    long = PairDataset.from_lists(
        [row.prompt for row in rows], [row.chosen for row in rows], [row.rejected for row in rows]
    )
    with caplog.at_level(logging.WARNING):
        run = trained(trainer(dataset=long, max_train_steps=1))
    assert log(run.folder)[0]["truncated_captions"] == 2 / 8
    assert "25.0 % of the captions are longer than a text encoder" in caplog.text
    assert log(trained(trainer("short", max_train_steps=1)).folder)[0]["truncated_captions"] == 0


# -------------------------------------------------------------------- labels and numbers in the log


def test_labels_are_turned_with_all_that_belongs_to_an_image(pairs):
    turned = pairs.flipped(0.5, seed=3)
    flips = [turned[i].digests != pairs[i].digests for i in range(len(pairs))]
    assert 3 <= sum(flips) <= 13
    for i, flip in enumerate(flips):
        wanted = pairs[i].swapped() if flip else pairs[i]
        assert (turned[i].digests, turned[i].captions) == (wanted.digests, wanted.captions)
        assert turned[i].preference == 1.0
    assert [turned[i].digests for i in range(16)] == [
        pairs.flipped(0.5, seed=3)[i].digests for i in range(16)
    ]
    assert [p.digests for p in pairs.flipped(0.0)] == [p.digests for p in pairs]


def test_wrong_labels_are_trained_and_never_judged_by(trainer):
    right = trained(trainer("right", validation_share=0.3, validation_steps=1, max_train_steps=1))
    wrong = trained(
        trainer(
            "wrong", validation_share=0.3, validation_steps=1, max_train_steps=1, label_flip_probability=1.0
        )
    )
    assert torch.equal(wrong.data.latents, right.data.latents.flip(1))
    assert torch.equal(wrong.validation_data.latents, right.validation_data.latents)
    with pytest.raises(UserError, match="label_flip_probability must be between 0 and 1"):
        trainer("third", label_flip_probability=1.5)


def test_the_log_has_beta_for_sums_and_the_share_of_lost_pairs(trainer, log):
    records = log(trained(trainer(learning_rate=1e-2)).folder)
    assert records[0]["beta_sum"] == 2000 / 64  # latents of 4 x 4 x 4
    assert records[0]["rewards/margins_negative"] == 0
    assert records[-1]["rewards/margins_negative"] == 1 - records[-1]["rewards/accuracies"]


# -------------------------------------------------------------------- the reference, attention


def test_a_copy_in_host_memory_answers_as_one_beside_the_model(trainer, log, monkeypatch):
    moved = []
    send = reference.send_to_device
    monkeypatch.setattr(
        reference, "send_to_device", lambda what, device: moved.append(str(device)) or send(what, device)
    )
    here = log(trained(trainer("here", rank=0)).folder)
    assert not moved
    host = log(trained(trainer("host", rank=0, reference_device="cpu")).folder)
    assert [r["loss"] for r in host] == [r["loss"] for r in here]
    assert host[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert moved == ["cpu", "cpu", "cpu"] * 3  # arguments, named ones, and back to where the model is


def test_a_copy_in_host_memory_has_the_precision_of_the_model(trainer, log):
    run = trained(trainer(rank=0, reference_device="cpu", mixed_precision="bf16", max_train_steps=1))
    assert log(run.folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with run.adapter.reference(run.adapter.module):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), run.adapter.reference(run.adapter.module):
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 0, "reference_draws": 1}], ids=str)
def test_no_copy_no_place_for_it(trainer, options):
    with pytest.raises(UserError, match="reference_device cpu is for the frozen copy"):
        trainer(reference_device="cpu", **options)


@pytest.fixture
def xformers(monkeypatch):
    """``xformers(op)``: an installed xformers whose attention is `op`; gives the networks that use it."""
    switched = []

    def install(op):
        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        package.ops, ops.memory_efficient_attention = ops, op
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        monkeypatch.setattr(
            "diffusers.UNet2DConditionModel.enable_xformers_memory_efficient_attention",
            lambda network: switched.append(network),
        )
        return switched

    return install


def broken(*tensors):
    raise NotImplementedError("No operator found\nfor these inputs")


def test_xformers_is_used_where_it_works(trainer, xformers):
    switched = xformers(lambda q, k, v: q * k * v)
    run = trained(trainer(enable_xformers_memory_efficient_attention=True, max_train_steps=1))
    assert switched == [run.adapter.module]


def test_xformers_that_imports_and_fails_is_left_out_with_one_line(trainer, xformers, caplog):
    switched = xformers(broken)
    with caplog.at_level(logging.WARNING):
        trainer(enable_xformers_memory_efficient_attention=True, max_train_steps=1).train()
    assert not switched
    assert "xformers does not work here, torch's own attention is used: No operator found for" in caplog.text
