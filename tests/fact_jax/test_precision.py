"""Which products a precision asks for, read from traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.lax import Precision

from fact_jax.ops.precision import matmul_precision, precision_of, storage_dtype


def products(jaxpr):
    """(dtype, precision) of every product of matrices and convolution."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.invars[0].aval.dtype.name, eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("float32", "float32", Precision.HIGHEST),
        ("tf32", "float32", Precision.HIGH),
        ("bfloat16", "bfloat16", Precision.DEFAULT),
    ],
)
def test_products_are_asked_for_by_name(precision, dtype, expected):
    assert storage_dtype(precision) == dtype

    def program(x):
        with matmul_precision(precision):
            return jnp.einsum("ab,bc->ac", x, x) @ x

    x = jnp.zeros((3, 3), storage_dtype(precision))
    found = list(products(jax.make_jaxpr(program)(x).jaxpr))
    assert found == [(dtype, (expected, expected))] * 2


def test_names_of_precisions():
    assert [precision_of(x) for x in ("tf32", jnp.bfloat16, jnp.dtype("float16"), "float32")] == [
        "tf32",
        "bfloat16",
        "float16",
        "float32",
    ]
