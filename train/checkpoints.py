"""Checkpoints of a run: saved in the background, verified when read."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fact_jax.errors import UserError
from train.state import TrainState, path_name

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The ``checkpoints`` folder of one run."""

    def __init__(self, run: Path, *, keep: int, config: dict[str, Any]):
        self.folder = (run / "checkpoints").resolve()
        self._aside = self.folder.with_name("checkpoints-unreadable")
        self._config = config
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                step_format_fixed_length=8,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, state: TrainState) -> None:
        """Start writing a checkpoint; returns once the state has been copied."""
        meta = {"config": self._config, "versions": versions(), "checksums": checksums(state)}
        items = {
            "state": ocp.args.StandardSave(state._asdict()),
            "meta": ocp.args.JsonSave(meta),
        }
        self._manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)

    def restore(self, template: TrainState, warn: Callable[[str], None]) -> TrainState | None:
        """The newest state that can be read and is what was written, or None in a fresh run.

        Unreadable ones that are newer are moved aside, each with a line to ``warn``.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, meta = self._read(step, template)
            except Exception as error:  # what Orbax raises for a damaged folder has no common type
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                warn(f"warning: checkpoint {step} cannot be read ({reason}); trying the one before")
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            changed = [name for name, v in versions().items() if meta["versions"].get(name) != v]
            if changed:
                warn(f"warning: {', '.join(changed)} changed since: bits may differ from here on")
            return state
        if unreadable:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read; "
                "move that folder away to start from the beginning"
            )
        return None

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _read(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template._asdict())
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            ),
        )
        state = TrainState(**read["state"])
        written, found = read["meta"]["checksums"], checksums(state)
        for name in written.keys() | found.keys():
            if written.get(name) != found.get(name):
                raise ValueError(f"{name} is not what was written")
        return state, read["meta"]

    def _move_aside(self, steps: list[int]) -> None:
        # Their names must be free again when the run comes to these steps a second time.
        for step in steps:
            source = self.folder / f"{step:08d}"
            target = self._aside / source.name
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
        if steps:
            self._manager.reload()


def checksums(state: TrainState) -> dict[str, int]:
    """Leaf path -> a 32-bit sum of its bits, computed where the leaf lives.

    Orbax notices missing bytes but not changed ones. The weights are odd, so that any single
    changed word changes the sum.
    """
    return {
        path_name(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(int, jax.device_get(_sums(state)))
        )
    }


def versions() -> dict[str, str]:
    """What the run's bits depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return found | {"python": platform.python_version(), "backend": jax.default_backend()}


@jax.jit
def _sums(state: TrainState) -> TrainState:
    def one(leaf):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jax.tree.map(one, state)
