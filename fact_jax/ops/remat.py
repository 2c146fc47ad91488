"""Rematerialisation (gradient checkpointing) of blocks."""

from typing import Any, Literal

import jax
from flax import nnx

Remat = Literal["none", "dots", "block"]
"""What the backward pass recomputes: nothing; all but matrix products with weights; all of a block.

Large attention matrices are recomputed in any case."""

_POLICIES = {
    # Not the same as no checkpoint: it orders the blocks' backward passes. Without that order XLA
    # transposes the kernels of all convolutions at once, which takes 2 GB.
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}

CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Compiler options of ``jax.jit`` without which rematerialisation saves no memory on a CPU: there
XLA removes the optimisation barriers before it schedules, and recomputes early."""


def call_block(remat: Remat | None, module: nnx.Module, *arrays: Any, **static: Any) -> Any:
    """``module(*arrays, **static)`` under the checkpoint policy of ``remat`` (None: none)."""
    if remat is None:
        return module(*arrays, **static)
    # Taken apart and merged again inside: a module must not cross a trace level as it is.
    graph, state = nnx.split(module)

    def call(state, *arrays):
        return nnx.merge(graph, state)(*arrays, **static)

    again = jax.checkpoint(call, policy=_POLICIES[remat])
    return again(nnx.to_pure_dict(state), *arrays)
