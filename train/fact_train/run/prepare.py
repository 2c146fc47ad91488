"""What a run starts with: task, frozen parameters, state and data, on the mesh."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fact_jax.ops.attention import attention_form
from fact_jax.ops.precision import Precision, cast_parameters, storage_dtype
from fact_jax.sharding import shard
from fact_train.config import TrainConfig
from fact_train.engine.checksums import content_hash
from fact_train.engine.state import TrainState, make_optimizer, place_state
from fact_train.engine.step import compiler_options, frozen_shardings
from fact_train.engine.task import Source, Task
from fact_train.multihost.collectives import raise_on_all_processes
from fact_train.multihost.processes import check_same
from fact_train.run.logger import stage
from fact_train.tasks import make_task

INIT_KEY = 2**32 - 1  # a fold_in number that no step ever reaches


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """What a run starts with; ``content`` is the hash of the frozen parameters as they were read.

    ``state`` is that of step 0.
    """

    task: Task
    frozen: PyTree
    content: str
    optimizer: optax.GradientTransformation
    state: TrainState
    source: Source


def prepare(config: TrainConfig, mesh: Mesh, say: Callable[[str], None], name: str) -> PreparedRun:
    """Load models and data, and put them where the mesh wants them. Writes nothing."""
    with stage(say, f"{name}: loading what the {config.task} task starts from"):
        with raise_on_all_processes():
            task, root = make_task(config), jax.random.key(config.seed)
            params, frozen = task.init(jax.random.fold_in(root, INIT_KEY))
        frozen = jax.tree.map(jax.numpy.asarray, frozen)
        content = content_hash(frozen)
        frozen = cast_parameters(frozen, config.precision)
        frozen = shard(frozen, frozen_shardings(frozen, config, mesh))
        if jax.process_count() > 1:
            # What a process holds a copy of is never compared again.
            digests = {"frozen base": content, "start of what is trained": content_hash(params)}
            check_same(digests, "give all hosts the same files and versions")
        optimizer = make_optimizer(config.optimizer)
        state = place_state(params, optimizer, config.ema, mesh)
        del params
    for note in getattr(task, "notes", ()):
        say(f"note: {note}")
    with stage(say, "preparing the training data"), raise_on_all_processes():
        source = task.source()
        if config.log.samples_every is not None and hasattr(task, "open_samples"):
            task.open_samples()
    data = getattr(source, "fingerprint", None)
    check_same({"training data": data}, "give all hosts the same records")
    return PreparedRun(
        task=task,
        frozen=frozen,
        content=content,
        optimizer=optimizer,
        state=state,
        source=source,
    )


def sizes(state: TrainState, frozen: PyTree) -> str:
    """How many parameters there are, and where, for a person."""
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen)]
    return f"{count[0]:,} parameters trained, {count[1]:,} frozen"


def placement(mesh: Mesh, precision: Precision) -> str:
    """Devices, how they share the work, how attention is computed there, and XLA's options."""
    options = compiler_options(mesh) or {}
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{mesh.size} x {mesh.devices.flat[0].device_kind} in {jax.process_count()} process(es), "
        f"mesh {axes}; {precision}, attention: {attention_form(storage_dtype(precision))}"
        + "".join(f"; {name}={value}" for name, value in options.items())
    )
