"""Compare samplers at equal numbers of network evaluations, on a pipeline or where the answer is known.

The yardstick is where infinitely many steps would have ended from the same noise: the exact solution for a
Gaussian mixture, the converged solution of the very same model, guidance and noise for a pipeline.
Samplers that add noise of their own do not head for that point; judge those by scores of the images.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.bench.comparison import Comparison, Row
from diffalign.bench.distances import Distance
from diffalign.bench.kept import Piece, keep, key
from diffalign.bench.networks import SD_SCHEDULER
from diffalign.bench.reference import (
    CONVERGING,
    Reference,
    converge,
    finest,
    in_dtype,
    kept_reference,
    relative_errors,
    weights_identity,
)
from diffalign.errors import RunFailed, UserError
from diffalign.pipelines.generate import Samples, denoiser, generate
from diffalign.pipelines.load import make_scheduler
from diffalign.solvers import GaussianMixture, sample
from diffalign.solvers.noise import NoiseSchedule

# images (N, H, W, 3) uint8 and their N prompts to N numbers
Score = Callable[[np.ndarray, Sequence[str]], Sequence[float] | np.ndarray]

#: Pictures of each row that are kept for reports.
SHOWN = 8


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``"dpm-solver++:solver_order=3,grid=karras"`` to a solver's name and its options.

    Raises:
        UserError: an option without ``=``, or a value that is no YAML.
    """
    import yaml

    name, _, rest = spec.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"solver {spec!r}: {part!r} should be option=value, as in ddim:eta=0.5")
        try:
            options[option.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"solver {spec!r}: {value!r} is no value of an option") from error
    return name, options


