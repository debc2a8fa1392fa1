"""Diffusion-DPO on lists of scored images."""

import json
import math
from statistics import median

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from diffalign import losses
from diffalign.data import open_scored
from diffalign.errors import UserError
from diffalign.losses import LIST_LOSSES
from diffalign.trainers import ListDPOConfig, ListDPOTrainer
from diffalign.trainers.list_dpo import in_order, listed
from tests.align.conftest import picture

SCORES = [0.2, 0.9, -0.3, 0.5, 0.0]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Six prompts of five images, and one with two."""
    folder = tmp_path_factory.mktemp("lists")
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(7):
            scores = SCORES[: 5 if number < 6 else 2]
            names = [f"{number}-{k}.png" for k in range(len(scores))]
            for k, name in enumerate(names):
                picture(100 * number + k).save(folder / name)
            row = {"prompt": f"picture {number}", "images": names, "scores": scores}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def lists(run_of, scored):
    """``lists(name, **options)``: six lists of four per step."""

    def make(name="run", dataset=None, **options):
        settings = {"train_batch_size": 6, "dataset": dataset or str(scored)}
        return run_of(ListDPOConfig, ListDPOTrainer, name, **(settings | options))

    return make


def at_the_reference(name):
    zero, rewards = torch.zeros(1, 4), torch.tensor([[0.9, 0.5, 0.0, -0.3]])
    return LIST_LOSSES[name](zero, 1.0, rewards).item()


@pytest.mark.parametrize("name", LIST_LOSSES)
@pytest.mark.parametrize("rank", [4, 0])
def test_at_the_reference_the_loss_is_that_of_equal_images(lists, log, name, rank):
    run = lists(list_loss=name, rank=rank, max_train_steps=2)
    run.train()
    first, second = log(run.folder)
    assert first["loss"] == pytest.approx(at_the_reference(name), rel=1e-5)
    assert (first["rewards/accuracies"], first["gradient_factor"]) == (0.5, 0.5)
    assert second["loss"] != first["loss"]


def test_a_list_shares_noise_and_time_and_stands_in_the_order_of_its_scores(lists):
    run = lists(proportion_empty_prompts=0.5, random_flip=True, max_train_steps=1)
    run.train()
    assert run.data_length == 6
    batch = run.batch(0, range(6))
    noise, t = batch.noise.reshape(6, 4, -1), batch.t.reshape(6, 4)
    assert (noise == noise[:, :1]).all()
    assert (t == t[:, :1]).all()
    assert len({tuple(row[0].tolist()) for row in noise}) == 6
    assert len(t[:, 0].unique()) > 3
    embeds = batch.cond["prompt_embeds"].reshape(6, 4, -1)
    assert (embeds == embeds[:, :1]).all()
    assert 0 < batch.empty < 24
    assert batch.empty % 4 == 0
    shown = run._scores[batch.rows].reshape(6, 4)
    torch.testing.assert_close(shown[0], torch.tensor([0.9, 0.5, 0.0, -0.3]))
    assert {run.data.prompts[row] for row in batch.rows} == {f"picture {k}" for k in range(6)}


def test_the_step_is_the_loss_of_its_arithmetic(lists):
    run = lists(
        max_train_steps=3, learning_rate=1e-2, list_loss="soft_targets", loss_options={"temperature": 0.5}
    )
    run.train()
    got, sums = run.losses(0, range(6))
    with torch.no_grad():
        errors = run._errors(run.batch(0, range(6)))
    gain = errors.log_ratio().reshape(6, 4)
    rewards = torch.tensor([[0.9, 0.5, 0.0, -0.3]]).expand(6, 4)
    torch.testing.assert_close(got, losses.soft_targets(gain, 2000.0, rewards=rewards, temperature=0.5))
    found = run.summarise(sums.tolist(), 6)
    assert found["rewards/chosen"] == pytest.approx(2000 * gain[:, 0].mean().item(), rel=1e-4)
    assert found["errors/reference_rejected"] == pytest.approx(errors.reference[3::4].mean().item(), rel=1e-5)


def test_a_list_of_two_is_a_pair(lists):
    run = lists(list_length=2, learning_rate=1e-2)
    run.train()
    got, _ = run.losses(0, range(6))
    with torch.no_grad():
        gain = run._errors(run.batch(0, range(6))).log_ratio().reshape(6, 2)
    torch.testing.assert_close(got, losses.sigmoid(gain[:, 0], gain[:, 1], 2000.0))
    assert run._scores.unique().tolist() == pytest.approx([-0.3, 0.2, 0.9])  # the prompt of two counts now


# Little noise and a low beta, so that few steps will do.
QUICK = {
    "rank": 0,
    "max_train_steps": 45,
    "learning_rate": 1e-2,
    "beta_dpo": 100.0,
    "timesteps": [100.0, 200.0],
}


@pytest.mark.parametrize("name", ["plackett_luce", "lambda_rank"])
def test_rankings_put_images_in_order(lists, log, name):
    run = lists(list_loss=name, **QUICK)
    run.train()
    right = [record["rewards/accuracies"] for record in log(run.folder)]
    assert sum(right[:5]) / 5 < 0.8
    assert sum(right[-10:]) / 10 > 0.95


def test_soft_targets_are_approached(lists, log):
    """They are met at small margins, whose order the noise still turns."""
    run = lists(list_loss="soft_targets", loss_options={"temperature": 0.3}, **QUICK)
    run.train()
    lost = [record["loss"] for record in log(run.folder)]
    target = torch.tensor([0.9, 0.5, 0.0, -0.3]).div(0.3).softmax(0)
    least = -(target * target.log()).sum().item()
    assert lost[0] == pytest.approx(math.log(4), rel=1e-5)
    assert median(lost[-10:]) - least < 0.25 * (lost[0] - least)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_other_prediction_types(lists, model_folder, scored, tmp_path, log, kind):
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    if kind == "flow_prediction":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    config = ListDPOConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        train_batch_size=6,
        checkpointing_steps=0,
        progress=False,
    )
    run = ListDPOTrainer(config, model=pipe, dataset=str(scored))
    run.train()
    assert run.adapter.prediction_type == kind
    assert log(run.folder)[0]["loss"] == pytest.approx(math.log(24), rel=1e-5)


def test_held_out_lists_are_judged_at_common_noise(lists, log, scored):
    run = lists(validation_dataset=str(scored), validation_pairs=2, validation_steps=1, max_train_steps=2)
    run.train()
    assert [len(rows) for rows in run._held] == [4, 4]
    assert len({run._validation_draw(row, 3) for row in run._held[0]}) == 1
    assert run._validation_draw(run._held[0][0], 3) != run._validation_draw(run._held[1][0], 3)
    records = log(run.folder)
    assert 0 <= records[1]["validation/rewards/accuracies"] <= 1
    assert records[1]["validation/rewards/margins"] != 0


def test_a_resumed_run_and_split_batches_give_the_same(lists, log):
    whole = lists("whole", max_train_steps=4)
    whole.train()
    lists("cut", max_train_steps=4, checkpointing_steps=2).train()
    cut = lists("cut", max_train_steps=4, resume_from_checkpoint="checkpoint-2")
    cut.train()
    assert all(torch.equal(p, q) for p, q in zip(whole.weights.trainable, cut.weights.trainable, strict=True))
    split = lists("split", max_train_steps=4, train_batch_size=2, gradient_accumulation_steps=3)
    split.train()
    for one, other in zip(log(whole.folder), log(split.folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_list_with_a_damaged_image_is_left_out(lists, scored, tmp_path):
    for file in scored.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "2-1.png").write_bytes(b"no image")
    run = lists(dataset=str(tmp_path), max_bad=0.1, max_train_steps=1)
    run.train()
    assert run.data_length == 5
    assert "picture 2" not in {run.data.prompts[row] for row in run.batch(0, range(5)).rows}


def test_lists_are_spread_from_the_best_to_the_worst():
    prompts = ["a"] * 5 + ["b"] * 2 + ["c"] * 3
    scores = [1.0, 5.0, 3.0, 2.0, 4.0, 1.0, 2.0, 7.0, 7.0, 7.0]
    assert listed(prompts, scores, 3) == [[1, 2, 0]]
    assert listed(prompts, scores, 2) == [[1, 0], [6, 5]]


def test_order_counts_couples_of_unequal_score():
    rewards = torch.tensor([[2.0, 1.0, 1.0]])
    right, factor = in_order(torch.tensor([[0.0, -1.0, 0.0]]), rewards, 0.0)
    assert right.item() == 0.75  # one couple right, one even, one without an order
    assert factor.item() == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"list_loss": "placket_luce"}, "did you mean 'plackett_luce'"),
        ({"list_length": 1}, "list_length must be at least 2"),
        ({"loss_options": {"temperature": 1.0}}, "plackett_luce has no setting 'temperature'"),
        ({"list_loss": "soft_targets", "loss_options": {"temperature": 0.0}}, "temperature of soft_targets"),
        ({"reference_draws": 2}, "the noise of a list is its own"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(lists, options, words):
    with pytest.raises(UserError, match=words):
        lists(**options)


def test_data_that_make_no_list_are_refused(lists, scored, singles):
    with pytest.raises(UserError, match="has 6 images whose scores differ"):
        lists(list_length=6).train()
    with pytest.raises(UserError, match="images without a score"):
        lists("other", dataset=singles).train()
    assert len(open_scored(scored)) == 32
