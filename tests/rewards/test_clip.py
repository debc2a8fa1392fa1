"""PickScore, CLIP score and HPSv2 against transformers and open_clip on the same tiny weights."""

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.errors import UserError
from diffalign.playground import model_path
from diffalign.rewards import load_reward, score_images
from diffalign.rewards.clip import load_clip
from diffalign.rewards.preprocess import eight_bit

from .conftest import OPEN_CLIP_TINY, PROMPTS


def released(folder, images, prompts, ids) -> torch.Tensor:
    """A score as users of the released weights compute it: processor of transformers, Pillow, cosine."""
    model = CLIPModel.from_pretrained(folder).eval()
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(
        [array.numpy() for array in eight_bit(images)], return_tensors="pt"
    )
    with torch.no_grad():
        output = model(input_ids=ids, **pictures)
        return model.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(-1)


def clip_tokenizer():
    """CLIP's tokenizer as transformers has it, from the vocabulary that comes with open_clip."""
    own = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {names.get(word, word): number for word, number in own.encoder.items()}
    return CLIPTokenizer(vocab=words, merges=list(own.bpe_ranks), model_max_length=16)


def test_pickscore_is_what_transformers_gives(clip_folder, pictures):
    images = pictures(3, 60, 44)
    ids = clip_tokenizer()(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    ).input_ids
    wanted = released(clip_folder, images, PROMPTS, ids)
    reward = load_reward("pickscore", clip_folder, preprocess="pil")
    scores = reward.score(images, PROMPTS)
    assert wanted.std() > 0.1  # the weights tell images and texts apart
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.05)
    near = load_reward("pickscore", clip_folder).score(images, PROMPTS)
    assert (near - wanted).abs().max() < 0.5 * wanted.std()


def test_clip_score_is_the_cosine_times_100(clip_folder, pictures):
    images = pictures(3)
    pick, clip = (load_reward(name, clip_folder) for name in ("pickscore", "clip"))
    cosine = pick.score(images, PROMPTS) / pick.clip.model.logit_scale.exp()
    torch.testing.assert_close(clip.score(images, PROMPTS), 100 * cosine)
    assert (cosine.abs() <= 1).all()


def test_tokens_without_a_tokenizer_are_clips_own(clip_folder):
    tokenizer = load_clip(clip_folder, reward="x").tokenizer
    texts = [*PROMPTS, "Two  BLUE rings, isn't it? 123 — café", "", "word " * 40]
    theirs = clip_tokenizer()(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    for own, other in zip(tokenizer(texts), theirs.input_ids, strict=True):
        end = int((own == 49407).nonzero()[0]) + 1
        assert own[:end].tolist() == other[:end].tolist()  # what pads after the end is not read


def test_a_tokenizer_in_the_folder_is_used(clip_folder, tmp_path, pictures):
    model = CLIPModel.from_pretrained(clip_folder)
    model.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(model_path("scorer")).save_pretrained(tmp_path)
    ids = load_clip(tmp_path, reward="x").tokenizer(["a red star"])
    assert ids.shape == (1, 16)
    assert ids.max() < 139  # of the playground's vocabulary


def test_hpsv2_is_what_open_clip_gives(tmp_path, pictures, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPEN_CLIP_TINY)
    torch.manual_seed(3)
    model = open_clip.create_model("tiny", pretrained=None).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    images = pictures(3, 40, 64)
    transform = open_clip.image_transform(32, is_train=False, resize_mode="longest")
    pixels = torch.stack([transform(_pil(image)) for image in images])
    with torch.no_grad():
        seen, read, _ = model(pixels, open_clip.get_tokenizer("tiny")(PROMPTS))[:3]
    wanted = (seen * read).sum(-1)
    for path in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        reward = load_reward("hpsv2", path, architecture="tiny", preprocess="pil")
        torch.testing.assert_close(reward.score(images, PROMPTS), wanted, rtol=0, atol=1e-5)
    near = load_reward("hpsv2", tmp_path, architecture="tiny").score(images, PROMPTS)
    assert (near - wanted).abs().max() < 0.02


def _pil(image):
    from PIL import Image

    return Image.fromarray(eight_bit(image[None])[0].numpy())


def test_hpsv2_refuses_other_weights_and_versions(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPEN_CLIP_TINY)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match=r"reward hpsv2: .* has none of HPS_v2.1_compressed.pt"):
        load_reward("hpsv2", tmp_path)
    with pytest.raises(UserError, match=r"is of another model: .* weights are missing"):
        load_reward("hpsv2", tmp_path, version="2", architecture="tiny")
    with pytest.raises(UserError, match=r"version must be 2 or 2\.1, not '3'"):
        load_reward("hpsv2", tmp_path, version="3")
    with pytest.raises(UserError, match="no open_clip architecture 'tinny'"):
        load_reward("hpsv2", tmp_path, version="2", architecture="tinny")


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": {"a": torch.zeros(2)}, "b": Trap()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="could not be read as weights"):
        load_reward("hpsv2", tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("which", ["clip_folder", "open_clip_folder"])
def test_gradients_reach_the_image_and_nothing_else(which, request, pictures):
    reward = load_reward("pickscore", request.getfixturevalue(which))
    images = pictures(2, 40, 52).requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in reward.parameters())
    plain = images.grad.clone()

    images.grad = None
    calls = []
    first = next(iter(reward.clip.image_blocks()))
    next(first.children()).register_forward_hook(lambda *_: calls.append(1))
    reward.enable_gradient_checkpointing()
    reward.score(images, PROMPTS[:2]).sum().backward()
    torch.testing.assert_close(images.grad, plain)
    assert len(calls) == 2  # once more in the backward pass


