"""Adapters, references and the small parts of the trainers."""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import add_noise, evaluate
from diffalign.models import load_adapter
from diffalign.models.reference import adapters_off, frozen_copy, named_adapter
from diffalign.trainers import draws
from diffalign.trainers.health import PATIENCE, Health


@pytest.fixture
def adapter(model_folder):
    return load_adapter(model_folder)


def add_lora(adapter, name="default", scale=0.5):
    unet = adapter.module
    targets = list(adapter.lora_targets)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
    for key, parameter in unet.named_parameters():
        if f"lora_B.{name}." in key:
            torch.nn.init.normal_(parameter, std=scale)


def inputs(rows=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 4, 4, generator=generator)
    return x, torch.arange(rows) * 200, {"prompt_embeds": torch.randn(rows, 16, 32, generator=generator)}


def test_prompts_are_encoded_as_the_pipeline_does(adapter):
    ours = adapter.encode_prompts(["a star", ""])["prompt_embeds"]
    theirs, negative = adapter.pipeline.encode_prompt("a star", "cpu", 1, True)
    torch.testing.assert_close(ours, torch.cat([theirs, negative]))


def test_images_are_encoded_in_the_denoisers_units(adapter):
    pixels = torch.rand(3, 3, 8, 8) * 2 - 1
    latents = adapter.encode_images(pixels)["latents"]
    assert latents.shape == (3, 4, 4, 4)
    vae = adapter.pipeline.vae
    torch.testing.assert_close(latents, vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    assert adapter.decode(latents).shape == pixels.shape
    assert adapter.default_resolution == 8


def test_the_reference_is_the_base_model_and_is_put_back_after_an_exception(adapter):
    x, t, cond = inputs()
    with torch.no_grad():
        base = adapter.denoise(x, t, cond)
        add_lora(adapter)
        adapter.reference = adapters_off
        policy = adapter.denoise(x, t, cond)
        assert not torch.equal(policy, base)
        assert torch.equal(adapter.denoise(x, t, cond, reference=True), base)
        wants = {name: p.requires_grad for name, p in adapter.module.named_parameters()}
        with pytest.raises(ZeroDivisionError), adapters_off(adapter.module):
            raise ZeroDivisionError
        assert torch.equal(adapter.denoise(x, t, cond), policy)
        assert wants == {name: p.requires_grad for name, p in adapter.module.named_parameters()}


def test_a_second_adapter_as_reference_is_put_back_after_an_exception(adapter):
    x, t, cond = inputs()
    add_lora(adapter, "reference")
    with torch.no_grad():
        wanted = adapter.denoise(x, t, cond)
        add_lora(adapter, "default")
        adapter.module.set_adapter("default")
        policy = adapter.denoise(x, t, cond)
        adapter.reference = named_adapter("reference")
        assert torch.equal(adapter.denoise(x, t, cond, reference=True), wanted)
        with pytest.raises(ZeroDivisionError), adapter.reference(adapter.module):
            raise ZeroDivisionError
        assert torch.equal(adapter.denoise(x, t, cond), policy)


def test_a_frozen_copy_does_not_follow_the_policy(adapter):
    x, t, cond = inputs()
    adapter.reference = frozen_copy(adapter.module)
    with torch.no_grad():
        base = adapter.denoise(x, t, cond)
        for parameter in adapter.module.parameters():
            parameter.mul_(0.9)
        assert torch.equal(adapter.denoise(x, t, cond, reference=True), base)
        assert not torch.equal(adapter.denoise(x, t, cond), base)


def test_without_a_reference_nobody_answers_for_it(adapter):
    with pytest.raises(RuntimeError, match="no reference policy"):
        adapter.denoise(*inputs(), reference=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untouched_lora_costs_log_two_in_every_precision(adapter, dtype):
    adapter.module.to(dtype)
    add_lora(adapter, scale=0.0)
    for key, parameter in adapter.module.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    adapter.reference = adapters_off
    x, t, cond = inputs(8)
    noised = add_noise(adapter.schedule, adapter.prediction_type, x, x.flip(0), t.clamp(max=999))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        chosen, rejected = evaluate(adapter.denoise, noised, cond).log_ratio().chunk(2)
    assert not (chosen - rejected).any()
    assert chosen.requires_grad
    value = losses.sigmoid(chosen, rejected, 5000.0)
    assert value.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)


def test_cache_identity_follows_the_encoders(adapter):
    before = adapter.identity()
    with torch.no_grad():
        next(adapter.pipeline.vae.parameters()).add_(1.0)
    after = adapter.identity()
    assert before["vae"] != after["vae"]
    assert before["text_encoder"] == after["text_encoder"]
    assert before["units"] == after["units"]
    adapter.pipeline.vae.register_to_config(scaling_factor=0.5)
    assert adapter.identity()["units"] != before["units"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere", "no model at /nowhere"),
        ("empty", "no model_index.json"),
        ("other", "DDPMPipeline, which is not"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UserError, match=words):
        load_adapter(name)


def test_pickled_weights_are_not_loaded(tmp_path, model_folder):
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.save_pretrained(tmp_path / "bin", safe_serialization=False)
    for file in (tmp_path / "bin" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="bin could not be loaded"):
        load_adapter(tmp_path / "bin")


# -------------------------------------------------------------------- draws and alarms


def test_every_epoch_is_a_permutation_of_its_own():
    rows = draws.rows_at(range(0, 30), seed=1, length=10)
    epochs = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert draws.rows_at(range(7, 13), seed=1, length=10) == rows[7:13]
    assert draws.rows_at(range(30), seed=2, length=10) != rows


def test_draws_of_different_purposes_are_independent_normals():
    fields = np.stack([draws.generator(0, "noise", 0, i).standard_normal(4096) for i in range(32)])
    assert abs(fields.mean()) < 0.02
    assert abs(fields.std() - 1) < 0.02
    correlation = np.corrcoef(fields) - np.eye(32)
    assert np.abs(correlation).max() < 0.1
    again = draws.generator(0, "noise", 0, 3).standard_normal(4096)
    assert np.array_equal(again, fields[3])
    assert draws.number(0, "view", 1) != draws.number(0, "view", 2)


def healthy(**changes):
    return {"errors/chosen": 0.1, "errors/reference_chosen": 0.2, "gradient_factor": 0.3} | changes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("winners falling", {"errors/chosen": 0.3}),
        ("saturated", {"gradient_factor": 0.001}),
        ("no learning", {"gradient_factor": 0.499}),
    ],
)
def test_an_alarm_fires_once_when_its_condition_lasts(name, changes):
    health = Health()
    fired = [health.update(healthy(**changes)) for _ in range(3 * PATIENCE)]
    assert [i for i, alarms in enumerate(fired) if alarms] == [PATIENCE - 1]
    assert list(fired[PATIENCE - 1]) == [name]


def test_a_healthy_run_and_a_method_without_reference_raise_no_alarm():
    health, bare = Health(), Health()
    assert not any(health.update(healthy()) for _ in range(200))
    assert not any(bare.update({"errors/chosen": 1.0, "gradient_factor": 0.3}) for _ in range(200))
