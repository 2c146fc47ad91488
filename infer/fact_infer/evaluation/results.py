"""The folder of an evaluation: what is kept so that it can go on, and what is written at the end.

``settings.json`` says what is measured; while ``evaluation.json`` is not there, the same command
goes on in the folder. Files of whoever else are never replaced: another folder is taken.
"""

import contextlib
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fact_infer.evaluation.measures import Samples, rows_of
from fact_infer.evaluation.table import COLUMNS, plain_table
from fact_jax.face import read_image
from fact_jax.metrics.intervals import Estimate
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

SETTINGS = "settings.json"
FILES = ("pictures.npz", "evaluation.txt", "pictures.jsonl", "pictures.html", "evaluation.json")


def fingerprint(path: str | os.PathLike) -> str:
    """Digest of the names, sizes and times of change of a file or of all files in a folder."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def open_folder(folder: str | os.PathLike, settings: Mapping[str, Any]) -> Path:
    """``folder``, or where something else was measured ``folder-2`` and so on; settings are in it.

    A folder with the same settings whose evaluation is not finished is gone on with.
    """
    wanted = json.loads(json.dumps(settings))
    free, number = Path(folder), 1
    while any(os.path.lexists(free / name) for name in (SETTINGS, *FILES)):
        if _goes_on(free, wanted):
            break
        number += 1
        free = Path(f"{Path(folder).resolve()}-{number}")
    free.mkdir(parents=True, exist_ok=True)
    with atomic_write(free / SETTINGS) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1) + "\n")
    return free


def _goes_on(folder: Path, wanted: dict[str, Any]) -> bool:
    if os.path.lexists(folder / FILES[-1]):
        return False
    try:
        return json.loads((folder / SETTINGS).read_text()) == wanted
    except (OSError, ValueError):
        return False


class PictureStore:
    """Pictures of an evaluation as PNG files, each whole or absent."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, 0

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.png"

    def have(self, keys: Sequence[str]) -> bool:
        return all(self.path(key).is_file() for key in keys)

    def read(self, keys: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        return np.stack([read_image(self.path(key)) for key in keys])

    def write(self, keys: Sequence[str], pictures: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Those that are not there yet."""
        for key, pixels in zip(keys, pictures, strict=True):
            if self.path(key).is_file():
                continue
            with atomic_write(self.path(key)) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
            self.written += 1


class Cost:
    """Seconds since it was made and of drawing, and the most memory that the process held."""

    def __init__(self) -> None:
        self._began, self._drawn, self._drawing = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def drawing(self, *stores: PictureStore) -> Iterator[None]:
        """Count what is drawn inside, with compiling, and how long that takes."""
        before, began = sum(store.written for store in stores), time.monotonic()
        yield
        self._drawn += sum(store.written for store in stores) - before
        self._drawing += time.monotonic() - began

    def to_dict(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        found = {"seconds": round(seconds, 1), "peak_memory_gb": round(peak_memory() / 2**30, 3)}
        if self._drawn:
            each = round(self._drawing / self._drawn, 3)
            found |= {"drawn": self._drawn, "seconds_each": each}
        return found

    def line(self) -> str:
        found = self.to_dict()
        drawn = f", {found['seconds_each']:g} s a picture" if self._drawn else ""
        return f"{found['seconds']:g} s{drawn}, {found['peak_memory_gb']:g} GB at most"


def peak_memory() -> int:
    """Bytes: of the accelerator where one computes, else resident in this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats and jax.default_backend() != "cpu":
        return int(stats["peak_bytes_in_use"])
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What getrusage says counts the process that started this one too.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def save(
    out: Path,
    title: str,
    about: Mapping[str, Any],
    measures: Mapping[str, Estimate],
    samples: Samples,
    pictures: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str],
    page: str,
    columns: Mapping[str, str] = COLUMNS,
    arrays: Mapping[str, np.ndarray] | None = None,
    cost: Cost | None = None,
) -> str:
    """Write ``FILES``, ``evaluation.json`` last; gives the table's text.

    ``pictures`` says of each row what it is (person, prompt, seed, file): ``pictures.jsonl`` has
    its scores beside that. ``arrays`` go to ``pictures.npz``.
    """
    text = f"{title}\n\n{plain_table(measures, notes, columns)}"
    scores = rows_of(samples, "fact", len(pictures))
    base = rows_of(samples, "base", len(pictures))
    lines = [
        json.dumps({**row, "scores": own, "base_scores": other}, ensure_ascii=False)
        for row, own, other in zip(pictures, scores, base, strict=True)
    ]
    content = {
        **about,
        "measures": {name: estimate.to_dict() for name, estimate in measures.items()},
        "notes": list(notes),
        "cost": cost.to_dict() if cost else {},
    }
    texts = {
        "evaluation.txt": text,
        "pictures.jsonl": "\n".join(lines) + "\n",
        "pictures.html": page,
        "evaluation.json": json.dumps(content, indent=1) + "\n",
    }
    if arrays is not None:
        with atomic_write(out / "pictures.npz") as path, open(path, "wb") as handle:
            np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]
    for name, written in texts.items():
        with atomic_write(out / name) as path:
            path.write_text(written, encoding="utf-8")
    return text


def read_scores(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of ``pictures.jsonl``; UserError if it is not there or no such file."""
    path = Path(folder) / "pictures.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; `fact-infer evaluate` writes it") from None
