"""``diffalign bench step``: what ``scheduler.step()`` costs beside diffusers' class of the same order.

Both run whole sampling loops over the same tensors, alternately in one process, so that a busy machine slows
both. What is quoted is the ratio of the fastest loops, which other programs disturb least.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import UserError
from diffalign.output import prepare

# (solver of ours, its options, diffusers class, its options): same order, same number of evaluations.
PAIRS: tuple[tuple[str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("ddim", {}, "DDIMScheduler", {}),
    ("dpm-solver++", {"solver_order": 2}, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("dpm-solver++", {"solver_order": 3}, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("unipc", {"solver_order": 2}, "UniPCMultistepScheduler", {"solver_order": 2}),
    ("unipc", {"solver_order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
    ("pndm", {}, "PNDMScheduler", {}),
)


@dataclass(frozen=True)
class StepConfig:
    """Time scheduler.step() of our solvers against diffusers' class of the same order.

    Writes step.json and step.md. Ratios above 1 mean that ours is faster.

    Attributes:
        output_dir: folder to write to
        device: auto, cpu, cuda
        dtype: of the latents
        shapes: of the latents, such as 1x4x64x64 (SD 1.5), 2x4x128x128 (SDXL), 1x16x21x60x104 (video)
        steps: of one sampling loop
        repeats: loops of each scheduler; the fastest one counts
        threads: of torch on the CPU; more than one makes small tensors slower, not faster
        overwrite: write into a folder that is not empty
    """

    output_dir: str = "outputs/bench/step"
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    shapes: list[str] = field(default_factory=lambda: ["1x4x64x64", "2x4x128x128", "1x16x21x60x104"])
    steps: int = 20
    repeats: int = 30
    threads: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
                raise UserError(f"--shapes takes sizes such as 1x4x64x64, not {shape!r}")
        for name in ("steps", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


def run(config: StepConfig) -> list[dict[str, Any]]:
    """Measure all pairs on all shapes; returns and stores the rows."""
    import torch

    from diffalign.bench.record import store
    from diffalign.pipelines.load import choose_device

    out: Path = prepare(config.output_dir, overwrite=config.overwrite)
    device = torch.device(choose_device(config.device))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads)
        rows = compare_steps(
            [tuple(map(int, shape.split("x"))) for shape in config.shapes],
            steps=config.steps,
            repeats=config.repeats,
            device=device,
            dtype=getattr(torch, config.dtype),
        )
        print(store(out, "step", config, rows))
    finally:
        torch.set_num_threads(threads)
    return rows


def compare_steps(
    shapes: list[tuple[int, ...]], *, steps: int, repeats: int, device: Any, dtype: Any
) -> list[dict[str, Any]]:
    """One row per pair and shape.

    Returns:
        Rows with ``ours_us`` and ``theirs_us`` (microseconds a step, fastest loop), ``ratio`` (theirs by
        ours), ``ratio_25`` and ``ratio_75`` (quartiles of the ratio of neighbouring loops), ``adds`` (ours in
        units of one out-of-place addition of two such latents) and the host synchronisations of one loop.
    """
    import torch
    from tqdm.auto import tqdm

    from diffalign.solvers import SOLVERS

    pairs = [pair for pair in PAIRS if pair[0] in SOLVERS]
    rows = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        noise, output = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        for name, options, theirs, their_options in tqdm(pairs, desc="x".join(map(str, shape)), leave=False):
            loops = [
                _loop(_build(name, options), noise, output, steps),
                _loop(_build(theirs, their_options), noise, output, steps),
                _add_loop(noise, output, steps),
            ]
            times = torch.tensor(_interleave(loops, repeats, device)) / steps * 1e6  # (repeats, 3)
            ratio = times[:, 1] / times[:, 0]
            low, high = ratio.quantile(torch.tensor([0.25, 0.75])).tolist()
            ours_us, theirs_us, add_us = times.min(dim=0).values.tolist()
            rows.append(
                {
                    "solver": f"{name} {options.get('solver_order', '')}".strip(),
                    "against": theirs,
                    "latents": "x".join(map(str, shape)),
                    "ours_us": ours_us,
                    "theirs_us": theirs_us,
                    "ratio": theirs_us / ours_us,
                    "ratio_25": low,
                    "ratio_75": high,
                    "adds": ours_us / add_us,
                    "ours_syncs": count_syncs(loops[0], device),
                    "theirs_syncs": count_syncs(loops[1], device),
                }
            )
    return rows


def _build(name: str, options: dict[str, Any]) -> Any:
    from diffalign.bench.networks import SD_SCHEDULER
    from diffalign.pipelines.load import make_scheduler

    return make_scheduler(name, SD_SCHEDULER, **options)


def _loop(scheduler: Any, noise: Any, output: Any, steps: int) -> Callable[[], Callable[[], None]]:
    """Prepare a sampling loop; calling the result prepares one run, calling that performs its steps."""

    def ready() -> Callable[[], None]:
        scheduler.set_timesteps(steps, device=noise.device)

        def go() -> None:
            x = noise
            for t in scheduler.timesteps:
                x = scheduler.step(output, t, x, return_dict=False)[0]

        return go

    return ready


def _add_loop(noise: Any, output: Any, steps: int) -> Callable[[], Callable[[], None]]:
    import torch

    def go() -> None:
        for _ in range(steps):
            torch.add(noise, output)

    return lambda: go


def _interleave(
    loops: list[Callable[[], Callable[[], None]]], repeats: int, device: Any
) -> list[list[float]]:
    """Seconds of every loop in turn, ``repeats`` times after two warm-up rounds."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            round_ = []
            for ready in loops:
                go = ready()
                wait()
                start = time.perf_counter()
                go()
                wait()
                round_.append(time.perf_counter() - start)
            times.append(round_)
    return times[2:]


def count_syncs(ready: Callable[[], Callable[[], None]], device: Any) -> int:
    """How often one loop makes the host wait for the device.

    On CUDA as the driver reports it. Elsewhere the reads that would wait on a GPU are counted: a tensor's
    value turned into a Python number or truth value, and searches whose result has an unknown size.
    """
    import torch

    go = ready()
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                go()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return sum("synchroniz" in str(warning.message) for warning in caught)
    with torch.no_grad(), _reads() as count:
        go()
    return count[0]


@contextmanager
def _reads() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    count = [0]

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count[0] += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero")
            return func(*args, **(kwargs or {}))

    with Reads():
        yield count
