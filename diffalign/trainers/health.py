"""Alarms for runs that go wrong without failing (Diffusion-DPO's known ways)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

WATCHED = (
    "errors/chosen",
    "errors/reference_chosen",
    "gradient_factor",
    "logits_far",
    "clipped",
    "reward_equal",
)
SMOOTHING = 0.95  # of the running means that the conditions see; a single batch is mostly noise
PATIENCE = 50  # steps in a row

Condition = Callable[[Mapping[str, float]], bool]

#: name -> (condition on smoothed metrics, what it means and what helps)
ALARMS: dict[str, tuple[Condition, str]] = {
    "winners falling": (
        lambda m: m["errors/chosen"] > m["errors/reference_chosen"],
        "the chosen images get less likely, not only the rejected ones: lower --learning_rate, "
        "raise --beta_dpo or set --sft_weight",
    ),
    "saturated": (
        lambda m: m["gradient_factor"] < 0.02,
        "nearly all pairs are won and teach nothing more: stop here, or lower --learning_rate or --beta_dpo",
    ),
    "no learning": (
        lambda m: m["gradient_factor"] > 0.49,
        "the policy has not left its reference: raise --learning_rate or --beta_dpo",
    ),
    "ratios clipped": (
        lambda m: m["clipped"] > 0.5,
        "most likelihood ratios are beyond the clip and teach nothing: lower --learning_rate or "
        "--inner_epochs",
    ),
    "rewards equal": (
        lambda m: m["reward_equal"] > 0.5,
        "the images of most prompts have equal rewards and teach nothing: raise --images_per_prompt, or take "
        "a finer reward",
    ),
    "beyond the sigmoid": (
        lambda m: m["logits_far"] > 0.5,
        "most logits are so large that their gradient is gone: lower --beta_ddo",
    ),
}


class Health:
    """Watches the metrics of each step; see :data:`ALARMS`. An alarm is given once each time it comes on."""

    def __init__(self) -> None:
        self._smooth: dict[str, float] = {}
        self._streak = dict.fromkeys(ALARMS, 0)

    def update(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Alarms that this step sets off, name -> sentence. Metrics that a method lacks are not watched."""
        for name in WATCHED:
            if name in metrics:
                before = self._smooth.get(name, metrics[name])
                self._smooth[name] = SMOOTHING * before + (1 - SMOOTHING) * metrics[name]
        fired = {}
        for name, (condition, sentence) in ALARMS.items():
            try:
                on = condition(self._smooth)
            except KeyError:
                continue
            self._streak[name] = self._streak[name] + 1 if on else 0
            if self._streak[name] == PATIENCE:
                fired[name] = sentence
        return fired
