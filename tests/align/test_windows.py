"""Long captions in windows: a short one conditions as ever, a long one is read to its end, everywhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import sample
from diffalign.data import PairDataset
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.models.windows import Windows
from diffalign.pipelines.guidance import guidance_for
from tests.align.families import build

SHORT = "a red star"  # these tokenizers know single letters, and have room for 14
TWO = "a red star under suns"
THREE = "a red star under suns and a bright moon"
FAMILIES = ("sd", "sdxl", "sdxl-refiner")


def adapter_of(name, windows=1):
    adapter = load_adapter(build(name))
    adapter.read_in_windows(windows)
    return adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_the_windows_of_a_caption_stand_one_behind_the_other(name):
    one, four = adapter_of(name), adapter_of(name, 4)
    assert four.pipeline.encode_prompt.split(THREE) == ["a red star under", "suns and a bright", "moon"]
    assert four.pipeline.encode_prompt.split(TWO) == ["a red star under", "suns"]
    alone = one.encode_prompts([SHORT, "a red star under", "suns", "suns and a bright", "moon", ""])
    states = alone["prompt_embeds"]
    got = four.encode_prompts([SHORT, TWO, THREE])
    for found, windows in zip(got["prompt_embeds"], ([0] * 4, [1, 2, 1, 2], [1, 3, 4, 5]), strict=True):
        torch.testing.assert_close(found, torch.cat([states[i] for i in windows]))
    if "pooled" in alone:
        torch.testing.assert_close(got["pooled"], alone["pooled"][[0, 1, 1]])
    assert [four.count_truncated([text]) for text in (SHORT, TWO, THREE, THREE + " at night")] == [0, 0, 0, 0]
    assert [one.count_truncated([text]) for text in (SHORT, TWO)] == [0, 1]
    four.read_in_windows(2)
    assert [four.count_truncated([text]) for text in (SHORT, TWO, THREE)] == [0, 0, 1]
    cut = four.encode_prompts([THREE])["prompt_embeds"]
    torch.testing.assert_close(cut[0], torch.cat([states[1], states[3]]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_caption_of_one_window_conditions_as_it_does_without(name):
    pipe = build(name)
    pipe.unet.double()
    adapter = load_adapter(pipe)
    x, t = (
        torch.randn(1, *adapter.latent_shape(), generator=torch.Generator().manual_seed(0)),
        torch.tensor([30]),
    )
    with torch.no_grad():
        plain = adapter.encode_prompts([SHORT])
        before = adapter.denoise(x.double(), t, plain)
        adapter.read_in_windows(3)
        windowed = adapter.encode_prompts([SHORT])
        other = adapter.denoise(x.double(), t, adapter.encode_prompts([TWO]))
        after = adapter.denoise(x.double(), t, windowed)
    assert torch.equal(
        windowed["prompt_embeds"][:, : plain["prompt_embeds"].shape[1]], plain["prompt_embeds"]
    )
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert (other - before).abs().max() > 1e-4
    adapter.read_in_windows(1)
    assert all(torch.equal(v, plain[k]) for k, v in adapter.encode_prompts([SHORT]).items())


@pytest.mark.parametrize("negative", [None, "a moon under a red star"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_pipeline_draws_under_the_same_encoding(name, negative):
    adapter = adapter_of(name, 2)
    pipe, side = adapter.pipeline, adapter.default_resolution
    call = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "height": side,
        "width": side,
    }

    def draw(**given):
        return pipe(**call, **given, generator=torch.Generator().manual_seed(0)).images

    cond = adapter.encode_prompts([TWO])
    uncond = adapter.empty_caption() if negative is None else adapter.encode_prompts([negative])
    embeds = {"prompt_embeds": cond["prompt_embeds"], "negative_prompt_embeds": uncond["prompt_embeds"]}
    if name == "sdxl":
        embeds |= {"pooled_prompt_embeds": cond["pooled"], "negative_pooled_prompt_embeds": uncond["pooled"]}
    drawn = draw(prompt=TWO, negative_prompt=negative)
    torch.testing.assert_close(drawn, draw(**embeds))
    both = draw(prompt=[TWO, TWO], negative_prompt=negative and [negative] * 2)
    assert both.shape[0] == 2
    twice = draw(prompt=TWO, negative_prompt=negative, num_images_per_prompt=2)
    torch.testing.assert_close(twice, both)
    adapter.read_in_windows(1)
    assert (draw(prompt=TWO, negative_prompt=negative) - drawn).abs().max() > 1e-4


def test_what_windows_cannot_read_is_refused():
    for name in ("sd3", "flux"):
        with pytest.raises(UserError, match=r"prompt_windows must be 1 for a .*, but is 2: windows are for"):
            adapter_of(name, 2)
    pipe = adapter_of("sdxl", 2).pipeline
    with pytest.raises(UserError, match="prompt_2 does not go with prompt_windows"):
        pipe.encode_prompt("a", prompt_2="b")
    with pytest.raises(UserError, match="2 negative prompts for 1 prompts"):
        pipe.encode_prompt("a", negative_prompt=["b", "c"])


def test_words_longer_than_a_window_are_cut_and_learnt_ones_take_what_they_stand_for():
    pipe = build("sd")
    windows = Windows(pipe, 4)
    parts = windows.split("x" * 30 + " end")
    assert "".join(parts).replace(" ", "") == "x" * 30 + "end"
    assert all(len(part.replace(" ", "")) <= 14 for part in parts)
    assert windows.split("") == [""]
    pipe.tokenizer.add_tokens(["<ring>", "<ring>_1", "<ring>_2"])  # a textual inversion of three vectors
    assert windows.split("twelve letter <ring>") == ["twelve letter", "<ring>"]
    assert windows.split("eleven let- <ring>") == ["eleven let- <ring>"]


@pytest.fixture
def long_pairs():
    def images(seed):
        numbers = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        return [Image.fromarray(n) for n in numbers]

    return PairDataset.from_lists([SHORT, TWO, THREE, "a sun"], images(0), images(1))


def test_training_and_its_pictures_read_captions_to_their_end(trainer, long_pairs, log, tmp_path):
    options = {
        "max_train_steps": 1,
        "train_batch_size": 4,
        "dataset": long_pairs,
        "proportion_empty_prompts": 0.5,
    }
    options |= {"cache_dir": str(tmp_path / "cache"), "reference_draws": 1, "validation_steps": 1}
    options |= {"validation_prompts": [TWO], "validation_inference_steps": 1}
    plain = trainer("plain", **options)
    plain.train()
    run = trainer("windows", prompt_windows=2, **options)
    run.train()
    assert (log(plain.folder)[0]["truncated_captions"], log(run.folder)[0]["truncated_captions"]) == (
        0.5,
        0.25,
    )
    wanted = run.adapter.encode_prompts([run.data.prompts[row] for row in range(4)])["prompt_embeds"]
    torch.testing.assert_close(run.data.batch(range(4))["cond"]["prompt_embeds"], wanted)
    torch.testing.assert_close(
        run.pictures._guidance.cond["prompt_embeds"], run.adapter.encode_prompts([TWO])["prompt_embeds"]
    )
    assert run.pictures._guidance.uncond["prompt_embeds"].shape == (1, 32, 32)
    stores = [folder.name.split("-")[0] for folder in (tmp_path / "cache").iterdir()]
    assert sorted(stores) == [
        "images",
        "prompts",
        "prompts",
        "reference",
        "reference",
    ]  # pixels are what they were
    assert "read_in_windows(2)" in (run.folder / "README.md").read_text()
    assert "read_in_windows" not in (plain.folder / "README.md").read_text()
    with pytest.raises(UserError, match="prompt_windows must be at least 1, but is 0"):
        trainer("none", prompt_windows=0)


def test_guidance_of_own_samples_has_one_length():
    adapter = adapter_of("sdxl", 2)
    guidance = guidance_for(adapter, [SHORT, TWO, THREE], 3.0, batch_size=1)
    assert guidance.cond["prompt_embeds"].shape == (3, 32, 64)
    x = torch.randn(3, *adapter.latent_shape())
    assert guidance.predict(adapter, x, torch.full((3,), 30), [0, 1, 2]).shape == x.shape


def test_the_command_draws_what_stands_in_later_windows(tmp_path):
    prompt = "a red star and a blue ring and a green heart"

    def drawn(name, *prompts, **options):
        config = {"prompts": list(prompts), "steps": 1, "output_dir": str(tmp_path / name), **options}
        sample.run(sample.SampleConfig(**config))
        return [
            np.asarray(Image.open(tmp_path / name / f"0000{i}.png")).astype(int) for i in range(len(prompts))
        ]

    cut = drawn("one", prompt, prompt + " below it")
    read = drawn("two", prompt, prompt + " below it", prompt_windows=2)
    assert (cut[0] == cut[1]).all()
    assert (read[0] != read[1]).any()
