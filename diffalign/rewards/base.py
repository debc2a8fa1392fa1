"""What every reward is: images and their prompts to one number each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.errors import UserError

_EDGE = 1e-3  # how far rounding may carry a pixel out of [0, 1]


class Reward(nn.Module, ABC):
    """How good is an image for a prompt? Higher is better.

    A reward never trains by itself: parameters are frozen, the module stays in eval mode. It is an
    ``nn.Module``, so ``reward.to("cuda")`` moves it.

    Attributes:
        name: what messages and logs call it.
        differentiable: whether :meth:`score` has a gradient to the images.
        step_aware: whether :meth:`score` also takes ``timesteps``, how noisy things still were.
    """

    differentiable = True
    step_aware = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # Rewards without weights know by this where `.to` has put them.
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._place: Tensor

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        return self._place.device

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards ``(B,)`` float32 on the images' device.

        Args:
            images: ``(B, 3, H, W)`` floating point in [0, 1], any size.
            prompts: one for each image.

        Raises:
            UserError: not such images, not as many prompts, a gradient asked of a reward that has none, or a
                score that is not finite.
        """
        self._check_input(images, prompts)
        scores = self.rewards(images, prompts) if len(images) else images.new_zeros(0)
        return self._checked(scores, prompts)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores that the reward is made of, by name, each ``(B,)``; of a simple reward, its own."""
        return {self.name: self.score(images, prompts)}

    @abstractmethod
    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What :meth:`score` gives, of input that has been checked."""

    def train(self, mode: bool = True) -> Reward:
        """Stays in eval mode, whatever module it is part of."""
        return super().train(False)

    def _check_input(self, images: Tensor, prompts: Sequence[str]) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"reward {self.name} takes images (B, 3, H, W) of floating point in [0, 1], "
                f"but got {tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            )
        if isinstance(prompts, str) or len(prompts) != len(images):
            count = 1 if isinstance(prompts, str) else len(prompts)
            raise UserError(f"reward {self.name} got {count} prompts for {len(images)} images: give one each")
        if images.requires_grad and torch.is_grad_enabled() and not self.differentiable:
            raise UserError(
                f"reward {self.name} has no gradient to the images: call it under torch.no_grad(), or "
                "choose a differentiable reward with preprocess='tensor'"
            )
        if not len(images):
            return
        low, high = torch.stack(torch.aminmax(images.detach().float())).tolist()
        if not (low >= -_EDGE and high <= 1 + _EDGE):  # also true of NaN
            raise UserError(
                f"reward {self.name} takes images in [0, 1], but got values from {low:.4g} to {high:.4g}; "
                "images in [-1, 1] are mapped by x / 2 + 0.5 and a clamp"
            )

    def _checked(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        if scores.shape != (len(prompts),):
            raise UserError(f"reward {self.name} gave {tuple(scores.shape)} scores for {len(prompts)} images")
        scores = scores.float()
        finite = torch.isfinite(scores.detach())
        if not finite.all():
            where = int((~finite).nonzero()[0])
            raise UserError(
                f"reward {self.name} gave {float(scores[where])} for the prompt {prompts[where]!r}: its "
                "weights may be damaged, or half precision too narrow for them"
            )
        return scores


@torch.no_grad()
def score_images(
    reward: Reward,
    images: Sequence[np.ndarray | Image.Image] | np.ndarray,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> np.ndarray:
    """Rewards ``(N,)`` float32 of images as they are stored, a batch at a time, on the reward's device.

    Args:
        images: uint8 arrays ``(H, W, 3)`` or RGB PIL images, of any sizes.
        prompts: one for each image.
        batch_size: images of one size in one call.
        progress: show a bar.
    """
    if len(prompts) != len(images):
        raise UserError(f"reward {reward.name} got {len(prompts)} prompts for {len(images)} images")
    arrays = [np.asarray(image) for image in images]
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, array in enumerate(arrays):
        by_shape[array.shape].append(place)
    scores = np.zeros(len(arrays), np.float32)
    with tqdm(total=len(arrays), desc=f"score with {reward.name}", unit="img", disable=not progress) as bar:
        for places in by_shape.values():
            for first in range(0, len(places), batch_size):
                batch = places[first : first + batch_size]
                stacked = torch.from_numpy(np.stack([arrays[i] for i in batch])).to(reward.device)
                pixels = stacked.permute(0, 3, 1, 2).float() / 255
                scores[batch] = reward.score(pixels, [prompts[i] for i in batch]).cpu().numpy()
                bar.update(len(batch))
    return scores
