"""SPO: trees of candidates, the pairs made of them, and training on single steps."""

import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.likelihood import Transition
from diffalign.models import load_adapter
from diffalign.pipelines.branches import Branches, branched_rollout
from diffalign.pipelines.guidance import guidance_for
from diffalign.pipelines.rollout import rollout, sampling_times
from diffalign.rewards.base import Reward
from diffalign.rewards.ensemble import Ensemble, Member
from diffalign.trainers.d3po import PairItemTrainer
from diffalign.trainers.online import Item, Members
from diffalign.trainers.spo import SPOConfig, SPOTrainer, best_and_worst
from tests.align.goldens import load_online as load
from tests.align.test_resume import LORA, records, run
from tests.align.test_trajectory import levels

PROMPTS = [f"picture {i}" for i in range(8)]
STEPS = 6


def brightness(images, prompts):
    return 100 * images.mean((1, 2, 3))


class Clock(Reward):
    """Brightness that is told the time, and notes it."""

    step_aware = True

    def __init__(self):
        super().__init__("clock")
        self.times = []

    def score(self, images, prompts, timesteps=None):
        self.times.append(timesteps)
        return super().score(images, prompts)

    def rewards(self, images, prompts):
        return brightness(images, prompts)


@pytest.fixture
def spo(tmp_path, model_folder):
    """``spo(name, reward=..., **options)``: four prompts a round, three candidates from step 2 of six on."""

    def make(name="run", *, reward=brightness, dataset=PROMPTS, **options):
        settings = {
            "output_dir": str(tmp_path / name),
            "train_batch_size": 4,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "prompts_per_round": 4,
            "sample_steps": STEPS,
            "sample_guidance": 3.0,
            "candidates": 3,
            "branch_from": 2,
            "threshold": 0.0,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return SPOTrainer(
            SPOConfig(**(settings | options)), model=model_folder, dataset=dataset, reward=reward
        )

    return make


# ------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("k", [2, 4])
def test_candidates_and_their_choice_as_published(k):
    case = load("spo", f"spo_pool/k{k}")
    now, then = (levels(case[f"input/alpha_{name}"].reshape(1)) for name in ("t", "prev"))
    transition = Transition.between(*now, *then, "epsilon")
    x, raw = case["input/sample"], case["input/model_output"]
    for actual, name in (
        (transition(raw, x, 0).sample(case["input/noise"]), "candidates"),
        (transition.predicted_x0(raw, x, 0), "pred_x0"),
    ):
        # In float32 the original forms its std by a cancellation.
        torch.testing.assert_close(actual, case[f"output/{name}"], rtol=1e-4, atol=5e-5)
    best, worst, kept = best_and_worst(case["input/scores"].double().numpy().T, 0.3)
    assert np.array_equal([best, worst], case["output/win_lose_index"].numpy())
    assert np.array_equal(kept, case["output/keep"])


def test_end_to_end_as_published_with_one_evaluation_of_the_shared_state():
    case = load("end_to_end", "spo_end_to_end")
    transition = Transition.between(
        *levels(case["input/alpha_t"]), *levels(case["input/alpha_prev"]), "epsilon"
    )
    leaves = {b: case[f"input/policy_{b}_0"].clone().requires_grad_() for b in ("uncond", "cond")}
    asked = []

    def predict(adapter, x, t, prompts, *, reference, detach_uncond):
        assert torch.equal(x, case["input/latents_0"])
        asked.append(reference)
        source = {b: case[f"input/ref_{b}_0"] for b in leaves} if reference else leaves
        return source["uncond"] + 5.0 * (source["cond"] - source["uncond"])

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        guidance=SimpleNamespace(predict=predict),
        adapter=None,
        transition=transition,
        config=SPOConfig(),
    )
    rows = len(case["input/timesteps"])
    states = torch.cat([case["input/latents_0"], case["input/next_0"], case["input/next_1"]])
    # The case prefers both ways; the winner comes first in a pair.
    prefer = case["input/prefer"].reshape(-1, 2).expand(rows, 2)
    pairs = [((0, 1),) if sign > 0 else ((1, 0),) for sign in prefer[:, 0].tolist()]
    items = [Item(i, i, (i,), (rows + i, 2 * rows + i), pairs[i]) for i in range(rows)]
    losses, _ = PairItemTrainer.item_losses(trainer, Members(trainer, SimpleNamespace(states=states), items))
    torch.testing.assert_close(losses.mean(), case["output/loss"].reshape(()), rtol=1e-8, atol=1e-12)
    losses.mean().backward()
    for branch, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, case[f"output/grad_policy_{branch}_0"], rtol=1e-7, atol=1e-12)
    assert asked == [True, False]


