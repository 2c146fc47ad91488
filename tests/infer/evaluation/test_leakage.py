"""Leakage inside the model: nothing for the base's own pictures, FAIR as its definition says."""

import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert.models.tokenizer import tokenize
from fact_infer.evaluation.leakage import TIMES, Leakage, block_name
from fact_jax.diffusion.noise_schedules import add_noise
from fact_jax.fact import encode_face, initial_noise
from fact_jax.utils.pixels import normalize_pixels

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

PROMPTS, SEEDS = ["a smiling person", "red", "a person"], [3, 5, 8]


@pytest.fixture(scope="module")
def given():
    """Crops, pictures, and heads in the middle."""
    draw = np.random.default_rng(0)
    crops = draw.integers(0, 256, (3, 1, 32, 32, 3), np.uint8)
    fact, base = draw.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
    heads = np.zeros((3, 32, 32), bool)
    heads[:, 8:20, 8:24] = True
    return crops, fact, base, heads


def test_a_base_picture_leaks_nothing_into_the_latents(flax, given):
    crops, fact, base, heads = given
    fact = np.stack([base[0], fact[1], base[2]])
    leak = Leakage(flax, 2)
    found = leak(PROMPTS, SEEDS, crops, {"fact": fact, "base": base}, heads)
    assert found["latents/fact"][[0, 2]].tolist() == [0.0, 0.0]
    assert found["latents/fact"][1] > 0.1


def test_fair_by_block_is_its_definition(flax, given):
    crops, fact, base, heads = given
    pictures = {"fact": fact, "base": base}
    found = Leakage(flax, 3)(PROMPTS, SEEDS, crops, pictures, heads)
    models, schedule = flax.modules(), flax.base.schedule
    latents = models["vae"].encode(normalize_pixels(fact))[0] * flax.base.vae.scaling_factor
    noise = initial_noise(jnp.asarray(SEEDS), *latents.shape[1:])
    text = models["text_encoder"](jnp.asarray(tokenize(flax.base.tokenizer, PROMPTS)[0]))
    face = encode_face(models["encoder"], models["resampler"], normalize_pixels(crops))
    blocks = [block_name(path) for path, _ in models["unet"].transformer_blocks()]
    ratios = np.zeros((len(blocks), 3))
    for eighth in TIMES:
        t = jnp.full(3, schedule.num_train_timesteps * eighth // 8)
        noisy = add_noise(schedule, latents, noise, t)
        _, seen = models["unet"](
            noisy, t, text, face=face, on_increment=lambda x, delta, size: (x, delta, size)
        )
        for i, (x, delta, (h, w)) in enumerate(seen):
            cells = heads.reshape(3, h, 32 // h, w, 32 // w).mean((2, 4)).reshape(3, -1, 1)
            there, added = (
                np.linalg.norm(np.asarray(a) * (1 - cells), axis=(1, 2)) for a in (x, delta)
            )
            ratios[i] += added / there / len(TIMES)
    for name, expected in zip(blocks, ratios, strict=True):
        np.testing.assert_allclose(found[f"fair/{name}/fact"], expected, rtol=2e-4)
    np.testing.assert_allclose(found["fair/fact"], ratios.mean(0), rtol=2e-4)
