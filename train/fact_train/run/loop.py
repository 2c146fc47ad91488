"""The training loop of every task: resume, step, log, save, export, stop when asked."""

import collections
import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from fact_jax.sharding import gathered, global_batch, local_copy, make_mesh, rows_of_process
from fact_jax.utils.errors import UserError, first_line
from fact_jax.utils.files import replace_folder, require_local
from fact_train.config import TrainConfig
from fact_train.engine.prefetch import prefetch
from fact_train.engine.state import TrainState
from fact_train.engine.step import Batch, Metrics, TrainStep, check_batch
from fact_train.engine.task import Source
from fact_train.multihost.collectives import process_all, process_gather, raise_on_all_processes
from fact_train.multihost.heartbeat import PeerMonitor
from fact_train.multihost.processes import check_alike, check_shared
from fact_train.overrides import to_json
from fact_train.run.checkpoints import CheckpointMetadata, Checkpoints
from fact_train.run.folder import (
    check_export,
    claim_folder,
    copy_others,
    describe_start,
    file_hashes,
    lock_folder,
    now,
)
from fact_train.run.logger import RunLogger, average, stage
from fact_train.run.prepare import PreparedRun, placement, prepare, sizes
from fact_train.run.provenance import revision, versions
from fact_train.run.remote import RemoteFolder, is_url
from fact_train.run.signal_handler import SignalHandler
from fact_train.run.throughput import ProfilerTrace, ThroughputMeter

