"""Samplers: from noise to latents, one pure function each, the whole loop under one ``lax.scan``.

Every sampler is called as ``sample(model, latents, schedule, *, steps, key=None, start=0)`` and
returns clean latents; with ``loop=python_loop`` the steps run in Python. It asks
``model(x, t, i)`` for the network's raw output: x scaled as the network wants it, t the timestep
(int32, or float32 where a sampler visits fractional ones), and i the int32 index of the step,
``timesteps[i] == t``, counted from the full trajectory.

``latents`` are unit noise; with ``start`` > 0 (image to image) they come from
``noise_latents_for_start``. The loop computes in float32. Where a sampler draws noise, it is
``normal(fold_in(key, i))``; with a vector of keys each sample draws from its own, and is the same
picture in any batch.

Noise levels are written as sigma = sqrt((1 - abar) / abar), and the weights of signal and noise as
a = 1 / sqrt(1 + sigma^2) and s = sigma a. All coefficients are computed on the host in float64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fact_jax.diffusion.noise_schedules import NoiseSchedule, split_output
from fact_jax.diffusion.timesteps import (
    LCM_ORIGINAL_STEPS,
    alpha_sigma,
    sampler_timesteps,
    sigma_at,
    stride,
)

Denoiser = Callable[[Float[Array, "b h w c"], Array, Array], Float[Array, "b h w c"]]
Loop = Callable[[Callable, Any, Sequence[np.ndarray]], tuple[Any, Any]]
"""What runs the steps, called as ``jax.lax.scan(f, init, xs)``."""


def sample_ddim(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array | None = None,
    start: int = 0,
    eta: float = 0.0,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): deterministic at eta 0, as noisy as DDPM at 1."""
    i, ts, sigma = sampler_timesteps("ddim", schedule, steps, start)
    a, s = alpha_sigma(sigma)
    a_next, s_next = alpha_sigma(sigma_at(schedule, ts - stride(schedule, steps)))
    std = eta * s_next / s * np.sqrt(1 - (a / a_next) ** 2)

    def step(x, i, t, a, s, a_next, direction, std):
        x0, eps = split_output(schedule, model(x, t, i), x, a, s)
        x = a_next * x0 + direction * eps
        return x + std * _noise(key, i, x) if eta > 0 else x

    direction = np.sqrt(s_next**2 - std**2)
    return _scan(step, _float32(latents), i, ts, a, s, a_next, direction, std, loop=loop)


