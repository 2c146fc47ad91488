"""Items, and the one way from a source to them."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_train.prepare.settings import BuildSettings, RejectedError
from fact_train.prepare.sources import files, tables, tars
from fact_train.prepare.store import Store

FORMATS = ("people", "flat", "table", "parquet", "tar")


@dataclasses.dataclass
class Item:
    """A photo of a source: its file's bytes and what is said of it, or why there is none.

    ``fields`` are by the roles of ``settings.ROLES``; a side file's content is under its role and
    ending, as ``points.points.json``.
    """

    name: str
    photo: bytes = b""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: RejectedError | None = None


def batched(values: Iterable, count: int) -> Iterator[list]:
    """Lists of ``count`` values, the last of fewer (Python 3.12 has it)."""
    rest = iter(values)
    while some := list(itertools.islice(rest, count)):
        yield some


def list_chunks(settings: BuildSettings, ignored: Counter) -> Iterator[dict]:
    """Chunks of a source: JSON of which ``read_chunk`` makes items; ``ignored`` counts the rest.

    Raises UserError where the source is not there, or holds nothing that could be a photo.
    """
    store = Store(settings.source)
    store.fs.invalidate_cache()  # what changed since another build of this process is seen
    kind = _format(store, settings.format)
    if kind in ("people", "flat") and (settings.columns or settings.root):
        raise UserError(
            f"--column and --root are of tables, and {settings.source} is read as a folder of "
            "photos: leave them away, or say what it is by --format"
        )
    if kind in ("people", "flat"):
        rows = files.list_folder(store, people=kind == "people", ignored=ignored)
        chunks: Iterable[dict] = ({"rows": some} for some in batched(rows, settings.chunk))
    elif kind == "table":
        rows = tables.list_table(store, settings)
        chunks = ({"rows": some} for some in batched(rows, settings.chunk))
    elif kind == "parquet":
        chunks = tables.list_parquet(_shards(store, ".parquet", ignored), settings)
    else:
        chunks = tars.list_tars(_shards(store, ".tar", ignored), settings)
    some = False
    for chunk in chunks:
        some = True
        yield chunk | {"format": kind}
    if not some:
        raise UserError(
            f"{settings.source} holds no photo: give a folder with a subfolder for each person, "
            "a folder of photos (--format flat), a table (.jsonl, .json, .csv, .parquet) or .tar "
            "shards"
        )


def read_chunk(settings: BuildSettings, chunk: dict) -> Iterator[Item]:
    """The items of a chunk, in order, whatever is wrong with each."""
    if chunk["format"] == "parquet":
        found: Iterator[tuple[str, dict, Callable[[], tuple[bytes, dict]]]]
        found = tables.read_parquet(chunk, settings)
    elif chunk["format"] == "tar":
        found = tars.read_tar(chunk, settings)
    else:
        root = settings.root if chunk["format"] == "table" else settings.source
        store = Store(root or tables.folder_of(Store(settings.source)))
        found = (
            (row["path"], row.get("fields", {}), functools.partial(_from_file, store, row))
            for row in chunk["rows"]
        )
    for path, said, read in found:
        name = readable_text(path)
        who = _label(said.get("identity"))
        whose = {} if who is None else {"identity": who}
        try:
            photo, fields = read()
            if "identity" in fields:
                fields["identity"] = _identity(fields["identity"], name)
            yield Item(name, photo, {key: readable_text(value) for key, value in fields.items()})
        except RejectedError as error:
            yield Item(name, fields=whose, problem=error)
        except (UserError, OSError, ValueError, RecursionError) as error:
            problem = RejectedError("not readable", f"{name}: {one_line(error)}")
            yield Item(name, fields=whose, problem=problem)


def readable_text(value: Any) -> Any:
    """Text, as names of files, that is no UTF-8 as text that is: the other bytes are escaped."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _identity(value: Any, name: str) -> str:
    """A person's name or number as text."""
    if (label := _label(value)) is None:
        raise RejectedError("row", f"{name}: its identity is no text or number")
    return label


def _label(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return str(readable_text(value)) if isinstance(value, str | int | float) else None


def _from_file(store: Store, row: dict) -> tuple[bytes, dict[str, Any]]:
    if "problem" in row:
        raise RejectedError(*row["problem"])
    return files.read_file(store, row)


def _format(store: Store, given: str) -> str:
    if not store.fs.exists(store.root):
        raise UserError(f"{store.url} does not exist")
    if given != "auto":
        return given
    if not store.fs.isdir(store.root):
        endings = {".tar": "tar", ".parquet": "parquet"} | dict.fromkeys(tables.ENDINGS, "table")
        kind = next((kind for end, kind in endings.items() if store.root.endswith(end)), None)
        if kind is None:
            raise UserError(f"{store.url} is not a folder, a table ({', '.join(endings)}) or a tar")
        return kind
    entries = store.fs.ls(store.root, detail=True)
    names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries]
    folders = (entry["type"] == "directory" for entry in entries)
    inside = any(is_one and name[0] != "." for is_one, name in zip(folders, names, strict=True))
    if any(name in tables.METADATA for name in names):
        return "table"
    for kind in ("tar", "parquet"):
        if any(name.endswith(f".{kind}") for name in names):
            if inside or any(name.lower().endswith(files.SUFFIXES) for name in names):
                raise UserError(
                    f"{store.url} holds .{kind} files beside folders or photos: say by --format "
                    "what is meant, or move the others elsewhere"
                )
            return kind
    return "people" if inside else "flat"


def _shards(store: Store, ending: str, ignored: Counter) -> list[Store]:
    """The shards of a folder, or the file itself; ``ignored`` counts what else is there."""
    if not store.fs.isdir(store.root):
        return [store]
    names = store.names("")
    for name in names:
        if not name.endswith(ending):
            kind = PurePosixPath(name).suffix or "without ending"
            ignored["hidden" if name[0] == "." else kind] += 1
    names = [name for name in names if name.endswith(ending)]
    return [Store(f"{store.url.rstrip('/')}/{name}") for name in names]


def chunk_text(chunk: dict) -> str:
    """A chunk as JSON, always the same text."""
    return json.dumps(chunk, sort_keys=True)
