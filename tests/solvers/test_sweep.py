"""No combination of options crashes or yields a number that isn't finite: it works, or a sentence refuses it.

The space is drawn from by hypothesis, from the registry and the signatures, so that a new scheduler or a new
switch joins as it is added; the grid of combinations that raise in diffusers is gone through in full.
"""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers import SOLVERS
from diffalign.solvers.grids import GRIDS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULES = {
    "linear": {},
    "scaled_linear": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "exp": {"beta_schedule": "exp"},
    "zero snr": {**SD, "rescale_betas_zero_snr": True},
    "zero snr, cosine": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    "100 betas": {"trained_betas": np.linspace(1e-4, 0.2, 100).tolist()},
    "3 betas": {"trained_betas": [0.1, 0.2, 0.5]},
    "2 steps": {"num_train_timesteps": 2},
    "4000 steps": {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    "flow": FLOW,
    "shifted flow": {**FLOW, "flow_shift": 3.0, "use_dynamic_shifting": True},
    "flow with an end": {**FLOW, "flow_shift": 1.5, "shift_terminal": 0.02},
}
FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
COMMON = {
    "grid": GRIDS,
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "steps_offset": (0, 1, 5),
    "thresholding": (False, True),
    "dynamic_thresholding_ratio": (0.995, 0.5, 1.0),
    "sample_max_value": (1.0, 2.0, float("inf")),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "lambda_min_clipped": (-float("inf"), -5.1, -2.0, 3.0),
}
#: Values by the name of an option, for every class that has one of that name. Switches need no entry.
OWN = {
    "solver_order": (1, 2, 3, 4),
    "final_sigmas_type": ("zero", "sigma_min"),
    "eta": (0.0, 0.5, 1.0),
    "solver_method": ("multistep", "singlestep"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "third_order": ("taylor", "published"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    "sde_eta": (0.0, 0.5, 1.0, 1.5),
    "variant": ("auto", "plms", "plms-heun", "s-pndm", "f-pndm"),
    "convention": ("consistent", "uniform", "published"),
    "predictor": ("unipc", "dpm-solver++", "ddim"),
    "dc_order": (1, 2, 3),
    "last_step_ratio": (None, 1.85, 0.5),
    "disable_corrector": ([], [0], [0, 1, 4]),
    "solver": tuple(name for name in SOLVERS if name != "time-shift"),
    "data_variance": (None, 0.3, 4.0),
    "mode": ("corrected", "published", "released"),
    "pool": ("batch", "sample"),
    "window": (0, 20, 100),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEPS = st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(1, 50), st.just(100))


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def network(x, t):
    """Outputs of the size that a network's have, whatever the sample."""
    return (0.7 * torch.tanh(x.float()) + 0.1 * x.float().roll(1, 1).clamp(-3, 3)).to(x.dtype)


def choices(cls):
    """Option -> values, of a class."""
    values = COMMON | OWN
    parameters = inspect.signature(cls).parameters
    switches = {n: (True, False) for n, p in parameters.items() if isinstance(p.default, bool)}
    derived = {"use_flow_sigmas", "use_dynamic_shifting", "rescale_betas_zero_snr", *FLAGS}
    return {n: v for n, v in (switches | values).items() if n in parameters and n not in derived}


@st.composite
def cases(draw):
    """(class, its options, how the times are chosen, number of steps)."""
    cls = SOLVERS[draw(st.sampled_from(list(SOLVERS)))]
    schedule = draw(st.sampled_from(list(SCHEDULES.values())))
    table = choices(cls)
    names = draw(st.lists(st.sampled_from(sorted(table)), unique=True, max_size=8))
    options = {name: draw(st.sampled_from(table[name])) for name in names}
    flag = draw(st.sampled_from((None, None, *FLAGS)))
    if flag is not None:
        options[flag] = True
    if schedule.get("use_flow_sigmas") and options.get("prediction_type") != "sample":
        options.pop("prediction_type", None)
    how = draw(st.sampled_from(("steps", "steps", "steps", "timesteps", "sigmas", "mu")))
    return cls, schedule | options, how, draw(STEPS)


def arguments(schedule, how, steps):
    """What ``set_timesteps`` is given."""
    if how == "timesteps":
        times = np.linspace(schedule.t_max, schedule.t_min, steps + 1)[:-1]
        return {"timesteps": times.tolist()}
    if how == "sigmas":
        high = min(float(schedule.sigma_diffusers(schedule.t_max)), 80.0)
        return {"sigmas": np.geomspace(high, min(0.05, high / 2), steps).tolist()}
    return {"num_inference_steps": steps} | ({"mu": 0.7} if how == "mu" else {})


def run(scheduler, *, begin=None, dtype=torch.float32):
    """A whole run; every sample is checked. Returns the largest number met."""
    if begin is not None:
        scheduler.set_begin_index(begin)
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    evaluations, largest = 0, 0.0
    for t in scheduler.timesteps[begin or 0 :]:
        output = network(scheduler.scale_model_input(x, t), t)
        evaluations += 1
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        assert torch.isfinite(x).all(), f"not finite after t = {float(t)}"
        assert x.dtype == dtype
        largest = max(largest, float(x.abs().max()))
    assert evaluations == len(scheduler.timesteps) - (begin or 0)
    assert scheduler.step_index == scheduler.num_inference_steps == len(scheduler.timesteps)
    return largest


#: Words of the options: a refusal must hold one, so that the reader knows what to change.
WORDS = {*COMMON, *OWN, *FLAGS, "timesteps", "sigmas", "mu", "betas", "num_train_timesteps", "prediction"}
WORDS |= {"rescale_betas_zero_snr", "flow schedule", "prediction_type", "predict_x0"}


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    case=cases(),
    begin=st.one_of(st.none(), st.floats(0, 1)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_options_work_or_are_refused_in_a_sentence(case, begin, dtype):
    cls, options, how, steps = case
    refusal = ""
    try:
        scheduler = cls(**options)
        scheduler.set_timesteps(**arguments(scheduler.schedule, how, steps))
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert any(word in refusal for word in WORDS)
        return
    count = len(scheduler.timesteps)
    assert scheduler.num_inference_steps == count == steps
    assert len(scheduler.sigmas) == count + 1
    assert torch.isfinite(scheduler.sigmas).all()
    assert torch.isfinite(scheduler.timesteps.double()).all()
    begin = None if begin is None else int(begin * (count - 1))
    if dtype == torch.float16:
        # A solver in noise form that diverges on few steps from almost pure noise may pass its range.
        largest = run(scheduler, begin=begin)
        scheduler.set_timesteps(**arguments(scheduler.schedule, how, steps))
        if largest > 0.5 * torch.finfo(dtype).max:
            return
    run(scheduler, begin=begin, dtype=dtype)


# ---------------------------------------------------------------- the grid that crashes diffusers

#: The methods of the report, diffusers' multistep, singlestep and UniPC, go through all of it.
REPORTED = [("dpm-solver++", {}), ("dpm-solver++", {"solver_method": "singlestep"}), ("unipc", {})]
METHODS = [
    *REPORTED,
    *((name, {}) for name in SOLVERS if name not in ("dpm-solver++", "unipc")),
    ("dpm-solver", {"solver_method": "singlestep"}),
    ("dpm-solver++", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpm-solver++", {"denoise_to_zero": True}),
    ("pndm", {"variant": "f-pndm"}),
    ("ddim", {"eta": 1.0}),
]


@pytest.mark.parametrize(
    ("name", "options"), METHODS, ids=["-".join(map(str, (n, *o.values()))) for n, o in METHODS]
)
def test_the_grid_of_combinations_that_crash_diffusers(name, options):
    """171 of these raise in diffusers 0.42.1; here none may even be refused."""
    cls = SOLVERS[name]
    parameters = inspect.signature(cls).parameters
    own = {
        "solver_order": (1, 2, 3),
        "final_sigmas_type": ("zero", "sigma_min"),
        "grid": ("auto", "diffusers"),
    }
    axes = [[{option: value} for value in values] for option, values in own.items() if option in parameters]
    flags = [{}, *({flag: True} for flag in FLAGS)]
    combinations = list(itertools.product(*axes, flags, (SCHEDULES["linear"], SD, SCHEDULES["cosine"])))
    # Of the others a seventh: the drawn cases above hold what is left.
    for parts in combinations[:: 1 if (name, options) in REPORTED else 7]:
        scheduler = cls(**{option: value for part in parts for option, value in part.items()} | options)
        for steps in (1, 2, 3, 5, 10, 15, 25, 50):
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == steps
            if steps in (3, 10):
                run(scheduler)
            else:  # a plan refuses coefficients that are not finite
                assert len(scheduler.plan.rows) == steps


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 9, 14, 15, 37, 1000])
def test_any_number_of_steps_on_any_grid(name, steps):
    """On the schedule of Stable Diffusion with the default options; at 1000 the default grid."""
    for grid in [g for g in GRIDS if g != "flow"] if steps < 1000 else ["auto"]:
        scheduler = SOLVERS[name](**SD, grid=grid)
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
        assert len(scheduler.sigmas) == steps + 1
        assert bool((torch.diff(scheduler.timesteps.double()) < 0).all())
        assert bool((torch.diff(scheduler.sigmas) < 0).all())
        if steps < 10:
            run(scheduler)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("schedule", ["scaled_linear", "zero snr", "cosine", "flow"])
def test_every_begin_index_of_a_run(name, schedule):
    scheduler = SOLVERS[name](**SCHEDULES[schedule])
    for begin in range(9):
        scheduler.set_timesteps(9)
        run(scheduler, begin=begin)
        assert len(scheduler.plan.rows) == 9 - begin
