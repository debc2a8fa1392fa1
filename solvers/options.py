"""Options of schedulers: written once, registered as config, checked in a sentence."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from diffusers.configuration_utils import register_to_config

from diffalign.errors import UserError, suggestion


def _shared(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    prediction_type: str = "epsilon",
    grid: str = "auto",
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
    sample_min_value: float = 1.0,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    use_lu_lambdas: bool = False,
    use_flow_sigmas: bool = False,
    flow_shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    lambda_min_clipped: float = -math.inf,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    rescale_betas_zero_snr: bool = False,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> None:
    """The options of every scheduler here, with their defaults.

    All but ``grid`` and ``sample_min_value`` (:func:`threshold`) are diffusers'. The sigmas are an EDM
    model's.
    """


def scheduler_options(
    init: Callable[..., None] | None = None, *, beside: Callable[..., None] | None = None
) -> Any:
    """Make ``__init__`` take shared options beside its own, register all as config, and set up.

    `init` names only what its class adds, or gives another default, and ends in ``**shared: Any``. It runs
    first, so it need only check its own options; ``PlanScheduler._setup`` follows.

    Args:
        beside: a function whose parameters are further options, for classes that share more than all do.
    """
    if init is None:
        return functools.partial(scheduler_options, beside=beside)
    self_, *parameters = inspect.signature(init).parameters.values()
    own = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
    further = inspect.signature(beside).parameters if beside else {}
    merged = {**inspect.signature(_shared).parameters, **further, **own}
    signature = inspect.Signature([self_, *merged.values()])

    @functools.wraps(init)
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        init(self, **{name: value for name, value in given.items() if name in own})
        self._setup()

    full.__signature__ = signature  # type: ignore[attr-defined]
    return register_to_config(full)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """UserError that lists `allowed`, unless `value` of option `name` is among them."""
    if value not in allowed:
        raise UserError(
            f"unknown {name} {value!r}{suggestion(str(value), list(allowed))}; "
            f"it may be one of {', '.join(allowed)}"
        )


def check_numbers(name: str, values: Any, count: int | None = None) -> list[float]:
    """`values` of option `name` as floats; UserError unless they are finite numbers, `count` of them."""
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        numbers = np.array(math.nan)
    plain = numbers.ndim == 1 and numbers.size and numbers.dtype.kind in "iuf"
    if not plain or not np.all(np.isfinite(numbers)):
        raise UserError(f"{name} must be finite numbers, but is {values!r}")
    if count is not None and len(numbers) != count:
        raise UserError(f"{name} must have {count} numbers, one has {len(numbers)}")
    return [float(v) for v in numbers]


def check_number(name: str, value: Any) -> float:
    """`value` of option `name` as a float; UserError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, but is {value!r}")
    return float(value)
