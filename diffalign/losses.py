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
them, with what each needs; to add one, write the function and its row. Losses on rows with a label, on lists
of images and on predictions follow below them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softmax, softplus

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


def bco_pair(chosen: Tensor, rejected: Tensor, beta: Beta, *, offset: float | Tensor = 0.0) -> Tensor:
    """``-log s(b d_w - c) - log s(c - b d_l)``: binary classifier optimisation (Jung et al. 2024), with
    offset c."""
    return -logsigmoid(beta * chosen - offset) - logsigmoid(offset - beta * rejected)


def bco(chosen: Tensor, rejected: Tensor, beta: Beta, *, reward_mean: float | Tensor) -> Tensor:
    """:func:`bco_pair` whose offset is the running mean of the rewards ``beta d`` of all images, as
    published: what is classified is whether an image gained more than usual."""
    return bco_pair(chosen, rejected, beta, offset=reward_mean)


def apo_zero(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``1 - s(b d_w) + s(b d_l)``: anchored (D'Oosterlinck et al. 2024); for winners better than the
    model."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``s(b d_w) + 1 - s(z)``: anchored (D'Oosterlinck et al. 2024); for winners worse than the model."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def sppo(chosen: Tensor, rejected: Tensor, beta: Beta, *, preference: float | Tensor = 1.0) -> Tensor:
    """``(b d_w - (P - 1/2))^2 + (b d_l + (P - 1/2))^2``: self-play preference optimisation (Wu et al. 2024),
    scale-free; P is the probability that the chosen image wins."""
    target = preference - 0.5
    return (beta * chosen - target).square() + (beta * rejected + target).square()


def discopop(chosen: Tensor, rejected: Tensor, beta: Beta, *, temperature: float = 0.05) -> Tensor:
    """``(1-m)(-log s(z)) + m e^-z``, ``m = s(z / temperature)``: the log-ratio modulated loss found by search
    (Lu et al. 2024); z is held above -20."""
    z = (beta * (chosen - rejected)).clamp(min=-20)
    modulation = torch.sigmoid(z / temperature)
    return (1 - modulation) * -logsigmoid(z) + modulation * torch.exp(-z)


def dmpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, label_smoothing: float = 0.01) -> Tensor:
    """``KL( (s(z), s(-z)) || (1-a, a) )``: divergence minimisation (DMPO); :func:`exo_pair` with a larger
    smoothing."""
    return exo_pair(chosen, rejected, beta, label_smoothing=label_smoothing)


Flip = Literal["sign", "indicator", "none"]

#: SePPO's s of ``d_w``: which way the counterpart is moved.
_FLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "indicator": lambda d: (d > 0).to(d),
    "none": torch.ones_like,
}


def seppo(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``-log s( b (d_w - s d_l) )``, ``s = sign(d_w)`` without gradient: self-play (SePPO, Zhang et al.
    2024).

    `rejected` are samples of an earlier checkpoint, the reference. They are pushed down once the policy fits
    the chosen image better than that reference does, and pulled up while it fits it worse. At the reference s
    is 0: the first step is fine-tuning.
    """
    return -logsigmoid(seppo_logit(chosen, rejected, beta))


def seppo_logit(chosen: Tensor, rejected: Tensor, beta: Beta, *, flip: Flip = "sign") -> Tensor:
    """``b (d_w - s d_l)``; s is ``sign(d_w)``, its variant ``[d_w > 0]``, or 1, which is SPIN-Diffusion."""
    return beta * (chosen - _FLIPS[flip](chosen.detach()) * rejected)


def ddo(chosen: Tensor, rejected: Tensor, beta: Beta, *, fake_weight: float = 1.0) -> Tensor:
    """``-log s(b d_w) - a log s(-b d_l)``: direct discriminative optimisation (Zheng et al. 2025) with
    data as `chosen` and the reference's samples as `rejected`. Rows need not belong together."""
    return -logsigmoid(beta * chosen) - fake_weight * logsigmoid(-beta * rejected)


#: d -> f'(e^d) up to a constant, for f-DPO (Wang et al. 2023, table 1).
_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "forward_kl": lambda d, a: -torch.exp(-d),
    "js": lambda d, a: d - softplus(d),
    "alpha": lambda d, a: d if a == 1.0 else torch.expm1((a - 1.0) * d) / (a - 1.0),
}


