"""Every sampler against diffusers' scheduler: what the model is asked at each step, and the end."""

import dataclasses
import importlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fact_jax.diffusion.noise_schedules import NoiseSchedule, alphas_cumprod_numpy, timesteps
from fact_jax.diffusion.samplers import (
    DIFFUSERS_SCHEDULERS,
    SAMPLERS,
    first_sigma_scale,
    model_calls,
    noise_latents_for_start,
    num_model_calls,
    sample_ddim,
)
from fact_jax.utils.errors import UserError
from tests.fact_jax.tiny import normal

pytestmark = pytest.mark.heavy

SHAPE = (2, 3, 5, 4)
KEY = jax.random.key(7, impl="rbg")  # its draws compile four times faster than threefry's
SD15, MINI = NoiseSchedule.sd15(), NoiseSchedule.mini()


def to_torch(x):
    return torch.from_numpy(np.array(x))


def shares_at(schedule, t, xp):
    """sqrt(abar) and sqrt(1 - abar) at a possibly fractional timestep."""
    abar = xp.asarray(alphas_cumprod_numpy(schedule))
    low = xp.clip(xp.floor(t).astype(xp.int32), 0, len(abar) - 2)
    between = abar[low] + (t - low) * (abar[low + 1] - abar[low])
    return between**0.5, (1 - between) ** 0.5


def make_model(schedule, xp):
    """A fixed network of elementwise units, in numpy or jax.numpy.

    It is written as v, and as noise where the schedule asks for noise, so that the clean latents
    it believes in stay of order one at every noise level, as a trained network's do.
    """
    weights = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)

    def model(x, t):
        t = xp.asarray(t, xp.float32)
        v = sum(0.3 * w * xp.tanh(u * x + b + c * t / 500) for u, b, c, w in weights.T)
        a, s = shares_at(schedule, t, xp)
        answer = v if schedule.prediction_type == "v_prediction" else a * v + s * x
        return answer.astype(xp.float32)

    return model


def run_ours(name, schedule, steps, latents, start=0, compiled=False, **options):
    """The model's inputs at every call, and the result.

    Not compiled as a whole unless asked for: a program for each schedule and length takes long.
    """
    model, asked = make_model(schedule, jnp if compiled else np), []

    def record(x, t, i):
        asked.append((np.array(x), float(t), int(i)))

    def spy(x, t, i):
        if not compiled:
            record(x, t, i)
            return jnp.asarray(model(np.asarray(x), float(t)))
        jax.debug.callback(record, x, t, i, ordered=True)
        return model(x, t)

    with jax.disable_jit(not compiled):
        final = SAMPLERS[name](spy, latents, schedule, steps=steps, key=KEY, start=start, **options)
    jax.effects_barrier()
    return asked, np.array(final)


def make_peer(name, schedule, steps):
    class_name, extra = DIFFUSERS_SCHEDULERS[name]
    peer = getattr(diffusers, class_name).from_config(schedule.to_dict(), **extra)
    peer.set_timesteps(steps)
    return peer


def run_peer(monkeypatch, name, schedule, steps, latents, start=0, x0=None, **options):
    """The loop of a diffusers pipeline, its noise replaced by ours; image to image with ``x0``."""
    peer, model = make_peer(name, schedule, steps), make_model(schedule, np)
    indices, ts = model_calls(name, schedule, steps, start)
    ts = torch.from_numpy(ts) if name == "pndm" else peer.timesteps[start:]
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(start)
    x = to_torch(latents)
    x = x * peer.init_noise_sigma if x0 is None else peer.add_noise(to_torch(x0), x, ts[:1])

    asked = []
    for i, t in zip(indices, ts, strict=True):
        noise = to_torch(jax.random.normal(jax.random.fold_in(KEY, i), SHAPE))
        module = importlib.import_module(type(peer).__module__)
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
        scaled = peer.scale_model_input(x, t).numpy()
        asked.append((scaled, float(t), int(i)))
        x = peer.step(torch.from_numpy(model(scaled, float(t))), t, x, **options).prev_sample
    return asked, x.numpy()


def assert_same_run(ours, theirs):
    (asked, final), (asked_peer, final_peer) = ours, theirs
    assert len(asked) == len(asked_peer)
    for n, ((x, t, i), (x_peer, t_peer, i_peer)) in enumerate(zip(asked, asked_peer, strict=True)):
        assert i == i_peer
        assert t == pytest.approx(t_peer, abs=1e-3)
        np.testing.assert_allclose(x, x_peer, rtol=0, atol=1e-4, err_msg=f"call {n}")
    np.testing.assert_allclose(final, final_peer, rtol=0, atol=1e-4)