# ------------------------------------------------------------------------------------------- trees


@pytest.fixture(scope="module")
def adapter(model_folder):
    return load_adapter(model_folder)


def tree(adapter, *, first=2, inner_steps=0, batch_size=4, end=None, rows=3, k=3):
    """States, scores, and what was asked: rows of each network call, the (latents, rows, time) judged."""
    times = sampling_times(adapter, STEPS)
    transition = Transition.along(
        adapter.schedule, adapter.prediction_type, times if end is None else [*times[:-1], end]
    )
    branches = Branches.every(transition, k, first=first, inner_steps=inner_steps)
    told = guidance_for(adapter, [PROMPTS[i % len(PROMPTS)] for i in range(rows)], 3.0)
    asked, judged = [], []

    def judge(latents, places, time):
        judged.append((latents, places, time))
        return latents.flatten(1)[:, :2]

    handle = adapter.module.register_forward_pre_hook(lambda _, args: asked.append(len(args[0]) // 2))
    states, scores = branched_rollout(
        adapter,
        transition,
        told,
        range(rows),
        branches,
        judge,
        shape=adapter.latent_shape(),
        start_seeds=range(rows),
        seeds=range(100, 100 + rows),
        batch_size=batch_size,
    )
    handle.remove()
    return SimpleNamespace(**locals())


@pytest.mark.parametrize(
    ("inner_steps", "end", "starts", "times"),
    [
        (0, None, (2, 3, 4), [333, 167, 0]),  # to the clean latent no noise is added
        (0, 0, (2, 3, 4, 5), [333, 167, 1, 0]),
        (1, 0, (2, 4), [167, 0]),
        (2, 0, (2, 5), [1, 0]),  # the second segment is cut short
    ],
)
def test_a_tree(adapter, inner_steps, end, starts, times):
    t = tree(adapter, inner_steps=inner_steps, end=end)
    branches = t.branches
    assert branches.starts == starts
    # As many calls as a plain trajectory; no state is asked about twice.
    assert t.asked == [3, 3, 3] + [9] * (STEPS - 3)
    assert [time for *_, time in t.judged] == times
    assert t.states.shape == (3, len(branches), *adapter.latent_shape())
    assert t.scores.shape == (3, len(starts), 3, 2)
    places = [branches.origin(j) for j in range(len(starts))] + [
        branches.after(j, step, c)
        for j, segment in enumerate(branches.segments)
        for step in segment
        for c in range(3)
    ]
    assert sorted(places) == list(range(len(branches)))
    for j, segment in enumerate(branches.segments):
        ends = [t.states[:, branches.after(j, segment[-1], c)] for c in range(3)]
        if j + 1 < len(starts):  # one of the candidates goes on, as it is
            origin = t.states[:, branches.origin(j + 1)]
            same = torch.stack([(end == origin).flatten(1).all(1) for end in ends])
            assert same.sum(0).tolist() == [1, 1, 1]
            # What is judged is what the network makes of each candidate at its time.
            x, step = torch.cat(ends), segment[-1] + 1
            with torch.no_grad():
                raw = t.told.predict(adapter, x, t.transition.times(step, x), [0, 1, 2] * 3)
            wanted = t.transition.predicted_x0(raw, x, step)
        else:
            wanted = torch.cat(ends)
        latents, rows, _ = t.judged[j]
        torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-5)
        assert rows == [0, 1, 2] * 3
        torch.testing.assert_close(t.scores[:, j], latents.flatten(1)[:, :2].reshape(3, 3, 2).transpose(0, 1))


def test_candidates_are_draws_of_one_gaussian(adapter):
    t = tree(adapter, rows=8, k=64, first=3, batch_size=8)
    x = t.states[:, t.branches.origin(0)]
    with torch.no_grad():
        raw = t.told.predict(adapter, x, t.transition.times(3, x), range(8))
    gaussian = t.transition(raw, x, 3)
    drawn = torch.stack([t.states[:, t.branches.after(0, 3, c)] for c in range(64)])
    z = (drawn - gaussian.mean) / gaussian.std
    assert z.mean().abs() < 0.03
    assert z.std() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(z.flatten(1)).fill_diagonal_(0).abs().max() < 0.25


def test_the_trunk_is_a_plain_trajectory_and_a_row_does_not_depend_on_its_batch(adapter):
    one, all_ = tree(adapter, batch_size=1), tree(adapter, batch_size=3)
    torch.testing.assert_close(one.states, all_.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.scores, all_.scores, rtol=1e-4, atol=1e-5)
    assert one.asked == ([1, 1, 1] + [3] * (STEPS - 3)) * 3
    plain, _ = rollout(
        adapter,
        one.transition,
        one.told,
        range(3),
        shape=adapter.latent_shape(),
        start_seeds=range(3),
        seeds=range(100, 103),
    )
    torch.testing.assert_close(one.states[:, one.branches.origin(0)], plain[:, 2], rtol=1e-4, atol=1e-5)


def test_every_candidate_may_go_on(adapter):
    t = tree(adapter, rows=32, batch_size=32, k=2)
    origin = t.states[:, t.branches.origin(1)]
    first = (t.states[:, t.branches.after(0, 2, 0)] == origin).flatten(1).all(1)
    assert 6 <= first.sum() <= 26  # 32 fair coins


# ------------------------------------------------------------------------------------------- pairs


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 5)), elements=st.floats(-20, 20)),
    st.floats(0, 0.99),
)
def test_a_pair_is_kept_if_its_softmax_differs_by_more_than_the_threshold(scores, threshold):
    best, worst, kept = best_and_worst(scores, threshold)
    for row, b, w, keep in zip(scores, best, worst, kept, strict=True):
        assert (row[b], row[w]) == (row.max(), row.min())
        p, q = np.exp(row[[b, w]] - row[b]) / np.exp(row[[b, w]] - row[b]).sum()
        assert keep == (p - q > threshold) or p - q == pytest.approx(threshold, abs=1e-12)


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_items_are_best_and_worst_of_their_segment(spo, inner_steps):
    trainer = spo(max_train_steps=1, inner_steps=inner_steps)
    trainer.train()
    trainer.config.threshold = 0.3
    branches, length = trainer.branches, len(trainer.branches)
    rewards = np.zeros((2, 1, len(branches.starts), 3, 1))
    rewards[1, 0, 1] = [[0.5], [3.0], [-1.0]]
    rewards[0, 0, 0] = [[0.0], [0.5], [0.25]]  # too close
    items = trainer.items(np.arange(2 * length).reshape(2, 1, length), rewards, None)
    assert [item.step for item in items] == [s for s in branches.segments[1] if trainer.transition.std[s] > 0]
    before = (length + branches.origin(1),)
    for item in items:
        assert item.prompt == 1
        assert item.pairs == ((0, 1),)
        assert item.x == before
        before = item.after
        assert before == tuple(length + branches.after(1, item.step, c) for c in (1, 2))


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_all_candidates_can_be_compared_on_one_evaluation_of_their_state(spo, inner_steps):
    trainer = spo(max_train_steps=1, inner_steps=inner_steps, compare="all")
    trainer.train()
    trainer.config.threshold = 0.3
    branches, length = trainer.branches, len(trainer.branches)
    rewards = np.zeros((1, 1, len(branches.starts), 3, 1))
    rewards[0, 0, 0] = [[0.0], [3.0], [0.25]]  # the first and the last are too close
    items = trainer.items(np.arange(length).reshape(1, 1, length), rewards, None)
    assert [item.step for item in items] == [s for s in branches.segments[0] if trainer.transition.std[s] > 0]
    for item in items:
        members = [branches.after(0, item.step, c) for c in range(3)]
        won = {(item.after[w], item.after[l]) for w, l in item.pairs}  # noqa: E741
        assert won == {(members[1], members[0]), (members[1], members[2])}
    rows = []
    handle = trainer.adapter.module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    trainer.item_losses(Members(trainer, trainer.round, items[:1]))
    handle.remove()
    assert rows == [2, 2]  # policy and reference, both branches of guidance


