"""FLOPs and peak memory of a traced function, loops in full (the compiler counts a body once).

Numbers are those of the whole program, whatever devices share it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

Jaxpr = Any


def trace(function: Callable, *arguments: Any) -> Jaxpr:
    """The jaxpr of a function of such arguments, without dead code."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def count_flops(jaxpr: Jaxpr) -> int:
    """Operations of matrix products and convolutions, two a multiply-add.

    All else (norms, activations, softmax, optimizer) is left out, as is usual for utilisation. A
    ``while`` loop with products inside has no length to count by: ValueError.
    """
    total = 0
    for eqn in jaxpr.eqns:
        inner = [count_flops(sub) for sub in jaxprs_in_params(eqn.params)]
        name = eqn.primitive.name
        if name == "while" and any(inner):
            raise ValueError("a while loop has no known number of rounds: use a scan")
        rounds = eqn.params["length"] if name == "scan" else 1
        total += rounds * (max(inner) if name == "cond" else sum(inner)) + _product_flops(eqn)
    return total


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most memory that intermediate results hold at one time, in the order of the trace.

    Every result counts from where it is made to where it is last used. No fusion and no reordering:
    compilers do better, by how much depends on them.
    """
    last_use: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_use |= {var: i for var in eqn.invars if _is_variable(var)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if _is_variable(var)}
    live = peak = 0
    held: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        made = {var: _bytes(var) for var in eqn.outvars}
        inner = max(map(peak_bytes, jaxprs_in_params(eqn.params)), default=0)
        peak = max(peak, live + max(inner, sum(made.values())))
        for var, size in made.items():
            if var in last_use:
                held[var] = size
                live += size
        for var in {var for var in eqn.invars if _is_variable(var)}:
            if last_use[var] == i and var in held:
                live -= held.pop(var)
    return peak


def _product_flops(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars[0]) * math.prod(shape[i] for i in contracted)
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


def _bytes(var: Any) -> int:
    aval = var.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _is_variable(var: Any) -> bool:
    return not hasattr(var, "val")  # a literal has a value
