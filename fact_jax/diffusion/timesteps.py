"""The timesteps and noise levels of each sampler, as diffusers chooses them.

Noise levels are sigma = sqrt((1 - abar) / abar). All of it is float64 numpy on the host: a sampler
turns it into coefficients once, before its loop is traced.
"""

import functools
from collections.abc import Callable

import numpy as np

from fact_jax.diffusion.noise_schedules import (
    NoiseSchedule,
    alphas_cumprod_numpy,
    check_steps,
    timesteps,
)
from fact_jax.utils.errors import UserError

Grid = tuple[np.ndarray, np.ndarray]  # timesteps and sigmas, in the order of the visits

# Latent consistency models are distilled on this many steps, and may take any number up to it.
LCM_ORIGINAL_STEPS = 50


def sampler_timesteps(
    sampler: str, schedule: NoiseSchedule, steps: int, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step indices, timesteps and sigmas from step ``start`` on.

    Raises UserError if there is no such step, or the sampler cannot take that many steps.
    """
    check_steps(schedule, steps)
    if not 0 <= start < steps:
        raise UserError(f"the first step must lie in 0..{steps - 1}, got {start}")
    ts, sigma = _GRIDS[sampler](schedule, steps)
    return np.arange(start, steps, dtype=np.int32), ts[start:], sigma[start:]


def stride(schedule: NoiseSchedule, steps: int) -> int:
    """Training timesteps in a sampling step, the remainder dropped."""
    return schedule.num_train_timesteps // steps


def alpha_sigma(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(abar) and sqrt(1 - abar), the weights of signal and noise, at sigma."""
    a = 1 / np.sqrt(1 + sigma**2)
    return a, sigma * a


@functools.cache
def _training_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    abar = alphas_cumprod_numpy(schedule).astype(np.float64)
    return np.sqrt((1 - abar) / abar)


def sigma_at(schedule: NoiseSchedule, ts: np.ndarray) -> np.ndarray:
    """Training sigmas; before timestep 0 lies the end of the trajectory, clean or nearly so."""
    table = _training_sigmas(schedule)
    end = 0.0 if schedule.set_alpha_to_one else table[0]
    return np.where(ts >= 0, table[np.maximum(ts, 0)], end)


def _training_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    ts = timesteps(schedule, steps)
    return ts, sigma_at(schedule, ts)


def _euler_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    """Linspace timesteps stay fractional."""
    last = schedule.num_train_timesteps - 1
    linspaced = schedule.timestep_spacing == "linspace"
    ts = np.linspace(0, last, steps)[::-1] if linspaced else timesteps(schedule, steps)
    ts = ts.astype(np.float32)
    return ts, np.interp(ts, np.arange(last + 1), _training_sigmas(schedule))


def _dpmpp_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    """One step more than asked for, of which the last, nearly clean, is left out."""
    if schedule.timestep_spacing == "trailing":
        return _training_grid(schedule, steps)
    if steps >= schedule.num_train_timesteps:
        raise UserError(
            f"dpmpp_2m takes at most {schedule.num_train_timesteps - 1} steps, got {steps}"
        )
    ts, sigma = _training_grid(schedule, steps + 1)
    return ts[:-1], sigma[:-1]


def _karras_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    """Sigmas even in their 7th root (arXiv 2206.00364, eq. 5), told to the model as integers."""
    table = _training_sigmas(schedule)
    roots = np.linspace(table[-1] ** (1 / 7), table[0] ** (1 / 7), steps)
    ts = np.interp(7 * np.log(roots), np.log(table), np.arange(len(table)))
    return ts.round().astype(np.int32), roots**7


def _lcm_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    """Evenly chosen among the steps of the distillation."""
    if steps > LCM_ORIGINAL_STEPS:
        raise UserError(f"lcm takes at most {LCM_ORIGINAL_STEPS} steps, got {steps}")
    span = stride(schedule, LCM_ORIGINAL_STEPS)
    ts = (LCM_ORIGINAL_STEPS - np.arange(steps) * LCM_ORIGINAL_STEPS // steps) * span - 1
    return ts.astype(np.int32), sigma_at(schedule, ts)


_GRIDS: dict[str, Callable[[NoiseSchedule, int], Grid]] = {
    "ddim": _training_grid,
    "pndm": _training_grid,
    "euler": _euler_grid,
    "euler_ancestral": _euler_grid,
    "dpmpp_2m": _dpmpp_grid,
    "dpmpp_2m_karras": _karras_grid,
    "lcm": _lcm_grid,
}
