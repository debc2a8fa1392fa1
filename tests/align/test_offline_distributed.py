"""Methods that gather over processes, or share the sampling: two processes train as one does."""

import pytest

from diffalign.trainers import (
    DDOConfig,
    DDOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    SePPOConfig,
    SePPOTrainer,
)
from tests.align.test_distributed import processes

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
