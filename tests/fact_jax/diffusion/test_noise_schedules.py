"""Noise schedules by hand and against diffusers' own."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fact_jax.diffusion.noise_schedules import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    offset_noise,
    signal_and_noise,
    split_output,
    timesteps,
    training_target,
)
from fact_jax.utils.errors import UserError
from tests.fact_jax.tiny import normal

BOTH = pytest.mark.parametrize("schedule", [NoiseSchedule.sd15(), NoiseSchedule.mini()])


def coarse(prediction_type):
    """Two timesteps with abar 0.75 and 0.1875."""
    return NoiseSchedule(
        num_train_timesteps=2, beta_start=0.25, beta_end=0.75, prediction_type=prediction_type
    )


def test_alphas_cumprod_by_hand():
    np.testing.assert_allclose(alphas_cumprod(coarse("epsilon")), [0.75, 0.1875], atol=1e-7)
    scaled = NoiseSchedule(
        num_train_timesteps=3, beta_start=0.01, beta_end=0.09, beta_schedule="scaled_linear"
    )
    np.testing.assert_allclose(alphas_cumprod(scaled), [0.99, 0.9504, 0.864864], atol=1e-7)


def test_noise_and_targets_by_hand():
    x0, noise = jnp.full((2, 1, 1, 1), 2.0), jnp.full((2, 1, 1, 1), 1.0)
    t = jnp.array([0, 1])
    a, s = np.sqrt([0.75, 0.1875]), np.sqrt([0.25, 0.8125])
    x = add_noise(coarse("epsilon"), x0, noise, t)
    np.testing.assert_allclose(x.ravel(), 2 * a + s, atol=1e-6)
    np.testing.assert_array_equal(training_target(coarse("epsilon"), x0, noise, t), noise)
    v = training_target(coarse("v_prediction"), x0, noise, t)
    np.testing.assert_allclose(v.ravel(), a - 2 * s, atol=1e-6)


def test_offset_noise_by_hand():
    """One shift a channel of a picture, the same in every cell."""
    noise = jnp.arange(8.0).reshape(2, 1, 2, 2)
    shift = jnp.array([[10.0, 20], [0, -10]])
    expected = [[[[1, 3], [3, 5]]], [[[4, 4], [6, 6]]]]
    np.testing.assert_allclose(offset_noise(noise, shift, 0.1), expected, rtol=1e-6)


def test_one_timestep_for_all_samples():
    x0, noise = normal(0, 3, 2, 4, 1), normal(1, 3, 2, 4, 1)
    schedule = NoiseSchedule.mini()
    one = add_noise(schedule, x0, noise, 300)
    np.testing.assert_array_equal(one, add_noise(schedule, x0, noise, jnp.full(3, 300)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_output_gives_back_x0_and_noise(prediction_type):
    schedule = NoiseSchedule(beta_end=0.012, prediction_type=prediction_type)
    x0, noise, t = normal(0, 3, 2, 5, 4), normal(1, 3, 2, 5, 4), jnp.array([0, 400, 900])
    x = add_noise(schedule, x0, noise, t)
    target = training_target(schedule, x0, noise, t)
    found = split_output(schedule, target, x, *signal_and_noise(schedule, t, x.ndim))
    np.testing.assert_allclose(found[0], x0, atol=1e-5)
    np.testing.assert_allclose(found[1], noise, atol=1e-5)


def test_the_same_inside_jit():
    x0, noise, t = normal(0, 2, 3, 1, 4), normal(1, 2, 3, 1, 4), jnp.array([5, 995])
    inside = jax.jit(add_noise, static_argnums=0)(NoiseSchedule.sd15(), x0, noise, t)
    np.testing.assert_allclose(
        inside, add_noise(NoiseSchedule.sd15(), x0, noise, t), rtol=1e-6, atol=1e-6
    )


@BOTH
def test_as_diffusers(schedule):
    peer = diffusers.DDPMScheduler.from_config(schedule.to_dict())
    np.testing.assert_allclose(alphas_cumprod(schedule), peer.alphas_cumprod.numpy(), atol=2e-7)
    x0, noise, t = normal(0, 3, 4, 2, 1), normal(1, 3, 4, 2, 1), np.array([0, 617, 999])
    arguments = [torch.from_numpy(np.array(value)) for value in (x0, noise, t)]
    np.testing.assert_allclose(
        add_noise(schedule, x0, noise, jnp.asarray(t)), peer.add_noise(*arguments), atol=1e-6
    )
    if schedule.prediction_type == "v_prediction":
        v = training_target(schedule, x0, noise, jnp.asarray(t))
        np.testing.assert_allclose(v, peer.get_velocity(*arguments), atol=1e-6)


def test_the_miniature_ends_in_noise():
    assert alphas_cumprod(NoiseSchedule.mini())[-1] < 1e-4


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [
        ("leading", 1, [751, 501, 251, 1]),
        ("leading", 0, [750, 500, 250, 0]),
        ("linspace", 1, [999, 666, 333, 0]),
        ("trailing", 1, [999, 749, 499, 249]),
    ],
)
def test_timesteps_by_hand(spacing, offset, expected):
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=offset)
    assert timesteps(schedule, 4).tolist() == expected


def test_timesteps_of_the_golden_run():
    assert timesteps(NoiseSchedule.sd15(), 6).tolist() == [831, 665, 499, 333, 167, 1]


@pytest.mark.parametrize("steps", [0, -3, 1001, 1000])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match="steps"):
        timesteps(NoiseSchedule.sd15(), steps)  # 1000 steps from offset 1 would end at 1000


@BOTH
def test_dict_round_trip(schedule):
    assert NoiseSchedule.from_dict(schedule.to_dict()) == schedule
    saved = dict(diffusers.PNDMScheduler.from_config(schedule.to_dict()).config)
    assert NoiseSchedule.from_dict(saved) == schedule


def test_absent_keys_mean_what_the_class_means():
    released = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    assert NoiseSchedule.from_dict(released) == NoiseSchedule.sd15()
    discrete = ("Euler", "LMS", "Heun", "KDPM2")
    multistep = ("DPMSolver", "UniPC", "DEIS")
    for name in (
        *("DDIMScheduler", "PNDMScheduler", "LCMScheduler"),
        *(f"{name}DiscreteScheduler" for name in discrete),
        *(f"{name}MultistepScheduler" for name in multistep),
    ):
        peer = getattr(diffusers, name)(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
        ours = NoiseSchedule.from_dict({"_class_name": name})
        theirs = NoiseSchedule.from_dict(dict(peer.config) | {"_class_name": name})
        assert ours == theirs, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "sample"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "leeding"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1, 0.2]),
        ("thresholding", True),
    ],
)
def test_settings_we_do_not_follow_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        NoiseSchedule.from_dict({key: value})
