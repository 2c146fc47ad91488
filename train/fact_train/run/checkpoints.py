"""Checkpoints of a run: saved in the background, verified when read."""

import dataclasses
import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from fact_jax.sharding import shard
from fact_jax.utils.errors import UserError, first_line
from fact_jax.utils.files import atomic_write
from fact_train.config import CheckpointConfig
from fact_train.engine.checksums import checksums
from fact_train.engine.state import TrainState
from fact_train.multihost.collectives import process_all, process_broadcast
from fact_train.run.provenance import revision, versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """Metadata of a checkpoint: what its run was configured as, and trained on.

    ``frozen`` is the content hash of what is not trained and not saved, ``data`` the fingerprint of
    the training data (None where the source has none); the position in it is the step.
    ``steps_before`` counts the steps of the run whose weights this one started from.
    """

    config: dict[str, Any]
    frozen: str
    data: str | None
    steps_before: int = 0


class Checkpoints:
    """The ``checkpoints`` folder of one run. Use as a context manager.

    Every process of a run calls the same methods in the same order. The folder is one that all
    hosts share, and each process writes its part of a checkpoint; or, if ``gathered``, process 0
    alone has it, and the states go through its memory.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: CheckpointConfig,
        about: CheckpointMetadata,
        gathered: bool = False,
    ):
        _hush_orbax()
        self.folder = (run / "checkpoints").resolve()
        self._ratings = self.folder.with_name("scores.json")
        self._aside = self.folder.with_name("checkpoints-unreadable")
        self._about = about
        self._saving: int | None = None
        self._keep = CheckpointRetention(latest=keep.keep, every=keep.keep_every, best=keep.best)
        self._gathered = gathered and jax.process_count() > 1
        self._manager = None
        if self._gathered and jax.process_index() != 0:
            return
        alone = {}
        if self._gathered:
            processes = ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix="process-0"
            )
            alone = {"multiprocessing_options": processes, "create": False}
            self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                step_format_fixed_length=8,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                **alone,
            ),
        )
        rated = self._read_ratings()
        for step in self._manager.all_steps():
            self._keep.score(step, rated.get(str(step), self._meta_or_nothing(step).get("score")))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait until everything is on disk. An error that is already on its way goes first."""
        if self._manager is None:
            return
        try:
            self.wait()
            with self._one_line():
                self._manager.close()
        except UserError:
            if kind is None:
                raise

    def wait(self) -> None:
        """Wait until what is being written is on disk; UserError if it cannot be."""
        if self._manager is not None:
            with self._one_line():
                self._manager.wait_until_finished()

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Start writing a checkpoint; returns once the state has been copied.

        Of two checkpoints the one with the higher ``score`` is better. UserError if there is no
        room for it, or if the one before could not be written.
        """
        step = int(state.step)
        self._check_space(step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        meta = dataclasses.asdict(self._about) | {
            "versions": versions(),
            "revision": revision(),
            "processes": jax.process_count(),
            "score": score,
            "checksums": checksums(state),
        }
        self._keep.score(step, score)
        if self._gathered:
            state = jax.tree.map(_gather_to_first, state)
        if self._manager is None:
            return
        with self._one_line():
            items = {
                "state": ocp.args.StandardSave(state._asdict()),
                "meta": ocp.args.JsonSave(meta),
            }
            # Waits for the one before, whose failure comes out here if it was not seen yet.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saving = step

    def rate(self, step: int, score: float | None) -> None:
        """Say how good a saved checkpoint is, when that is known only afterwards."""
        self._keep.score(step, score)
        if score is None or jax.process_index() != 0:
            return
        rated = self._read_ratings() | {str(step): score}
        there = {str(step) for step in self.steps()}
        with atomic_write(self._ratings) as temporary:
            temporary.write_text(json.dumps({s: v for s, v in rated.items() if s in there}))

    def _read_ratings(self) -> dict[str, float]:
        try:
            found = json.loads(self._ratings.read_text())
            return {step: float(score) for step, score in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # then the best are those that are found from here on

    def failure(self) -> UserError | None:
        """Why the checkpoint that is being written in the background cannot be."""
        try:
            with self._one_line():
                if self._manager is not None:
                    self._manager.check_for_errors()
        except UserError as error:
            return error
        return None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        return sorted(self._manager.all_steps()) if self._manager is not None else []

    def restore(self, template: TrainState, warn: Callable[[str], None]) -> TrainState | None:
        """The newest state that can be read and is what was written, or None in a fresh run.

        It comes with the shardings of ``template``, whatever mesh and processes wrote it.
        Unreadable ones that are newer are moved aside, each with a line to ``warn``. UserError if
        the run was trained on another base, or if none can be read.
        """
        unreadable, steps = [], self.steps()
        if self._gathered:
            steps = json.loads(process_broadcast(json.dumps(steps).encode()))
        for step in reversed(steps):
            found, reason = self._read(step, template)
            if found is None:
                warn(f"warning: checkpoint {step} cannot be read ({reason}); trying the one before")
                unreadable.append(step)
                continue
            state, meta = found
            self._move_aside(unreadable)
            changed = [name for name, v in versions().items() if meta["versions"].get(name) != v]
            same_batch = meta["config"]["batch_size"] == self._about.config["batch_size"]
            if same_batch and meta.get("data") != self._about.data:
                changed.append("the training data")
            if changed:
                warn(f"warning: {', '.join(changed)} changed since: bits may differ from here on")
            return state
        if unreadable:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read; "
                "move that folder away to start from the beginning"
            )
        return None

    def _read(
        self, step: int, template: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """(state and meta, "") or (None, why not), the same on every process."""
        folder = self.folder / f"{step:08d}"
        state, reason = None, "another process could not"
        try:
            meta = json.loads(self._read_meta(folder / "meta" / "metadata"))
            written = dict(meta["checksums"])
            _ = dict(meta["versions"]), meta["config"]["batch_size"]
        except Exception as error:
            reason = first_line(error, 200)
        else:
            self._check_base(step, meta)
            stored = _stored_like(template, written)
            try:
                if self._manager is None:
                    state = stored
                else:
                    state = _restore(folder / "state", stored, to_host=self._gathered)
            except Exception as error:  # Orbax's errors for a damaged folder have no common type
                reason = first_line(error, 200)
        if not process_all(state is not None) or state is None:
            return None, reason
        if self._gathered:
            state = jax.tree.map(_broadcast_from_first, state, stored)
        found = checksums(state)
        for name in sorted(written.keys() | found.keys()):
            if written.get(name) != found.get(name):
                return None, f"{name} is not what was written"
        if int(state.step) != step:
            return None, f"it is of step {int(state.step)}"
        return (_with_ema_of(template, state), meta), ""

    def _read_meta(self, path: Path) -> bytes:
        if not self._gathered:
            return path.read_bytes()
        data = b""
        with suppress(OSError):  # the others must not wait in vain
            data = path.read_bytes()
        return process_broadcast(data)

    def _check_base(self, step: int, meta: dict[str, Any]) -> None:
        base = meta.get("frozen", self._about.frozen)
        if base != self._about.frozen:
            raise UserError(
                f"checkpoint {step} in {self.folder} was trained on another frozen base "
                f"(content {base[:12]}, here {self._about.frozen[:12]}): "
                "give the same base files to resume it, or another --out"
            )

    def _meta_or_nothing(self, step: int) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / f"{step:08d}/meta/metadata").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _check_space(self, step: int, needed: int) -> None:
        # Checked before, not found out after: with half a checkpoint on it the disk is full.
        free = shutil.disk_usage(self.folder).free if self._manager is not None else needed
        if not process_all(free >= needed):
            raise UserError(
                f"no room for the checkpoint of step {step}: it needs {needed / 1e9:.3g} GB, the "
                f"disk of {self.folder} has {free / 1e9:.3g} GB left; free some or lower "
                "checkpoint.keep, then start again to go on from the one before"
            )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # from the saving thread, of any type
            raise UserError(
                f"the checkpoint of step {self._saving} could not be written in {self.folder} "
                f"({first_line(error, 200)}); the ones before it are whole"
            ) from error

    def _move_aside(self, steps: list[int]) -> None:
        # Their names must be free again when the run comes to these steps a second time.
        for step in steps if jax.process_index() == 0 else []:
            source = self.folder / f"{step:08d}"
            target = self._aside / source.name
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
        if steps:
            process_all(True)
            if self._manager is not None:
                self._manager.reload()


class CheckpointRetention:
    """Orbax's preservation policy: the newest, those of every so many steps, and the best.

    Scores are often known only after a checkpoint was saved, so that Orbax's own ``BestN`` over
    metrics saved with it would not do.
    """

    def __init__(self, *, latest: int, every: int = 0, best: int = 0):
        policies = [LatestN(latest), *([EveryNSteps(every)] if every else [])]
        self._any = AnyPreservationPolicy(policies)
        self._best = best
        self._scores: dict[int, float] = {}

    def score(self, step: int, value: float | None) -> None:
        """Remember how good a checkpoint is; without a score it is none of the best."""
        if value is not None:
            self._scores[step] = value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this of all checkpoints, ascending, the one being written included."""
        scored = [info.step for info in checkpoints if info.step in self._scores]
        scored.sort(key=lambda step: (self._scores[step], step), reverse=True)
        others = self._any.should_preserve(checkpoints, context=context)
        return [
            kept or info.step in scored[: self._best]
            for kept, info in zip(others, checkpoints, strict=True)
        ]


