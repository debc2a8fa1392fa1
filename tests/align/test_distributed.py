"""Several processes do what one does: data-parallel, with weights split by FSDP2, and in sharing the work of
encoding. They are copies of this process, which has all libraries loaded, and talk over gloo."""

import contextlib
import os
import signal
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffalign import cli, configs
from diffalign.data.convert import ConvertConfig, convert, run
from diffalign.errors import UserError
from diffalign.output import write_json
from diffalign.trainers import checkpoint, setup
from diffalign.trainers.diffusion_dpo import LossTerm

LORA = "pytorch_lora_weights.safetensors"
NETWORK = "unet/diffusion_pytorch_model.safetensors"
#: A beta at which rounding of 1e-7 in an error stays below 1e-5 in a loss.
SMALL = {"beta_dpo": 20.0, "learning_rate": 1e-2}


def processes(count, work, folder):
    """Run ``work(rank)`` in so many processes that know of each other; fails with what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        if child := os.fork():
            children[child] = rank
            continue
        code = 1
        with open(folder / f"rank{rank}.txt", "w") as said, contextlib.suppress(BaseException):
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in where.items()}
                AcceleratorState._reset_state(reset_partial_state=True)
                work(rank)
                PartialState().destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc(file=said)
                said.flush()
        os._exit(code)
    failed = []
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            rank = children.pop(child)
            if status:  # the others would wait for it
                failed.append((folder / f"rank{rank}.txt").read_text()[-2000:])
                for other in children:
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    assert not failed, failed[0]


def sharding(monkeypatch):
    """accelerate takes FSDP for accelerators only: tell it what it would find with two of them."""
    plain = setup.Accelerator

    def accelerator(**options):
        made = plain(**options)
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
            cpu_ram_efficient_loading=False,
        )
        made.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return made

    monkeypatch.setattr(setup, "Accelerator", accelerator)


def assert_alike(one, other, log, file=LORA):
    """Losses of each step to 1e-5, weights to what Adam makes of rounding."""
    for mine, theirs in zip(log(one), log(other), strict=True):
        for name in ("loss", "errors/chosen", "errors/reference_rejected"):
            assert theirs[name] == pytest.approx(mine[name], abs=1e-5), (mine["step"], name)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    wanted, got = load_file(one / file), load_file(other / file)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference_draws": 2, "low_memory": True},
        {"draws_per_example": 2, "stratified_times": True},
    ],
    ids=["live", "table", "strata"],
)
def test_two_processes_give_the_result_of_one(trainer, log, tmp_path, options):
    options |= SMALL | {"validation_share": 0.2, "validation_steps": 2}
    caches = [{"cache_dir": str(tmp_path / f"cache{count}")} for count in (1, 2)]
    one = trainer("one", train_batch_size=4, gradient_accumulation_steps=2, **options, **caches[0])
    one.train()

    def work(rank):
        run = trainer("two", train_batch_size=2, gradient_accumulation_steps=2, **options, **caches[1])
        encode, images = run._load_model, []

        def counting():
            adapter = encode()
            honest = adapter.encode_images
            adapter.encode_images = lambda pixels: images.append(len(pixels)) or honest(pixels)
            return adapter

        run._load_model = counting
        run.train()
        (tmp_path / f"encoded{rank}").write_text(str(sum(images)))

    processes(2, work, tmp_path)
    assert_alike(one.folder, tmp_path / "two", log)
    assert log(tmp_path / "two")[-1]["validation/rewards/margins"] == pytest.approx(
        log(one.folder)[-1]["validation/rewards/margins"], abs=1e-4
    )
    shares = [int((tmp_path / f"encoded{rank}").read_text()) for rank in (0, 1)]
    assert sum(shares) == 32
    assert min(shares) >= 12


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_split_weights_give_the_result_of_whole_ones(trainer, log, tmp_path, monkeypatch, model_folder, rank):
    options = SMALL | {
        "learning_rate": 1e-2 if rank else 1e-3,
        "rank": rank,
        "use_ema": True,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }
    options |= {"validation_share": 0.3, "validation_steps": 2, "validation_prompts": ["a star"]}
    options |= {"validation_inference_steps": 2}
    file = LORA if rank else NETWORK
    one = trainer("one", train_batch_size=4, **options)
    one.train()

    def work(number):
        sharding(monkeypatch)
        run = trainer("two", train_batch_size=2, **options)
        run.train()
        again = trainer("two", train_batch_size=2, resume_from_checkpoint="checkpoint-2", **options)
        again.train()
        parts = sum(p.to_local().numel() for p in again.weights.trainable)
        (tmp_path / f"parts{number}").write_text(f"{parts} {sum(p.numel() for p in again.weights.trainable)}")

    processes(2, work, tmp_path)
    two = tmp_path / "two"
    assert_alike(one.folder, two, log, file)
    parts, wholes = zip(*((tmp_path / f"parts{n}").read_text().split() for n in (0, 1)), strict=True)
    assert sum(map(int, parts)) == int(wholes[0])
    assert sorted(p.name for p in (two / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]
    # What came out is of diffusers' kind, and one process goes on from a checkpoint of two.
    if rank:
        StableDiffusionPipeline.from_pretrained(model_folder).load_lora_weights(two)
    else:
        StableDiffusionPipeline.from_pretrained(two)
    more = trainer("two", train_batch_size=4, resume_from_checkpoint="checkpoint-2", **options)
    more.train()
    assert_alike(one.folder, two, log, file)
    assert checkpoint.read_state(two / "checkpoint-2")["step"] == 2


def test_what_split_weights_cannot_do_is_refused(trainer, monkeypatch, tmp_path):
    def work(rank):
        sharding(monkeypatch)
        for options, words in (
            ({"low_memory": True}, "low_memory does not work under FSDP"),
            ({"mixed_precision": "fp16"}, "mixed_precision must be bf16 or no"),
            ({"reference_update_steps": 2}, "a reference that moves does not work under FSDP"),
        ):
            with pytest.raises(UserError, match=words):
                trainer(f"run{rank}", **options)
        monkeypatch.setattr("diffalign.trainers.DiffusionDPOTrainer.shardable", False)
        with pytest.raises(UserError, match="does not run under FSDP or DeepSpeed"):
            trainer(f"run{rank}")

    processes(1, work, tmp_path)


def test_processes_share_the_writing_of_a_set(pairs_folder, pairs, tmp_path, monkeypatch):
    config = {"dataset": str(pairs_folder), "shard_rows": 3}
    run(ConvertConfig(output_dir=str(tmp_path / "one"), **config))

    def work(rank):
        done = []
        monkeypatch.setattr(
            "diffalign.data.convert.write_json",
            lambda path, value: done.append(path.name) or write_json(path, value),
        )
        run(ConvertConfig(output_dir=str(tmp_path / "two"), **config))
        (tmp_path / f"wrote{rank}").write_text(" ".join(sorted(done)))

    processes(2, work, tmp_path)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in files(tmp_path / name)}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) > len(pairs)
    shares = [(tmp_path / f"wrote{rank}").read_text().split() for rank in (0, 1)]
    assert [name for name in shares[0] if "done" in name] == [".done-00000", ".done-00002", ".done-00004"]
    assert shares[1] == [".done-00001", ".done-00003", ".done-00005"]
    with pytest.raises(ValueError, match="need a barrier"):
        convert(pairs, tmp_path / "three", process=(1, 2))


def files(folder):
    return (path for path in folder.rglob("*") if path.is_file())


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_takes_the_shipped_configs(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file configs/accelerate/{path.name} ")
    words = first.split(" -m diffalign ")[1].split()
    command = cli.COMMANDS[" ".join(words[:2])]
    cli.parse(cli._load(command.config), configs.resolve(words[2:]), prog="train", example="")
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    if config.distributed_type == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    elif config.distributed_type == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == 2
    else:
        assert config.distributed_type == DistributedType.MULTI_GPU


def test_losses_over_the_batch_see_the_pairs_of_all_processes(trainer, log, tmp_path, pairs):
    """And a beta or a scale that follows the log-ratios is one number everywhere."""
    options = SMALL | {"losses": [LossTerm(name="aot"), LossTerm(name="kto_pair", weight=0.5)]}
    some = pairs[:12]
    some.prompt_weights = True  # 2/3 for the prompts that two of them share, else 4/3
    options["dataset"] = some
    trainer("one", train_batch_size=8, **options).train()
    exponential = SMALL | {"loss_type": "forward_kl"}
    alone = trainer("alone", train_batch_size=8, **exponential)
    alone.train()

    def work(rank):
        trainer("two", train_batch_size=4, **options).train()
        follower = trainer("beta", train_batch_size=4, beta_target=0.3, learning_rate=1e-2)
        follower.train()
        (tmp_path / f"beta{rank}").write_text(repr(follower.beta))
        scaled = trainer("scale", train_batch_size=4, **exponential)
        scaled.train()
        (tmp_path / f"scale{rank}").write_text(repr(scaled.nats))

    processes(2, work, tmp_path)
    assert_alike(tmp_path / "one", tmp_path / "two", log)
    betas = [(tmp_path / f"beta{rank}").read_text() for rank in (0, 1)]
    assert betas[0] == betas[1] != "2000.0"
    scales = [(tmp_path / f"scale{rank}").read_text() for rank in (0, 1)]
    assert scales[0] == scales[1]
    assert float(scales[0]) == pytest.approx(alone.nats, rel=1e-3)
    assert alone.nats > 1