MAX_SKIPPED = 10  # updates in a row
SAMPLE_KEY = 2**32 - 2  # a fold_in number that no step ever reaches


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run; ``stopped_by`` is the signal that ended it early."""

    state: TrainState
    frozen: PyTree
    stopped_by: int | None


def run(config: TrainConfig, out: str | Path, command: str = "") -> RunResult:
    """Train, or go on with what ``out``, a folder or a URL, holds of this very run.

    On several processes, each of them calls this. UserError if another run is using it.
    """
    remote = RemoteFolder(str(out)) if is_url(out) else None
    folder = Path(out) if remote is None else remote.folder
    require_local(folder)
    check_alike(config)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    with PeerMonitor(), contextlib.ExitStack() as held:
        if remote is None:
            check_shared(folder)
        with raise_on_all_processes():
            lock = lock_folder(folder) if remote is None else remote.connected()
            unlocked = held.enter_context(lock)
            changes = claim_folder(config, folder)
        url = None if remote is None else remote.url
        logger = RunLogger(folder, steps=config.steps, wandb=config.log.wandb, name=url)
        log = held.enter_context(logger)
        if remote is not None:
            remote.say = log.say
            log.say(f"working in {folder}, uploading to {remote.url}")
        log.note(f"{now()}  {command or 'fact_train.run.loop.run'}")
        for warning in unlocked:
            log.say(f"warning: {warning}")
        describe_start(folder, command)
        ready = prepare(config, mesh, log.say, str(out))
        return _train(config, folder, ready, mesh, changes, log, remote)


def _train(
    config: TrainConfig,
    folder: Path,
    ready: PreparedRun,
    mesh: Mesh,
    changes: list[str],
    log: RunLogger,
    remote: RemoteFolder | None,
) -> RunResult:
    """From the newest checkpoint, or from step 0, to the end or to a signal."""
    about = CheckpointMetadata(
        config=to_json(config),
        frozen=ready.content,
        data=getattr(ready.source, "fingerprint", None),
        steps_before=getattr(ready.task, "steps_before", 0),
    )
    with Checkpoints(
        folder, keep=config.checkpoint, about=about, gathered=remote is not None
    ) as checkpoints:
        state = checkpoints.restore(ready.state, log.say) or ready.state
        start = int(state.step)
        log.say(f"{sizes(state, ready.frozen)}, {'resuming at' if start else 'from'} step {start}")
        log.say(placement(mesh, config.precision))
        for change in changes:
            log.say(f"{change} from step {start} on")
        log.begin(start, about.config)
        loop = _Loop(config, folder, ready, checkpoints, log, remote)
        loop.repair_export(state)
        train_step = TrainStep(ready.task, ready.optimizer, config, mesh)
        with SignalHandler() as stopping:
            state = loop.train(train_step, ready.source, state, stopping)
            checkpoints.wait()  # a signal must not end what is being written
    process_all(True)  # nobody leaves while another still writes
    stopped = stopping.decided if int(state.step) < config.steps else None
    saved = f", saved in {folder}" if not int(state.skipped_in_a_row) else ""
    log.say(f"{'stopped' if stopped else 'done'} at step {int(state.step)}{saved}")
    return RunResult(state=state, frozen=ready.frozen, stopped_by=stopped)


class _Loop:
    """Training loop of one run: its steps, and what is due after each of them."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        ready: PreparedRun,
        checkpoints: Checkpoints,
        log: RunLogger,
        remote: RemoteFolder | None,
    ):
        self.config, self.folder, self.checkpoints = config, folder, checkpoints
        self.task, self.frozen, self.log, self.remote = ready.task, ready.frozen, log, remote
        self.key = jax.random.fold_in(jax.random.key(config.seed), SAMPLE_KEY)
        self.meter = ThroughputMeter(config.batch_size)
        self.rows: list[Metrics] = []
        self.losses: list[jax.Array] = []  # since the last checkpoint

    def train(
        self, train_step: TrainStep, source: Source, state: TrainState, stopping: SignalHandler
    ) -> TrainState:
        """Step until the end or a signal; the number of a step alone decides what is due."""
        config, start = self.config, int(state.step)
        in_flight: collections.deque[jax.Array] = collections.deque()
        profile = ProfilerTrace(self.folder / "profile", config.log.profile_steps)
        mesh = train_step.mesh
        rows = rows_of_process(mesh, config.batch_size)
        to_devices = functools.partial(global_batch, mesh, config.batch_size, rows)
        batches = source.batches(start, rows)
        programs: dict[tuple, jax.stages.Compiled] = {}  # one for each shape of photos
        with prefetch(batches, to_devices, start, config.steps) as ready:
            for step, batch in self.meter.waits(ready):
                shapes = tuple(array.shape for array in batch.values())
                if shapes not in programs:
                    programs[shapes] = self._compile(train_step, state, batch)
                profile.before(step)
                state, metrics = programs[shapes](state, self.frozen, batch, train_step.key)
                in_flight.append(metrics["skipped_in_a_row"])
                # Reading a value from two steps ago keeps the queue short and the device busy.
                if len(in_flight) > 2:
                    in_a_row = int(in_flight.popleft())
                    if in_a_row >= MAX_SKIPPED:
                        raise self._not_finite(step - 2, in_a_row)
                lost = self.remote.failure if self.remote is not None else None
                stop = stopping.decide(self.checkpoints.failure() or lost)
                if profile.after(step, metrics, last=stop or step == config.steps):
                    self.log.say(f"profiler trace up to step {step}: {self.folder / 'profile'}")
                self._record(step, state, metrics, stop)
                if stop:
                    break
        return state

    def _compile(
        self, train_step: TrainStep, state: TrainState, batch: Batch
    ) -> jax.stages.Compiled:
        with stage(self.log.say, "compiling the training step"):
            compiled = train_step.lower(state, self.frozen, batch).compile()
            model, executed = None, None
            if self.meter.peak:
                with contextlib.suppress(ValueError):  # a loop of unknown length
                    model = train_step.model_flops(state, self.frozen, batch)
                    executed = train_step.executed_flops(state, self.frozen, batch)
        self.meter.begin(model, executed)
        return compiled

    def _record(self, step: int, state: TrainState, metrics: Metrics, stop: bool) -> None:
        """Whatever is due after a step: a row of the log, a checkpoint, and only then pictures."""
        config = self.config
        self.rows.append(metrics)
        self.losses.append(metrics["loss"])
        self.meter.step()
        self.log.advance()
        last, every = stop or step == config.steps, config.log.samples_every
        watch = every is not None and (step == config.steps or (not stop and _due(step, every)))
        if step == 1 or last or watch or _due(step, config.log.every):
            self.log.metrics(step, average(jax.device_get(self.rows)) | self.meter.row())
            self.rows.clear()
        saved = False
        if last or _due(step, config.checkpoint.every):
            saved = self._save(step, state, int(metrics["skipped_in_a_row"]), stop)
        if watch:
            jax.block_until_ready(metrics)
            with self.meter.paused():
                seen = self._watch(step, state)
            if saved and self._watched:
                self.checkpoints.rate(step, seen.get(self._watched))

    def _watch(self, step: int, state: TrainState) -> dict[str, float]:
        """Keep the task's pictures; its numbers join the step's row. A failure is a warning."""
        numbers, pictures, failure = dict[str, float](), dict[str, np.ndarray](), ""
        copy = gathered if getattr(self.task, "samples_on_mesh", False) else local_copy
        weights, frozen = map(copy, self._weights(state))
        try:
            for name, value in self.task.samples(weights, frozen, self.key).items():
                if np.ndim(value):
                    pictures[name] = np.asarray(value)
                else:
                    numbers[name] = float(value)
            self.log.pictures(step, pictures)
            self.log.add(step, numbers)
        except Exception as error:  # of any type: nothing of the training depends on it
            failure = f"{type(error).__name__}: {first_line(error, 200)}"
        for process, reason in enumerate(process_gather(failure)):
            if reason:
                where = f" on process {process}" if jax.process_count() > 1 else ""
                self.log.say(
                    f"warning: no sample pictures of step {step}{where} ({reason}); "
                    "the training goes on"
                )
                return {}
        return numbers

    @property
    def _watched(self) -> str | None:
        """The number by which the best checkpoints are known; None if that is the loss."""
        return getattr(self.task, "score", None) if self.config.log.samples_every else None

    def _score(self) -> float | None:
        """How good a checkpoint is by its loss: the higher the better, None if that is unknown."""
        if self._watched:
            return None
        losses = np.asarray(jax.device_get(self.losses), np.float64)
        losses = losses[np.isfinite(losses)]
        return -float(losses.mean()) if len(losses) else None

    def _save(self, step: int, state: TrainState, in_a_row: int, stop: bool) -> bool:
        """A checkpoint, and beside it the files that inference opens; whether it was written.

        It is not while steps are skipped: the weights may be the reason.
        """
        if not in_a_row:
            self.checkpoints.save(state, self._score())
            self.export(state)
            self.losses.clear()
            return True
        if step == self.config.steps:
            raise self._not_finite(step, in_a_row)
        end = "; nothing was saved, the run goes on from the checkpoint before" if stop else ""
        self.log.say(
            f"no checkpoint at step {step}: the last {in_a_row} updates were skipped, "
            f"because something was not finite{end}"
        )
        return False

    def export(self, state: TrainState) -> None:
        """Write ``export`` whole or not at all; files of others in it stay."""
        step, (weights, frozen) = int(state.step), map(local_copy, self._weights(state))
        target = self.folder / "export"
        about = {"step": step, "config": to_json(self.config), "versions": versions()}
        about["revision"] = revision()
        with raise_on_all_processes():
            if jax.process_index() != 0:
                return
            try:
                with replace_folder(target) as folder:
                    self.task.export(weights, frozen, folder, step)
                    about["files"] = file_hashes(folder)
                    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")
                    copy_others(target, folder)
            except OSError as error:
                raise UserError(f"{target} of step {step}: {error.strerror or error}") from error

    def repair_export(self, state: TrainState) -> None:
        """Bring ``export`` to the restored step.

        It differs if the run was killed between the two, or if somebody else changed it.
        """
        if not (step := int(state.step)):
            return
        with raise_on_all_processes():
            why = check_export(self.folder / "export", step) if jax.process_index() == 0 else ""
        if not process_all(not why):
            self.log.say(f"export: {why}; written again from checkpoint {step}")
            self.export(state)

    def _weights(self, state: TrainState) -> tuple[PyTree, PyTree]:
        """The weights to look at, and the frozen ones."""
        return state.params if state.ema is None else state.ema, self.frozen

    def _not_finite(self, step: int, in_a_row: int) -> "DivergedError":
        saved, last_good = self.checkpoints.steps(), step - in_a_row
        advice = "start again with a lower optimizer.learning_rate"
        if saved:
            advice += f", which goes on from checkpoint {saved[-1]} of {self.folder}"
        if saved and saved[-1] == last_good:
            advice += (
                "; if that ends alike, its weights are the reason: move it away to go on from "
                f"{f'checkpoint {saved[-2]}' if len(saved) > 1 else 'the beginning'}"
            )
        return DivergedError(
            f"loss, gradient or new weights were not finite {in_a_row} times in a row, "
            f"up to step {step}; {advice}"
        )


class DivergedError(UserError):
    """Too many updates in a row were not finite."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
