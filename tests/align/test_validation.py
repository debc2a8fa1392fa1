"""Validation: the same pairs, times and noise every time; pictures; what the run gives away."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data import write_pairs
from diffalign.errors import UserError
from diffalign.trainers import DiffusionDPOTrainer, curves, validation
from tests.align.families import build


def test_accuracy_and_margin_of_held_out_pairs_are_logged(trainer, log):
    run = trainer(validation_share=0.3, validation_steps=2, max_train_steps=5)
    run.train()
    records = log(run.folder)
    assert [r["step"] for r in records if "validation/rewards/accuracies" in r] == [2, 4, 5]
    assert len(records[1]["validation/accuracies_by_time"]) == len(validation.TIMES)
    assert not set(run.pairs.prompts) & set(run.held_out.prompts)
    assert run.data_length + len(run.held_out) == 16


def test_an_untouched_policy_is_undecided(trainer, log):
    run = trainer(validation_share=0.3, validation_steps=1, max_train_steps=1, learning_rate=0.0)
    run.train()
    record = log(run.folder)[0]
    assert record["validation/rewards/accuracies"] == 0.5
    assert record["validation/accuracies_by_pair"] == 0.5
    assert record["validation/rewards/margins"] == 0.0


def test_the_same_weights_get_the_same_numbers_at_any_step_and_batch(trainer, log):
    seen = []
    for name, batch in (("a", 8), ("b", 2)):
        run = trainer(
            name,
            validation_share=0.3,
            validation_steps=1,
            max_train_steps=2,
            learning_rate=0.0,
            train_batch_size=batch,
            loss_type="simpo",
            loss_options={"gamma": 0.0},
        )
        run.train()
        seen += [r["validation/rewards/chosen"] for r in log(run.folder)]
    assert seen[0] == seen[1]
    assert seen[2] == pytest.approx(seen[0], rel=1e-4)


def test_training_on_pairs_is_seen_on_them(trainer, log, pairs_folder):
    run = trainer(
        validation_dataset=str(pairs_folder),
        validation_steps=30,
        max_train_steps=60,
        train_batch_size=16,
        learning_rate=1e-2,
        rank=0,
    )
    run.train()
    values = [r["validation/accuracies_by_pair"] for r in log(run.folder) if r["step"] % 30 == 0]
    assert values[-1] > 0.7


def test_summary_by_hand():
    policy = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[3.0, 1.0], [3.0, 2.5]]])
    values = validation.summary(policy, torch.full_like(policy, 2.0), beta=10.0)
    assert values["validation/rewards/accuracies"] == pytest.approx((1 + 0.5) / 4)
    assert values["validation/accuracies_by_pair"] == 0.5
    assert values["validation/accuracies_by_time"] == [0.5, 0.25]
    assert values["validation/rewards/margins"] == pytest.approx(5.0 * (2 + 0 - 2 - 0.5) / 4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_pictures_are_drawn_and_follow_the_weights(family, trainer):
    run = trainer(
        family,
        model=build(family),
        validation_prompts=["a star", "two rings"],
        validation_steps=2,
        validation_inference_steps=3,
        validation_guidance_scale=2.0,
        max_train_steps=4,
        learning_rate=0.1,
    )
    run.train()
    paths = sorted((run.folder / "validation").glob("*.png"))
    assert [p.name for p in paths] == ["step-000002.png", "step-000004.png"]
    first, last = (np.asarray(Image.open(p)) for p in paths)
    side = run.adapter.default_resolution
    assert first.shape[0] >= side
    assert first.shape[1] >= 2 * side
    assert (first != last).any()
    assert "validation/step-000004.png" in (run.folder / "README.md").read_text()


def test_pictures_are_those_of_the_pipeline(tmp_path):
    """The same noise through diffusers' own loop gives the same image."""
    from diffalign.models import load_adapter
    from diffalign.solvers import DPMSolverPPScheduler
    from diffalign.trainers import draws

    pipe = build("sd")
    adapter = load_adapter(pipe)
    drawn = validation.Pictures(adapter, ["a star"], guidance_scale=3.0, steps=4, seed=5).draw()[0]
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    shape = (1, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(draws.number(5, "picture", 0)))
    theirs = pipe("a star", num_inference_steps=4, guidance_scale=3.0, latents=noise).images[0]
    difference = np.asarray(drawn).astype(int) - np.asarray(theirs).astype(int)
    assert np.abs(difference).max() <= 1


