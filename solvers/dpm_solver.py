"""DPM-Solver (Lu et al. 2022a): exponential integration of the noise prediction in half log-SNR."""

from __future__ import annotations

from typing import Any

from diffalign.solvers.dpm import DPMScheduler, dpm_options
from diffalign.solvers.options import scheduler_options
from diffalign.solvers.scheduler import SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DPMSolverScheduler", "SchedulerMixin"]


class DPMSolverScheduler(DPMScheduler):
    """DPM-Solver of order 1 to 3, single- or multistep, as an ODE or SDE. Order 1 is DDIM.

    With ``h`` the step in half log-SNR, ``phi_k`` at ``h`` and ``D1, D2`` the derivatives, in fractions of
    the step, of the polynomial through the newest noise predictions or through those of the step's stages:

        x_t = (alpha_t / alpha_s) x - sigma_t [phi_1 m + phi_2 D1 + phi_3 D2]

    At the clean image this is infinity times zero: a step that ends there returns the data prediction, which
    is its limit at first order. With guidance the data form (``dpm-solver++``) is more robust.

    Args:
        algorithm_type: ``dpmsolver``, the probability-flow ODE, or ``sde-dpmsolver``, which adds noise in
            every step. The names with ``++`` mean the same here, and replace these in the config where
            sampling ends at the clean image: there diffusers refuses the others.

    All other options are those of :class:`~diffalign.solvers.dpm_solver_pp.DPMSolverPPScheduler`.
    """

    form = "epsilon"
    algorithms = ("dpmsolver", "sde-dpmsolver", "dpmsolver++", "sde-dpmsolver++")

    @scheduler_options(beside=dpm_options)
    def __init__(self, algorithm_type: str = "dpmsolver", **shared: Any) -> None:
        self._check()
        if self.config.final_sigmas_type == "zero" and not self.config.algorithm_type.endswith("++"):
            self.register_to_config(algorithm_type=f"{self.config.algorithm_type}++")
