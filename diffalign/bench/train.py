"""``diffalign bench train``: what a Diffusion-DPO step costs beside plain fine-tuning of the same images.

Operations are counted and so are the bytes that a step keeps for its backward pass: both are exact and do not
depend on the machine. Time and, on CUDA, peak memory are measured with all methods in turn in one process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.errors import UserError, suggestion
from diffalign.output import prepare

# What is compared with plain fine-tuning, and how.
METHODS = {
    "finetune": "denoising error of both images of each pair",
    "dpo": "Diffusion-DPO, the reference run in every step: adapters off, or a frozen copy for full training",
    "dpo-cached": "Diffusion-DPO with the errors of the reference known beforehand",
    "dpo-low-memory": "Diffusion-DPO with the graph of one image at a time, the coefficient applied after it",
    "dpo-plain": "as published scripts do: a second network as reference, images encoded in every step",
}
SIZES = ("tiny", "sd15", "sdxl")
#: (kind of training, method) -> how many times the operations, and the time, of fine-tuning it may take.
LIMITS = {
    ("lora", "dpo"): 1.50,
    ("full", "dpo"): 1.36,
    **{(kind, "dpo-low-memory"): limit for kind, limit in (("lora", 1.50), ("full", 1.36))},
    **{(kind, "dpo-cached"): 1.05 for kind in ("lora", "full")},
}


@dataclass(frozen=True)
class BenchTrainConfig:
    """Cost of a Diffusion-DPO step against fine-tuning of the same images, LoRA and full, on random networks.

    Writes train.json and train.md. Ratios are to fine-tuning; the limit beside them is 1.50 for LoRA and 1.36
    for full training with a live reference, 1.05 with a cached one.

    Attributes:
        output_dir: folder to write to
        networks: shapes whose steps are timed: tiny, sd15, sdxl
        counted: shapes whose operations and memory are counted only, without being built: tiny, sd15, sdxl
        train: what is trained: lora, full
        pairs: image pairs in a step
        rank: of the LoRA
        gradient_checkpointing: less memory, more operations
        repeats: steps of each method that are timed
        device: auto, cpu, cuda
        dtype: the network computes in; LoRA weights and full weights themselves stay float32
        threads: of torch on the CPU; 0 leaves its choice
        seed: of weights and data
        overwrite: write into a folder that is not empty
    """

    output_dir: str = "outputs/bench/train"
    networks: list[str] = field(default_factory=lambda: ["tiny"])
    counted: list[str] = field(default_factory=lambda: ["sd15", "sdxl"])
    train: list[str] = field(default_factory=lambda: ["lora", "full"])
    pairs: int = 1
    rank: int = 8
    gradient_checkpointing: bool = False
    repeats: int = 20
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int = 0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("networks", SIZES), ("counted", SIZES), ("train", ("lora", "full"))):
            for value in getattr(self, name):
                if value not in known:
                    hint = suggestion(value, list(known))
                    raise UserError(f"--{name} knows no {value!r}{hint} (known: {', '.join(known)})")
        for name in ("pairs", "rank", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


def run(config: BenchTrainConfig) -> list[dict[str, Any]]:
    """Count and time every network, kind of training and method; returns and stores the rows."""
    import torch
    from tqdm.auto import tqdm

    from diffalign.bench.record import store
    from diffalign.pipelines.load import choose_device

    out = prepare(config.output_dir, overwrite=config.overwrite)
    device = torch.device(choose_device(config.device))
    threads = torch.get_num_threads()
    jobs = [(size, kind, size in config.networks) for size in SIZES for kind in config.train]
    jobs = [job for job in jobs if job[2] or job[0] in config.counted]
    rows: list[dict[str, Any]] = []
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        for size, kind, timed in tqdm(jobs, desc="training steps", leave=False):
            common = {"network": size, "train": kind}
            counts = count(size, kind, config)
            times = measure(size, kind, config, device) if timed else {}
            rows += [
                common
                | {"method": name, "limit": LIMITS.get((kind, name))}
                | counts[name]
                | times.get(name, NOT_TIMED)
                for name in METHODS
            ]
    finally:
        torch.set_num_threads(threads)
    shown = [{k: v for k, v in row.items() if k not in ("seconds", "tflop")} for row in rows]
    print(store(out, "train", config, rows, shown, methods=METHODS))
    return rows


NOT_TIMED = {"time": None, "time_25": None, "time_75": None, "peak_memory": None, "seconds": None}


@dataclass
class Case:
    """One network with its data, and the steps of every method on it.

    Attributes:
        trainable: parameters of the optimiser.
        steps: method -> function that runs forward and backward passes, adds to the gradients, and returns
            the loss.
    """

    trainable: list[Any]
    steps: dict[str, Callable[[], Any]]


def make_case(size: str, kind: str, config: BenchTrainConfig, device: Any) -> Case:
    """Build network, adapters, reference and random data for 2 x ``config.pairs`` images.

    Args:
        size: key of `networks.UNETS`.
        kind: lora or full.
        config: pairs, rank, dtype, seed, checkpointing.
        device: where; on ``meta`` nothing is computed or allocated.
    """
    import torch

    from diffalign.bench.networks import SD_SCHEDULER, UNETS, unet, vae
    from diffalign.likelihood import add_noise, denoising_error, evaluate
    from diffalign.losses import sigmoid
    from diffalign.models.reference import adapters_off, frozen_copy
    from diffalign.solvers.noise import NoiseSchedule
    from diffalign.trainers.deferred import backward_in_turn

    shape = UNETS[size]
    rows, side = 2 * config.pairs, shape["sample_size"]
    half = getattr(torch, config.dtype)
    with torch.device(device):
        network = _cast(unet(size, config.seed), half)
        encoder = _cast(vae(size, config.seed), half).requires_grad_(False)
        twin = frozen_copy(network)
        if kind == "lora":
            trainable = _add_lora(network, config.rank)
        else:
            _cast(network, torch.float32)
            trainable = list(network.parameters())
        latents, noise = torch.randn(rows, 4, side, side), torch.randn(rows, 4, side, side)
        factor = 2 ** (len(encoder.config.block_out_channels) - 1)
        pixels = torch.randn(rows, 3, side * factor, side * factor, dtype=half)
        cond: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(rows, 77, shape["cross_attention_dim"], dtype=half)
        }
        if "addition_embed_type" in shape:  # SDXL: pooled text (1280) and six numbers on size and crop
            cond["added_cond_kwargs"] = {
                "text_embeds": torch.randn(rows, 1280, dtype=half),
                "time_ids": torch.zeros(rows, 6, dtype=half),
            }
        known = torch.ones(rows)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train(config.gradient_checkpointing)  # diffusers checkpoints in training mode only; no dropout
    schedule = NoiseSchedule.from_config(SD_SCHEDULER)
    t = torch.randint(0, 1000, (config.pairs,)).repeat(2)
    off = adapters_off if kind == "lora" else twin

    def denoise_with(reference_policy: Any) -> Any:
        def denoise(x_t: Any, times: Any, conditions: Any, reference: bool = False) -> Any:
            with reference_policy(network) if reference else contextlib.nullcontext(network) as chosen:
                return chosen(x_t.to(half), times, return_dict=False, **conditions)[0]

        return denoise

    def noised(x0: Any = latents, rows: slice = slice(None)) -> Any:
        return add_noise(schedule, "epsilon", x0[rows], noise[rows], t[rows])

    def finetune() -> Any:
        made = noised()
        return denoising_error(denoise_with(off)(made.x_t, made.t, cond), made.target).mean()

    def loss_of(errors: Any) -> Any:
        chosen, rejected = errors.log_ratio().chunk(2)
        return sigmoid(chosen, rejected, 2000.0).sum() / config.pairs

    def dpo(x0: Any, reference: Any, policy: Any) -> Any:
        return loss_of(evaluate(denoise_with(policy), noised(x0), cond, reference=reference))

    def low_memory() -> Any:
        def errors(pair: int, side: int) -> Any:
            row = slice(pair + side * config.pairs, pair + side * config.pairs + 1)
            with _autocast_on(device, half):
                return evaluate(denoise_with(off), noised(latents, row), _rows_of(cond, row))

        total = torch.zeros(())
        for pair in range(config.pairs):
            both = backward_in_turn(functools.partial(errors, pair), loss_of, trainable)
            total = total.to(both.policy) + loss_of(both).detach()
        return total

    def backward(loss: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> Any:
            with _autocast_on(device, half):
                value = loss()
            value.backward()
            return value.detach()

        return step

    def plain() -> Any:
        with torch.no_grad():
            x0 = encoder.encode(pixels).latent_dist.mode().float()
        return dpo(x0, True, twin)

    if torch.device(device).type != "meta":
        # Near the policy's own: far from it the loss saturates, and a CPU is slow on its denormal gradients.
        with torch.no_grad(), _autocast_on(device, half):
            made = noised()
            known = denoising_error(denoise_with(off)(made.x_t, made.t, cond, reference=True), made.target)
    steps = {
        "finetune": backward(finetune),
        "dpo": backward(lambda: dpo(latents, True, off)),
        "dpo-cached": backward(lambda: dpo(latents, known, off)),
        "dpo-low-memory": low_memory,
        "dpo-plain": backward(plain),
    }
    return Case(trainable, {name: steps[name] for name in METHODS})


def _rows_of(cond: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {k: _rows_of(v, rows) if isinstance(v, dict) else v[rows] for k, v in cond.items()}


def _add_lora(network: Any, rank: int) -> list[Any]:
    import torch
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    from diffalign.models.sd import SDAdapter

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(SDAdapter.lora_targets)
        )
    )
    cast_training_params(network, torch.float32)
    return [p for p in network.parameters() if p.requires_grad]


def _cast(network: Any, dtype: Any) -> Any:
    from torch import nn

    return nn.Module.to(network, dtype)  # diffusers' own `to` warns where there is nothing to warn of


def _autocast_on(device: Any, dtype: Any) -> Any:
    import torch

    kind = torch.device(device).type
    wanted = dtype != torch.float32 and kind != "meta"
    return torch.autocast(kind, dtype) if wanted else contextlib.nullcontext()


def count(size: str, kind: str, config: BenchTrainConfig) -> dict[str, dict[str, float]]:
    """Operations and bytes kept for the backward pass of one step of each method, as ratios to fine-tuning.

    Runs on the meta device: shapes only, so that a large network costs seconds and no memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    case = make_case(size, kind, config, "meta")
    found = {}
    for name, step in case.steps.items():
        with FlopCounterMode(display=False) as counter, _kept_bytes(case.trainable) as kept:
            step()
        found[name] = (float(counter.get_total_flops()), float(kept[0]))
        for parameter in case.trainable:
            parameter.grad = None
    base = found["finetune"]
    return {
        name: {"operations": flops / base[0], "activations": kept_ / base[1], "tflop": flops / 1e12}
        for name, (flops, kept_) in found.items()
    }


