"""Learning from one's own samples: rollouts, rounds, D3PO and policy gradients on a tiny model."""

import json
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import load_file

from diffalign.data.prompts import read_prompts
from diffalign.data.trajectories import Trajectories
from diffalign.errors import UserError
from diffalign.likelihood import Transition
from diffalign.models import load_adapter
from diffalign.pipelines.generate import generate
from diffalign.pipelines.guidance import guidance_for
from diffalign.pipelines.load import load_pipeline
from diffalign.pipelines.rollout import RowNoise, decoded, rollout, sampling_times
from diffalign.rewards import RewardSpec
from diffalign.rollout import RolloutConfig
from diffalign.rollout import run as run_rollout
from diffalign.solvers import DDIMScheduler
from diffalign.trainers import checkpoint
from diffalign.trainers.d3po import D3POConfig, D3POTrainer
from diffalign.trainers.ddpo import DDPOConfig, DDPOTrainer
from diffalign.trainers.groups import (
    advantages,
    all_pairs,
    best_and_worst,
    dominates,
    matched,
    random_reward,
)
from diffalign.trainers.health import PATIENCE, Health
from diffalign.trainers.online import ROUND, Members
from tests.align import families
from tests.align.goldens import load_online as load
from tests.align.test_kill import at_operation, fork
from tests.align.test_resume import LORA, records, run

PROMPTS = [f"picture {i}" for i in range(8)]
METHODS = {"d3po": (D3POConfig, D3POTrainer), "ddpo": (DDPOConfig, DDPOTrainer)}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture
def online(tmp_path, model_folder):
    """``online(method, name, reward=..., **options)``: eight images of four prompts a round, six steps."""

    def make(method="d3po", name="run", *, reward=brightness, dataset=PROMPTS, **options):
        config, trainer = METHODS[method]
        settings = {
            "output_dir": str(tmp_path / name),
            "train_batch_size": 8,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "rank": 4,
            "prompts_per_round": 4,
            "images_per_prompt": 2,
            "sample_steps": 6,
            "sample_guidance": 3.0,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return trainer(config(**(settings | options)), model=model_folder, dataset=dataset, reward=reward)

    return make


# ------------------------------------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def adapter(model_folder):
    return load_adapter(model_folder)


def trajectories(adapter, *, eta=1.0, batch_size=8, guidance=3.0, seeds=(1, 2, 3), **options):
    times = sampling_times(adapter, 6)
    transition = Transition.along(adapter.schedule, adapter.prediction_type, times, eta=eta)
    told = guidance_for(adapter, PROMPTS[:3], guidance)
    shape = adapter.latent_shape()
    states, means = rollout(
        adapter,
        transition,
        told,
        [0, 1, 2],
        shape=shape,
        start_seeds=seeds,
        seeds=[s + 100 for s in seeds],
        batch_size=batch_size,
        **options,
    )
    return transition, told, states, means


def to_the_end(pipe, **options):
    """DDIM on the grid of the pipeline's config, down to the clean image."""
    return DDIMScheduler.from_config(
        pipe.scheduler.config, grid="diffusers", set_alpha_to_one=True, **options
    )


def test_without_noise_a_rollout_is_the_pipeline(adapter, model_folder):
    _, _, states, _ = trajectories(adapter, eta=0.0)
    pipe = adapter.pipeline
    scheduler = to_the_end(pipe)
    drawn = generate(pipe, PROMPTS[:3], [1, 2, 3], steps=6, guidance=3.0, scheduler=scheduler)
    torch.testing.assert_close(states[:, -1], drawn.latents, rtol=1e-4, atol=1e-5)
    images = decoded(adapter, states[:, -1]).permute(0, 2, 3, 1)
    assert np.abs(images.numpy() * 255 - drawn.images).max() <= 0.51


def test_a_rollout_is_ddim_with_eta(adapter):
    """The same noise through this project's scheduler."""
    _, told, states, _ = trajectories(adapter)
    scheduler = to_the_end(adapter.pipeline, eta=1.0)
    scheduler.set_timesteps(6)
    shape = adapter.latent_shape()
    x, noise = states[:, 0], RowNoise([101, 102, 103], shape, torch.device("cpu"))
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            raw = told.predict(adapter, x, t.expand(3), [0, 1, 2])
        x = scheduler.step(raw, t, x, variance_noise=noise.draw()).prev_sample
        torch.testing.assert_close(states[:, i + 1], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 0.0), (torch.bfloat16, 1e-6)])
