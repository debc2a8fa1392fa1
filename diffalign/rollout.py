"""``diffalign rollout``: images with the trajectories that led to them, to be judged by people and learnt
from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.output import prepare
from diffalign.pipelines.rollout import SamplerConfig


@dataclass(kw_only=True)
class RolloutConfig(SamplerConfig):
    """Sample several images of each prompt and keep their trajectories.

    Have the images judged with 'diffalign vote --images <folder>', and learn from the votes with 'diffalign
    train d3po --trajectories <folder> --votes <folder>/votes.jsonl'. A run that was cut off goes on where it
    stopped.

    Args:
        model: pipeline folder, hub id or playground/<name>
        output_dir: folder to write to
        dataset_name: the prompts: a .txt file with one per line, or any data set with captions
        max_prompts: use only so many
        prompt_windows: in how many windows of 75 tokens Stable Diffusion and SDXL read a prompt
        resolution: side of the images in pixels, by default the model's own
        lora: folder or file of LoRA weights of the policy
        seed: of all noise
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the model; auto is float32 on the CPU and 16 bits on a GPU
    """

    model: str = "playground/sd"
    output_dir: str = "outputs/rollout"
    dataset_name: str = ""
    max_prompts: int | None = None
    images_per_prompt: int = 7
    same_start: bool = True
    prompt_windows: int = 1
    resolution: int | None = None
    lora: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def run(config: RolloutConfig) -> Path:
    """Sample and write; returns the output folder.

    Raises:
        UserError: no prompts, a model or sampler that cannot be used or adds no noise, a folder with
            something else in it.
    """
    config.check_sampler()
    if not config.dataset_name:
        raise UserError("no prompts to sample: give --dataset_name prompts.txt")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "rollout runs in one process: give each device its own part of the prompts and its own output_dir"
        )
    folder = Path(config.output_dir).expanduser()
    prepare(folder, overwrite=(folder / "rollout.json").is_file())

    from PIL import Image

    from diffalign.data import trajectories
    from diffalign.data.prompts import read_prompts
    from diffalign.models import load_adapter
    from diffalign.pipelines.guidance import guidance_for
    from diffalign.pipelines.load import load_pipeline
    from diffalign.pipelines.rollout import decoded, rollout, sampler_settings, stochastic, transition_for
    from diffalign.trainers import draws

    prompts = read_prompts(config.dataset_name, limit=config.max_prompts)
    pipe = load_pipeline(config.model, device=config.device, dtype=config.dtype, lora=config.lora)
    adapter = load_adapter(pipe)
    adapter.read_in_windows(config.prompt_windows)
    transition = stochastic(transition_for(adapter, config, resolution=config.resolution), config)
    done = trajectories.start(folder, sampler_settings(config, config.resolution, transition))
    images = config.images_per_prompt
    for number, prompt in enumerate(tqdm(prompts, desc="prompts", unit="prompt")):
        if prompt in done:
            continue
        starts = [0 if config.same_start else k for k in range(images)]
        states, _ = rollout(
            adapter,
            transition,
            guidance_for(
                adapter,
                [prompt],
                config.sample_guidance,
                resolution=config.resolution,
                empty_caption=config.empty_caption,
            ),
            [0] * images,
            shape=adapter.latent_shape(config.resolution),
            start_seeds=[draws.number(config.seed, "start", number, k) for k in starts],
            seeds=[draws.number(config.seed, "steps", number, k) for k in range(images)],
            batch_size=config.sample_batch_size,
        )
        pixels = decoded(adapter, states[:, -1], config.sample_batch_size)
        arrays = (pixels.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        trajectories.add(folder, number, prompt, [Image.fromarray(a) for a in arrays], states)
    print(f"{len(prompts)} prompts, {images} images each: {folder}")
    return folder
