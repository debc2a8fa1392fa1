"""``diffalign bench rollout``: what keeping trajectories costs beside plain sampling of as many images.

The pipeline of diffusers and our rollouts draw the same number of images, with the same steps, guidance and
batches, prompts encoded and images decoded, in turn in one process, so that a busy machine slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffalign.errors import UserError
from diffalign.output import prepare

WAYS = {
    "pipeline": "diffusers' pipeline, DDIM with eta 1",
    "rollout": "the same steps, all states kept",
    "rollout-means": "with the mean of each step as well, as policy gradients need it",
}
LIMIT = 1.1  # times the pipeline


@dataclass(frozen=True)
class BenchRolloutConfig:
    """Cost of sampling with all states kept against the plain pipeline.

    Writes rollout.json and rollout.md. Times are ratios to the pipeline beside each, the median and quartiles
    of all rounds: of processor time on the CPU, of wall time elsewhere. The limit is 1.1.

    Attributes:
        output_dir: folder to write to
        model: pipeline folder, hub id or playground/<name>
        steps: network evaluations per image
        guidance: classifier-free guidance scales
        batch_sizes: images in one call of the network
        images: drawn by each way in a round
        repeats: rounds that are timed
        device: auto, cpu, cuda
        dtype: of the model; auto is float32 on the CPU and 16 bits on a GPU
        threads: of torch on the CPU; 0 leaves its choice
        seed: of all noise
        overwrite: write into a folder that is not empty
    """

    output_dir: str = "outputs/bench/rollout"
    model: str = "playground/sd"
    steps: int = 10
    guidance: list[float] = field(default_factory=lambda: [1.0, 5.0])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    images: int = 8
    repeats: int = 8
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "images", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.guidance or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--guidance and --batch_sizes need a value, sizes of 1 or more")


def run(config: BenchRolloutConfig) -> list[dict[str, Any]]:
    """Measure every guidance and size of batch; returns and stores the rows."""
    import torch

    from diffalign.bench.record import store
    from diffalign.models import load_adapter
    from diffalign.pipelines.load import load_pipeline

    out = prepare(config.output_dir, overwrite=config.overwrite)
    threads = torch.get_num_threads()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        adapter = load_adapter(load_pipeline(config.model, device=config.device, dtype=config.dtype))
        rows = compare_rollouts(adapter, config)
        print(store(out, "rollout", config, rows, ways=WAYS))
    finally:
        torch.set_num_threads(threads)
    return rows


def compare_rollouts(adapter: Any, config: BenchRolloutConfig) -> list[dict[str, Any]]:
    """One row per guidance, size of batch and way: ``evaluations`` of the network, ``time`` with its
    quartiles, ``limit``."""
    import torch
    from tqdm.auto import tqdm

    from diffalign.pipelines.generate import count_evaluations

    cases = [(scale, batch) for scale in config.guidance for batch in config.batch_sizes]
    rows = []
    for scale, batch in tqdm(cases, desc="rollouts", leave=False):
        ways = make_ways(adapter, config, scale, batch)
        evaluations = []
        for way in ways.values():  # warms up, too
            with count_evaluations(adapter.module) as calls:
                way()
            evaluations.append(calls[0])
        rounds = [[_time(way, adapter.device) for way in ways.values()] for _ in range(config.repeats)]
        table = torch.tensor(rounds, dtype=torch.float64)
        ratios = (table / table[:, :1]).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
        rows += [
            {
                "guidance": scale,
                "batch": batch,
                "way": name,
                "evaluations": evaluations[i],
                "time": ratios[1, i].item(),
                "time_25": ratios[0, i].item(),
                "time_75": ratios[2, i].item(),
                "limit": None if name == "pipeline" else LIMIT,
            }
            for i, name in enumerate(ways)
        ]
    return rows


def make_ways(
    adapter: Any, config: BenchRolloutConfig, scale: float, batch: int
) -> dict[str, Callable[[], Any]]:
    """Functions that draw ``config.images`` images ``(images, 3, H, W)``, one for each of :data:`WAYS`."""
    import torch

    from diffalign.pipelines.guidance import guidance_for
    from diffalign.pipelines.rollout import SamplerConfig, decoded, rollout, transition_for
    from diffalign.solvers.ddim import DDIMScheduler

    pipe = adapter.pipeline
    prompts = [f"picture {i}" for i in range(config.images)]
    seeds = range(config.seed, config.seed + config.images)
    transition = transition_for(adapter, SamplerConfig(sample_steps=config.steps))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, grid="diffusers", eta=1.0)

    def plain() -> Any:
        own, pipe.scheduler = pipe.scheduler, scheduler
        pipe.set_progress_bar_config(disable=True)
        try:
            found = [
                pipe(
                    prompt=prompts[i : i + batch],
                    num_inference_steps=config.steps,
                    guidance_scale=scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]],
                    output_type="pt",
                ).images
                for i in range(0, config.images, batch)
            ]
        finally:
            pipe.scheduler = own
        return torch.cat(found).cpu()

    def kept(keep_means: bool) -> Any:
        states, _ = rollout(
            adapter,
            transition,
            guidance_for(adapter, prompts, scale, batch_size=batch),
            range(config.images),
            shape=adapter.latent_shape(None),
            start_seeds=seeds,
            seeds=[seed + config.images for seed in seeds],
            batch_size=batch,
            keep_means=keep_means,
        )
        return decoded(adapter, states[:, -1], batch)

    ways = {"pipeline": plain, "rollout": lambda: kept(False), "rollout-means": lambda: kept(True)}
    return {name: ways[name] for name in WAYS}


def _time(way: Callable[[], Any], device: Any) -> float:
    """Seconds: of the processor on the CPU, where other programs count less, else of the wall."""
    import torch

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
