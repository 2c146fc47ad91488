"""The one training step: ``train_step(state, frozen, batch) -> (state, metrics)``."""

import copy
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import PyTree

from fact_jax.ops.precision import cast_parameters, matmul_precision
from fact_jax.ops.remat import CPU_OPTIONS
from fact_jax.plan.jaxpr_costs import count_flops, model_flops, trace
from fact_jax.sharding import (
    BATCH_AXES,
    FSDP_RULES,
    REPLICATED_RULES,
    batch_sharding,
    batch_ways,
    replicated,
    shardings,
    zero1_shardings,
)
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.state import (
    TrainState,
    all_finite,
    learning_rate,
    state_shardings,
    update_ema,
)
from fact_train.engine.task import Task

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """UserError if the batch does not come out even over devices and microbatches."""
    ways, parts = batch_ways(mesh), config.accumulate
    if config.batch_size % ways:
        raise UserError(
            f"batch {config.batch_size} does not divide over data x fsdp = {ways}: "
            f"batch_size={-(-config.batch_size // ways) * ways} would"
        )
    if config.batch_size % (ways * parts):
        raise UserError(
            f"batch {config.batch_size} does not divide into accumulate = {parts} microbatches "
            f"over data x fsdp = {ways}: batch_size must be a multiple of {ways * parts}"
        )


def frozen_shardings(frozen: PyTree, config: TrainConfig, mesh: Mesh) -> PyTree:
    """Where the frozen parameters lie: whole everywhere, or split as ``mesh.base`` says."""
    return shardings(frozen, FSDP_RULES if config.mesh.base == "fsdp" else REPLICATED_RULES, mesh)


