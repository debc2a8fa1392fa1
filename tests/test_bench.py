"""Benchmarks: what they measure is what they say, and their files can be read back."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffalign.bench import gpu, record
from diffalign.bench.networks import SD_SCHEDULER, UNETS, tiny_pipeline
from diffalign.bench.record import command_line
from diffalign.bench.samplers import compare_on_mixture, compare_samplers, parse_spec, relative_errors
from diffalign.bench.samplers_report import SamplersConfig
from diffalign.bench.samplers_report import run as run_samplers
from diffalign.bench.step import PAIRS, StepConfig, compare_steps, count_syncs, traffic
from diffalign.bench.step import run as run_step
from diffalign.bench.train import LIMITS, METHODS, BenchTrainConfig, count, make_case, measure
from diffalign.bench.train import run as run_train
from diffalign.errors import UserError
from diffalign.solvers import SOLVERS


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


# ----------------------------------------------------------------------------------------------- samplers


def test_relative_errors_are_per_row():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(relative_errors(z * 1.5, z), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(relative_errors(z + torch.tensor([[0.0, 1.0]]), z), torch.tensor([0.2, 0.5]))


def test_specs():
    assert parse_spec("ddim") == ("ddim", {})
    spec = "dpm-solver++:solver_order=3,grid=karras,lower_order_final=false"
    assert parse_spec(spec) == (
        "dpm-solver++",
        {"solver_order": 3, "grid": "karras", "lower_order_final": False},
    )
    with pytest.raises(UserError, match="'eta' should be option=value"):
        parse_spec("ddim:eta")


def test_errors_on_the_mixture_fall_with_the_order_of_the_method():
    names = ["ddim:grid=logsnr", "dpm-solver++:solver_order=2,grid=logsnr"]
    result = compare_on_mixture(names, [10, 20], samples=4)
    error = {(row.sampler, row.steps): row.error for row in result.rows}
    first, second = (np.log2(error[name, 10] / error[name, 20]) for name in names)
    assert 0.8 < first < 1.3
    assert 1.7 < second < 2.6
    assert error[names[1], 20] < error[names[0], 20] / 5
    assert [row.nfe for row in result.rows] == [10, 20, 10, 20]
    assert result.reference_error == 0


def test_diffusers_schedulers_are_measured_as_a_user_would_use_them():
    samplers = {
        "euler": EulerDiscreteScheduler.from_config(SD_SCHEDULER),  # scales its input and its noise
        "karras": DPMSolverMultistepScheduler.from_config(SD_SCHEDULER, use_karras_sigmas=True),
        "v": DDIMScheduler.from_config(SD_SCHEDULER, prediction_type="v_prediction"),
        "eps": DDIMScheduler.from_config(SD_SCHEDULER),
    }
    errors = {row.sampler: row.error for row in compare_on_mixture(samplers, [30], samples=3).rows}
    assert errors["euler"] < 0.1
    assert errors["karras"] < 0.01
    assert errors["v"] == pytest.approx(errors["eps"], rel=1e-3)


def test_guidance_and_samples_do_not_depend_on_each_other():
    few = compare_on_mixture(["dpm-solver++"], [10], guidance=3.0, samples=1)
    plain = compare_on_mixture(["dpm-solver++"], [10], guidance=1.0, samples=1)
    assert few.rows[0].guidance == 3.0
    assert few.rows[0].error != plain.rows[0].error
    assert few.rows[0].error_se == 0
    assert few.rows[0].error == few.rows[0].error_median


def test_compare_samplers_on_a_pipeline(pipe):
    seen = []

    def brightness(images, prompts):
        seen.append((images.shape, tuple(prompts)))
        return images.mean(axis=(1, 2, 3)) / 255

    own = pipe.scheduler
    samplers = {
        "converged again": make("dpm-solver++:solver_order=3,grid=logsnr", pipe),
        "ddim": make("ddim", pipe),
    }
    result = compare_samplers(
        pipe,
        samplers,
        [3, 20],
        ["a", "b"],
        guidance=2.0,
        reference_steps=20,
        scores={"brightness": brightness},
        progress=False,
    )
    assert pipe.scheduler is own
    rows = {(row.sampler, row.steps): row for row in result.rows}
    again = rows["converged again", 20]
    assert again.error < 1e-5  # the yardstick's own settings
    assert again.pixel_error < 0.01
    assert rows["ddim", 3].error > rows["ddim", 20].error > 0
    assert rows["ddim", 3].nfe == 3
    assert 0 < result.reference_error < 1
    assert result.images["ddim", 3].shape == (2, 32, 32, 3)
    assert seen == [((2, 32, 32, 3), ("a", "b"))] * 4
    assert 0 < result.table()[0]["score/brightness"] < 1


def make(spec, pipe):
    from diffalign.bench.samplers import build

    return build([spec], pipe.scheduler.config)[spec]


def test_unknown_solvers_are_refused_before_any_sampling(pipe):
    with pytest.raises(UserError, match="unknown solver 'ddimm'; did you mean 'ddim'"):
        compare_samplers(pipe, ["ddimm"], [3], ["a"], progress=False)


def test_the_report_of_a_mixture(tmp_path, capsys):
    config = SamplersConfig(
        output_dir=str(tmp_path),
        solvers=["ddim", "DDIMScheduler"],
        steps=[4, 6],
        guidance=[1.0, 2.5],
        samples=2,
    )
    run_samplers(config)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "samplers.json",
        "samplers.md",
        "report.html",
        "error_guidance_1.png",
        "error_guidance_2.5.png",
    }
    found = json.loads((tmp_path / "samplers.json").read_text())
    assert len(found["rows"]) == 8
    assert found["settings"]["seed"] == 0
    assert "torch" in found["environment"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "--solvers ddim DDIMScheduler --steps 4 6 --guidance 1 2.5 --samples 2" in page
    assert 'src="http' not in page
    shown = capsys.readouterr().out
    assert "| 2.5 | DDIMScheduler |" in shown
    with pytest.raises(UserError, match="is not empty"):
        run_samplers(config)


def test_the_report_of_a_pipeline(pipe, tmp_path):
    folder = tmp_path / "tiny"
    pipe.save_pretrained(folder)
    config = SamplersConfig(
        model=str(folder),
        output_dir=str(tmp_path / "out"),
        solvers=["ddim"],
        steps=[2],
        guidance=[2.0],
        prompts=["a", "b"],
        reference_steps=6,
        device="cpu",
    )
    run_samplers(config)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # one sheet per prompt
    assert "the model's own converged solution" in page.replace("&#39;", "'")
    assert json.loads((tmp_path / "out" / "samplers.json").read_text())["reference_error"]["2.0"] > 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"solvers": []}, "--solvers is empty"),
        ({"steps": [0]}, "must be at least 1"),
        ({"steps": [150]}, "--reference_steps 200 is no yardstick for 150 steps"),
    ],
)
def test_senseless_comparisons_are_refused(options, part):
    with pytest.raises(UserError, match=part):
        SamplersConfig(**options)


def test_the_command_of_a_report_repeats_it():
    import shlex

    from diffalign import cli

    config = SamplersConfig(
        solvers=["dpm-solver++:solver_order=2"], prompts=["a red star", "b"], overwrite=True
    )
    words = shlex.split(command_line("bench samplers", config))
    assert words[:3] == ["diffalign", "bench", "samplers"]
    assert cli.parse(SamplersConfig, words[3:], prog="", example="") == config


# --------------------------------------------------------------------------------------------------- step


def test_step_rows(tmp_path):
    rows = run_step(
        StepConfig(output_dir=str(tmp_path), shapes=["1x4x8x8"], steps=13, repeats=3, device="cpu")
    )
    assert {row["solver"] for row in rows} >= {"ddim", "dpm-solver++ 2", "dpm-solver++ 3"}
    for row in rows:
        assert row["ours_us"] > 0
        assert row["ratio"] == pytest.approx(row["theirs_us"] / row["ours_us"])
        assert 0 < row["ratio_25"] <= row["ratio_75"]
        assert row["over_limit"] == pytest.approx(row["ours_us"] / row["limit_us"])
        assert row["graph"] is None
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == rows


def test_our_step_never_waits_for_the_device():
    rows = compare_steps([(1, 4, 8, 8)], steps=13, repeats=1, device=torch.device("cpu"), dtype=torch.float32)
    assert [row["ours_syncs"] for row in rows] == [0] * len(rows)
    assert max(row["theirs_syncs"] for row in rows) > 0  # the counter does count


def test_all_solvers_are_measured():
    measured = {pair.solver for pair in PAIRS}
    assert measured >= set(SOLVERS) - {"time-shift"}  # which runs one of the others


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.float64, 8)])
def test_traffic_counts_each_tensor_once(dtype, size):
    like = torch.zeros(10, dtype=dtype)
    kept = max(size, 4)
    ddim, second = SOLVERS["ddim"](), SOLVERS["dpm-solver++"](solver_order=2)
    for scheduler in (ddim, second):
        scheduler.set_timesteps(20)
    assert traffic(ddim.plan, like) == 30 * size  # sample, output, next sample
    # One prediction kept by 18 steps and read by 18: the step to the clean image is of first order.
    assert traffic(second.plan, like) == 30 * size + 10 * kept * 36 / 20


def test_syncs_are_counted():
    x = torch.ones(3)

    def ready():
        yield x.sum().item(), bool(x[0] > 0)
        yield x.nonzero(), x + 1

    assert count_syncs(ready, torch.device("cpu")) == 3


def test_too_few_steps_for_a_runge_kutta_start_are_refused():
    with pytest.raises(UserError, match="--steps must be at least 13"):
        StepConfig(steps=12)


@pytest.mark.parametrize("shape", ["4", "1x4x", "axb", "0x4"])
def test_shapes_are_checked(shape):
    with pytest.raises(UserError, match="takes sizes such as 1x4x64x64"):
        StepConfig(shapes=[shape])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_our_step_never_waits_for_the_gpu():
    rows = compare_steps(
        [(1, 4, 64, 64)], steps=20, repeats=2, device=torch.device("cuda"), dtype=torch.float16
    )
    assert [row["ours_syncs"] for row in rows] == [0] * len(rows)
    assert all(row["graph"] for row in rows)


# -------------------------------------------------------------------------------------------------- train


def test_a_dpo_step_costs_what_arithmetic_allows():
    """Goals: 1.50 x fine-tuning for LoRA, 1.36 x in full, 1.05 x with a cached reference."""
    for kind, goal in (("lora", 1.50), ("full", 1.36)):
        found = count("sd15", kind, BenchTrainConfig())
        assert 1.2 < found["dpo"]["operations"] < goal
        assert found["dpo-cached"]["operations"] < 1.05
        assert found["dpo-plain"]["operations"] > found["dpo"]["operations"] + 0.3
        assert found["dpo"]["activations"] < 1.01
        assert found["dpo-low-memory"]["operations"] == pytest.approx(found["dpo"]["operations"], rel=1e-6)
        assert found["dpo-low-memory"]["activations"] < 0.52
        assert {method: LIMITS.get((kind, method)) for method in ("dpo", "dpo-cached", "dpo-plain")} == {
            "dpo": goal,
            "dpo-cached": 1.05,
            "dpo-plain": None,
        }


def test_gradient_checkpointing_trades_operations_for_memory():
    plain = make_flops(BenchTrainConfig())
    checkpointed = make_flops(BenchTrainConfig(gradient_checkpointing=True))
    assert checkpointed > 1.2 * plain


def make_flops(config):
    return count("tiny", "full", config)["finetune"]["tflop"]


def test_methods_agree_where_policy_is_reference():
    """An untouched LoRA: every DPO loss is log 2, and its gradient is not zero."""
    case = make_case("tiny", "lora", BenchTrainConfig(), torch.device("cpu"))
    gradients = {}
    for method in ("dpo", "dpo-cached", "dpo-low-memory", "dpo-plain"):
        loss = case.steps[method]()
        assert loss.item() == pytest.approx(np.log(2), abs=2e-4 if method == "dpo-cached" else 1e-6), method
        gradients[method] = [p.grad for p in case.trainable]
        for p in case.trainable:
            p.grad = None
        assert max(g.abs().max() for g in gradients[method] if g is not None) > 0, method
    for one, two in zip(gradients["dpo"], gradients["dpo-low-memory"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_measured_ratios_are_to_fine_tuning():
    found = measure("tiny", "lora", BenchTrainConfig(repeats=2), torch.device("cpu"))
    assert set(found) == set(METHODS)
    assert found["finetune"]["time"] == 1.0
    assert all(row["time"] > 0 and row["peak_memory"] is None for row in found.values())


def test_train_rows(tmp_path, capsys):
    config = BenchTrainConfig(
        output_dir=str(tmp_path), networks=["tiny"], counted=["tiny"], train=["full"], repeats=1, device="cpu"
    )
    rows = run_train(config)
    assert [row["method"] for row in rows] == list(METHODS)
    assert json.loads((tmp_path / "train.json").read_text())["methods"] == METHODS
    assert "| tiny | full | dpo |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"networks": ["sd16"]}, "--networks knows no 'sd16'; did you mean 'sd15'"),
        ({"train": ["half"]}, "--train knows no 'half'"),
        ({"pairs": 0}, "--pairs must be at least 1"),
    ],
)
def test_train_options_are_checked(options, part):
    with pytest.raises(UserError, match=part):
        BenchTrainConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "millions"), [("sd15", 859.5), ("sdxl", 2567.5)])
def test_networks_have_the_published_size(size, millions):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**UNETS[size])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


# ------------------------------------------------------------------------------------------------- record


def test_tables():
    rows = [{"a": 1.23456, "b": None, "c": "x"}, {"a": 1e-7, "b": 3, "c": "y"}]
    assert record.markdown(rows).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1.235 | - | x |",
        "| 1e-07 | 3 | y |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path, capsys):
    assert gpu.main(tmp_path) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
