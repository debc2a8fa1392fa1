"""Statistics: their file, its checks, and how they travel with schedulers and pipelines."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.solvers import DPMSolverV3Scheduler, NoiseSchedule, Statistics, UniPCScheduler
from diffalign.solvers.statistics import FILE, sampling_range


def make(betas, shape=(4, 1, 1), rows=9, seed=0):
    schedule = NoiseSchedule.from_config(betas)
    l, s, b = np.random.default_rng(seed).uniform(0, 0.1, (3, rows, *shape)).astype(np.float32)  # noqa: E741
    lambdas = np.linspace(*sampling_range(schedule), rows)
    return Statistics(lambdas, l + 0.9, s, b, schedule.fingerprint(), {"guidance_scale": 2.0})


def run(scheduler, shape=(1, 4, 8, 8)):
    x = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x)[0]
    return x


def test_save_and_load(sd_betas, tmp_path):
    scheduler = DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas))
    scheduler.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "scheduler_config.json").read_text())["statistics"]
    assert entry == {"file": FILE, "sha256": scheduler.statistics.sha256, "format": 1}
    assert {p.name for p in tmp_path.iterdir()} == {FILE, "scheduler_config.json"}
    loaded = DPMSolverV3Scheduler.from_pretrained(tmp_path)
    assert loaded.statistics.info == {"guidance_scale": 2.0}
    assert torch.equal(run(loaded), run(scheduler))
    assert DPMSolverV3Scheduler.from_pretrained(tmp_path, statistics=None).statistics is None


def test_a_pipeline_keeps_them(tiny_sd, sd_betas, tmp_path):
    from diffusers import StableDiffusionPipeline

    old = tiny_sd.scheduler
    try:
        tiny_sd.scheduler = DPMSolverV3Scheduler.from_config(old.config, statistics=make(sd_betas))
        tiny_sd.save_pretrained(tmp_path)
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
        assert torch.equal(run(loaded.scheduler), run(tiny_sd.scheduler))
    finally:
        tiny_sd.scheduler = old


def test_configs_in_memory_carry_them_and_json_does_not(sd_betas):
    first = DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas))
    assert DPMSolverV3Scheduler.from_config(first.config, solver_order=3).statistics is first.statistics
    through = UniPCScheduler.from_config(first.config)
    assert DPMSolverV3Scheduler.from_config(through.config).statistics is first.statistics
    assert copy.deepcopy(first).statistics is first.statistics
    bare = DPMSolverV3Scheduler.from_config(json.loads(first.to_json_string()))
    with pytest.raises(UserError, match=r"from_pretrained.*statistics=None"):
        bare.set_timesteps(5)
    assert DPMSolverV3Scheduler.from_config(bare.config, statistics=None).statistics is None


def test_damage_is_seen(sd_betas, tmp_path):
    scheduler = DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas))
    scheduler.save_pretrained(tmp_path)
    make(sd_betas, seed=1).save(tmp_path / FILE)
    with pytest.raises(UserError, match="hash differs"):
        DPMSolverV3Scheduler.from_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        Statistics.load(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="missing"):
        DPMSolverV3Scheduler.from_pretrained(tmp_path)


def test_another_schedule_is_refused(sd_betas):
    with pytest.raises(UserError, match="another noise schedule"):
        DPMSolverV3Scheduler(statistics=make(sd_betas))
    short = make(sd_betas)
    short = Statistics(short.lambdas[:-2], short.l[:-2], short.s[:-2], short.b[:-2])
    with pytest.raises(UserError, match="cover half log-SNR"):
        DPMSolverV3Scheduler(**sd_betas, statistics=short)


def test_shapes(sd_betas):
    whole = DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas, (4, 8, 8)))
    assert run(whole).shape == (1, 4, 8, 8)
    with pytest.raises(UserError, match=r"pooled\(\)"):
        run(whole, (1, 4, 16, 16))
    pooled = DPMSolverV3Scheduler(**sd_betas, statistics=whole.statistics.pooled())
    assert run(pooled, (1, 4, 16, 16)).shape == (1, 4, 16, 16)
    with pytest.raises(UserError, match="don't fit"):
        run(pooled, (1, 4, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"l": np.zeros((9, 4, 2, 1))}, "share the shape"),
        ({"s": np.full((9, 4, 1, 1), np.nan)}, "not finite"),
        ({"lambdas": np.arange(9.0) ** 2}, "uniform"),
        ({"lambdas": np.full(9, np.nan)}, "uniform"),
    ],
)
def test_bad_tables(sd_betas, change, words):
    good = make(sd_betas)
    with pytest.raises(UserError, match=words):
        Statistics(**{**good.arrays(), **change})


def test_tensors_of_half_precision_and_odd_info(sd_betas):
    good = make(sd_betas)
    half = {n: torch.tensor(v).bfloat16() for n, v in good.arrays().items() if n != "lambdas"}
    assert Statistics(good.lambdas, **half).l.dtype == np.float32
    with pytest.raises(UserError, match="plain JSON"):
        Statistics(good.lambdas, good.l, good.s, good.b, info={"model": object()}).record()


@pytest.mark.parametrize("header", ["[1]", '{"kind": "ems", "format": "x"}', '{"kind": "ems", "format": 1}'])
def test_headers_of_others(sd_betas, tmp_path, header):
    from safetensors.numpy import save_file

    save_file(make(sd_betas).arrays(), tmp_path / FILE, metadata={"diffalign": header})
    with pytest.raises(UserError, match=r"damaged|in format|incomplete"):
        Statistics.load(tmp_path / FILE)


def test_dtypes_that_numpy_lacks_are_refused(sd_betas, tmp_path):
    from safetensors.torch import save_file

    arrays = {n: torch.tensor(v).bfloat16() for n, v in make(sd_betas).arrays().items()}
    save_file(arrays, tmp_path / FILE, metadata={"diffalign": '{"kind": "ems", "format": 1}'})
    with pytest.raises(UserError, match="damaged"):
        Statistics.load(tmp_path / FILE)


def test_a_file_cut_anywhere_is_damaged(sd_betas, tmp_path):
    whole = make(sd_betas).to_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            Statistics.load(tmp_path / FILE)


def test_an_entry_that_names_no_file(sd_betas, tmp_path):
    DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas)).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["statistics"]["file"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'statistics' of scheduler_config.json.*statistics=None"):
        DPMSolverV3Scheduler.from_pretrained(tmp_path)


def test_another_class_keeps_the_file_beside_its_config(sd_betas, tmp_path):
    first = DPMSolverV3Scheduler(**sd_betas, statistics=make(sd_betas))
    UniPCScheduler.from_config(first.config).save_pretrained(tmp_path)
    assert DPMSolverV3Scheduler.from_pretrained(tmp_path).statistics.sha256 == first.statistics.sha256


def test_published_files(sd_betas, tmp_path):
    good = make(sd_betas)
    np.savez(tmp_path / "l.npz", l=good.l)
    np.savez(tmp_path / "sb.npz", s=good.s, b=good.b)
    schedule = NoiseSchedule.from_config(sd_betas)
    found = Statistics.from_npz(
        tmp_path / "l.npz", tmp_path / "sb.npz", schedule=schedule, guidance_scale=2.0
    )
    assert found.sha256 == good.sha256
    whole = (tmp_path / "sb.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:150] + b"0" * 40 + whole[190:]):
        (tmp_path / "sb.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="plain arrays"):
            Statistics.from_npz(tmp_path / "l.npz", tmp_path / "sb.npz", schedule=schedule)
    with pytest.raises(UserError, match="there is no file"):
        Statistics.from_npz(tmp_path / "nowhere.npz", tmp_path / "sb.npz", schedule=schedule)
    np.savez(tmp_path / "sb.npz", s=np.array([{}], dtype=object), b=good.b)
    with pytest.raises(UserError, match="plain arrays"):
        Statistics.from_npz(tmp_path / "l.npz", tmp_path / "sb.npz", schedule=schedule)
