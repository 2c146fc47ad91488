"""A run's folder: whose it is, and what it says of its making."""

import datetime
import json
from pathlib import Path

import jax

from fact_jax.errors import UserError
from fact_jax.files import atomic_write
from train.checkpoints import revision, versions
from train.config import TrainConfig, settings_of_run, to_json

# How a step is computed and recorded, and for how long, but not what it is.
MAY_CHANGE = ("steps", "log.", "checkpoint.", "mesh.", "accumulate", "remat")
# What a person may turn down when a run diverges. Curriculum and data stay at their step.
MAY_CHANGE += ("optimizer.learning_rate", "optimizer.warmup_steps", "ema.", "batch_size")


def claim_folder(config: TrainConfig, folder: Path) -> list[str]:
    """Make the folder this run's own; UserError if it was trained with another configuration.

    Returns the settings that are others now and may be, as ``key old -> new``. A setting that is
    younger than the run in the folder had its default there.
    """
    path = folder / "config.json"
    new = to_json(config)
    changes = {}
    if path.exists() and any(folder.glob("checkpoints/*")):
        old = settings_of_run(config, json.loads(path.read_text()))
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
    _write(path, new)
    return list(changes.values())


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
        raise UserError(
            f"cannot write in {path.parent}: {error.strerror}; choose another --out"
        ) from error
