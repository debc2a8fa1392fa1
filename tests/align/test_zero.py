"""Two processes under DeepSpeed's ZeRO do what one does. DeepSpeed is no dependency: skipped without it."""

import os

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file

from diffalign.errors import RunFailed, UserError
from diffalign.trainers import checkpoint, setup
from tests.align.test_distributed import LORA, NETWORK, SMALL, assert_alike, processes

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")


def zero(monkeypatch, **settings):
    """accelerate takes DeepSpeed for accelerators only: tell it what it would find with two of them."""
    plain = setup.Accelerator

    def accelerator(**options):
        shared = PartialState._shared_state
        shared.pop("distributed_type", None) and shared.update(distributed_type=DistributedType.MULTI_CPU)
        made = plain(**options)
        plugin = DeepSpeedPlugin(**({"zero_stage": 2} | settings))
        plugin.set_mixed_precision(options["mixed_precision"])
        plugin.select(_from_accelerator_state=True)
        made.state.deepspeed_plugins, made.deepspeed_engine_wrapped = plugin, None
        made.state.distributed_type = shared["distributed_type"] = DistributedType.DEEPSPEED
        return made

    monkeypatch.setattr(setup, "Accelerator", accelerator)


@pytest.mark.parametrize(
    ("rank", "stage", "precision"),
    [(4, 2, "no"), (0, 2, "no"), (0, 1, "no"), (0, 2, "bf16"), (4, 2, "bf16")],
    ids=["lora", "full", "zero1", "bf16", "lora-bf16"],
)
def test_zero_gives_the_result_of_one_process(trainer, log, tmp_path, monkeypatch, rank, stage, precision):
    options = SMALL | {"rank": rank, "use_ema": True, "mixed_precision": precision}
    options |= {"learning_rate": 1e-2 if rank else 1e-3, "max_train_steps": 4, "checkpointing_steps": 2}
    options |= {"validation_share": 0.3, "validation_steps": 2, "validation_prompts": ["a star"]}
    options |= {"validation_inference_steps": 2, "gradient_accumulation_steps": 2}
    file = LORA if rank else NETWORK
    one, two = tmp_path / "one", tmp_path / "two"
    if precision == "no":
        trainer("one", train_batch_size=4, **options).train()
    else:  # another batch is rounded in another way, so data parallel says what is right
        processes(2, lambda number: trainer("one", train_batch_size=2, **options).train(), tmp_path)

    def work(number):
        zero(monkeypatch, zero_stage=stage)
        trainer("two", train_batch_size=2, **options).train()
        first = load_file(two / file), load_file(two / "checkpoint-4" / checkpoint.OPTIMIZER)
        PartialState().wait_for_everyone()
        again = trainer("two", train_batch_size=2, resume_from_checkpoint="checkpoint-2", **options)
        again.train()
        for before, after in zip(first, (file, f"checkpoint-4/{checkpoint.OPTIMIZER}"), strict=True):
            torch.testing.assert_close(load_file(two / after), before, rtol=0, atol=0)
        part = again.engine.optimizer.single_partition_of_fp32_groups[0].numel()
        assert part < 0.6 * sum(p.numel() for p in again.weights.trainable)

    processes(2, work, tmp_path)
    assert_alike(one, two, log, file)
    if precision != "no":
        return
    # One process without DeepSpeed goes on from what two wrote, and they from what it wrote.
    trainer("two", train_batch_size=4, resume_from_checkpoint="checkpoint-2", **options).train()
    assert_alike(one, two, log, file)

    def back(number):
        zero(monkeypatch, zero_stage=stage)
        trainer("two", train_batch_size=2, resume_from_checkpoint="checkpoint-2", **options).train()

    processes(2, back, tmp_path)
    assert_alike(one, two, log, file)


def test_a_gradient_that_is_not_finite_leaves_the_state_before_it(trainer, tmp_path, monkeypatch):
    def work(number):
        zero(monkeypatch)
        run = trainer("run", train_batch_size=2)
        honest = run.losses

        def losses(step, slots):
            values, sums = honest(step, slots)
            return values * (float("nan") if step == 1 else 1.0), sums

        run.losses = losses
        with pytest.raises(RunFailed, match="not finite in step 2"):
            run.train()
        saved = load_file(run.folder / "checkpoint-1" / LORA)
        assert all(value.isfinite().all() for value in saved.values())

    processes(2, work, tmp_path)


def test_what_zero_cannot_do_is_refused(trainer, monkeypatch, tmp_path):
    def work(rank):
        for settings, options, words in (
            ({"zero_stage": 3}, {}, "zero_stage must be 1 or 2, not 3"),
            ({"offload_optimizer_device": "cpu"}, {}, "offload_optimizer_device must be none"),
            ({}, {"low_memory": True}, "low_memory does not work under FSDP or DeepSpeed"),
            ({}, {"mixed_precision": "fp16"}, "mixed_precision must be bf16 or no"),
        ):
            with monkeypatch.context() as patch:
                zero(patch, **settings)
                with pytest.raises(UserError, match=words):
                    trainer(f"run{rank}", **options)

    processes(1, work, tmp_path)
