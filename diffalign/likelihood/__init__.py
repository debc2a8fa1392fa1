"""How likely a denoiser finds an image: one module for every trainer, with two views.

*Forward view* (:mod:`~diffalign.likelihood.forward`): the error of denoising a clean image, a surrogate for
its log-likelihood. *Trajectory view* (:mod:`~diffalign.likelihood.trajectory`): the exact log-likelihood of
the steps by which a stochastic sampler made it.

What a loss sees is the same in both: the *log-ratio* of policy and reference, one float per row, so every
loss takes either. Precision: predictions are brought to float32 *before* they are subtracted, and noise
levels come from a float64 table. A reference reduced in half precision alone would give Diffusion-DPO's logit
at beta 5000 a spurious spread of 0.5 (fp16) to 3.6 (bf16). A policy equal to its reference has log-ratio
exactly 0.
"""

from diffalign.likelihood.forward import (
    WEIGHTINGS,
    Conditions,
    Denoise,
    Errors,
    Noised,
    Reduce,
    add_noise,
    denoising_error,
    error_weight,
    evaluate,
)
from diffalign.likelihood.trajectory import LAWS, Gaussian, Transition, guided

__all__ = [
    "LAWS",
    "WEIGHTINGS",
    "Conditions",
    "Denoise",
    "Errors",
    "Gaussian",
    "Noised",
    "Reduce",
    "Transition",
    "add_noise",
    "denoising_error",
    "error_weight",
    "evaluate",
    "guided",
]
