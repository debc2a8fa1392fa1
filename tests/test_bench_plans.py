"""The comparison of fitted samplers: fair cells, a run that goes on, a table that says what was missed."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch

from diffalign.bench import plans
from diffalign.bench.family import union
from diffalign.bench.networks import SD_SCHEDULER
from diffalign.bench.plans import Case, PlansConfig, contest, errors_of, mixture_problem, table, uncalibrated
from diffalign.cli import main
from diffalign.pipelines.load import make_scheduler
from diffalign.solvers import GaussianMixture, NoiseSchedule, sample, selection
from diffalign.solvers.calibrated import Table, Tables, trace
from diffalign.solvers.fitting import Problem, judge, solve
from diffalign.solvers.stepwise import stepwise

SCHEDULE = NoiseSchedule.from_config(SD_SCHEDULER)
SMALL = {
    "noises": 8,
    "held_out": 4,
    "test_noises": 6,
    "iterations": 2,
    "fits": 1,
    "trajectory": [0.5],
    "reference_steps": 12,
}


@pytest.fixture(autouse=True)
def few_schedulers(monkeypatch):
    monkeypatch.setattr(plans, "OURS", plans.OURS[:3])
    monkeypatch.setattr(plans, "GRIDS", ("auto", "karras"))
    monkeypatch.setattr(plans, "THEIRS", plans.THEIRS[:1])


def words(folder, *more):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    return ["bench", "plans", "--output_dir", str(folder), *options, "--problems", "mixture-0", *more]


def test_a_run_end_to_end_goes_on_with_more_seeds(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "plans"
    base = ["--steps", "3", "4", "--mixture_guidance", "1", "2"]
    assert main(words(folder, *base, "--seeds", "0")) == 0
    done = []
    whole = plans.measured
    monkeypatch.setattr(plans, "measured", lambda case, n: done.append((case.seed, n)) or whole(case, n))
    assert main(words(folder, *base, "--seeds", "0", "1")) == 0
    assert done == [(1, 3), (1, 4)] * 2
    found = json.loads((folder / "plans.json").read_text())
    assert len(found["rows"]) == 4
    assert len(found["cells"]) == 8
    assert {row["goal"] for row in found["rows"]} <= {"met", "missed"}
    for cell in found["cells"]:
        assert cell["tried"] >= 8
        assert 0 < cell["p90"] < 2
    with (folder / "plans.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert (folder / "plans.png").stat().st_size > 1000
    assert "best uncalibrated" in capsys.readouterr().out
    assert main(words(folder, *base, "--noises", "12")) == 2
    assert "other settings" in capsys.readouterr().err


def test_reduced_coordinates_are_the_mixture():
    """Errors of a solver on K + 1 numbers are its errors on the whole images."""
    mixture = GaussianMixture.random(seed=3)
    problem = mixture_problem(mixture, 3.0, 4, 5)
    times, weights = trace(make_scheduler("dpm-solver++", SD_SCHEDULER, final_sigmas_type="zero"), 6)
    found = judge(problem, solve(problem, 60), Table(times[:-1], weights), slice(0, 4))
    noise = torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).reshape(
        4, 4, 8, 8
    )
    labels = np.unique(mixture.labels)
    classes = [int(labels[i % len(labels)]) for i in range(4)]
    network = mixture.model(SCHEDULE, guidance_scale=3.0, classes=classes)
    end = mixture.solve(noise, SCHEDULE, t_end=SCHEDULE.t_min, guidance_scale=3.0, classes=classes)
    exact, _ = mixture._guided(end, *(float(v) for v in SCHEDULE.alpha_sigma(SCHEDULE.t_min)), 3.0, classes)
    drawn = sample(
        network,
        noise,
        make_scheduler("dpm-solver++", SD_SCHEDULER, final_sigmas_type="zero"),
        num_inference_steps=6,
    )
    wanted = (drawn - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-3, atol=1e-6)


def test_a_scheduler_is_judged_as_its_table_is():
    problem = mixture_problem(GaussianMixture.random(seed=0), 1.0, 6, 0)
    truth = solve(problem, 40)
    for name, build in uncalibrated(SD_SCHEDULER):
        found = errors_of(problem, truth.end, build, 5, "epsilon", None)
        assert found is not None, name
        scheduler = build()
        if type(scheduler).__module__.startswith("diffalign."):
            times, weights = trace(scheduler, 5)
            wanted = judge(problem, truth, Table(times[:-1], weights), slice(0, 6))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=name)


def test_the_contest_finds_the_best_of_all_and_counts_them(monkeypatch):
    """The winners on all noises, although most schedulers are tried on a few; doubles only once."""
    problem = mixture_problem(GaussianMixture.random(seed=0), 1.0, 64, 0)
    truth = solve(problem, 40)
    asked = []

    class Counted(type(problem)):
        def network(self, x, t, kind):
            asked.append(len(x))
            return super().network(x, t, kind)

    counted = Counted(problem.predict, problem.schedule, problem.noise)
    grids = ("auto", "karras", "logsnr", "time_uniform", "time_quadratic", "beta")
    builders = {
        f"{name} {grid}": partial(make_scheduler, name, SD_SCHEDULER, grid=grid, final_sigmas_type="zero")
        for name in ("dpm-solver++", "unipc", "dpm-solver")
        for grid in grids
    }
    builders["a double"] = builders["dpm-solver++ karras"]
    builders["broken"] = lambda: [][0]
    every = {
        name: found
        for name, build in builders.items()
        if (found := errors_of(problem, truth.end, build, 5, "epsilon", None)) is not None
    }
    found, tried = contest(counted, truth.end, builders, 5, "epsilon", None)
    assert tried == len(builders) - 1
    for measure in (np.mean, lambda errors: np.quantile(errors, 0.9)):
        best = min(every, key=lambda name: measure(every[name]))
        assert best in found
        np.testing.assert_allclose(found[best], every[best], rtol=1e-6)
    assert "a double" not in found
    assert sum(asked) < 0.7 * 5 * 64 * len(every)


def test_schedulers_of_flow_models_take_part():
    """diffusers' have neither an initial scale nor a scaling of the network's input."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    flow = NoiseSchedule.from_config(config)
    problem = Problem(lambda x, t, alpha, sigma, rows: 0.3 * x, flow, noise)
    found = {
        name: errors_of(problem, torch.ones_like(noise), build, 5, "flow_prediction", None)
        for name, build in uncalibrated(config)
    }
    assert found["FlowMatchEulerDiscrete"] is not None
    assert not [name for name, errors in found.items() if errors is None]


