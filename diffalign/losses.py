"""Preference losses over any likelihood: pure functions of log-ratios, per pair, without reduction.

Every function takes

- ``chosen``, ``rejected``: float tensors ``(B,)``, the log-ratios ``d = ell_policy - ell_reference`` of the
  two images of each pair (for a loss that needs no reference: the policy's own ``ell``). Where ``ell`` comes
  from does not matter; :mod:`diffalign.likelihood` makes it from denoising errors or from sampling
  trajectories.
- ``beta``: the temperature, a float or a 0-d tensor. ``z = beta * (chosen - rejected)`` is Diffusion-DPO's
  logit. With mean-reduced denoising errors beta lies in 500..5000; constants that are compared with ``z``
  (the hinge's 1, IPO's 1/2) keep their values, because ``z`` is dimensionless.

and returns the loss ``(B,)`` in the dtype of its inputs (float32 from the likelihood). :data:`LOSSES` names
them, with what each needs; to add one, write the function and its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.errors import UserError, suggestion

Beta = float | Tensor


def sigmoid(chosen: Tensor, rejected: Tensor, beta: Beta, *, label_smoothing: float = 0.0) -> Tensor:
    """``-(1-e) log s(z) - e log s(-z)``: DPO (Rafailov et al. 2023, eq. 7; Diffusion-DPO, eq. 14) at e = 0,
    conservative DPO for labels that are wrong with probability e."""
    z = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def robust(chosen: Tensor, rejected: Tensor, beta: Beta, *, label_smoothing: float = 0.1) -> Tensor:
    """``[-(1-e) log s(z) + e log s(-z)] / (1-2e)``: unbiased under label flips of rate e < 1/2 (rDPO,
    Chowdhury et al. 2024). It is unbounded below, so z is clipped at +-20."""
    z = (beta * (chosen - rejected)).clamp(-20, 20)
    e = label_smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def ipo(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``(z - 1/2)^2``: IPO (Azar et al. 2023, eq. 17) times beta^2, which frees it from the scale of the
    log-ratio: denoising margins are of order 1e-3, where the raw form has next to no gradient."""
    return (beta * (chosen - rejected) - 0.5).square()


def ipo_raw(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``(D - 1/(2 beta))^2`` with ``D = chosen - rejected``: IPO as published, in the units of the
    log-ratio."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``relu(1 - z)``: SLiC (Zhao et al. 2023)."""
    return torch.relu(1 - beta * (chosen - rejected))


def exo_pair(chosen: Tensor, rejected: Tensor, beta: Beta, *, label_smoothing: float = 1e-3) -> Tensor:
    """``KL( (s(z), s(-z)) || (1-e, e) )``: the reverse KL of EXO (Ji et al. 2024); needs e > 0."""
    z = beta * (chosen - rejected)
    e = torch.as_tensor(label_smoothing, dtype=z.dtype)
    win, lose = logsigmoid(z), logsigmoid(-z)
    return win.exp() * (win - torch.log1p(-e)) + lose.exp() * (lose - e.log())


def nca_pair(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``-log s(b d_w) - 1/2 log s(-b d_w) - 1/2 log s(-b d_l)`` (Chen et al. 2024): keeps the winner from
    falling."""
    w, l = beta * chosen, beta * rejected  # noqa: E741
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def bco_pair(chosen: Tensor, rejected: Tensor, beta: Beta, *, offset: float = 0.0) -> Tensor:
    """``-log s(b d_w - c) - log s(c - b d_l)``: binary classifier optimisation (Jung et al. 2024), with
    offset c."""
    return -logsigmoid(beta * chosen - offset) - logsigmoid(offset - beta * rejected)


def apo_zero(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``1 - s(b d_w) + s(b d_l)``: anchored (D'Oosterlinck et al. 2024); for winners better than the
    model."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``s(b d_w) + 1 - s(z)``: anchored (D'Oosterlinck et al. 2024); for winners worse than the model."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def sppo(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``(b d_w - 1/2)^2 + (b d_l + 1/2)^2``: self-play preference optimisation with hard labels (Wu et al.
    2024), scale-free."""
    return (beta * chosen - 0.5).square() + (beta * rejected + 0.5).square()


def dpop(chosen: Tensor, rejected: Tensor, beta: Beta, *, penalty: float = 5.0) -> Tensor:
    """``-log s(z - beta p relu(-d_w))``: DPO-positive (Pal et al. 2024, eq. 3); punishes a falling winner."""
    return -logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def alpha_dpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, mu: float = 0.9999) -> Tensor:
    """:func:`alpha_divergence` of order ``a = mu s(z)`` (no gradient through a): robust to flipped labels."""
    log_u = logsigmoid(beta * (chosen - rejected))
    return alpha_divergence(log_u, (mu * log_u.detach().exp()).clamp(min=1e-12))


def alpha_divergence(log_u: Tensor, a: Beta) -> Tensor:
    """``(u^a - (1-a) - a u) / (a (a-1))``, ``u = s(z)``, ``0 < a < 1``; it tends to
    ``-log u + u - 1`` as a -> 0."""
    # expm1 keeps the small difference u^a - 1 where a or log u is small.
    return (torch.expm1(a * log_u) - a * torch.expm1(log_u)) / (a * (a - 1))


def simpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, gamma: float = 0.5) -> Tensor:
    """``-log s(beta (p_w - p_l) - gamma)`` on the policy's own log-likelihoods (SimPO, Meng et al. 2024,
    eq. 6)."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


@dataclass(frozen=True)
class Loss:
    """A row of :data:`LOSSES`.

    ``fn(chosen, rejected, beta, **options) -> (B,)``; ``reference``: whether the log-ratios are against a
    reference (if not, no reference is run or loaded); ``options``: the names of its own settings.
    """

    fn: Callable[..., Tensor]
    reference: bool = True
    options: tuple[str, ...] = ()


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, options=("label_smoothing",)),
    "robust": Loss(robust, options=("label_smoothing",)),
    "ipo": Loss(ipo),
    "ipo_raw": Loss(ipo_raw),
    "hinge": Loss(hinge),
    "exo_pair": Loss(exo_pair, options=("label_smoothing",)),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair, options=("offset",)),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "sppo": Loss(sppo),
    "dpop": Loss(dpop, options=("penalty",)),
    "alpha_dpo": Loss(alpha_dpo, options=("mu",)),
    "simpo": Loss(simpo, reference=False, options=("gamma",)),
}


def get_loss(name: str) -> Loss:
    """The row of :data:`LOSSES` called ``name``.

    Raises:
        UserError: there is none; the nearest known name is given.
    """
    if name not in LOSSES:
        raise UserError(
            f"unknown loss_type {name!r}{suggestion(name, list(LOSSES))} (known: {', '.join(LOSSES)})"
        )
    return LOSSES[name]
