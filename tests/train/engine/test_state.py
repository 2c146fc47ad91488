"""Learning rate, running average and optimizer against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_jax.models.adapter import FaceAdapter
from fact_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.utils.errors import UserError
from fact_train.config import EMAConfig, OptimizerConfig
from fact_train.engine.partition import paths
from fact_train.engine.state import ema_decay, learning_rate, make_optimizer, make_state, update_ema


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 2.0, 12: 2.0}),
        ("linear", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 1.0, 10: 0.5, 12: 0.0}),
        ("cosine", {0: 0.5, 3: 2.0, 4: 2.0, 6: 1.0 + 0.5**0.5, 8: 1.0, 12: 0.0, 20: 0.0}),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule=schedule)
    for step, rate in expected.items():
        np.testing.assert_allclose(learning_rate(config, 12, jnp.int32(step)), rate, atol=1e-6)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(OptimizerConfig(learning_rate=0.25), 10, jnp.int32(0)) == 0.25


def test_ema():
    config = EMAConfig(decay=0.75, warmup=True)
    for step, decay in {0: 0.1, 2: 0.25, 8: 0.5, 26: 0.75, 1000: 0.75}.items():
        np.testing.assert_allclose(ema_decay(config, jnp.int32(step)), decay, rtol=1e-6)
    assert ema_decay(EMAConfig(decay=0.75, warmup=False), jnp.int32(0)) == 0.75
    moved = update_ema(config, {"a": jnp.ones(2)}, {"a": jnp.array([3.0, 1.0])}, jnp.int32(8))
    np.testing.assert_allclose(moved["a"], [2.0, 1.0])


def test_ema_can_be_off():
    optimizer = make_optimizer(OptimizerConfig())
    params = {"a": jnp.ones((2, 2))}
    assert make_state(params, optimizer, EMAConfig(decay=0.0)).ema is None
    assert update_ema(EMAConfig(decay=0.0), None, params, jnp.int32(0)) is None


def test_clipping_to_the_global_norm():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=2.0, b1=0.5))
    params = {"a": jnp.zeros(1), "b": jnp.zeros((1, 1))}
    gradient = {"a": jnp.array([6.0]), "b": jnp.array([[8.0]])}  # norm 10, so divided by 5
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(state[1].mu["a"], [0.6], rtol=1e-6)
    np.testing.assert_allclose(state[1].mu["b"], [[0.8]], rtol=1e-6)


def test_decay_spares_vectors_and_multipliers_take_the_first_match():
    config = OptimizerConfig(
        weight_decay=0.5, clip_norm=1e9, multipliers=(("gate", 10.0), ("block/", 2.0))
    )
    optimizer = make_optimizer(config)
    params = {
        "block": {"kernel": jnp.full((1, 1), 4.0), "gate": jnp.full(1, 4.0)},
        "b": jnp.ones(1),
    }
    gradient = {
        "block": {"kernel": jnp.full((1, 1), 3.0), "gate": jnp.full(1, -3.0)},
        "b": jnp.full(1, 2.0),
    }
    # Adam's first step is the sign of the gradient, up to float32 in its bias correction (1e-5).
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["block"]["kernel"], [[2.0 * (1.0 + 0.5 * 4.0)]], rtol=1e-5)
    np.testing.assert_allclose(updates["block"]["gate"], [-10.0], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [1.0], rtol=1e-5)


@pytest.mark.parametrize("decayed", [False, True])
def test_embeddings_decay_only_if_asked(decayed):
    """The arrays that have no kernel's name, in the models that are trained."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, decay_embeddings=decayed))

    def shapes():
        models = {
            "resampler": Resampler(ResamplerConfig.mini(), rngs=nnx.Rngs(0)),
            "encoder": TransFace(TransFaceConfig.mini(), rngs=nnx.Rngs(0)),
            "text_encoder": CLIPTextModel(CLIPTextConfig.mini(9), rngs=nnx.Rngs(0)),
            "adapter": FaceAdapter(4, 1, 12, rngs=nnx.Rngs(0)),
        }
        return {name: nnx.to_pure_dict(nnx.state(model)) for name, model in models.items()}

    params = jax.tree.map(
        lambda leaf: np.ones((1,) * leaf.ndim, np.float32), jax.eval_shape(shapes)
    )
    updates, _ = optimizer.update(
        jax.tree.map(np.zeros_like, params), optimizer.init(params), params
    )
    moved = {path for path, update in paths(updates) if np.any(update)}
    assert all(np.allclose(update, 0.5) for path, update in paths(updates) if path in moved)
    kernels = {path for path, _ in paths(params) if path.endswith("/kernel")}
    embeddings = {
        "resampler/latents",
        "encoder/pos_embed",
        "encoder/mask_token",
        "text_encoder/embeddings/position_embedding/embedding",
        "text_encoder/embeddings/token_embedding/embedding",
    }
    assert embeddings < {path for path, _ in paths(params)}
    assert moved == (kernels | embeddings if decayed else kernels)


def test_a_multiplier_that_matches_nothing_is_an_error():
    optimizer = make_optimizer(OptimizerConfig(multipliers=(("alpa", 10.0),)))
    with pytest.raises(UserError, match="no trainable path matches 'alpa'"):
        optimizer.init({"alpha": jnp.zeros(())})


def test_masters_are_float32():
    optimizer = make_optimizer(OptimizerConfig())
    with pytest.raises(ValueError, match="a/b is bfloat16"):
        make_state({"a": {"b": jnp.ones(2, jnp.bfloat16)}}, optimizer, EMAConfig())
