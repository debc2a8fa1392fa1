"""Noise schedules against diffusers' tables, closed forms, and their own inverses."""

from __future__ import annotations

import copy
import math
import pickle

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.solvers.betas import BETA_SCHEDULES
from diffalign.solvers.noise import NoiseSchedule

SCHEDULES = {
    **{name: NoiseSchedule.from_config({"beta_schedule": name}) for name in BETA_SCHEDULES},
    "sd": NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ),
    "zero snr": NoiseSchedule.from_config({"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
    "vp": NoiseSchedule.vp_linear(time_scale=999.0),
    "cosine": NoiseSchedule.vp_cosine(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
    "edm of unit data": NoiseSchedule.edm(sigma_data=1.0),
}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_discrete_schedules_are_those_of_diffusers(name, zero_snr):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    ours = NoiseSchedule.from_config(theirs.config)
    alphas_cumprod = ours.alpha(np.arange(1000)) ** 2
    # diffusers multiplies in float32.
    np.testing.assert_allclose(alphas_cumprod, theirs.alphas_cumprod, atol=1e-6)
    if zero_snr:
        assert alphas_cumprod[-1] == 0
        assert ours.lambda_(999) == -math.inf


def test_trained_betas_win_over_the_named_schedule():
    betas = np.linspace(0.01, 0.3, 7)
    ours = NoiseSchedule.from_config({"trained_betas": list(betas), "beta_schedule": "linear"})
    assert ours.num_train_timesteps == 7
    np.testing.assert_allclose(ours.alpha(np.arange(7)) ** 2, np.cumprod(1 - betas), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), u=st.floats(0, 1), v=st.floats(0, 1))
def test_time_and_lambda_are_inverse_and_monotone(name, u, v):
    s = SCHEDULES[name]
    t = s.t_min + u * (s.t_max - s.t_min)
    lambda_ = s.lambda_(t)
    assert s.t_of_lambda(lambda_) == pytest.approx(t, rel=1e-9, abs=1e-7 * s.t_max)
    other = s.t_min + v * (s.t_max - s.t_min)
    if t < other:
        assert lambda_ >= s.lambda_(other)
    alpha, sigma = s.alpha_sigma(t)
    spread = alpha + sigma if s.is_flow else math.hypot(s.sigma_data * alpha, sigma)
    assert spread == pytest.approx(1, abs=1e-12)
    if alpha > 0:
        assert lambda_ == pytest.approx(math.log(alpha / sigma), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), u=st.floats(0.001, 1))
def test_sigmas_in_the_unit_of_diffusers_come_back(name, u):
    s = SCHEDULES[name]
    t = s.t_min + u * (s.t_max - s.t_min)
    sigma = s.sigma_diffusers(t)
    if np.isfinite(sigma):
        assert s.t_of_sigma(sigma) == pytest.approx(t, rel=1e-8)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_clean_end(name):
    s = SCHEDULES[name]
    assert s.alpha(s.t_clean) == 1
    assert s.sigma(s.t_clean) == 0
    assert s.lambda_(s.t_clean) == math.inf
    assert s.t_of_lambda(math.inf) == s.t_clean


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_outside_the_range_is_refused(name):
    s = SCHEDULES[name]
    for t in (s.t_max * 1.01, s.t_clean - 0.1 * s.t_max, math.nan):
        with pytest.raises(UserError, match="time must lie between"):
            s.alpha(t)


def test_log_alpha_is_linear_between_training_steps():
    s = SCHEDULES["sd"]
    ends = np.log(s.alpha(np.array([500.0, 501.0])))
    assert np.log(s.alpha(500.25)) == pytest.approx(0.75 * ends[0] + 0.25 * ends[1], abs=1e-15)


def test_continuous_vp_is_the_limit_of_fine_discrete_schedules():
    n = 100_000
    betas = np.linspace(0.1, 20.0, n) / n
    discrete, continuous = NoiseSchedule.from_betas(betas), NoiseSchedule.vp_linear()
    for u in (0.1, 0.5, 0.99):
        assert discrete.alpha(u * n - 1) == pytest.approx(continuous.alpha(u), rel=1e-3)


def test_shift_moves_points_not_levels():
    plain, shifted = NoiseSchedule.flow(), NoiseSchedule.flow(shift=3.0)
    assert plain.sigma(300) == shifted.sigma(300) == 0.3
    np.testing.assert_allclose(shifted.shifted([0, 0.5, 1]), [0, 750, 1000])


def test_flow_configs_are_recognised():
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    s = NoiseSchedule.from_config(config)
    assert s.is_flow
    assert s.shift == 3.0
    assert NoiseSchedule.from_config({"prediction_type": "flow_prediction", "flow_shift": 2.0}).shift == 2.0


def test_fingerprint_tells_schedules_apart_and_survives_storage():
    prints = [s.fingerprint() for s in SCHEDULES.values()]
    assert len(set(prints)) == len(prints)
    for s in SCHEDULES.values():
        assert pickle.loads(pickle.dumps(s)) == s
        assert copy.deepcopy(s).fingerprint() == s.fingerprint()
    # float32 tables of diffusers are the same schedule.
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    rounded = NoiseSchedule.from_betas(theirs.betas.numpy())
    assert np.abs(rounded.lambda_(np.arange(1000)) - SCHEDULES["sd"].lambda_(np.arange(1000))).max() < 1e-4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "scaled_linea"}, "did you mean 'scaled_linear'"),
        ({"trained_betas": []}, "non-empty"),
        ({"trained_betas": [0.1, 1.5]}, r"\[0, 1\)"),
        ({"trained_betas": [0.1, 1.0, 0.2]}, r"\[0, 1\)"),
        ({"num_train_timesteps": 0}, "at least 1"),
        ({"sigma_max": 50.0}, "neither those of training steps"),
        ({"trained_betas": [0.1], "rescale_betas_zero_snr": True}, "two different"),
        ({"use_flow_sigmas": True, "flow_shift": -1.0}, "above 0"),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(config, words):
    with pytest.raises(UserError, match=words):
        NoiseSchedule.from_config(config)
