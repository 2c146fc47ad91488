"""The adapted UNet is the base, bit for bit, whenever the adapter has nothing to say."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_jax.errors import UserError
from fact_jax.models.adapter import FaceAdapter
from fact_jax.models.unet import UNet, UNetConfig
from tests.fact_jax.tiny import FACE_DIM, TEXT_DIM, normal, tiny_unet
from tests.quick import quick_jit

LATENTS, TEXT = normal(1, 3, 6, 4, 4), normal(2, 3, 7, TEXT_DIM)
FACE = normal(3, 3, 48, FACE_DIM)
TIMESTEPS = jnp.array([3, 500, 981])


def eager(unet, *args):
    return unet(*args)


@functools.partial(quick_jit, static_argnums=0)
def _jitted(graph, state, *args):
    return nnx.merge(graph, state)(*args)


def jitted(unet, *args):
    return _jitted(*nnx.split(unet), *args)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return tiny_unet()


def shut(unet: UNet) -> UNet:
    """A copy whose gates are closed, as they are at the start of training."""
    unet = nnx.clone(unet)
    for _, block in unet.transformer_blocks():
        block.face.alpha_attn[...] = block.face.alpha_dense[...] = jnp.zeros(())
    return unet


@pytest.mark.parametrize("run", [eager, jitted])
def test_a_silent_adapter_changes_no_bit(unet, run):
    base = np.asarray(run(tiny_unet(face_dim=None), LATENTS, TIMESTEPS, TEXT))
    adapted = run(unet, LATENTS, TIMESTEPS, TEXT, FACE, jnp.ones(()))
    assert np.abs(adapted - base).max() > 0.1
    silent = {
        "no face": run(unet, LATENTS, TIMESTEPS, TEXT),
        "scale 0": run(unet, LATENTS, TIMESTEPS, TEXT, FACE, jnp.zeros(())),
        "alphas 0": run(shut(unet), LATENTS, TIMESTEPS, TEXT, FACE, jnp.ones(())),
    }
    for name, output in silent.items():
        assert np.asarray(output).tobytes() == base.tobytes(), name


def test_gates_start_shut():
    adapter = FaceAdapter(2, 1, 3, rngs=nnx.Rngs(0))
    assert adapter.alpha_attn[...] == adapter.alpha_dense[...] == 0


def test_every_sample_has_its_own_scale(unet):
    run = functools.partial(eager, unet, LATENTS, TIMESTEPS, TEXT, FACE)
    mixed = run(jnp.array([0.0, 1.0, 0.5]))
    for sample, scale in enumerate((0.0, 1.0, 0.5)):
        np.testing.assert_array_equal(mixed[sample], run(scale)[sample])


@pytest.mark.parametrize("tokens", [16, 48])
def test_face_keys_are_the_face(unet, tokens):
    face = FACE[:, :tokens]
    keys = unet.face_keys(face)
    assert [k.shape for pair in keys for k in pair] == [(3, tokens, 8)] * 8
    np.testing.assert_array_equal(
        eager(unet, LATENTS, TIMESTEPS, TEXT, keys, 0.5),
        eager(unet, LATENTS, TIMESTEPS, TEXT, face, 0.5),
    )


def test_one_timestep_for_all(unet):
    np.testing.assert_array_equal(
        eager(unet, LATENTS, jnp.array(500), TEXT),
        eager(unet, LATENTS, jnp.full(3, 500.0), TEXT),
    )


def test_increments_come_back_in_call_order(unet):
    """Eight channels everywhere, so only the order of the calls tells the blocks apart."""
    seen = []

    def keep(x, increment, size):
        seen.append(size)
        return len(seen), float(jnp.abs(increment).max())

    _, results = unet(LATENTS, TIMESTEPS, TEXT, FACE, 1.0, on_increment=keep)
    assert [index for index, _ in results] == [1, 2, 3, 4]
    assert seen == [(6, 4)] * 4
    assert all(largest > 0 for _, largest in results)
    assert unet(LATENTS, TIMESTEPS, TEXT, on_increment=keep)[1] == ()


def test_a_face_needs_an_adapter():
    with pytest.raises(UserError, match="no face adapter"):
        tiny_unet(face_dim=None)(LATENTS, TIMESTEPS, TEXT, FACE)


def test_levels_and_block_types_must_agree():
    with pytest.raises(UserError, match="block_out_channels has 2 levels"):
        UNetConfig.from_dict({"block_out_channels": [8, 16]})
    with pytest.raises(UserError, match="down_block_types has 'SimpleCrossAttnDownBlock2D'"):
        UNetConfig.from_dict({"down_block_types": ["SimpleCrossAttnDownBlock2D"]})
