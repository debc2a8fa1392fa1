"""``diffalign calibrate ems``: DPM-Solver-v3's statistics for a pipeline."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.calibrate.prompts import calibration_prompts
from diffalign.errors import UserError
from diffalign.output import prepare, write_json

if TYPE_CHECKING:  # annotations are not postponed here, or reading the options would import these
    from torch import Tensor

    from diffalign.calibrate.guided import GuidedNetwork
    from diffalign.models.base import ModelAdapter
    from diffalign.solvers.ems import Sums

# What may differ between an interrupted run and the one that goes on, or between shards.
_FREE = ("output_dir", "shard", "batch_size", "device", "pooled", "save_pipeline", "overwrite")


@dataclass(frozen=True)
class CalibrateEMSConfig:
    """Estimate DPM-Solver-v3's statistics for a pipeline: better images in few steps, at no cost per step.

    The points are noisy versions of the model's own samples at the guidance scale. Run again, an interrupted
    estimate goes on; with --shard each of several processes does a part, and the one that finds all parts in
    the folder finishes. Writes scheduler/, which
    DPMSolverV3Scheduler.from_pretrained(output_dir, subfolder="scheduler") loads, and calibration.json.

    Attributes:
        model: pipeline folder, hub id (owner/name), or a shipped model such as playground/sd
        output_dir: folder to write to
        guidance_scale: classifier-free guidance scale that the statistics are for; 1 is none
        prompts: what to draw; the playground brings its own
        prompt_file: text file with one prompt a line
        intervals: of half log-SNR; published are 120 to 1200, but samples count more
        samples: points per interval; prompts are used in turn
        pooled: space averages over positions, so that few samples do and every size fits (not in the paper);
            none keeps each coordinate, as published, for 256 samples and more
        sample_steps: steps of the model's samples
        seed: of the first noise; sample i uses seed + i
        derivative: auto is forward mode where the network allows it, else finite differences
        shard: k/n does the k-th of n parts
        resolution: side of the images in pixels; the model's own if not given
        save_pipeline: write the whole pipeline with its new scheduler, not the scheduler alone
        batch_size: samples in the network at once
        device: auto, cpu, cuda, cuda:1, mps
        variant: of the weight files, such as fp16
        revision: of a hub repository
        overwrite: start afresh in a folder that holds another estimate
    """

    model: str = "playground/sd"
    output_dir: str = "outputs/ems"
    guidance_scale: float = 4.0
    prompts: list[str] | None = None
    prompt_file: str | None = None
    intervals: int = 60
    samples: int = 64
    pooled: Literal["space", "all", "none"] = "space"
    sample_steps: int = 50
    seed: int = 0
    derivative: Literal["auto", "jvp", "difference"] = "auto"
    shard: str = "0/1"
    resolution: int | None = None
    save_pipeline: bool = False
    batch_size: int = 8
    device: str = "auto"
    variant: str | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, least in (("intervals", 2), ("samples", 2), ("sample_steps", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1.0):
            raise UserError(f"--guidance_scale must be 1 or more, not {self.guidance_scale}")
        k, n = self.part
        if not 0 <= k < n <= self.samples:
            raise UserError(f"--shard k/n needs 0 <= k < n <= --samples, not {self.shard}")

    @property
    def part(self) -> tuple[int, int]:
        """(k, n) of ``--shard k/n``."""
        k, slash, n = self.shard.partition("/")
        if not (slash and k.isdigit() and n.isdigit()):
            raise UserError(f"--shard is written k/n, as in 0/4, not {self.shard!r}")
        return int(k), int(n)


def run(config: CalibrateEMSConfig) -> Path:
    """Estimate this shard, and store the statistics once all shards are there; returns the output folder.

    Raises:
        UserError: no prompts, unknown model, or an output folder with another estimate.
    """
    from diffalign.pipelines.load import load_pipeline, make_scheduler
    from diffalign.report import versions

    prompts = calibration_prompts(
        config.model, config.prompts, config.prompt_file, samples=config.samples, seed=config.seed
    )
    earlier = None if config.overwrite else _earlier(config)
    out = prepare(config.output_dir, overwrite=True)
    # Forward mode and differences need float32, whatever the device.
    pipe = load_pipeline(
        config.model,
        device=config.device,
        dtype="float32",
        revision=config.revision,
        variant=config.variant,
    )
    estimate_shard(pipe, prompts, config, out, resume=earlier)
    files = [_file(out, k, config.part[1]) for k in range(config.part[1])]
    missing = [file.name for file in files if not file.is_file() or not _complete(file, config)]
    if missing:
        print(f"this shard is done; still to come: {', '.join(missing)}")
        return out
    from diffalign.solvers.ems import Sums

    total = Sums.load(files[0])
    for file in files[1:]:
        total = total + Sums.load(file)
    statistics = total.statistics(None if config.pooled == "none" else config.pooled)
    scheduler = make_scheduler("dpm-solver-v3", pipe.scheduler.config, statistics=statistics)
    if config.save_pipeline:
        pipe.scheduler = scheduler
        pipe.save_pretrained(out)
    else:
        scheduler.save_pretrained(out / "scheduler")
    write_json(out / "calibration.json", {"settings": asdict(config), "versions": versions()})
    print(
        f"statistics from {total.count} samples on {config.intervals} intervals; load them with\n"
        f'  DPMSolverV3Scheduler.from_pretrained("{out}", subfolder="scheduler")'
    )
    return out


def estimate_shard(
    pipe: Any, prompts: list[str], config: CalibrateEMSConfig, out: Path, *, resume: "Sums | None" = None
) -> "Sums":
    """The sums of this shard, continued from `resume`, kept in a file of `out`."""
    from tqdm.auto import tqdm

    from diffalign.calibrate.guided import guided_network
    from diffalign.models import load_adapter
    from diffalign.solvers.ems import estimate

    adapter = load_adapter(pipe)
    if resume is not None and resume.count == len(_shard(config, config.part[0])):
        return resume
    network = guided_network(
        adapter,
        [prompts[i % len(prompts)] for i in range(config.samples)],
        guidance_scale=config.guidance_scale,
        resolution=config.resolution,
    )
    x0 = _samples(adapter, network, config, done=resume.count if resume is not None else 0)
    info = {
        "settings": _settings(config),
        "guidance_scale": config.guidance_scale,
        "model": config.model,
    }
    file = _file(out, *config.part)
    with tqdm(desc=f"statistics, shard {config.shard}", unit="sample", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        return estimate(
            network,
            x0,
            adapter.schedule,
            prediction_type=adapter.prediction_type,
            intervals=config.intervals,
            seed=config.seed,
            batch_size=config.batch_size,
            derivative=config.derivative,
            shard=config.part,
            resume=resume,
            info=info,
            progress=progress,
            checkpoint=lambda sums: sums.save(file),  # type: ignore[arg-type,return-value]
        )


def _samples(
    adapter: "ModelAdapter", network: "GuidedNetwork", config: CalibrateEMSConfig, done: int
) -> "Tensor":
    """The model's own samples; only those are drawn that this shard still needs, the others stay 0."""
    import torch
    from tqdm.auto import tqdm

    from diffalign.calibrate.guided import guided_model, starting_noise
    from diffalign.pipelines.guidance import dynamic_shift
    from diffalign.pipelines.load import make_scheduler
    from diffalign.solvers import sample

    scheduler = make_scheduler("dpm-solver++", adapter.pipeline.scheduler.config, solver_order=2)
    seeds = range(config.seed, config.seed + config.samples)
    noise = starting_noise(adapter, seeds, resolution=config.resolution)
    mu = dynamic_shift(adapter, resolution=config.resolution)
    mine = _shard(config, config.part[0])
    batches = [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]
    # The first batch is also what forward mode is tried on.
    wanted = [b for i, b in enumerate(batches) if i == 0 or (i + 1) * config.batch_size > done]
    x0 = torch.zeros_like(noise)
    for part in tqdm(wanted, desc="samples of the model", unit="batch", leave=False):
        model = guided_model(network, part, batch_size=config.batch_size)
        with torch.no_grad():
            x0[part] = sample(model, noise[part], scheduler, num_inference_steps=config.sample_steps, mu=mu)
    return x0


