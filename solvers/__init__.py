"""Few-step samplers as diffusers schedulers: ``pipe.scheduler = X.from_config(pipe.scheduler.config)``.

Names load on first use. ``SOLVERS`` maps the name of a method to its class.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError, suggestion

if TYPE_CHECKING:
    from diffalign.solvers.adjoint import continuous_sample, differentiable_sample
    from diffalign.solvers.calibrated import CalibratedScheduler
    from diffalign.solvers.dc_solver import DCSolverScheduler
    from diffalign.solvers.ddim import DDIMScheduler
    from diffalign.solvers.dpm_solver import DPMSolverScheduler
    from diffalign.solvers.dpm_solver_pp import DPMSolverPPScheduler
    from diffalign.solvers.dpm_solver_v3 import DPMSolverV3Scheduler
    from diffalign.solvers.integration import integrate
    from diffalign.solvers.mixture import GaussianMixture
    from diffalign.solvers.noise import NoiseSchedule
    from diffalign.solvers.pndm import PNDMScheduler
    from diffalign.solvers.sampling import sample
    from diffalign.solvers.scheduler import PlanScheduler
    from diffalign.solvers.shifted import ShiftedScheduler
    from diffalign.solvers.statistics import Statistics
    from diffalign.solvers.time_shift import TimeShiftScheduler
    from diffalign.solvers.unipc import UniPCScheduler

_SCHEDULERS = {
    "dc-solver": ("dc_solver", "DCSolverScheduler"),
    "ddim": ("ddim", "DDIMScheduler"),
    "dpm-solver": ("dpm_solver", "DPMSolverScheduler"),
    "dpm-solver++": ("dpm_solver_pp", "DPMSolverPPScheduler"),
    "dpm-solver-v3": ("dpm_solver_v3", "DPMSolverV3Scheduler"),
    "pndm": ("pndm", "PNDMScheduler"),
    "unipc": ("unipc", "UniPCScheduler"),
    "time-shift": ("time_shift", "TimeShiftScheduler"),
}
_OTHERS = {
    "CalibratedScheduler": "calibrated",
    "GaussianMixture": "mixture",
    "NoiseSchedule": "noise",
    "PlanScheduler": "scheduler",
    "ShiftedScheduler": "shifted",
    "Statistics": "statistics",
    "continuous_sample": "adjoint",
    "differentiable_sample": "adjoint",
    "integrate": "integration",
    "sample": "sampling",
}
_LAZY = {**_OTHERS, **{name: module for module, name in _SCHEDULERS.values()}}


class _Registry(Mapping[str, type]):
    """Read-only mapping from the name of a method to its scheduler class, imported when asked for."""

    def __getitem__(self, name: str) -> type:
        if name not in _SCHEDULERS:
            raise UnknownSolver(
                f"unknown solver {name!r}{suggestion(str(name), list(self))}; "
                f"it may be one of {', '.join(self)}"
            )
        module, attribute = _SCHEDULERS[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)

    def __contains__(self, name: object) -> bool:
        return name in _SCHEDULERS

    def __iter__(self) -> Iterator[str]:
        return iter(_SCHEDULERS)

    def __len__(self) -> int:
        return len(_SCHEDULERS)


class UnknownSolver(UserError, KeyError):
    """A name that is not in ``SOLVERS``."""

    def __str__(self) -> str:
        return str(self.args[0])


SOLVERS: Mapping[str, type] = _Registry()


def import_schedulers() -> None:
    """Import the modules of all schedulers: diffusers opens no pipeline saved with one otherwise."""
    for module in ("calibrated", "shifted", *(module for module, _ in _SCHEDULERS.values())):
        importlib.import_module(f"{__name__}.{module}")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "SOLVERS",
    "CalibratedScheduler",
    "DCSolverScheduler",
    "DDIMScheduler",
    "DPMSolverPPScheduler",
    "DPMSolverScheduler",
    "DPMSolverV3Scheduler",
    "GaussianMixture",
    "NoiseSchedule",
    "PNDMScheduler",
    "PlanScheduler",
    "ShiftedScheduler",
    "Statistics",
    "TimeShiftScheduler",
    "UniPCScheduler",
    "continuous_sample",
    "differentiable_sample",
    "import_schedulers",
    "integrate",
    "sample",
]
