"""Manifests: pictures that any model made, with what they were to show, as JSON lines.

    {"picture": "a.png", "person": "anna", "references": ["anna/1.jpg"], "target": "anna/2.jpg",
     "prompt": "a woman reading", "base": "a-base.png", "seed": 7}

``target`` (a true photo that the model did not see), ``base`` (the picture of the same noise
without the person), ``prompt`` and ``seed`` may be absent. Several people in one picture are a
list ``people`` of objects with ``person``, ``references`` and ``target``. Paths are relative to the
manifest.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fact_jax.utils.errors import UserError

MAX_LINE, MAX_PICTURES, MAX_FACES, MAX_REFERENCES = 1 << 20, 1_000_000, 32, 64
_PERSON = {"person", "references", "target"}
_KEYS = _PERSON | {"picture", "people", "prompt", "base", "seed"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A person whom a picture is to show: photos that the model saw, and one that it did not."""

    person: str
    references: tuple[Path, ...]
    target: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture of the manifest."""

    picture: Path
    people: tuple[Shown, ...]
    prompt: str | None = None
    base: Path | None = None
    seed: int | None = None


def read_manifest(path: str | os.PathLike) -> list[Entry]:
    """The entries of a manifest; UserError names the line that is wrong, or a file that is not."""
    path = Path(path)
    entries: list[Entry] = []
    try:
        with open(path, "rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}: line {number} is longer than {MAX_LINE:,} bytes")
                if line.strip():
                    entries.append(_entry(line, path.parent, f"{path}: line {number}"))
                if len(entries) > MAX_PICTURES:
                    raise UserError(f"{path}: more than {MAX_PICTURES:,} pictures")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not entries:
        raise UserError(f"{path}: no picture in it; each line is a JSON object")
    return entries


def write_manifest(entries: Sequence[Entry], folder: Path) -> str:
    """The text of a manifest in ``folder``, whose files may lie anywhere."""

    def name(path: Path) -> str:
        return os.path.relpath(path, folder)

    lines = []
    for entry in entries:
        people = [
            {"person": one.person, "references": [name(p) for p in one.references]}
            | ({"target": name(one.target)} if one.target else {})
            for one in entry.people
        ]
        line: dict[str, Any] = {"picture": name(entry.picture)}
        line |= people[0] if len(people) == 1 else {"people": people}
        line |= {} if entry.prompt is None else {"prompt": entry.prompt}
        line |= {} if entry.base is None else {"base": name(entry.base)}
        line |= {} if entry.seed is None else {"seed": entry.seed}
        lines.append(json.dumps(line, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _entry(line: bytes, folder: Path, where: str) -> Entry:
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # half a surrogate pair can't be written
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    _check_keys(given, _KEYS, where)
    if ("people" in given) == bool(given.keys() & _PERSON):
        raise UserError(f"{where}: give person and references, or a list people of such objects")
    people = given.get("people", [{k: given[k] for k in given.keys() & _PERSON}])
    if not isinstance(people, list) or not 1 <= len(people) <= MAX_FACES:
        raise UserError(f"{where}: people must be a list of 1 to {MAX_FACES} objects")
    shown = tuple(_shown(one, folder, f"{where}, person {i}") for i, one in enumerate(people))
    if len({one.person for one in shown}) < len(shown):
        raise UserError(f"{where}: the same person twice in one picture")
    prompt, seed = given.get("prompt"), given.get("seed")
    if not isinstance(prompt, str | None):
        raise UserError(f"{where}: prompt must be a text")
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        raise UserError(f"{where}: seed must be a whole number")
    return Entry(
        picture=_path(given.get("picture"), folder, f"{where}: picture"),
        people=shown,
        prompt=prompt,
        base=None if given.get("base") is None else _path(given["base"], folder, f"{where}: base"),
        seed=seed,
    )


def _shown(given: Any, folder: Path, where: str) -> Shown:
    _check_keys(given, _PERSON, where)
    person, references, target = (given.get(key) for key in ("person", "references", "target"))
    if not isinstance(person, str) or not person:
        raise UserError(f"{where}: person must be a text, the same for all pictures of a person")
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not 1 <= len(references) <= MAX_REFERENCES:
        raise UserError(f"{where}: references must be 1 to {MAX_REFERENCES} photos")
    return Shown(
        person=person,
        references=tuple(_path(p, folder, f"{where}: references") for p in references),
        target=None if target is None else _path(target, folder, f"{where}: target"),
    )


def _check_keys(given: Any, known: set[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: not an object")
    if unknown := sorted(given.keys() - known):
        raise UserError(
            f"{where}: unknown {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(sorted(known))}"
        )


def _path(value: Any, folder: Path, where: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"{where}: a file's name is needed")
    path = folder / value
    if not path.is_file():
        raise UserError(f"{where}: {path} is no file")
    return path
