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


@dataclass(frozen=True)
class Pair:
    """A solver of ours and the diffusers class of the same order; at its own step count both ask as often.

    Attributes:
        solver, options: of ours.
        against, their_options: of diffusers.
        extra: evaluations that the diffusers class adds to the number of steps that it is given.
    """

    solver: str
    options: dict[str, Any]
    against: str
    their_options: dict[str, Any]
    extra: int = 0

    @property
    def name(self) -> str:
        return " ".join([self.solver, *(str(v) for v in self.options.values() if not isinstance(v, bool))])


_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_UNIPC = "UniPCMultistepScheduler"

PAIRS: tuple[Pair, ...] = (
    Pair("ddim", {}, "DDIMScheduler", {}),
    Pair("dpm-solver++", {"solver_order": 2}, _MULTISTEP, {"solver_order": 2}),
    Pair("dpm-solver++", {"solver_order": 3}, _MULTISTEP, {"solver_order": 3}),
    Pair(
        "dpm-solver++",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        _MULTISTEP,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    Pair(
        "dpm-solver",
        {"solver_order": 2},
        _MULTISTEP,
        {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    Pair(
        "dpm-solver++",
        {"solver_order": 2, "solver_method": "singlestep"},
        _SINGLESTEP,
        {"solver_order": 2, "lower_order_final": True},
    ),
    Pair(
        "dpm-solver++",
        {"solver_order": 3, "solver_method": "singlestep"},
        _SINGLESTEP,
        {"solver_order": 3, "lower_order_final": True},
    ),
    Pair("unipc", {"solver_order": 2}, _UNIPC, {"solver_order": 2}),
    Pair("unipc", {"solver_order": 3}, _UNIPC, {"solver_order": 3}),
    # DC-Solver is UniPC with interpolated outputs, v3 a predictor and corrector of the same order.
    Pair("dc-solver", {"solver_order": 3, "last_step_ratio": 1.8}, _UNIPC, {"solver_order": 3}),
    Pair("dpm-solver-v3", {"solver_order": 3}, _UNIPC, {"solver_order": 3}),
    Pair("pndm", {"variant": "plms-heun"}, "PNDMScheduler", {"skip_prk_steps": True}, extra=1),
    Pair("pndm", {"variant": "f-pndm"}, "PNDMScheduler", {"skip_prk_steps": False}, extra=9),
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
        steps: network evaluations of one sampling loop, 13 or more
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
        for name, least in (("steps", 13), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}")


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
        ours), ``ratio_25`` and ``ratio_75`` (quartiles of the ratio of neighbouring loops), ``limit_us``
        (what moving the bytes of :func:`traffic` takes at the speed of an addition of two latents),
        ``over_limit`` (ours by that), the host synchronisations of one loop, and ``graph``: whether our loop
        runs as one CUDA graph (None where there is no CUDA).
    """
    import torch
    from tqdm.auto import tqdm

    from diffalign.solvers import SOLVERS

    pairs = [pair for pair in PAIRS if pair.solver in SOLVERS]
    rows = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        noise, output = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        for pair in tqdm(pairs, desc="x".join(map(str, shape)), leave=False):
            ours = _build(pair.solver, pair.options)
            loops = [
                _loop(ours, noise, output, steps),
                _loop(_build(pair.against, pair.their_options), noise, output, steps - pair.extra),
                _add_loop(noise, output, steps),
            ]
            times = _interleave(loops, repeats, device) / steps * 1e6  # (repeats, 3, pieces)
            whole = times.sum(dim=2)
            low, high = (whole[:, 1] / whole[:, 0]).quantile(torch.tensor([0.25, 0.75]).double()).tolist()
            ours_us, theirs_us, add_us = times.min(dim=0).values.sum(dim=1).tolist()
            limit_us = add_us * traffic(ours.plan, noise) / (3 * noise.nbytes)
            rows.append(
                {
                    "solver": pair.name,
                    "against": pair.against,
                    "latents": "x".join(map(str, shape)),
                    "ours_us": ours_us,
                    "theirs_us": theirs_us,
                    "ratio": theirs_us / ours_us,
                    "ratio_25": low,
                    "ratio_75": high,
                    "limit_us": limit_us,
                    "over_limit": ours_us / limit_us,
                    "ours_syncs": count_syncs(loops[0], device),
                    "theirs_syncs": count_syncs(loops[1], device),
                    "graph": runs_as_graph(ours, noise, output, steps),
                }
            )
    return rows


def traffic(plan: Any, like: Any) -> float:
    """Bytes that a step must move, on average over a plan: each tensor that it reads or writes, once.

    That is sample, output, what earlier evaluations left and the noise to read, the next sample and what is
    kept to write. Samples and outputs are like `like`; what is kept has the arithmetic's precision.
    """
    from diffalign.solvers.plan import compile_plan, working_dtype

    kept_bytes = like.numel() * working_dtype(like).itemsize
    instructions, _ = compile_plan(plan)
    total = 0
    for i in instructions:
        kept = sum(slot is not None for slot in (i.keep_x, i.keep_m, i.keep_z))
        total += 3 * like.nbytes + (len(i.past) + kept + i.draws) * kept_bytes
    return total / len(instructions)


def runs_as_graph(scheduler: Any, noise: Any, output: Any, steps: int) -> bool | None:
    """Whether a whole loop can be captured in a CUDA graph, which then gives what the loop gives.

    For solvers that draw noise only the capture is checked. None without CUDA.
    """
    import torch

    if noise.device.type != "cuda":
        return None

    def whole(x: Any) -> Any:
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    with torch.no_grad():
        scheduler.set_timesteps(steps, device=noise.device)
        other = noise.flip(0) * 0.5
        expected = whole(other)
        x = noise.clone()
        scheduler.set_timesteps(steps, device=noise.device)
        torch.cuda.synchronize(noise.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = whole(x)
        except RuntimeError:  # the capture met an operation that waits for the device
            torch.cuda.synchronize(noise.device)
            return False
        x.copy_(other)
        graph.replay()
        draws = any(row.z for row in scheduler.plan.rows)
        return draws or bool(torch.equal(result, expected))


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

    out = torch.empty_like(noise)

    def run_() -> Iterator[None]:
        for _ in range(steps):
            torch.add(noise, output, out=out)
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