def f_dpo(
    chosen: Tensor,
    rejected: Tensor,
    beta: Beta,
    *,
    divergence: str,
    scale: float = 1.0,
    alpha: float = 0.5,
    base: Callable[..., Tensor] = sigmoid,
) -> Tensor:
    """``base( f'(u_w) - f'(u_l) )``, ``u = e^{scale d}``: DPO under another divergence than reverse KL.

    f' is exponential in the log-ratio, so it wants nats: `scale` should bring ``|scale d|`` to about 1 (mean
    reduced errors of 16384 latents are that many times too small, and there all divergences are alike), see
    :func:`nats_per_unit`. ``scale d`` is clamped at +-20.
    """
    shape = _DIVERGENCES[divergence]
    w, l = (shape((scale * d).clamp(-20, 20), alpha) for d in (chosen, rejected))  # noqa: E741
    return base(w, l, beta)


def aot(
    chosen: Tensor,
    rejected: Tensor,
    beta: Beta,
    *,
    reference_margin: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`sigmoid` on margins of policy and reference, each sorted over the batch: the margin's whole
    distribution is moved (AOT, Melnyk et al. 2024). `reference_margin` is ``ell_ref(w) - ell_ref(l)``, (B,).
    Wants batches of 32 and more."""
    policy = (chosen - rejected + reference_margin).sort().values
    reference = reference_margin.sort().values
    return sigmoid(policy, reference, beta, label_smoothing=label_smoothing)


def aot_unpaired(chosen: Tensor, rejected: Tensor, beta: Beta, *, label_smoothing: float = 0.0) -> Tensor:
    """:func:`sigmoid` on log-ratios sorted per side over the batch: rows need not belong together (AOT)."""
    return sigmoid(chosen.sort().values, rejected.sort().values, beta, label_smoothing=label_smoothing)


def offset_dpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, offset: float | Tensor = 0.0) -> Tensor:
    """``-log s(z - offset)``, the offset a margin that the pair should have, such as its gap in score (Amini
    et al. 2024)."""
    return -logsigmoid(beta * (chosen - rejected) - offset)


def odpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, gap: float | Tensor, scale: float = 1.0) -> Tensor:
    """:func:`offset_dpo` with the pair's gap in score, times `scale`, as its margin (ODPO, Amini et al. 2024,
    eq. 8)."""
    return offset_dpo(chosen, rejected, beta, offset=scale * gap)


def soft_labels(
    chosen: Tensor, rejected: Tensor, beta: Beta, *, gap: float | Tensor, temperature: float = 1.0
) -> Tensor:
    """``-P log s(z) - (1-P) log s(-z)``, ``P = s(gap / temperature)``: labels as sure as the scores are far
    apart."""
    z, sure = beta * (chosen - rejected), torch.sigmoid(torch.as_tensor(gap) / temperature)
    return -sure * logsigmoid(z) - (1 - sure) * logsigmoid(-z)


def sft(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``-beta p_w``, half of beta times the denoising error of the chosen image: fine-tuning, a term to add
    to others. At weight 1 it pulls as hard as a pair that is not won yet pushes."""
    return -beta * chosen


def pso(chosen: Tensor, rejected: Tensor, beta: Beta, *, negative_weight: float = 0.1) -> Tensor:
    """``-log s( beta (d_w - nu d_l) )``: pairwise sample optimisation (PSO, Miao et al. 2024) of targets
    against a few-step model's own samples, which are pushed away with weight nu only. Its published beta 5 is
    of errors, hence 10 here."""
    return -logsigmoid(beta * (chosen - negative_weight * rejected))


def pso_db(chosen: Tensor, rejected: Tensor, beta: Beta, *, negative_weight: float = 0.1) -> Tensor:
    """``relu(1 - beta (p_w - nu p_l))``: :func:`pso` with a hinge and without a reference, the form of its
    released recipes."""
    return torch.relu(1 - beta * (chosen - negative_weight * rejected))


