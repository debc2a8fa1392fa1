"""The model card that goes with trained weights: what they are, how to load them, how to make them again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from diffalign.output import write_text

if TYPE_CHECKING:
    from diffalign.trainers.base import Trainer

OF_THIS_MACHINE = ("output_dir", "cache_dir", "overwrite", "resume_from_checkpoint", "progress")
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def write_card(trainer: Trainer[Any], metrics: dict[str, Any], alarms: dict[str, str]) -> None:
    """Write ``README.md`` into the output folder."""
    config = trainer.config
    base = trainer.pipeline.config.get("_name_or_path") or config.pretrained_model_name_or_path
    lora = trainer.weights.lora
    tags = ["diffusers", "diffusers-training", "text-to-image", "diffalign", trainer.method]
    head = {"library_name": "diffusers", "tags": tags + ["lora"] * lora}
    if base and not Path(base).exists():  # the hub wants an id; a path of this machine means nothing to it
        head["base_model"] = base
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    defaults = {f.name: f.default for f in fields(config)}
    options = {k: v for k, v in asdict(config).items() if k not in OF_THIS_MACHINE and v not in ([], {})}
    changed = {k: v for k, v in options.items() if v != defaults[k]}
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    kind, load = trainer.weights.described(base or "base model")
    text = f"""---
{yaml}
---

# {trainer.method}

{kind}, trained with `diffalign train {trainer.method}` on {trainer.data_length:,} {trainer.unit}s
({trainer.pairs_per_step} per step){f", hash of the data {trainer.data_hash}" if trainer.data_hash else ""}.

```python
{load}
```

{_reading(config.prompt_windows)}Options that differ from the defaults:

```json
{json.dumps(changed, indent=2)}
```

Metrics of the last step (all steps: `log.jsonl`):

| metric | value |
|---|---|
{chr(10).join(f"| {name} | {value:.6g} |" for name, value in numbers.items())}
"""
    if (trainer.folder / "curves.png").exists():
        text += "\n![Curves of the run](curves.png)\n"
    pictures = sorted((trainer.folder / "validation").glob("step-*.png"))
    if pictures:
        text += f"\n![{', '.join(config.validation_prompts)}](validation/{pictures[-1].name})\n"
    if alarms:
        text += "\nAlarms during training:\n\n" + "".join(f"- {n}: {s}\n" for n, s in alarms.items())
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    write_text(trainer.folder / "README.md", f"{text}\nVersions: {versions}.\n")


def _reading(windows: int) -> str:
    if windows == 1:
        return ""
    return (
        f"Captions were read in {windows} windows. So are prompts after "
        f"`diffalign.models.load_adapter(pipe).read_in_windows({windows})`.\n\n"
    )


def upload(folder: Path, repository: str) -> None:
    """Put the result of a run (not its checkpoints and cache) on the hub.

    Raises:
        UserError: the hub refused; the result stays in `folder`.
    """
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HfHubHTTPError

    try:
        create_repo(repository, exist_ok=True)
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=["checkpoint-*", "cache/*", "self-play/*", "logs/*", ".*"],
            commit_message="Trained with diffalign",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"the result is in {folder}, but could not be uploaded to {repository}: {cause}"
        ) from error
