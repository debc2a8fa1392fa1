"""Training the playground models: resumable, and what they write loads as what it claims to be."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from diffalign.errors import RunFailed, UserError
from diffalign.playground import scorer
from diffalign.playground.build import BuildConfig, run
from diffalign.playground.captions import all_captions, change_one_word
from diffalign.playground.fit import fit
from diffalign.playground.sd import make_tokenizer, tokenize
from diffalign.playground.verifier import verify
from diffalign.rewards import load_reward, score_images


def fit_line(folder, stop_at=None, bad_at=None, steps=30):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        error = (model(x)[:, 0] - x.sum(1)).square().mean()
        return error * float("nan") if step == bad_at else error

    fit(
        "line",
        folder,
        {"model": model},
        loss,
        steps=steps,
        learning_rate=0.1,
        seed=0,
        ema_decay=0.9,
        save_every=5,
    )
    return model


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "stopped", stop_at=17)
    resumed = fit_line(tmp_path / "stopped")
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_step(tmp_path):
    with pytest.raises(RunFailed, match="step 12"):
        fit_line(tmp_path, bad_at=12)
    with safe_open(tmp_path / "line.safetensors", "pt") as saved:
        assert saved.metadata()["step"] == "10"


def test_the_tokenizer_gives_every_word_of_the_captions_one_token(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    captions = all_captions()[::7]
    ids = tokenize(tokenizer, captions)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    assert ends.tolist() == [len(c.split()) + 1 for c in captions]
    assert tokenizer.decode(ids[5], skip_special_tokens=True).strip() == captions[5]
    unknown = tokenize(tokenizer, ["a zebra"])
    assert (unknown[0, 1:7] != tokenizer.eos_token_id).all()  # letters, not nothing


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    config = BuildConfig("sd", output_dir=str(folder), images=64, vae_steps=3, steps=3, eval_prompts=4)
    return folder, config, run(config)


def test_build_writes_an_ordinary_pipeline_of_fp16_safetensors(built):
    folder, _, facts = built
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd")
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    with safe_open(folder / "sd/unet/diffusion_pytorch_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert not list((folder / "sd").rglob("*.bin"))
    text = (folder / "sd/README.md").read_text()
    assert "--seed 0" in text
    assert f"{facts['true']:.1%}" in text
    image = pipe("a red star", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_latents_have_mean_0_and_variance_1(built):
    from diffalign.playground.sd import draw_images, encode

    folder, _, _ = built
    vae = StableDiffusionPipeline.from_pretrained(folder / "sd").vae
    latents = encode(vae, draw_images(0, 64)[1])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.02)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.02)


def test_build_refuses_a_used_folder_and_other_options_on_resume(built):
    folder, config, facts = built
    with pytest.raises(UserError, match="not empty"):
        run(config)
    with pytest.raises(UserError, match="its own options"):
        run(BuildConfig(**{**vars(config), "resume": True, "steps": 4}))
    with pytest.raises(UserError, match="nothing to resume"):
        run(BuildConfig("sd", output_dir=str(folder / "other"), resume=True))
    again = run(BuildConfig(**{**vars(config), "resume": True}))
    assert again["vae_psnr_db"] == facts["vae_psnr_db"]


def test_scorer_is_built_and_loads_as_an_open_clip_folder(tmp_path):
    facts = run(BuildConfig(what="scorer", output_dir=str(tmp_path), images=64, steps=2))
    assert 0 <= facts["captions"] <= 1
    reward = load_reward("pickscore", tmp_path / "scorer")
    images = np.zeros((3, 64, 64, 3), np.uint8)
    assert score_images(reward, images, ["a red star"] * 3).shape == (3,)
    assert json.loads((tmp_path / "scorer/facts.json").read_text())["images"] == facts["images"]


def test_truth_of_a_batch_is_the_verifiers():
    rng = np.random.default_rng(0)
    examples = scorer.draw_examples(5, 60)
    claims = [e.claim for e in examples] + [change_one_word(e.claim, rng) for e in examples]
    table = scorer.truth(claims, examples)
    one_by_one = [[verify(str(c), e.image).true for c in claims] for e in examples]
    assert (table == np.array(one_by_one)).all()
    assert 0.2 < np.mean(np.diag(table[:, :60])) < 0.9
