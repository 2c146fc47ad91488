"""FLOPs of a traced function, loops in full (the compiler counts a body once).

Numbers are those of the whole program, whatever devices share it.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from fact_jax.ops import attention

Jaxpr = Any
_KERNEL_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Products of (queries x keys x width) in cuDNN's attention; backwards the scores come again."""


def trace(function: Callable, *arguments: Any) -> Jaxpr:
    """The jaxpr of a function of such arguments, without dead code."""
    return without_dead_code(jax.make_jaxpr(function)(*arguments).jaxpr)


def without_dead_code(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr that ``jax.jit`` compiles: arguments that are of no use are left out too."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def argument_bytes(jaxpr: Jaxpr) -> int:
    return sum(_size(var) * var.aval.dtype.itemsize for var in jaxpr.invars)


def model_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of a function as its definition says: attention without tiles, which may have padding
    and are computed again backwards."""
    limit = attention.KEPT_MATRIX_LIMIT
    attention.KEPT_MATRIX_LIMIT = sys.maxsize
    try:
        return count_flops(trace(function, *arguments))
    finally:
        attention.KEPT_MATRIX_LIMIT = limit


def count_flops(jaxpr: Jaxpr, platform: str | None = None) -> int:
    """Operations of matrix products, convolutions and attention kernels, two a multiply-add.

    All else (norms, activations, softmax, optimizer) is left out, as is usual for utilisation. Of
    what depends on the platform, that of ``platform`` counts, or (None) that of any other. A
    ``while`` loop with products inside has no length to count by: ValueError.
    """
    return flops_by_product(jaxpr, platform).total()


def flops_by_product(jaxpr: Jaxpr, platform: str | None = None) -> Counter[str]:
    """:func:`count_flops` by what is multiplied: the numbers' dtype, but of float32 the precision
    of the product (``float32``, ``tf32``, or ``default`` for the platform's own)."""
    total = Counter[str]()
    for eqn in jaxpr.eqns:
        inner = [flops_by_product(sub, platform) for sub in jaxprs_in_params(eqn.params)]
        name = eqn.primitive.name
        if name == "while" and any(inner):
            raise ValueError("a while loop has no known number of rounds: use a scan")
        if name == "cond":
            inner = [_taken(inner, eqn.params.get("branches_platforms"), platform)]
        rounds = _rounds(eqn)
        for counts in inner:
            total.update({kind: rounds * flops for kind, flops in counts.items()})
        if flops := _product_flops(eqn):
            total[_product(eqn)] += flops
    return total


def _product(eqn: Any) -> str:
    dtype, precision = eqn.invars[0].aval.dtype.name, eqn.params.get("precision")
    if dtype != "float32":
        return dtype
    asked = precision[0] if isinstance(precision, tuple) else precision
    names = {lax.Precision.HIGHEST: "float32", lax.Precision.HIGH: "tf32"}
    return names.get(asked, "default")


def _taken(branches: list[Counter[str]], platforms: Any, platform: str | None) -> Counter[str]:
    """Of a switch over platforms, that of this one or else the default; of another, the largest."""
    for flops, names in zip(branches, platforms or (), strict=False):
        if names is None or platform in names:
            return flops
    return max(branches, key=Counter.total)


def _rounds(eqn: Any) -> int:
    """How often the jaxprs inside an equation run, on all devices together."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid)
        case "shard_map":
            return math.prod(
                eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]
            )
    return 1


def _product_flops(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars[0]) * math.prod(shape[i] for i in contracted)
    if eqn.primitive.name in _KERNEL_PRODUCTS:
        (b, n, heads, width), keys = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        return _KERNEL_PRODUCTS[eqn.primitive.name] * 2 * b * n * heads * width * keys
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        spec = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *space)
        taps = math.prod(kernel[i] for i in spec[1:])
        # A dilated input is mostly zeros, which nobody multiplies by.
        zeros = math.prod(eqn.params["lhs_dilation"])
        return 2 * _size(eqn.outvars[0]) * taps // zeros
    return 0


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)
