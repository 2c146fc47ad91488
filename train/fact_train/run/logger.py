"""Logging of a run: console, log.txt, metrics.jsonl, TensorBoard, sample pictures."""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary, image
from tqdm import tqdm

from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write


class RunLogger:
    """Log of one run, written by process 0. Use as a context manager.

    ``name`` tells Weights & Biases which run it is, by default the folder's path. Lines are logged
    from the start; ``begin`` opens the metrics when the step to go on from is known.
    """

    def __init__(self, run: Path, *, steps: int, wandb: bool = False, name: str | None = None):
        self._run, self._steps = run, steps
        self._name = name or str(run.resolve())
        self._is_main = jax.process_index() == 0
        self._open = contextlib.ExitStack()
        self._bar: tqdm | None = None
        self._records: Records | None = None
        library = load_wandb() if wandb else None  # every process would say that it is missing
        self._wandb = library if self._is_main else None
        if self._is_main:
            with self._writing():
                run.mkdir(parents=True, exist_ok=True)
                self._text = self._open.enter_context(open(run / "log.txt", "a"))  # noqa: SIM115

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close everything. An error that is already on its way goes first."""
        try:
            with self._writing():
                self._open.close()
        except UserError:
            if kind is None:
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """UserError for what the system refuses, which names no file where the file is open."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write in {self._run}: {error.strerror or error}; start again when that is "
                "mended, to go on from the newest checkpoint"
            ) from error

    def begin(self, start: int, config: dict[str, Any]) -> None:
        """Open the records of the steps after ``start``; what they said of those is forgotten."""
        if not self._is_main:
            return
        path = self._run / "metrics.jsonl"
        with self._writing():
            junk = drop_lines_past(path, start)
            self._records = Records(path, self._run / "tensorboard", start)
        self._open.callback(self._records.close)
        if junk:
            self.say(f"warning: {path} had {junk} line(s) that are no metrics; they are left out")
        if has_screen():
            self._bar = tqdm(initial=start, total=self._steps, unit="step")
            self._open.callback(self._bar.close)
        if self._wandb is not None:
            # One name for the folder or URL: a resumed run goes on in the same place.
            name = hashlib.sha256(self._name.encode()).hexdigest()[:16]
            self._wandb.init(
                project="fact-jax",
                name=self._run.name,
                id=name,
                resume="allow",
                dir=str(self._run),
                config=config,
            )
            self._open.callback(self._wandb.finish)

    def say(self, line: str) -> None:
        """One line for the console and log.txt."""
        if self._is_main:
            with contextlib.suppress(OSError):  # the terminal may be gone; log.txt has it too
                tqdm.write(line, file=sys.stderr)
            self.note(line)

    def note(self, line: str) -> None:
        """One line for log.txt alone."""
        if self._is_main and not self._text.closed:
            with self._writing():
                self._text.write(line + "\n")
                self._text.flush()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step: console, files and Weights & Biases."""
        if self._records is None:
            return
        with self._writing():
            self._records.add(step, values)
        self._to_wandb(step, values)
        left = (self._steps - step) / max(values["steps_per_second"], 1e-9)
        line = console_line(step, self._steps, values, left)
        if self._bar is None:
            self.say(line)
        else:
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}")
            self.note(line)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add numbers to the row of the step that was recorded last."""
        if self._records is None or not values:
            return
        with self._writing():
            self._records.extend(step, values)
        self._to_wandb(step, values)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))
        self.say(f"step {step}/{self._steps}  {numbers}")

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Keep sample pictures as PNG files and in TensorBoard."""
        if self._records is None:
            return
        for name, picture in pictures.items():
            with atomic_write(self._run / "samples" / f"{name}-{step:08d}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")
            self._records.picture(step, name, picture)
            if self._wandb is not None:
                self._wandb.log({name: self._wandb.Image(picture)}, step=step)

    def _to_wandb(self, step: int, values: dict[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log(values, step=step)


class Records:
    """``metrics.jsonl``, and TensorBoard's records of the steps after ``start``.

    What TensorBoard had of these steps is forgotten. Its records are written here and now:
    tensorboardX' own SummaryWriter has a thread for it, and after an error there (a full disk)
    whoever adds something waits for ever.
    """

    def __init__(self, metrics: Path, board: Path, start: int):
        self._metrics = open(metrics, "a")  # noqa: SIM115
        self._last: tuple[int, dict[str, float]] = 0, {}  # where the last row begins, and itself
        board.mkdir(exist_ok=True)
        self._events = EventsWriter(str(board / "events"))
        self._write_event(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Close both."""
        with contextlib.closing(self._metrics):
            self._events.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a row, and a point to each of its curves."""
        self._last = self._metrics.tell(), values
        self._write(step, values, values)

    def extend(self, step: int, values: dict[str, float]) -> None:
        """Add numbers to the row that was added last."""
        begin, row = self._last
        self._metrics.truncate(begin)
        self._write(step, row | values, values)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a picture."""
        self._write_event(step=step, summary=image(name, picture, dataformats="HWC"))

    def _write(self, step: int, row: dict[str, float], new: dict[str, float]) -> None:
        plain = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
        self._metrics.flush()
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in new.items()]
        self._write_event(step=step, summary=Summary(value=points))

    def _write_event(self, **event: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **event))
        self._events.flush()


@contextlib.contextmanager
def stage(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Log a stage of the work when it begins, and its duration if that was above 5 s."""
    say(f"{what} ...")
    began = time.monotonic()
    yield
    if (spent := time.monotonic() - began) > 5:
        say(f"{what}: {spent:.0f} s")


def load_wandb() -> Any:
    """Weights & Biases' library; UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb=true needs Weights & Biases: pip install wandb") from None
    return wandb


def has_screen() -> bool:
    """Is stderr a terminal with room for a bar? Some consoles are terminals of no size."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def console_line(step: int, steps: int, values: dict[str, float], left: float) -> str:
    """``step 50/1000  loss 0.1  ...  3.2 steps/s  4 min left``."""
    hidden = {"loss", "steps_per_second", "skipped_in_a_row"}
    if not values["skipped"]:
        hidden.add("skipped")
    # What is told block by block would fill the screen: it is in the other records.
    others = {name for name in values if name not in hidden and not name.startswith("block/")}
    shown = "  ".join(f"{name} {values[name]:.4g}" for name in ["loss", *sorted(others)])
    duration = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    speed = f"{values['steps_per_second']:.2f} steps/s"
    return f"step {step}/{steps}  {shown}  {speed}  {duration} left"


def average(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the rows in which it is finite; counters and the rate: the last."""
    result = {}
    for name in rows[-1]:
        column = np.array([float(row[name]) for row in rows])
        finite = column[np.isfinite(column)]
        if name in ("skipped", "skipped_in_a_row", "learning_rate"):
            result[name] = float(column[-1])
        else:
            result[name] = float(finite.mean()) if len(finite) else math.nan
    return result


def drop_lines_past(path: Path, step: int) -> int:
    """Forget metrics that a resumed run is going to record again (and a half-written last line).

    What else is no row of metrics goes too; how many lines that are is returned.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept, junk = [], 0
    for line in lines:
        try:
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(line.rstrip(b"\r\n") + b"\n")
        except (ValueError, TypeError, KeyError):
            junk += line.endswith(b"\n")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return junk
