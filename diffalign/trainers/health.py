"""Alarms for runs that go wrong without failing (Diffusion-DPO's known ways)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
}


class Health:
    """Watches the metrics of each step; see :data:`ALARMS`. An alarm is given once each time it comes on."""

    def __init__(self) -> None:
        self._smooth: dict[str, float] = {}
        self._streak = dict.fromkeys(ALARMS, 0)

    def update(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Alarms that this step sets off, name -> sentence. Metrics that a method lacks are not watched."""
        for name in ("errors/chosen", "errors/reference_chosen", "gradient_factor"):
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