def test_no_scheduler_gets_more_evaluations_than_the_plan():
    problem = mixture_problem(GaussianMixture.random(seed=0), 1.0, 2, 0)
    truth = solve(problem, 20)
    asked = []
    network = type(problem).network

    class Counted(type(problem)):
        def network(self, x, t, kind):
            asked.append(float(t))
            return network(self, x, t, kind)

    counted = Counted(problem.predict, problem.schedule, problem.noise)
    heun = make_scheduler("HeunDiscreteScheduler", SD_SCHEDULER)
    assert errors_of(counted, truth.end, lambda: heun, 5, "epsilon", None) is not None
    assert heun.num_inference_steps == 3  # 2 x 3 - 1 evaluations
    assert errors_of(counted, truth.end, lambda: 1 / 0, 5, "epsilon", None) is None


def test_fit_and_test_share_no_noise_and_seeds_differ():
    config = PlansConfig(**SMALL)
    noises = [
        case._problem(held_out=held_out).noise
        for case in (Case(config, "mixture-0", 1.0, 0), Case(config, "mixture-0", 1.0, 1))
        for held_out in (False, True)
    ]
    firsts = [noise[0] for noise in noises]
    assert len({tuple(one.tolist()) for one in firsts}) == 4


def test_a_family_shares_one_table_and_is_judged_on_others(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "plans"
    family = ["--family", "mixture-1", "mixture-2", "--family_guidance", "1", "3", "--steps", "3"]
    fitted, judged = [], []
    whole, look = plans.calibrated, plans.judge
    beside = []
    search = selection.calibrate
    monkeypatch.setattr(
        selection, "calibrate", lambda *a, **k: beside.append(k["decoupled"]) or search(*a, **k)
    )
    monkeypatch.setattr("diffalign.bench.family.calibrated", lambda f, n: fitted.append(n) or whole(f, n))
    monkeypatch.setattr(
        plans, "judge", lambda p, t, table, rows: judged.append(table) or look(p, t, table, rows)
    )
    assert main(words(folder, *family, "--mixture_guidance", "2", "4", "--seeds", "0")) == 0
    assert fitted == [3]
    (found,) = (folder / "cells").glob("family-*")
    kept = Tables.load(found).of(3)
    assert [table.times.tolist() for table in judged] == [kept.times.tolist()] * 2
    assert kept.info["noises"] == 2 * 2 * SMALL["noises"]
    assert not any(beside)  # what another model is told is its own affair
    rows = json.loads((folder / "plans.json").read_text())["rows"]
    assert [row["goal"] == "met" for row in rows] == [
        row["ratio p90"] <= 1 >= row["ratio mean"] for row in rows
    ]
    # A further problem is judged with the table that is there.
    assert main(words(folder, "mixture-5", *family, "--mixture_guidance", "2", "--seeds", "0")) == 0
    assert fitted == [3]
    assert len(judged) == 3
    capsys.readouterr()


def test_a_union_is_its_members():
    """Rows, states and errors are those of the problems themselves, whatever their shapes and precisions."""
    schedule = SCHEDULE
    generator = torch.Generator().manual_seed(0)
    square = Problem(
        lambda x, t, alpha, sigma, rows: (
            x * alpha + torch.arange(rows.start, rows.stop)[:, None, None] * sigma
        ).tanh(),
        schedule,
        torch.randn(6, 2, 3, generator=generator),
        batch_size=4,
        held_out=2,
    )
    mixture = mixture_problem(GaussianMixture.random(seed=3), 2.0, 5, 1, held_out=3)
    both = union([square, mixture])
    assert [both.parts[0].stop, both.parts[1].stop] == [4 + 2, 11]
    assert both.noise.dtype == torch.float64
    truth, alone = solve(both, 12), [solve(one, 12) for one in (square, mixture)]
    times, weights = trace(make_scheduler("unipc", SD_SCHEDULER, final_sigmas_type="zero"), 4)
    table = Table(times[:-1], weights)
    found = judge(both, truth, table, slice(0, 11))
    own = [
        judge(one, t, table, slice(0, len(one.noise)))
        for one, t in zip((square, mixture), alone, strict=True)
    ]
    np.testing.assert_allclose(found[[0, 1, 2, 3, 6, 7]], own[0], rtol=1e-4)
    np.testing.assert_allclose(found[[4, 5, 8, 9, 10]], own[1], rtol=1e-9)
    assert len(stepwise(both, truth, times[:-1])) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--family", "mixture-0"], "--problems has mixture-0 of --family"),
        (["--family", "mixture-x"], "--family: a mixture is named by its seed"),
        (["--family", "[]"], "--family is empty"),
        (["--family", "mixture-1", "--family_guidance", "0"], "--family_guidance must be 1 or more"),
        (
            ["playground/flow", "--family", "mixture-1"],
            "playground/flow has another noise schedule than mixture-1",
        ),
    ],
)
def test_families_that_cannot_be_are_refused(tmp_path, capsys, options, said):
    assert main(words(tmp_path / "x", *options)) == 2
    assert said in capsys.readouterr().err


