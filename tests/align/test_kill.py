"""A run is killed at every kind of moment, or its disk is full: what it resumes from is always whole, and it
ends with the weights and the log of an undisturbed run, to the bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import RunFailed
from diffalign.trainers import checkpoint
from diffalign.trainers.log import read

LORA = "pytorch_lora_weights.safetensors"
KILLS = 20
OPTIONS = {
    "max_train_steps": 10,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "use_ema": True,
}


@pytest.fixture
def whole(trainer):
    """An undisturbed run and the seconds that it took."""
    started = time.monotonic()
    folder = trainer("whole", **OPTIONS).train().output_dir
    return folder, time.monotonic() - started


def fork(work):
    """Do ``work`` in a copy of this process, which has all libraries loaded; returns the id of the copy."""
    if child := os.fork():
        return child
    code = 1
    with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        work()
        code = 0
    os._exit(code)


def after(seconds):
    """A killer that waits outside."""

    def kill(child):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    return kill


def at_operation(number, folder):
    """Kill this process when it is about to do something to files of ``folder`` for so many times."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        inside = any(str(folder) in str(argument) for argument in arguments[:2])
        # Folders are emptied by names relative to them.
        if event in ("os.remove", "os.rmdir") or (inside and event.startswith(("open", "os.", "shutil."))):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def all_whole(folder):
    """Every checkpoint can be read from its first to its last byte; returns the step of the newest."""
    found = checkpoint.checkpoints(folder)
    for path in found:
        state = checkpoint.read_state(path)
        assert state["step"] == checkpoint.step_of(path)
        assert load_file(path / LORA)
        moments = load_file(path / checkpoint.OPTIMIZER)
        assert len(moments) == 3 * len(load_file(path / "ema.safetensors"))
    return checkpoint.step_of(found[-1]) if found else 0


def assert_same(folder, wanted):
    mine, theirs = load_file(folder / LORA), load_file(wanted / LORA)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    logs = ([{**record, "step_seconds": 0} for record in read(f / "log.jsonl")] for f in (folder, wanted))
    assert next(logs) == next(logs)
    assert not list(folder.glob(".*"))


def test_killed_at_random_moments(trainer, whole, tmp_path):
    wanted, duration = whole
    moments = random.Random(0)
    kills = runs = newest = 0
    while kills < KILLS:
        folder = tmp_path / f"killed{runs}"
        run = trainer(folder.name, resume_from_checkpoint="auto", **OPTIONS)
        ended = after(moments.uniform(0, duration))(fork(run.train))
        step = all_whole(folder)
        assert step >= newest
        newest = step
        if ended:
            assert_same(folder, wanted)
            runs, newest = runs + 1, 0
        kills += not ended
    run = trainer(folder.name, resume_from_checkpoint="auto", **OPTIONS)
    run.train()
    assert_same(run.folder, wanted)


def test_killed_between_any_two_operations_on_files(trainer, whole, tmp_path):
    """One step further each time, through writing, renaming and deleting of checkpoints, and to the end."""
    wanted, _ = whole
    folder, number, steps = tmp_path / "killed", 1, []
    while True:

        def work(number=number):
            run = trainer("killed", resume_from_checkpoint="auto", **OPTIONS)
            at_operation(number, folder)
            run.train()

        _, status = os.waitpid(fork(work), 0)
        steps.append(all_whole(folder))
        assert steps == sorted(steps)
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        number += 5
    assert len(steps) > 12
    assert_same(folder, wanted)


# -------------------------------------------------------------------- no space


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(bytes)``: a folder on a disk of its own of that size, or of another from now on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def make(size):
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs more rights")
        mounted = True
        return folder

    yield make
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(trainer, whole, small_disk):
    wanted, _ = whole
    size = sum(path.stat().st_size for path in (wanted / "checkpoint-10").rglob("*") if path.is_file())
    options = OPTIONS | {"checkpoints_total_limit": None}
    folder = small_disk(int(3.5 * size)) / "run"
    with pytest.raises(RunFailed, match=r"was not written .*latest goes on from checkpoint-.*no space left"):
        trainer(output_dir=str(folder), **options).train()
    assert all_whole(folder) >= 1
    assert not list(folder.glob(".*"))
    small_disk(50 * size)
    trainer(output_dir=str(folder), resume_from_checkpoint="latest", **options).train()
    assert_same(folder, wanted)


@pytest.mark.parametrize("file", [LORA, checkpoint.OPTIMIZER, "ema.safetensors", checkpoint.STATE])
def test_whichever_file_is_the_first_that_finds_no_space(trainer, monkeypatch, file):
    run = trainer(**OPTIONS | {"max_train_steps": 3, "checkpoints_total_limit": None})
    flush = checkpoint._flush

    def full(path):
        if "checkpoint-2" in str(path) and path.name == file:
            raise OSError(28, "No space left on device", str(path))
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(
        RunFailed, match=rf"checkpoint-2 was not written .*checkpoint-1.*no space left .*{file}"
    ):
        run.train()
    assert all_whole(run.folder) == 1
    assert json.loads((run.folder / "checkpoint-1" / checkpoint.STATE).read_text())["step"] == 1
