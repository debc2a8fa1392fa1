"""The interface itself and the short rewards: brightness (here only), aesthetic, JPEG, the playground's."""

import io
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.playground.captions import change_one_word
from diffalign.playground.verifier import verify
from diffalign.playground.world import render, scene
from diffalign.rewards import REWARDS, Reward, load_reward, score_images

from .conftest import PROMPTS


class Brightness(Reward):
    """Mean of all pixels."""

    def __init__(self):
        super().__init__("brightness")

    def rewards(self, images, prompts):
        return images.mean((1, 2, 3))


class Constant(Reward):
    """Whatever it is told."""

    def __init__(self, scores):
        super().__init__("constant")
        self.scores = scores

    def rewards(self, images, prompts):
        return self.scores


# ------------------------------------------------------------------------------------------ interface


def test_scores_are_float32_and_differentiable():
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    scores = Brightness().score(images, ["a", "b"])
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 105))


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 5, 7), ["a"], r"\(B, 3, H, W\) of floating point.*got \(3, 5, 7\) float32"),
        (torch.rand(1, 4, 5, 7), ["a"], r"got \(1, 4, 5, 7\)"),
        (torch.zeros(1, 3, 5, 7, dtype=torch.uint8), ["a"], "got .* uint8"),
        (torch.rand(2, 3, 5, 7), ["a"], "got 1 prompts for 2 images"),
        (torch.rand(2, 3, 5, 7), "ab", "got 1 prompts for 2 images"),
        (torch.rand(1, 3, 5, 7) * 2 - 1, ["a"], r"images in \[0, 1\], but got values from -.*x / 2 \+ 0.5"),
        (torch.full((1, 3, 5, 7), float("nan")), ["a"], "got values from nan to nan"),
    ],
)
def test_bad_input_is_refused_with_the_rewards_name(images, prompts, message):
    with pytest.raises(UserError, match=f"reward brightness .*{message}"):
        Brightness().score(images, prompts)


def test_bad_scores_are_refused_with_the_prompt():
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(UserError, match="reward constant gave nan for the prompt 'b'"):
        Constant(torch.tensor([1.0, float("nan")])).score(images, ["a", "b"])
    with pytest.raises(UserError, match=r"reward constant gave \(2, 1\) scores for 2 images"):
        Constant(torch.ones(2, 1)).score(images, ["a", "b"])


def test_no_reward_leaves_eval_mode():
    reward = Brightness()
    reward.dropout = nn.Dropout(0.9)
    assert not nn.Sequential(reward).train()[0].dropout.training


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(UserError, match="got 1 prompts for 2 images"):
        score_images(Brightness(), np.zeros((2, 8, 8, 3), np.uint8), ["a"])
    assert score_images(Brightness(), [], []).shape == (0,)


# ------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", REWARDS)
def test_every_row_says_what_it_needs_or_loads(name):
    try:
        reward = load_reward(name)
    except UserError as error:
        assert f"reward {name}" in str(error)  # noqa: PT017
        assert "needs weights" in str(error)  # noqa: PT017
    else:
        assert reward.name == name
        assert isinstance(reward.differentiable, bool)


def test_names_paths_and_options_are_checked(tmp_path):
    with pytest.raises(UserError, match="no reward 'pick-score'; did you mean 'pickscore'"):
        load_reward("pick-score")
    with pytest.raises(UserError, match="preprocess must be one of tensor, pil"):
        load_reward("pickscore", tmp_path, preprocess="cv2")
    with pytest.raises(UserError, match="reward playground/verifier has no option 'path'"):
        load_reward("playground/verifier", tmp_path)
    with pytest.raises(
        UserError, match=r"reward clip has no option 'scale' \(its options: path, preprocess\)"
    ):
        load_reward("clip", tmp_path, scale=3)
    with pytest.raises(UserError, match="reward clip: nothing is at /no/such"):
        load_reward("clip", "/no/such")


REPOSITORY = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "preprocessor_config.json",
    "merges.txt",
    "pytorch_model.bin",
    "tf_model.h5",
    "README.md",
    "flax_model.msgpack",
]


