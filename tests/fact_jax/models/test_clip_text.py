"""The text encoder's precision; its numbers are compared with transformers' in tests/parity."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fact_convert.weights import abstract_module
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.plan.jaxpr_costs import flops_by_product, trace


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computes_in_the_dtype_of_its_parameters(dtype):
    """Else what attends to the text would compute in float32 too."""
    config = CLIPTextConfig.mini(50)
    ids = jnp.zeros((2, config.max_position_embeddings), jnp.int32)

    def encode(ids):
        graph, state = nnx.split(abstract_module("clip_text", config))
        return nnx.merge(graph, jax.tree.map(lambda a: a.astype(dtype), state))(ids)

    assert jax.eval_shape(encode, ids).dtype == dtype
    products = "default" if dtype == "float32" else dtype
    assert set(flops_by_product(trace(encode, ids))) == {products}