def test_a_trajectory_of_twenty_steps_gives_sixteen_pairs_as_published(spo):
    options = {"sample_steps": 20, "branch_from": 4, "prompts_per_round": 1, "max_train_steps": 1}
    published = spo(sample_end=0.0, candidates=2, **options)
    published.train()
    assert len(published.round.items) == 16
    clean = spo("clean", candidates=2, **options)
    clean.train()
    assert len(clean.round.items) == 15


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_the_first_loss_is_log_2_and_replaying_gives_zero(spo, log, inner_steps):
    trainer = spo(max_train_steps=1, inner_steps=inner_steps)
    trainer.train()
    (first,) = log(trainer.folder)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-7)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl", "clipped"):
        assert first[name] == 0.0
    assert first["grad_norm"] > 0
    assert first["pairs_kept"] == 1.0


def test_a_pair_costs_one_evaluation_of_policy_and_one_of_reference(spo):
    trainer = spo(max_train_steps=1)
    trainer.train()
    rows = []
    handle = trainer.adapter.module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    items = trainer.round.items[:5]
    losses, _ = trainer.item_losses(Members(trainer, trainer.round, items))
    handle.remove()
    assert losses.shape == (5,)
    assert rows == [10, 10]  # both branches of guidance


def test_the_margin_is_that_of_the_shared_state(spo):
    """``rho_w - rho_l = (x_w - x_l) . (mean - reference mean) / (D sigma^2)``."""
    trainer = spo(max_train_steps=3, learning_rate=1e-2)
    trainer.train()
    members = Members(trainer, trainer.round, trainer.round.items[:4])
    with torch.no_grad():
        policy, reference = members.gaussian(), members.gaussian(reference=True)
        ratio = members.log_ratio(policy, reference)
    chosen, rejected = (members.after[index] for index in (members.winner, members.loser))
    wanted = (chosen - rejected) * (policy.mean - reference.mean) / policy.std**2
    margin = ratio[members.winner] - ratio[members.loser]
    assert margin.abs().min() > 0
    torch.testing.assert_close(margin, wanted.flatten(1).mean(1), rtol=1e-3, atol=1e-6)


