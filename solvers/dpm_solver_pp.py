"""DPM-Solver++ (Lu et al. 2022b): exponential integration of the data prediction in half log-SNR."""

from __future__ import annotations

from typing import Any

from diffalign.solvers.dpm import DPMScheduler, dpm_options
from diffalign.solvers.options import scheduler_options
from diffalign.solvers.scheduler import SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DPMSolverPPScheduler", "SchedulerMixin"]


class DPMSolverPPScheduler(DPMScheduler):
    """DPM-Solver++ of order 1 to 3, single- or multistep, as an ODE or SDE. Order 1 is DDIM.

    With ``h`` the step in half log-SNR, ``phi_k`` at ``-h`` and ``D1, D2`` the derivatives, in fractions of
    the step, of the polynomial through the newest data predictions or through those of the step's stages:

        x_t = (sigma_t / sigma_s) x - alpha_t [phi_1 m + phi_2 D1 + phi_3 D2]

    :mod:`diffalign.solvers.exponential` has the formulas, the SDE's too.

    Args:
        solver_order: 1, 2 or 3; 2 is the robust choice for guided sampling.
        algorithm_type: ``dpmsolver++``, the probability-flow ODE, or ``sde-dpmsolver++``, which adds noise in
            every step.
        solver_method: ``multistep`` reuses earlier predictions (2M, 3M); ``singlestep`` forgets them and
            spends several evaluations on a step (2S, 3S), each of which counts in ``num_inference_steps``.
            Configs of diffusers' singlestep class don't say that they are, so ask for it.
        solver_type: at second order, ``midpoint`` (phi_2 replaced by phi_1 / 2) or ``heun`` (phi_2; the
            papers' Taylor type). At third order singlestep ``midpoint`` reads the last stage alone, ``heun``
            both.
        third_order: of multistep, ``taylor``, which is of third order, or ``published``, whose D2 is half as
            large: the published code has it, and diffusers too, and is of second order. (Either begins with
            one step of first and one of second order, whose error shows from some 100 steps on.)
        lower_order_final: lower the order of the last steps: multistep when there are fewer than 15; of a
            singlestep third-order run of 3 k evaluations the last step becomes one of order 2 and one of
            order 1 (the published ``singlestep``; False is its ``singlestep_fixed``).
        euler_at_final: always take the last step at first order.
        final_sigmas_type: end at the clean image (``zero``; the last step is then exact at first order) or at
            the first training step (``sigma_min``).
        denoise_to_zero: integrate to the first training step with all evaluations but one, and return the
            data prediction of the last, made there.
        sde_eta: noise of the SDE; 1 reverses the diffusion, 0 is the ODE, and what lies between or beyond has
            the same marginals.
        s_noise: factor of the noise, for images too smooth or too rough.
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`); ``auto`` unless you compare
            with diffusers, whose grids ``diffusers`` reproduces. A ``use_*_sigmas`` flag set in the config
            wins over ``auto``.

    The other options are diffusers'.
    """

    algorithms = ("dpmsolver++", "sde-dpmsolver++")

    @scheduler_options(beside=dpm_options)
    def __init__(self, **shared: Any) -> None:
        self._check()
