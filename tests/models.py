"""Models of random numbers, made without compiling their initializers."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fact_convert.weights import abstract_state


def filled_model(kind: str, config, fill: Callable[[str, tuple[int, ...]], np.ndarray]):
    """A model whose parameters are ``fill(path, shape)``, as float32."""
    graph, variables = abstract_state(kind, config)
    filled = []
    for path, variable in variables.items():
        value = jnp.asarray(fill(path, variable.get_value().shape), jnp.float32)
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        filled.append((keys, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def random_model(kind: str, config, seed: int = 0):
    """Matrices of unit gain, norms that change nothing, biases of zero."""
    draw = np.random.default_rng(seed)

    def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition(".")[2]
        if name in ("scale", "var"):
            return np.ones(shape)
        if name in ("bias", "mean"):
            return np.zeros(shape)
        return draw.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5

    return filled_model(kind, config, fill)
