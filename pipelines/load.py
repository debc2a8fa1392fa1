"""Open a pipeline by folder, hub id or ``playground/<name>``, and choose its scheduler by name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, suggestion

PLAYGROUND = "playground/"


def resolve_model(model: str) -> str:
    """A folder or hub id that diffusers can load; ``playground/sd`` becomes the shipped folder.

    Raises:
        UserError: the folder does not exist or is no pipeline, or the playground has no such model.
    """
    if model.startswith(PLAYGROUND):
        from diffalign.playground import model_path

        return str(model_path(model.removeprefix(PLAYGROUND)))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{model!r} is no diffusers pipeline folder: model_index.json is missing")
        return str(path)
    # A hub id is exactly owner/name; everything else can only have been meant as a path.
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1 or path.exists():
        raise UserError(
            f"no model at {model!r}; give a pipeline folder, a hub id such as owner/name, or playground/sd"
        )
    return model


def choose_device(device: str = "auto") -> str:
    """``auto`` is CUDA, then Apple's MPS, then the CPU; anything else is checked and passed on.

    Raises:
        UserError: torch does not know the device or cannot reach it.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here; try --device cpu") from error
    return device


def load_pipeline(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    lora: str | None = None,
) -> Any:
    """A diffusers pipeline, ready to sample.

    Args:
        model: pipeline folder, hub id or ``playground/<name>``.
        device: see `choose_device`.
        dtype: name of a torch dtype; ``auto`` is float32 off the GPU, there float16 for UNets and
            bfloat16 for transformers, whose activations overflow in half precision.
        revision: of the hub repository.
        variant: of the weight files, such as ``fp16``.
        lora: folder or file of LoRA weights to load on top.

    Raises:
        UserError: the model or the LoRA cannot be found or loaded.
    """
    import torch
    from diffusers import DiffusionPipeline

    from diffalign.solvers import import_schedulers

    import_schedulers()
    source = resolve_model(model)
    where = choose_device(device)
    try:
        parts = DiffusionPipeline.load_config(source, revision=revision)
        half = "float16" if "unet" in parts else "bfloat16"
        name = dtype if dtype != "auto" else half if where.startswith("cuda") else "float32"
        with warnings.catch_warnings():
            # Newer releases of diffusers call it `dtype`, older ones know only this name.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                source, torch_dtype=getattr(torch, name), revision=revision, variant=variant
            )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load the model {model!r}: {reason}") from error
    if lora is not None:
        load_lora(pipe, lora)
    return pipe.to(where)


def load_lora(pipe: Any, lora: str) -> None:
    """Load LoRA weights from a folder or a safetensors file onto a pipeline.

    Raises:
        UserError: there is no such file, or it does not fit the pipeline.
    """
    path = Path(lora).expanduser()
    if not path.exists() and (path.is_absolute() or lora.count("/") != 1):
        raise UserError(
            f"no LoRA at {lora!r}; give the folder of pytorch_lora_weights.safetensors or the file"
        )
    try:
        pipe.load_lora_weights(lora)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot load the LoRA {lora!r}: {' '.join(str(error).split())[:300]}") from error


def make_scheduler(name: str, config: Mapping[str, Any], **options: Any) -> Any:
    """A scheduler by the name of a solver of ours or of a diffusers class, for a model with the given config.

    Args:
        name: a key of ``diffalign.solvers.SOLVERS`` such as ``dpm-solver++``, or a diffusers class such as
            ``UniPCMultistepScheduler``.
        config: the config of the scheduler that the pipeline came with; it says what the network predicts.
        options: arguments of the scheduler's constructor that replace those of ``config``.

    Raises:
        UserError: unknown name, unknown option, or a combination that the scheduler refuses.
    """
    cls = scheduler_class(name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]
    for option in options:
        if option not in known:
            raise UserError(
                f"solver {name!r} has no option {option!r}{suggestion(option, known)} "
                f"(known: {', '.join(known)})"
            )
    try:
        return cls.from_config(config, **(_flow_options(name, cls, config, known) | options))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"solver {name!r} cannot be used: {' '.join(str(error).split())}") from error


def scheduler_class(name: str) -> Any:
    """The class behind the name of a solver of ours or of a diffusers scheduler.

    Raises:
        UserError: no such name; the nearest one is named.
    """
    import diffusers

    from diffalign.solvers import SOLVERS

    if name in SOLVERS:
        return SOLVERS[name]
    theirs = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name in theirs:
        return getattr(diffusers, name)
    raise UserError(
        f"unknown solver {name!r}{suggestion(name, [*SOLVERS, *theirs])} "
        f"(known: {', '.join(SOLVERS)}, or a diffusers class such as DPMSolverMultistepScheduler)"
    )


def _flow_options(name: str, cls: Any, config: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """What a diffusers scheduler must be told to sample a flow model, whose config does not say it itself."""
    flow = "FlowMatch" in config.get("_class_name", "") or config.get("prediction_type") == "flow_prediction"
    if not flow or not cls.__module__.startswith("diffusers.") or "FlowMatch" in cls.__name__:
        return {}
    if "use_flow_sigmas" not in known:
        raise UserError(f"solver {name!r} cannot sample a flow model; try dpm-solver++")
    return {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": config.get("shift", config.get("flow_shift", 1.0)),
    }
