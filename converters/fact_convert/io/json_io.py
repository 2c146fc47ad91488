"""JSON and text files, read within bounds and written; the checks that every input file passes."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fact_jax.utils.errors import UserError, listed
from fact_jax.utils.files import atomic_write

JSON_LIMIT = 16 * 2**20


def check_file(path: Path) -> None:
    """UserError unless ``path`` is a file that can be read."""
    try:
        there = path.exists()
    except (OSError, ValueError) as err:
        raise UserError(f"{str(path)!a}: not a name that files have") from err
    if not there:
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file of reasonable size."""
    return parse_json(Path(path), _read_small(Path(path), "JSON"))


def read_text(path: str | os.PathLike) -> str:
    """A text file of reasonable size, in UTF-8."""
    try:
        return _read_small(Path(path), "text").decode("utf-8")
    except UnicodeDecodeError as err:
        raise UserError(f"{path}: not UTF-8 text ({err})") from err


def _read_small(path: Path, sort: str) -> bytes:
    check_file(path)
    with open(path, "rb") as handle:
        data = handle.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a {sort} file")
    return data


def parse_json(path: Path, data: bytes) -> dict:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as err:
        raise UserError(f"{path}: not valid JSON ({err})") from err
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, an object was wanted")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def check_names(path: Path, keys: Iterable[str]) -> None:
    """Keys are shown at the terminal: nothing in them may steer it."""
    if odd := [key for key in keys if not key.isprintable()]:
        raise UserError(f"{path}: has keys that are no names: {listed(map(ascii, odd))}")


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Write a JSON object, indented."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def json_in(text: Mapping[str, str], name: str, source: str | os.PathLike) -> dict:
    """An object that a file's metadata holds as JSON under a name; empty if there is none."""
    try:
        found = json.loads(text.get(name, "{}"))
    except (ValueError, RecursionError) as err:
        raise UserError(f"{source}: metadata {name!r} is not JSON ({err})") from err
    if not isinstance(found, dict):
        raise UserError(f"{source}: metadata {name!r} is not an object")
    return found