def test_validation_does_not_change_the_run(trainer):
    plain, watched = (
        trainer(name, max_train_steps=3, use_ema=True, ema_decay=0.5, **options)
        for name, options in (
            ("plain", {}),
            (
                "watched",
                {"validation_steps": 1, "validation_prompts": ["a"], "validation_inference_steps": 1},
            ),
        )
    )
    plain.train()
    watched.train()
    for p, q in zip(plain.weights.trainable, watched.weights.trainable, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_prompts": ["a"]}, "drawn every validation_steps steps"),
        ({"validation_share": 0.2}, "judged every validation_steps steps"),
        ({"validation_share": 1.5, "validation_steps": 1}, "validation_share must be"),
        ({"validation_share": 0.1, "validation_dataset": "x", "validation_steps": 1}, "not both"),
        ({"push_to_hub": "mine"}, "hub id such as owner/name"),
        ({"push_to_hub": "a/b", "report_to": "wandb"}, "publish the run's options"),
    ],
)
def test_bad_options(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options)


def test_a_share_that_leaves_nothing_is_refused(trainer):
    with pytest.raises(UserError, match="choose another share"):
        trainer(validation_share=1e-9, validation_steps=1).train()


def test_the_result_is_uploaded_without_checkpoints(trainer, monkeypatch):
    import huggingface_hub

    calls = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **k: calls.update(repo=name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.update(k))
    run = trainer(push_to_hub="me/aligned", max_train_steps=1, checkpointing_steps=1)
    run.train()
    assert calls["repo"] == "me/aligned"
    assert calls["folder_path"] == run.folder
    assert "checkpoint-*" in calls["ignore_patterns"]


def test_a_refused_upload_leaves_the_result(trainer, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no token")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    run = trainer(push_to_hub="me/aligned", max_train_steps=1)
    with pytest.raises(UserError, match="could not be uploaded to me/aligned: no token"):
        run.train()
    assert (run.folder / "pytorch_lora_weights.safetensors").is_file()


def test_a_share_is_of_prompts_on_disk_too(trainer, pairs, tmp_path, log):
    folder = write_pairs(tmp_path / "pairs", [pairs[i] for i in range(16)])
    run = trainer(dataset=str(folder), validation_share=0.3, validation_steps=1, max_train_steps=1)
    run.train()
    assert json.dumps(log(run.folder)[0])
    assert run.held_out is not None


def test_curves_are_drawn_with_and_without_held_out_pairs(trainer, tmp_path, with_curves):
    run = trainer(validation_share=0.3, validation_steps=2, max_train_steps=6)
    run.train()
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.width > 3 * picture.height  # four panels
    assert "curves.png" in (run.folder / "README.md").read_text()
    assert curves.draw([{"step": 1, "loss": 1.0}], tmp_path / "none.png") is None
    one = [{"step": k, "loss": 1.0 / k, "alarms": ["saturated"] if k == 3 else []} for k in (1, 2, 3)]
    with Image.open(curves.draw(one, tmp_path / "loss.png")) as picture:
        assert picture.width < 2 * picture.height  # one panel


def test_running_mean_keeps_a_line_straight_inside():
    line = np.arange(100.0)
    assert np.allclose(curves._running_mean(line)[5:-5], line[5:-5])


def test_a_run_that_gets_no_better_ends_and_resumes_to_the_same_end(trainer, log, monkeypatch, caplog):
    told = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    monkeypatch.setattr(
        DiffusionDPOTrainer, "validation_metrics", lambda self, errors: {self.watched: next(told)}
    )
    options = {"validation_share": 0.3, "validation_steps": 2, "max_train_steps": 20, "patience": 2}
    result = trainer(**options, checkpointing_steps=6).train()
    assert result.global_step == 8
    assert [r["step"] for r in log(result.output_dir)] == list(range(1, 9))
    assert "has not risen above 0.7 for 2 validations" in caplog.text
    told = iter([0.65])
    assert trainer(**options, resume_from_checkpoint="latest").train().global_step == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [({"patience": 2}, "give validation_share"), ({"patience": -1}, "patience must be 0 or more")],
    ids=str,
)
def test_patience_needs_held_out_data(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options)
