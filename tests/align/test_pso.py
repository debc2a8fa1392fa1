"""PSO, online on the steps of a few-step sampler and offline on pairs."""

import pytest
import torch

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import denoising_error
from diffalign.trainers.pso import FOUR_STEPS, PSOConfig, PSOOfflineConfig, PSOOfflineTrainer, PSOTrainer
from tests.align.goldens import load_online as load


@pytest.mark.parametrize("name", ["pso", "pso_db"])
@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_offline_loss_as_published(name, prior):
    case = load("pso", f"pso_offline/{name}/prior{prior}")
    s = case["input/sigma"].reshape(-1, 1, 1, 1)
    noise = (case["input/noisy"] - case["input/clean"]) / s
    policy = case["input/policy_eps"].clone().requires_grad_()
    errors, reference = (denoising_error(e, noise) for e in (policy, case["input/ref_eps"]))
    torch.testing.assert_close(errors, case["output/err_policy"].reshape(-1), rtol=2e-4, atol=1e-6)
    chosen, rejected = (-0.5 * errors).chunk(2)
    if name == "pso":
        ratio = [p + 0.5 * r for p, r in zip((chosen, rejected), reference.chunk(2), strict=True)]
        main = losses.pso(*ratio, 2 * 5.0)
    else:
        main = losses.pso_db(chosen, rejected, 2 * 5.0)
    loss = (main + prior * losses.prior(chosen, rejected, 2.0)).mean()
    torch.testing.assert_close(loss, case["output/loss"].reshape(()), rtol=2e-4, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(policy.grad, case["output/grad_policy_eps"], rtol=2e-4, atol=1e-6)


@pytest.fixture
def online(tmp_path, model_folder):
    def make(**options):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "train_batch_size": 6,
            "max_train_steps": 1,
            "learning_rate": 1e-2,
            "rank": 4,
            "prompts_per_round": 8,
            "checkpointing_steps": 0,
            "progress": False,
        }
        config = PSOConfig(**(settings | options))
        prompts = [f"picture {i}" for i in range(8)]
        return PSOTrainer(
            config, model=model_folder, dataset=prompts, reward=lambda images, _: images.mean((1, 2, 3))
        )

    return make


def test_the_published_timesteps_by_value_and_without_the_last(online, log):
    trainer = online()
    trainer.train()
    assert trainer.transition.timesteps.tolist() == list(FOUR_STEPS)
    assert trainer.steps.tolist() == [0, 1, 2]
    assert log(trainer.folder)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    starts = [trainer.round.states[i.x[0]] for i in trainer.round.items if i.step == 0]
    others = [trainer.round.states[i.x[1]] for i in trainer.round.items if i.step == 0]
    assert not any(torch.equal(a, b) for a, b in zip(starts, others, strict=True))


def test_guidance_of_one_is_one_branch(online):
    trainer = online()
    trainer.train()
    assert trainer.guidance.uncond is None


@pytest.mark.parametrize("transition", ["renoise", "euler_ancestral"])
def test_winners_become_likelier_than_losers(online, log, transition):
    trainer = online(max_train_steps=30, inner_epochs=10, train_batch_size=8, transition=transition)
    trainer.train()
    records = log(trainer.folder)
    assert {r["round"] for r in records} == {1.0}
    assert records[0]["rewards/margins"] == 0.0
    assert records[-1]["rewards/margins"] > 0.5
    assert records[-1]["rewards/accuracies"] == 1.0


def test_a_one_step_model_has_nothing_to_learn_from(online):
    with pytest.raises(UserError, match="none of the 1 steps adds noise"):
        online(sample_steps=1).train()


@pytest.fixture
def offline(tmp_path, model_folder, pairs, shared_cache):
    def make(**options):
        settings = {
            "output_dir": str(tmp_path / "offline"),
            "cache_dir": str(shared_cache),
            "train_batch_size": 8,
            "max_train_steps": 1,
            "rank": 4,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return PSOOfflineTrainer(PSOOfflineConfig(**(settings | options)), model=model_folder, dataset=pairs)

    return make


def test_offline_trains_at_the_samplers_times_only(offline):
    trainer = offline()
    trainer.train()
    times = torch.cat([trainer.batch(step, range(8)).t for step in range(20)])
    assert set(times.tolist()) == {int(t) for t in FOUR_STEPS}


@pytest.mark.parametrize(("loss", "needs"), [("pso", True), ("pso_db", False)])
def test_only_pso_runs_a_reference(offline, log, loss, needs):
    trainer = offline(loss_type=loss, prior_weight=0.5)
    trainer.train()
    assert (trainer.adapter.reference is not None) is needs
    assert ("errors/reference_chosen" in log(trainer.folder)[0]) is needs


def test_offline_pulls_the_targets_in(offline, log):
    trainer = offline(max_train_steps=80, learning_rate=1e-2)
    trainer.train()
    errors = [r["errors/chosen"] for r in log(trainer.folder)]
    assert sum(errors[-10:]) < 0.9 * sum(errors[:10])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sigmoid"}, "loss_type must be pso or pso_db"),
        ({"negative_weight": -1.0}, "negative_weight must be 0 or more"),
        ({"timesteps": [-5.0]}, "timesteps must be times"),  # known once the model is read
    ],
)
def test_wrong_options_are_refused(offline, options, words):
    with pytest.raises(UserError, match=words):
        offline(**options).train()