def prior(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``-beta p_l``, half of beta times the denoising error of the rejected image: keeps a model's own
    samples likely where those are the rejected ones (DreamBooth's prior preservation), a term to add to
    others."""
    return -beta * rejected


def modpo(
    chosen: Tensor, rejected: Tensor, beta: Beta, *, gap: float | Tensor, weight: float = 0.5
) -> Tensor:
    """``-log s( (z - (1 - w) gap) / w )``: this preference with weight w beside another reward whose gap
    between the two images is given (MODPO, Zhou et al. 2023)."""
    return -logsigmoid((beta * (chosen - rejected) - (1.0 - weight) * gap) / weight)


def rpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, policy_chosen: Tensor, eta: float = 1.0) -> Tensor:
    """``-log s(z) - eta p_w``: DPO with the winner's own likelihood as an anchor (RPO)."""
    return sigmoid(chosen, rejected, beta) - eta * policy_chosen


def kto_pair(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """:func:`kto` on both rows of each pair, the reference point taken over the batch."""
    kl = reference_point(torch.cat([chosen, rejected]))
    won = torch.ones_like(chosen, dtype=torch.bool)
    return kto(chosen, won, beta, kl=kl) + kto(rejected, ~won, beta, kl=kl)


def dpop(chosen: Tensor, rejected: Tensor, beta: Beta, *, penalty: float = 5.0) -> Tensor:
    """``-log s(z - beta p relu(-d_w))``: DPO-positive (Pal et al. 2024, eq. 3); punishes a falling winner."""
    return -logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def alpha_dpo(chosen: Tensor, rejected: Tensor, beta: Beta, *, mu: float = 0.9999) -> Tensor:
    """:func:`alpha_divergence` of order ``a = mu s(z)`` (no gradient through a): robust to flipped labels.

    Each pair has an order of its own; the published code takes ``mu`` times the mean of s(z) over the batch
    of all processes, and at the start of a run mu itself.
    """
    log_u = logsigmoid(beta * (chosen - rejected))
    return alpha_divergence(log_u, (mu * log_u.detach().exp()).clamp(min=1e-12))


def alpha_divergence(log_u: Tensor, a: Beta) -> Tensor:
    """``(u^a - (1-a) - a u) / (a (a-1))``, ``u = s(z)``, ``0 < a < 1``; it tends to
    ``-log u + u - 1`` as a -> 0."""
    # expm1 keeps the small difference u^a - 1 where a or log u is small.
    return (torch.expm1(a * log_u) - a * torch.expm1(log_u)) / (a * (a - 1))


def simpo(
    chosen: Tensor, rejected: Tensor, beta: Beta, *, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """``-log s(beta (p_w - p_l) - gamma)`` on the policy's own log-likelihoods (SimPO, Meng et al. 2024,
    eq. 6)."""
    return sigmoid(chosen - gamma / beta, rejected, beta, label_smoothing=label_smoothing)


def alphapo(
    chosen: Tensor, rejected: Tensor, beta: Beta, *, alpha: float = 0.25, gamma: float = 0.5
) -> Tensor:
    """:func:`simpo` on ``(1 - e^{-alpha p}) / alpha`` (AlphaPO, Gupta et al. 2025); p itself at alpha = 0."""
    if alpha:
        chosen, rejected = (-torch.expm1((-alpha * p).clamp(max=20)) / alpha for p in (chosen, rejected))
    return simpo(chosen, rejected, beta, gamma=gamma)


def orpo(chosen: Tensor, rejected: Tensor, beta: Beta) -> Tensor:
    """``-beta log s( log odds_w - log odds_l )``, ``odds = e^p / (1 - e^p)`` (Hong et al. 2024, eq. 7), on
    the policy's own log-likelihoods, which must be negative; :func:`mapo` is its form for denoisers."""
    odds = [p - torch.log(-torch.expm1(p.clamp(max=-1e-7))) for p in (chosen, rejected)]
    return -beta * logsigmoid(odds[0] - odds[1])


def mapo(
    chosen: Tensor,
    rejected: Tensor,
    beta: Beta,
    *,
    snr: float = 0.5,
    steps: float = 1000.0,
    sft_weight: float = 1.0,
) -> Tensor:
    """``sft e_w - beta log s( T (phi(snr e_w) - phi(snr e_l)) )``, ``phi(x) = x / (e^x - 1)``, e the mean
    denoising errors (MaPO, Hong et al. 2024): no reference, beta near 0.1.

    Takes ``ell = -e / 2`` like every loss here. The published expression cancels for small errors (a wrong
    sign for near pairs, NaN at 0); this one does not.
    """
    logit = mapo_logit(chosen, rejected, snr=snr, steps=steps)
    return -2.0 * sft_weight * chosen - beta * logsigmoid(logit)


def mapo_logit(chosen: Tensor, rejected: Tensor, *, snr: float, steps: float) -> Tensor:
    """``T (phi(snr e_w) - phi(snr e_l))``, about ``T snr (ell_w - ell_l)`` for small errors."""
    w, l = (_phi_minus_one(-2.0 * snr * ell) for ell in (chosen, rejected))  # noqa: E741
    return steps * (w - l)


# B_2k / (2k)!, k = 1..6: x / (e^x - 1) = 1 - x/2 + sum_k of it x^2k.
_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)


def _phi_minus_one(x: Tensor) -> Tensor:
    """``x / (e^x - 1) - 1`` without cancellation near 0, nor overflow far from it."""
    small = x.abs() < 0.25
    near = torch.where(small, x, 0.0)  # where() lets NaN of the branch not taken into the gradient
    series = torch.zeros_like(x)
    for coefficient in reversed(_BERNOULLI):
        series = (series + coefficient) * near.square()
    away = torch.where(small, 1.0, x).clamp(max=60.0)
    return torch.where(small, series - near / 2, away / torch.expm1(away) - 1)


#: Tensors that a loss may ask for beside the log-ratios.
LossInput = Literal["reference_margin", "policy_chosen", "preference", "gap", "reward_mean"]


@dataclass(frozen=True)
class Loss:
    """A row of :data:`LOSSES`.

    ``fn(chosen, rejected, beta, **options) -> (B,)``; ``reference``: whether the log-ratios are against a
    reference (if not, no reference is run or loaded); ``options``: the names of its own settings; ``inputs``:
    further tensors (B,) that it is given by name: ``reference_margin`` is ``ell_ref(w) - ell_ref(l)``,
    ``policy_chosen`` the policy's ``ell(w)``, ``preference`` the probability that the chosen image wins,
    ``gap`` the difference of the images' scores, ``reward_mean`` a running mean of ``beta d``;
    ``batchwise``: whether the pairs of a batch see one another; ``exponential``: whether log-ratios are
    exponentiated, and so must be in nats (an option ``scale``).
    """

    fn: Callable[..., Tensor]
    reference: bool = True
    options: tuple[str, ...] = ()
    inputs: tuple[LossInput, ...] = ()
    batchwise: bool = False
    exponential: bool = False

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        beta: Beta,
        *,
        preference: Tensor | None = None,
        gap: Tensor | None = None,
        reward_mean: float = 0.0,
        nats: float = 1.0,
        **options: float,
    ) -> Tensor:
        """The loss ``(B,)`` from log-likelihoods ``(2B,)`` of ``[chosen_1..B, rejected_1..B]``.

        `reference` is None for a loss without one; `preference` and `gap` are ``(B,)``, 1 and 0 unless given.
        `nats` is how many nats a log-ratio of 1 is (:func:`nats_per_unit`), for a loss that is exponential
        and has no `scale` among its options: it is its scale, and `beta`, as the strength for log-ratios in
        the units that they are given in, is divided by it. So pairs near the reference are pulled as hard as
        :func:`sigmoid` pulls them (with ``js``, half as hard), whatever `nats` is.
        """
        if self.exponential and "scale" not in options:
            options, beta = {**options, "scale": nats}, beta / nats
        chosen, rejected = (policy if reference is None else policy - reference).chunk(2)
        margin = (
            torch.zeros_like(chosen) if reference is None else reference.chunk(2)[0] - reference.chunk(2)[1]
        )
        given = {
            "reference_margin": margin,
            "policy_chosen": policy.chunk(2)[0],
            "preference": torch.ones_like(chosen) if preference is None else preference,
            "gap": torch.zeros_like(chosen) if gap is None else gap,
            "reward_mean": torch.full_like(chosen, reward_mean),
        }
        return self.fn(chosen, rejected, beta, **options, **{name: given[name] for name in self.inputs})


def _f_dpo(divergence: str, *options: str) -> Loss:
    return Loss(partial(f_dpo, divergence=divergence), options=("scale", *options), exponential=True)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, options=("label_smoothing",)),
    "robust": Loss(robust, options=("label_smoothing",)),
    "ipo": Loss(ipo),
    "ipo_raw": Loss(ipo_raw),
    "hinge": Loss(hinge),
    "exo_pair": Loss(exo_pair, options=("label_smoothing",)),
    "dmpo": Loss(dmpo, options=("label_smoothing",)),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair, options=("offset",)),
    "bco": Loss(bco, inputs=("reward_mean",)),
    "ddo": Loss(ddo, options=("fake_weight",)),
    "kto_pair": Loss(kto_pair, batchwise=True),
    "seppo": Loss(seppo),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "sppo": Loss(sppo, inputs=("preference",)),
    "dpop": Loss(dpop, options=("penalty",)),
    "rpo": Loss(rpo, options=("eta",), inputs=("policy_chosen",)),
    "discopop": Loss(discopop, options=("temperature",)),
    "alpha_dpo": Loss(alpha_dpo, options=("mu",)),
    "forward_kl": _f_dpo("forward_kl"),
    "js": _f_dpo("js"),
    "alpha_divergence": _f_dpo("alpha", "alpha"),
    "aot": Loss(aot, options=("label_smoothing",), inputs=("reference_margin",), batchwise=True),
    "aot_unpaired": Loss(aot_unpaired, options=("label_smoothing",), batchwise=True),
    "offset_dpo": Loss(offset_dpo, options=("offset",)),
    "odpo": Loss(odpo, options=("scale",), inputs=("gap",)),
    "soft_labels": Loss(soft_labels, options=("temperature",), inputs=("gap",)),
    "modpo": Loss(modpo, options=("weight",), inputs=("gap",)),
    "simpo": Loss(simpo, reference=False, options=("gamma", "label_smoothing")),
    "cpo": Loss(sigmoid, reference=False, options=("label_smoothing",)),
    "alphapo": Loss(alphapo, reference=False, options=("alpha", "gamma")),
    "orpo": Loss(orpo, reference=False),
    "mapo": Loss(mapo, reference=False, options=("snr", "steps", "sft_weight")),
    "pso": Loss(pso, options=("negative_weight",)),
    "pso_db": Loss(pso_db, reference=False, options=("negative_weight",)),
    "sft": Loss(sft, reference=False),
    "prior": Loss(prior, reference=False),
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