def test_a_run_from_before_an_option_goes_on(tmp_path):
    base = ["--steps", "3", "--mixture_guidance", "1", "--seeds", "0"]
    assert main(words(tmp_path, *base)) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    older = {name: value for name, value in settings.items() if not name.startswith("family")}
    (tmp_path / "settings.json").write_text(json.dumps(older))
    assert main(words(tmp_path, *base, "--family", "mixture-1")) == 2
    assert main(words(tmp_path, *base)) == 0


def cell(seed, plan, best, **more):
    known = {"problem": "mixture-0", "guidance": 1.0, "steps": 5, "best_p90": "x", "best_mean": "x"}
    numbers = {"p90": best, "mean": best, "plan_p90": plan, "plan_mean": plan, "plan_far": 0.0}
    return known | numbers | {"seed": seed} | more


@pytest.mark.parametrize(
    ("problem", "plan", "goal"),
    [("mixture-0", 0.24, "met"), ("mixture-0", 0.3, "missed"), ("playground/sd", 0.45, "met")],
)
def test_the_table_says_what_was_missed(problem, plan, goal):
    rows = table([cell(0, plan, 1.0, problem=problem), cell(1, 4 * plan, 4.0, problem=problem)])
    assert len(rows) == 1
    assert rows[0]["ratio p90"] == pytest.approx(plan)
    assert rows[0]["p90"] == pytest.approx(2.0)
    assert rows[0]["goal"] == goal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--problems", "mixture-x"], "a mixture is named by its seed"),
        (["--steps", "1"], "must be 2 or more"),
        (["--problems", "mixture-0", "nowhere"], "no model at 'nowhere'"),
        (["--mixture_guidance", "0.5"], "must be 1 or more"),
        (["--noises", "2"], "noises must be at least 4"),
        (["--held_out", "1152"], "held_out must be at least 1 and below --noises"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, options, said):
    assert main(["bench", "plans", "--output_dir", str(tmp_path / "x"), *options]) == 2
    assert said in capsys.readouterr().err
