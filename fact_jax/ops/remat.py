"""Trading arithmetic for memory: blocks whose inner results the backward pass computes again."""

from typing import Any, Literal

import jax
from flax import nnx

Remat = Literal["none", "dots", "block"]
"""What is computed again: nothing; everything but products with weights; everything in a block.

Attention's matrices are computed again in any case, where they are large."""

_POLICIES = {
    # Not the same as no checkpoint at all: a block's backward pass waits for what comes from above.
    # Without that XLA turns the kernels of all convolutions around at once, 2 GB of them.
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}

CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Options of ``jax.jit`` without which recomputation saves nothing on a CPU: XLA drops there the
barriers that keep it late, before it decides on an order, and then does it early."""


def call_block(remat: Remat | None, module: nnx.Module, *arrays: Any, **static: Any) -> Any:
    """``module(*arrays, **static)``, keeping of it for the backward pass what ``remat`` says.

    None, where nothing is differentiated, is the plain call.
    """
    if remat is None:
        return module(*arrays, **static)
    # Taken apart and merged again inside: a module must not cross a trace level as it is.
    graph, state = nnx.split(module)

    def call(state, *arrays):
        return nnx.merge(graph, state)(*arrays, **static)

    again = jax.checkpoint(call, policy=_POLICIES[remat])
    return again(nnx.to_pure_dict(state), *arrays)
