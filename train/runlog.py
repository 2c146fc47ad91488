"""What a run tells: console, log.txt, metrics.jsonl, TensorBoard, sample pictures."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from fact_jax.files import atomic_write


class RunLog:
    """The records of one run in its folder. Use as a context manager."""

    def __init__(self, run: Path, *, start: int, steps: int):
        run.mkdir(parents=True, exist_ok=True)
        self._run, self._steps, self._start = run, steps, start
        drop_lines_past(run / "metrics.jsonl", start)
        self._metrics = open(run / "metrics.jsonl", "a")  # noqa: SIM115
        self._text = open(run / "log.txt", "a")  # noqa: SIM115
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(initial=start, total=steps, unit="step") if has_screen() else None
        self._began = self._last = time.monotonic()
        self._last_step = start

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._metrics.close()
        self._text.close()

    def say(self, line: str) -> None:
        """One line for the console and log.txt."""
        tqdm.write(line, file=sys.stderr)
        self.note(line)

    def note(self, line: str) -> None:
        """One line for log.txt alone."""
        self._text.write(line + "\n")
        self._text.flush()

    def advance(self) -> None:
        """One more step was started."""
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step everywhere."""
        now = time.monotonic()
        speed = (step - self._last_step) / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        values = values | {"steps_per_second": speed}
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._metrics.write(json.dumps({"step": step, **row}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        left = (self._steps - step) / max(speed, 1e-9)
        line = console_line(step, self._steps, values, left)
        if self._bar is None:
            self.say(line)
        else:
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}")
            self.note(line)

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Keep sample pictures as PNG files and in TensorBoard."""
        for name, picture in pictures.items():
            with atomic_write(self._run / "samples" / f"{name}-{step:08d}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")
            self._board.add_image(name, picture, step, dataformats="HWC")


def has_screen() -> bool:
    """Is stderr a terminal with room for a bar? Some consoles are terminals of no size."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def console_line(step: int, steps: int, values: dict[str, float], left: float) -> str:
    """``step 50/1000  loss 0.1  ...  3.2 steps/s  4 min left``."""
    hidden = {"steps_per_second", "skipped_in_a_row"}
    if not values["skipped"]:
        hidden.add("skipped")
    names = ["loss"] + sorted(name for name in values if name != "loss" and name not in hidden)
    shown = "  ".join(f"{name} {values[name]:.4g}" for name in names)
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


def drop_lines_past(path: Path, step: int) -> None:
    """Forget metrics that a resumed run is going to record again (and a half-written last line)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))
