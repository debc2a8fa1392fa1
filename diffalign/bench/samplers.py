"""Compare samplers at equal numbers of network evaluations, on a pipeline or where the answer is known.

The yardstick is where infinitely many steps would have ended from the same noise: the exact solution for a
Gaussian mixture, the converged solution of the very same model, guidance and noise for a pipeline.
Samplers that add noise of their own do not head for that point; judge those by scores of the images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from diffalign.bench.networks import SD_SCHEDULER
from diffalign.errors import UserError
from diffalign.pipelines.generate import Samples, generate
from diffalign.pipelines.load import make_scheduler
from diffalign.solvers import GaussianMixture, sample
from diffalign.solvers.noise import NoiseSchedule

# images (N, H, W, 3) uint8 and their N prompts to N numbers
Score = Callable[[np.ndarray, Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps.

    Attributes:
        sampler: its name in the comparison.
        steps: ``num_inference_steps``.
        guidance: classifier-free guidance scale.
        nfe: network evaluations per image, counted on the network.
        error: mean over images of ||z - z*|| / ||z*||, z the final latents and z* the yardstick.
        error_se: standard error of that mean.
        error_median: median of the same: a few samples that end at another mode don't move it.
        pixel_error: mean absolute difference of the decoded images, of 255; None where nothing is decoded.
        seconds: wall time per image, decoding included.
        scores: mean of each score over the images.
    """

    sampler: str
    steps: int
    guidance: float
    nfe: float
    error: float
    error_se: float
    error_median: float
    pixel_error: float | None
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Comparison:
    """The table and the pictures of one comparison.

    Attributes:
        rows: one per sampler and number of steps.
        images: (sampler, steps) -> (N, H, W, 3) uint8; the converged ones under ``("converged", steps)``.
        reference_error: how far the yardstick itself still moved when its steps were halved, as a relative
            error; a sampler's error below it says nothing. 0 for an exact solution.
    """

    rows: list[Row] = field(default_factory=list)
    images: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    reference_error: float = 0.0

    def table(self) -> list[dict[str, Any]]:
        """The rows as flat dictionaries, for JSON or ``pandas.DataFrame``; scores as ``score/<name>``."""
        flat = []
        for row in self.rows:
            values = asdict(row)
            scores = values.pop("scores")
            flat.append(values | {f"score/{name}": value for name, value in scores.items()})
        return flat


def relative_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||z - z*|| / ||z*|| of each row: two tensors (N, ...) to (N,)."""
    difference = (latents - reference).flatten(1).norm(dim=1)
    return difference / reference.flatten(1).norm(dim=1)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``"dpm-solver++:solver_order=3,grid=karras"`` to a solver's name and its options.

    Raises:
        UserError: an option without ``=``.
    """
    import yaml

    name, _, rest = spec.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"solver {spec!r}: {part!r} should be option=value, as in ddim:eta=0.5")
        options[key.strip()] = yaml.safe_load(value)
    return name, options


