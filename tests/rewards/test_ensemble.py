"""Several rewards as one, and scores of the heads of one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.rewards import Ensemble, Member, Reward, RewardSpec, load_reward, load_rewards
from diffalign.rewards.clip import load_clip
from diffalign.rewards.multi_head import Head, MultiHead

from .conftest import PROMPTS


class Channel(Reward):
    """Mean of one colour."""

    def __init__(self, channel, differentiable=True):
        super().__init__("rgb"[channel])
        self.channel, self.differentiable = channel, differentiable

    def rewards(self, images, prompts):
        return images[:, self.channel].mean((1, 2))


@pytest.fixture
def images():
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def ensemble(weights=(1.0, 2.0, 0.5), **options):
    return Ensemble([Member(Channel(i), w) for i, w in enumerate(weights)], **options)


def scored(reward, images):
    return reward.score(images, ["x"] * len(images))


def test_aggregates_are_their_formulas(images):
    weighted = images.mean((2, 3)) * torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(scored(ensemble(), images), weighted.sum(1))
    torch.testing.assert_close(scored(ensemble(aggregate="wco"), images), weighted.amin(1))
    spread = ((weighted - weighted.mean(1, keepdim=True)) ** 2).mean(1)
    torch.testing.assert_close(
        scored(ensemble(aggregate="uwo", coefficient=0.7), images), weighted.mean(1) - 0.7 * spread
    )


def test_members_that_agree_cost_nothing_and_the_worst_is_below_the_mean(images):
    twins = Ensemble([Member(Channel(0)), Member(Channel(0))], aggregate="uwo", coefficient=5.0)
    torch.testing.assert_close(scored(twins, images), scored(Channel(0), images))
    mean = scored(ensemble(aggregate="uwo", coefficient=0.0), images)
    assert (scored(ensemble(aggregate="wco"), images) < mean).all()
    assert (scored(ensemble(aggregate="uwo", coefficient=1.0), images) < mean).all()


def test_members_are_unanimous_where_no_two_prefer_different_images():
    rows = {  # what each member gives the first image more than the second
        "all for the first": (1.0, 2.0, 0.5),
        "one against": (1.0, -0.1, 0.5),
        "one undecided": (0.0, -1.0, -2.0),
        "all undecided": (0.0, 0.0, 0.0),
    }
    first = dict(zip("rgb", torch.tensor(list(rows.values())).T, strict=True))
    second = {name: torch.zeros(4) for name in first}
    assert ensemble().unanimous(first, second).tolist() == [True, False, True, True]
    # A negative weight turns a member's vote, a weight of 0 takes it away, and a gate has none.
    assert ensemble((1.0, -1.0, 1.0)).unanimous(first, second).tolist() == [False, True, False, True]
    assert ensemble((1.0, 0.0, 1.0)).unanimous(first, second).tolist() == [True, True, True, True]
    members = [Member(Channel(0)), Member(Channel(1), at_least=0.5), Member(Channel(2))]
    gated = Ensemble(members, rejected_score=-1.0)
    assert gated.unanimous(first, second).tolist() == [True, True, True, True]


def test_gates_reject_and_have_no_gradient(images):
    bar = float(images[:, 1].mean((1, 2)).median())
    reward = Ensemble(
        [Member(Channel(0)), Member(Channel(1, differentiable=False), at_least=bar)], rejected_score=-3.0
    )
    assert reward.differentiable
    images.requires_grad_()
    scores = scored(reward, images)
    passed = images[:, 1].mean((1, 2)) >= bar
    assert 0 < passed.sum() < len(images)
    torch.testing.assert_close(scores, torch.where(passed, images[:, 0].mean((1, 2)), torch.tensor(-3.0)))
    scores.sum().backward()
    assert images.grad[:, 1:].abs().sum() == 0
    assert torch.equal(images.grad[:, 0].abs().sum((1, 2)) > 0, passed)


def test_vectors_are_weighted_and_gated(images):
    bar = float(images[:, 1].mean((1, 2)).median())
    members = [Member(Channel(0), 2.0), Member(Channel(1), at_least=bar), Member(Channel(2), -1.0)]
    reward = Ensemble(members, rejected_score=-3.0)
    found = reward.weighted(reward.parts(images, ["x"] * 6))
    mean = images.mean((2, 3))
    wanted = torch.stack([2 * mean[:, 0], -mean[:, 2]])
    wanted[:, mean[:, 1] < bar] = -3.0
    torch.testing.assert_close(found, wanted)


def test_parts_are_named_and_combine_to_the_score(images):
    reward = Ensemble([Member(Channel(0)), Member(Channel(0), 2.0), Member(Channel(2))])
    parts = reward.parts(images, ["x"] * 6)
    assert list(parts) == ["r#1", "r#2", "b"]
    torch.testing.assert_close(parts["r#2"], images[:, 0].mean((1, 2)))  # before its weight
    torch.testing.assert_close(reward.combine(parts), scored(reward, images))


def test_ensembles_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="aggregate must be one of sum, wco, uwo, not 'max'"):
        ensemble(aggregate="max")
    with pytest.raises(UserError, match="have none that scores"):
        Ensemble([Member(Channel(0), at_least=1.0)], rejected_score=0.0)
    with pytest.raises(UserError, match="needs rejected_score"):
        Ensemble([Member(Channel(0)), Member(Channel(1), at_least=1.0)])
    with pytest.raises(UserError, match="coefficient of uwo must be 0 or more, but is -1"):
        ensemble(aggregate="uwo", coefficient=-1)
    with pytest.raises(UserError, match="must name at least one of pickscore"):
        load_rewards([])


def test_specs_and_names_load_the_same(clip_folder, images):
    spec = RewardSpec("clip", str(clip_folder), weight=0.5)
    both = load_rewards([spec, f"pickscore={clip_folder}"], aggregate="wco")
    assert both.name == "wco(clip, pickscore)"
    clip, pick = (load_reward(name, clip_folder).score(images, ["a"] * 6) for name in ("clip", "pickscore"))
    torch.testing.assert_close(both.score(images, ["a"] * 6), torch.minimum(0.5 * clip, pick))
    pil = load_rewards([RewardSpec("clip", str(clip_folder), options={"preprocess": "pil"}), spec])
    assert [m.reward.preprocess for m in pil.members] == ["pil", "tensor"]
    single = load_rewards([f"clip={clip_folder}"])
    assert single.name == "clip"
    assert torch.equal(single.score(images, ["a"] * 6), clip)
    with pytest.raises(UserError, match="no reward 'clp'; did you mean 'clip'"):
        load_rewards(["clp=x"])


def test_options_of_a_spec_reach_the_loader(clip_folder, tmp_path):
    layers = {"layers.0.weight": torch.ones(1, 16), "layers.0.bias": torch.zeros(1)}
    torch.save(layers, tmp_path / "aesthetic-model.pth")
    spec = RewardSpec("aesthetic", str(tmp_path), options={"clip": str(clip_folder)})
    assert load_rewards([spec]).name == "aesthetic"
    assert not load_rewards([spec], preprocess="pil").differentiable


# ------------------------------------------------------------------------------------------ heads


@pytest.fixture(scope="module")
def heads(clip_folder):
    table = {"visual": Head(1.0, 2.0), "motion": Head(-1.0, 0.5, weight=0.25), "text": Head(0.0, 1.0, 2.0)}
    model = MultiHead(load_clip(clip_folder, reward="x"), table)
    torch.manual_seed(0)
    model.linear.weight.data.normal_()
    return model


def test_heads_are_standardised_weighted_and_added(heads, pictures):
    images = pictures(3)
    raw = heads.raw(images, PROMPTS)
    parts = heads.parts(images, PROMPTS)
    torch.testing.assert_close(parts["motion"], (raw[:, 1] + 1.0) / 0.5)
    wanted = parts["visual"] + 0.25 * parts["motion"] + 2.0 * parts["text"]
    torch.testing.assert_close(heads.score(images, PROMPTS), wanted)


def test_heads_take_mean_and_deviation_from_a_set(heads, pictures):
    images, prompts = pictures(16), [*PROMPTS, "x"] * 4
    fitted = heads.standardised_on(heads.raw(images, prompts))
    columns = torch.stack(list(fitted.parts(images, prompts).values()))
    torch.testing.assert_close(columns.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(columns.std(1), torch.ones(3), rtol=0, atol=1e-5)
    assert [head.weight for head in fitted.heads.values()] == [1.0, 0.25, 2.0]


def test_heads_are_saved_whole(heads, pictures, tmp_path):
    heads.save_pretrained(tmp_path)
    again = load_reward("multi-head", tmp_path)
    images = pictures(3).requires_grad_()
    scores = again.score(images, PROMPTS)
    assert torch.equal(scores, heads.score(images, PROMPTS))
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    state = load_file(tmp_path / "heads.safetensors")
    save_file(
        {"weight": state["weight"][:2].contiguous(), "bias": state["bias"]}, tmp_path / "heads.safetensors"
    )
    with pytest.raises(UserError, match=r"weight is \(2, 48\), not \(3, 48\)"):
        load_reward("multi-head", tmp_path)
    (tmp_path / "heads.json").write_text('{"a": {"mean": 0, "spread": 2}}')
    with pytest.raises(UserError, match=r"heads\.json is broken"):
        load_reward("multi-head", tmp_path)
    (tmp_path / "heads.json").write_text('{"a": {"std": 0.0}}')
    with pytest.raises(UserError, match=r"std of a is 0\.0"):
        load_reward("multi-head", tmp_path)
