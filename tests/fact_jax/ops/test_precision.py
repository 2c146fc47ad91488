"""What numbers are stored in, by the precision of the computation."""

import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.ops.precision import cast_parameters


@pytest.mark.parametrize(
    ("precision", "stored"), [("float32", "float32"), ("tf32", "float32"), ("bfloat16", "bfloat16")]
)
def test_gates_and_whole_numbers_keep_their_precision(precision, stored):
    parameters = {
        "kernel": np.ones((2, 3), np.float32),
        "alpha": np.float32(0.3),
        "ids": np.arange(3),
    }
    cast = cast_parameters(parameters, precision)
    assert cast["kernel"].dtype == jnp.dtype(stored)
    assert cast["alpha"].dtype == jnp.float32
    assert cast["alpha"] == np.float32(0.3)
    assert cast["ids"].dtype == parameters["ids"].dtype
