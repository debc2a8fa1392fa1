"""``diffalign playground build``: train the shipped models."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from diffalign import output
from diffalign.errors import UserError
from diffalign.report import versions


@dataclass
class BuildConfig:
    """Train a playground model, on a CPU in about an hour.

    sd and scorer start from nothing; flow and few-step learn from the finished sd model. A run that was
    stopped goes on with --resume from its last saved step and ends with the same weights.

    Args:
        what: sd (tokenizer, text encoder, autoencoder, UNet), scorer (contrastive image-text model), flow
            (velocity prediction) or few-step (four steps without guidance).
        output_dir: the finished model goes to <output_dir>/<what>, the state to <output_dir>/work.
        seed: of scenes, initial weights and batches.
        images: scenes to draw, for few-step the teacher's trajectories. If not given: sd 32000, scorer
            20000, flow 24000, few-step 4000.
        steps: steps of the network. If not given: sd 6500, scorer 3000, flow 2000, few-step 2000.
        vae_steps: steps of the autoencoder (sd only).
        matching_steps: steps of distribution matching, after the others (few-step only).
        teacher: the sd model that flow and few-step learn from, a folder or playground/sd.
        eval_prompts: held-out captions that the finished model is judged by (not the scorer).
        threads: processor threads; all if not given.
        resume: go on with a run that was stopped, with the same options.
        overwrite: start anew in a folder that is not empty.
    """

    POSITIONAL: ClassVar[bool] = True

    what: Literal["sd", "scorer", "flow", "few-step"]
    output_dir: str = "outputs/playground"
    seed: int = 0
    images: int | None = None
    steps: int | None = None
    vae_steps: int = 1000
    matching_steps: int = 1000
    teacher: str = "playground/sd"
    eval_prompts: int = 500
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a model is built.

    Attributes:
        module: holds ``build(target, work, *, images, steps, seed, ...)``, which returns the facts.
        images, steps: used where the config names none.
        options: further settings that decide the weights.
        judged: whether ``build`` takes ``eval_prompts``.
    """

    module: str
    images: int
    steps: int
    options: tuple[str, ...] = ()
    judged: bool = True


RECIPES = {
    "sd": Recipe("sd", 32_000, 6_500, ("vae_steps",)),
    "scorer": Recipe("scorer", 20_000, 3_000, judged=False),
    "flow": Recipe("flow", 24_000, 2_000, ("teacher",)),
    "few-step": Recipe("few_step", 4_000, 2_000, ("teacher", "matching_steps")),
}


def run(config: BuildConfig) -> dict[str, float]:
    """Train, write the model folder with its README, and return the facts in it.

    Raises:
        UserError: the output folder is in use, or holds a run with other options, or the teacher is none.
    """
    recipe = RECIPES[config.what]
    settings: dict[str, Any] = {
        "seed": config.seed,
        "images": recipe.images if config.images is None else config.images,
        "steps": recipe.steps if config.steps is None else config.steps,
    } | {name: getattr(config, name) for name in recipe.options}
    for name, value in settings.items():
        if name not in ("seed", "teacher") and value < 1:
            raise UserError(f"{name} must be positive, not {value}")
    arguments = dict(settings)
    if "teacher" in settings:
        arguments["teacher"] = load_teacher(config.teacher)
    if recipe.judged:
        arguments["eval_prompts"] = config.eval_prompts
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.output_dir)
    work = folder / "work" / config.what
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
    facts = import_module(f"diffalign.playground.{recipe.module}").build(target, work, **arguments)
    options = " ".join(f"--{k} {v}" for k, v in settings.items())
    command = f"diffalign playground build {config.what} {options}"
    output.write_text(target / "README.md", readme(config.what, command, facts, config.eval_prompts))
    output.write_json(target / "facts.json", facts | versions())
    print(f"wrote {target}: " + ", ".join(f"{k} {v:.3g}" for k, v in facts.items()))
    return facts


