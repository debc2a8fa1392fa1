"""Opening pipelines, choosing schedulers by name, drawing images."""

import sys

import numpy as np
import pytest
import torch

from diffalign.bench.networks import tiny_pipeline
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.pipelines.generate import count_evaluations, denoiser, generate
from diffalign.pipelines.load import choose_device, load_pipeline, make_scheduler, resolve_model
from diffalign.solvers import UniPCScheduler

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    path = tmp_path_factory.mktemp("tiny")
    pipe.save_pretrained(path)
    return str(path)


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe):
    scheduler = make_scheduler("dpm-solver++", pipe.scheduler.config)
    together = generate(pipe, ["a", "b", "c"], [3, 4, 5], steps=3, scheduler=scheduler, batch_size=3)
    split = generate(pipe, ["a", "b", "c"], [3, 4, 5], steps=3, scheduler=scheduler, batch_size=2)
    alone = generate(pipe, ["c"], [5], steps=3, scheduler=scheduler)
    torch.testing.assert_close(together.latents, split.latents, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(together.latents[2:], alone.latents, rtol=1e-3, atol=3e-4)
    assert together.images.shape == (3, 32, 32, 3)
    assert together.images.dtype == np.uint8
    assert together.nfe == split.nfe == 3
    assert not np.array_equal(together.images[0], together.images[1])


def test_generate_matches_a_plain_pipeline_call(pipe):
    plain = pipe(
        "a",
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    ours = generate(pipe, ["a"], [7], steps=4, guidance=4.0)
    np.testing.assert_array_equal(ours.images, (plain * 255).round().astype(np.uint8))


def test_generate_leaves_the_pipeline_as_it_was(pipe):
    own = pipe.scheduler
    pipe.set_progress_bar_config(desc="mine")
    other = make_scheduler("ddim", own.config)
    generate(pipe, ["a"], [0], steps=2, scheduler=other)
    assert pipe.scheduler is own
    assert pipe._progress_bar_config == {"desc": "mine"}
    with pytest.raises(UserError, match="does not take 'colour'"):
        generate(pipe, ["a"], [0], steps=2, colour=1)
    with pytest.raises(UserError, match="one seed per prompt"):
        generate(pipe, ["a"], [0, 1], steps=2)
    assert pipe.scheduler is own
    assert not denoiser(pipe)._forward_pre_hooks


def test_negative_prompt_changes_the_image(pipe):
    plain = generate(pipe, ["a", "b"], [0, 1], steps=2)
    negative = generate(pipe, ["a", "b"], [0, 1], steps=2, negative_prompt="c")
    assert not torch.equal(plain.latents, negative.latents)


def test_evaluations_are_counted_on_the_network():
    network = torch.nn.Linear(1, 1)
    with count_evaluations(network) as calls:
        network(torch.zeros(1, 1))
        network(torch.zeros(1, 1))
    network(torch.zeros(1, 1))
    assert calls == [2]


def test_load_pipeline_from_a_folder(folder, pipe):
    loaded = load_pipeline(folder, device="cpu")
    assert loaded.unet.dtype == torch.float32
    same = generate(loaded, ["a"], [1], steps=2)
    torch.testing.assert_close(same.latents, generate(pipe, ["a"], [1], steps=2).latents)
    assert load_pipeline(folder, device="cpu", dtype="bfloat16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize("opened", [load_pipeline, lambda path: load_adapter(path).pipeline])
def test_a_pipeline_that_was_saved_with_our_scheduler_opens_in_a_new_process(tmp_path, monkeypatch, opened):
    """Diffusers takes a class from a module only if that is imported, as it is not at the start."""
    made = tiny_pipeline()
    made.scheduler = UniPCScheduler.from_config(made.scheduler.config)
    made.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "diffalign.solvers.unipc")
    assert type(opened(str(tmp_path)).scheduler).__name__ == "UniPCScheduler"


def test_lora_is_loaded(folder, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    network = tiny_pipeline().unet
    network.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=layers)
    base = generate(load_pipeline(folder, device="cpu"), ["a"], [1], steps=2)
    tuned = generate(load_pipeline(folder, device="cpu", lora=str(tmp_path)), ["a"], [1], steps=2)
    assert not torch.allclose(base.latents, tuned.latents)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot load the LoRA"):
        load_pipeline(folder, device="cpu", lora=str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/a/b", "a/b/c"])
def test_unknown_models_are_refused_without_asking_a_hub(model):
    with pytest.raises(UserError, match="no model at"):
        resolve_model(model)


def test_models_that_exist(tmp_path, folder):
    assert resolve_model("owner/name") == "owner/name"
    assert resolve_model(folder) == folder
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the model"):
        load_pipeline(str(tmp_path), device="cpu")


def test_devices():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="'warp' cannot be used"):
        choose_device("warp")


def test_schedulers_by_name():
    assert type(make_scheduler("ddim", SD)).__module__ == "diffalign.solvers.ddim"
    assert type(make_scheduler("DDIMScheduler", SD)).__module__.startswith("diffusers.")
    assert make_scheduler("dpm-solver++", SD, solver_order=3).config.solver_order == 3
    for wrong, part in (("dpm-solvr", "did you mean"), ("zzz", "known: ")):
        with pytest.raises(UserError, match=part):
            make_scheduler(wrong, SD)
    with pytest.raises(UserError, match="no option 'solver_ordr'; did you mean 'solver_order'"):
        make_scheduler("dpm-solver++", SD, solver_ordr=2)


def test_diffusers_schedulers_are_told_of_flow_models():
    told = make_scheduler("DPMSolverMultistepScheduler", FLOW)
    assert told.config.use_flow_sigmas
    assert told.config.prediction_type == "flow_prediction"
    assert told.config.flow_shift == 3.0
    assert make_scheduler("FlowMatchEulerDiscreteScheduler", FLOW).config.shift == 3.0
    assert not make_scheduler("DPMSolverMultistepScheduler", SD).config.use_flow_sigmas
    with pytest.raises(UserError, match="cannot sample a flow model"):
        make_scheduler("DDIMScheduler", FLOW)