def test_texts_are_encoded_once_and_again_after_a_move(clip_folder, pictures, monkeypatch):
    reward = load_reward("pickscore", clip_folder)
    seen = []
    encode = reward.clip.texts
    monkeypatch.setattr(reward.clip, "texts", lambda prompts: seen.append(list(prompts)) or encode(prompts))
    first = reward.score(pictures(3), PROMPTS)
    assert seen == [PROMPTS[:2]]  # the third is the first
    assert torch.equal(reward.score(pictures(3), PROMPTS), first)
    assert len(seen) == 1
    reward.to("cpu")
    reward.score(pictures(1), ["a red star"])
    assert seen[1:] == [["a red star"]]
    monkeypatch.setattr("diffalign.rewards.clip.CACHED_PROMPTS", 2)
    reward.score(pictures(3), ["a", "b", "c"])
    assert list(reward._known) == ["b", "c"]


def test_no_score_depends_on_its_batch(clip_folder, pictures):
    reward, images = load_reward("pickscore", clip_folder), pictures(3)
    one_by_one = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward.score(images, PROMPTS), one_by_one)
    assert reward.score(images[:0], []).shape == (0,)


def test_autocast_leaves_the_product_in_float32(clip_folder, pictures):
    reward, images = load_reward("pickscore", clip_folder), pictures(3)
    wanted = reward.score(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert len(set((scores * 256).frac().tolist())) > 1  # no rounding to bfloat16's grid at the end
    torch.testing.assert_close(scores, wanted, rtol=0.1, atol=0.3)


def test_stored_images_of_any_size_come_back_in_order(clip_folder, pictures):
    reward = load_reward("pickscore", clip_folder)
    images = [pictures(1, h, w, seed=h)[0] for h, w in ((40, 40), (30, 50), (40, 40), (33, 33))]
    arrays = [eight_bit(image[None])[0].numpy() for image in images]
    prompts = ["a", "b", "c", "a"]
    wanted = torch.cat([reward.score(i[None], [p]) for i, p in zip(images, prompts, strict=True)])
    for size in (1, 8):
        scores = score_images(reward, arrays, prompts, batch_size=size)
        torch.testing.assert_close(torch.from_numpy(scores), wanted)


@pytest.mark.parametrize("which", ["clip_folder", "open_clip_folder"])
def test_a_clip_is_saved_as_it_was_read(which, request, tmp_path, pictures):
    folder = request.getfixturevalue(which)
    clip = load_clip(folder, reward="x")
    clip.save(tmp_path)
    again = load_clip(tmp_path, reward="x")
    pixels = pictures(2, 32, 32)
    assert torch.equal(clip.images(pixels), again.images(pixels))
    assert torch.equal(clip.texts(PROMPTS), again.texts(PROMPTS))


def test_weights_in_half_are_computed_in_float32(clip_folder, tmp_path, pictures):
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    reward = load_reward("pickscore", tmp_path)
    assert reward.clip.model.dtype == torch.float32
    wanted = load_reward("pickscore", clip_folder).score(pictures(), PROMPTS)
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), wanted, rtol=0, atol=0.1)


def test_broken_folders_are_refused(clip_folder, tmp_path):
    with pytest.raises(UserError, match="reward pickscore: no CLIP model at"):
        load_reward("pickscore", tmp_path)
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"reward clip: the CLIP model at .* could not be loaded"):
        load_reward("clip", tmp_path)
    state = load_file(clip_folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack visual_projection\.weight"):
        load_reward("clip", tmp_path)