def test_the_hub_is_asked_for_ids_only_and_for_few_files(monkeypatch, clip_folder, pictures):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(clip_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_reward("pickscore", str(clip_folder))
    assert not asked
    reward = load_reward("pickscore", "yuvalkirstain/PickScore_v1")
    assert asked[0][0] == "yuvalkirstain/PickScore_v1"
    fetched = [f for f in REPOSITORY if any(fnmatch(f, pattern) for pattern in asked[0][1])]
    assert fetched == REPOSITORY[:5]
    assert reward.score(pictures(1), ["a"]).shape == (1,)

    def fail(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"owner/name is no folder here.*\(offline\)"):
        load_reward("pickscore", "owner/name")


CLIP_FILES = ["config.json", "model.safetensors"]
PUBLISHED = {
    "pickscore": CLIP_FILES,
    "clip": CLIP_FILES,
    "step-aware": [*CLIP_FILES, "step_aware.safetensors"],
    "multi-head": [*CLIP_FILES, "heads.json", "heads.safetensors"],
    "hpsv2": ["HPS_v2.1_compressed.pt"],
    "aesthetic": ["sac+logos+ava1-l14-linearMSE.pth"],
    "image-reward": ["ImageReward.pt"],
}


def test_every_reward_with_weights_comes_from_the_hub_with_its_files(monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert PUBLISHED.keys() == {name for name in REWARDS if not name.startswith(("jpeg", "playground"))}
    for name, files in PUBLISHED.items():
        with pytest.raises(UserError, match=rf"reward {name}: owner/{name} is no folder here.*\(offline\)"):
            load_reward(name, f"owner/{name}")
        patterns = asked[f"owner/{name}"]
        assert [f for f in files if any(fnmatch(f, p) for p in patterns)] == files, name


# ------------------------------------------------------------------------------------------ aesthetic


def predictor(width=16):
    """The published chain: linear layers and dropout, nothing else."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(width, 12),
        nn.Dropout(0.2),
        nn.Linear(12, 8),
        nn.Dropout(0.2),
        nn.Linear(8, 6),
        nn.Dropout(0.1),
        nn.Linear(6, 4),
        nn.Linear(4, 1),
    ).eval()


def test_aesthetic_is_the_chain_of_layers_folded(clip_folder, tmp_path, pictures):
    chain = predictor()
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({f"layers.{name}": value for name, value in chain.state_dict().items()}, file)
    images = pictures(3, 32, 35)
    reward = load_reward("aesthetic", tmp_path, clip=str(clip_folder))
    with torch.no_grad():
        seen = reward.clip.images(CenterCrop(32)(images))
        wanted = chain(seen)[:, 0]
    torch.testing.assert_close(reward.score(images, PROMPTS), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(reward.score(images, ["", "x", "y"]), reward.score(images, PROMPTS))
    images.requires_grad_()
    reward.score(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0
    pil = load_reward("aesthetic", file, clip=str(clip_folder), preprocess="pil")
    assert not pil.differentiable
    near = pil.score(images.detach(), PROMPTS) - reward.score(images.detach(), PROMPTS)
    assert near.abs().max() < 0.1


def test_aesthetic_refuses_what_does_not_fit(clip_folder, tmp_path):
    file = tmp_path / "aesthetic-model.pth"
    torch.save({f"layers.{n}": v for n, v in predictor(20).state_dict().items()}, file)
    with pytest.raises(UserError, match="give the option clip"):
        load_reward("aesthetic", file)
    with pytest.raises(UserError, match=r"maps 20 numbers to 1, but .* gives 16"):
        load_reward("aesthetic", file, clip=str(clip_folder))
    torch.save({"x": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"has no chain of layers"):
        load_reward("aesthetic", file, clip=str(clip_folder))


# ------------------------------------------------------------------------------------------ JPEG


def test_jpeg_size_is_that_of_the_file(pictures):
    images = torch.cat([pictures(1), torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))])
    sizes = []
    for image in images:
        stream = io.BytesIO()
        array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(stream, "JPEG", quality=95)
        sizes.append(len(stream.getvalue()) / 1000)
    assert sizes[1] > 2 * sizes[0]
    small, large = (load_reward(f"jpeg-{way}compressibility") for way in ("", "in"))
    assert large.score(images, ["", ""]).tolist() == pytest.approx(sizes)
    assert torch.equal(small.score(images, ["", ""]), -large.score(images, ["", ""]))


@pytest.mark.parametrize("name", ["jpeg-compressibility", "playground/verifier"])
def test_who_has_no_gradient_says_so(name):
    reward = load_reward(name)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    with pytest.raises(UserError, match=f"reward {name} has no gradient to the images"):
        reward.score(images, ["a red star"])
    with torch.no_grad():
        assert reward.score(images, ["a red star"]).shape == (1,)


# ------------------------------------------------------------------------------------------ playground


def test_the_verifier_is_the_oracle():
    rng = np.random.default_rng(0)
    scenes = [scene(3, i) for i in range(20)]
    images = [render(s) for s in scenes] * 2
    captions = [s.caption for s in scenes] + [str(change_one_word(s.claim, rng)) for s in scenes]
    scores = score_images(load_reward("playground/verifier"), images, captions)
    assert scores.tolist() == [verify(c, i).true for c, i in zip(captions, images, strict=True)]
    assert scores[:20].mean() > 0.9
    assert scores[20:].mean() == 0
    with pytest.raises(UserError, match="judges images of 64 x 64 pixels"):
        load_reward("playground/verifier").score(torch.rand(1, 3, 32, 32), ["a red star"])


# ------------------------------------------------------------------------------------------ the manual


def test_the_manuals_own_reward_and_ensemble_work():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    space = {"load_rewards": rewards.load_rewards, "Entry": rewards.Entry, "REWARDS": {}}
    exec(next(block for block in code if "class Contrast" in block), space)
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(space["Contrast"]().score(images, ["", ""]), images.mean(1).flatten(1).std(1))
    exec(next(block for block in code if 'REWARDS["contrast"]' in block), space)
    assert space["REWARDS"]["contrast"].loader == "contrast:Contrast"
    exec(next(block for block in code if "rejected_score" in block), space)
    clean = scene(3, 0)
    picture = torch.from_numpy(render(clean)).permute(2, 0, 1)[None].float() / 255
    scores = space["both"].score(picture.repeat(2, 1, 1, 1), [clean.caption, "a red star"])
    assert scores[0] > -10
    assert scores[1] == -10
