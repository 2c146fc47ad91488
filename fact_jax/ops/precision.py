"""What products of matrices are computed in, which is not always what their numbers are stored in.

By JAX's default a GPU multiplies float32 numbers as TF32 and a TPU as bfloat16.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""float32 means float32 products; tf32 is float32 numbers whose products are TF32 on NVIDIA GPUs
and three products of bfloat16 on TPUs; the others are 16-bit numbers, with float32 sums."""

_PRODUCTS = {"float32": "highest", "tf32": "high"}


def precision_of(dtype: Any) -> Precision:
    """The precision of that name, or of what ``jnp.dtype`` takes."""
    return "tf32" if isinstance(dtype, str) and dtype == "tf32" else jnp.dtype(dtype).name


def storage_dtype(precision: Precision) -> jnp.dtype:
    """What weights and activations are stored in."""
    return jnp.dtype("float32" if precision == "tf32" else precision)


def cast_parameters(tree: PyTree, precision: Precision) -> PyTree:
    """Floating leaves as they are stored; scalars, which gates are, as they came."""
    dtype = storage_dtype(precision)

    def one(leaf: Any) -> Any:
        changes = leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, dtype) if changes else leaf

    return jax.tree.map(one, tree)


def matmul_precision(precision: Precision) -> AbstractContextManager[None]:
    """For products that are traced inside, their gradients among them.

    Of 16-bit numbers there is one kind of product, and TPU kernels refuse to be asked for another.
    """
    return jax.default_matmul_precision(_PRODUCTS.get(precision, "default"))
