"""DDIM (Song et al. 2021): the first-order solver, with any amount of the posterior's noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffalign.errors import UserError
from diffalign.solvers.options import scheduler_options
from diffalign.solvers.plan import Plan, Row, linear, working_dtype
from diffalign.solvers.scheduler import Array, PlanScheduler, SchedulerMixin

# Loading a pipeline, diffusers looks for SchedulerMixin in the module that defines the class.
__all__ = ["DDIMScheduler", "SchedulerMixin"]


class DDIMScheduler(PlanScheduler):
    """``x_t = alpha_t x0 + sqrt(sigma_t^2 - s^2) eps + s z`` with ``s = eta sigma_t sqrt(1 - e^{-2h})``.

    ``h`` is the step in half log-SNR; for VP schedules s is equation 16 of the paper, and the form holds for
    flow schedules as well. eta = 0 is the probability-flow ODE at first order, eta = 1 ancestral sampling
    (DDPM). eps is re-derived from x0 where x0 has been clipped or thresholded.

    Args:
        eta: noise of ``step`` when it isn't given there (or given as 0, which is what pipelines pass by
            default).
        set_alpha_to_one: end at the clean image; else at the first training step.
        clip_sample, clip_sample_range: clamp x0.
        grid: where the network is asked (:data:`diffalign.solvers.grids.GRIDS`).

    The other options are diffusers'.
    """

    _grid_with_end = False

    @scheduler_options
    def __init__(
        self,
        eta: float = 0.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "leading",
        **shared: Any,
    ) -> None:
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta must lie between 0 and 1, but is {eta}")
        self._eta = float(eta)

    def _final(self) -> str:
        return "zero" if self.config.set_alpha_to_one else "sigma_min"

    def _transforms(self) -> bool:
        return bool(self.config.thresholding or self.config.clip_sample)

    def _transform(self, m: Tensor, sample: Tensor) -> Tensor:
        if self.config.thresholding:
            return super()._transform(m, sample)
        return m.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

    def _plan(self, times: Array) -> Plan:
        alpha, sigma = self.schedule.alpha_sigma(times)
        lambda_ = self.schedule.lambda_(times)
        rows = []
        for e, time in enumerate(times[:-1]):
            a, s, a_next, s_next = (float(v) for v in (alpha[e], sigma[e], alpha[e + 1], sigma[e + 1]))
            noise = 0.0
            if self._eta and s_next > 0:
                noise = self._eta * s_next * math.sqrt(-math.expm1(-2.0 * float(lambda_[e + 1] - lambda_[e])))
            direction = math.sqrt(max(s_next**2 - noise**2, 0.0)) / s
            rows.append(
                Row(
                    time=float(time),
                    convert=self._conversion(time),
                    x={e: direction},
                    m={e: a_next - direction * a},
                    z={e: noise} if noise else {},
                )
            )
        return Plan(tuple(rows))

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor]:
        """As :meth:`PlanScheduler.step`; ``eta`` other than None or 0 replaces the config's for the run.

        With ``return_dict`` the output also has ``pred_original_sample``. ``use_clipped_model_output``, which
        ``DDIMPipeline`` passes, changes nothing: eps always goes with the x0 that is used.
        """
        wanted = float(eta or self.config.eta)
        if wanted != self._eta:
            if not 0.0 <= wanted <= 1.0:
                raise UserError(f"eta must lie between 0 and 1, but is {wanted}")
            self._eta = wanted
            if self._times is not None:
                self._start_at(self._origin)
        result: Any = super().step(
            model_output,
            timestep,
            sample,
            generator=generator,
            variance_noise=variance_noise,
            return_dict=return_dict,
        )
        if not return_dict:
            return result
        return DDIMSchedulerOutput(result.prev_sample, self._data_prediction(model_output, sample))

    def _data_prediction(self, model_output: Tensor, sample: Tensor) -> Tensor:
        assert self._step_index is not None
        c_x, c_o = self._planned.rows[self._step_index - 1 - self._origin].convert
        terms = [(float(c_x), sample), (float(c_o), model_output[:, : sample.shape[1]])]
        x0 = linear(terms, working_dtype(sample))
        return (self._transform(x0, sample) if self._transforms() else x0).to(sample.dtype)
