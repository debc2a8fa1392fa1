"""Methods beside Diffusion-DPO on the same loop: DCPO, MaPO and fine-tuning."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.data import open_pairs, write_pairs
from diffalign.data.perturb import RulePerturber, perturb
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers import DCPOConfig, DCPOTrainer, MaPOConfig, MaPOTrainer, SFTConfig, SFTTrainer

METHODS = {"mapo": (MaPOConfig, MaPOTrainer), "sft": (SFTConfig, SFTTrainer)}


@pytest.fixture
def method(tmp_path, model_folder, pairs, shared_cache):
    def make(name, **options):
        config, trainer = METHODS[name]
        settings = {
            "output_dir": str(tmp_path / name),
            "cache_dir": str(shared_cache),
            "train_batch_size": 16,
            "max_train_steps": 3,
            "learning_rate": 1e-2,
            "rank": 0,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return trainer(config(**(settings | options)), model=model_folder, dataset=pairs)

    return make


@pytest.mark.parametrize("name", METHODS)
def test_no_reference_is_run_or_kept(name, method, log):
    run = method(name)
    run.train()
    assert run.adapter.reference is None
    assert "errors/reference_chosen" not in log(run.folder)[0]


def test_mapo_raises_the_margin(method, log):
    run = method("mapo", max_train_steps=150)
    run.train()
    margins = [record["rewards/margins"] for record in log(run.folder)]
    assert sum(margins[-20:]) > sum(margins[:20]) + 20 * 0.15


def test_the_logged_margin_of_mapo_is_its_logit(method):
    run = method("mapo", max_train_steps=1, learning_rate=0.0)
    run.train()
    errors = Errors(torch.tensor([0.010, 0.012]), None)
    _, logit = run.pair_loss(errors, batch=None)
    margin = -0.5 * run.beta * (errors.policy[0] - errors.policy[1])
    assert float(logit) == pytest.approx(float(margin), rel=0.01)


def test_fine_tuning_fits_the_chosen_images_and_sees_no_others(method, log):
    run = method("sft", max_train_steps=100, train_batch_size=16)
    run.train()
    errors = [record["errors/chosen"] for record in log(run.folder)]
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
    seen = []
    denoise = run.adapter.denoise
    run.adapter.denoise = lambda x, *rest, **more: seen.append(len(x)) or denoise(x, *rest, **more)
    run.losses(0, range(4))
    assert seen == [4]


def test_mapo_costs_what_fine_tuning_of_both_images_costs(method):
    flops = {}
    for name in METHODS:
        run = method(name, max_train_steps=1)
        run.train()
        with FlopCounterMode(display=False) as counter:
            run.losses(0, range(8))[0].mean().backward()
        flops[name] = counter.get_total_flops()
    assert flops["mapo"] == pytest.approx(2 * flops["sft"], rel=0.01)


def test_low_memory_mapo(method, log):
    one, two = method("mapo", low_memory=True), method("mapo", output_dir=str(method("mapo").folder) + "2")
    one.train()
    two.train()
    assert log(one.folder)[0]["loss"] == pytest.approx(log(two.folder)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mapo", {"reference_draws": 2}, "MaPO has no reference"),
        ("mapo", {"ties": "soft"}, "no odds to train towards"),
        ("mapo", {"beta_mapo": 0.0}, "beta_mapo must be above 0"),
        ("sft", {"reference_draws": 1}, "fine-tuning has no reference"),
        ("sft", {"low_memory": True}, "one image per pair anyway"),
        ("sft", {"ties": "soft"}, "a tie has no chosen image"),
    ],
)
def test_options_without_meaning_are_refused(method, name, options, words):
    with pytest.raises(UserError, match=words):
        method(name, **options)


# -------------------------------------------------------------------- captions of each image's own


@pytest.fixture
def dual(tmp_path, pairs):
    rows = perturb([pairs[i] for i in range(16)], RulePerturber("strong"))
    return open_pairs(write_pairs(tmp_path / "dual", rows))


def dcpo(tmp_path, model_folder, dataset, **options):
    settings = {
        "output_dir": str(tmp_path / "dcpo"),
        "train_batch_size": 8,
        "max_train_steps": 2,
        "rank": 0,
        "checkpointing_steps": 0,
        "progress": False,
        "learning_rate": 1e-3,
    }
    return DCPOTrainer(DCPOConfig(**(settings | options)), model=model_folder, dataset=dataset)


def test_each_image_is_judged_under_its_own_caption(tmp_path, model_folder, dual, log):
    run = dcpo(tmp_path, model_folder, dual)
    run.train()
    assert log(run.folder)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    batch = run.batch(0, range(8))
    wanted = [dual[row].captions for row in batch.rows]
    embeds = run.adapter.encode_prompts([c for side in (0, 1) for c in (w[side] for w in wanted)])
    torch.testing.assert_close(batch.cond["prompt_embeds"], embeds["prompt_embeds"])


def test_equal_captions_are_diffusion_dpo_bit_for_bit(tmp_path, model_folder, pairs, trainer):
    same = [replace(pairs[i], captions=(pairs[i].prompt,) * 2) for i in range(16)]
    same[15] = replace(same[15], captions=("another", same[15].prompt))
    folder = write_pairs(tmp_path / "same", same)
    ours = dcpo(tmp_path, model_folder, open_pairs(folder), max_train_steps=1, rank=4)
    ours.train()
    theirs = trainer(
        "dpo", dataset=open_pairs(folder), max_train_steps=1, beta_dpo=500.0, cache_dir=str(tmp_path / "c")
    )
    theirs.train()
    for p, q in zip(ours.weights.trainable, theirs.weights.trainable, strict=True):
        assert torch.equal(p, q)


def test_data_without_captions_of_their_own_are_refused(tmp_path, model_folder, pairs):
    with pytest.raises(UserError, match="no image of this data has a caption of its own"):
        dcpo(tmp_path, model_folder, pairs).train()
    with pytest.raises(UserError, match="proportion_empty_prompts must be 0"):
        dcpo(tmp_path, model_folder, pairs, proportion_empty_prompts=0.1)
