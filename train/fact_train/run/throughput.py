"""Throughput, time waiting for data and MFU between two rows of the log; profiler traces."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from fact_jax.plan.chips import chip_of

T = TypeVar("T")


class ThroughputMeter:
    """Counts steps, the time they take, and the part of it spent waiting for data."""

    def __init__(self, batch_size: int):
        chip, devices = chip_of(jax.devices()[0].device_kind), jax.device_count()
        self._chips = devices / (chip.devices if chip else 1)
        # None for a chip that is not in the table: a share of it would have to be invented.
        self.peak = chip.peak * self._chips if chip else None
        self._flops: tuple[float | None, float | None] = (None, None)
        self._batch_size = batch_size
        self._restart()

    def begin(self, model_flops: float | None, executed_flops: float | None) -> None:
        """Count from here. FLOPs are those of one step on all chips together, None if unknown."""
        self._flops = model_flops, executed_flops
        self._restart()

    def _restart(self) -> None:
        self._began, self._steps, self._waited, self._paused = time.monotonic(), 0, 0.0, 0.0

    def step(self) -> None:
        """Count one step."""
        self._steps += 1

    def waits(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time until each is there counts as waiting for data."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in here is no training and does not count."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def row(self) -> dict[str, float]:
        """The speeds since the last row.

        On known chips also ``step_seconds`` beside ``arithmetic_seconds``, what a step would take
        with all of its FLOPs at peak; and ``mfu`` (model FLOPs utilisation), the model's own FLOPs
        over the step's time and the peak. Both are as ``fact-train plan`` has them.
        """
        spent = max(time.monotonic() - self._began - self._paused, 1e-9)
        per_second = self._steps / spent
        values = {
            "steps_per_second": per_second,
            "speed/samples_per_second_per_chip": per_second * self._batch_size / self._chips,
            "speed/data_wait": self._waited / spent,
        }
        model, executed = self._flops
        if self.peak and model and executed:
            values["speed/mfu"] = per_second * model / self.peak
            values["speed/step_seconds"] = spent / max(self._steps, 1)
            values["speed/arithmetic_seconds"] = executed / self.peak
        self._restart()
        return values


class ProfilerTrace:
    """A profiler trace of the steps from the first to the last one; (0, 0) asks for none."""

    def __init__(self, folder: Path, steps: tuple[int, int]):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        """Call before a step is started."""
        if step == self._steps[0] and jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any, *, last: bool) -> bool:
        """Call after a step was started; True if its trace was written now."""
        if not self._on or not (last or step == self._steps[1]):
            return False
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        self._on = False
        return True
