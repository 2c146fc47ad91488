"""Photos that are files: in folders of people, in one folder, or named by a table's rows."""

import functools
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

from fact_jax.face.images import one_line
from fact_train.prepare.settings import RejectedError
from fact_train.prepare.store import Store

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"),
    *(".heic", ".heif"),  # where pillow-heif is installed; without it each one is told of
)
BESIDE = {
    "points": (".points.json", ".json"),
    "mask": (".mask.png",),
    "caption": (".txt",),
    "quality": (".quality.txt",),
    "embedding": (".embedding.npy",),
}
"""Role -> endings of a photo's side files, the first that is there counts."""
_ENDS = tuple(ending for group in BESIDE.values() for ending in group)
MAX_BYTES = 256 << 20
_MAX_SIDE_BYTES = 64 << 20
_DEEPEST = 16
_FOLDERS = 16
"""Listings that are kept, where a table's rows go from folder to folder."""


def list_folder(store: Store, *, people: bool, ignored: Counter) -> Iterator[dict]:
    """A row for each photo under a folder, sorted; the first folder is the person if ``people``.

    ``ignored`` counts the other files by their endings, and what is hidden, a folder as one.
    """
    for path, beside, about in _walk(store, "", ignored, 0):
        row: dict[str, Any] = {"path": path, "beside": beside, "about": about}
        person, inside, _ = path.partition("/")
        if people and inside:
            row["fields"] = {"identity": person}
        elif people and about[0][0] != "directory":
            row["problem"] = ("no identity", f"{path} lies beside the people's folders")
        yield row


def _walk(
    store: Store, folder: str, ignored: Counter, depth: int
) -> Iterator[tuple[str, list[str], list]]:
    # Of each entry only what is asked below: a folder may hold millions.
    named = {
        _parted(entry["name"].rstrip("/"))[1]: (
            entry["type"] == "directory",
            entry.get("islink"),
            _state(entry),
        )
        for entry in sorted(
            store.fs.ls(store.path(folder), detail=True), key=lambda entry: entry["name"]
        )
    }
    within = f"{folder}/" if folder else ""
    stems = {name.rsplit(".", 1)[0] for name in named if _is_photo(name)}
    for name, (is_folder, is_link, _) in named.items():
        photo = _is_photo(name)
        if name.startswith("."):
            ignored["hidden"] += 1
        elif is_folder and not photo:
            if depth < _DEEPEST and not is_link:
                yield from _walk(store, within + name, ignored, depth + 1)
            else:
                ignored["link to a folder, or folder too deep"] += 1
        elif photo:
            beside = _beside(name, named)
            stem = name.rsplit(".", 1)[0]
            about = [named[one][2] for one in (name, *(f"{stem}{end}" for end in beside))]
            yield within + name, beside, about
        elif is_link and store.fs.isdir(store.path(within + name)):
            ignored["link to a folder, or folder too deep"] += 1
        elif not any(name.endswith(end) and name.removesuffix(end) in stems for end in _ENDS):
            suffix = name.rsplit(".", 1)[-1].lower()
            ignored[f".{suffix}" if "." in name else "without ending"] += 1


def _is_photo(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.endswith(BESIDE["mask"])


class Listings:
    """What listings tell of files that a table names: one request for a folder, not for a file."""

    def __init__(self, store: Store):
        self._store = store
        self._listed = functools.lru_cache(_FOLDERS)(self._list)

    def side_files(self, path: str) -> list[str]:
        """Endings of a photo's side files."""
        folder, name = _parted(path)
        return _beside(name, self._listed(folder))

    def state(self, path: str) -> list | None:
        """What changes when a file does; None where it is not there."""
        folder, name = _parted(path)
        return self._listed(folder).get(name)

    def _list(self, folder: str) -> dict[str, list]:
        try:
            entries = self._store.fs.ls(self._store.path(folder) or "/", detail=True)
        except (OSError, ValueError):  # what is wrong is said where the photo is read
            return {}
        return {_parted(entry["name"].rstrip("/"))[1]: _state(entry) for entry in entries}


def _parted(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _beside(name: str, named: Container[str]) -> list[str]:
    """Endings of the side files of a photo among the names of its folder."""
    stem = name.rsplit(".", 1)[0]
    return [end for end in _ENDS if f"{stem}{end}" in named]


def _state(entry: dict) -> list:
    """What changes when a file does: its size, and when or as what it was written."""
    when = entry.get("mtime", entry.get("ETag", entry.get("etag", entry.get("created", ""))))
    return [entry["type"], entry.get("size"), str(when)]


def read_file(store: Store, row: dict) -> tuple[bytes, dict[str, Any]]:
    """The photo's bytes and the fields of a row: what its side files say, then what it says itself.

    Raises RejectedError for what is no file, or too large.
    """
    path = row["path"]
    photo = _read(store, path, MAX_BYTES)
    fields: dict[str, Any] = {}
    stem, given = path.rsplit(".", 1)[0], row.get("fields", {})
    for role, endings in BESIDE.items():
        for ending in endings:
            if ending not in row["beside"] or role in given:
                continue
            fields.setdefault(role + ending, _read(store, stem + ending, _MAX_SIDE_BYTES))
    if isinstance(mask := given.get("mask"), str):
        given = given | {"mask": _read(store, mask, _MAX_SIDE_BYTES)}
    return photo, fields | given


def _read(store: Store, path: str, most: int) -> bytes:
    try:
        about = store.fs.info(store.path(path))
        if about["type"] != "file" and not (about.get("islink") and store.fs.isfile(about["name"])):
            raise RejectedError("no file", f"{path} is no file ({about['type']})")
        if (about.get("size") or 0) > most:
            raise RejectedError("too large", f"{path} is too large: at most {most >> 20} MB")
        return store.read(path)
    except FileNotFoundError:
        raise RejectedError("no file", f"{path} is not there") from None
    except OSError as error:
        raise RejectedError("not readable", f"{path} cannot be read: {one_line(error)}") from None
