"""``diffalign bench step``: what ``scheduler.step()`` costs beside diffusers' class of the same order.

Both run whole sampling loops over the same tensors, alternately in one process, so that a busy machine slows
both. What is quoted is the ratio of the fastest runs of each step, which other programs disturb least.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
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
        repeats: loops of each scheduler; the fastest run of each step counts
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
        Rows with ``ours_us`` and ``theirs_us`` (microseconds a step, fastest runs), ``ratio`` (theirs by
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
            times = _interleave(loops, repeats, device) / steps * 1e6  # (repeats, 3, pieces)
            whole = times.sum(dim=2)
            low, high = (whole[:, 1] / whole[:, 0]).quantile(torch.tensor([0.25, 0.75]).double()).tolist()
            ours_us, theirs_us, add_us = times.min(dim=0).values.sum(dim=1).tolist()
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


Loop = Callable[[], Iterator[None]]  # prepares a run; the iterator performs a step each time


def _loop(scheduler: Any, noise: Any, output: Any, steps: int) -> Loop:
    def run_() -> Iterator[None]:
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, return_dict=False)[0]
            yield

    def ready() -> Iterator[None]:
        scheduler.set_timesteps(steps, device=noise.device)
        return run_()

    return ready


def _add_loop(noise: Any, output: Any, steps: int) -> Loop:
    import torch

    def run_() -> Iterator[None]:
        for _ in range(steps):
            torch.add(noise, output)
            yield

    return run_


def _interleave(loops: list[Loop], repeats: int, device: Any) -> Any:
    """Seconds of every loop in turn, ``repeats`` times after two warm-up rounds.

    Returns:
        (repeats, loops, pieces): a piece is a step on a CPU, where the fastest of each can be taken on a busy
        machine, and a whole loop on a GPU, which is waited for only at its end.
    """
    import torch

    def once(ready: Loop) -> list[float]:
        return _time_on_gpu(ready, device) if device.type == "cuda" else _time(ready)

    with torch.no_grad():
        times = [[once(ready) for ready in loops] for _ in range(repeats + 2)]
    return torch.tensor(times[2:], dtype=torch.float64)


def _time(ready: Loop) -> list[float]:
    pieces: list[float] = []
    going = ready()
    clock = time.perf_counter
    while True:
        start = clock()
        if next(going, going) is going:  # at its end
            return pieces
        pieces.append(clock() - start)


def _time_on_gpu(ready: Loop, device: Any) -> list[float]:
    import torch

    going = ready()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in going:
        pass
    torch.cuda.synchronize(device)
    return [time.perf_counter() - start]


def count_syncs(ready: Loop, device: Any) -> int:
    """How often one loop makes the host wait for the device.

    On CUDA as the driver reports it. Elsewhere the reads that would wait on a GPU are counted: a tensor's
    value turned into a Python number or truth value, and searches whose result has an unknown size.
    """
    import torch

    going = ready()
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in going:
                    pass
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return sum("synchroniz" in str(warning.message) for warning in caught)
    with torch.no_grad(), _reads() as count:
        for _ in going:
            pass
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
