"""Killed runs go on as if nothing had happened; several processes do what one does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffalign import cli
from diffalign.errors import RunFailed
from diffalign.trainers import checkpoint
from diffalign.trainers.log import JsonLines, read

LORA = "pytorch_lora_weights.safetensors"
VOLATILE = ("step_seconds",)


@pytest.fixture
def arguments(model_folder, pairs_folder, shared_cache):
    """``arguments(folder, **options)``: the command line of a run."""

    def make(folder, **options):
        settings = {
            "pretrained_model_name_or_path": model_folder,
            "dataset_name": pairs_folder,
            "output_dir": folder,
            "cache_dir": shared_cache,
            "train_batch_size": 8,
            "max_train_steps": 12,
            "learning_rate": 1e-3,
            "rank": 4,
            "progress": "false",
        }
        return ["train", "diffusion-dpo", *(f"--{k}={v}" for k, v in (settings | options).items())]

    return make


def started_alone(command):
    """The command in a process that knows of no others yet but by its environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(command) == 0


def run(*command):
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def records(folder):
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in read(folder / "log.jsonl")]


def test_killed_and_resumed_is_bit_identical(tmp_path, arguments, trainer, model_folder, pairs_folder):
    options = {"use_ema": "true", "lr_warmup_steps": 4, "lr_scheduler": "cosine"}
    killed = tmp_path / "killed"
    command = arguments(killed, checkpointing_steps=3, **options)
    child = os.fork()  # a copy of this process has all libraries loaded
    if not child:
        with contextlib.suppress(BaseException):
            started_alone(command)
        os._exit(1)
    deadline = time.monotonic() + 240
    while not checkpoint.checkpoints(killed):
        assert not os.waitpid(child, os.WNOHANG)[0], "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (killed / LORA).exists()

    # In this process and not in a new one: what is compared must not depend on where it runs.
    same = {**options, "use_ema": True, "max_train_steps": 12}
    sources = {"model": model_folder, "dataset": str(pairs_folder)}
    resumed = trainer("killed", resume_from_checkpoint="latest", **sources, **same).train()
    whole = trainer("whole", **sources, **same).train()
    assert resumed.output_dir == killed
    wanted, got = load_file(whole.output_dir / LORA), load_file(killed / LORA)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert records(killed) == records(whole.output_dir)
    assert [record["step"] for record in records(killed)] == list(range(1, 13))


@pytest.mark.parametrize("use_adafactor", [False, True])
def test_all_weights_resume_bit_identically_against_the_first_reference(trainer, use_adafactor):
    options = {"rank": 0, "max_train_steps": 4, "use_adafactor": use_adafactor}
    whole = trainer("whole", **options).train().output_dir
    trainer("cut", checkpointing_steps=2, **options | {"max_train_steps": 2}).train()
    cut = trainer("cut", resume_from_checkpoint="checkpoint-2", **options).train().output_dir
    file = "unet/diffusion_pytorch_model.safetensors"
    wanted, got = load_file(whole / file), load_file(cut / file)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    # Reference errors in the log are those of the base model before and after.
    assert records(whole) == records(cut)


def test_torchrun_gives_the_result_of_one_process(tmp_path, arguments, trainer, model_folder, pairs_folder):
    trainer("one", model=model_folder, dataset=str(pairs_folder)).train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun does, but with copies of this process, which has all libraries loaded.
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_backend="c10d",
        max_restarts=0,
        start_method="fork",
    )
    command = arguments(tmp_path / "two", train_batch_size=4, max_train_steps=3)
    elastic_launch(launch, started_alone)(command)
    one, two = (read(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        # beta 2000 turns rounding of 1e-7 in an error into 1e-4 in a margin
        for name in ("loss", "grad_norm", "errors/chosen", "rewards/margins"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-3), name
    wanted, got = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "two" / LORA)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-4)


def test_auto_starts_at_the_beginning_where_nothing_is_to_resume(trainer):
    result = trainer(resume_from_checkpoint="auto").train()
    assert [r["step"] for r in records(result.output_dir)] == [1, 2, 3]


