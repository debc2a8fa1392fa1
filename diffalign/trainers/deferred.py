"""The gradient of a pair with the graph of one image alive at a time.

The loss ``L(e_w, e_l)`` of a pair couples its images through two numbers only. The gradient of ``e_w`` is
taken before they are known and set aside; with ``e_l`` come ``dL/de_w``, by which it is then multiplied, and
``dL/de_l``. That is the gradient of both together, for half the activation memory and no further forward
pass; what it costs is a second buffer of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffalign.likelihood import Errors


def backward_in_turn(
    errors: Callable[[int], Errors],
    loss: Callable[[Errors], Tensor],
    parameters: Sequence[Tensor],
    *,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    around: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext(),
) -> Errors:
    """Add the gradient of ``loss(errors of both images)`` to that of the parameters.

    Args:
        errors: 0 for the chosen image, 1 for the rejected one -> its errors ``(1,)``; called once each, in
            this order.
        loss: errors ``(2,)`` -> scalar.
        parameters: the leaves that want a gradient.
        backward: of a scalar.
        around: context of each image's passes, given whether it is the last.

    Returns:
        The errors of both, ``(2,)``, detached.
    """
    gathered = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    with around(False):
        first = errors(0)
        backward(first.policy.sum())
    with around(True):
        second = errors(1)
        both = _joined(first, second)
        slope_first, slope_second = torch.autograd.grad(loss(both), both.policy)[0]
        for p, before in zip(parameters, gathered, strict=True):
            if p.grad is not None:
                p.grad *= slope_first
            if before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)
        backward(slope_second * second.policy.sum())
    return both


def _joined(first: Errors, second: Errors) -> Errors:
    """Both in one, with a gradient of its own."""

    def both(name: str) -> Tensor | None:
        parts = [getattr(errors, name) for errors in (first, second)]
        return None if any(part is None for part in parts) else torch.cat(parts).detach()

    policy = torch.cat([first.policy, second.policy]).detach().requires_grad_()
    single = _joined(first.single, second.single) if first.single and second.single else None
    return Errors(policy, both("reference"), residual=both("residual"), single=single)
