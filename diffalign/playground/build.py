"""``diffalign playground build``: train the shipped models from nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from diffalign import output
from diffalign.errors import UserError
from diffalign.report import versions


@dataclass
class BuildConfig:
    """Train a playground model from nothing, on a CPU in well under an hour.

    A run that was stopped goes on with --resume from its last saved step and ends with the same weights.

    Args:
        what: sd (tokenizer, text encoder, autoencoder, UNet) or scorer (contrastive image-text model).
        output_dir: the finished model goes to <output_dir>/<what>, the state to <output_dir>/work.
        seed: of scenes, initial weights and batches.
        images: scenes to draw; 32000 for sd and 20000 for the scorer if not given.
        steps: steps of the denoiser or of the scorer; 6500 and 3000 if not given.
        vae_steps: steps of the autoencoder (sd only).
        eval_prompts: held-out captions that the finished sd model is judged by.
        threads: processor threads; all if not given.
        resume: go on with a run that was stopped, with the same options.
        overwrite: start anew in a folder that is not empty.
    """

    POSITIONAL: ClassVar[bool] = True

    what: Literal["sd", "scorer"]
    output_dir: str = "outputs/playground"
    seed: int = 0
    images: int | None = None
    steps: int | None = None
    vae_steps: int = 1000
    eval_prompts: int = 500
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False


TEXT = {
    "sd": "CLIPTextModel, AutoencoderKL 64 -> 16 x 16 x 4, UNet2DConditionModel, epsilon prediction",
    "scorer": "ResNet image tower, 2-layer text tower, sigmoid loss",
}

DEFAULTS = {"sd": {"images": 32_000, "steps": 6_500}, "scorer": {"images": 20_000, "steps": 3_000}}


def run(config: BuildConfig) -> dict[str, float]:
    """Train, write the model folder with its README, and return the facts in it.

    Raises:
        UserError: the output folder is in use, or holds a run with other options.
    """
    images = config.images or DEFAULTS[config.what]["images"]
    steps = config.steps or DEFAULTS[config.what]["steps"]
    if min(images, steps, config.vae_steps) < 1:
        raise UserError("images, steps and vae_steps must be positive")
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.output_dir)
    work = folder / "work" / config.what
    settings: dict[str, Any] = {"seed": config.seed, "images": images, "steps": steps}
    if config.what == "sd":
        settings["vae_steps"] = config.vae_steps
    if config.resume:
        if not (work / "settings.json").exists():
            raise UserError(
                f"nothing to resume in {folder}: leave --resume out, or name the folder of the run"
            )
        if (saved := json.loads((work / "settings.json").read_text())) != settings:
            raise UserError(
                f"{folder} holds a run with {saved}, not {settings}; resume it with its own options"
            )
    else:
        output.prepare(folder, overwrite=config.overwrite)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "settings.json").write_text(json.dumps(settings) + "\n")

    target = folder / config.what
    if config.what == "sd":
        from diffalign.playground import sd

        facts = sd.build(
            target,
            work,
            images=images,
            vae_steps=config.vae_steps,
            steps=steps,
            seed=config.seed,
            eval_prompts=config.eval_prompts,
        )
    else:
        from diffalign.playground import scorer

        facts = scorer.build(target, work, images=images, steps=steps, seed=config.seed)
    options = " ".join(f"--{k} {v}" for k, v in settings.items())
    command = f"diffalign playground build {config.what} {options}"
    output.write_text(target / "README.md", readme(config.what, command, facts, config.eval_prompts))
    output.write_json(target / "facts.json", facts | versions())
    print(f"wrote {target}: " + ", ".join(f"{k} {v:.3g}" for k, v in facts.items()))
    return facts


def readme(what: str, command: str, facts: dict[str, float], prompts: int) -> str:
    """What a model folder says of itself."""
    parts = {k: facts[k] for k in ("vae_seconds", "denoiser_seconds", "training_seconds") if k in facts}
    minutes = " and ".join(f"{v / 60:.0f} ({k.removesuffix('_seconds')})" for k, v in parts.items())
    how = f"""Trained from nothing by

    {command}

in {minutes} minutes with {torch.get_num_threads()} processor threads. `facts.json` holds these numbers with
the versions that gave them.
"""
    if what == "scorer":
        return f"""# Playground scorer

A small CLIP (open_clip, {TEXT["scorer"]}) that says how well an image fits a caption of the playground.
Load it with `diffalign.playground.load_scorer()`, or with open_clip as `local-dir:<this folder>`.

{how}
| fresh examples | right |
|---|---|
| of a clean image, the true caption above one with a single attribute changed | {facts["captions"]:.1%} |
| for one caption, a true image above a damaged, false one | {facts["images"]:.1%} |
"""
    rows = "\n".join(
        f"| {label} | {facts[key]:.1%} |"
        for key, label in (
            ("true", "**caption true of the image**"),
            ("one", "... one object"),
            ("count", "... two or three of a kind"),
            ("relation", "... left of, right of, above, below"),
            ("and", "... one and another"),
        )
    )
    return f"""# Playground Stable Diffusion

A `StableDiffusionPipeline` of {facts["parameters"] / 1e6:.1f} million parameters ({TEXT["sd"]}) for
scenes of 64 x 64 pixels. Load it with `diffalign.playground.load()`, or as any diffusers folder.

{how}
Verifier on {prompts} held-out captions (20 steps of diffusers' DPMSolverMultistep, guidance 4):

| | right |
|---|---|
{rows}

Autoencoder on fresh scenes: {facts["vae_psnr_db"]:.1f} dB, {facts["vae_verified"]:.1%} still verified.

![samples](samples.png)
"""
