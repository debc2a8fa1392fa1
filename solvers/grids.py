"""Where the network is asked: grids of times, from noise to image.

A grid is a float64 array of n + 1 strictly decreasing times: n evaluations and the end. The end is the
schedule's ``t_clean`` for ``final="zero"`` (sigma is 0 there, and the last step returns the data prediction)
or ``t_min`` for ``final="sigma_min"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError
from diffalign.solvers.noise import NoiseSchedule

Array = NDArray[np.float64]

# Grids in log-SNR place their points from here when the schedule starts lower (cosine, zero terminal SNR,
# flow): below it the sample is noise to the eye, and steps spent there are lost (DPM-Solver, appendix D).
LAMBDA_FLOOR = -5.1
# diffusers' largest sigma where the schedule has none: alphas_cumprod is 2^-24 there.
_SIGMA_CAP = 4096.0


# ------------------------------------------------------- points from t_max to t_min, both included


def time_uniform(schedule: NoiseSchedule, start: float, count: int) -> Array:
    """Uniform in time."""
    return np.linspace(start, schedule.t_min, count)


def time_quadratic(schedule: NoiseSchedule, start: float, count: int) -> Array:
    """Uniform in the square root of time, counted from the clean end: ``t - t_clean`` is squared."""
    origin = schedule.t_clean
    return np.linspace(math.sqrt(start - origin), math.sqrt(schedule.t_min - origin), count) ** 2 + origin


def logsnr(schedule: NoiseSchedule, start: float, count: int, last: float | None = None) -> Array:
    """Uniform in half log-SNR (Lu et al. 2022), up to `last` (of ``t_min`` unless given)."""
    first = max(float(schedule.lambda_(start)), LAMBDA_FLOOR)
    end = float(schedule.lambda_(schedule.t_min)) if last is None else last
    is_full = last is None or last == float(schedule.lambda_(schedule.t_min))
    times = schedule.t_of_lambda(np.linspace(first, end, count))
    return _pinned(times, start, schedule.t_min if is_full else None)


def power(schedule: NoiseSchedule, start: float, count: int, last: float, bend: float) -> Array:
    """Uniform in ``(sigma/alpha)^bend`` up to half log-SNR `last`; uniform in log-SNR for bend 0."""
    if bend == 0.0:
        return logsnr(schedule, start, count, last)
    first = max(float(schedule.lambda_(start)), LAMBDA_FLOOR)
    levels = np.linspace(math.exp(-first * bend), math.exp(-last * bend), count)
    end = schedule.t_min if last == float(schedule.lambda_(schedule.t_min)) else None
    return _pinned(schedule.t_of_lambda(-np.log(levels) / bend), start, end)


def karras(schedule: NoiseSchedule, start: float, count: int, rho: float = 7.0) -> Array:
    """Uniform in ``sigma^(1/rho)``, sigma as diffusers has it (Karras et al. 2022, equation 5)."""
    high, low = _sigma_range(schedule, start)
    sigmas = np.linspace(high ** (1 / rho), low ** (1 / rho), count) ** rho
    return _pinned(schedule.t_of_sigma(np.clip(sigmas, low, high)), start, schedule.t_min)


def exponential(schedule: NoiseSchedule, start: float, count: int) -> Array:
    """Uniform in log sigma, sigma as diffusers has it; the same as :func:`logsnr` for VP schedules."""
    high, low = _sigma_range(schedule, start)
    sigmas = np.exp(np.linspace(math.log(high), math.log(low), count))
    return _pinned(schedule.t_of_sigma(np.clip(sigmas, low, high)), start, schedule.t_min)


def beta(schedule: NoiseSchedule, start: float, count: int) -> Array:
    """Quantiles of Beta(0.6, 0.6) over *time* (Lee et al. 2024): dense at both ends."""
    from scipy.stats import beta as beta_distribution

    u = beta_distribution.ppf(np.linspace(1.0, 0.0, count), 0.6, 0.6)
    return schedule.t_min + u * (start - schedule.t_min)


def _sigma_range(schedule: NoiseSchedule, start: float) -> tuple[float, float]:
    cap = 1.0 if schedule.is_flow else math.exp(-LAMBDA_FLOOR)
    high = min(float(schedule.sigma_diffusers(start)), cap)
    return high, float(schedule.sigma_diffusers(schedule.t_min))


def _pinned(points: Array, start: float, end: float | None = None) -> Array:
    """Points with their ends set exactly, free of floors, caps and what an inverse function rounds."""
    points = np.array(points, dtype=np.float64)
    if end is not None:
        points[-1] = end
    points[0] = start
    return points


PointGrid = Callable[[NoiseSchedule, float, int], Array]

#: Grids that fill the whole range, so that with ``final="zero"`` the last evaluation is at ``t_min``.
LOG_GRIDS: dict[str, PointGrid] = {
    "logsnr": logsnr,
    "karras": karras,
    "edm": karras,
    "exponential": exponential,
    "beta": beta,
}
#: Grids whose end point, with ``final="zero"``, is the clean image itself.
TIME_GRIDS: dict[str, PointGrid] = {"time_uniform": time_uniform, "time_quadratic": time_quadratic}

GRIDS: tuple[str, ...] = ("auto", "diffusers", *LOG_GRIDS, *TIME_GRIDS, "flow")


def named_times(schedule: NoiseSchedule, name: str, count: int, *, final: str, start: float) -> Array:
    """The grid `name` (a key of :data:`LOG_GRIDS` or :data:`TIME_GRIDS`) with `count` evaluations."""
    if final == "sigma_min":
        return {**LOG_GRIDS, **TIME_GRIDS}[name](schedule, start, count + 1)
    if name in LOG_GRIDS:
        return np.append(LOG_GRIDS[name](schedule, start, count), schedule.t_clean)
    return np.append(TIME_GRIDS[name](schedule, start, count + 1)[:-1], schedule.t_clean)


def flow_times(
    schedule: NoiseSchedule, count: int, *, final: str, shift: float, shift_terminal: float | None = None
) -> Array:
    """sigma uniform in [0, 1], then shifted: ``sigma' = s sigma / (1 + (s - 1) sigma)`` (Esser et al. 2024).

    `shift_terminal` stretches the evaluations so that the last is at that sigma.
    """
    fractions = np.linspace(1.0, 0.0, count + 1)[:-1]
    times = schedule.shifted(fractions, shift)
    if shift_terminal:
        distance = 1.0 - times / schedule.t_max
        scale = distance[-1] / (1.0 - shift_terminal)
        times = schedule.t_max * (1.0 - distance / scale) if scale > 0 else times
    return np.append(times, schedule.t_clean if final == "zero" else min(schedule.t_min, times[-1] / 2))


# ------------------------------------------------------- diffusers' own grids


def spaced_steps(spacing: str, count: int, total: int, offset: int, *, with_end: bool) -> Array:
    """diffusers' integer timesteps for a ``timestep_spacing``, descending, of length `count`.

    Args:
        spacing: ``linspace``, ``leading`` or ``trailing`` (Lin et al. 2024, table 2).
        total: training steps to draw from.
        offset: ``steps_offset`` of ``leading``.
        with_end: True for the multistep classes, which divide the range into `count` + 1 points and leave out
            the last; False for DDIM and PNDM, which use `count` points.
    """
    points = count + 1 if with_end else count
    steps: Array
    if spacing == "linspace":
        steps = np.linspace(0, total - 1, points).round()[::-1][:count]
    elif spacing == "leading":
        steps = (np.arange(points, dtype=np.float64) * (total // points))[::-1][:count] + offset
    else:
        steps = np.arange(total, 0, -total / count).round()[:count] - 1
    return np.asarray(steps, dtype=np.float64)


def diffusers_times(
    schedule: NoiseSchedule,
    count: int,
    config: Mapping[str, Any],
    *,
    final: str,
    start: float,
    with_end: bool,
) -> Array:
    """The grid that diffusers builds from a config: a ``use_*_sigmas`` flag, else ``timestep_spacing``, of
    EDM models Karras' grid.

    Differences, all on purpose: times are not rounded or truncated to integers where sigmas are given, and
    where the last evaluation is at the end itself (``sigma_min``), the step goes to the clean image instead
    of nowhere.
    """
    if schedule.is_flow:
        return flow_times(schedule, count, final=final, shift=schedule.shift)
    end = schedule.t_clean if final == "zero" else schedule.t_min
    flagged = flagged_grid(config) or ("karras" if schedule.kind == "edm" else None)
    if flagged is None:
        total = round(start) + 1
        steps = spaced_steps(
            config["timestep_spacing"], count, total, config["steps_offset"], with_end=with_end
        )
        if final == "sigma_min" and steps[-1] <= schedule.t_min:
            end = schedule.t_clean
        return np.append(np.minimum(steps, schedule.t_max), end)
    points = count if final == "zero" else count + 1
    high = min(float(schedule.sigma_diffusers(start)), _SIGMA_CAP)
    low = float(schedule.sigma_diffusers(schedule.t_min))
    if flagged == "beta":
        from scipy.stats import beta as beta_distribution

        sigmas = low + beta_distribution.ppf(np.linspace(1.0, 0.0, points), 0.6, 0.6) * (high - low)
    elif flagged == "karras":
        sigmas = np.linspace(high ** (1 / 7), low ** (1 / 7), points) ** 7
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), points))
    times = _pinned(schedule.t_of_sigma(np.clip(sigmas, low, high)), start, schedule.t_min)
    return np.append(times, end) if final == "zero" else times


_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "logsnr",
    "use_beta_sigmas": "beta",
}


def flagged_grid(config: Mapping[str, Any]) -> str | None:
    """The grid that a ``use_*_sigmas`` flag asks for, or None. UserError when two are set."""
    asked = [flag for flag in _FLAGS if config.get(flag)]
    if len(asked) > 1:
        raise UserError(f"only one of {', '.join(_FLAGS)} can be set, but {' and '.join(asked)} are")
    return _FLAGS[asked[0]] if asked else None


# ------------------------------------------------------- the default


#: Order -> number of steps -> half log-SNR of the last evaluation with ``final="zero"``, share of uniform
#: time, bend of :func:`power`; :func:`auto_times` interpolates between the rows.
_AUTO: dict[int, dict[int, tuple[float, float, float]]] = {
    2: {
        5: (1.36, 0.75, 0.0),
        6: (1.55, 0.65, 0.0),
        8: (2.2, 0.4, 1 / 28),
        10: (3.0, 0.0, 1 / 14),
        15: (3.2, 0.0, 1 / 14),
        20: (3.4, 0.0, 1 / 14),
        30: (3.8, 0.0, 1 / 14),
    },
    3: {
        5: (1.36, 0.8, 0.0),
        8: (2.1, 0.6, 0.0),
        10: (2.2, 0.5, 0.0),
        12: (2.4, 0.375, 0.0),
        15: (3.2, 0.0, 0.0),
        20: (3.4, 0.0, 0.0),
        30: (3.8, 0.0, 0.0),
        50: (4.0, 0.0, 0.0),
    },
}


def auto_times(schedule: NoiseSchedule, count: int, *, order: int, final: str, start: float) -> Array:
    """The default grid of VP schedules, for multistep solvers of the given order.

    Points are uniform in log-SNR (at second order from 10 steps in ``(sigma/alpha)^(1/14)``, a little denser
    at the noisy end) up to a last evaluation from where the jump to the clean image costs about as much as
    the steps before it. With few steps they are mixed with uniform time, because guided sampling diverges on
    long first steps in log-SNR; up to 4 steps they are uniform in time alone. A first-order solver does not
    diverge: its last evaluation is at half log-SNR ``log n``, a little less with few steps.

    The tables are fitted to Gaussian mixtures (six, on the schedules of Stable Diffusion, DDPM, cosine and
    zero terminal SNR, guidance 1 to 12) and held against other mixtures and the playground model, which asks
    for less than the mixtures at 5 and 6 guided steps. ``docs/grids.md`` has the evidence, and where another
    grid is better.
    """
    if count <= 4 and order > 1:
        return named_times(schedule, "time_uniform", count, final=final, start=start)
    highest = float(schedule.lambda_(schedule.t_min))
    if order == 1:
        in_time = bend = 0.0
        last = math.log(count) + float(np.interp(count, (8, 15), (-0.25, 0.0)))
    else:
        table = _AUTO[order]
        columns = zip(*table.values(), strict=True)
        last, in_time, bend = (float(np.interp(count, list(table), column)) for column in columns)
    last -= math.log(schedule.sigma_data)  # the tables are of data of unit spread
    if final != "zero" or not schedule.lambda_(start) < last < highest:
        last = highest
    points = count if final == "zero" else count + 1
    times = (1.0 - in_time) * power(schedule, start, points, last, bend) + in_time * np.linspace(
        start, schedule.t_min if last == highest else float(schedule.t_of_lambda(last)), points
    )
    return np.append(times, schedule.t_clean) if final == "zero" else _pinned(times, start, schedule.t_min)


# ------------------------------------------------------- what a user passes


def custom_times(schedule: NoiseSchedule, timesteps: ArrayLike, *, final: str) -> Array:
    """Times that the user gave, with the end appended: what is passed is what runs.

    Raises:
        UserError: if they are not strictly decreasing or leave the schedule's range.
    """
    times = np.asarray(timesteps, dtype=np.float64).reshape(-1)
    if times.size == 0:
        raise UserError("timesteps must not be empty")
    low, high = schedule.t_clean, schedule.t_max
    if np.any(~((times > low) & (times <= high * (1 + 1e-6)))):
        raise UserError(f"timesteps must lie above {low:g} and not above {high:g}, but are {times}")
    end = schedule.t_min if final == "sigma_min" and times[-1] > schedule.t_min else schedule.t_clean
    return checked(np.append(np.minimum(times, high), end))


def custom_sigmas(schedule: NoiseSchedule, sigmas: ArrayLike, *, final: str, shift: float | None) -> Array:
    """Times of sigmas that the user gave, in diffusers' unit (sigma/alpha, or sigma for flow).

    A last sigma of 0 is the end, not an evaluation. `shift` is applied to flow sigmas when it is not None.
    """
    values = np.asarray(sigmas, dtype=np.float64).reshape(-1)
    if values.size and values[-1] == 0:
        values, final = values[:-1], "zero"
    if shift is not None:
        values = shift * values / (1.0 + (shift - 1.0) * values)
    limit = float(schedule.sigma_diffusers(schedule.t_max))
    if np.any(~((values > 0) & (values <= limit * (1 + 1e-4)))):
        raise UserError(f"sigmas must lie above 0 and not above {limit:.4f}, but are {values}")
    _check_decreasing("sigmas", values)
    return custom_times(schedule, schedule.t_of_sigma(np.minimum(values, limit)), final=final)


def checked(times: Array) -> Array:
    """`times` rounded to float32, which the network will be given; UserError unless they decrease."""
    rounded = times.astype(np.float32).astype(np.float64)
    _check_decreasing("timesteps", rounded, "; use fewer steps or another grid")
    return rounded


def _check_decreasing(name: str, values: Array, way_out: str = "") -> None:
    rises = np.diff(values) >= 0
    if np.any(rises):
        at = int(np.argmax(rises))
        raise UserError(
            f"{name} must decrease strictly, but {values[at]:g} is followed by {values[at + 1]:g} "
            f"at position {at}{way_out}"
        )
