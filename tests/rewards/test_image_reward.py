"""ImageReward: the mapped BLIP against one written down once more, on the same random weights."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD

from .conftest import PROMPTS
from .plain_blip import PlainImageReward

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "two", "blue", "rings", "on"]


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(5)
    model = PlainImageReward().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms, which start at 0 and 1
    return model


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    state = plain.state_dict() | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def words(prompts):
    """Ids and mask (B, 35) by hand."""
    ids = torch.zeros(len(prompts), 35, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        known = [VOCABULARY.index(w) if w in VOCABULARY else 1 for w in prompt.split()][:33]
        row[: len(known) + 2] = torch.tensor([2, *known, 3])
    return ids, (ids != 0).long()


def test_the_score_is_that_of_the_plain_network(plain, folder, pictures):
    images = pictures(3, 32, 35)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    normalised = (CenterCrop(32)(images) - mean) / std
    prompts = [*PROMPTS[:2], "a " * 50]  # padded, with unknown words, and cut
    with torch.no_grad():
        wanted = plain(normalised, *words(prompts))
    assert wanted.std() > 0.02
    for path in (folder, folder / "ImageReward.pt"):
        scores = load_reward("image-reward", path).score(images, prompts)
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)


def test_both_prompt_and_image_count(folder, pictures):
    reward = load_reward("image-reward", folder)
    images = pictures(2)
    same_image = reward.score(images[:1].expand(2, -1, -1, -1), ["a red star", "two blue rings"])
    same_prompt = reward.score(images, ["a red star"] * 2)
    assert abs(same_image[0] - same_image[1]) > 1e-3
    assert abs(same_prompt[0] - same_prompt[1]) > 1e-3


def test_gradient_and_recomputing_give_the_same(folder, pictures):
    reward = load_reward("image-reward", folder)
    images = pictures(2, 40, 50).requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    plain = images.grad.clone()
    assert plain.abs().sum() > 0
    images.grad = None
    reward.enable_gradient_checkpointing()
    reward.score(images, PROMPTS[:2]).sum().backward()
    torch.testing.assert_close(images.grad, plain)


def test_pil_is_near_the_tensor_path(folder, pictures):
    images = pictures(3, 60, 44)
    near, pil = (
        load_reward("image-reward", folder, preprocess=p).score(images, PROMPTS) for p in ("tensor", "pil")
    )
    assert 0 < (near - pil).abs().max() < 0.1 * near.std() + 0.01


def test_what_is_missing_is_named(plain, folder, tmp_path):
    state = plain.state_dict()
    save_file(state, tmp_path / "ImageReward.safetensors")
    with pytest.raises(UserError, match=r"has no tokenizer: put tokenizer\.json or vocab\.txt of BERT there"):
        load_reward("image-reward", tmp_path)
    assert load_reward("image-reward", tmp_path, tokenizer=str(folder)).name == "image-reward"
    del state["blip.visual_encoder.blocks.1.attn.proj.bias"]
    save_file(state, tmp_path / "ImageReward.safetensors")
    with pytest.raises(
        UserError, match=r"1 weights are missing, such as encoder.layers.1.self_attn.projection"
    ):
        load_reward("image-reward", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "ImageReward.safetensors")
    with pytest.raises(UserError, match=r"is of another model: it lacks 'patch_embed\.proj\.weight'"):
        load_reward("image-reward", tmp_path)
