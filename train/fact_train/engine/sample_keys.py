"""Random numbers by sample: each from its own key, so that no split of the batch changes them."""

import jax
from jaxtyping import Array, Bool, Float, Int, Key


def split_keys(keys: Key[Array, " b"], count: int) -> Key[Array, "count b"]:
    """``count`` independent keys for each sample."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def sample_normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise of this shape for each sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample_timesteps(keys: Key[Array, " b"], count: int) -> Int[Array, " b"]:
    """A uniform timestep below ``count`` for each sample."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)


def sample_bernoulli(keys: Key[Array, " b"], probability: float) -> Bool[Array, " b"]:
    """True with this probability, for each sample."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
