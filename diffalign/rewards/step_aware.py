"""The step-aware preference model of SPO (Liang et al. 2024): a CLIP that knows how noisy things still were.

It scores the clean image that a denoiser predicts at time t, decoded. Its image tower is told t by adaptive
normalisation: in every residual branch ``h + gate * f(norm(h) (1 + scale) + shift)``, and once more on what
is pooled, with shift, scale and gate linear in ``SiLU(embedding(t))``. At shift 0, scale 0, gate 1, where a
new model starts, it is the CLIP that it was made from. Towers: the ViT of transformers' ``CLIPModel``
(PickScore) and the ResNet of open_clip (the playground's scorer), whose branches have their shift and scale
after the second normalisation.

The released code resizes without antialiasing, in training and in SPO: a released checkpoint is shown images
so, a model of one's own antialiased ones. ``preprocess="pil"`` antialiases for either. What lies out of
[0, 1] is cut off before, as in its training; in its SPO it is after.

A folder holds the CLIP (as any), ``step_aware.json`` and ``step_aware.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.transforms.functional import center_crop

from diffalign.errors import UserError
from diffalign.output import write_json
from diffalign.rewards.clip import Clip, ClipReward, TransformersClip, load_clip, unit
from diffalign.rewards.files import fill, local, needed, read_weights
from diffalign.rewards.preprocess import Preprocess

CONFIG, WEIGHTS = "step_aware.json", "step_aware.safetensors"
FREQUENCIES = 256


class Modulation(nn.Module):
    """``SiLU``, then a linear map from the embedding of t to vectors of several widths.

    Args:
        width: of the embedding.
        widths: of what comes out, each named by its role: ``shift``, ``scale`` or ``gate``. Gates start at
            1, the rest at 0.
    """

    def __init__(self, width: int, widths: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.widths = [size for _, size in widths]
        self.linear = nn.Linear(width, sum(self.widths))
        nn.init.zeros_(self.linear.weight)
        start = [torch.full((size,), float(role == "gate")) for role, size in widths]
        self.linear.bias.data.copy_(torch.cat(start))

    def forward(self, time: Tensor, dims: int) -> tuple[Tensor, ...]:
        """The vectors, each ``(B, size, 1, ...)`` for images (``dims=4``) or ``(B, 1, size)`` for tokens."""
        vectors = self.linear(nn.functional.silu(time)).split(self.widths, dim=-1)
        return tuple(v[:, :, None, None] if dims == 4 else v[:, None] for v in vectors)


class _ViT:
    """The image tower of ``CLIPModel``, block by block."""

    def __init__(self, model: Any) -> None:
        self.tower, self.projection = model.vision_model, model.visual_projection
        self.blocks = list(self.tower.encoder.layers)
        self.width = model.config.vision_config.hidden_size

    def roles(self, block: Any) -> list[tuple[str, int]]:
        return [(role, self.width) for _ in ("attention", "mlp") for role in ("shift", "scale", "gate")]

    def final_roles(self) -> list[tuple[str, int]]:
        return [("shift", self.width), ("scale", self.width)]

    def start(self, pixels: Tensor) -> Tensor:
        return self.tower.pre_layrnorm(self.tower.embeddings(pixels))

    def block(self, block: Any, h: Tensor, modulation: Modulation, time: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(time, 3)
        read = block.layer_norm1(h) * (1 + scale) + shift
        h = h + gate * block.self_attn(hidden_states=read, attention_mask=None)[0]
        return h + gate_mlp * block.mlp(block.layer_norm2(h) * (1 + scale_mlp) + shift_mlp)

    def end(self, h: Tensor, modulation: Modulation, time: Tensor) -> Tensor:
        shift, scale = modulation(time, 3)
        return self.projection((self.tower.post_layernorm(h[:, :1]) * (1 + scale) + shift)[:, 0])


class _ResNet:
    """The image tower of an open_clip ResNet, block by block."""

    def __init__(self, model: Any) -> None:
        self.tower = model.visual
        layers = (self.tower.layer1, self.tower.layer2, self.tower.layer3, self.tower.layer4)
        self.blocks = [block for layer in layers for block in layer]
        self.width = self.tower.attnpool.q_proj.in_features

    def roles(self, block: Any) -> list[tuple[str, int]]:
        inner, outer = block.conv2.out_channels, block.conv3.out_channels
        return [("shift", inner), ("scale", inner), ("gate", outer)]

    def final_roles(self) -> list[tuple[str, int]]:
        return [("shift", self.width), ("scale", self.width)]

    def start(self, pixels: Tensor) -> Tensor:
        return self.tower.stem(pixels)

    def block(self, block: Any, h: Tensor, modulation: Modulation, time: Tensor) -> Tensor:
        shift, scale, gate = modulation(time, 4)
        branch = block.act1(block.bn1(block.conv1(h)))
        branch = block.act2(block.bn2(block.conv2(branch)) * (1 + scale) + shift)
        branch = block.bn3(block.conv3(block.avgpool(branch)))
        return block.act3(gate * branch + (h if block.downsample is None else block.downsample(h)))

    def end(self, h: Tensor, modulation: Modulation, time: Tensor) -> Tensor:
        shift, scale = modulation(time, 4)
        return self.tower.attnpool(h * (1 + scale) + shift)


def _tower(clip: Clip) -> _ViT | _ResNet:
    if isinstance(clip, TransformersClip):
        return _ViT(clip.model)
    if hasattr(getattr(clip.model, "visual", None), "attnpool"):
        return _ResNet(clip.model)
    raise UserError(
        "reward step-aware stands on a CLIPModel of transformers or on an open_clip model with a ResNet as "
        f"image tower, not on {type(getattr(clip.model, 'visual', clip.model)).__name__}"
    )


class StepAware(ClipReward):
    """``exp(logit_scale) cos(image(x, t), text)`` of decoded predictions x at time t.

    Args:
        clip: the model that it starts from; used in place.
        antialias: False resizes, and cuts images that are not square, as the released code does.
    """

    step_aware = True

    def __init__(self, clip: Clip, *, antialias: bool = True, preprocess: Preprocess = "tensor") -> None:
        super().__init__("step-aware", clip, preprocess=preprocess)
        self.antialias = antialias
        tower = _tower(clip)
        self.time = TimestepEmbedding(FREQUENCIES, tower.width)
        for linear in (self.time.linear_1, self.time.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.blocks = nn.ModuleList(Modulation(tower.width, tower.roles(block)) for block in tower.blocks)
        self.final = Modulation(tower.width, tower.final_roles())
        for part in self._conditioning().values():
            part.requires_grad_(False)
        self._recompute = False

    def score(
        self, images: Tensor, prompts: Sequence[str], timesteps: Tensor | float | None = None
    ) -> Tensor:
        """As :meth:`Reward.score`, with the time at which the images were predicted.

        Args:
            timesteps: ``(B,)`` or one number, in the model's training steps (0 to 999); None is 0, a finished
                image.
        """
        if isinstance(timesteps, Tensor) and timesteps.shape not in ((), (len(images),)):
            raise UserError(
                f"reward {self.name} takes one time per image, but got {tuple(timesteps.shape)} for "
                f"{len(images)} images"
            )
        if timesteps is None or not len(images):
            return super().score(images, prompts)
        self._check_input(images, prompts)
        return self._checked(self.rewards(images, prompts, timesteps), prompts)

    def rewards(self, images: Tensor, prompts: Sequence[str], timesteps: Tensor | float = 0.0) -> Tensor:
        seen = self.images(self.square(images), timesteps)
        return self.clip.scale * (seen * self.texts(prompts)).sum(-1)

    def square(self, images: Tensor) -> Tensor:
        if self.antialias or self.preprocess == "pil":
            return super().square(images)
        size = self.clip.size
        sides = [int(side * size / min(images.shape[-2:]) + 0.5) for side in images.shape[-2:]]
        resized = nn.functional.interpolate(images.float(), sides, mode="bicubic")
        return center_crop(resized, [size, size]).clamp(0, 1)

    def images(self, pixels: Tensor, timesteps: Tensor | float) -> Tensor:
        """``(B, D)`` float32 unit vectors of ``pixels (B, 3, size, size)`` in [0, 1] at `timesteps`."""
        t = torch.as_tensor(timesteps, device=pixels.device).expand(len(pixels))
        time = self.time(timestep_features(t).to(self.time.linear_1.weight.dtype))
        tower = _tower(self.clip)
        run: Callable[..., Tensor] = tower.block
        if self._recompute:
            run = partial(recomputed, tower.block, use_reentrant=False)
        h = tower.start(self.clip.normalise(pixels))
        for block, modulation in zip(tower.blocks, self.blocks, strict=True):
            h = run(block, h, modulation, time)
        return unit(tower.end(h, self.final, time))

    def enable_gradient_checkpointing(self) -> None:
        self._recompute = True

    def _conditioning(self) -> dict[str, nn.Module]:
        return {"time": self.time, "blocks": self.blocks, "final": self.final}

    def conditioning_state(self) -> dict[str, Tensor]:
        """The weights that a plain CLIP does not have, by name."""
        return {
            f"{part}.{name}": value.contiguous()
            for part, module in self._conditioning().items()
            for name, value in module.state_dict().items()
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.clip.save(folder)
        save_file(self.conditioning_state(), folder / WEIGHTS)
        config = {"frequencies": FREQUENCIES, "antialias": self.antialias}
        write_json(folder / CONFIG, {"conditioning": "adaptive normalisation", **config})


def timestep_features(t: Tensor) -> Tensor:
    """``(B, 256)`` cosines, then sines, of ``t (B,)`` at frequencies from 1 down to 1/10000."""
    return get_timestep_embedding(t.float(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)


def load(
    path: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    preprocess: Preprocess = "tensor",
) -> StepAware:
    """From a folder of :meth:`StepAware.save_pretrained`; from a plain CLIP (folder or hub id), as which it
    then starts; or from a plain CLIP and a released checkpoint.

    Args:
        checkpoint: file of the released code: a state dict whose names begin with ``model.``.
    """
    reward = "step-aware"
    folder = local(
        needed(path, reward=reward, example="yuvalkirstain/PickScore_v1 for a new one"), reward=reward
    )
    antialias = not checkpoint
    if (folder / CONFIG).is_file():
        config = json.loads((folder / CONFIG).read_text())
        antialias = antialias and config.get("antialias", True)
        found = config.get("frequencies")
        if found != FREQUENCIES:
            raise UserError(
                f"reward {reward}: {folder / CONFIG} asks for {found} frequencies, not {FREQUENCIES}"
            )
    model = StepAware(load_clip(folder, reward=reward), antialias=antialias, preprocess=preprocess)
    if checkpoint:
        file = Path(checkpoint).expanduser()
        state = _from_published(read_weights(file, reward=reward))
        fill(model.clip.model, state, reward=reward, path=file)
    elif (folder / CONFIG).is_file():
        file = folder / WEIGHTS
        state = read_weights(file, reward=reward)
    else:
        return model
    for part, module in model._conditioning().items():
        prefix = f"{part}."
        own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        fill(module, own, reward=reward, path=file)
    return model


_PUBLISHED = (
    (r"^model\.", ""),
    (r"^t_embedder\.mlp\.0\.", "time.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time.linear_2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.linear."),
    (r"^vision_model\.adaLN_modulation\.1\.", "final.linear."),
)


def _from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the released code to ours; those of the CLIP are transformers' and stay."""
    named = {}
    for name, value in state.items():
        for pattern, replacement in _PUBLISHED:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    return named
