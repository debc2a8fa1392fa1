"""The step-aware preference model: it starts as the CLIP it is made from, and learns the time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.playground import model_path
from diffalign.playground.world import render, scene
from diffalign.rewards import load_reward, score_images
from diffalign.rewards.clip import load_clip
from diffalign.rewards.step_aware import StepAware, timestep_features

from .conftest import PROMPTS

GOLDENS = Path(__file__).parent.parent / "goldens" / "losses_online"
TIMES = torch.tensor([0, 500, 951])


def stirred(model: StepAware) -> StepAware:
    """The same with time conditioning that does something."""
    torch.manual_seed(2)
    for part in (model.time, model.blocks, model.final):
        for parameter in part.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["clip", "playground"])
def source(request, clip_folder):
    return clip_folder if request.param == "clip" else model_path("scorer")


def test_time_features_are_the_published_ones():
    with np.load(GOLDENS / "spm.npz") as arrays:
        t, wanted = (torch.tensor(arrays[f"timestep_embedding__{n}"]) for n in ("input__t", "output__emb"))
    # One unit in the last place of an angle of several hundred.
    torch.testing.assert_close(timestep_features(t), wanted, rtol=0, atol=6.2e-5)


def test_a_new_one_is_the_clip_at_every_time(source, pictures):
    images = pictures(3, 60, 50)
    plain, aware = load_reward("pickscore", source), load_reward("step-aware", source)
    wanted = plain.score(images, PROMPTS)
    for t in (None, 0, 999.0, TIMES):
        torch.testing.assert_close(aware.score(images, PROMPTS, t), wanted, rtol=1e-5, atol=1e-5)


def test_time_tells_once_it_is_learnt_and_each_image_has_its_own(source, pictures):
    images, model = pictures(3), stirred(load_reward("step-aware", source))
    together = model.score(images, PROMPTS, TIMES)
    alone = torch.cat([model.score(images[i : i + 1], PROMPTS[i : i + 1], float(TIMES[i])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together - model.score(images, PROMPTS, 0)).abs()[1:].min() > 1e-3
    with pytest.raises(UserError, match=r"one time per image, but got \(2,\) for 3 images"):
        model.score(images, PROMPTS, TIMES[:2])


def test_the_vit_is_modulated_as_the_paper_says(clip_folder, pictures):
    """Against transformers' own layers, with the norms' outputs changed by hooks instead."""
    model = stirred(load_reward("step-aware", clip_folder))
    pixels = pictures(2, 32, 32)
    t = torch.tensor([3, 700])
    wanted = model.images(pixels, t)
    clip, time = load_clip(clip_folder, reward="x"), F.silu(model.time(timestep_features(t)))
    vision = clip.model.vision_model

    def modulate(module, shift, scale):
        module.register_forward_hook(lambda _, __, out: out * (1 + scale[:, None]) + shift[:, None])

    def gate(module, value):
        module.register_forward_hook(
            lambda _, __, out: (
                (out[0] * value[:, None], *out[1:]) if isinstance(out, tuple) else out * value[:, None]
            )
        )

    for layer, block in zip(vision.encoder.layers, model.blocks, strict=True):
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = block.linear(time).chunk(6, -1)
        modulate(layer.layer_norm1, a_shift, a_scale)
        gate(layer.self_attn, a_gate)
        modulate(layer.layer_norm2, m_shift, m_scale)
        gate(layer.mlp, m_gate)
    shift, scale = model.final.linear(time).chunk(2, -1)
    vision.post_layernorm.register_forward_hook(lambda _, __, out: out * (1 + scale) + shift)
    torch.testing.assert_close(wanted, clip.images(pixels), rtol=1e-4, atol=1e-5)


def test_saved_and_read_back(source, pictures, tmp_path):
    model = stirred(load_reward("step-aware", source))
    model.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    again = load_reward("step-aware", tmp_path)
    images = pictures(3)
    assert torch.equal(model.score(images, PROMPTS, TIMES), again.score(images, PROMPTS, TIMES))
    assert again.antialias
    load_reward("pickscore", tmp_path)  # the CLIP in it is a CLIP of its library
    file = tmp_path / "step_aware.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "final.linear.bias"}, file)
    with pytest.raises(UserError, match=r"1 weights are missing, such as linear\.bias"):
        load_reward("step-aware", tmp_path)


def test_released_checkpoints_have_a_key_map(clip_folder, pictures, tmp_path):
    """A state dict with the names of the released code gives back the model that it was made of."""
    model = stirred(load_reward("step-aware", clip_folder))
    names = {
        "time.linear_1.": "t_embedder.mlp.0.",
        "time.linear_2.": "t_embedder.mlp.2.",
        "blocks.0.linear.": "vision_model.encoder.layers.0.adaLN_modulation.1.",
        "blocks.1.linear.": "vision_model.encoder.layers.1.adaLN_modulation.1.",
        "final.linear.": "vision_model.adaLN_modulation.1.",
    }
    state = {f"model.{name}": value for name, value in model.clip.model.state_dict().items()}
    for name, value in model.conditioning_state().items():
        own = next(prefix for prefix in names if name.startswith(prefix))
        state["model." + name.replace(own, names[own])] = value
    torch.save(state, tmp_path / "spm.bin")
    # ... on a CLIP with other weights
    other = load_clip(clip_folder, reward="x")
    other.model.visual_projection.weight.data.zero_()
    other.save(tmp_path / "other")
    again = load_reward("step-aware", tmp_path / "other", checkpoint=str(tmp_path / "spm.bin"))
    images = pictures(3, 32, 32)  # nothing to resize
    assert torch.equal(model.score(images, PROMPTS, TIMES), again.score(images, PROMPTS, TIMES))
    # ... and is shown images as there: not antialiased, also once it is saved.
    images = pictures(3, 80, 80)
    plain = F.interpolate(images, (32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    again.save_pretrained(tmp_path / "saved")
    for released in (again, load_reward("step-aware", tmp_path / "saved")):
        torch.testing.assert_close(released.square(images), plain)
    assert (model.square(images) - plain).abs().max() > 0.01


def test_gradients_to_the_image_and_recomputing_give_the_same(source, pictures):
    model = stirred(load_reward("step-aware", source))
    images = pictures(3).requires_grad_()
    model.score(images, PROMPTS, TIMES).sum().backward()
    plain = images.grad.clone()
    assert plain.abs().sum() > 0
    images.grad = None
    model.enable_gradient_checkpointing()
    model.score(images, PROMPTS, TIMES).sum().backward()
    torch.testing.assert_close(images.grad, plain, rtol=1e-4, atol=1e-6)


def test_what_it_cannot_stand_on_is_refused(open_clip_folder):
    with pytest.raises(UserError, match="CLIPModel of transformers or on an open_clip model with a ResNet"):
        load_reward("step-aware", open_clip_folder)


def test_on_the_playground_it_starts_as_the_scorer():
    scenes = [scene(6, i) for i in range(8)]
    images, captions = [render(s) for s in scenes], [s.caption for s in scenes]
    scorer, aware = load_reward("playground/scorer"), load_reward("step-aware", "playground/scorer")
    assert np.allclose(
        score_images(scorer, images, captions), score_images(aware, images, captions), atol=1e-5
    )