def build(solvers: Mapping[str, Any] | Sequence[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> scheduler, for a model whose scheduler has the given config.

    Args:
        solvers: name -> scheduler, or name -> class made from the config; or a list of texts that
            `parse_spec` reads and of classes.

    Raises:
        UserError: unknown solver or option.
    """
    if not isinstance(solvers, Mapping):
        solvers = {spec if isinstance(spec, str) else spec.__name__: spec for spec in solvers}
    built = {}
    for label, given in solvers.items():
        if isinstance(given, str):
            name, options = parse_spec(given)
            built[label] = make_scheduler(name, config, **options)
        else:
            maker: Any = given
            built[label] = maker.from_config(config) if isinstance(given, type) else given
    return built


def inference_steps(scheduler: Any, evaluations: int) -> tuple[int, int]:
    """The largest ``num_inference_steps`` that takes at most so many network evaluations, and how many.

    diffusers' Heun takes 2 n - 1, its PNDM n + 1; every solver of ours n.

    Raises:
        UserError: no number of steps is so cheap.
    """
    shift = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}  # moves times, adds none
    reason = "no number of steps is so few"
    for n in range(evaluations, 0, -1):
        trial = copy.deepcopy(scheduler)
        try:
            trial.set_timesteps(n, **shift)
        except UserError as error:  # one of ours, and those take n evaluations: fewer were not asked for
            reason = str(error)
            break
        except (ValueError, IndexError, RuntimeError, AssertionError, ZeroDivisionError):
            continue
        if len(trial.timesteps) <= evaluations:
            return n, len(trial.timesteps)
        reason = f"{n} steps take {len(trial.timesteps)}"
    raise UserError(f"{type(scheduler).__name__} cannot run with {evaluations} evaluations: {reason}")


@contextmanager
def network_seconds(network: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Time spent in calls of ``network`` while the block runs; yields a function that tells it afterwards.

    On a GPU these are events of the device, so nothing waits for it that would not wait anyway.
    """
    cuda = next(network.parameters()).is_cuda
    marks: list[Any] = []

    def mark(*_: object) -> None:
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    def total() -> float:
        calls = list(zip(marks[::2], marks[1::2], strict=True))
        if not cuda:
            return float(sum(after - before for before, after in calls))
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in calls) / 1000

    handles = [network.register_forward_pre_hook(mark), network.register_forward_hook(mark)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Drawn:
    """Samples and what they cost, in seconds for all of them."""

    samples: Samples
    seconds: float
    network: float


@dataclass(frozen=True)
class _Problem:
    """One model at one guidance scale and precision: what the loop over samplers needs to know."""

    draw: Callable[[Any, int, str], _Drawn]  # scheduler, num_inference_steps, text of the progress bar
    reference: Reference
    guidance: float
    dtype: str
    identity: Mapping[str, Any]
    calls_per_evaluation: float = 1.0  # 2 where a pipeline asks for a guided pair one by one
    prompts: Sequence[str] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    distances: Mapping[str, Distance] = field(default_factory=dict)


def compare_samplers(
    pipeline: Any,
    solvers: Mapping[str, Any] | Sequence[Any],
    steps: Sequence[int],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    guidance: float | Sequence[float] = 4.0,
    dtypes: Sequence[torch.dtype] | None = None,
    reference_steps: int = 400,
    reference_tolerance: float = 2e-3,
    scores: Mapping[str, Score] | None = None,
    distances: Mapping[str, Distance] | None = None,
    folder: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **call: Any,
) -> Comparison:
    """Sample the same prompts and noises with every sampler at every number of network evaluations.

    Args:
        pipeline: a diffusers text-to-image pipeline, or one that draws pixels without a prompt.
        solvers: name -> scheduler, each used through the pipeline as a user would; or a list of classes and
            of texts such as ``"dpm-solver++:solver_order=3"`` and ``"UniPCMultistepScheduler"``.
        steps: numbers of network evaluations, counted on the network. A sampler that takes several within a
            step gets fewer steps, and more evaluations than allowed are an error.
        prompts: N prompts; one image each. A prompt may be there several times.
        seeds: N seeds of the starting noise; 0..N-1 by default.
        guidance: classifier-free guidance scale, or several.
        dtypes: precisions of the network to compare, by default the one that it has. All are held against the
            converged solution in the finest.
        reference_steps: most steps of the converged solution (third-order DPM-Solver++, half-log-SNR grid).
        reference_tolerance: its steps are doubled until the latents move by less, in the mean.
        scores: name -> function of the images and their prompts, such as a reward model.
        distances: metric -> function of the images and the converged ones, such as
            :func:`~diffalign.bench.distances.lpips_distance`.
        folder: where finished rows are kept, so that an interrupted comparison goes on. A row is taken from
            there only if model, prompts, sampler and everything else are the same; only the names of scores
            can be compared, not what they do.
        cache_dir: where converged solutions are kept, under a hash of all that they depend on.
        batch_size: images per network call.
        progress: show progress bars.
        call: further arguments of the pipeline's call, such as ``height``.

    Raises:
        UserError: unknown solver or option, or seeds that don't match the prompts.
        RunFailed: a sampler took more evaluations than it was allowed.
    """
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    schedulers = build(solvers, pipeline.scheduler.config)
    network = denoiser(pipeline)
    own = next(network.parameters()).dtype
    precisions = list(dtypes or [own])

    def draw(scale: float, scheduler: Any, n: int, label: str | None) -> _Drawn:
        with network_seconds(network) as spent:
            start = time.perf_counter()
            drawn = generate(
                pipeline,
                prompts,
                seeds,
                steps=n,
                guidance=scale,
                scheduler=scheduler,
                batch_size=batch_size,
                progress=label if progress else None,
                **call,
            )
            return _Drawn(drawn, time.perf_counter() - start, spent())

    plain = all(isinstance(value, str | int | float | bool | None) for value in call.values())
    identity = weights_identity(pipeline) | {
        "schedule": dict(pipeline.scheduler.config),
        "prompts": list(prompts),
        "seeds": [int(s) for s in seeds],
        "call": call,
    }
    stored = Path(folder).expanduser() if folder is not None and plain else None
    cache = Path(cache_dir).expanduser() if cache_dir is not None and plain else None
    exact = make_scheduler("dpm-solver++", pipeline.scheduler.config, **CONVERGING)
    result = Comparison()
    scales = [guidance] if isinstance(guidance, int | float) else list(guidance)
    best = finest(precisions)
    with in_dtype(pipeline, best if best != own else None):
        for scale in scales:

            def solve(scale: float = scale) -> Reference:
                return converge(
                    lambda n: draw(scale, exact, n, f"converged solution, {n} steps").samples,
                    tolerance=reference_tolerance,
                    most=reference_steps,
                )

            own_identity = identity | {"guidance": scale, "dtype": str(best), "converging": CONVERGING}
            limits = {"tolerance": reference_tolerance, "most": reference_steps}
            result.references[scale] = kept_reference(cache, own_identity | limits, solve)
    # A first call is slower than any other, and tells how often a guided evaluation calls the network.
    probe, planned = inference_steps(exact, 2)
    for dtype in precisions:
        with in_dtype(pipeline, dtype if dtype != own else None):
            for scale in scales:
                first = draw(scale, exact, probe, None)
                name = str(dtype).removeprefix("torch.")
                problem = _Problem(
                    lambda *args, scale=scale: draw(scale, *args),
                    result.references[scale],
                    scale,
                    name,
                    identity | {"guidance": scale, "dtype": name, "yardstick": str(best)},
                    first.samples.nfe / planned,
                    prompts,
                    scores or {},
                    distances or {},
                )
                _compare(result, problem, schedulers, steps, stored)
    return result


def compare_on_mixture(
    solvers: Mapping[str, Any] | Sequence[Any],
    steps: Sequence[int],
    *,
    guidance: float | Sequence[float] = 1.0,
    samples: int = 16,
    seed: int = 0,
    mixture: GaussianMixture | None = None,
    config: Mapping[str, Any] = SD_SCHEDULER,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    folder: str | Path | None = None,
) -> Comparison:
    """The same comparison where the network is a formula and the answer is known to ten digits.

    Everything runs from the noisy end of the schedule, where a sampler may not begin: diffusers' default
    spacings start below it, which is part of their error, as it is on a real model.

    Args:
        solvers, steps, folder: as in `compare_samplers`.
        guidance: classifier-free guidance scale towards one class per sample, or several.
        samples: how many.
        seed: of the noise; sample i uses seed + i.
        mixture: the problem; by default six components in 4 x 8 x 8 dimensions.
        config: of a diffusers scheduler; gives the noise schedule. Stable Diffusion's by default.
        dtypes: precisions of the samples and of the network's output.
    """
    mixture = mixture or GaussianMixture.random()
    schedule = NoiseSchedule.from_config(config)
    schedulers = build(solvers, config)
    labels = np.unique(mixture.labels)
    classes = [int(labels[i % len(labels)]) for i in range(samples)]
    noise = torch.stack(
        [
            torch.randn(mixture.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
            for i in range(samples)
        ]
    )

    def draw(scale: float, dtype: torch.dtype, scheduler: Any, n: int, _label: str) -> _Drawn:
        kind = scheduler.config.get("prediction_type", "epsilon")
        network = mixture.model(schedule, prediction_type=kind, guidance_scale=scale, classes=classes)
        spent: list[float] = []

        def timed(x: torch.Tensor, t: Any) -> torch.Tensor:
            start = time.perf_counter()
            output = network(x, t)
            spent.append(time.perf_counter() - start)
            return output

        start = time.perf_counter()
        with torch.no_grad():
            found = sample(timed, noise.to(dtype), scheduler, num_inference_steps=n)
        seconds = time.perf_counter() - start
        return _Drawn(Samples(np.zeros((0,)), found.double(), len(spent)), seconds, sum(spent))

    result = Comparison()
    known = {name: value.tolist() for name, value in vars(mixture).items() if isinstance(value, np.ndarray)}
    identity = {"mixture": known, "schedule": schedule.fingerprint(), "seed": seed, "samples": samples}
    scales = [guidance] if isinstance(guidance, int | float) else list(guidance)
    for scale in scales:
        exact = mixture.solve(noise, schedule, guidance_scale=scale, classes=classes)
        result.references[scale] = Reference(exact, None, np.zeros(samples))
    for dtype in dtypes:
        for scale in scales:
            name = str(dtype).removeprefix("torch.")
            problem = _Problem(
                lambda *args, scale=scale, dtype=dtype: draw(scale, dtype, *args),
                result.references[scale],
                scale,
                name,
                identity | {"guidance": scale, "dtype": name},
            )
            _compare(result, problem, schedulers, steps, Path(folder).expanduser() if folder else None)
    return result


def _compare(
    result: Comparison,
    problem: _Problem,
    schedulers: Mapping[str, Any],
    steps: Sequence[int],
    folder: Path | None,
) -> None:
    """Add the rows of one problem, those that `folder` has as they are."""
    measured = {"scores": list(problem.scores), "distances": list(problem.distances)}
    versions = {name: version(name) for name in ("diffalign", "diffusers", "torch")}
    shared = {**problem.identity, **measured, **versions}
    cells = [(name, scheduler, allowed) for name, scheduler in schedulers.items() for allowed in steps]
    for i, (name, scheduler, allowed) in enumerate(cells, 1):
        try:
            n, planned = inference_steps(scheduler, allowed)
        except UserError as error:
            result.skipped.append(f"{name}, {allowed} evaluations: {error}")
            continue
        label = f"[{i}/{len(cells)}] {name}, {planned} evaluations"
        identity = shared | {"scheduler": scheduler_identity(scheduler), "inference_steps": n}
        try:
            piece = keep(folder, key(identity), partial(_cell, problem, scheduler, n, planned, label))
        except (IndexError, ValueError, TypeError, RuntimeError, AssertionError) as error:
            # Some combinations of options crash in diffusers; that should not cost the other samplers.
            ours = not type(scheduler).__module__.startswith("diffusers.")
            if ours or isinstance(error, UserError | RunFailed | torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__} in diffusers: {' '.join(str(error).split())}"
            result.skipped.append(f"{name}, {allowed} evaluations: {reason}")
            continue
        row = Row(
            sampler=name,
            steps=allowed,
            guidance=problem.guidance,
            dtype=problem.dtype,
            images=piece.arrays.get("images"),
            **piece.facts,
        )
        result.rows.append(row)


def _cell(problem: _Problem, scheduler: Any, n: int, planned: int, label: str) -> Piece:
    """Draw and judge: what is kept of one row."""
    drawn = problem.draw(scheduler, n, label)
    found, reference = drawn.samples, problem.reference
    count = len(found.latents)
    nfe = found.nfe / problem.calls_per_evaluation
    if round(nfe) > planned:
        raise RunFailed(
            f"{type(scheduler).__name__} called the network {nfe:g} times in {n} steps and not {planned}, as "
            "its times say: this pipeline cannot be compared at equal cost"
        )
    errors = relative_errors(found.latents, reference.latents).double().nan_to_num(torch.inf, torch.inf)
    values = {"error": errors.tolist()}
    arrays = {}
    if reference.images is not None:
        difference = np.abs(found.images.astype(np.float32) - reference.images)
        values["pixel_error"] = difference.mean(axis=(1, 2, 3), dtype=float).tolist()
        for metric, distance in problem.distances.items():
            values[metric] = np.asarray(distance(found.images, reference.images), dtype=float).tolist()
        for name, score in problem.scores.items():
            judged = np.asarray(score(found.images, problem.prompts), dtype=float)
            values[f"score/{name}"] = judged.tolist()
        arrays["images"] = found.images[:SHOWN]
    facts = {
        "inference_steps": n,
        "nfe": nfe,
        "seconds": drawn.seconds / count,
        "outside": (drawn.seconds - drawn.network) / count,
        "values": values,
    }
    return Piece(facts, arrays)


def scheduler_identity(scheduler: Any) -> str:
    """A hash of the files that a scheduler saves: its class, its options and its learnt tables."""
    sha = hashlib.sha256(f"{type(scheduler).__module__}.{type(scheduler).__qualname__}".encode())
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:32]
