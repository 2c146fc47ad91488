"""Train state, optimizer, learning rate schedule and exponential moving average."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from fact_jax.sharding import FSDP_RULES, shard, shardings, zero1_shardings
from fact_jax.utils.errors import UserError
from fact_train.config import EMAConfig, OptimizerConfig


class TrainState(NamedTuple):
    """Training state: what a step updates and a checkpoint holds."""

    params: PyTree
    ema: PyTree | None
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates left out because something was not finite
    skipped_in_a_row: Int[Array, ""]


def make_state(
    params: PyTree, optimizer: optax.GradientTransformation, ema: EMAConfig
) -> TrainState:
    """The state before the first step, with float32 copies of ``params`` (it is donated)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
            raise ValueError(f"trainable {path_name(path)} is {leaf.dtype}, masters are float32")
    params = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), params)
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema.decay else None,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of the state: parameters by rule, EMA and optimizer over all devices (ZeRO-1).

    The optimizer's trees end in the same paths as the parameters, and so follow their rules.
    """
    placed = shardings(state, FSDP_RULES, mesh)
    return placed._replace(
        ema=zero1_shardings(state.ema, placed.ema),
        opt_state=zero1_shardings(state.opt_state, placed.opt_state),
    )


def place_state(
    params: PyTree, optimizer: optax.GradientTransformation, ema: EMAConfig, mesh: Mesh
) -> TrainState:
    """:func:`make_state` on a mesh; no device ever holds more than its part of the rest."""
    make = functools.partial(make_state, optimizer=optimizer, ema=ema)
    placed = state_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=placed)(shard(params, placed.params))


def path_name(path: tuple[Any, ...]) -> str:
    """``a/b/c`` for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def learning_rate(config: OptimizerConfig, steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up that reaches the full rate at its last step, then the schedule down to 0."""
    warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    span = max(steps - config.warmup_steps, 1)
    progress = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
    shape = {
        "constant": jnp.ones_like(progress),
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    }[config.schedule]
    return jnp.asarray(config.learning_rate * warm * shape, jnp.float32)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipped AdamW up to the learning rate, which the step applies from its own counter."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed(config)),
        _scale_by_path(config.multipliers),
    )


def ema_decay(config: EMAConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """min(decay, (1 + t) / (10 + t)), or the decay itself without warm-up."""
    warm = (1.0 + step) / (10.0 + step) if config.warmup else 1.0
    return jnp.minimum(config.decay, warm)


def update_ema(config: EMAConfig, ema: PyTree, params: PyTree, step: Int[Array, ""]) -> PyTree:
    """ema + (1 - decay)(params - ema), or None where there is none."""
    if ema is None:
        return None
    rate = 1.0 - ema_decay(config, step)
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Is every element of every floating leaf finite?"""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves])


# Names of embeddings: Flax's, and those that the resampler and TransFace give theirs.
EMBEDDINGS = ("embedding", "latents", "pos_embed", "mask_token")


def _decayed(config: OptimizerConfig) -> Callable[[PyTree], PyTree]:
    """Which parameters decay: those with two dimensions or more, but for embeddings."""

    def decays(path: tuple[Any, ...], leaf: Array) -> bool:
        embedding = path_name(path).rpartition("/")[2] in EMBEDDINGS
        return leaf.ndim >= 2 and (config.decay_embeddings or not embedding)

    return functools.partial(jax.tree_util.tree_map_with_path, decays)


def _scale_by_path(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Scale the update of each leaf by the factor of the first regex found in its path."""

    def factor(path: tuple[Any, ...]) -> float:
        name = path_name(path)
        return next((f for pattern, f in multipliers if re.search(pattern, name)), 1.0)

    def init(params: PyTree) -> optax.EmptyState:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in multipliers:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(f"optimizer.multipliers: no trainable path matches {pattern!r}")
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path), updates)
        return scaled, state

    return optax.GradientTransformation(init, update)