def test_the_reward_rises(spo, log):
    trainer = spo(
        max_train_steps=40,
        prompts_per_round=8,
        train_batch_size=16,
        learning_rate=5e-3,
        branch_from=0,
        inner_epochs=2,
        same_start=True,
    )
    trainer.train()
    rewards = {r["round"]: r["reward"] for r in log(trainer.folder)}
    curve = [rewards[number] for number in sorted(rewards)]
    assert np.mean(curve[-3:]) > np.mean(curve[:3]) + 1.0


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_resuming_in_the_middle_of_a_round_is_bit_identical(spo, inner_steps):
    options = {"max_train_steps": 6, "inner_epochs": 2, "train_batch_size": 5, "inner_steps": inner_steps}
    whole = spo("whole", **options).train().output_dir
    cut = spo("cut", checkpointing_steps=3, **options | {"max_train_steps": 3})
    cut.train()
    assert cut.round.first_step < 3 < cut.round.first_step + cut._length(cut.round)
    spo("cut", resume_from_checkpoint="latest", **options).train()
    wanted, got = load_file(whole / LORA), load_file(cut.folder / LORA)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert records(whole) == records(cut.folder)


def test_two_processes_give_the_result_of_one(tmp_path, model_folder, spo):
    options = {"rewards": ["jpeg-incompressibility"], "train_batch_size": 6, "candidates": 2}
    spo("one", dataset=PROMPTS, reward=None, **options).train()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "pretrained_model_name_or_path": model_folder,
        "dataset_name": prompts,
        "output_dir": tmp_path / "two",
        "rewards": "[jpeg-incompressibility]",
        "train_batch_size": 3,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "prompts_per_round": 4,
        "sample_steps": STEPS,
        "sample_guidance": 3.0,
        "branch_from": 2,
        "candidates": 2,
        "threshold": 0,
        "progress": "false",
    }
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    run(*launcher, "-m", "diffalign", "train", "spo", *(f"--{k}={v}" for k, v in settings.items()))
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert one[-1]["round"] > 1
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "reward", "round", "pairs_kept", "rewards/margins"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------------- rewards


