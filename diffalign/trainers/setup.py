"""What a run needs before its first step: the accelerator, the optimiser, parts from elsewhere."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from diffusers import AutoencoderKL
from torch import nn
from transformers.optimization import Adafactor

from diffalign.errors import UserError
from diffalign.trainers import zero
from diffalign.trainers.config import TrainConfig

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=6)


def accelerator_for(config: TrainConfig) -> Accelerator:
    """The accelerator of a run.

    Raises:
        UserError: a precision that the device lacks, an unknown tracker, a parallelism that the loop lacks.
    """
    # One process may train several times with different precisions; accelerate keeps the first in a
    # singleton.
    AcceleratorState._reset_state()
    trackers = [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]
    try:
        accelerator = Accelerator(
            # Without this, torchrun on a machine without accelerators starts runs that ignore each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=trackers or None,
            project_dir=str(Path(config.output_dir).expanduser() / "logs"),
            # One process may encode, or write a checkpoint, for long while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses these options: {error}") from error
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.configure(accelerator, config)
    elif accelerator.distributed_type not in kinds and not accelerator.is_fsdp2:
        raise UserError(
            "training runs on one device, data-parallel on several, with weights split by FSDP2 "
            "(fsdp_version: 2) or with the optimiser split by DeepSpeed (zero_stage: 2), not under "
            f"{accelerator.distributed_type.value}: see configs/accelerate"
        )
    return accelerator


def optimizer_for(config: TrainConfig, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """The optimiser of a run.

    Raises:
        UserError: bitsandbytes is not there.
    """
    if config.use_adafactor:
        return Adafactor(
            parameters,
            lr=rate,
            weight_decay=config.adam_weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    settings: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("use_8bit_adam needs bitsandbytes: pip install 'diffalign[bnb]'") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def use_xformers(network: Any, device: torch.device, mixed_precision: str) -> bool:
    """Let `network` attend with xformers, if that works: wheels built for another torch import without a word
    and fail, or are slow, only when asked for something.

    Returns whether it does; if not, one line in the log says why.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.randn(1, 64, 2, 40, device=device, dtype=dtype, requires_grad=True)
        memory_efficient_attention(query, query, query).float().sum().backward()
        network.enable_xformers_memory_efficient_attention()
    except Exception as error:  # of import, of missing kernels, of a device or network without them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning("xformers does not work here, torch's own attention is used: %s", reason)
        return False
    return True


def load_vae(path: str) -> nn.Module:
    """An autoencoder by folder or hub id, from safetensors."""
    try:
        return AutoencoderKL.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the autoencoder {path} could not be loaded: {error}") from error