# So that sums of gradients cross GPUs while more gradients are computed. XLA has it by default on
# Hopper and Blackwell; on an A100 each sum was waited for. On TPUs nothing of the kind changed the
# compiled step, and 30 MB of gradients are summed at once by default.
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for a step on these devices, but for those that XLA_FLAGS names."""
    platform, set_by_user = mesh.devices.flat[0].platform, os.environ.get("XLA_FLAGS", "")
    options: dict[str, Any] = {}
    if platform == "cpu":
        options = CPU_OPTIONS
    elif platform == "gpu" and mesh.size > 1:
        options = GPU_OPTIONS
    return {k: v for k, v in options.items() if f"--{k}" not in set_by_user} or None


class TrainStep:
    """The step of a task on a mesh, compiled at its first call; the state given to it is donated.

    ``optimizer`` gives the direction (:func:`fact_train.engine.state.make_optimizer`), the step
    applies the learning rate. If the loss, a gradient or a new value is not finite, everything
    stays as it is. The loss is a mean over samples, of which each device has its share. UserError
    if the batch does not come out even.
    """

    def __init__(
        self, task: Task, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
    ):
        check_batch(config, mesh)
        self.task, self.optimizer, self.config, self.mesh = task, optimizer, config, mesh
        self._jitted: Any = None

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return self._compiled(state, frozen)(state, frozen, batch, self.key)

    def lower(self, state: TrainState, frozen: PyTree, batch: Batch) -> jax.stages.Lowered:
        """The program for arguments of these shapes; ShapeDtypeStructs will do.

        Compiled it takes the ``key`` too.
        """
        return self._compiled(state, frozen).lower(state, frozen, batch, self.key)

    def model_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        """Model FLOPs of one step on all devices: without what is recomputed to save memory.

        Arrays or ShapeDtypeStructs will do. ValueError if the step has a loop of no known length.
        """
        task, config = copy.copy(self.task), dataclasses.replace(self.config, remat="none")
        task.config = config
        plain = TrainStep(task, self.optimizer, config, self.mesh)
        return model_flops(plain.compute, state, frozen, batch)

    def executed_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        """FLOPs of one step on all devices as it is computed here, recomputation included.

        Arguments and errors as of :meth:`model_flops`.
        """
        platform = self.mesh.devices.flat[0].platform
        jaxpr = trace(self.compute, state, frozen, batch)
        return count_flops(jaxpr, "cuda" if platform == "gpu" else platform)

    def _compiled(self, state: TrainState, frozen: PyTree) -> Any:
        if self._jitted is None:
            placed = state_shardings(state, self.mesh)
            given = (placed, frozen_shardings(frozen, self.config, self.mesh))
            self._jitted = jax.jit(
                self.compute,
                donate_argnums=0,
                in_shardings=(*given, batch_sharding(self.mesh), replicated(self.mesh)),
                out_shardings=(placed, replicated(self.mesh)),
                compiler_options=compiler_options(self.mesh),
            )
        return self._jitted

    @functools.cached_property
    def key(self) -> np.ndarray:
        """The seed as data, the program's last argument: as a constant, each seed would be one."""
        with jax.ensure_compile_time_eval():  # a plan lowers under abstract arrays
            return np.asarray(jax.random.key_data(jax.random.key(self.config.seed)))

    def compute(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: ArrayLike | None = None
    ) -> tuple[TrainState, Metrics]:
        """What the compiled program computes; ``key`` is the seed's, as data (None: a constant)."""
        config = self.config
        seed = jax.random.key(config.seed) if key is None else jax.random.wrap_key_data(key)
        key = jax.random.fold_in(seed, state.step)
        keys = jax.random.split(key, config.batch_size)
        # Parameters that are split over `fsdp` are gathered once, here: not again in the forward
        # pass, its recomputation and the backward pass.
        working = jax.lax.with_sharding_constraint(
            cast_parameters(state.params, config.precision),
            shardings(state.params, REPLICATED_RULES, self.mesh),
        )
        frozen = cast_parameters(frozen, config.precision)
        # Attention kernels are split over the mesh too, and look for it.
        with (
            jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh),
            matmul_precision(config.precision),
        ):
            gradient, loss, metrics = self._gradient(working, frozen, batch, state.step, keys)
        aux = metrics.pop("aux", None)
        norm = optax.global_norm(gradient)
        rate = learning_rate(config.optimizer, config.steps, state.step)

        def update(gradient: PyTree) -> tuple[PyTree, PyTree]:
            updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            if hasattr(self.task, "state_update"):
                params = self.task.state_update(params, aux)
            return params, opt_state

        # The norm is finite only if the square of every gradient is, and with them the moments; the
        # average lies between its old value and the parameters. Both run over all devices, so that
        # all of them decide alike.
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & all_finite(update(gradient)[0])
        # New parameters are computed twice: kept until all of them are known to be finite, they
        # would take as much memory as the gradient. And XLA would decide again for each leaf, a
        # program that grows with their square.
        gradient, good = jax.lax.optimization_barrier((gradient, good))
        params, opt_state = update(gradient)
        ema = update_ema(config.ema, state.ema, params, state.step)
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

    def _gradient(
        self, working: PyTree, frozen: PyTree, batch: Batch, step: jax.Array, keys: jax.Array
    ) -> tuple[PyTree, jax.Array, dict[str, Any]]:
        """(float32 gradient, loss, metrics) of the batch.

        Each device takes the gradient of the mean over its own samples; what crosses devices is
        their sum, once a step and in float32. Left to itself the compiler sums what the products
        with the activations give, in the precision of the computation and in every microbatch.
        """
        axes = self._manual_axes()

        def on_device(working, frozen, batch, step, keys):
            found = self._local_gradient(working, frozen, batch, step, keys)
            return jax.tree.map(lambda leaf: _device_mean(leaf, axes), found)

        if axes:
            on_device = jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(P(), P(), P(axes), P(), P(axes)),
                out_specs=P(),
                axis_names=set(axes),
                check_vma=False,
            )
        gradient, loss, metrics = on_device(working, frozen, batch, step, keys)
        # Each device needs only the part of the gradient whose update it computes.
        placed = zero1_shardings(working, shardings(working, FSDP_RULES, self.mesh))
        return jax.lax.with_sharding_constraint(gradient, placed), loss, metrics

    def _manual_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the gradient is summed by hand.

        None for a task with batch normalisation, whose statistics are those of the whole batch;
        none where ``fsdp`` splits the frozen base, which the compiler gathers block by block: it
        then sums the gradients too, in the precision of the computation.
        """
        by_compiler = hasattr(self.task, "state_update") or self.config.mesh.base == "fsdp"
        return () if by_compiler else BATCH_AXES

    def _local_gradient(
        self, working: PyTree, frozen: PyTree, batch: Batch, step: jax.Array, keys: jax.Array
    ) -> tuple[PyTree, jax.Array, dict[str, Any]]:
        """The same of a device's samples, in microbatches if so configured."""

        def loss_of(params, batch, keys):
            loss, metrics = self.task.loss(params, frozen, batch, step=step, keys=keys)
            return loss.astype(jnp.float32), dict(metrics)

        def one(batch, keys):
            (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                working, batch, keys
            )
            return cast_parameters(gradient, "float32"), loss, metrics

        parts = self.config.accumulate
        if parts == 1:
            return one(batch, keys)

        def add(total, microbatch):
            gradient, loss, metrics = one(*microbatch)
            return jax.tree.map(jnp.add, total, gradient), (loss, metrics)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), working)
        microbatches = jax.tree.map(lambda leaf: self._split(leaf, parts), (batch, keys))
        total, (losses, metrics) = jax.lax.scan(add, zeros, microbatches)
        gradient = jax.tree.map(lambda leaf: leaf / parts, total)
        return gradient, losses.mean(), jax.tree.map(_mean, metrics)

    def _split(self, leaf: jax.Array, parts: int) -> jax.Array:
        """(b, ...) to (parts, b / parts, ...), each device keeping the rows that it has."""
        leaf = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
        if self._manual_axes():
            return leaf
        return jax.lax.with_sharding_constraint(leaf, P(None, BATCH_AXES))


def _device_mean(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Over devices; what is counted in whole numbers is the same on each."""
    return jax.lax.pmean(leaf, axes) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _mean(values: jax.Array) -> jax.Array:
    """Over microbatches; what is counted in whole numbers is the same in each."""
    return values.mean(0) if jnp.issubdtype(values.dtype, jnp.floating) else values[0]