def test_a_step_aware_reward_is_told_the_time_and_others_bring_a_warning(spo, caplog):
    reward = Clock()
    trainer = spo(max_train_steps=1, reward=reward, sample_batch_size=12)
    trainer.train()
    assert reward.times == [*trainer.transition.timesteps[3:5], 0.0]
    assert "as if it were finished" not in caplog.text
    spo("plain", max_train_steps=1).train()
    assert "the reward function judges what the network predicts at noisy times as if it were" in caplog.text


def test_an_ensemble_tells_its_step_aware_members_the_time():
    class Dark(Clock):
        step_aware = False

        def score(self, images, prompts):
            return -Reward.score(self, images, prompts)

    clock = Clock()
    both = Ensemble([Member(clock, weight=3.0), Member(Dark())])
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(both.score(images, ["a", "b"], 7.0), 2 * brightness(images, None))
    assert both.step_aware
    assert clock.times == [7.0]
    assert not Ensemble([Member(Dark())]).step_aware


def test_several_rewards_are_added(spo):
    def two(images, prompts):
        value = brightness(images, prompts)
        return torch.stack([value, -value], 1)

    with pytest.raises(UserError, match="no best candidate beat the worst by threshold"):
        spo(reward=two, threshold=0.3).train()


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1"),
        ({"threshold": -0.1}, "threshold must be at least 0 and below 1"),
        ({"branch_from": 6}, "branch_from must be a step, 0 to 5"),
        ({"branch_from": 3, "sample_timesteps": [900.0, 500.0, 100.0]}, "branch_from must be a step, 0 to 2"),
        ({"branch_from": 5}, "branch_from 5 leaves no step that adds noise"),
        (
            {"branch_from": 3, "trained_steps": 0.5},
            "branch_from 3 leaves no step .* trained on: .* is step 2",
        ),
        ({"inner_steps": -1}, "inner_steps must be 0 or more"),
        ({"transition_options": {"eta": 0.0}}, "none of the 6 steps adds noise"),
        ({"reward": lambda images, prompts: torch.zeros(2)}, "must give one row each"),
        ({"reward": lambda images, prompts: torch.zeros(len(images), 2, 2)}, "must give one row each"),
        ({"reward": lambda images, prompts: torch.zeros(len(images))}, "lower --threshold"),
        ({"aggregate": "pareto"}, "best and worst by one score"),
        ({"train_batch_size": 100}, "fewer than the 100 of one optimiser step"),
        ({"sample_end": 999.0}, "must fall step by step"),
    ],
)
def test_what_cannot_work_is_refused(spo, options, words):
    with pytest.raises(UserError, match=words):
        spo(**options).train()
