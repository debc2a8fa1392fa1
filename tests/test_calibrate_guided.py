"""The network that calibrations see is the one that the pipeline runs, size, guidance and shift included."""

from __future__ import annotations

import pytest
import torch

from diffalign.calibrate.guided import guided_model, guided_network, starting_noise
from diffalign.errors import UserError
from diffalign.models import load_adapter
from diffalign.pipelines.generate import generate
from diffalign.pipelines.guidance import dynamic_shift
from diffalign.solvers import DPMSolverPPScheduler, sample
from tests.align import families

SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 30.0}


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("shift", [{}, SHIFT])
def test_flow_families(family, shift):
    pipe = getattr(families, family)()
    for part in pipe.components.values():  # no dropout, as after from_pretrained
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    adapter = load_adapter(pipe)
    prompts, seeds = ["a", "b"], [3, 4]
    scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    mu = dynamic_shift(adapter)
    assert (mu is not None) == bool(shift)
    model = guided_model(guided_network(adapter, prompts, guidance_scale=3.0), range(2), batch_size=1)
    with torch.no_grad():
        ours = sample(model, starting_noise(adapter, seeds), scheduler, num_inference_steps=3, mu=mu)
    times = scheduler.timesteps.tolist()
    size = {"height": adapter.default_resolution, "width": adapter.default_resolution}
    theirs = generate(pipe, prompts, seeds, steps=3, guidance=3.0, scheduler=scheduler, **size).latents
    assert times == scheduler.timesteps.tolist()
    if family == "flux":
        theirs = pipe._unpack_latents(theirs, size["height"], size["width"], pipe.vae_scale_factor)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_distilled_guidance_is_told_and_costs_nothing():
    adapter = load_adapter(families.flux())
    rows = []
    forward = adapter.forward
    adapter.forward = lambda network, x, t, cond: rows.append(len(x)) or forward(network, x, t, cond)
    x, items = starting_noise(adapter, [0, 1]), torch.tensor([0, 1])
    with torch.no_grad():
        outputs = [
            guided_network(adapter, ["a", "b"], guidance_scale=scale)(x, 500.0, items) for scale in (1.0, 4.0)
        ]
    assert rows == [2, 2]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(("family", "unit"), [("sdxl", 8), ("sd3", 8), ("flux", 16)])
def test_sizes_that_the_model_cannot_draw(family, unit):
    adapter = load_adapter(getattr(families, family)())
    unit = unit // 8 * adapter.pipeline.vae_scale_factor
    assert adapter.latent_shape(4 * unit)[1:] == (4 * unit // adapter.pipeline.vae_scale_factor,) * 2
    for side in (4 * unit + 1, 4 * unit + unit // 2, 0, -unit):
        with pytest.raises(UserError, match=f"resolution must be a multiple of {unit} "):
            adapter.latent_shape(side)
