"""``diffalign bench grids``: the reduced problem is the whole one, and the report says what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from diffalign.bench import grids
from diffalign.bench.grids import GridsConfig, Point, reduced, schedulers, summary
from diffalign.errors import UserError
from diffalign.solvers import GaussianMixture, NoiseSchedule, sample


@pytest.mark.parametrize("name", ["sd", "zero snr", "flow"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_reduced_problem_has_the_errors_of_the_whole(name, scale):
    options = grids.SCHEDULES[name]
    schedule = NoiseSchedule.from_config(options)
    kind = options.get("prediction_type", "epsilon")
    mixture = GaussianMixture.random((2, 4, 4), components=5, classes=2, spread=0.5, seed=1)
    noise, network = reduced(mixture, schedule, kind, [scale], 4, seed=2)
    whole = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = mixture.model(schedule, prediction_type=kind, guidance_scale=scale, classes=[0, 1, 0, 1])
    for scheduler in list(schedulers(options, 3).values())[:3]:
        small = sample(network, noise, scheduler, num_inference_steps=5)
        large = sample(model, whole.reshape(4, 2, 4, 4), scheduler, num_inference_steps=5)
        torch.testing.assert_close(
            small.double().flatten(1).norm(dim=1), large.double().flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5
        )


def test_the_exact_solution_is_where_many_steps_end():
    options = grids.SCHEDULES["sd"]
    schedule = NoiseSchedule.from_config(options)
    mixture = GaussianMixture.random((2, 4, 4), seed=1)
    noise, network = reduced(mixture, schedule, "epsilon", [1.0], 3, seed=0)
    whole = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = mixture.solve(whole.reshape(3, 2, 4, 4), schedule, guidance_scale=1.0, classes=[0, 1, 2])
    found = grids._exact(network, noise, schedule, options)
    torch.testing.assert_close(found.norm(dim=2)[:, 0], known.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_ratios_and_their_summary():
    errors = {"auto": 0.2, "diffusers linspace/zero": 0.4, "diffusers karras/zero": 0.1}
    points = [
        Point("a", 2, 5, 1.0, {**errors, "same solver karras/zero": 0.2}, 0.01),
        Point("b", 2, 5, 1.0, {**errors, "auto": 0.05, "same solver karras/zero": 0.2}, 0.01),
    ]
    assert points[0].ratio() == pytest.approx(2.0)
    (row,) = summary(points)
    assert (row["points"], row["above 1.1"], row["geometric mean"], row["worst"]) == (
        2,
        "50 %",
        "1.00",
        "2.0",
    )
    assert row["same solver: above 1.1"] == "0 %"
    assert row["better than diffusers' default, median"] == "5.0"


def test_the_report(tmp_path, capsys):
    options = {"orders": [2], "steps": [4, 6], "guidance": [1.0, 4.0], "samples": 2, "mixtures": 1}
    points = grids.run(GridsConfig(**options, schedules=["sd", "flow"], output_dir=str(tmp_path)))
    assert len(points) == 2 * 2 * 2
    assert {len(p.errors) for p in points} == {1 + 2 * 14, 1 + 2 * 2}
    record = json.loads((tmp_path / "grids.json").read_text())
    assert record["rows"][0]["errors"] == points[0].errors
    assert "geometric mean" in capsys.readouterr().out
    figure = (tmp_path / "grids.svg").read_text()
    assert ">karras<" in figure
    assert len(figure) < 100_000


def test_a_pipeline(tiny_folder, tmp_path):
    config = GridsConfig(
        model=tiny_folder,
        orders=[2],
        steps=[2],
        guidance=[1.0],
        prompts=["a", "b"],
        reference_steps=6,
        device="cpu",
        output_dir=str(tmp_path / "out"),
    )
    (point,) = grids.run(config)
    assert point.problem == config.model
    assert len(point.errors) == 1 + 2 * 14
    assert all(0 < error < 100 for error in point.errors.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"orders": [4]}, "--orders"),
        ({"steps": []}, "--steps is empty"),
        ({"schedules": ["sdd"]}, "did you mean 'sd'"),
        ({"mixtures": 9}, "--mixtures"),
        ({"samples": 1}, "--samples"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        GridsConfig(**options)