def _shard(config: CalibrateEMSConfig, k: int) -> list[int]:
    """The samples of shard k."""
    return list(range(k, config.samples, config.part[1]))


def _earlier(config: CalibrateEMSConfig) -> "Sums | None":
    """The sums of this shard that another run with these settings left in the output folder.

    Raises:
        UserError: what is there is of other settings, or no estimate at all.
    """
    from diffalign.solvers.ems import Sums

    out = Path(config.output_dir).expanduser()
    file = _file(out, *config.part)
    if file.is_file():
        sums = Sums.load(file)
        if sums.info.get("settings") != _settings(config):
            raise UserError(
                f"{str(out)!r} holds an estimate with other settings; add --overwrite or choose another "
                "--output_dir"
            )
        return sums
    # Hidden files may be another shard's, being written.
    others = [p for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
    if others and not any(out.glob("sums-*.safetensors")):
        raise UserError(
            f"output folder {str(out)!r} is not empty; add --overwrite or choose another --output_dir"
        )
    return None


def _settings(config: CalibrateEMSConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in _FREE}


def _file(out: Path, k: int, n: int) -> Path:
    return out / f"sums-{k}-of-{n}.safetensors"


def _complete(file: Path, config: CalibrateEMSConfig) -> bool:
    from diffalign.solvers.ems import Sums

    sums = Sums.load(file)
    wanted = _shard(config, int(file.name.split("-")[1]))
    return sums.info.get("settings") == _settings(config) and sums.count == len(wanted)
