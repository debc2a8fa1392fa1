"""What samplers believe on their way, as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffalign.bench.samplers import build, inference_steps
from diffalign.solvers import sample


def predicted_images(
    pipe: Any,
    solvers: Mapping[str, Any] | Sequence[Any],
    steps: int,
    prompt: str,
    *,
    seed: int = 0,
    guidance: float = 4.0,
) -> dict[str, np.ndarray]:
    """What each sampler believes the image to be, at every network evaluation on its way.

    Args:
        pipe: a text-to-image pipeline of a family that `diffalign.models` knows.
        solvers: as in `compare_samplers`.
        steps: network evaluations.
        prompt: what to draw.
        seed: of the starting noise.
        guidance: classifier-free guidance scale.

    Returns:
        name -> (evaluations, H, W, 3) uint8, the decoded data predictions.

    Raises:
        UserError: a pipeline class that no family knows.
    """
    from diffalign.calibrate.guided import guided_model, guided_network, starting_noise
    from diffalign.models import load_adapter
    from diffalign.pipelines.guidance import dynamic_shift
    from diffalign.solvers.prediction import convert

    adapter = load_adapter(pipe)
    kind, schedule = adapter.prediction_type, adapter.schedule
    network = guided_model(guided_network(adapter, [prompt], guidance_scale=guidance), [0])
    noise = starting_noise(adapter, [seed])
    found = {}
    for name, scheduler in build(solvers, pipe.scheduler.config).items():
        predictions: list[torch.Tensor] = []

        def model(x: torch.Tensor, t: Any, predictions: list[torch.Tensor] = predictions) -> torch.Tensor:
            output = network(x, t)
            alpha, sigma = (float(v) for v in schedule.alpha_sigma(float(t)))
            predictions.append(convert(output, x, alpha, sigma, source=kind, to="sample"))
            return output

        n, _ = inference_steps(scheduler, steps)
        with torch.no_grad():
            sample(model, noise, scheduler, num_inference_steps=n, mu=dynamic_shift(adapter))
            pixels = torch.cat([adapter.decode(one) for one in predictions])
        rounded = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        found[name] = rounded.permute(0, 2, 3, 1).cpu().numpy()
    return found