@contextlib.contextmanager
def _kept_bytes(parameters: list[Any]) -> Iterator[list[int]]:
    """The most bytes that autograd keeps at one time in the block, weights not counted."""
    import torch

    weights = {p.untyped_storage()._cdata for p in parameters}
    users: Counter[int] = Counter()  # of each storage, which is counted once
    alive, most = 0, [0]

    class Kept:
        def __init__(self, tensor: Any) -> None:
            nonlocal alive
            self.tensor, self.storage = tensor, tensor.untyped_storage()
            self.place = self.storage._cdata
            self.counts = self.place not in weights and not tensor.is_leaf
            if self.counts:
                alive += 0 if users[self.place] else self.storage.nbytes()
                users[self.place] += 1
                most[0] = max(most[0], alive)

        def __del__(self) -> None:
            nonlocal alive
            if self.counts:
                users[self.place] -= 1
                alive -= 0 if users[self.place] else self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield most


def measure(
    size: str, kind: str, config: BenchTrainConfig, device: Any
) -> dict[str, dict[str, float | None]]:
    """Time whole optimiser steps of all methods in turn, as ratios to the fine-tuning step beside each."""
    import torch

    case = make_case(size, kind, config, device)
    optimizer = torch.optim.AdamW(case.trainable, lr=1e-6, fused=True)
    cuda = device.type == "cuda"
    names = list(METHODS)
    times, peaks = [], dict.fromkeys(names, 0)
    for round_ in range(config.repeats + 1):  # the first warms up
        seconds = []
        for name in names:
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            case.steps[name]()
            torch.nn.utils.clip_grad_norm_(case.trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize(device)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
            seconds.append(time.perf_counter() - start)
        if round_:
            times.append(seconds)
    table = torch.tensor(times, dtype=torch.float64)
    ratios = (table / table[:, :1]).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    return {
        name: {
            "time": ratios[1, i].item(),
            "time_25": ratios[0, i].item(),
            "time_75": ratios[2, i].item(),
            "peak_memory": peaks[name] / peaks["finetune"] if cuda else None,
            "seconds": table[:, i].median().item(),
        }
        for i, name in enumerate(names)
    }
