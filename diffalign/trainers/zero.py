"""DeepSpeed's ZeRO-1 and -2: optimiser states, and with ZeRO-2 gradients, are split over the processes.

Weights stay whole in every process, so the reference, validation and the result are those of data-parallel
training. Checkpoints have the same files as everywhere else: moments are put together by parameter, and
a run goes on with another number of processes, or without DeepSpeed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers.checkpoint import OPTIMIZER
from diffalign.trainers.config import TrainConfig


def configure(accelerator: Accelerator, config: TrainConfig) -> None:
    """Fill in DeepSpeed's settings from the trainer's options, which decide.

    Raises:
        UserError: settings under which weights are not whole, or that the trainer's options already say.
    """
    plugin = accelerator.deepspeed_plugin
    settings = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise UserError(
            f"under DeepSpeed zero_stage must be 1 or 2, not {plugin.zero_stage}: to split the weights as "
            "well, use configs/accelerate/fsdp2.yaml"
        )
    if plugin.offload_optimizer_device not in (None, "none"):
        raise UserError("under DeepSpeed, offload_optimizer_device must be none: FSDP2 can offload")
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise UserError(f"leave {name} out of DeepSpeed's config: the trainer's own options decide")
    settings |= {
        "train_batch_size": config.train_batch_size * accelerator.num_processes,
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": 1,  # losses are divided by the pairs of the whole step already
        "gradient_clipping": config.max_grad_norm,
        # What is trained stays float32, and half precision is autocast's, as without DeepSpeed.
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    if config.mixed_precision == "bf16":
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are exchanged in float32
        }
        accelerator.autocast = functools.partial(  # accelerate leaves it to the engine, which starts later
            torch.autocast, accelerator.device.type, torch.bfloat16
        )


def optimizer_state(
    engine: Any, parameters: Sequence[Tensor], *, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As :func:`diffalign.trainers.checkpoint.optimizer_state`; all processes call it together."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    for name, part in _own_part(engine).items():
        for number, parameter in enumerate(parameters):
            value = safe_get_full_optimizer_state(parameter, name) if part.ndim else part
            if keep:
                found[f"{number}.{name}"] = value.cpu().clone()
    group = {name: value for name, value in engine.optimizer.param_groups[0].items() if name != "params"}
    return found, {"param_groups": [group | {"params": list(range(len(parameters)))}], "scalars": {}}


def load_optimizer(engine: Any, parameters: Sequence[Tensor], folder: Path, rest: dict[str, Any]) -> None:
    """As :func:`diffalign.trainers.checkpoint.load_optimizer`."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    zero = engine.optimizer
    flat = zero.single_partition_of_fp32_groups[0]
    tensors = {key: value.to(flat.device) for key, value in load_file(folder / OPTIMIZER).items()}
    own = _own_part(engine)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if number == "0":
            own[name] = torch.zeros_like(flat) if value.ndim else value
    lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if value.ndim:
            safe_set_full_optimizer_state(parameters[int(number)], value, name)
    zero.param_groups[0] |= {name: v for name, v in rest["param_groups"][0].items() if name != "params"}


def _own_part(engine: Any) -> dict[str, Tensor]:
    """The state of this process's part of the weights, by name; empty before the first step."""
    zero = engine.optimizer
    return zero.optimizer.state[zero.single_partition_of_fp32_groups[0]]
