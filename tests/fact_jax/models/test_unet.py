"""The adapted UNet is the base, bit for bit, whenever the adapter has nothing to say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_jax.models.adapter import FaceAdapter
from fact_jax.models.unet import UNet, UNetConfig
from fact_jax.ops.remat import CPU_OPTIONS
from fact_jax.utils.errors import UserError
from tests.fact_jax.tiny import FACE_DIM, TEXT_DIM, normal, tiny_unet

pytestmark = pytest.mark.heavy

LATENTS, TEXT = normal(1, 3, 6, 4, 4), normal(2, 3, 7, TEXT_DIM)
FACE = normal(3, 3, 48, FACE_DIM)
TIMESTEPS = jnp.array([3, 500, 981])


def eager(unet, *args):
    return unet(*args)


@functools.partial(jax.jit, static_argnums=0)
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


def without_text(unet: UNet) -> UNet:
    """A copy whose text cross-attention answers 0 to everything."""
    unet = nnx.clone(unet)
    for _, block in unet.transformer_blocks():
        out = block.attn2.to_out[0]
        out.kernel[...], out.bias[...] = out.kernel[...] * 0, out.bias[...] * 0
    return unet


def test_text_attention_that_is_off_adds_exactly_nothing(unet):
    def run(unet, text, *switch):
        return np.asarray(jitted(unet, LATENTS, TIMESTEPS, text, FACE, *switch))

    given, removed = run(unet, TEXT, jnp.ones(())), run(without_text(unet), TEXT, jnp.ones(()))
    assert np.abs(given - removed).max() > 0.1
    switch = (jnp.ones(()), None, None, None, None)
    off = run(unet, 3 * TEXT, *switch, jnp.zeros(3, bool))
    np.testing.assert_array_equal(off, removed)
    some = run(unet, TEXT, *switch, jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(some, np.stack([given[0], removed[1], given[2]]))


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


def test_paths_of_the_blocks():
    """A configuration knows them before there is a model."""
    config = UNetConfig(
        block_out_channels=(4, 8, 8),
        down_attention=(True, False, True),
        up_attention=(True, True, False),
        layers_per_block=2,
        cross_attention_dim=TEXT_DIM,
        heads=(1, 2, 2),
        norm_num_groups=2,
    )
    made = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    blocks = {path: block.norm1.num_features for path, block in made.transformer_blocks()}
    assert list(config.block_channels().items()) == list(blocks.items())
    assert len(UNetConfig.sd15().block_channels()) == 16


def test_strengths_of_blocks_in_call_order(unet):
    base = eager(unet, LATENTS, TIMESTEPS, TEXT)
    for i in range(4):
        scales = [0.0] * 4
        scales[i] = 1.0
        seen = []
        out, _ = unet(
            LATENTS,
            TIMESTEPS,
            TEXT,
            FACE,
            tuple(scales),
            on_increment=lambda x, delta, size, seen=seen: seen.append(bool(delta.any())),
        )
        assert seen == [scale > 0 for scale in scales]
        assert np.abs(out - base).max() > 1e-3


def test_a_face_needs_an_adapter():
    with pytest.raises(UserError, match="no face adapter"):
        tiny_unet(face_dim=None)(LATENTS, TIMESTEPS, TEXT, FACE)


def test_levels_and_block_types_must_agree():
    with pytest.raises(UserError, match="block_out_channels has 2 levels"):
        UNetConfig.from_dict({"block_out_channels": [8, 16]})
    with pytest.raises(UserError, match="down_block_types has 'SimpleCrossAttnDownBlock2D'"):
        UNetConfig.from_dict({"down_block_types": ["SimpleCrossAttnDownBlock2D"]})


def training_loss(unet, remat):
    """(loss of every parameter and of the increments, parameters), at 16 x 16 and batch 3."""
    graph, state = nnx.split(unet)
    latents, target = normal(20, 3, 16, 16, 4), normal(21, 3, 16, 16, 4)
    text, face = normal(22, 3, 7, TEXT_DIM), normal(23, 3, 2, FACE_DIM)

    def loss(state):
        output, increments = nnx.merge(graph, state)(
            latents,
            jnp.asarray([3, 500, 999]),
            text,
            face=face,
            on_increment=lambda x, delta, size: (delta**2).mean() + (x**2).mean(),
            remat=remat,
        )
        return ((output - target) ** 2).mean() + 0.1 * sum(increments)

    return loss, nnx.to_pure_dict(state)


def assert_recomputation_changes_memory_and_not_the_gradient(unet, *policies):
    """``policies`` from the one that keeps least to ``none``."""
    options = {"xla_backend_optimization_level": 0, **CPU_OPTIONS}
    memory, results = {}, {}
    for remat in policies:
        loss, state = training_loss(unet, remat)
        compiled = (
            jax.jit(jax.value_and_grad(loss), compiler_options=options).lower(state).compile()
        )
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(state)
    assert sorted(memory, key=memory.get) == list(policies)
    assert memory[policies[-2]] < 0.5 * memory["none"]
    for remat in policies[:-1]:
        jax.tree.map(
            # One part in 1e5 of each tensor's size: sums in another order.
            lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max()),
            results[remat],
            results["none"],
        )


@pytest.mark.slow
def test_recomputation_changes_memory_and_not_the_gradient(unet):
    assert_recomputation_changes_memory_and_not_the_gradient(unet, "block", "none")


@pytest.mark.slow
def test_keeping_the_products_lies_between(unet):
    assert_recomputation_changes_memory_and_not_the_gradient(unet, "block", "dots", "none")
