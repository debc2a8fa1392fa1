"""What a network predicts, and the one table that turns each prediction into every other.

With ``x = alpha x0 + sigma eps``, each kind of prediction is ``p x0 + q eps`` for the (p, q) of its row in
:data:`PREDICTIONS`. Two such equations determine x0 and eps, so all conversions, in all directions and for
every schedule (VP or flow), follow from the rows; nothing else in the project knows a conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from diffalign.errors import UserError, suggestion

# A float, a numpy array or a tensor: the functions below treat them alike.
T = TypeVar("T", float, np.ndarray, torch.Tensor)

#: kind -> (p, q) as functions of (alpha, sigma), such that the prediction is ``p x0 + q eps``.
PREDICTIONS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
    # D = c_skip x + c_out F of Karras et al. 2022, solved for F at the x that the network sees. There alpha
    # is c_in, so that 1 - sigma^2 = (alpha sigma_data)^2, which float32 can't tell from 0 at the noisy end.
    "edm": lambda alpha, sigma: (
        sigma * alpha / (1.0 - sigma**2) ** 0.5,
        -((1.0 - sigma**2) ** 0.5),
    ),
}


def check_prediction_type(kind: str) -> str:
    """`kind` itself, or UserError that lists what is allowed."""
    if kind not in PREDICTIONS:
        raise UserError(
            f"unknown prediction type {kind!r}{suggestion(str(kind), list(PREDICTIONS))}; "
            f"it may be one of {', '.join(PREDICTIONS)}"
        )
    return kind


def coefficients(source: str, to: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(c_sample, c_value) such that ``to = c_sample * sample + c_value * value``, `value` of kind `source`.

    Args:
        source, to: keys of :data:`PREDICTIONS`.
        alpha, sigma: levels at the time of the prediction; floats, arrays or tensors.

    Raises:
        UserError: for an unknown kind, or when plain floats make the conversion impossible (x0 from epsilon
            at alpha = 0, epsilon from x0 at sigma = 0). Arrays and tensors give inf there.
    """
    check_prediction_type(source)
    check_prediction_type(to)
    if source == to:
        return 0.0, 1.0
    p, q = PREDICTIONS[source](alpha, sigma)
    p_to, q_to = PREDICTIONS[to](alpha, sigma)
    # x0 = (sigma value - q x) / det and eps = (p x - alpha value) / det, by Cramer's rule.
    det = p * sigma - q * alpha
    if isinstance(det, float) and det == 0.0:
        raise UserError(f"no {to} can be had from {source} at alpha = {alpha}, sigma = {sigma}")
    return (q_to * p - p_to * q) / det, (p_to * sigma - q_to * alpha) / det


def convert(value: T, sample: T, alpha: Any, sigma: Any, *, source: str, to: str) -> T:
    """A prediction of kind `source` made at `sample`, expressed as kind `to`.

    Args:
        value: the network's output, (B, ...) or a float.
        sample: the noisy input x of the network, of the shape of `value`.
        alpha, sigma: floats, or tensors that broadcast against `value`; 1-D tensors (B,) are per sample.
            In float64, as schedules give them, their differences are exact (``edm`` needs it).
        source, to: keys of :data:`PREDICTIONS`.

    Returns:
        The prediction, in float32 for half-precision inputs (dividing by a small alpha would amplify their
        rounding) and else in the precision of the inputs. Differentiable in `value` and `sample`.

    Raises:
        UserError: as :func:`coefficients`.
    """
    weights = coefficients(source, to, alpha, sigma)
    value, sample, c_sample, c_value = _prepared(value, sample, *weights)
    if source == to:
        return value
    return c_sample * sample + c_value * value


def training_target(kind: str, x0: T, noise: T, alpha: Any, sigma: Any) -> T:
    """What a network of prediction type `kind` is trained to output at ``alpha x0 + sigma noise``.

    Shapes, levels and precision as in :func:`convert`.
    """
    check_prediction_type(kind)
    x0, noise, p, q = _prepared(x0, noise, *PREDICTIONS[kind](alpha, sigma))
    return p * x0 + q * noise


def _prepared(a: Any, b: Any, c_a: Any, c_b: Any) -> tuple[Any, Any, Any, Any]:
    """Tensors in at least float32, and per-sample weights with the trailing axes that broadcasting needs."""
    if not isinstance(a, torch.Tensor):
        return a, b, c_a, c_b
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)

    def weight(z: Any) -> Any:
        if not isinstance(z, torch.Tensor | np.ndarray):
            return float(z)
        z = torch.as_tensor(z).to(device=a.device, dtype=dtype)
        return z.reshape(-1, *[1] * (a.ndim - 1)) if z.ndim == 1 else z

    return a.to(dtype), b.to(dtype), weight(c_a), weight(c_b)