def test_replaying_the_sampling_policy_gives_log_ratio_zero(model_folder, dtype, largest):
    adapter = load_adapter(model_folder)
    adapter.module.to(dtype)
    transition, told, states, means = trajectories(adapter, keep_means=True)
    assert states.dtype == dtype
    for step in transition.stochastic:
        x = states[:, step]
        with torch.no_grad():
            raw = told.predict(adapter, x, transition.times(int(step), x), [0, 1, 2])
        again = transition(raw, x, int(step))
        kept = type(again)(means[:, step], again.std)
        assert again.log_ratio(kept, states[:, step + 1]).abs().max() <= largest


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_times_that_depend_on_the_size_are_the_pipelines(family):
    pipe = families.build(family)
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 30.0}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    adapter = load_adapter(pipe)
    times = sampling_times(adapter, 3)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, grid="diffusers")
    side = adapter.default_resolution
    generate(pipe, ["a"], [0], steps=3, guidance=1.0, scheduler=scheduler, height=side, width=side)
    np.testing.assert_allclose(times[:-1], scheduler.timesteps.numpy(), rtol=1e-5)
    assert times[0] > times[1] > times[2] > times[3] == 0.0


def test_distilled_guidance_is_told_and_not_run_twice():
    adapter = load_adapter(families.build("flux"))
    told = guidance_for(adapter, ["a", "b"], 3.5)
    assert told.uncond is None
    assert told.cond["guidance"].tolist() == [3.5, 3.5]


def test_a_row_does_not_depend_on_its_batch(adapter):
    *_, one, _ = trajectories(adapter, batch_size=1)
    *_, three, _ = trajectories(adapter, batch_size=3)
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
    same_start = trajectories(adapter, seeds=(7, 7, 8))[2]
    assert torch.equal(same_start[0, 0], same_start[1, 0])
    assert not torch.equal(same_start[0, 0], same_start[2, 0])


# ------------------------------------------------------------------------------------------- groups


def test_pareto_as_published():
    case = load("preference", "pareto_compare")
    one, two = (case[f"input/rewards_{i}"].numpy() for i in range(2))
    for a, b, wanted in zip(one, two, case["output/prefer"].tolist(), strict=True):
        signs = {(): [0, 0], ((0, 1),): [1, -1], ((1, 0),): [-1, 1]}
        assert signs[tuple(all_pairs(np.stack([a, b])))] == wanted


def test_one_reward_with_ties_to_the_second_as_published():
    case = load("preference", "pso_single_reward_compare")
    one, two = (case[f"input/rewards_{i}"].numpy() for i in range(2))
    for a, b, wanted in zip(one, two, case["output/prefer"].tolist(), strict=True):
        ((winner, _),) = random_reward(np.stack([a, b]))
        assert wanted == ([1, -1] if winner == 0 else [-1, 1])


def test_a_random_reward_is_drawn_anew_at_every_step():
    """Two rewards that disagree: as in the published script, either image wins about half of the steps."""
    trainer = SimpleNamespace(config=SimpleNamespace(compare="random_reward"), steps=np.arange(200))
    rewards = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    index = np.arange(2 * 201).reshape(1, 2, 201)
    items = D3POTrainer.items(trainer, index, rewards, np.random.default_rng(0))
    assert [item.step for item in items] == list(range(200))
    assert 70 <= sum(item.pairs == ((0, 1),) for item in items) <= 130


@pytest.mark.parametrize(("case", "scale"), [("True", "global"), ("False", "group")])
def test_advantages_as_published(case, scale):
    golden = load("policy_gradient", f"advantages/grpo/global{case}")
    prompts = ["a", "b", "a", "c", "b", "a", "c", "b", "a"]
    found = advantages(golden["input/rewards"].double().numpy().flatten(), prompts, scale=scale)
    np.testing.assert_allclose(found, golden["output/advantages"].numpy().flatten(), rtol=1e-5, atol=1e-7)


rewards = arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.integers(1, 3)),
    elements=st.integers(-3, 3).map(float),
)