def sample_pndm(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array | None = None,
    start: int = 0,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """PLMS (arXiv 2202.09778, eq. 9 and 12): DDIM steps along a multistep mean of the outputs.

    The first step is taken twice, the second time with the mean of the outputs at its two ends, so
    that the model is called once more than there are steps.
    """
    i, ts = model_calls("pndm", schedule, steps, start)
    back = stride(schedule, steps)
    again = np.arange(len(ts)) == 1
    a, s = alpha_sigma(sigma_at(schedule, ts + back * again))
    a_next, s_next = alpha_sigma(sigma_at(schedule, ts - back * ~again))
    x_start = _float32(latents)

    def step(carry, i, t, again, weights, a, s, a_next, s_next):
        x, history = carry
        outputs = (_float32(model(x, t, i)), *history)
        mean = sum(w * output for w, output in zip(weights, outputs, strict=True))
        x = jnp.where(again, x_start, x)
        x0, eps = split_output(schedule, mean, x, a, s)
        kept = [jnp.where(again, old, new) for old, new in zip(history, outputs[:3], strict=True)]
        return a_next * x0 + s_next * eps, tuple(kept)

    carry = (x_start, (jnp.zeros_like(x_start),) * 3)
    weights = _plms_weights(len(ts))
    return _scan(step, carry, i, ts, again, weights, a, s, a_next, s_next, loop=loop)[0]


def sample_euler(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array | None = None,
    start: int = 0,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """Euler steps along dx/dsigma (arXiv 2206.00364, algorithm 2 without churn)."""
    i, ts, sigma = sampler_timesteps("euler", schedule, steps, start)
    a, s = alpha_sigma(sigma)

    def step(x, i, t, a, s, dsigma):
        _, slope = split_output(schedule, model(a * x, t, i), a * x, a, s)
        return x + dsigma * slope

    x = _float32(latents) * first_sigma_scale("euler", schedule, steps, start)
    return _scan(step, x, i, ts, a, s, np.diff(sigma, append=0), loop=loop)


def sample_euler_ancestral(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array,
    start: int = 0,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """Euler steps that go below the next noise level and return to it with fresh noise.

    The variance is split as DDPM's posterior (arXiv 2006.11239, eq. 7) would have it.
    """
    i, ts, sigma = sampler_timesteps("euler_ancestral", schedule, steps, start)
    a, s = alpha_sigma(sigma)
    sigma_next = np.append(sigma[1:], 0)
    up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)
    down = sigma_next**2 / sigma

    def step(x, i, t, a, s, dsigma, up):
        _, slope = split_output(schedule, model(a * x, t, i), a * x, a, s)
        return x + dsigma * slope + up * _noise(key, i, x)

    x = _float32(latents) * first_sigma_scale("euler_ancestral", schedule, steps, start)
    return _scan(step, x, i, ts, a, s, down - sigma, up, loop=loop)


def sample_dpmpp_2m(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array | None = None,
    start: int = 0,
    karras: bool = False,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), the first and the last step of order one.

    With h the steps of log(a / s), and primes at the next level:
    x' = (s' / s) x + a' (1 - exp(-h)) (x_0 + (h / 2 h_old) (x_0 - x_0_old)).
    """
    name = "dpmpp_2m_karras" if karras else "dpmpp_2m"
    i, ts, sigma = sampler_timesteps(name, schedule, steps, start)
    sigma_next = np.append(sigma[1:], 0)
    a, s = alpha_sigma(sigma)
    a_next, s_next = alpha_sigma(sigma_next)
    h = -np.diff(np.log(sigma))
    multistep = np.zeros_like(sigma)  # 0: first order
    multistep[1:-1] = h[1:] / (2 * h[:-1])

    def step(carry, i, t, a, s, keep, gain, multistep):
        x, x0_old = carry
        x0, _ = split_output(schedule, model(x, t, i), x, a, s)
        return keep * x + gain * (x0 + multistep * (x0 - x0_old)), x0

    x = _float32(latents)
    keep, gain = s_next / s, a_next * (1 - sigma_next / sigma)
    carry = (x, jnp.zeros_like(x))
    return _scan(step, carry, i, ts, a, s, keep, gain, multistep, loop=loop)[0]


def sample_lcm(
    model: Denoiser,
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    key: Array,
    start: int = 0,
    loop: Loop = jax.lax.scan,
) -> Float[Array, "b h w c"]:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): denoise wholly, renoise."""
    i, ts, sigma = sampler_timesteps("lcm", schedule, steps, start)
    a, s = alpha_sigma(sigma)
    a_next, s_next = alpha_sigma(np.append(sigma[1:], 0))
    # Boundary condition (arXiv 2303.01469, appendix C): sigma_data 0.5, timesteps scaled by 10.
    skip = 0.5**2 / ((10.0 * ts) ** 2 + 0.5**2)
    out = np.sqrt(1 - skip)

    def step(x, i, t, a, s, skip, out, a_next, s_next):
        x0, _ = split_output(schedule, model(x, t, i), x, a, s)
        return a_next * (out * x0 + skip * x) + s_next * _noise(key, i, x)

    return _scan(step, _float32(latents), i, ts, a, s, skip, out, a_next, s_next, loop=loop)


SAMPLERS: dict[str, Callable[..., Float[Array, "b h w c"]]] = {
    "ddim": sample_ddim,
    "pndm": sample_pndm,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_karras": functools.partial(sample_dpmpp_2m, karras=True),
    "lcm": sample_lcm,
}

_VARIANCE_EXPLODING = ("euler", "euler_ancestral")

_DPMPP_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}

# The peer of each sampler: getattr(diffusers, name).from_config(schedule.to_dict(), **extra).
DIFFUSERS_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**_DPMPP_2M, "use_karras_sigmas": False}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {**_DPMPP_2M, "use_karras_sigmas": True}),
    "lcm": (
        "LCMScheduler",
        {"original_inference_steps": LCM_ORIGINAL_STEPS, "clip_sample": False},
    ),
}


