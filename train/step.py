"""The one training step: ``train_step(state, frozen, batch) -> (state, metrics)``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import TrainConfig
from train.state import TrainState, learning_rate, update_ema
from train.task import Task

PyTree = Any
Step = Callable[[TrainState, PyTree, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Step:
    """Compile the step of a task; the state given to it is donated.

    ``optimizer`` gives the direction (:func:`train.state.make_optimizer`), the step applies the
    learning rate. If the loss or a gradient is not finite the weights stay as they are.
    """
    state_update = getattr(task, "state_update", None)

    def loss_of(params, frozen, batch, step, keys):
        params, frozen = (cast(tree, config.precision) for tree in (params, frozen))
        loss, metrics = task.loss(params, frozen, batch, step=step, keys=keys)
        return loss.astype(jnp.float32), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: PyTree, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys = jax.random.split(key, config.batch_size)
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, frozen, batch, state.step, keys
        )
        metrics = dict(metrics)
        aux = metrics.pop("aux", None)
        norm = optax.global_norm(gradient)
        rate = learning_rate(config.optimizer, config.steps, state.step)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        if state_update is not None:
            params = state_update(params, aux)
        ema = update_ema(config.ema, state.ema, params, state.step)
        # A norm is finite only if every gradient is.
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        moved, kept = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), moved, kept)
        bad = (~good).astype(jnp.int32)
        state = TrainState(
            params=params,
            ema=ema,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        metrics |= {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics

    return train_step


def cast(tree: PyTree, precision: str) -> PyTree:
    """Floating leaves in the precision of the computation."""
    dtype = jnp.dtype(precision)

    def one(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
