"""The trainer of the step-aware preference model: what it shows the model, what it learns, what it leaves."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffalign.data import PairDataset
from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.preference import soft_cross_entropy
from diffalign.trainers.step_aware import StepAwareConfig, StepAwareTrainer
from tests.align.test_distributed import processes


def grey(level: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 21, (8, 8, 3))
    return Image.fromarray((level + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def bright_pairs():
    """The brighter image is the better one; one pair in five is a tie."""
    tie = [i % 5 == 4 for i in range(20)]
    return PairDataset.from_lists(
        [f"a red star {i % 4}" for i in range(20)],
        [grey(120 if t else 200, i) for i, t in enumerate(tie)],
        [grey(120 if t else 50, 100 + i) for i, t in enumerate(tie)],
        preferences=[0.5 if t else 1.0 for t in tie],
        ties="soft",
    )


@pytest.fixture
def train(tmp_path, model_folder, bright_pairs):
    def make(name="run", **options):
        settings = {
            "output_dir": str(tmp_path / name),
            # Its own: embeddings that others encoded in other batches differ in their last bits, and Adam's
            # first step makes much of them.
            "cache_dir": str(tmp_path / "cache"),
            "reward_model": "playground/scorer",
            "train_batch_size": 5,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return StepAwareTrainer(
            StepAwareConfig(**(settings | options)), model=model_folder, dataset=bright_pairs
        )

    return make


def test_it_learns_at_every_time_and_gives_a_reward_folder(train, model_folder, log):
    before = StableDiffusionPipeline.from_pretrained(model_folder).unet.state_dict()
    # Times at which the tiny model, which knows nothing, leaves the images as they are.
    run = train(
        max_train_steps=60,
        learning_rate=3e-4,
        validation_steps=60,
        validation_share=0.25,
        guidance_scale=1.0,
        timesteps=[1, 20],
    )
    result = run.train()
    losses = [record["loss"] for record in log(run.folder)]
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    at = {t: result.metrics[f"validation/accuracy_t{t}"] for t in (0, 251, 501, 701, 951)}
    assert at[0] == 1.0
    assert result.metrics["validation/rewards/accuracies"] == pytest.approx(np.mean(list(at.values())))

    for name, value in run.pipeline.unet.state_dict().items():
        assert torch.equal(value, before[name])  # the generator has not moved
    reward = load_reward("step-aware", run.folder)
    pixels = torch.stack([torch.full((3, 8, 8), level) for level in (0.8, 0.2)])
    light, dark = reward.score(pixels, ["a red star 1"] * 2, 0)
    assert light > dark + 1
    assert torch.equal(reward.score(pixels, ["a"] * 2, 700), run.reward.score(pixels, ["a"] * 2, 700))
    assert not any(p.requires_grad for p in run.reward.parameters())
    assert 'load_reward("step-aware", ".")' in (run.folder / "README.md").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(train):
    whole = train("whole", max_train_steps=4)
    whole.train()
    half = train("half", max_train_steps=2, checkpointing_steps=2)
    half.train()
    rest = train("half", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    rest.train()
    for name, value in whole.reward.state_dict().items():
        assert torch.equal(rest.reward.state_dict()[name], value), name


def test_the_model_sees_the_guided_prediction_of_the_noisy_images(train):
    run = train(guidance_scale=3.0, max_train_steps=1)
    run.train()
    batch = run.batch(0, range(5))
    assert torch.equal(batch.noise[:5], batch.noise[5:])
    assert torch.equal(batch.t[:5], batch.t[5:])
    alpha, sigma = (
        torch.as_tensor(v).float()[:, None, None, None]
        for v in run.adapter.schedule.alpha_sigma(batch.t.numpy())
    )
    x_t = alpha * batch.latents + sigma * batch.noise
    empty = {name: value.expand(10, *value.shape[1:]) for name, value in run.adapter.empty_caption().items()}
    with torch.no_grad():
        cond, uncond = (run.adapter.denoise(x_t, batch.t, c) for c in (batch.cond, empty))
    eps = uncond + 3.0 * (cond - uncond)
    torch.testing.assert_close(run.predicted(batch), (x_t - sigma * eps) / alpha, rtol=1e-3, atol=1e-3)


def test_two_processes_give_the_result_of_one(train, tmp_path, log):
    options = {"validation_steps": 2, "validation_share": 0.25, "learning_rate": 1e-6}
    one = train("one", train_batch_size=4, **options)
    one.train()
    processes(2, lambda rank: train("two", train_batch_size=2, **options).train(), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    for alone, shared in zip(log(one.folder), log(tmp_path / "two"), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-3)
    assert alone["validation/rewards/accuracies"] == pytest.approx(shared["validation/rewards/accuracies"])


def test_ties_pull_scores_together_and_prompts_count_alike(train):
    run = train(max_train_steps=1)
    run.train()
    assert run.data.weight.mean() == pytest.approx(1)
    assert set(run.data.weight.tolist()) == {1.0}  # five pairs of each of four prompts
    tied = torch.tensor([run.data.preference[row] == 0.5 for row in range(20)])
    assert tied.sum() == 4
    rows = list(range(20))
    batch = run._assemble(run.data.batch(rows), [run._validation_draw(row, 0) for row in rows], rows)
    run.reward.requires_grad_(True)
    chosen, rejected = run._scores(batch, run.data.prompts)
    losses = soft_cross_entropy(chosen, rejected, batch.preference)
    slope = torch.autograd.grad(losses.sum(), (chosen, rejected))[0]
    assert torch.equal(slope[tied] > 0, (chosen > rejected)[tied])  # the higher one is pulled down
    assert (slope[~tied] < 0).all()  # the chosen one up, always


def test_recomputing_activations_changes_nothing(train):
    plain, recomputed = train("a"), train("b", gradient_checkpointing=True)
    losses = [run.train().metrics["loss"] for run in (plain, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_model": ""}, "reward_model must be a folder or hub id"),
        ({"rank": 4}, "rank must be 0"),
        ({"low_memory": True}, "low_memory must be false"),
        ({"evaluation_timesteps": []}, "evaluation_timesteps must be times from 0 on"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"validation_prompts": ["a"], "validation_steps": 1}, "validation_prompts must be empty"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        StepAwareConfig(**({"reward_model": "playground/scorer"} | options)).check()


def test_a_model_that_is_none_is_refused_before_the_data_is_encoded(train, tmp_path):
    run = train(reward_model=str(tmp_path))
    with pytest.raises(UserError, match="reward step-aware: no CLIP model at"):
        run.train()
    assert not hasattr(run, "data")
