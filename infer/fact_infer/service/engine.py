"""Models opened once, a bounded queue before them, and one thread that draws."""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fact_infer.pipeline import Pipeline
from fact_infer.service.jobs import FINISHED, CancelledError, Job
from fact_infer.service.merging import Merger
from fact_infer.service.metrics import Metrics
from fact_infer.service.work import Work
from fact_jax.utils.errors import UserError

_SWEEP = 1.0
_FIRST_GUESS = 5.0
"""Seconds: between looks for what has expired, and what a job takes before one was timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how long its results stay.

    ``queue`` counts the requests that are not finished, the one that is drawn among them. ``body``
    is in bytes, ``pixels`` those of all pictures of a request, ``seconds`` the time that one may
    be drawn, ``body_seconds`` the time in which it must have arrived, ``keep`` how many seconds a
    result stays, ``kept`` of how many requests. ``merge``: requests that are drawn in one batch.
    """

    queue: int = 8
    body: int = 32 << 20
    pixels: int = 8 << 20
    input_pixels: int = 50_000_000
    steps: int = 200
    pictures: int = 16
    seconds: float = 600.0
    body_seconds: float = 20.0
    keep: float = 600.0
    kept: int = 256
    merge: int = 1


class BusyError(Exception):
    """The queue is full; ``retry_after`` seconds later it may not be."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full: try again in about {retry_after} s")
        self.retry_after = retry_after


class DrainingError(Exception):
    """The service is about to end and takes nothing new."""


class Engine:
    """Jobs and the thread that draws them, first come, first served.

    ``load`` is called by that thread, which alone touches the pipeline. All methods may be called
    by any thread. Close it, or use it as a context.
    """

    def __init__(
        self, load: Callable[[], Pipeline], limits: Limits, metrics: Metrics | None = None
    ):
        self.limits, self.metrics = limits, metrics or Metrics()
        self.root = Path(tempfile.mkdtemp(prefix="fact-infer-"))
        self.failed: BaseException | None = None
        self.ready = self.draining = False
        self._load, self._merger = load, Merger(limits.merge)
        self._jobs: dict[str, Job] = {}
        self._queue: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._mean = _FIRST_GUESS
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at the next step, and remove every file."""
        with self._changed:
            self._closed = self.draining = True
            for job in self._jobs.values():
                job.cancel_asked = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self.root, ignore_errors=True)

    def reserve(self, kind: str, preview: bool = False) -> Job:
        """A place in the queue for a request that is still being read.

        Raises BusyError where there is none, DrainingError near the end.
        """
        with self._changed:
            self._sweep()
            if self.draining:
                raise DrainingError
            unfinished = [job for job in self._jobs.values() if job.state not in FINISHED]
            if len(unfinished) >= self.limits.queue:
                self.metrics.refused.inc()
                raise BusyError(max(1, round(self._mean)))
            job = Job(kind, self.root, self.limits.seconds, preview)
            self._jobs[job.id] = job
            return job

    def enqueue(self, job: Job, work: Work) -> None:
        """Queue a job whose work is ready. Raises DrainingError near the end."""
        with self._changed:
            if self.draining:
                self._end(job, "refused", "the service is about to end")
                raise DrainingError
            if job.cancel_asked:
                return self._end(job, "cancelled")
            job.work, job.progress.total, job.state = work, work.steps, "queued"
            self._queue.append(job)
            self._changed.notify_all()

    def drop(self, job: Job) -> None:
        """Forget a job whose request could not be used."""
        with self._changed:
            self._jobs.pop(job.id, None)
            self._changed.notify_all()
        shutil.rmtree(job.folder, ignore_errors=True)

    def find(self, number: str) -> Job | None:
        """The job of that id; None where there is none (any more)."""
        with self._changed:
            self._sweep()
            return self._jobs.get(number)

    def position(self, job: Job) -> int | None:
        """How many are before a job that waits; None for another."""
        with self._changed:
            return self._queue.index(job) if job in self._queue else None

    def snapshot(self, job: Job) -> dict[str, Any]:
        """What the API says of a job."""
        return job.snapshot(self.position(job))

    def cancel(self, job: Job) -> None:
        """A job that waits ends now, one that is drawn at its next step."""
        with self._changed:
            job.cancel_asked = True
            if job in self._queue:
                self._queue.remove(job)
                self._end(job, "cancelled")

    def wait(self, job: Job, seconds: float | None = None) -> bool:
        """Whether it has finished within that time."""
        with self._changed:
            return self._changed.wait_for(lambda: job.state in FINISHED, seconds)

    def drain(self, grace: float = 0.0) -> None:
        """Take nothing new, refuse what waits, finish what is drawn.

        Returns then, and ``grace`` seconds later at most if nobody has fetched its result.
        """
        with self._changed:
            self.draining = True
            running = [job for job in self._jobs.values() if job.state == "running"]
            for job in [*self._queue]:
                self._queue.remove(job)
                self._end(job, "refused", "the service is about to end")
            self._changed.wait_for(lambda: all(job.state in FINISHED for job in running))
        until = time.monotonic() + grace
        while time.monotonic() < until and not all(job.fetched for job in running):
            time.sleep(0.05)

    def counts(self) -> dict[str, int]:
        """How many jobs wait and are drawn."""
        with self._changed:
            states = [job.state for job in self._jobs.values()]
        return {state: states.count(state) for state in ("preparing", "queued", "running")}

    def _run(self) -> None:
        try:
            pipeline = self._load()
        except BaseException as error:
            self.failed = error
            return
        self.ready = True
        while (jobs := self._next()) is not None:
            if jobs:
                self._draw(pipeline, jobs)

    def _next(self) -> list[Job] | None:
        """What is drawn next, several where they may be merged; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, _SWEEP)
            self._sweep()
            if self._closed:
                return None
            if not self._queue:
                return []
            jobs = self._merger.choose(self._queue)
            for job in jobs:
                self._queue.remove(job)
                job.begin()
            return jobs

    def _draw(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        began = time.monotonic()
        if len(jobs) > 1:
            with self._settled(jobs):
                pictures = self._merger.draw(pipeline, jobs)
                for job, picture in zip(jobs, pictures, strict=True):
                    with self._settled([job]):
                        job.progress.check()
                        job.keep(picture)
                        self._end(job, "done")
        else:
            (job,) = jobs
            with self._settled([job]):
                assert job.work is not None  # it was queued with it
                job.progress.check()
                for picture in job.work.draw(pipeline, job.progress):  # type: ignore[arg-type]
                    job.keep(picture)
                self._end(job, "done")
        seconds = (time.monotonic() - began) / len(jobs)
        self._mean += 0.3 * (seconds - self._mean)

    @contextlib.contextmanager
    def _settled(self, jobs: list[Job]) -> Iterator[None]:
        """Inside, whatever goes wrong ends these jobs and nothing else."""
        try:
            yield
            return
        except CancelledError:
            state, line = "cancelled", None
        except UserError as error:
            state, line = "failed", str(error)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            state, line = "failed", f"it could not be drawn ({type(error).__name__})"
        for job in jobs:
            if job.state not in FINISHED:
                self._end(job, state, line)

    def _end(self, job: Job, state: Any, error: str | None = None) -> None:
        with self._changed:
            job.end(state, error)
            self.metrics.count(job)
            self._changed.notify_all()

    def _sweep(self) -> None:
        """Forget results that are too old, or too many."""
        finished = [job for job in self._jobs.values() if job.state in FINISHED]
        old = time.time() - self.limits.keep
        for number, job in enumerate(finished):
            if job.finished < old or len(finished) - number > self.limits.kept:
                del self._jobs[job.id]
                shutil.rmtree(job.folder, ignore_errors=True)
