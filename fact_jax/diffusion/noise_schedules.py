"""Noise schedules: the noise level of each timestep, and the prediction target.

A schedule is data; everything else is a pure function of it. With abar_t the cumulative product
of 1 - beta,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise        (DDPM, arXiv 2006.11239, eq. 4)
    v_t = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0        (arXiv 2202.00512, appendix D)
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fact_jax.utils.errors import UserError

BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

Timesteps = Int[Array, " b"] | Int[Array, ""] | int  # one for each sample, or one for all

_LINSPACED = ("Euler", "DPMSolver", "LMS", "Heun", "KDPM2", "UniPC", "DEIS")
"""Beginnings of the schedulers whose timesteps are spaced by linspace if nothing is said."""
# Settings of diffusers that change the mathematics and that we do not follow: refused, not ignored.
_UNSUPPORTED = {"trained_betas": None, "rescale_betas_zero_snr": False, "thresholding": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The facts that a diffusers ``scheduler_config.json`` holds about the training noise.

    ``timestep_spacing``, ``steps_offset`` and ``set_alpha_to_one`` only concern sampling: which
    timesteps are used, and whether the last step ends at abar = 1 (true) or at abar_0 (false).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    timestep_spacing: str = "leading"

    def __post_init__(self):
        for field, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", TIMESTEP_SPACINGS),
        ):
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"scheduler config: {field} is {getattr(self, field)!r}; "
                    f"known are {', '.join(allowed)}"
                )

    @classmethod
    def sd15(cls) -> "NoiseSchedule":
        """Stable Diffusion 1.5."""
        return cls(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
        )

    @classmethod
    def mini(cls) -> "NoiseSchedule":
        """The miniature base model: the noisiest step keeps almost no signal, nor identity."""
        return cls(prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads a diffusers scheduler config; an absent key means what its ``_class_name`` means.

        ``clip_sample`` is ignored: latents are never clipped.
        Raises UserError for settings that would change the result and are not supported.
        """
        for key, neutral in _UNSUPPORTED.items():
            if config.get(key, neutral) not in (neutral, None):
                raise UserError(f"scheduler config: {key} = {config[key]!r} is not supported")
        name = config.get("_class_name", "DDIMScheduler")
        linspaced = name.startswith(_LINSPACED)
        defaults = {
            "set_alpha_to_one": name != "PNDMScheduler",
            "timestep_spacing": "linspace" if linspaced else "leading",
        }
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**(defaults | {k: v for k, v in config.items() if k in fields}))

    def to_dict(self) -> dict[str, Any]:
        """The same facts under diffusers' names, for ``Scheduler.from_config``."""
        return dataclasses.asdict(self)


@functools.cache
def alphas_cumprod_numpy(schedule: NoiseSchedule) -> np.ndarray:
    """abar, float32, read-only, (num_train_timesteps,); rounded where diffusers rounds."""
    n = schedule.num_train_timesteps
    if schedule.beta_schedule == "scaled_linear":
        roots = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, n).astype(np.float32)
        betas = roots**2
    else:
        betas = np.linspace(schedule.beta_start, schedule.beta_end, n).astype(np.float32)
    alphas = np.float32(1) - betas
    abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    abar.flags.writeable = False
    return abar


def alphas_cumprod(schedule: NoiseSchedule) -> Float[Array, " t"]:
    """abar_t for every training timestep, float32."""
    return jnp.asarray(alphas_cumprod_numpy(schedule))


def signal_and_noise(
    schedule: NoiseSchedule, t: Timesteps, ndim: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """sqrt(abar_t) and sqrt(1 - abar_t), with trailing axes of size 1 up to ``ndim`` axes."""
    abar = alphas_cumprod(schedule)[t]
    abar = abar.reshape(abar.shape + (1,) * (ndim - abar.ndim))
    return jnp.sqrt(abar), jnp.sqrt(1 - abar)


def add_noise(
    schedule: NoiseSchedule, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], t: Timesteps
) -> Float[Array, "b ..."]:
    """x_t from x_0 and unit noise."""
    a, s = signal_and_noise(schedule, t, x0.ndim)
    return a * x0 + s * noise


def offset_noise(
    noise: Float[Array, "b h w c"], shift: Float[Array, "b c"], offset: float
) -> Float[Array, "b h w c"]:
    """Noise whose mean over a picture varies too: noise + offset * shift, ``shift`` unit noise.

    Plain noise hardly touches a picture's mean, so that a model never learns to change it, and very
    dark and very bright pictures stay out of reach (N. Guttenberg, "Diffusion with offset noise").
    """
    return noise + offset * shift[:, None, None, :]


def training_target(
    schedule: NoiseSchedule, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], t: Timesteps
) -> Float[Array, "b ..."]:
    """What the network should answer at x_t: the noise, or v."""
    if schedule.prediction_type == "epsilon":
        return noise
    a, s = signal_and_noise(schedule, t, x0.ndim)
    return a * noise - s * x0


def split_output(
    schedule: NoiseSchedule,
    output: Float[Array, "b ..."],
    x: Float[Array, "b ..."],
    signal: Float[Array, "..."] | float,
    noise: Float[Array, "..."] | float,
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """The clean latents and the noise that ``output`` implies at x = signal * x_0 + noise * eps.

    ``signal`` and ``noise`` broadcast against x, and signal^2 + noise^2 = 1.
    """
    if schedule.prediction_type == "epsilon":
        return (x - noise * output) / signal, output
    return signal * x - noise * output, signal * output + noise * x


def timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """The timesteps of ``steps`` sampling steps, descending, int32 (arXiv 2305.08891, table 2).

    Raises UserError if the schedule cannot be cut into that many steps.
    """
    n = schedule.num_train_timesteps
    check_steps(schedule, steps)
    if schedule.timestep_spacing == "leading":
        ts: np.ndarray = np.arange(steps)[::-1] * (n // steps) + schedule.steps_offset
    elif schedule.timestep_spacing == "linspace":
        ts = np.linspace(0, n - 1, steps)[::-1].round()
    else:
        ts = np.arange(n, 0, -n / steps)[:steps].round() - 1
    if ts.max() >= n:
        raise UserError(f"{steps} steps run past the {n} training timesteps; take fewer steps")
    return ts.astype(np.int32)


def check_steps(schedule: NoiseSchedule, steps: int) -> None:
    """Raises UserError unless 1 <= steps <= num_train_timesteps."""
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise UserError(f"steps must lie in 1..{schedule.num_train_timesteps}, got {steps}")
