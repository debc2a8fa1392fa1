"""Flow-DPO and Flow-RWR on the model's own samples."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.losses import sigmoid
from diffalign.pipelines.rollout import RowNoise
from diffalign.trainers import draws
from diffalign.trainers.flow_online import (
    REFERENCE,
    FlowDPOOnlineConfig,
    FlowDPOOnlineTrainer,
    FlowRWROnlineConfig,
    FlowRWROnlineTrainer,
)
from diffalign.trainers.flow_rwr import reward_weights
from tests.align.families import build

PROMPTS = [f"picture {i}" for i in range(4)]
METHODS = {
    "dpo": (FlowDPOOnlineConfig, FlowDPOOnlineTrainer),
    "rwr": (FlowRWROnlineConfig, FlowRWROnlineTrainer),
}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def equal(images, prompts):
    return torch.ones(len(images))


@pytest.fixture
def online(tmp_path):
    """``online(method, name, reward=..., **options)``: three images of four prompts a round, four steps."""

    def make(method="dpo", name="run", *, model="sd3", reward=brightness, **options):
        config, trainer = METHODS[method]
        settings = {
            "output_dir": str(tmp_path / name),
            "train_batch_size": 4,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "rank": 4,
            "prompts_per_round": 4,
            "images_per_prompt": 3,
            "sample_steps": 4,
            "sample_batch_size": 12,
            "sample_guidance": 2.0,
            "inner_epochs": 2,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return trainer(config(**(settings | options)), model=build(model), dataset=PROMPTS, reward=reward)

    return make


def log(run):
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


def rewards_of(run):
    """``(prompts, images)``: judged again."""
    current = run.round
    texts = [text for text in current.prompts for _ in range(run.config.images_per_prompt)]
    return run.judged(current.states, texts)[:, 0].reshape(len(current.prompts), -1).double().numpy()


# -------------------------------------------------------------------- rounds


def test_a_round_holds_what_the_pipeline_would_have_drawn(online):
    run = online(sample_guidance=1.0, max_train_steps=1, learning_rate=0.0)
    run.train()
    states = run.round.states
    assert states.shape == (12, 4, 4, 4)
    pipe = build("sd3")
    seeds = [draws.number(0, "start", 0, p, k) for p in range(4) for k in range(3)]
    noise = RowNoise(seeds, (4, 4, 4), torch.device("cpu")).draw()
    prompts = [text for text in run.round.prompts for _ in range(3)]
    drawn = pipe(
        prompts,
        sigmas=[1.0, 0.75, 0.5, 0.25],  # its scheduler shifts them
        guidance_scale=1.0,
        height=8,
        width=8,
        latents=noise,
        output_type="latent",
    )
    torch.testing.assert_close(states, drawn.images, rtol=1e-4, atol=1e-5)


def test_best_against_worst_of_each_prompt(online):
    run = online(max_train_steps=1, learning_rate=0.0)
    run.train()
    rewards = rewards_of(run)
    assert len(run.round.items) == 4
    for item in run.round.items:
        winner, loser = (place - 3 * item.prompt for place in item.x)
        assert winner == rewards[item.prompt].argmax()
        assert loser == rewards[item.prompt].argmin()
    record = log(run)[0]
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record["reward_best"] == pytest.approx(rewards.max(1).mean(), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "one_minus_s_squared"])
def test_the_loss_is_flow_dpos_on_the_finished_images(schedule, online):
    run = online(beta_schedule=schedule, inner_epochs=4)
    run.train()
    assert run.round.number == 0
    losses, _ = run.losses(2, range(4))
    items = run.items_at(2, range(4))
    network, cond = run.adapter, run.guidance.cond
    with torch.no_grad():
        for place, item in enumerate(items):
            numbers = draws.generator(0, "noise", 2, place)
            s = draws.time(numbers, network.schedule, "logit_normal") / 1000
            noise = torch.from_numpy(numbers.standard_normal((4, 4, 4), dtype=np.float32))
            x = run.round.states[list(item.x)]
            told = {name: values[[item.prompt] * 2] for name, values in cond.items()}
            x_s, t = (1 - s) * x + s * noise, torch.full((2,), 1000 * s)
            policy, reference = (
                (network.denoise(x_s, t, told, reference=of) - (noise - x)).square().mean((1, 2, 3))
                for of in (False, True)
            )
            beta = 100.0 * (1.0 if schedule == "constant" else (1 - s) ** 2)
            d = -0.5 * (policy - reference)
            torch.testing.assert_close(losses[place], sigmoid(d[0], d[1], beta), rtol=1e-3, atol=1e-5)


def test_groups_of_equals_are_dropped_or_as_published_the_first_two_compared(online):
    with pytest.raises(UserError, match="rounds in a row gave nothing to learn from: all images"):
        online(reward=equal).train()
    run = online(name="published", reward=equal, equal_groups="first_two")
    run.train()
    assert sorted(item.x for item in run.round.items) == [(0, 1), (3, 4), (6, 7), (9, 10)]


def test_the_reward_rises(online):
    run = online(
        max_train_steps=30,
        images_per_prompt=6,
        sample_guidance=1.0,
        rank=0,
        learning_rate=2e-3,
        inner_epochs=4,
        beta_dpo=20.0,
        refresh_steps=8,
    )
    run.train()
    records = log(run)
    before, after = (np.mean([record["reward"] for record in part]) for part in (records[:4], records[-4:]))
    assert after > before + 0.5 * records[0]["reward_std"]


# -------------------------------------------------------------------- the reference


@pytest.mark.parametrize("rank", [4, 0])
def test_the_reference_is_refreshed(rank, online):
    run = online(rank=rank, refresh_steps=2, max_train_steps=5, learning_rate=3e-3)
    run.train()
    at_reference = [abs(record["loss"] - math.log(2)) < 1e-6 for record in log(run)]
    assert at_reference == [True, False, True, False, True]
    assert [path.name for path in (run.folder / REFERENCE).iterdir()] == ["checkpoint-4"]


def test_a_run_goes_on_from_any_checkpoint_with_the_same_weights(online):
    options = {"refresh_steps": 2, "max_train_steps": 6, "checkpointing_steps": 1, "inner_epochs": 3}
    whole = online(name="whole", **options)
    whole.train()
    for step in (1, 5):  # before the first refreshment, and between two
        checkpoint = whole.folder / f"checkpoint-{step}"
        resumed = online(**options, resume_from_checkpoint=str(checkpoint))
        resumed.train()
        assert log(resumed)[0]["step"] == step + 1
        for p, q in zip(whole.weights.trainable, resumed.weights.trainable, strict=True):
            assert torch.equal(p, q)
        (resumed.folder / "log.jsonl").unlink()


def test_a_checkpoint_without_its_reference_is_refused(online):
    run = online(refresh_steps=1, checkpointing_steps=2)
    run.train()
    shutil.rmtree(run.folder / "checkpoint-2" / REFERENCE)
    with pytest.raises(UserError, match="lacks its reference"):
        online(refresh_steps=1, max_train_steps=3, resume_from_checkpoint="latest").train()


# -------------------------------------------------------------------- Flow-RWR


def test_every_image_counts_by_its_reward(online):
    run = online("rwr", max_train_steps=1, learning_rate=0.0, train_batch_size=12, tau=0.05)
    run.train()
    rewards = rewards_of(run)
    weights = reward_weights(rewards.ravel(), np.repeat(range(4), 3), tau=0.05)
    assert len(run.round.items) == 12
    for item in run.round.items:
        assert item.values[0] == pytest.approx(weights[item.x[0]], rel=1e-3)
    record = log(run)[0]
    assert record["loss"] == pytest.approx(record["errors/weighted"], rel=1e-5)
    assert record["weights/mean"] == pytest.approx(1.0, rel=1e-4)
    assert record["weights/effective"] == pytest.approx(1 / np.square(weights).mean(), rel=1e-2)
    assert run.adapter.reference is None


def test_images_that_teach_nothing_are_left_out(online):
    best = online("rwr", reward_weights="best_of_group")
    best.train()
    assert len(best.round.items) == 4
    with pytest.raises(UserError, match="gave nothing to learn from"):
        online("rwr", name="equal", reward=equal).train()
    raw = online("rwr", name="raw", reward=lambda images, prompts: -brightness(images, prompts))
    raw.config.reward_weights = "raw"
    raw.train()
    assert all(item.values[0] < 0 for item in raw.round.items)


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("dpo", {"images_per_prompt": 1}, "at least 2: they are compared"),
        ("dpo", {"trained_steps": 0.5}, "learns from finished images"),
        ("rwr", {"step_weight": "inverse_kl"}, "learns from finished images"),
        ("dpo", {"aggregate": "pareto"}, "ranked by one score"),
        ("dpo", {"refresh_steps": -1}, "refresh_steps must be 0 or more"),
        ("dpo", {"beta_dpo": 0.0}, "beta_dpo must be above 0"),
        ("dpo", {"equal_groups": "keep"}, "equal_groups must be drop or first_two"),
        ("rwr", {"tau": 0.0}, "tau must be above 0"),
    ],
)
def test_options_without_meaning_are_refused(method, options, words, online):
    with pytest.raises(UserError, match=words):
        online(method, **options)


def test_models_that_do_not_fit_are_refused(online):
    with pytest.raises(UserError, match="flow-dpo-online is for flow models, but this one predicts epsilon"):
        online(model="sd").train()
    with pytest.raises(UserError, match="flow-rwr-online samples images; a video model"):
        online("rwr", name="video", model="wan").train()