def model_calls(
    sampler: str, schedule: NoiseSchedule, steps: int, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The step index and the timestep of every call of the model, in order.

    These are diffusers' ``scheduler.timesteps[start:]``, except that PLMS warms up at ``start``,
    where a slice of diffusers' list would miss or misplace the repeated step.
    """
    i, ts, _ = sampler_timesteps(sampler, schedule, steps, start)
    if sampler == "pndm" and len(i) > 1:
        i, ts = (np.insert(rows, 1, rows[1]) for rows in (i, ts))
    return i, ts


def num_model_calls(sampler: str, steps: int, start: int = 0) -> int:
    """How often ``sampler`` calls the model."""
    left = steps - start
    return left + 1 if sampler == "pndm" and left > 1 else left


def first_sigma_scale(sampler: str, schedule: NoiseSchedule, steps: int, start: int = 0) -> float:
    """What the Euler samplers multiply ``latents`` by to reach their own scale, x_0 + sigma noise.

    From pure noise diffusers takes sigma itself for linspace and trailing timesteps, and so do we.
    """
    if sampler not in _VARIANCE_EXPLODING:
        return 1.0
    sigma = float(sampler_timesteps(sampler, schedule, steps, start)[2][0])
    if start == 0 and schedule.timestep_spacing != "leading":
        return sigma
    return float(np.hypot(1, sigma))


def noise_latents_for_start(
    schedule: NoiseSchedule,
    sampler: str,
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    steps: int,
    start: int,
) -> Float[Array, "b h w c"]:
    """Clean latents noised to the level of step ``start``, as ``sampler`` takes them."""
    sigma = float(sampler_timesteps(sampler, schedule, steps, start)[2][0])
    exploding = sampler in _VARIANCE_EXPLODING
    scale = first_sigma_scale(sampler, schedule, steps, start) if exploding else np.hypot(1, sigma)
    return (x0 + sigma * noise) / scale


def masked_denoiser(
    model: Denoiser,
    sampler: str,
    schedule: NoiseSchedule,
    *,
    latent_mask: Bool[Array, "#b h w"],
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    steps: int,
    start: int,
) -> Denoiser:
    """A model for masked image-to-image: where ``latent_mask`` is False, its input is ``x0`` with
    ``noise`` at the level of the step.

    Samplers treat every latent pixel by itself, so their values outside the mask do not matter:
    put ``x0`` there at the end. The first step gets the sampler's own input, as in diffusers.
    """
    sigma = sampler_timesteps(sampler, schedule, steps, start)[2]
    a, s = (jnp.asarray(weights, jnp.float32) for weights in alpha_sigma(sigma))

    def shown(x: Float[Array, "b h w c"], t: Array, i: Array) -> Float[Array, "b h w c"]:
        own = latent_mask[..., None] | (i == start)
        return model(jnp.where(own, x, a[i - start] * x0 + s[i - start] * noise), t, i)

    return shown


def python_loop(step: Callable, carry: Any, columns: Sequence[np.ndarray]) -> tuple[Any, None]:
    """A Python loop in the place of ``jax.lax.scan``, for a model that is compiled by itself.

    Then one compiled model serves every sampler and any number of steps, and what calls it may
    show progress or stop between steps.
    """
    for row in zip(*columns, strict=True):
        carry, _ = step(carry, [jnp.asarray(value) for value in row])
    return carry, None


def _scan(step: Callable, carry: Any, *columns: np.ndarray, loop: Loop):
    """carry = step(carry, i, t, *coefficients) for every row of the columns."""
    rows = [np.asarray(c, np.float32 if c.dtype == np.float64 else c.dtype) for c in columns]
    return loop(lambda carry, row: (step(carry, *row), None), carry, rows)[0]


def _float32(x: Array) -> Array:
    return jnp.asarray(x, jnp.float32)


def _noise(key: Array, i: Array, like: Array) -> Array:
    if key.ndim:
        return jax.vmap(_noise, (0, None, 0))(key, i, like)
    return jax.random.normal(jax.random.fold_in(key, i), like.shape, like.dtype)


def _plms_weights(calls: int) -> np.ndarray:
    """Adams-Bashforth weights of the newest and up to three earlier outputs, (calls, 4).

    The order grows with the history; the second call has the mean of the first step's two ends.
    """
    warm_up = [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
    ]
    full = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    return np.array((warm_up + [full] * calls)[:calls], np.float64)
