"""A reward of noisy latents: a small head on the first blocks of the generator itself (VideoReward's latent
head, Liu et al. 2025, section 4.3). 'diffalign train latent-reward' trains one; Flow-NRG is guided by it.

The blocks have seen x_t, t and the prompt. Their features and the prompt's tokens go through a transformer in
which the prompt asks and the image answers; the mean over tokens is the reward. Its gradient with respect to
x_t passes half of the generator or less, and no decoder.

A folder holds ``latent_reward.json`` and ``latent_reward.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.base import ModelAdapter, load_adapter
from diffalign.output import write_json
from diffalign.pipelines.guidance import guidance_for

CONFIG, WEIGHTS = "latent_reward.json", "latent_reward.safetensors"
FREQUENCIES = 256


class LatentReward(nn.Module):
    """Features of a generator's first blocks, its prompt tokens and t -> rewards.

    Args:
        channels: of the features.
        prompt_width: of the prompt's tokens.
        width, layers: of the head; a multiple of 4 wide, for its 4 heads.

    Attributes:
        mean, std: of the rewards it was trained on; the head itself predicts ``(r - mean) / std``.
    """

    def __init__(self, channels: int, prompt_width: int, *, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.config = {"channels": channels, "prompt_width": prompt_width, "width": width, "layers": layers}
        self.features = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_width), nn.Linear(prompt_width, width))
        self.frequencies = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(FREQUENCIES, width)
        layer = nn.TransformerDecoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.judge = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.out = nn.Linear(width, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, features: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Rewards ``(B,)`` float32 in standard units of ``features (B, places, channels)``, the prompt's
        ``tokens (B, L, prompt_width)`` and times ``t (B,)``."""
        time = self.time(self.frequencies(t))[:, None]
        read = self.judge(self.prompt(tokens.float()) + time, self.features(features.float()) + time)
        return self.out(read.mean(1)).squeeze(-1).float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / CONFIG, self.config)


def load(folder: str | Path) -> LatentReward:
    """From a folder of :meth:`LatentReward.save_pretrained`, in host memory.

    Raises:
        UserError: there is none.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise UserError(
            f"there is no latent reward at {folder}: it has no {CONFIG}; make one with "
            "'diffalign train latent-reward'"
        )
    head = LatentReward(**json.loads((path / CONFIG).read_text()))
    head.load_state_dict(load_file(path / WEIGHTS))
    return head


class _Reached(Exception):
    """The block whose output was asked for has answered."""


def first_blocks(adapter: ModelAdapter, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Features ``(B, places, channels)`` of noisy latents, differentiable in x.

    Of a UNet they are what its last downward block gives, of a transformer the image tokens after half of the
    blocks that join image and text. The rest of the network is not run.

    Args:
        x, t, cond: as for :meth:`~diffalign.models.base.ModelAdapter.denoise`.
    """
    found: list[Tensor] = []
    block, image_of = _watched(adapter.module)

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(image_of(output))
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        adapter.denoise(x, t, cond)
    except _Reached:
        pass
    finally:
        handle.remove()
    (features,) = found
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def _watched(network: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """The block that is the last to run, and how the image is found in its output."""
    if hasattr(network, "down_blocks"):
        return network.down_blocks[-1], lambda output: output[0]
    blocks = network.transformer_blocks
    return blocks[(len(blocks) - 1) // 2], lambda output: output[-1]


def check_images(adapter: ModelAdapter) -> None:
    """Refuse models of videos.

    Raises:
        UserError: it is one.
    """
    if adapter.video:
        raise UserError(f"a latent reward judges images, but {type(adapter.pipeline).__name__} makes videos")


def noisy_score(
    source: LatentReward | str | Path, pipe: Any
) -> Callable[[Tensor, Tensor, Sequence[str]], Tensor]:
    """A reward of ``(x (B, C, h, w), t (B,), prompts)``, ``(B,)`` float32 in the units of the rewards that
    the head was trained on, differentiable in x.

    Args:
        source: a head, or the folder of one.
        pipe: the pipeline whose first blocks it stands on: the one it was trained with, or that one aligned.

    Raises:
        UserError: no head there, or one for another kind of model.
    """
    adapter = load_adapter(pipe)
    check_images(adapter)
    head = source if isinstance(source, LatentReward) else load(source)
    head = head.to(adapter.device).requires_grad_(False).eval()
    known: dict[str, Mapping[str, Tensor]] = {}

    def score(x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        for prompt in set(prompts) - known.keys():
            known[prompt] = guidance_for(adapter, [prompt], 1.0).cond
        cond = {
            name: torch.cat([known[prompt][name] for prompt in prompts]).to(x.device)
            for name in known[prompts[0]]
        }
        features, tokens = first_blocks(adapter, x, t, cond), cond["prompt_embeds"]
        for name, width in (("channels", features.shape[-1]), ("prompt_width", tokens.shape[-1])):
            if width != head.config[name]:
                raise UserError(
                    f"this latent reward is for models whose {name} is {head.config[name]}, not {width}"
                )
        return head.mean + head.std * head(features, tokens, t)

    return score
