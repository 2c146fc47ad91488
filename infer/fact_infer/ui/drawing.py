"""Requests of the page on their way through the engine."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from fact_infer.service.engine import BusyError, DrainingError
from fact_infer.service.jobs import FINISHED, Job, SavedPicture
from fact_infer.service.operations import Service
from fact_infer.ui.style import state
from fact_jax.utils.errors import UserError

_EVERY = 0.15
# The names that files have here.
_OURS = re.compile(r"\b(\w+)-[0-9a-f]{12}\b")


@dataclasses.dataclass(frozen=True)
class Look:
    """How a request stands: a sentence as HTML, and the pictures that there are."""

    html: str
    preview: np.ndarray | None = None
    pictures: tuple[SavedPicture, ...] = ()
    sheet: SavedPicture | None = None
    done: bool = False


class Desk:
    """Takes the page's requests to the engine; ``running`` are those of each open page."""

    def __init__(self, service: Service):
        self.service = service
        self.running: dict[str, list[Job]] = {}

    def draw(self, kind: str, given: dict[str, Any], session: str | None) -> Iterator[Look]:
        """A request from its place in the queue to its pictures. It ends with who looks on."""
        engine = self.service.engine
        try:
            job = engine.reserve(kind, preview=True)
        except (BusyError, DrainingError) as error:
            yield Look(state(str(error) or "the service is about to end", wrong=True))
            return
        own = self.running.setdefault(str(session), [])
        own.append(job)
        try:
            yield Look(state("Reading the request ..."))
            self.service.submit(kind, job, given)
            while not engine.wait(job, _EVERY):
                yield self._look(job)
            yield self._look(job)
        except UserError as error:
            yield Look(state(sentence(error), wrong=True))
        except DrainingError:
            yield Look(state("The service is about to end.", wrong=True))
        finally:
            own.remove(job)
            if not own:
                self.running.pop(str(session), None)
            if job.state not in FINISHED:
                engine.cancel(job)

    def cancel(self, request: gr.Request) -> None:
        """Stop all that this page draws, at its next step."""
        for job in list(self.running.get(str(request.session_hash), ())):
            self.service.engine.cancel(job)

    def _look(self, job: Job) -> Look:
        progress, notes = job.progress, [_OURS.sub(r"\1", note) for note in job.notes]
        if job.state == "done":
            count = len(job.pictures)
            seconds = job.finished - job.started
            text = f"Done: {count} picture{'s' if count > 1 else ''} in {seconds:.1f} s."
            return Look(state(text, notes=notes), None, tuple(job.pictures), job.sheet, done=True)
        if job.state in FINISHED:
            text = job.error or ("Cancelled." if job.state == "cancelled" else job.state)
            return Look(state(sentence(text), wrong=job.state == "failed"))
        if not self.service.engine.ready:
            return Look(state("The models are being loaded ..."))
        if job.state == "queued":
            before = self.service.engine.position(job) or 0
            return Look(state(f"Waiting: {before + 1} before this one."))
        if progress.phase == "compiling":
            text = "Getting ready: the first picture of a size takes longer ..."
            return Look(state(text, 0, progress.total, notes=notes))
        text = f"Drawing: step {progress.n} of {progress.total}"
        return Look(state(text, progress.n, progress.total, notes=notes), job.preview)


def sentence(error: object) -> str:
    """An error as the page says it."""
    text = _OURS.sub(r"\1", str(error).strip())
    if "." not in text.partition(" ")[0]:  # no file's name
        text = text[:1].upper() + text[1:]
    return f"{text}{'' if text.endswith(('.', '!', '?')) else '.'}"


def files_of(look: Look) -> list[str]:
    """The pictures' files, their sheet if there is one, and one with their records."""
    pictures = look.pictures
    if not pictures:
        return []
    records = pictures[0].path.parent / "records.json"
    text = json.dumps([picture.values for picture in pictures], indent=1, ensure_ascii=False)
    records.write_text(text + "\n")
    sheets = [] if look.sheet is None else [look.sheet]
    return [*(str(picture.path) for picture in (*pictures, *sheets)), str(records)]


def captioned(look: Look) -> list[tuple[Path, str]]:
    """For a gallery: the files, each with its seed and prompt; a sheet comes last."""
    found = []
    for picture in look.pictures:
        likeness = picture.values.get("similarity")
        liked = "" if likeness is None else f", likeness {likeness:.2f}"
        caption = f"seed {picture.values['seed']}{liked}: {picture.values['prompt']}"
        found.append((picture.path, caption))
    return found if look.sheet is None else [*found, (look.sheet.path, "all on one sheet")]