def test_a_checkpoint_is_a_lora_that_diffusers_loads(trainer, model_folder):
    from diffusers import StableDiffusionPipeline

    run = trainer(checkpointing_steps=3)
    folder = run.train().output_dir / "checkpoint-3"
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.load_lora_weights(folder)
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.p*"))


def test_a_checkpoint_of_another_kind_of_run_is_refused(trainer):
    from diffalign.errors import UserError

    trainer(checkpointing_steps=3).train()
    with pytest.raises(UserError, match=r"rank 4, this run has rank 8"):
        trainer(rank=8, resume_from_checkpoint="latest").train()
    with pytest.raises(UserError, match="no unet to resume from"):
        trainer(rank=0, resume_from_checkpoint="latest").train()


def test_a_partial_checkpoint_is_not_one(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".checkpoint-9.part").mkdir()

    def broken(folder):
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(RunFailed, match=r"checkpoint-7 was not written \(it is the first\).*disk full"):
        checkpoint.write(tmp_path, 7, broken, {})
    assert checkpoint.checkpoints(tmp_path) == []
    assert not (tmp_path / ".checkpoint-7.part").exists()
    done = checkpoint.write(tmp_path, 7, lambda folder: None, {"step": 7})
    assert checkpoint.checkpoints(tmp_path) == [done]
    assert checkpoint.read_state(done) == {"step": 7}


def test_going_back_sets_later_checkpoints_aside(trainer, caplog):
    trainer(checkpointing_steps=1, max_train_steps=3).train()
    run = trainer(checkpointing_steps=3, max_train_steps=2, resume_from_checkpoint="checkpoint-1")
    run.train()
    assert sorted(p.name for p in run.folder.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2.old",
        "checkpoint-3.old",
    ]
    assert "checkpoint-3 is from a later step than 1: now checkpoint-3.old" in caplog.text
    # A second time what was set aside before gives way, and latest is what the last run wrote.
    trainer(checkpointing_steps=1, max_train_steps=3, resume_from_checkpoint="latest").train()
    trainer(max_train_steps=2, resume_from_checkpoint="checkpoint-1").train()
    assert checkpoint.resolve("latest", run.folder) == run.folder / "checkpoint-1"
    assert (run.folder / "checkpoint-3.old" / checkpoint.STATE).is_file()


def test_rotation_keeps_the_newest(tmp_path):
    for step in (9, 10, 100):
        checkpoint.write(tmp_path, step, lambda folder: None, {})
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    checkpoint.rotate(tmp_path, 2)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [10, 100]


def test_the_log_drops_what_a_resumed_run_computes_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    log = JsonLines(path, last_step=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_the_reference_is_never_another_than_before(trainer, model_folder):
    """A pipeline trained in place would be its own reference, half trained: a bug known elsewhere."""
    from diffusers import StableDiffusionPipeline

    from diffalign.errors import UserError

    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    run = trainer(rank=0, model=pipe, checkpointing_steps=2, max_train_steps=2)
    run.train()
    with pytest.raises(UserError, match="started from other weights"):
        trainer(rank=0, model=pipe, resume_from_checkpoint="latest").train()
    lora = trainer("lora", max_train_steps=2, checkpointing_steps=2)
    lora.train()
    further = {"init_lora": str(lora.folder), "checkpointing_steps": 1, "max_train_steps": 1}
    trainer("more", **further).train()
    with pytest.raises(UserError, match="started from other weights"):
        trainer("more", resume_from_checkpoint="latest", max_train_steps=2).train()
    state = checkpoint.read_state(lora.folder / "checkpoint-2")
    assert (state["epoch"], state["examples"]) == (1.0, 16)
    assert state["data"] == lora.data_hash
    assert lora.data_hash in (lora.folder / "README.md").read_text()


def test_other_data_than_before_are_told(trainer, pairs, caplog):
    trainer(checkpointing_steps=2, max_train_steps=2).train()
    trainer(dataset=pairs[:8], resume_from_checkpoint="latest").train()
    assert "resuming on other data than before" in caplog.text
