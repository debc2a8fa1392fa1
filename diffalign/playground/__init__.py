"""The embedded playground: a world of small scenes, an exact verifier, and models trained on it.

from diffalign.playground import load, model_path
pipe = load()                      # the StableDiffusionPipeline in diffalign/playground/assets/sd
flow = load("flow")                # the same as a rectified flow, .../assets/flow
fast = load("few-step")            # distilled: four steps, guidance_scale=1, .../assets/few-step
scorer = load_scorer()             # the contrastive scorer in .../assets/scorer
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import UserError, suggestion

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from diffalign.rewards.clip import ClipReward

ASSETS = Path(__file__).resolve().parent / "assets"
MODELS = ("sd", "flow", "few-step", "scorer")


def model_path(name: str) -> Path:
    """Folder of a shipped model of `MODELS`; ``sd`` may also be spelt ``playground/sd``.

    Raises:
        UserError: no such model.
    """
    short = name.removeprefix("playground/")
    if short not in MODELS:
        known = [f"playground/{m}" for m in MODELS]
        raise UserError(
            f"no playground model {name!r}{suggestion(f'playground/{short}', known)} "
            f"(known: {', '.join(known)})"
        )
    if not (ASSETS / short).is_dir():
        raise UserError(
            f"the weights of playground/{short} are missing in {ASSETS}: reinstall diffalign, or train them "
            f"with 'diffalign playground build {short}'"
        )
    return ASSETS / short


def load(name: str = "sd") -> StableDiffusionPipeline:
    """A shipped pipeline (``sd``, ``flow``, ``few-step``) in float32 on the CPU, without progress bar."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_path(name), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_scorer() -> ClipReward:
    """The shipped contrastive scorer."""
    from diffalign.rewards.playground import scorer

    return scorer()
