"""A small resumable training loop for the models that the playground trains itself.

Batches are functions of (seed, step), so a run that was killed goes on from its last saved step and ends
with the very weights of a run that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffalign.errors import RunFailed


def warm_then_cosine(step: int, steps: int, *, warm: int = 100) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then a cosine to zero."""
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


def fit(
    name: str,
    folder: Path,
    modules: Mapping[str, nn.Module],
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    ema_decay: float | None = None,
    save_every: int = 200,
    every: int = 0,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> float:
    """Train ``modules`` jointly with AdamW; with ``ema_decay`` they hold averaged weights afterwards.

    Args:
        name: names the progress bar, ``<name>.safetensors`` (state) and ``<name>.jsonl`` (log) in ``folder``.
        loss: (step, generator of that step) -> scalar.
        evaluate: called every ``every`` steps with averaged weights in place; what it returns is logged.

    Returns:
        Seconds of training in all, earlier tries counted in.

    Raises:
        RunFailed: a loss that is not finite; the last saved step is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    named = {f"{m}.{p}": v for m, module in modules.items() for p, v in module.named_parameters()}
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    ema = EMAModel(parameters, decay=ema_decay, foreach=True) if ema_decay else None
    start, spent = _load(state_file, named, optimizer, ema) if state_file.exists() else (0, 0.0)
    began = time.perf_counter()
    running = 0.0
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, unit="step")
    for step in bar:
        rate = learning_rate * warm_then_cosine(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for module in modules.values():
            module.train()
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        number = value.item()
        if not math.isfinite(number):
            raise RunFailed(
                f"{name}: the loss is {number} at step {step}; {state_file} keeps the last good step"
            )
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)
        running = number if step == start else 0.98 * running + 0.02 * number
        done = step + 1
        if done % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        record: dict[str, float] = {}
        if evaluate and every and done % every == 0 and done < steps:
            if ema:
                ema.store(parameters)
                ema.copy_to(parameters)
            record = _judge(modules, evaluate, done)
            if ema:
                ema.restore(parameters)
        if done % 50 == 0 or record:
            seconds = spent + time.perf_counter() - began
            row = {"step": done, "loss": running, "lr": rate, "seconds": round(seconds, 1), **record}
            with log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if done % save_every == 0 or done == steps:
            _save(state_file, named, optimizer, ema, done, spent + time.perf_counter() - began)
    if ema:
        ema.copy_to(parameters)
    for module in modules.values():
        module.eval()
    return spent + time.perf_counter() - began


def _judge(
    modules: Mapping[str, nn.Module], evaluate: Callable[[int], dict[str, float]], step: int
) -> dict[str, float]:
    for module in modules.values():
        module.eval()
    with torch.no_grad():
        record = evaluate(step)
    tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in record.items()))
    return record


def _save(
    file: Path,
    named: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"weight/{k}": v.detach() for k, v in named.items()}
    for key, value in named.items():
        state = optimizer.state[value]
        tensors |= {f"mean/{key}": state["exp_avg"], f"square/{key}": state["exp_avg_sq"]}
    if ema:
        tensors |= {f"ema/{k}": v for k, v in zip(named, ema.shadow_params, strict=True)}
    partial = file.with_suffix(".partial")
    contiguous = {k: v.contiguous() for k, v in tensors.items()}
    save_file(contiguous, partial, metadata={"step": str(step), "seconds": f"{seconds:.1f}"})
    partial.replace(file)


def _load(
    file: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> tuple[int, float]:
    with safe_open(file, "pt") as saved, torch.no_grad():
        step, seconds = int(saved.metadata()["step"]), float(saved.metadata()["seconds"])
        for key, value in named.items():
            value.copy_(saved.get_tensor(f"weight/{key}"))
            optimizer.state[value] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(value).copy_(saved.get_tensor(f"mean/{key}")),
                "exp_avg_sq": torch.empty_like(value).copy_(saved.get_tensor(f"square/{key}")),
            }
        if ema:
            for key, shadow in zip(named, ema.shadow_params, strict=True):
                shadow.copy_(saved.get_tensor(f"ema/{key}"))
            ema.optimization_step = step
    return step, seconds
