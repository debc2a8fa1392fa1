"""``diffalign sample``: images from any pipeline folder with any sampler."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import UserError
from diffalign.output import prepare, write_json, write_text


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a diffusers pipeline with any of the samplers.

    Writes one PNG per prompt and seed, grid.png (a row per prompt, a column per seed), metadata.jsonl, which
    makes the folder a data set, and settings.json, which says how each picture was made. An image depends on
    its prompt, seed and settings alone, not on the batch.

    Attributes:
        model: pipeline folder, hub id (owner/name), or a shipped model such as playground/sd
        output_dir: folder to write to
        prompts: what to draw; several words in quotes are one prompt
        prompt_file: text file with one prompt a line, instead of or after --prompts
        negative_prompt: what not to draw, for all prompts
        prompt_windows: in how many windows of 75 tokens Stable Diffusion and SDXL read a prompt; with 1 they
            read the first 75 tokens
        solver: dpm-solver++, ddim, ... or a diffusers class such as EulerDiscreteScheduler; by default the
            pipeline's own
        solver_options: options of the solver, as in --solver_options.solver_order 3
        steps: number of inference steps
        guidance: classifier-free guidance scale; 1 turns it off
        seeds: one image per seed of every prompt
        lora: folder or file of LoRA weights to use, such as the output of diffalign train
        height: of the images in pixels; the model's own size if not given
        width: of the images in pixels; the model's own size if not given
        batch_size: images drawn at once
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the model; auto is float32 on the CPU and 16 bits on a GPU
        variant: of the weight files, such as fp16
        revision: of a hub repository
        overwrite: write into a folder that is not empty; pictures of an earlier run there are replaced
    """

    model: str = "playground/sd"
    output_dir: str = "outputs/samples"
    prompts: list[str] | None = None
    prompt_file: str | None = None
    negative_prompt: str | None = None
    prompt_windows: int = 1
    solver: str | None = None
    solver_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    steps: int = 20
    guidance: float = 5.0
    seeds: list[int] = field(default_factory=lambda: [0])
    lora: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    variant: str | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "prompt_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.seeds:
            raise UserError("--seeds is empty; give at least one, as in --seeds 0")
        if self.solver_options and self.solver is None:
            raise UserError("--solver_options needs --solver")


def read_prompts(prompts: list[str] | None, prompt_file: str | None) -> list[str]:
    """Prompts of the command line, then those of a file, one a line; empty lines are skipped.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    found = list(prompts or [])
    if prompt_file is not None:
        try:
            lines = Path(prompt_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt file {prompt_file!r}: {error}") from error
        found += [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError('no prompts; give --prompts "a red star" or --prompt_file prompts.txt')
    return found


def run(config: SampleConfig) -> Path:
    """Draw and write the images; returns the output folder.

    Raises:
        UserError: no prompts, unknown model or solver, or an output folder in use.
    """
    prompts = read_prompts(config.prompts, config.prompt_file)
    out = prepare(config.output_dir, overwrite=config.overwrite)

    from diffalign.models import load_adapter
    from diffalign.pipelines.generate import generate
    from diffalign.pipelines.load import load_pipeline, make_scheduler, scheduler_class
    from diffalign.report import save_png, tile, versions

    if config.solver is not None:
        scheduler_class(config.solver)  # a wrong name should not cost the loading of a large model
    pipe = load_pipeline(
        config.model,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        variant=config.variant,
        lora=config.lora,
    )
    if config.prompt_windows > 1:
        load_adapter(pipe).read_in_windows(config.prompt_windows)
    scheduler = (
        make_scheduler(config.solver, pipe.scheduler.config, **config.solver_options)
        if config.solver is not None
        else pipe.scheduler
    )
    jobs = [(prompt, seed) for prompt in prompts for seed in config.seeds]
    call: dict[str, Any] = {
        name: value
        for name in ("negative_prompt", "height", "width")
        if (value := getattr(config, name)) is not None
    }
    start = time.perf_counter()
    drawn = generate(
        pipe,
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        steps=config.steps,
        guidance=config.guidance,
        scheduler=scheduler,
        batch_size=config.batch_size,
        progress=f"{len(jobs)} images",
        **call,
    )
    seconds = time.perf_counter() - start
    for old in out.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        old.unlink()
    files = [f"{i:05d}.png" for i in range(len(jobs))]
    for file, image in zip(files, drawn.images, strict=True):
        save_png(out / file, image)
    columns = len(config.seeds) if len(config.seeds) > 1 else round(len(jobs) ** 0.5)
    save_png(out / "grid.png", tile(drawn.images, columns))
    rows = [{"file_name": f, "prompt": p, "seed": s} for f, (p, s) in zip(files, jobs, strict=True)]
    write_text(out / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(
        out / "settings.json",
        {
            "settings": asdict(config),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": dict(scheduler.config),
            "nfe_per_image": drawn.nfe,
            "seconds_per_image": seconds / len(jobs),
            "images": [{"file": f, "prompt": p, "seed": s} for f, (p, s) in zip(files, jobs, strict=True)],
            "versions": versions(),
        },
    )
    print(f"{len(jobs)} images, {drawn.nfe:g} network evaluations each: {out / 'grid.png'}")
    return out
