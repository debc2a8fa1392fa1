"""Methods that gather over processes, or share the sampling: two processes train as one does."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.trainers import (
    DDOConfig,
    DDOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    FlowRWRConfig,
    FlowRWRTrainer,
    ListDPOConfig,
    ListDPOTrainer,
    SePPOConfig,
    SePPOTrainer,
)
from tests.align.conftest import picture
from tests.align.test_distributed import LORA, NETWORK, assert_alike, processes, sharding

ROUNDS = {"round_steps": 2, "sampling_steps": 2}
#: Betas at which rounding of 1e-7 in an error stays below 1e-5 in a loss.
METHODS = {
    "kto": (DiffusionKTOConfig, DiffusionKTOTrainer, {"beta_kto": 20.0, "reference_point": "balanced"}),
    "seppo": (SePPOConfig, SePPOTrainer, {"beta_seppo": 20.0, **ROUNDS}),
    "ddo": (DDOConfig, DDOTrainer, {"beta_ddo": 0.1, **ROUNDS}),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(run_of, log, tmp_path, name):
    config, trainer, options = METHODS[name]

    def train(where, batch):
        run_of(config, trainer, where, train_batch_size=batch, **options).train()

    train("one", 8)
    processes(2, lambda rank: train("two", 4), tmp_path)
    one, two = (log(tmp_path / where) for where in ("one", "two"))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        for metric in ("loss", "grad_norm", "rewards/chosen"):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize(
    ("rank", "point"), [(4, "batch"), (0, "balanced"), (4, "mismatched")], ids=["lora", "full", "swapped"]
)
def test_kto_with_split_weights_is_kto(run_of, log, tmp_path, monkeypatch, rank, point):
    options = {
        "beta_kto": 20.0,
        "reference_point": point,
        "rank": rank,
        "learning_rate": 1e-2 if rank else 1e-3,
        "checkpointing_steps": 2,
    }

    def train(where, batch, **more):
        run = run_of(
            DiffusionKTOConfig, DiffusionKTOTrainer, where, train_batch_size=batch, **options, **more
        )
        run.train()
        return run

    def work(number):
        sharding(monkeypatch)
        run = train("two", 4)
        assert sum(p.to_local().numel() for p in run.weights.trainable) < sum(
            p.numel() for p in run.weights.trainable
        )
        train("two", 4, resume_from_checkpoint="checkpoint-2")

    train("one", 8)
    processes(2, work, tmp_path)
    if point != "mismatched":  # those are swapped within each process
        assert_alike(tmp_path / "one", tmp_path / "two", log, LORA if rank else NETWORK)
    records = log(tmp_path / "two")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert (tmp_path / "two" / (LORA if rank else NETWORK)).is_file()


@pytest.mark.parametrize(
    ("config", "trainer", "options"),
    [
        (FlowRWRConfig, FlowRWRTrainer, {"train_batch_size": 8}),
        (ListDPOConfig, ListDPOTrainer, {"train_batch_size": 4, "beta_dpo": 20.0}),
    ],
    ids=["flow-rwr", "list-dpo"],
)
def test_scored_images_with_split_weights(run_of, log, tmp_path, monkeypatch, config, trainer, options):
    rows = [
        {"prompt": f"picture {k % 4}", "image": f"{k}.png", "score": score}
        for k, score in enumerate(np.random.default_rng(0).normal(size=16).tolist())
    ]
    (tmp_path / "scored").mkdir()
    for k in range(len(rows)):
        picture(k).save(tmp_path / "scored" / f"{k}.png")
    (tmp_path / "scored" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    options |= {"dataset": str(tmp_path / "scored"), "learning_rate": 1e-2}

    def train(where, **more):
        run_of(config, trainer, where, **options | more).train()

    def work(number):
        sharding(monkeypatch)
        train("two", train_batch_size=options["train_batch_size"] // 2)

    train("one")
    processes(2, work, tmp_path)
    weights = [load_file(tmp_path / where / LORA) for where in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=2e-4)
    losses = [[record["loss"] for record in log(tmp_path / where)] for where in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_rounds_with_split_weights(run_of, log, tmp_path, monkeypatch):
    config, trainer, options = METHODS["ddo"]
    options = options | {"rank": 0, "use_ema": True, "ema_decay": 0.5, "checkpointing_steps": 2}

    def train(where, batch, **more):
        run_of(config, trainer, where, train_batch_size=batch, **options, **more).train()

    def work(number):
        sharding(monkeypatch)
        train("two", 4)
        train("two", 4, resume_from_checkpoint="checkpoint-2")
        with pytest.raises(UserError, match="not with a LoRA under FSDP"):
            run_of(config, trainer, "lora", **options | {"rank": 4})

    train("one", 8)
    processes(2, work, tmp_path)
    one, two = (log(tmp_path / where) for where in ("one", "two"))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        for metric in ("loss", "grad_norm", "rewards/chosen"):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-3, abs=1e-5), metric
