"""Self-play: pool, references, own samples and rounds; SePPO on top of them."""

import json
import math
from functools import partial

import pytest
import torch

from diffalign import losses
from diffalign.data import open_images
from diffalign.errors import UserError
from diffalign.likelihood import Errors
from diffalign.trainers import SePPOConfig, SePPOTrainer, checkpoint

SMALL = {
    "round_steps": 2,
    "sampling_steps": 2,
    "sampling_guidance_scale": 2.0,
    "train_batch_size": 4,
    "max_train_steps": 5,
}


@pytest.fixture
def seppo(run_of):
    return partial(run_of, SePPOConfig, SePPOTrainer, **SMALL)


def test_rounds_fill_the_pool_and_the_first_step_is_fine_tuning(seppo, log):
    run = seppo()
    first = first_gradient(run)
    run.train()
    pool = checkpoint.checkpoints(run.folder / "self-play" / "pool")
    assert [checkpoint.step_of(entry) for entry in pool] == [0, 1, 2]
    assert [path.name for path in (run.folder / "self-play").glob("round-*")] == ["round-2"]
    records = log(run.folder)
    ages = [record["reference_age"] for record in records]
    wanted = [k // 2 - run.reference_of(k // 2) for k in range(5)]
    assert ages == wanted
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[0]["flip_rate"] == records[0]["rewards/margins"] == 0
    assert first[0] > 0  # the good images alone give a gradient
    assert all(0 <= record["flip_rate"] <= 1 for record in records)


def first_gradient(run):
    """A list that will hold the largest element of the gradient of the run's first step."""
    seen = []
    begin = run.begin_step

    def watch(step):
        begin(step)
        if step == 0:
            losses_, _ = run.losses(0, range(4))
            grads = torch.autograd.grad(losses_.sum(), run.weights.trainable)
            seen.append(max(float(g.abs().max()) for g in grads))

    run.begin_step = watch
    return seen


def test_a_sample_has_the_caption_of_its_image_and_noise_of_its_own(seppo):
    run = seppo(max_train_steps=1, proportion_empty_prompts=0.5, learning_rate=0.0)
    run.train()
    batch = run.batch(0, range(4))
    chosen, own = batch.latents.chunk(2)
    torch.testing.assert_close(chosen, run.data.batch(batch.rows)["latents"][:, 0])
    for row, latents in zip(batch.rows, own, strict=True):
        torch.testing.assert_close(latents, run._own[run._place[row]])
    assert torch.equal(*batch.cond["prompt_embeds"].chunk(2))
    assert torch.equal(*batch.t.chunk(2))  # a common time
    assert len(batch.noise.unique(dim=0)) == 8
    assert all(label == 1 for label in run.examples.labels)


def test_samples_are_those_of_the_pipeline(seppo):
    """The same noise through the pipeline's own call, guided: latents agree."""
    from diffalign.solvers import DPMSolverPPScheduler
    from diffalign.trainers import draws

    run = seppo(max_train_steps=1, learning_rate=0.0)
    run.train()
    row = next(iter(run._place))
    pipe = run.pipeline
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(draws.number(0, "own", 0, row))
    noise = torch.randn(run._own.shape[1:], generator=generator)[None]
    drawn = pipe(
        run.data.prompts[row],
        num_inference_steps=2,
        guidance_scale=2.0,
        latents=noise,
        output_type="latent",
        height=8,
        width=8,
    ).images
    torch.testing.assert_close(drawn, run._own[run._place[row]][None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_resumed_in_the_middle_of_a_round_it_ends_with_the_same_weights(seppo, rank, log):
    whole = seppo("whole", rank=rank, max_train_steps=6, checkpointing_steps=3)
    whole.train()
    cut = seppo("cut", rank=rank, max_train_steps=3, checkpointing_steps=3)
    cut.train()
    again = seppo("cut", rank=rank, max_train_steps=6, resume_from_checkpoint="latest")
    again.train()
    for p, q in zip(whole.weights.trainable, again.weights.trainable, strict=True):
        assert torch.equal(p, q)
    volatile = ("step_seconds",)
    one, two = (
        [{k: v for k, v in r.items() if k not in volatile} for r in log(r.folder)] for r in (whole, again)
    )
    assert one == two


def test_a_round_that_was_sampled_is_not_sampled_again(seppo):
    run = seppo(max_train_steps=3, checkpointing_steps=3)
    run.train()
    again = seppo(max_train_steps=4, resume_from_checkpoint="latest")
    drawn = []
    draw = again._draw_own
    again._draw_own = lambda rows: drawn.extend(rows) or draw(rows)
    again.train()
    assert drawn == []
    assert len(again._place) == len(set(run.rows_at(range(2 * 4, 4 * 4))))


def test_a_resume_without_the_pool_is_refused(seppo, tmp_path):
    run = seppo(max_train_steps=3, checkpointing_steps=3)
    run.train()
    with pytest.raises(UserError, match="lacks the weights checkpoint-"):
        seppo("other", max_train_steps=4, resume_from_checkpoint=str(run.folder / "checkpoint-3")).train()


@pytest.mark.parametrize(("pool", "wanted"), [("latest", [0, 1, 2, 3]), ("first", [0, 0, 0, 0])])
def test_which_earlier_weights_are_the_reference(seppo, pool, wanted):
    run = seppo(reference_pool=pool)
    assert [run.reference_of(k) for k in range(4)] == wanted


def test_uniform_references_are_of_all_rounds(seppo):
    run = seppo()
    assert len({run.reference_of(number) for number in range(200)}) > 50
    assert all(run.reference_of(number) <= number for number in range(200))


def test_a_policy_equal_to_an_earlier_self_has_no_log_ratio(seppo):
    run = seppo(reference_pool="latest", max_train_steps=3)
    run.train()
    run.begin_step(4)  # a new round: the reference is the policy as it is
    ratio = run._errors(run.batch(4, range(4))).log_ratio()
    assert torch.equal(ratio, torch.zeros_like(ratio))


@pytest.mark.parametrize("flip", ["sign", "indicator", "none"])
def test_what_becomes_of_the_sample(seppo, flip):
    run = seppo(flip=flip, beta_seppo=3.0)
    errors = Errors(torch.tensor([0.2, 0.6, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.4, 0.4]))
    loss, logit = run.pair_loss(errors, None)
    chosen, rejected = torch.tensor([0.1, -0.1]), torch.tensor([-0.05, 0.05])
    s = {"sign": [1.0, -1.0], "indicator": [1.0, 0.0], "none": [1.0, 1.0]}[flip]
    torch.testing.assert_close(logit, 3 * (chosen - torch.tensor(s) * rejected))
    torch.testing.assert_close(loss, losses.sigmoid(logit, torch.zeros(2), 1.0))
    if flip == "sign":
        torch.testing.assert_close(loss, losses.seppo(chosen, rejected, 3.0))


def test_low_memory_gives_the_same_run(seppo, log):
    logs = []
    for low in (False, True):
        run = seppo(f"low{low}", low_memory=low)
        run.train()
        logs.append(log(run.folder))
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
        assert theirs["flip_rate"] == mine["flip_rate"]


def test_held_out_images_are_judged_against_the_initial_weights(seppo, log):
    run = seppo(validation_share=0.3, validation_steps=5)
    run.train()
    assert not set(run.examples.prompts) & set(run.held_out.prompts)
    wanted = run.beta * -0.5 * (run._validation_errors() - run._validation_reference).mean()
    got = log(run.folder)[-1]["validation/rewards/chosen"]
    assert got == pytest.approx(float(wanted), rel=1e-3, abs=1e-5)


def test_images_without_labels_are_good_ones_and_bad_ones_are_left_out(seppo, tmp_path, pairs):
    rows = tmp_path / "images"
    rows.mkdir()
    names = []
    for i, label in enumerate((1, 0.2, 0)):
        pairs[i].chosen.save(rows / f"{i}.png")
        names.append({"image": f"{i}.png", "prompt": "p", "label": label})
    for file, kept in (("metadata.jsonl", ("image", "prompt", "label")), ("bare.jsonl", ("image", "prompt"))):
        lines = [json.dumps({name: row[name] for name in kept}) for row in names]
        (rows / file).write_text("\n".join(lines))
    labels = []
    for name in ("metadata.jsonl", "bare.jsonl"):
        run = seppo(name, dataset=open_images(rows / name))
        run.open_data()
        labels.append(run.examples.labels)
    assert labels == [[1], [None] * 3]
    with pytest.raises(UserError, match="no good image"):
        seppo("second", dataset=open_images(rows).select([1, 2])).train()


def test_pairs_that_are_open_give_their_chosen_images(seppo, pairs):
    run = seppo(dataset=pairs)
    run.open_data()
    assert len(run.examples) == len(pairs)
    assert run.examples[3].image.tobytes() == pairs[3].chosen.tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_seppo": 0.0}, "beta_seppo must be above 0"),
        ({"flip": "coin"}, "flip must be one of sign, indicator, none"),
        ({"reference_pool": "last"}, "reference_pool must be one of uniform, latest, first"),
        ({"round_steps": 0}, "round_steps must be at least 1"),
        ({"reference_draws": 2}, "the reference changes with the rounds"),
        ({"ties": "soft"}, "only the chosen images are used"),
        ({"selection": {"min_side": 8}}, "read as single images"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(seppo, options, words):
    with pytest.raises(UserError, match=words):
        seppo(**options)
