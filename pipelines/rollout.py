"""Sample with a stochastic sampler and keep every state that the network saw, or with any scheduler and keep
the images: what on-policy methods learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import UserError
from diffalign.likelihood import LAWS, Transition
from diffalign.models.base import EmptyCaption, ModelAdapter
from diffalign.pipelines.guidance import Guidance, dynamic_shift
from diffalign.solvers.ddim import DDIMScheduler
from diffalign.solvers.sampling import sample

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(kw_only=True)
class SamplerConfig:
    """How trajectories are sampled, whoever learns from them.

    Args:
        images_per_prompt: images of each prompt.
        same_start: the images of a prompt start from the same noise.
        sample_batch_size: images per network call while sampling.
        sample_steps: network evaluations per image.
        sample_guidance: classifier-free guidance, in sampling and in training alike; 1 for none.
        sample_timesteps: where the network is asked, instead of sample_steps places that the pipeline's
            scheduler would take.
        sample_spacing: leading, trailing or linspace, instead of the spacing in the scheduler's config.
        sample_end: the time where the last step ends, instead of the clean latent; at 0, where diffusers'
            DDIM ends with Stable Diffusion, the last step still adds noise and can be learnt from.
        transition: how a step draws its next state: ddim, euler_ancestral, renoise or flow_sde.
        transition_options: eta of ddim, noise_level of flow_sde.
        empty_caption: what guidance steers away from: the pipeline's own unconditional input (as_pipeline),
            the encoded empty string (encode) or zeros.
    """

    images_per_prompt: int = 2
    same_start: bool = False
    sample_batch_size: int = 8
    sample_steps: int = 20
    sample_guidance: float = 5.0
    sample_timesteps: list[float] = field(default_factory=list)
    sample_spacing: str | None = None
    sample_end: float | None = None
    transition: str = "ddim"
    transition_options: dict[str, float] = field(default_factory=dict)
    empty_caption: EmptyCaption = "as_pipeline"

    def check_sampler(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: names the option, its value and what is allowed.
        """
        for name in ("images_per_prompt", "sample_batch_size", "sample_steps"):
            self._must(name, getattr(self, name) >= 1, "at least 1")
        self._must("sample_guidance", self.sample_guidance >= 0, "0 or more")
        self._must("transition", self.transition in LAWS, f"one of {', '.join(LAWS)}")
        spacings = (None, *SPACINGS)
        self._must("sample_spacing", self.sample_spacing in spacings, f"one of {', '.join(SPACINGS)}")

    def _must(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{name} must be {allowed}, but is {getattr(self, name)!r}")


def sampling_times(
    adapter: ModelAdapter, steps: int, spacing: str | None = None, *, resolution: int | None = None
) -> NDArray[np.float64]:
    """``(steps + 1,)``: where the network is asked, as the pipeline's own scheduler config spaces it, and the
    clean end.

    Args:
        spacing: ``leading``, ``trailing`` or ``linspace`` instead of the config's.
        resolution: side of the images in pixels, on which the times of some flow models depend.

    Raises:
        UserError: more steps than the model has, or a size that it cannot draw.
    """
    changes = {"timestep_spacing": spacing} if spacing else {}
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config, grid="diffusers", **changes)
    scheduler.set_timesteps(steps, mu=dynamic_shift(adapter, resolution=resolution))
    return np.append(scheduler.timesteps.numpy().astype(np.float64), adapter.schedule.t_clean)


def transition_for(
    adapter: ModelAdapter, config: SamplerConfig, *, resolution: int | None = None
) -> Transition:
    """The steps of the sampler that ``config`` describes, for this model and size of image.

    Raises:
        UserError: times that don't fall, a transition that does not fit the model.
    """
    times = (
        np.array([*config.sample_timesteps, adapter.schedule.t_clean])
        if config.sample_timesteps
        else sampling_times(adapter, config.sample_steps, config.sample_spacing, resolution=resolution)
    )
    if config.sample_end is not None:
        times = np.append(times[:-1], config.sample_end)
    return Transition.along(
        adapter.schedule,
        adapter.prediction_type,
        times,
        law=config.transition,
        **config.transition_options,
    )


def stochastic(transition: Transition, config: SamplerConfig) -> Transition:
    """The same steps, if one of them at least adds noise and so has a likelihood.

    Raises:
        UserError: none does.
    """
    if not len(transition.stochastic):
        raise UserError(
            f"none of the {len(transition)} steps adds noise (transition {config.transition}, "
            f"options {config.transition_options}), so none has a likelihood to learn from: use more "
            "steps, or ddim with eta above 0"
        )
    return transition


def sampler_settings(config: SamplerConfig, resolution: int | None, transition: Transition) -> dict[str, Any]:
    """What a policy that learns from trajectories must share with the one that sampled them, as JSON
    values."""
    names = ("images_per_prompt", "sample_guidance", "transition", "transition_options", "sample_end")
    options = asdict(config)
    shared = {name: options[name] for name in (*names, "empty_caption", "prompt_windows")}
    return shared | {"resolution": resolution, "timesteps": transition.timesteps.tolist()}


