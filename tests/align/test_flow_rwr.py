"""Reward-weighted regression: the weights, published and default, and training on scored images."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.data import open_images, open_scored
from diffalign.errors import UserError
from diffalign.likelihood import add_noise, evaluate
from diffalign.solvers.noise import NoiseSchedule
from diffalign.trainers.flow_rwr import FlowRWRConfig, FlowRWRTrainer, reward_weights
from tests.align.families import build
from tests.align.goldens import load_online

# -------------------------------------------------------------------- the weights and the loss


@pytest.mark.parametrize(("case", "kind"), [("rwr", "raw"), ("sft", "best_of_group")])
def test_published_weights_loss_and_gradient(case, kind):
    golden = load_online("flow", f"flow_weighted/{case}")
    rewards = golden["input/rewards"].flatten().tolist()
    weights = torch.from_numpy(reward_weights(rewards, ["p", "q", "p", "q", "q", "p"], kind)).float()
    torch.testing.assert_close(weights, golden["output/weights"].flatten())
    velocity = golden["input/policy_velocity"].requires_grad_()
    schedule = NoiseSchedule.flow()
    t = golden["input/sigma"].double() * 1000
    noised = add_noise(schedule, "flow_prediction", golden["input/clean"], golden["input/noise"], t)
    errors = evaluate(lambda x, t, cond, reference: velocity, noised, {}, reference=False).policy
    loss = (weights * errors).mean()
    loss.backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(loss.detach(), golden["output/loss"], **tolerance)
    torch.testing.assert_close(velocity.grad, golden["output/grad_policy_velocity"], **tolerance)


rewards_of_groups = st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 3)), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(images=rewards_of_groups, tau=st.floats(0.1, 10.0), shift=st.floats(-1e3, 1e3))
@example(images=[(28.0, 0), (28.0, 0), (-45.0, 0)], tau=0.1, shift=0.0)
def test_softmax_weights_of_a_prompt(images, tau, shift):
    rewards, groups = (np.array(values) for values in zip(*images, strict=True))
    weights = reward_weights(rewards, groups, tau=tau)
    np.testing.assert_allclose(
        weights, reward_weights(rewards + shift, groups, tau=tau), rtol=1e-6, atol=1e-9
    )
    for group in set(groups):
        r, w = rewards[groups == group], weights[groups == group]
        assert w.mean() == pytest.approx(1.0)
        expected = np.exp((r - r.max()) / tau)
        # Below the smallest normal number float64 has fewer digits than the relative bound asks for.
        np.testing.assert_allclose(w, len(r) * expected / expected.sum(), atol=np.finfo(np.float64).tiny)


def test_best_of_group_is_the_limit_of_small_tau():
    rewards, groups = [1.0, 3.0, 2.0, 5.0, 5.5], "aaabb"
    sharp = reward_weights(rewards, list(groups), tau=1e-3)
    best = reward_weights(rewards, list(groups), "best_of_group")
    np.testing.assert_allclose(sharp, best * [3, 3, 3, 2, 2], atol=1e-12)
    # The released code keeps all of several equal ones.
    assert reward_weights([1.0, 2.0, 2.0], "aaa", "best_of_group").tolist() == [0.0, 1.0, 1.0]


# -------------------------------------------------------------------- scored images


def picture(seed, bright=False):
    values = np.random.default_rng(seed).integers(0, 128, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values + 128 * bright)


@pytest.fixture(scope="module")
def lists_folder(tmp_path_factory):
    """Four prompts with four scored images each; the last of each prompt is bright, and the best by far."""
    folder = tmp_path_factory.mktemp("lists")
    with (folder / "metadata.jsonl").open("w") as file:
        for prompt in range(4):
            names = [f"{prompt}-{k}.png" for k in range(4)]
            for k, name in enumerate(names):
                picture(10 * prompt + k, bright=k == 3).save(folder / name)
            row = {"prompt": f"picture {prompt}", "images": names, "scores": [0.1, 0.2, 0.0, 3.0]}
            file.write(json.dumps(row) + "\n")
    return folder


def test_every_image_of_a_list_with_its_score(lists_folder):
    images = open_scored(lists_folder)
    assert len(images) == 16
    assert images.scores == [0.1, 0.2, 0.0, 3.0] * 4
    assert images.prompts[4:8] == ["picture 1"] * 4
    assert np.array_equal(images[7].image, picture(13, bright=True))
    assert open_scored(lists_folder, limit=5).scores == [0.1, 0.2, 0.0, 3.0, 0.1]


def test_scores_of_pairs_and_of_single_images(tmp_path):
    for k in range(4):
        picture(k).save(tmp_path / f"{k}.png")
    pairs, single = tmp_path / "pairs.jsonl", tmp_path / "single.jsonl"
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png", "score_chosen": 2, "score_rejected": -1}
    pairs.write_text(json.dumps(row) + "\n")
    both = open_scored(pairs)
    assert both.scores == [2.0, -1.0]
    assert np.array_equal(both[1].image, picture(1))
    rows = [{"prompt": "a", "image": f"{k}.png", "score": s} for k, s in enumerate([0.5, None, 1, 2])]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = open_scored(single, max_bad=0.5)
    assert images.scores == [0.5, 1.0, 2.0]
    assert [bad.reason for bad in images.skipped] == ["no score"]


def test_sets_without_scores_are_refused(tmp_path, lists_folder):
    picture(0).save(tmp_path / "0.png")
    path = tmp_path / "images.jsonl"
    path.write_text(json.dumps({"prompt": "a", "image": "0.png"}) + "\n")
    with pytest.raises(
        UserError, match=r"scored images need the columns score, prompt .*diffalign data score"
    ):
        open_scored(path)
    path.write_text(json.dumps({"prompt": "a", "chosen": "0.png", "rejected": "1.png"}) + "\n")
    with pytest.raises(
        UserError, match="scored images need the columns score_chosen, score_rejected, prompt"
    ):
        open_scored(path)


# -------------------------------------------------------------------- training


@pytest.fixture
def run_of(tmp_path, lists_folder):
    def make(name="sd3", dataset=lists_folder, **options):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "train_batch_size": 8,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "checkpointing_steps": 0,
            "progress": False,
        } | options
        model = name if not isinstance(name, str) else build(name)
        return FlowRWRTrainer(FlowRWRConfig(**settings), model=model, dataset=dataset)

    return make


def log(run):
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_the_loss_is_the_weighted_error(name, run_of):
    run = run_of(name, train_batch_size=16, max_train_steps=1, learning_rate=0.0)
    run.train()
    weights = reward_weights([0.1, 0.2, 0.0, 3.0], "aaaa")
    scored = dict(zip(run.examples.ids, np.tile(weights, 4), strict=True))
    torch.testing.assert_close(
        run.data.weight.double(), torch.tensor([scored[i] for i in run.data.ids]), rtol=1e-6, atol=0
    )
    batch = run.batch(0, range(16))
    with torch.no_grad():
        errors = run._errors(batch).policy
    (record,) = log(run)
    assert record["loss"] == pytest.approx(float((errors * batch.weight).mean()), rel=1e-5)
    assert record["errors/mean"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert record["weights/mean"] == pytest.approx(1.0, rel=1e-5)
    assert record["weights/effective"] == pytest.approx(1 / np.square(weights).mean(), rel=1e-4)
    assert run.adapter.reference is None


def test_the_best_images_alone(run_of):
    run = run_of(reward_weights="best_of_group")
    run.train()
    assert run.data_length == 4
    assert set(run.examples.scores) == {3.0}
    assert run.data.weight.tolist() == [1.0] * 4


def test_better_images_are_learnt_better(run_of):
    """Than with weights that are nearly equal, and worse ones are learnt worse."""
    errors = []
    for tau in (0.3, 1e6):
        run = run_of(max_train_steps=20, rank=0, learning_rate=5e-3, tau=tau, overwrite=True)
        run.train()
        errors.append(_errors_by_score(run, run.adapter))
    sharp, equal = errors
    assert sharp[3.0] < 0.99 * equal[3.0]
    assert sharp[0.0] > 1.01 * equal[0.0]


def _errors_by_score(run, adapter):
    """Mean error over the images of each score, at fixed times and noise."""
    found = run.data.batch(range(16))
    generator = torch.Generator().manual_seed(0)
    errors = torch.zeros(16)
    with torch.no_grad():
        for t in (200.0, 500.0, 800.0):
            x = found["latents"][:, 0]
            noise = torch.randn(x.shape, generator=generator)
            noised = add_noise(adapter.schedule, "flow_prediction", x, noise, torch.full((16,), t))
            errors += evaluate(adapter.denoise, noised, found["cond"], reference=False).policy
    scores = dict(zip(run.examples.ids, run.examples.scores, strict=True))
    by_score = np.array([scores[i] for i in run.data.ids])
    return {s: float(errors[by_score == s].mean()) for s in (0.0, 3.0)}


def test_held_out_prompts_are_judged(run_of):
    run = run_of(validation_share=0.2, validation_steps=2)
    run.train()
    metrics = log(run)[-1]
    assert 0 < metrics["validation/errors/weighted"] < 10
    assert not set(run.examples.prompts) & set(run.held_out.prompts)


def test_a_resumed_run_ends_with_the_same_weights(run_of, tmp_path):
    whole = run_of(max_train_steps=4)
    whole.train()
    run_of(max_train_steps=2, checkpointing_steps=2, output_dir=str(tmp_path / "cut")).train()
    resumed = run_of(max_train_steps=4, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest")
    resumed.train()
    for p, q in zip(whole.weights.trainable, resumed.weights.trainable, strict=True):
        assert torch.equal(p, q)


def test_what_teaches_nothing_is_refused(run_of, lists_folder):
    with pytest.raises(UserError, match="tau must be above 0"):
        run_of(tau=0.0)
    with pytest.raises(UserError, match="reward_weights must be one of softmax, raw, best_of_group"):
        run_of(reward_weights="rank")
    with pytest.raises(UserError, match="Flow-RWR has no reference"):
        run_of(reference_draws=2)
    with pytest.raises(UserError, match=r"every prompt of .* has one image"):
        run_of(dataset=open_scored(lists_folder).select([0, 5, 10])).train()
    with pytest.raises(UserError, match="images without a score: open it with open_scored"):
        run_of(dataset=open_images(lists_folder), overwrite=True).train()
