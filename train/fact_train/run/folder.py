"""A run's folder: whose it is, and what it says of its making."""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fact_convert.io.hashing import file_sha256
from fact_jax.utils.errors import UserError, listed
from fact_jax.utils.files import atomic_write, folder_lock
from fact_train.config import TrainConfig
from fact_train.overrides import settings_of_run, to_json
from fact_train.run.provenance import revision, versions

MAY_CHANGE = (
    # How a step is computed and recorded, and for how long, but not what it is.
    *("steps", "log.", "checkpoint.", "mesh.", "accumulate", "remat"),
    # What a person may turn down when a run diverges. Curriculum and data stay at their step.
    *("optimizer.learning_rate", "optimizer.warmup_steps", "ema.", "batch_size"),
)
# What a run writes over in its folder, beside its checkpoints.
_WRITTEN = ("config.json", "environment.json", "export", "metrics.jsonl", "scores.json")


def claim_folder(config: TrainConfig, folder: Path) -> list[str]:
    """Make the folder this run's own.

    Returns the settings that are others now than those of the newest checkpoint and may be, as
    ``key old -> new``. A setting that is younger than the run in the folder had its default there.
    UserError if the run was trained with another configuration, or if the folder holds what is not
    a run's and would be written over.
    """
    path = folder / "config.json"
    new = to_json(config)
    changes = {}
    there = [name for name in _WRITTEN if os.path.lexists(folder / name)]
    if any(folder.glob("checkpoints/*")):
        old = settings_of_run(config, _former_config(folder))
        changes = {
            key: f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, ...) != new.get(key, ...)
        }
        differing = [text for key, text in changes.items() if not key.startswith(MAY_CHANGE)]
        if differing:
            raise UserError(
                f"{folder} holds a run with another configuration ({'; '.join(differing)}); "
                "give the same values to resume it, or another --out"
            )
    elif there and not _read_config(path)[0]:
        raise UserError(
            f"{folder} holds {listed(there)}, but no run's config.json: give another --out, so "
            "that nothing is written over"
        )
    _write(path, new)
    return list(changes.values())


def _former_config(folder: Path) -> dict[str, Any]:
    """What the run in the folder was trained with, as its newest checkpoint says.

    ``config.json`` is of the last start, which may not have come to a checkpoint: it only stands in
    for one that cannot be read.
    """
    for path in sorted(folder.glob("checkpoints/*/meta/metadata"), reverse=True):
        if found := _read_config(path, "config")[0]:
            return found
    path = folder / "config.json"
    found, why = _read_config(path)
    if not found:
        raise UserError(
            f"{path} {why}, and no checkpoint beside it says how it was trained: bring it back to "
            "resume the run, or give another --out"
        )
    return found


def _read_config(path: Path, *keys: str) -> tuple[dict[str, Any], str]:
    """(a run's configuration in a JSON file, below ``keys``; "") or (nothing, why not)."""
    try:
        found = json.loads(path.read_text())
        for key in keys:
            found = found[key]
    except FileNotFoundError:
        return {}, "is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {}, f"cannot be read ({type(error).__name__})"
    if isinstance(found, dict) and "task" in found:
        return found, ""
    return {}, "is no configuration"


def file_hashes(folder: Path) -> dict[str, str]:
    """Path below the folder -> SHA-256 of the file, of all files in it."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found[path.relative_to(folder).as_posix()] = file_sha256(path)
    return found


def copy_others(old: Path, new: Path) -> None:
    """Copy what somebody put into the folder ``old``: all whose name is not in ``new``."""
    for path in old.iterdir() if old.is_dir() else ():
        if os.path.lexists(new / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def check_export(folder: Path, step: int) -> str:
    """What is wrong with the exported files of this step; nothing if they are as written."""
    try:
        about = json.loads((folder / "training.json").read_text())
        written = about.get("files", {})
        if about["step"] != step:
            return f"is of step {about['step']}"
    except FileNotFoundError:
        return "is not there"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "training.json cannot be read"
    if not isinstance(written, dict) or not written:
        return "training.json does not say what was written"
    found = file_hashes(folder)
    wrong = [name for name in written if found.get(name) != written[name]]
    return f"{listed(wrong)} not as written" if wrong else ""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[list[str]]:
    """Keep other runs out of the folder, as ``folder_lock`` does. Gives warnings."""
    if jax.process_index() != 0:
        yield []
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with contextlib.ExitStack() as held:
        try:
            warning = held.enter_context(folder_lock(folder))
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield [warning] if warning else []


def describe_start(folder: Path, command: str) -> None:
    """Write ``environment.json``: what this start of the run is made of, and where it runs."""
    devices = jax.devices()
    about = {
        "started": now(),
        "command": command,
        "revision": revision(),
        "versions": versions(),
        "processes": jax.process_count(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind},
    }
    _write(folder / "environment.json", about)


def now() -> str:
    """The local time, with its offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _write(path: Path, values: dict) -> None:
    if jax.process_index() != 0:
        return
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write in {folder}: {error.strerror}; choose another --out")