@given(rewards)
def test_comparisons_agree_with_rewards(group):
    pairs = all_pairs(group)
    assert all(dominates(group[w], group[l]) and not dominates(group[l], group[w]) for w, l in pairs)  # noqa: E741
    assert len(pairs) == sum(dominates(a, b) for a in group for b in group)
    total = group.sum(1)
    for w, l in best_and_worst(group):  # noqa: E741
        assert total[w] == total.max() > total.min() == total[l]
    assert bool(best_and_worst(group)) == (np.ptp(total) > 0)


@given(rewards)
def test_matched_pairs_share_no_image_and_come_from_both_ends(group):
    pairs, total = matched(group), group.sum(1)
    members = [image for pair in pairs for image in pair]
    assert len(set(members)) == len(members)
    assert pairs[:1] == best_and_worst(group)
    ranks = np.sort(total)
    found = [(total[w], total[l]) for w, l in pairs]  # noqa: E741
    ends = [(ranks[-1 - k], ranks[k]) for k in range(len(ranks) // 2)]
    assert found == [(high, low) for high, low in ends if high > low]


@given(arrays(np.float64, st.integers(2, 9), elements=st.sampled_from([0.0, 1.0])))
def test_matched_pairs_of_a_yes_or_no_are_as_many_as_there_can_be(group):
    assert len(matched(group)) == min(group.sum(), len(group) - group.sum())


@given(arrays(np.float64, 12, elements=st.floats(-5, 5)), st.sampled_from(["group", "global"]))
def test_advantages_sum_to_zero_in_each_group_and_equals_have_none(values, scale):
    groups = np.repeat([3, 1, 2], 4)
    found = advantages(values, groups, scale=scale)
    for label in (1, 2, 3):
        assert found[groups == label].sum() == pytest.approx(0, abs=1e-8)
    assert np.all(np.abs(advantages(np.ones(12), groups, scale=scale)) < 1e-9)


# ------------------------------------------------------------------------------------------- training


def test_the_first_loss_is_log_2_and_nothing_has_moved(online, log):
    trainer = online(max_train_steps=1)
    trainer.train()
    (first,) = log(trainer.folder)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["kl"] == first["clipped"] == 0.0
    assert first["grad_norm"] > 0


@pytest.mark.parametrize(("method", "clip"), [("d3po", 1e-9), ("ddpo", 1e-9), ("d3po", 0.9)])
def test_the_share_of_clipped_ratios_is_said(online, log, method, clip):
    trainer = online(method, max_train_steps=2, clip=clip)
    trainer.train()
    shares = [record["clipped"] for record in log(trainer.folder)]
    assert {record["round"] for record in log(trainer.folder)} == {1.0}
    assert shares[1] > 0.9 if clip < 0.1 else shares == [0.0, 0.0]


def test_alarms_of_clipped_ratios_and_equal_rewards():
    for name, alarm in (("clipped", "ratios clipped"), ("reward_equal", "rewards equal")):
        found = []
        for share in (0.4, 0.6):
            health = Health()
            fired = [health.update({name: share}) for _ in range(PATIENCE)]
            found.append([list(f) for f in fired if f])
        assert found == [[], [[alarm]]]


def test_the_first_log_ratio_of_a_policy_gradient_is_exactly_zero(online, log):
    trainer = online("ddpo", max_train_steps=1, images_per_prompt=4, train_batch_size=4)
    trainer.train()
    assert log(trainer.folder)[0]["log_ratio"] == pytest.approx(0.0, abs=1e-6)


def first_round_again(trainer):
    trainer._number = 0
    return trainer._new_round(0)


def gain(trainer):
    """How much the reward of the first round's prompts and noises has risen by the end."""
    with torch.no_grad():
        after = first_round_again(trainer)
    first = json.loads((trainer.folder / "log.jsonl").read_text().splitlines()[0])
    return after.metrics["reward"] - first["reward"]


@pytest.mark.parametrize(("method", "options"), [("d3po", {"beta": 20.0}), ("ddpo", {"clip": 1e-2})])
def test_the_reward_rises(online, method, options):
    trainer = online(
        method,
        max_train_steps=30,
        images_per_prompt=4,
        train_batch_size=16,
        learning_rate=3e-3,
        rank=0,
        **options,
    )
    trainer.train()
    assert gain(trainer) > 0.005


@pytest.mark.parametrize("method", METHODS)
def test_resuming_in_the_middle_of_a_round_is_bit_identical(online, method):
    options = {"max_train_steps": 6, "images_per_prompt": 4, "inner_epochs": 2, "train_batch_size": 5}
    whole = online(method, "whole", **options).train().output_dir
    cut = online(method, "cut", checkpointing_steps=4, **options | {"max_train_steps": 4})
    cut.train()
    assert cut.round.first_step < 4 < cut.round.first_step + cut._length(cut.round)
    assert (cut.folder / "checkpoint-4" / ROUND).is_file()
    online(method, "cut", resume_from_checkpoint="latest", **options).train()
    wanted, got = load_file(whole / LORA), load_file(cut.folder / LORA)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert records(whole) == records(cut.folder)


def test_killed_while_rounds_are_written(online, tmp_path):
    """One operation on files further each time, to the end: a checkpoint's round is whole or not there."""
    options = {"max_train_steps": 4, "images_per_prompt": 4, "inner_epochs": 2, "train_batch_size": 5}
    options |= {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    whole = online(name="whole", **options).train().output_dir
    folder, number, kills = tmp_path / "killed", 3, 0
    while True:

        def work(number=number):
            run = online(name="killed", resume_from_checkpoint="auto", **options)
            at_operation(number, folder)
            run.train()

        _, status = os.waitpid(fork(work), 0)
        for path in checkpoint.checkpoints(folder):
            assert load_file(path / ROUND)["states"].isfinite().all()
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills, number = kills + 1, number + 16
    assert kills > 3
    wanted, got = load_file(whole / LORA), load_file(folder / LORA)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert records(whole) == records(folder)


def test_two_processes_give_the_result_of_one(tmp_path, model_folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    for name, prefix, batch in (("one", [], 6), ("two", launcher, 3)):
        settings = {
            "pretrained_model_name_or_path": model_folder,
            "dataset_name": prompts,
            "output_dir": tmp_path / name,
            "rewards": "[jpeg-compressibility]",
            "train_batch_size": batch,
            "max_train_steps": 5,
            "learning_rate": 1e-3,
            "prompts_per_round": 4,
            "sample_steps": 6,
            "progress": "false",
        }
        run(*prefix, "-m", "diffalign", "train", "d3po", *(f"--{k}={v}" for k, v in settings.items()))
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert one[-1]["round"] > 1
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "reward", "round", "kl", "rewards/margins"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), name


def test_every_member_is_evaluated_once_however_many_pairs_it_is_in(online):
    """Seven images make 21 pairs: seven rows of policy and seven of reference, not 84."""
    trainer = online(images_per_prompt=7, train_batch_size=1, max_train_steps=1)
    trainer.train()
    rows = []
    handle = trainer.adapter.module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    (item,) = trainer.round.items[:1]
    members = Members(trainer, trainer.round, [item])
    losses, _ = trainer.item_losses(members)
    handle.remove()
    assert len(item.pairs) == 21
    assert losses.shape == (1,)
    assert rows == [14, 14]  # both branches of guidance


def test_adapters_are_the_reference_and_no_second_network_exists(online):
    trainer = online(max_train_steps=1)
    trainer.train()
    assert trainer.adapter.reference.__name__ == "adapters_off"


def test_several_rewards_by_pareto(tmp_path, model_folder):
    config = D3POConfig(
        output_dir=str(tmp_path / "run"),
        rewards=["jpeg-compressibility", "jpeg-incompressibility"],
        aggregate="pareto",
        prompts_per_round=2,
        sample_steps=4,
        checkpointing_steps=0,
        progress=False,
    )
    with pytest.raises(UserError, match="rounds in a row gave nothing to learn from: all images"):
        D3POTrainer(config, model=model_folder, dataset=PROMPTS).train()  # opposites: nobody dominates


def test_gates_reject_images_and_pareto_minds_weights(tmp_path, model_folder):
    """A black image and a noisy one; a negative weight turns the opposite judge into the same one."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.cat([torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 16, 16, generator=numbers)])

    def rewards_of(aggregate, *rewards, **options):
        config = D3POConfig(
            output_dir=str(tmp_path / "run"), rewards=[*rewards], aggregate=aggregate, **options
        )
        return D3POTrainer(config, model=model_folder, dataset=PROMPTS)._asked(images, ["a", "b"])

    small = "jpeg-compressibility"
    sizes = rewards_of("sum", small)
    assert sizes[1] < sizes[0] - 0.1
    gate = RewardSpec("jpeg-incompressibility", at_least=float(-sizes[1]))
    assert rewards_of("sum", small, gate, rejected_score=-50.0).tolist() == [-50.0, sizes[1].item()]
    turned = RewardSpec("jpeg-incompressibility", weight=-2.0)
    both = torch.stack([sizes, 2 * sizes], 1)
    assert torch.equal(rewards_of("pareto", small, turned), both)
    both[0] = -50.0
    assert torch.equal(rewards_of("pareto", small, turned, gate, rejected_score=-50.0), both)
    conservative = rewards_of("uwo", small, turned, coefficient=3.0)
    torch.testing.assert_close(conservative, 1.5 * sizes - 3.0 * (0.5 * sizes).square())


def test_step_weights_even_out_the_steps(online):
    trainer = online(step_weight="inverse_kl", max_train_steps=1)
    trainer.train()
    weight = (
        trainer._step_weight[trainer.steps].double().numpy() * trainer.transition.kl_weight[trainer.steps]
    )
    np.testing.assert_allclose(weight, weight[0], rtol=1e-5)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transition_options": {"eta": 0.0}}, "none of the 6 steps adds noise"),
        ({"sample_steps": 1}, "none of the 1 steps adds noise"),
        ({"transition": "flow_sde"}, "for flow models"),
        (
            {"reward": lambda images, prompts: torch.full((len(images),), torch.nan)},
            "not finite for an image of",
        ),
        ({"reward": lambda images, prompts: torch.zeros(3)}, "must give one row each"),
        (
            {"reward": lambda images, prompts: torch.zeros(len(images))},
            "all images of each prompt have equal",
        ),
        ({"train_batch_size": 100}, "fewer than the 100 of one optimiser step"),
        ({"sample_timesteps": [100.0, 900.0]}, "must fall step by step"),
        ({"dataset": []}, "has no prompts"),
        ({"reward": None}, "nothing judges the samples"),
        ({"images_per_prompt": 1}, "images_per_prompt must be at least 2"),
        ({"trained_steps": 0.0}, "trained_steps must be above 0"),
        ({"proportion_empty_prompts": 0.1}, "samples its own"),
    ],
)
def test_what_cannot_work_is_refused(online, options, words):
    with pytest.raises(UserError, match=words):
        online(**options).train()


def test_prompts_are_read_from_text_and_tables(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a red star\n\n a blue ring \na red star\n")
    assert read_prompts(text) == ["a red star", "a blue ring"]
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(json.dumps({"caption": c, "id": i}) + "\n" for i, c in enumerate("abc")))
    assert read_prompts(table, limit=2) == ["a", "b"]
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"colour": "red"}\n')
    with pytest.raises(UserError, match="has no prompts: it needs one of the columns prompt, caption, text"):
        read_prompts(wrong)


def test_a_round_missing_from_a_checkpoint_is_said(online):
    trainer = online(checkpointing_steps=1, max_train_steps=1, images_per_prompt=4)
    trainer.train()
    (trainer.folder / "checkpoint-1" / ROUND).unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint of d3po"):
        online(resume_from_checkpoint="latest", max_train_steps=2, images_per_prompt=4).train()


# ------------------------------------------------------------------------------------------- people


@pytest.fixture
def sampled(tmp_path, model_folder):
    """Trajectories of three prompts, three images each, judged by brightness."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:3]))
    settings = {"images_per_prompt": 3, "sample_steps": 6, "sample_guidance": 3.0}
    config = RolloutConfig(
        model=str(model_folder), dataset_name=str(prompts), output_dir=str(tmp_path / "rollout"), **settings
    )
    folder = run_rollout(config)
    votes = []
    for prompt, images in Trajectories(folder).images.items():
        light = [np.asarray(Image.open(folder / name)).mean() for name in images]
        votes.append({"prompt": prompt, "images": images, "scores": light})
    (folder / "votes.jsonl").write_text("".join(json.dumps(v) + "\n" for v in votes))
    return config, folder


def human(online, folder, **options):
    settings = {
        "trajectories": str(folder),
        "votes": str(folder / "votes.jsonl"),
        "reward": None,
        "images_per_prompt": 3,
        "prompts_per_round": 3,
    }
    return online(**(settings | options))


def test_people_instead_of_a_reward(online, log, sampled):
    _, folder = sampled
    trainer = human(online, folder, max_train_steps=30, beta=20.0, inner_epochs=20, rank=0)
    trainer.train()
    first, *_, last = log(trainer.folder)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["rewards/margins"] > 0.2
    assert "reward" not in first
    item = trainer.round.items[0]
    assert len(item.pairs) == 3
    states = Trajectories(folder).states(trainer.round.prompts[item.prompt])
    assert torch.equal(trainer.round.states[list(item.x)], states[:, item.step])


def test_a_rollout_that_was_cut_off_goes_on(sampled):
    config, folder = sampled
    states = {prompt: Trajectories(folder).states(prompt) for prompt in PROMPTS[:3]}
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:6]) + "\n")
    (folder / "trajectories" / "00002.safetensors").unlink()
    run_rollout(config)
    again = Trajectories(folder)
    assert [len(images) for images in again.images.values()] == [3, 3, 3]
    assert all(torch.equal(again.states(prompt), states[prompt]) for prompt in states)