def automatic_beta(margin: float, *, target: float = 0.2, low: float = 1.0, high: float = 1e5) -> float:
    """The beta at which a pair of margin ``|D|`` has gradient factor ``s(-beta |D|) = target``.

    Args:
        margin: running mean of ``|chosen - rejected|``.
        target: between 0 and 1/2; the smaller, the looser the policy is held.
        low, high: bounds of the result, which a margin near 0 or a very large one would leave.
    """
    if not 0.0 < target < 0.5:
        raise UserError(f"the target of an automatic beta must lie between 0 and 0.5, but is {target}")
    return min(max(math.log(1.0 / target - 1.0) / max(margin, 1e-30), low), high)


def nats_per_unit(mean_square: float) -> float:
    """``1 / sqrt(E d^2)``, which brings log-ratios to about 1 nat; 1 where all are 0, at the reference.

    How many nats a denoising error truly is depends on weighting and schedule. A divergence needs their order
    of magnitude: far below 1 all divergences are alike, far above only the clamp is left of them.

    Args:
        mean_square: running mean of ``d^2`` over chosen and rejected images, about 0, where the reference is,
            and not about the mean of d, which moves away from it.
    """
    return 1.0 / math.sqrt(mean_square) if mean_square > 0 else 1.0


# ------------------------------------------------------- rows with a label


Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]

