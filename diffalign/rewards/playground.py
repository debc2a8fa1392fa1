"""The playground's two judges: the learned scorer that trainers see, and the exact verifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import pickscore
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import ClipReward
from diffalign.rewards.preprocess import Preprocess, eight_bit


class Verifier(Reward):
    """1 if the caption is true of the image, else 0: an oracle, and no gradient.

    Images are 64 x 64, prompts sentences of the playground. What is trained on it cannot be judged by it.
    """

    differentiable = False

    def __init__(self) -> None:
        super().__init__("playground/verifier")

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from diffalign.playground.verifier import verify
        from diffalign.playground.world import SIZE

        if tuple(images.shape[-2:]) != (SIZE, SIZE):
            raise UserError(
                f"reward {self.name} judges images of {SIZE} x {SIZE} pixels, not {tuple(images.shape[-2:])}"
            )
        arrays = eight_bit(images).numpy()
        verdicts = [verify(prompt, array).true for prompt, array in zip(prompts, arrays, strict=True)]
        return torch.tensor(verdicts, dtype=torch.float32, device=images.device)


def scorer(*, preprocess: Preprocess = "tensor") -> ClipReward:
    """The small CLIP that plays PickScore."""
    from diffalign.playground import model_path

    return pickscore.load(model_path("scorer"), preprocess=preprocess, name="playground/scorer")
