"""Several aspects of quality at once, as VideoReward has them (Liu et al. 2025): one head each, standardised,
then added with weights.

Heads are linear maps of the elementwise product and of both vectors of a CLIP, so one model sees text and
image. A folder holds the CLIP (as any), ``heads.json`` (names, mean, deviation and weight of each) and
``heads.safetensors``. Heads are fitted with the losses of :mod:`diffalign.rewards.preference`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.output import write_json
from diffalign.rewards.clip import Clip, ClipReward, load_clip
from diffalign.rewards.files import fill, local, needed, read_weights
from diffalign.rewards.preprocess import Preprocess

HEADS, WEIGHTS = "heads.json", "heads.safetensors"


@dataclass(frozen=True)
class Head:
    """One aspect: its raw score has this mean and deviation over a reference set, and weighs so much."""

    mean: float = 0.0
    std: float = 1.0
    weight: float = 1.0


class MultiHead(ClipReward):
    """``sum_h weight_h (raw_h - mean_h) / std_h``.

    Args:
        clip: the model under the heads.
        heads: name -> :class:`Head`, in the order of the rows of ``linear``.
    """

    def __init__(self, clip: Clip, heads: Mapping[str, Head], preprocess: Preprocess = "tensor") -> None:
        super().__init__("multi-head", clip, preprocess=preprocess)
        bad = [name for name, head in heads.items() if not head.std > 0]
        if bad or not heads:
            what = f"std of {bad[0]} is {heads[bad[0]].std}" if bad else "there are none"
            raise UserError(f"reward multi-head: heads need a std above 0, but {what}")
        self.heads = dict(heads)
        width = clip.texts([""]).shape[-1]
        self.linear = nn.Linear(3 * width, len(heads)).requires_grad_(False)
        numbers = torch.tensor([(head.mean, head.std, head.weight) for head in heads.values()])
        self._numbers: Tensor
        self.register_buffer("_numbers", numbers, persistent=False)

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, heads)``, not standardised: what the losses are taken of."""
        seen, read = self.clip.images(self.square(images)), self.texts(prompts)
        return self.linear(torch.cat([seen, read, seen * read], -1)).float()

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self._standard(images, prompts) * self._numbers[:, 2]).sum(-1)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The standardised score of each head, before its weight."""
        self._check_input(images, prompts)
        columns = self._standard(images, prompts).unbind(-1)
        return dict(zip(self.heads, (self._checked(c, prompts) for c in columns), strict=True))

    def _standard(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.raw(images, prompts) - self._numbers[:, 0]) / self._numbers[:, 1]

    def standardised_on(self, raw: Tensor) -> MultiHead:
        """The same model with mean and deviation taken from ``raw (N, heads)`` of a reference set."""
        mean, std = raw.mean(0).tolist(), raw.std(0).tolist()
        heads = {
            name: Head(m, s, head.weight)
            for (name, head), m, s in zip(self.heads.items(), mean, std, strict=True)
        }
        other = MultiHead(self.clip, heads, self.preprocess)
        other.linear.load_state_dict(self.linear.state_dict())
        return other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.clip.save(folder)
        save_file(self.linear.state_dict(), folder / WEIGHTS)
        write_json(folder / HEADS, {name: asdict(head) for name, head in self.heads.items()})


def load(path: str | Path | None = None, *, preprocess: Preprocess = "tensor") -> MultiHead:
    """From a folder that :meth:`MultiHead.save_pretrained` wrote, or such a one on the hub."""
    reward = "multi-head"
    folder = local(needed(path, reward=reward, example="of your own"), reward=reward)
    if not (folder / HEADS).is_file():
        raise UserError(
            f"reward {reward}: {folder} has no {HEADS}; give a folder of MultiHead.save_pretrained"
        )
    try:
        heads = {name: Head(**values) for name, values in json.loads((folder / HEADS).read_text()).items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"reward {reward}: {folder / HEADS} is broken: {error}") from error
    model = MultiHead(load_clip(folder, reward=reward), heads, preprocess)
    file = folder / WEIGHTS
    fill(model.linear, read_weights(file, reward=reward), reward=reward, path=file)
    return model