#: Diffusion-KTO's value functions of ``v = +-beta (d - kl)`` (Li et al. 2024, section 4), as losses.
_UTILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda v: 1 - torch.sigmoid(v),
    "loss_averse": lambda v: 1 - logsigmoid(v),
    "risk_seeking": lambda v: 1 + logsigmoid(-v),
}


def reference_point(log_ratio: Tensor) -> Tensor:
    """KTO's estimate of the divergence: the batch's mean log-ratio, at least 0, without gradient.

    With several processes, reduce the mean over them before it is clamped.
    """
    return log_ratio.detach().mean().clamp(min=0)


def kto(
    log_ratio: Tensor,
    good: Tensor,
    beta: Beta,
    *,
    kl: float | Tensor = 0.0,
    weight_good: float = 1.0,
    weight_bad: float = 1.0,
    utility: Utility = "sigmoid",
) -> Tensor:
    """``w (1 - U( +-beta (d - kl) ))``, + for good rows (KTO, Ethayarajh et al. 2024; Diffusion-KTO).

    Args:
        log_ratio: ``(B,)``. Diffusion-KTO's own log-ratio has no half: its beta is half of this one.
        good: ``(B,)`` bool.
        beta: as for pairs.
        kl: from :func:`reference_point`.
        weight_good, weight_bad: of the two kinds of rows.
        utility: ``sigmoid``, ``loss_averse`` (log s(v)) or ``risk_seeking`` (-log s(-v)).
    """
    won = good.to(log_ratio)
    sign = 2 * won - 1
    weight = weight_bad + (weight_good - weight_bad) * won
    return weight * _UTILITIES[utility](sign * beta * (log_ratio - kl))