def variants():
    """The two families as they are, each also with the other prediction type."""
    for family, schedule in (("sd15", SD15), ("mini", MINI)):
        for kind in ("epsilon", "v_prediction"):
            yield pytest.param(
                dataclasses.replace(schedule, prediction_type=kind), id=f"{family}-{kind}"
            )


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("schedule", variants())
@pytest.mark.parametrize("name", SAMPLERS)
def test_as_diffusers(monkeypatch, name, schedule, steps):
    latents = normal(0, *SHAPE)
    ours = run_ours(name, schedule, steps, latents)
    assert_same_run(ours, run_peer(monkeypatch, name, schedule, steps, latents))
    assert len(ours[0]) == num_model_calls(name, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_compiled(name):
    latents = normal(0, *SHAPE)
    compiled = run_ours(name, SD15, 6, latents, compiled=True)
    assert_same_run(compiled, run_ours(name, SD15, 6, latents))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_shortest_runs_as_diffusers(monkeypatch, name, steps):
    latents = normal(10, *SHAPE)
    ours = run_ours(name, SD15, steps, latents)
    assert_same_run(ours, run_peer(monkeypatch, name, SD15, steps, latents))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_spacings_and_clean_ends_as_diffusers(monkeypatch, name, spacing):
    schedule = dataclasses.replace(SD15, timestep_spacing=spacing, set_alpha_to_one=True)
    latents = normal(1, *SHAPE)
    ours = run_ours(name, schedule, 7, latents)
    assert_same_run(ours, run_peer(monkeypatch, name, schedule, 7, latents))


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("schedule", [SD15, MINI])
def test_noisy_ddim_as_diffusers(monkeypatch, schedule, eta):
    latents = normal(2, *SHAPE)
    ours = run_ours("ddim", schedule, 6, latents, eta=eta)
    assert_same_run(ours, run_peer(monkeypatch, "ddim", schedule, 6, latents, eta=eta))


@pytest.mark.parametrize(
    ("start", "spacing"), [(0, "linspace"), (1, "leading"), (4, "linspace"), (7, "leading")]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_as_diffusers(monkeypatch, name, start, spacing):
    schedule = dataclasses.replace(SD15, timestep_spacing=spacing)
    x0, noise = normal(4, *SHAPE), normal(5, *SHAPE)
    latents = noise_latents_for_start(schedule, name, x0, noise, 8, start)
    ours = run_ours(name, schedule, 8, latents, start=start)
    assert_same_run(ours, run_peer(monkeypatch, name, schedule, 8, noise, start=start, x0=x0))
    assert len(ours[0]) == num_model_calls(name, 8, start)
    assert ours[0][0][2] == start
    assert ours[0][-1][2] == 7


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_as_diffusers_at_every_length(name, spacing):
    schedule = dataclasses.replace(SD15, timestep_spacing=spacing)
    for steps in range(1, 51):
        _, ts = model_calls(name, schedule, steps)
        peer = make_peer(name, schedule, steps).timesteps.numpy()
        np.testing.assert_allclose(ts, peer, rtol=0, atol=1e-3, err_msg=f"{steps} steps")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_knows_the_answer_is_believed(name):
    schedule = dataclasses.replace(SD15, set_alpha_to_one=True)
    answer = normal(6, *SHAPE)

    def model(x, t, i):
        a, s = shares_at(schedule, t, jnp)
        return (x - a * answer) / s

    result = SAMPLERS[name](model, normal(7, *SHAPE), schedule, steps=10, key=KEY)
    if name == "dpmpp_2m_karras":  # its timesteps are rounded, its sigmas are not
        np.testing.assert_allclose(result, answer, rtol=0, atol=1e-2)
    else:
        np.testing.assert_allclose(result, answer, rtol=0, atol=1e-4)


def test_one_ddim_step_by_hand():
    """abar 0.75 -> 1: x_0 = (x - 0.5 eps) / sqrt(0.75)."""
    schedule = NoiseSchedule(num_train_timesteps=1, beta_start=0.25, set_alpha_to_one=True)
    x = jnp.full((1, 1, 1, 1), 3.0)
    result = sample_ddim(lambda x, t, i: x / 2, x, schedule, steps=1)
    assert result.item() == pytest.approx(1.5 * 1.5 / 0.75**0.5, abs=1e-5)


def test_pndm_repeats_a_step():
    indices, ts = model_calls("pndm", SD15, 4)
    assert indices.tolist() == [0, 1, 1, 2, 3]
    assert ts.tolist() == [751, 501, 501, 251, 1]
    assert model_calls("pndm", SD15, 4, start=2)[0].tolist() == [2, 3, 3]
    assert num_model_calls("pndm", 4) == 5
    assert num_model_calls("pndm", 1) == num_model_calls("pndm", 4, start=3) == 1


def test_indices_name_the_timesteps():
    for name in ("ddim", "pndm"):
        indices, ts = model_calls(name, SD15, 20, start=3)
        np.testing.assert_array_equal(timesteps(SD15, 20)[indices], ts)


@pytest.mark.parametrize("name", ["euler_ancestral", "lcm"])
def test_noise_follows_the_key(name):
    @jax.jit
    def sample(key):
        return SAMPLERS[name](lambda x, t, i: 0.5 * x, normal(8, *SHAPE), SD15, steps=3, key=key)

    np.testing.assert_array_equal(sample(KEY), sample(KEY))
    assert np.abs(sample(KEY) - sample(jax.random.key(8, impl="rbg"))).max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_networks_are_sampled_in_float32(name):
    def sample(latents):
        def model(x, t, i):
            return (0.5 * x).astype(jnp.bfloat16)

        return SAMPLERS[name](model, latents, MINI, steps=5, key=KEY)

    result = jax.eval_shape(sample, jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16))
    assert (result.shape, result.dtype) == (SHAPE, jnp.float32)


def test_first_sigma_scale_by_hand():
    """The last training sigma of SD 1.5 is 14.6; only the Euler samplers work in its units."""
    sigma = ((1 - 0.0046600937) / 0.0046600937) ** 0.5
    trailing = dataclasses.replace(SD15, timestep_spacing="trailing")
    assert first_sigma_scale("euler", trailing, 5) == pytest.approx(sigma, rel=1e-5)
    assert first_sigma_scale("euler", trailing, 5, start=1) < sigma / 2
    assert first_sigma_scale("ddim", trailing, 5) == 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("steps", "start"), [(0, 0), (5, 5), (5, -1), (1001, 0)])
def test_impossible_runs(name, steps, start):
    with pytest.raises(UserError, match="step"):
        model_calls(name, SD15, steps, start)


def test_lcm_cannot_take_more_steps_than_its_distillation():
    with pytest.raises(UserError, match="at most 50"):
        model_calls("lcm", SD15, 51)