def build(samplers: Mapping[str, Any] | Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> scheduler, from ready schedulers or from texts that `parse_spec` reads, for a model's config.

    Raises:
        UserError: unknown solver or option.
    """
    if isinstance(samplers, Mapping):
        return dict(samplers)
    built = {}
    for spec in samplers:
        name, options = parse_spec(spec)
        built[spec] = make_scheduler(name, config, **options)
    return built


def compare_samplers(
    pipe: Any,
    samplers: Mapping[str, Any] | Sequence[str],
    steps: Sequence[int],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    guidance: float = 4.0,
    reference_steps: int = 200,
    scores: Mapping[str, Score] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **call: Any,
) -> Comparison:
    """Sample the same prompts and noises with every sampler at every number of steps.

    Args:
        pipe: a diffusers text-to-image pipeline.
        samplers: name -> scheduler, each used through the pipeline as a user would; or texts such as
            ``"dpm-solver++:solver_order=3"`` and ``"UniPCMultistepScheduler"``.
        steps: numbers of inference steps.
        prompts: N prompts; one image each.
        seeds: N seeds of the starting noise; 0..N-1 by default.
        guidance: classifier-free guidance scale.
        reference_steps: steps of the converged solution (third-order DPM-Solver++, half-log-SNR grid).
        scores: name -> function of the images and their prompts, such as a reward model.
        batch_size: images per network call.
        progress: show progress bars.
        call: further arguments of the pipeline's call, such as ``height``.

    Raises:
        UserError: unknown solver or option, or seeds that don't match the prompts.
    """
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    schedulers = build(samplers, pipe.scheduler.config)

    def draw(scheduler: Any, n: int, label: str) -> Samples:
        return generate(
            pipe,
            prompts,
            seeds,
            steps=n,
            guidance=guidance,
            scheduler=scheduler,
            batch_size=batch_size,
            progress=label if progress else None,
            **call,
        )

    exact = make_scheduler("dpm-solver++", pipe.scheduler.config, solver_order=3, grid="logsnr")
    reference = draw(exact, reference_steps, "converged solution")
    coarser = draw(exact, reference_steps // 2, "converged solution, half the steps")
    result = Comparison(reference_error=float(relative_errors(coarser.latents, reference.latents).mean()))
    result.images["converged", reference_steps] = reference.images
    for name, scheduler in schedulers.items():
        for n in steps:
            start = time.perf_counter()
            drawn = draw(scheduler, n, f"{name}, {n} steps")
            seconds = (time.perf_counter() - start) / len(prompts)
            result.images[name, n] = drawn.images
            judged = {
                key: float(np.mean(np.asarray(score(drawn.images, prompts), dtype=float)))
                for key, score in (scores or {}).items()
            }
            errors = relative_errors(drawn.latents, reference.latents)
            pixels = float(np.abs(drawn.images.astype(float) - reference.images).mean())
            result.rows.append(
                Row(name, n, guidance, drawn.nfe, *_statistics(errors), pixels, seconds, judged)
            )
    return result


def compare_on_mixture(
    samplers: Mapping[str, Any] | Sequence[str],
    steps: Sequence[int],
    *,
    guidance: float = 1.0,
    samples: int = 16,
    seed: int = 0,
    mixture: GaussianMixture | None = None,
    config: Mapping[str, Any] = SD_SCHEDULER,
) -> Comparison:
    """The same comparison where the network is a formula and the answer is known to ten digits.

    Everything runs in float64 from the noisy end of the schedule, where a sampler may not begin: diffusers'
    default spacings start below it, which is part of their error, as it is on a real model.

    Args:
        samplers, steps: as in `compare_samplers`.
        guidance: classifier-free guidance scale towards one class per sample.
        samples: how many.
        seed: of the noise; sample i uses seed + i.
        mixture: the problem; by default six components in 4 x 8 x 8 dimensions.
        config: of a diffusers scheduler; gives the noise schedule. Stable Diffusion's by default.
    """
    mixture = mixture or GaussianMixture.random()
    schedule = NoiseSchedule.from_config(config)
    labels = np.unique(mixture.labels)
    target: dict[str, Any] = {
        "guidance_scale": guidance,
        "classes": [int(labels[i % len(labels)]) for i in range(samples)],
    }
    noise = torch.stack(
        [
            torch.randn(mixture.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
            for i in range(samples)
        ]
    )
    exact = mixture.solve(noise, schedule, **target)
    result = Comparison()
    for name, scheduler in build(samplers, config).items():
        kind = scheduler.config.get("prediction_type", "epsilon")
        network = mixture.model(schedule, prediction_type=kind, **target)
        for n in steps:
            calls = 0

            def counted(x: torch.Tensor, t: Any, network: Any = network) -> torch.Tensor:
                nonlocal calls
                calls += 1
                return network(x, t)

            start = time.perf_counter()
            with torch.no_grad():
                drawn = sample(counted, noise, scheduler, num_inference_steps=n)
            seconds = (time.perf_counter() - start) / samples
            found = _statistics(relative_errors(drawn, exact))
            result.rows.append(Row(name, n, guidance, calls, *found, None, seconds))
    return result


def _statistics(errors: torch.Tensor) -> tuple[float, float, float]:
    """Mean, its standard error, and median of (N,) errors."""
    values = errors.double()
    spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return values.mean().item(), spread, values.quantile(0.5).item()