# ------------------------------------------------------- lists of images of one prompt


def plackett_luce(log_ratio: Tensor, beta: Beta) -> Tensor:
    """``-sum_k log softmax(beta d)`` over the images that remain: likelihood of a whole ranking.

    Args:
        log_ratio: ``(B, K)``, columns from best to worst.
    """
    z = beta * log_ratio
    remaining = z.flip(-1).logcumsumexp(-1).flip(-1)
    return (remaining - z)[..., :-1].sum(-1)


def soft_targets(log_ratio: Tensor, beta: Beta, *, rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of ``softmax(beta d)`` under ``softmax(rewards / temperature)`` (BRAIn), both
    ``(B, K)``."""
    return -(softmax(rewards / temperature, -1) * log_softmax(beta * log_ratio, -1)).sum(-1)


def lambda_rank(log_ratio: Tensor, beta: Beta, *, rewards: Tensor) -> Tensor:
    """Pairwise DPO over a list, each pair weighted by what swapping it does to the discounted gain (TPO)::

        sum over r_i > r_j of |2^r_i - 2^r_j| |1/log2(1+rank_i) - 1/log2(1+rank_j)| (-log s(beta (d_i - d_j)))

    That is the paper's; the published code leaves the weights out.

    Args:
        log_ratio, rewards: ``(B, K)``; ranks count from 1, the best.
    """
    ranks = rewards.argsort(-1, descending=True).argsort(-1) + 1
    gain, discount = torch.exp2(rewards), 1 / torch.log2(1 + ranks.to(rewards))

    def differences(x: Tensor) -> Tensor:
        return x[..., :, None] - x[..., None, :]

    weight = differences(gain).abs() * differences(discount).abs()
    better = differences(rewards) > 0
    return (weight * better * -logsigmoid(beta * differences(log_ratio))).sum((-2, -1))


@dataclass(frozen=True)
class ListLoss:
    """A row of :data:`LIST_LOSSES`.

    ``fn(log_ratio, beta, **options) -> (B,)`` of ``log_ratio (B, K)``, columns from the best image to the
    worst, against a reference; ``options``: the names of its own settings; ``rewards``: whether it is given
    ``rewards (B, K)`` as well.
    """

    fn: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    rewards: bool = False

    def __call__(self, log_ratio: Tensor, beta: Beta, rewards: Tensor, **options: float) -> Tensor:
        """The loss ``(B,)``."""
        given = {"rewards": rewards} if self.rewards else {}
        return self.fn(log_ratio, beta, **given, **options)


LIST_LOSSES: dict[str, ListLoss] = {
    "plackett_luce": ListLoss(plackett_luce),
    "soft_targets": ListLoss(soft_targets, options=("temperature",), rewards=True),
    "lambda_rank": ListLoss(lambda_rank, rewards=True),
}


# ------------------------------------------------------- on predictions


def winner_preserving_scale(chosen: Tensor, rejected: Tensor, *, mu: float, per_pair: bool = True) -> Tensor:
    """How much of the loser's gradient keeps the winner's error from rising (Diffusion-SDPO).

    With the residuals ``prediction - target`` as gradients of the two errors, ``g_w`` and ``g_l``::

        min(1, (1 - mu) |g_w|^2 / (g_w . g_l))   where g_w . g_l > 0, else 1

    Args:
        chosen, rejected: residuals ``(B, C, ...)`` of the policy; no gradient is taken through them.
        mu: between 0 (the winner's error may stay) and 1 (no push at all against it); published: 0.9 for SD
            1.5, 0.6 for SDXL.
        per_pair: False is the published code's form: one number for the whole micro-batch, with 1e-9 added to
            the product of its gradients. They are those of means over all n elements, ``2 g / n``, so large
            batches of small errors are held back more than the formula says.

    Returns:
        ``(B,)``; multiply the gradient of the loser's error by it, see :func:`scale_gradient`.
    """
    w, l = (r.detach().flatten(1) for r in (chosen, rejected))  # noqa: E741
    square, product = w.square().sum(1), (w * l).sum(1)
    if not per_pair:
        square, product = (x.sum().expand(len(w)) for x in (square, product))
    free = product <= 0
    held = product if per_pair else product + 1e-9 * w.numel() ** 2 / 4
    ratio = (1 - mu) * square / torch.where(free, 1.0, held)
    return torch.where(free, 1.0, ratio.clamp(max=1.0))


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """`value` itself, whose gradient is multiplied by `scale`."""
    return value.detach() + scale * (value - value.detach())


def dspo_residual(residual: Tensor, shift: Tensor, logit: Tensor, beta: Beta) -> Tensor:
    """``(f - y) - beta s(-z) (f - f_ref)`` of the chosen image, whose mean square is the loss of DSPO (Zhu et
    al. 2025): score matching towards the preferred distribution. For SDXL the published code has another
    loss, without the target; this one is for SDXL as well.

    Args:
        residual: ``f - y`` (B, C, ...); ``shift``: ``f - f_ref``, alike.
        logit: (B,) z of the pair; beta: near 1e-3.
    """
    factor = beta * torch.sigmoid(-logit)
    return residual - factor.reshape(-1, *[1] * (residual.ndim - 1)) * shift


# ------------------------------------------------------- on sampling trajectories


def clip_log_ratio(log_ratio: Tensor, epsilon: float) -> Tensor:
    """``log clamp(e^d, 1 - epsilon, 1 + epsilon)``, with gradient exactly 0 outside, on both sides: what
    D3PO, SPO and PSO put into :func:`sigmoid`. A ratio that moved the wrong way can't recover; log the
    clipped share."""
    return log_ratio.clamp(math.log1p(-epsilon), math.log1p(epsilon))


def policy_gradient(
    log_ratio: Tensor, advantage: Tensor, *, clip: float = 1e-4, advantage_clip: float = 5.0
) -> Tensor:
    """``max(-A q, -A clamp(q, 1 - clip, 1 + clip))``, ``q = e^d``: the loss of DDPO and Flow-GRPO.

    Args:
        log_ratio: ``(B,)`` of the policy to the one that drew the samples. A clip of 1e-4 belongs to means
            over the elements of a latent, not to sums.
        advantage: ``(B,)``; held within +-advantage_clip.
    """
    held = advantage.clamp(-advantage_clip, advantage_clip)
    q = log_ratio.exp()
    return torch.maximum(-held * q, -held * q.clamp(1 - clip, 1 + clip))