def test_a_rollout_is_killed_between_any_two_operations_on_files(sampled, tmp_path, monkeypatch):
    config, whole = sampled
    pipe = load_pipeline(config.model)
    monkeypatch.setattr("diffalign.pipelines.load.load_pipeline", lambda *_, **__: pipe)
    folder, number, kills = tmp_path / "killed", 1, 0
    again = replace(config, output_dir=str(folder))
    while True:

        def work(number=number):
            at_operation(number, folder)
            run_rollout(again)

        _, status = os.waitpid(fork(work), 0)
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills, number = kills + 1, number + 1
    assert kills > 8
    one, two = Trajectories(whole), Trajectories(folder)
    assert one.images == two.images
    for prompt, images in one.images.items():
        assert torch.equal(one.states(prompt), two.states(prompt))
        assert [(whole / i).read_bytes() for i in images] == [(folder / i).read_bytes() for i in images]


def test_a_rollout_of_several_processes_is_refused(sampled, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rollout runs in one process"):
        run_rollout(sampled[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_guidance": 5.0}, "sampled with sample_guidance 3.0, but this run has 5.0"),
        ({"sample_steps": 7}, "sampled with timesteps"),
        ({"prompt_windows": 2}, "sampled with prompt_windows 1, but this run has 2"),
        ({"votes": None}, "trajectories and votes belong together"),
    ],
)
def test_a_policy_is_trained_as_it_was_sampled(online, sampled, options, words):
    with pytest.raises(UserError, match=words):
        human(online, sampled[1], **options).train()


def test_other_settings_do_not_go_into_one_folder(sampled):
    config, _ = sampled
    with pytest.raises(UserError, match="sampled with another sample_guidance"):
        run_rollout(replace(config, sample_guidance=4.0))


def test_trajectories_without_noise_are_not_sampled_in_vain(tmp_path, model_folder):
    """People would vote on images that nothing can be learnt from."""
    config = RolloutConfig(
        model=str(model_folder), output_dir=str(tmp_path / "rollout"), transition_options={"eta": 0.0}
    )
    (tmp_path / "prompts.txt").write_text("a red star")
    with pytest.raises(UserError, match=r"none of the 20 steps adds noise .* ddim with eta above 0"):
        run_rollout(replace(config, dataset_name=str(tmp_path / "prompts.txt")))


def test_votes_on_other_images_are_refused(online, sampled):
    _, folder = sampled
    (folder / "votes.jsonl").write_text(
        json.dumps({"prompt": "other", "images": ["images/00000-0.png"], "scores": [1.0]}) + "\n"
    )
    with pytest.raises(UserError, match=r"no vote in .* is about a prompt of"):
        human(online, folder)
