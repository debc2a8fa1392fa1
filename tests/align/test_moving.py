"""References that move, warm starts and curricula of Diffusion-DPO and its relatives."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.data import open_pairs, write_pairs
from diffalign.errors import UserError
from diffalign.trainers.moving import FILE


def values(run):
    return [p.detach().clone() for p in run.weights.trainable]


def watched(run):
    """The run with the policy before and the reference after the start of each step."""
    seen, begin = [], run.begin_step

    def spy(step):
        policy = values(run)
        begin(step)
        seen.append((policy, [tensor.clone() for tensor in run._reference]))

    run.begin_step = spy
    run.train()
    return seen


def assert_equal(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [4, 0])
def test_the_reference_follows_the_policy(trainer, log, rank):
    run = trainer(rank=rank, reference_update_steps=2, reference_mix=0.6, max_train_steps=5)
    seen = watched(run)
    first = seen[0][0]
    assert log(run.folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_equal(seen[1][1], first)
    wanted = [0.6 * p + 0.4 * r for p, r in zip(seen[2][0], first, strict=True)]
    assert_equal(seen[2][1], wanted)
    assert_equal(seen[3][1], wanted)
    assert_equal(seen[4][1], [0.6 * p + 0.4 * r for p, r in zip(seen[4][0], wanted, strict=True)])


def test_momentum_takes_the_reference_beyond_the_policy(trainer):
    seen = watched(trainer(reference_update_steps=2, reference_momentum=0.5, max_train_steps=5))
    first = seen[0][0]
    assert_equal(seen[2][1], [p + 0.5 * (p - b) for p, b in zip(seen[2][0], first, strict=True)])
    assert_equal(seen[4][1], [p + 0.5 * (p - b) for p, b in zip(seen[4][0], seen[2][0], strict=True)])


def test_a_reference_that_becomes_the_policy_makes_the_loss_that_of_a_coin(trainer, log):
    run = trainer(reference_update_steps=2, reference_mix=1.0, max_train_steps=5, learning_rate=1e-2)
    run.train()
    losses = [record["loss"] for record in log(run.folder)]
    assert [losses[k] for k in (0, 2, 4)] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert all(abs(losses[k] - math.log(2)) > 1e-3 for k in (1, 3))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_warm_start_fits_both_images_and_is_the_reference(trainer, log, low_memory):
    run = trainer(warm_start_sft_steps=2, max_train_steps=4, learning_rate=1e-2, low_memory=low_memory)
    seen = watched(run)
    records = log(run.folder)
    for record in records[:2]:
        assert record["loss"] == pytest.approx((record["errors/chosen"] + record["errors/rejected"]) / 2)
        assert "rewards/margins" not in record
        assert "errors/reference_chosen" not in record
    assert records[2]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_equal(seen[2][1], seen[2][0])
    assert_equal(seen[3][1], seen[2][0])


@pytest.fixture(scope="module")
def graded(tmp_path_factory, pairs):
    """Sixteen pairs, of which number i has a gap of i in its scores."""
    rows = [replace(pairs[i], scores=(float(i), 0.0)) for i in range(len(pairs))]
    return open_pairs(write_pairs(tmp_path_factory.mktemp("graded") / "pairs", rows))


def test_a_curriculum_goes_from_clear_to_unclear_pairs(trainer, graded, log):
    run = trainer(
        dataset=graded, curriculum_stages=2, max_train_steps=5, train_batch_size=8, learning_rate=1e-2
    )
    run.train()
    shown = [sorted(run.data.gap[run.batch(step, range(8)).rows].tolist()) for step in range(5)]
    assert shown == [list(range(8, 16))] * 3 + [list(range(8))] * 2
    losses = [record["loss"] for record in log(run.folder)]
    assert [losses[0], losses[3]] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert all(abs(losses[k] - math.log(2)) > 1e-3 for k in (1, 2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"reference_update_steps": 2},
        {"reference_update_steps": 1, "reference_momentum": 0.5, "rank": 0},
        {"warm_start_sft_steps": 2, "reference_update_steps": 2},
        {"curriculum_stages": 3},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights(trainer, graded, options):
    settings = {"dataset": graded, "max_train_steps": 4, **options}
    whole = trainer("whole", **settings)
    whole.train()
    for cut in (2, 3):
        folder = f"cut{cut}"
        trainer(folder, checkpointing_steps=cut, **settings).train()
        rest = trainer(folder, resume_from_checkpoint=f"checkpoint-{cut}", **settings)
        rest.train()
        assert all(torch.equal(p, q) for p, q in zip(values(whole), values(rest), strict=True))
        assert json.dumps(rest._stages) == json.dumps(whole._stages)
        assert (rest.folder / f"checkpoint-{cut}" / FILE).is_file()


def test_a_checkpoint_without_a_moved_reference_is_refused(trainer):
    run = trainer(max_train_steps=2, checkpointing_steps=2)
    run.train()
    assert not (run.folder / "checkpoint-2" / FILE).exists()
    with pytest.raises(UserError, match="whose reference did not move"):
        trainer(max_train_steps=4, reference_update_steps=2, resume_from_checkpoint="latest").train()


def test_the_result_has_no_reference_in_it(trainer):
    run = trainer(reference_update_steps=1)
    run.train()
    assert not any("reference" in name for name in load_file(run.folder / "pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference_update_steps": -1}, "reference_update_steps must be 0 or more"),
        ({"reference_mix": 0.0}, "reference_mix must be above 0"),
        ({"reference_momentum": 0.5}, "set reference_update_steps"),
        ({"reference_update_steps": 2, "reference_draws": 2}, "reference that stays as it is"),
        ({"reference_update_steps": 2, "loss_type": "simpo"}, "no reference to move"),
        ({"reference_update_steps": 2, "loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"curriculum_stages": 4}, "max_train_steps at most"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options)


def test_a_curriculum_needs_scores_and_pairs_for_every_stage(trainer, pairs, graded):
    with pytest.raises(UserError, match="curriculum_stages wants a score of both images"):
        trainer("unscored", dataset=pairs, curriculum_stages=2).train()
    with pytest.raises(UserError, match="curriculum_stages 20 are more than the 16 pairs"):
        trainer("many", dataset=graded, curriculum_stages=20, max_train_steps=20).train()