def load_teacher(name: str) -> Any:
    """The pipeline that flow and few-step learn from.

    Raises:
        UserError: there is none, or it is no StableDiffusionPipeline that predicts epsilon.
    """
    from diffalign.pipelines.load import load_pipeline

    pipe = load_pipeline(name, device="cpu")
    predicts = pipe.scheduler.config.get("prediction_type", "epsilon")
    if type(pipe).__name__ != "StableDiffusionPipeline" or predicts != "epsilon":
        raise UserError(
            f"teacher {name!r} is a {type(pipe).__name__} with {predicts} prediction; flow and few-step "
            "learn from a StableDiffusionPipeline that predicts epsilon, such as playground/sd"
        )
    return pipe


#: model -> (title, what it is and how to use it, how it was judged)
TEXTS = {
    "sd": (
        "Playground Stable Diffusion",
        """(CLIPTextModel, AutoencoderKL 64 -> 16 x 16 x 4,
UNet2DConditionModel, epsilon prediction) for scenes of 64 x 64 pixels. Load it with
`diffalign.playground.load()`, or as any diffusers folder.""",
        "20 steps of diffusers' DPMSolverMultistep, guidance 4",
    ),
    "flow": (
        "Playground flow model",
        """that predicts the velocity `z - x0` of a
rectified flow, for scenes of 64 x 64 pixels: the UNet of `playground/sd` taught anew, with the same text
encoder and autoencoder. Load it with `diffalign.playground.load("flow")`, or as any diffusers folder. The
stored scheduler is diffusers' DPMSolverMultistep, told that the model is a flow:
`FlowMatchEulerDiscreteScheduler` lacks the `init_noise_sigma` that a `StableDiffusionPipeline` asks for.""",
        "20 steps of diffusers' DPMSolverMultistep, guidance 4",
    ),
    "few-step": (
        "Playground few-step model",
        """distilled from `playground/sd` to four
steps without guidance (v prediction), for scenes of 64 x 64 pixels. Load it with
`diffalign.playground.load("few-step")`, or as any diffusers folder, and draw with
`num_inference_steps=4, guidance_scale=1`: the stored LCMScheduler asks the network at times 999, 749, 499
and 249 (999 and 499 for two steps, 999 for one), the only ones that it was taught.""",
        "four steps of diffusers' LCMScheduler, no guidance",
    ),
}


def readme(what: str, command: str, facts: dict[str, float], prompts: int) -> str:
    """What a model folder says of itself."""
    parts = {k: facts[k] for k in ("vae_seconds", "denoiser_seconds", "training_seconds") if k in facts}
    names = {k: f" ({k.removesuffix('_seconds')})" if len(parts) > 1 else "" for k in parts}
    minutes = " and ".join(f"{v / 60:.0f}{names[k]}" for k, v in parts.items())
    start = "Trained from nothing" if what in ("sd", "scorer") else "Trained from the weights of its teacher"
    how = f"""{start} by

    {command}

in {minutes} minutes with {torch.get_num_threads()} processor threads. `facts.json` holds these numbers with
the versions that gave them.
"""
    if what == "scorer":
        return f"""# Playground scorer

A small CLIP (open_clip, ResNet image tower, 2-layer text tower, sigmoid loss) that says how well an image
fits a caption of the playground. Load it with `diffalign.playground.load_scorer()`, or with open_clip
as `local-dir:<this folder>`.

{how}
| fresh examples | right |
|---|---|
| of a clean image, the true caption above one with a single attribute changed | {facts["captions"]:.1%} |
| for one caption, a true image above a damaged, false one | {facts["images"]:.1%} |
"""
    labels = {
        "true": "**caption true of the image**",
        "one": "... one object",
        "count": "... two or three of a kind",
        "relation": "... left of, right of, above, below",
        "and": "... one and another",
        "true_2": "caption true, two steps",
        "true_1": "caption true, one step",
    }
    rows = "\n".join(f"| {label} | {facts[key]:.1%} |" for key, label in labels.items() if key in facts)
    title, text, judged = TEXTS[what]
    vae = (
        f"Autoencoder on fresh scenes: {facts['vae_psnr_db']:.1f} dB, {facts['vae_verified']:.1%} still "
        "verified.\n\n"
        if what == "sd"
        else ""
    )
    return f"""# {title}

A `StableDiffusionPipeline` of {facts["parameters"] / 1e6:.1f} million parameters {text}

{how}
Verifier on {prompts} held-out captions ({judged}):

| | right |
|---|---|
{rows}

{vae}![samples](samples.png)
"""
