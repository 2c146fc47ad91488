"""One loop for every task: prepare, resume, step, log, save, stop when asked."""

import collections
import contextlib
import dataclasses
import datetime
import json
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fact_jax.errors import UserError
from fact_jax.files import atomic_write
from train.checkpoints import Checkpoints, versions
from train.config import TrainConfig, to_json
from train.runlog import RunLog, average
from train.state import TrainState, make_optimizer, make_state
from train.step import make_train_step
from train.task import PyTree, Task
from train.tasks import make_task

MAX_SKIPPED_IN_A_ROW = 10
MAY_CHANGE = ("steps", "log.", "checkpoint.")
# fold_in numbers that no step ever reaches.
INIT_KEY, SAMPLE_KEY = 2**32 - 1, 2**32 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to; ``stopped_by`` is the signal that ended it early."""

    state: TrainState
    frozen: PyTree
    stopped_by: int | None


def run(config: TrainConfig, folder: Path, command: str = "") -> Outcome:
    """Train, or go on with what ``folder`` holds of this very run."""
    claim_folder(config, folder)
    task, root = make_task(config), jax.random.key(config.seed)
    optimizer = make_optimizer(config.optimizer)
    params, frozen = task.init(jax.random.fold_in(root, INIT_KEY))
    frozen = jax.tree.map(jax.numpy.asarray, frozen)
    state = make_state(params, optimizer, config.ema)
    del params
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, config=to_json(config))
    warnings: list[str] = []
    state = checkpoints.restore(state, warnings.append) or state
    start = int(state.step)
    with RunLog(folder, start=start, steps=config.steps) as log, _Signals() as signals:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        log.note(f"{now}  {command or 'train.loop.run'}")
        for line in warnings:
            log.say(line)
        log.say(
            f"{folder}: {_sizes(state, frozen)}, {'resuming at' if start else 'from'} step {start}"
        )
        loop = _Loop(config, folder, task, frozen, checkpoints, log)
        try:
            loop.repair_export(state)
            state = loop.train(make_train_step(task, optimizer, config), state, signals)
        finally:
            checkpoints.close()
        stopped = signals.caught if int(state.step) < config.steps else None
        log.say(f"{'stopped' if stopped else 'done'} at step {int(state.step)}, saved in {folder}")
    return Outcome(state=state, frozen=frozen, stopped_by=stopped)


class _Loop:
    """What stays the same from step to step."""

    def __init__(self, config, folder, task, frozen, checkpoints, log):
        self.config: TrainConfig = config
        self.folder: Path = folder
        self.task: Task = task
        self.frozen: PyTree = frozen
        self.checkpoints: Checkpoints = checkpoints
        self.log: RunLog = log
        self.key = jax.random.fold_in(jax.random.key(config.seed), SAMPLE_KEY)

    def train(self, train_step, state: TrainState, signals: "_Signals") -> TrainState:
        """Step until the end or a signal; the number of a step alone decides what is due."""
        config, rows = self.config, []
        in_flight: collections.deque = collections.deque()
        start = int(state.step)
        rows_here = np.arange(config.batch_size)
        batches = self.task.source().batches(start, rows_here)
        with prefetch(batches, start, config.steps) as ready:
            for step, batch in ready:
                state, metrics = train_step(state, self.frozen, batch)
                rows.append(metrics)
                in_flight.append(metrics["skipped_in_a_row"])
                # Reading a value from two steps ago keeps the queue short and the device busy.
                if len(in_flight) > 2:
                    self._check(step - 2, int(in_flight.popleft()))
                self.log.advance()
                last = step == config.steps or signals.caught is not None
                if step == 1 or last or step % config.log.every == 0:
                    self.log.metrics(step, average(jax.device_get(rows)))
                    rows.clear()
                if last or step % config.checkpoint.every == 0:
                    self.save(state)
                if step == config.steps or _due(step, config.log.samples_every):
                    weights = _weights(state)
                    self.log.pictures(step, self.task.samples(weights, self.frozen, self.key))
                if last:
                    break
        return state

    def save(self, state: TrainState) -> None:
        """A checkpoint, and beside it the files that inference opens."""
        self.checkpoints.save(state)
        self.export(state)

    def export(self, state: TrainState) -> None:
        """Write ``export`` whole or not at all."""
        step = int(state.step)
        with replace_folder(self.folder / "export") as folder:
            self.task.export(_weights(state), self.frozen, folder, step)
            about = {"step": step, "config": to_json(self.config), "versions": versions()}
            (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")

    def repair_export(self, state: TrainState) -> None:
        """Bring ``export`` to the restored step, in case the run was killed between the two."""
        about = self.folder / "export" / "training.json"
        step = int(state.step)
        if step and not (about.exists() and json.loads(about.read_text())["step"] == step):
            self.export(state)

    def _check(self, step: int, in_a_row: int) -> None:
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"loss or gradient was not finite {in_a_row} times in a row, up to step {step}; "
                f"the checkpoints in {self.folder} are good: lower optimizer.learning_rate"
            )


def claim_folder(config: TrainConfig, folder: Path) -> None:
    """Make the folder this run's own; UserError if it was trained with another configuration."""
    path = folder / "config.json"
    new = to_json(config)
    if path.exists() and any(folder.glob("checkpoints/*")):
        old = json.loads(path.read_text())
        differing = [
            f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, ...) != new.get(key, ...) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            raise UserError(
                f"{folder} holds a run with another configuration ({'; '.join(differing)}); "
                "give the same values to resume it, or another --out"
            )
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(new, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror}; choose another --out"
        ) from error


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``target`` when everything in it is written."""
    fresh, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    if old.exists() and not target.exists():  # killed between the two renames
        old.rename(target)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for path in fresh.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def prefetch(
    batches: Iterator[dict[str, np.ndarray]], start: int, stop: int, depth: int = 2
) -> Iterator[Iterator]:
    """(step, its batch on the device) for start < step <= stop, made by a thread."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    closing = threading.Event()

    def put(item: Any) -> None:
        while not closing.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for step in range(start, stop):
                if closing.is_set():
                    return
                put((step + 1, jax.device_put(next(batches))))
            put(None)
        except BaseException as error:
            put(error)

    def consume() -> Iterator[tuple[int, dict[str, jax.Array]]]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        closing.set()
        thread.join()


class _Signals:
    """Remember SIGTERM or Ctrl-C until the step is over; a second one acts at once."""

    def __init__(self):
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: object) -> None:
        self.caught = number
        print("stopping: saving a checkpoint (once more to stop at once)", file=sys.stderr)
        signal.signal(number, self._before[number])


def _weights(state: TrainState) -> PyTree:
    return state.params if state.ema is None else state.ema


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _sizes(state: TrainState, frozen: PyTree) -> str:
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen)]
    return f"{count[0]:,} parameters trained, {count[1]:,} frozen, on {jax.default_backend()}"
