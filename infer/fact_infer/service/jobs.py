"""A request on its way through the service: its state, its progress, its pictures."""

import dataclasses
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fact_infer.service.work import Picture, Sheet, Work
from fact_jax.utils.errors import UserError

State = Literal["preparing", "queued", "running", "done", "failed", "cancelled", "refused"]
FINISHED = ("done", "failed", "cancelled", "refused")
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)\b")
PREVIEWS = 3
"""Pictures that are shown on the way, for each batch that is drawn, where they are asked for."""


class CancelledError(Exception):
    """The job was cancelled between two steps."""


@dataclasses.dataclass(frozen=True)
class SavedPicture:
    """A finished picture: its file, what the file says, and the SHA-256 of its bytes."""

    path: Path
    values: dict[str, Any]
    size: tuple[int, int]
    sha256: str


class Job:
    """One request. ``folder`` is its own: what was sent lies in it, and what was drawn."""

    def __init__(self, kind: str, root: Path, time_limit: float, preview: bool = False):
        self.id = secrets.token_urlsafe(12)
        self.kind, self.preview_wanted = kind, preview
        self.folder = root / self.id
        self.state: State = "preparing"
        self.work: Work | None = None
        self.notes: list[str] = []
        self.error: str | None = None
        self.pictures: list[SavedPicture] = []
        self.sheet: SavedPicture | None = None
        self.preview: np.ndarray | None = None
        self.cancel_asked = self.fetched = False
        self.created, self.started, self.finished = time.time(), 0.0, 0.0
        self.time_limit, self.deadline = time_limit, float("inf")
        self.progress = Progress(self)

    def receive(self, name: str, content: bytes) -> Path:
        """Keep a file that was sent, under a name of ours that its content gives."""
        received = self.folder / "received"
        received.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = received / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
        path.write_bytes(content)
        return path

    def say(self, line: str) -> None:
        """A line for whoever asked."""
        self.notes.append(self.plain(line))

    def plain(self, text: str) -> str:
        """A text without the service's own folders, and with fields for options."""
        text = text.replace(f"{self.folder / 'received'}/", "").replace(f"{self.folder}/", "")
        return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)

    def keep(self, picture: Picture) -> None:
        """Write a picture, with its record."""
        drawn = self.folder / "drawn"
        drawn.mkdir(parents=True, exist_ok=True)
        path = picture.save(drawn, ".png")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = picture.image.shape[1], picture.image.shape[0]
        saved = SavedPicture(path, picture.values, size, digest)
        if isinstance(picture, Sheet):
            self.sheet = saved
        else:
            self.pictures.append(saved)

    def begin(self) -> None:
        self.state, self.started = "running", time.time()
        self.deadline = time.monotonic() + self.time_limit

    def end(self, state: State, error: str | None = None) -> None:
        """What was sent is removed, and unless it is done what was drawn too."""
        self.error = None if error is None else self.plain(error)
        self.work = self.preview = None
        shutil.rmtree(self.folder / ("received" if state == "done" else ""), ignore_errors=True)
        if state != "done":
            self.pictures, self.sheet = [], None
        self.finished = time.time()
        self.state = state

    def snapshot(self, position: int | None = None) -> dict[str, Any]:
        """What the API says of it, ready for JSON."""
        until = self.finished or time.time()
        return {
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "position": position,
            "progress": {
                "step": self.progress.n,
                "steps": self.progress.total,
                "phase": self.progress.phase if self.state == "running" else self.state,
            },
            "seconds": round(until - self.started, 3) if self.started else 0.0,
            "notes": self.notes,
            "error": self.error,
            "pictures": [
                self._said(picture, f"pictures/{number}") | {"record": picture.values}
                for number, picture in enumerate(self.pictures)
            ],
            "sheet": None if self.sheet is None else self._said(self.sheet, "sheet"),
        }

    def _said(self, picture: SavedPicture, where: str) -> dict[str, Any]:
        width, height = picture.size
        url = f"/v1/jobs/{self.id}/{where}"
        return {"url": url, "width": width, "height": height, "sha256": picture.sha256}


class Progress:
    """Stands where a pipeline expects tqdm's bar: counts steps, and stops a job between two."""

    def __init__(self, job: Job):
        self._job = job
        self.n, self.total, self.phase = 0, 0, "compiling"

    def set_description(self, text: str, refresh: bool = True) -> None:
        self.phase = text

    def update(self, steps: int = 1) -> None:
        """Raises CancelledError where that was asked for, UserError where the time is over."""
        self.n += steps
        self.phase = "drawing"
        self.check()

    def check(self) -> None:
        if self._job.cancel_asked:
            raise CancelledError
        if time.monotonic() > self._job.deadline:
            raise UserError(f"it took longer than the {self._job.time_limit:g} s that are allowed")

    def show(self, pictures: Callable[[], np.ndarray]) -> None:
        """Keep what is there so far, side by side, a few times on the way, if it is wanted."""
        every = max(1, self.total // (PREVIEWS + 1))
        if self._job.preview_wanted and self.n and self.n % every == 0:
            self._job.preview = np.concatenate(list(pictures()), axis=1)


class SharedProgress:
    """The bar of several jobs that are drawn at once; those cancelled are left to finish."""

    n, total = 0, 0

    def __init__(self, jobs: list[Job]):
        self._jobs = jobs

    def set_description(self, text: str, refresh: bool = True) -> None:
        for job in self._jobs:
            job.progress.set_description(text)

    def update(self, steps: int = 1) -> None:
        self.n += steps
        stopped: list[Exception] = []
        for job in self._jobs:
            try:
                job.progress.update(steps)
            except (CancelledError, UserError) as error:
                stopped.append(error)
        if len(stopped) == len(self._jobs):
            raise stopped[0]