def _stored_like(template: TrainState, names: Iterable[str]) -> TrainState:
    """``template`` with a running average if, and only if, the checkpoint has one."""
    if not any(name.startswith("ema/") for name in names):
        return template._replace(ema=None)
    return template if template.ema is not None else template._replace(ema=template.params)


def _with_ema_of(template: TrainState, state: TrainState) -> TrainState:
    """A running average that is switched on on the way starts from the weights."""
    if template.ema is None:
        return state._replace(ema=None)
    if state.ema is not None:
        return state
    placed = jax.tree.map(lambda leaf: leaf.sharding, template.ema)
    copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=placed)
    return state._replace(ema=copy(state.params))


def _restore(folder: Path, template: TrainState, to_host: bool) -> TrainState:
    # The manager's own way waits for all processes, for ever if one of them finds a damage.
    def abstract(leaf: jax.Array) -> Any:
        if to_host:
            return np.empty(leaf.shape, leaf.dtype)
        return ocp.utils.to_shape_dtype_struct(leaf)

    wanted = jax.tree.map(abstract, template._asdict())
    handler = ocp.StandardCheckpointHandler()
    try:
        return TrainState(**handler.restore(folder, args=ocp.args.StandardRestore(wanted)))
    finally:
        handler.close()


def _gather_to_first(leaf: jax.Array) -> np.ndarray | None:
    """The whole array in the memory of process 0; None on the others. All must ask."""
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    # A copy: what it shows is the buffer of an array that the next step may take over.
    return np.array(whole) if jax.process_index() == 0 else None


def _broadcast_from_first(leaf: np.ndarray | jax.Array, like: jax.Array) -> jax.Array:
    """The array that process 0 has, placed as ``like``. All must ask."""
    data = np.asarray(leaf).tobytes() if jax.process_index() == 0 else b""
    whole = np.frombuffer(process_broadcast(data), like.dtype).reshape(like.shape)
    return shard(whole, like.sharding)


@functools.cache
def _hush_orbax() -> None:
    """Keep quiet about what follows from a failure that we tell in one line ourselves.

    After one leaf has failed, Orbax closes its event loop: TensorStore's threads find it closed
    (each prints a traceback through ``sys.unraisablehook``), and nobody asks for the errors of the
    other leaves (which asyncio logs).
    """
    former = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            former(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
