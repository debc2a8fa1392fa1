"""The shipped models: what their README says holds, and diffusers and open_clip load them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, StableDiffusionPipeline

from diffalign.data import open_pairs, open_scored
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.pipelines.generate import generate
from diffalign.pipelines.load import make_scheduler
from diffalign.playground import ASSETS, few_step, load, load_scorer, model_path, sd
from diffalign.playground.captions import change_one_word, draw_captions
from diffalign.playground.pairs import Candidates, PairsConfig, draw_candidates, run
from diffalign.playground.sd import to_pixels
from diffalign.playground.verifier import accuracy
from diffalign.playground.world import render, scene
from diffalign.rewards import load_reward, score_images


@pytest.fixture(scope="module")
def pipe():
    return load()


def test_they_are_small_and_hold_no_pickles():
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".png", ".txt"}


def test_they_name_no_place_of_the_machine_that_built_them():
    for file in [*ASSETS.rglob("*config.json"), *ASSETS.rglob("model_index.json")]:
        assert "_name_or_path" not in json.loads(file.read_text()), file


@pytest.mark.parametrize("name", ["sd", "flow", "few-step"])
def test_the_folder_is_an_ordinary_pipeline(name):
    pipe = StableDiffusionPipeline.from_pretrained(model_path(name))
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.unet.config.in_channels == 4
    assert type(pipe.scheduler).__module__.startswith("diffusers.")  # needs nothing of ours


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "lowest"),
    [("sd", 20, 4.0, 0.55), ("flow", 20, 4.0, 0.5), ("few-step", 4, 1.0, 0.4)],
)
def test_a_model_is_as_good_as_stated_and_not_perfect(name, steps, guidance, lowest):
    stated = json.loads((model_path(name) / "facts.json").read_text())["true"]
    assert lowest <= stated <= 0.75
    captions = draw_captions(77, 60, held_out=True)
    drawn = generate(load(name), captions, range(60), steps=steps, guidance=guidance, batch_size=30)
    # Four standard errors of 60 captions around the stated accuracy.
    assert abs(accuracy(captions, drawn.images)["true"] - stated) < 4 * (stated * (1 - stated) / 60) ** 0.5


def test_the_flow_model_is_a_flow_to_the_family_adapter():
    adapter = load_adapter(model_path("flow"))
    assert adapter.schedule.is_flow
    scenes = [scene(321, i) for i in range(32)]
    x0 = adapter.encode_images(to_pixels(np.stack([render(s) for s in scenes])))["latents"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = adapter.denoise(
            (x0 + noise) / 2, torch.full((32,), 500.0), adapter.encode_prompts([s.caption for s in scenes])
        )
    error = (v - (noise - x0)).square().mean()
    assert error < 0.1  # of a variance of 2


def test_our_solvers_take_the_flow_model():
    captions = draw_captions(78, 24, held_out=True)
    pipe = load("flow")
    ours = make_scheduler("dpm-solver++", pipe.scheduler.config)
    drawn = generate(pipe, captions, range(24), steps=12, scheduler=ours, batch_size=24)
    assert accuracy(captions, drawn.images)["true"] > 0.3


@pytest.mark.parametrize(("steps", "times"), [(1, [999]), (2, [999, 499]), (4, list(few_step.TIMES))])
def test_the_few_step_model_is_asked_at_the_times_it_was_taught(steps, times):
    scheduler = LCMScheduler.from_pretrained(model_path("few-step"), subfolder="scheduler")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times


def test_the_scorer_prefers_true_captions():
    scorer, rng = load_scorer(), np.random.default_rng(0)
    scenes = [scene(123, i) for i in range(200)]
    images = np.stack([render(s) for s in scenes])
    true = score_images(scorer, images, [s.caption for s in scenes])
    false = score_images(scorer, images, [str(change_one_word(s.claim, rng)) for s in scenes])
    assert (true > false).mean() > 0.85


def test_the_scorer_is_differentiable_in_the_pixels():
    scorer = load_scorer()
    pixels = torch.rand(2, 3, 96, 96, requires_grad=True)  # another size than its own
    scorer.score(pixels, ["a red star", "two blue rings"]).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    with pytest.raises(UserError, match="1 prompts for 2 images"):
        scorer.score(pixels, ["a red star"])


def test_candidates_pair_the_best_with_the_worst(pipe):
    drawn = draw_candidates(pipe, load_scorer(), ["a red star", "two blue rings"], images=3, steps=4, seed=5)
    again = draw_candidates(
        pipe, load_scorer(), ["a red star", "two blue rings"], images=3, steps=4, seed=5, batch_size=2
    )
    assert drawn.images.shape == (2, 3, 64, 64, 3)
    assert np.abs(drawn.images.astype(int) - again.images).max() <= 2  # no image depends on its batch
    scores = np.array([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]], np.float32)
    assert Candidates(drawn.captions, drawn.images, scores).pairs(1.0) == [(0, 1, 0)]
    assert Candidates(drawn.captions, drawn.images, scores).pairs(5.0) == []


def test_all_candidates_are_written_as_lists_on_request(tmp_path, capsys):
    options = {"prompts": 2, "images": 3, "steps": 1, "margin": 0.0}
    pairs = open_pairs(run(PairsConfig(output_dir=str(tmp_path / "pairs"), **options)))
    folder = run(PairsConfig(output_dir=str(tmp_path / "lists"), lists=True, **options))
    assert "wrote 2 lists of 2 captions" in capsys.readouterr().out
    scored = open_scored(folder)
    assert scored.prompts == [pair.prompt for pair in pairs for _ in range(3)]
    for pair, listed in zip(pairs, open_pairs(folder), strict=True):  # of which the best and the worst
        assert (listed.prompt, listed.images) == (pair.prompt, pair.images)
        assert listed.scores[0] > listed.scores[1]
    with pytest.raises(UserError, match="lists' is not empty"):
        run(PairsConfig(output_dir=str(folder), lists=True, **options))
    with pytest.raises(UserError, match="no two scores differ by 1000"):
        run(PairsConfig(output_dir=str(tmp_path / "none"), lists=True, **options | {"margin": 1000.0}))


def test_unknown_models_are_named():
    with pytest.raises(UserError, match="did you mean 'playground/sd'"):
        model_path("playground/sdd")
    with pytest.raises(UserError, match="no CLIP model at"):
        load_reward("pickscore", ASSETS / "sd")


def test_our_scheduler_takes_over_the_pipelines_config(pipe):
    scheduler = make_scheduler("dpm-solver++", pipe.scheduler.config)
    assert scheduler.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", ["sd", "few-step"])
@pytest.mark.parametrize("theirs", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_schedulers_made_from_the_config_do_not_clip_latents(name, theirs):
    path = model_path(name) / "scheduler" / "scheduler_config.json"
    scheduler = theirs.from_config(json.loads(path.read_text()))
    scheduler.set_timesteps(4)
    x, beyond = torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 8), -3.0)
    found = scheduler.step(beyond, scheduler.timesteps[0], x)
    clean = found.denoised if theirs is LCMScheduler else found.pred_original_sample
    assert clean.abs().min() > 1


def test_the_scheduler_of_the_shipped_folder_is_the_one_that_is_built(tmp_path):
    sd.make_scheduler().save_pretrained(tmp_path)
    shipped = model_path("sd") / "scheduler" / "scheduler_config.json"
    assert json.loads((tmp_path / shipped.name).read_text()) == json.loads(shipped.read_text())