class RowNoise:
    """Standard normal noise that row by row depends on a seed alone, not on the batch or device."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self._shape, self._device = tuple(shape), device

    def draw(self, *leading: int) -> Tensor:
        """``(*leading, rows, *shape)`` float32 on the device."""
        drawn = [torch.randn(*leading, *self._shape, generator=g) for g in self._generators]
        return torch.stack(drawn, dim=len(leading)).to(self._device, non_blocking=True)

    def choose(self, count: int) -> Tensor:
        """``(rows,)``, one of 0 .. count - 1 for each row."""
        chosen = [torch.randint(count, (), generator=g) for g in self._generators]
        return torch.stack(chosen).to(self._device, non_blocking=True)


@torch.no_grad()
def rollout(
    adapter: ModelAdapter,
    transition: Transition,
    guidance: Guidance,
    prompts: Sequence[int],
    *,
    shape: Sequence[int],
    start_seeds: Sequence[int],
    seeds: Sequence[int],
    batch_size: int = 8,
    after_step: Callable[[], object] = lambda: None,
    keep_means: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Trajectories of one image per row.

    A state is rounded to the network's precision before it is used, so what is kept is exactly what the
    network saw: re-evaluating the same policy on it gives log-ratio 0.

    Args:
        adapter, transition, guidance: the policy.
        prompts: which of the guidance's prompts, per row.
        shape: of one latent.
        start_seeds: of each row's starting noise; equal seeds start alike.
        seeds: of each row's steps.
        batch_size: rows at a time.
        after_step: called after every network call.
        keep_means: also keep the mean of each step, ``(rows, n, ...)`` float32: what a policy gradient
            compares with once the policy has moved on.

    Returns:
        States ``(rows, n + 1, ...)`` in host memory, in the network's precision, from noise to image; and the
        means, or None.
    """
    device = adapter.device
    states, means = [], []
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        x = RowNoise(start_seeds[batch], shape, device).draw().to(adapter.dtype)
        noise = RowNoise(seeds[batch], shape, device)
        seen, expected = [x], []
        for step in range(len(transition)):
            raw = guidance.predict(adapter, x, transition.times(step, x), prompts[batch])
            gaussian = transition(raw, x, step)
            # Drawn also where a step takes no noise, so that the numbers of the others don't depend on it.
            x = gaussian.sample(noise.draw()).to(adapter.dtype)
            seen.append(x)
            if keep_means:
                expected.append(gaussian.mean)
            after_step()
        states.append(torch.stack(seen, 1).cpu())
        if keep_means:
            means.append(torch.stack(expected, 1).cpu())
    return torch.cat(states), torch.cat(means) if keep_means else None


@torch.no_grad()
def finished(
    adapter: ModelAdapter,
    scheduler: Any,
    guidance: Guidance,
    prompts: Sequence[int],
    *,
    shape: Sequence[int],
    start_seeds: Sequence[int],
    seeds: Sequence[int],
    batch_size: int = 8,
    after_step: Callable[[], object] = lambda: None,
    **grid: Any,
) -> Tensor:
    """The latents at which any diffusers-like scheduler ends, one image per row.

    Args:
        scheduler: a row depends on its seeds alone if the scheduler has no noise, or draws it with the
            generators that ``step`` is given, as all of :data:`diffalign.solvers.SOLVERS` do.
        grid: ``num_inference_steps`` or ``timesteps``, and ``mu``, as of
            :func:`~diffalign.solvers.sampling.sample`.
        adapter, guidance, prompts, shape, start_seeds, seeds, batch_size, after_step: as in :func:`rollout`,
            whose starting noise is the same.

    Returns:
        ``(rows, ...)`` in host memory, in the network's precision.
    """
    found = []

    def passed(*_: object) -> None:
        after_step()

    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)

        def network(x: Tensor, t: Tensor, rows: Sequence[int] = prompts[batch]) -> Tensor:
            return guidance.predict(adapter, x, t.to(x.device).expand(len(x)), rows)

        latents = sample(
            network,
            RowNoise(start_seeds[batch], shape, adapter.device).draw(),
            scheduler,
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds[batch]],
            callback=passed,
            **grid,
        )
        found.append(latents.to("cpu", adapter.dtype))
    return torch.cat(found)


@torch.no_grad()
def decoded(adapter: ModelAdapter, latents: Tensor, batch_size: int = 8) -> Tensor:
    """Images ``(rows, 3, H, W)`` float32 in [0, 1] in host memory."""
    chunks = [
        adapter.decode(chunk.to(adapter.device)).float().div(2).add(0.5).clamp(0, 1).cpu()
        for chunk in latents.split(batch_size)
    ]
    return torch.cat(chunks)
