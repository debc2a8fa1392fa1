"""Flow-DPO and Flow-RWR on the model's own samples."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.losses import sigmoid
from diffalign.pipelines.generate import generate
from diffalign.pipelines.load import make_scheduler
from diffalign.pipelines.rollout import RowNoise, decoded
from diffalign.trainers import FlowDPOConfig, FlowDPOTrainer, draws
from diffalign.trainers.flow_online import (
    REFERENCE,
    FlowDPOOnlineConfig,
    FlowDPOOnlineTrainer,
    FlowRWROnlineConfig,
    FlowRWROnlineTrainer,
)
from diffalign.trainers.flow_rwr import reward_weights
from tests.align.families import build
from tests.align.test_distributed import processes

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
        pipe = build(model) if isinstance(model, str) else model
        return trainer(config(**(settings | options)), model=pipe, dataset=PROMPTS, reward=reward)

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


SDE = {"sample_solver": "dpm-solver++", "sample_solver_options": {"algorithm_type": "sde-dpmsolver++"}}


def shifting(family):
    """A model whose times depend on the size of the image."""
    pipe = build(family)
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 30.0}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    return pipe


@pytest.mark.parametrize(
    ("method", "make", "family", "solver", "options"),
    [
        ("dpo", build, "sd3", "dpm-solver++", {"solver_order": 3}),
        ("dpo", shifting, "sd3", "unipc", {}),
        ("rwr", shifting, "flux", "dpm-solver++", {}),
        ("rwr", build, "sd", "dpm-solver++", {"timestep_spacing": "trailing"}),
    ],
)
def test_a_solver_draws_what_the_pipeline_draws_with_it(method, make, family, solver, options, online):
    run = online(
        method,
        model=make(family),
        max_train_steps=1,
        learning_rate=0.0,
        resolution=8,
        sample_solver=solver,
        sample_solver_options=options,
    )
    run.train()
    pipe = make(family)
    drawn = generate(
        pipe,
        [text for text in run.round.prompts for _ in range(3)],
        [draws.number(0, "start", 0, p, k) for p in range(4) for k in range(3)],
        steps=4,
        guidance=2.0,
        scheduler=make_scheduler(solver, pipe.scheduler.config, **options),
        height=8,
        width=8,
    )
    images = decoded(run.adapter, run.round.states).permute(0, 2, 3, 1)
    assert np.abs(images.numpy() * 255 - drawn.images).max() <= 0.51
    if family != "flux":  # whose pipeline packs latents
        torch.testing.assert_close(run.round.states, drawn.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"sample_timesteps": [900.0, 700.0, 300.0]}])
def test_ddim_without_noise_is_the_default(given, online):
    default, named = (
        online(name=name, max_train_steps=1, learning_rate=0.0, sample_solver=solver, **given)
        for name, solver in (("default", None), ("named", "ddim"))
    )
    default.train()
    named.train()
    torch.testing.assert_close(named.round.states, default.round.states, rtol=1e-4, atol=1e-5)
    assert log(named)[0]["evaluations"] == log(default)[0]["evaluations"]


def test_rows_of_a_solver_with_noise_depend_on_their_seeds_alone(online):
    options = {"max_train_steps": 1, "same_start": True, "equal_groups": "first_two", **SDE}
    together = online(name="together", **options)
    apart = online(name="apart", sample_batch_size=5, **options)
    quiet = online(name="quiet", **options | {"sample_solver_options": {}})
    states = []
    for run in (together, apart, quiet):
        run.train()
        states.append(run.round.states)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(states[0][0], states[0][1])  # the same start, other noise on the way
    assert torch.equal(states[2][0], states[2][1])


@pytest.mark.parametrize(
    "options", [{}, SDE, {"sample_solver": "pndm", "sample_solver_options": {"variant": "f-pndm"}}]
)
def test_evaluations_are_counted(options, online):
    """Twelve guided images, then four pairs seen by the reference and, with a gradient, by the policy. The
    Runge-Kutta steps that a solver starts with count."""
    run = online(max_train_steps=2, **options)
    run.train()
    first, second = (record["evaluations"] for record in log(run))
    assert second == 4 * 2 * (1 + 3)
    assert first == 12 * 2 * 4 + second


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


@pytest.mark.parametrize(("compare", "count"), [("best_worst", 4), ("matched", 8), ("all", 24)])
def test_what_is_compared(compare, count, online):
    """Four images of four prompts, no two of them equally bright."""
    run = online(max_train_steps=1, learning_rate=0.0, images_per_prompt=4, compare=compare)
    run.train()
    rewards = rewards_of(run)
    for item in run.round.items:
        winner, loser = (rewards[item.prompt, place - 4 * item.prompt] for place in item.x)
        assert winner > loser
    assert len({item.x for item in run.round.items}) == len(run.round.items) == count


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "one_minus_s_squared"])
def test_the_loss_is_flow_dpos_on_the_finished_images(schedule, sft_weight, online):
    run = online(beta_schedule=schedule, inner_epochs=4, sft_weight=sft_weight)
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
            wanted = sigmoid(d[0], d[1], beta) + sft_weight * beta / 2 * policy[0]
            torch.testing.assert_close(losses[place], wanted, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_offline_trainers(online, pairs, tmp_path):
    run = online(sft_weight=0.3, beta_dpo=40.0)
    config = FlowDPOConfig(output_dir=str(tmp_path / "offline"), sft_weight=0.3, beta_dpo=40.0)
    offline = FlowDPOTrainer(config, model=build("sd3"), dataset=pairs)
    errors = Errors(*torch.rand(2, 10, generator=torch.Generator().manual_seed(0)))
    wanted, _ = offline.pair_loss(errors, SimpleNamespace(preference=None, gap=None))
    torch.testing.assert_close(run.image_losses(errors, torch.zeros(5))[0], wanted)


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


@pytest.mark.parametrize("method", METHODS)
def test_earlier_rounds_stay_in_the_pool(method, online):
    """Without learning all rounds are what they are without a memory of them."""
    options = {"learning_rate": 0.0, "inner_epochs": 1, "train_batch_size": 2, "prompts_per_round": 3}

    def rounds(name, **more):
        run, found = online(method, name, **options, **more), []
        fresh = run._new_round
        run._new_round = lambda step: found.append(fresh(step)) or found[-1]
        run.train()
        return run, found

    def content(current):
        return [
            (current.prompts[item.prompt], current.states[list(item.x)].tolist(), item.values)
            for item in current.items
        ]

    steps = 16 if method == "dpo" else 40
    _, single = rounds("single", max_train_steps=steps)
    run, pooled = rounds("pooled", max_train_steps=steps, replay_rounds=2)
    assert len(pooled) >= 4
    for number, current in enumerate(pooled):
        kept = single[max(0, number - 2) : number + 1]
        assert content(current) == [item for one in kept for item in content(one)]
        assert len(current.states) == 9 * len(kept)
        assert current.metrics == single[number].metrics
    told = run._guidance(run.round.prompts).cond
    assert all(torch.equal(run.guidance.cond[name], told[name]) for name in told)
    assert len(run.round.prompts) == 9


# -------------------------------------------------------------------- the reference


@pytest.mark.parametrize("rank", [4, 0])
def test_the_reference_is_refreshed(rank, online):
    run = online(rank=rank, refresh_steps=2, max_train_steps=5, learning_rate=3e-3)
    run.train()
    at_reference = [abs(record["loss"] - math.log(2)) < 1e-6 for record in log(run)]
    assert at_reference == [True, False, True, False, True]
    assert [path.name for path in (run.folder / REFERENCE).iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("more", [{}, {**SDE, "compare": "matched", "sft_weight": 0.2, "replay_rounds": 1}])
def test_a_run_goes_on_from_any_checkpoint_with_the_same_weights(more, online):
    options = {"refresh_steps": 2, "max_train_steps": 6, "checkpointing_steps": 1, "inner_epochs": 3} | more
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


OWN_PAIRS = {**SDE, "compare": "matched", "sft_weight": 0.2, "images_per_prompt": 4, "replay_rounds": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_dies_while_it_samples_goes_on_with_the_same_weights(method, online):
    own = {name: OWN_PAIRS[name] for name in ("sample_solver", "sample_solver_options", "replay_rounds")}
    options = OWN_PAIRS | {"refresh_steps": 3} if method == "dpo" else own
    options |= {"max_train_steps": 12, "checkpointing_steps": 1, "inner_epochs": 1}
    whole = online(method, "whole", **options)
    whole.train()
    judged = 0

    def dies(images, prompts):
        nonlocal judged
        judged += 1
        if judged == 3:
            raise KeyboardInterrupt
        return brightness(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        online(method, reward=dies, **options).train()
    resumed = online(method, **options, resume_from_checkpoint="latest")
    resumed.train()
    assert resumed.round.number == whole.round.number >= 2
    for p, q in zip(whole.weights.trainable, resumed.weights.trainable, strict=True):
        assert torch.equal(p, q)
    volatile = ("step_seconds",)
    one, two = (
        [{k: v for k, v in r.items() if k not in volatile} for r in log(run)] for run in (whole, resumed)
    )
    assert one == two


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, online, tmp_path):
    own = {name: OWN_PAIRS[name] for name in ("sample_solver", "sample_solver_options", "replay_rounds")}
    options = OWN_PAIRS | {"beta_dpo": 20.0, "refresh_steps": 3} if method == "dpo" else own
    options |= {"max_train_steps": 6, "learning_rate": 1e-3, "inner_epochs": 1}
    one = online(method, "one", **options)
    one.train()
    processes(2, lambda rank: online(method, "two", **options | {"train_batch_size": 2}).train(), tmp_path)
    two = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert one.round.number >= 1
    for mine, theirs in zip(log(one), two, strict=True):
        assert theirs["evaluations"] == mine["evaluations"]
        for name in ("loss", "reward", "round", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), name


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
        ("dpo", {"compare": "random_reward"}, "compare must be one of best_worst, matched, all"),
        ("dpo", {"sft_weight": -0.1}, "sft_weight must be 0 or more"),
        ("dpo", {"replay_rounds": -1}, "replay_rounds must be 0 or more"),
        ("rwr", {"tau": 0.0}, "tau must be above 0"),
        ("rwr", {"sample_solver": "dpm++"}, "sample_solver must be one of dc-solver, ddim"),
        ("dpo", {"sample_solver_options": {"solver_order": 3}}, "empty without sample_solver"),
        ("dpo", {"sample_solver": "unipc", "transition": "flow_sde"}, "give sample_solver_options"),
        ("dpo", {"sample_solver": "unipc", "sample_spacing": "trailing"}, "give sample_solver_options"),
    ],
)
def test_options_without_meaning_are_refused(method, options, words, online):
    with pytest.raises(UserError, match=words):
        online(method, **options)


def test_options_that_the_solver_does_not_have_are_refused_before_anything_is_sampled(online):
    with pytest.raises(UserError, match="has no option 'order'"):
        online(sample_solver="unipc", sample_solver_options={"order": 3}).train()


def test_models_that_do_not_fit_are_refused(online):
    with pytest.raises(UserError, match="flow-dpo-online is for flow models, but this one predicts epsilon"):
        online(model="sd").train()
    with pytest.raises(UserError, match="flow-rwr-online samples images; a video model"):
        online("rwr", name="video", model="wan").train()
