"""WebDataset shards, as of img2dataset: the files of a sample follow each other in a tar."""

import functools
import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from fact_jax.face.images import one_line
from fact_train.prepare.settings import BuildSettings, RejectedError
from fact_train.prepare.sources.files import BESIDE, MAX_BYTES, SUFFIXES
from fact_train.prepare.sources.tables import fields_of, leads_out
from fact_train.prepare.store import Store

_PHOTOS = tuple(suffix[1:] for suffix in SUFFIXES)
_MOST_FILES = 64
"""Of one sample; what comes after is not looked at."""


def list_tars(shards: list[Store], settings: BuildSettings) -> Iterator[dict]:
    """Chunks of samples, each with where its files lie; nothing is read but the headers."""
    for store in shards:
        about = [store.fs.info(store.root).get(key) for key in ("size", "mtime", "ETag")]
        chunk, samples = {"file": store.url, "about": about}, []
        for sample in _samples(store):
            samples.append(sample)
            if len(samples) == settings.chunk:
                yield chunk | {"samples": samples}
                samples = []
        if samples:
            yield chunk | {"samples": samples}


def _samples(store: Store) -> Iterator[dict]:
    """``{"key", "files": {ending: [offset, size]}}`` each; a damaged tar ends with a problem, in
    which the sample that was not whole is told of.

    A name that leads out of the tar is a problem too.
    """
    current: dict[str, Any] = {}
    problem = None
    try:
        with (
            store.fs.open(store.root, "rb") as opened,
            tarfile.open(fileobj=opened, mode="r:") as archive,  # compressed, it has no offsets
        ):
            size = opened.seek(0, io.SEEK_END)
            opened.seek(0)
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                key, ending = f"{folder}/{key}" if folder else key, ending.lower()
                if not member.isfile() or member.issparse():
                    what = "a sparse file" if member.issparse() else "a link or a folder"
                    about = ("no file", f"{member.name} is no plain file, but {what}")
                    if current and key == current["key"]:
                        current["problem"] = about
                    elif ending in _PHOTOS:
                        yield {"key": member.name, "problem": about}
                    continue
                if current and (key != current["key"] or ending in current["files"]):
                    yield current
                    current = {}
                if not current:
                    current = {"key": key, "files": {}}
                    if leads_out(posixpath.normpath(key)):
                        text = f"{member.name} leads out of the tar"
                        current["problem"] = ("row", text)
                if member.size < 0 or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if len(current["files"]) < _MOST_FILES:
                    current["files"][ending] = [member.offset_data, member.size]
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all
            offset: int = archive.offset  # type: ignore[attr-defined]
            opened.seek(offset)
            if opened.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) and current:
                yield current  # the tar ends here, so it is whole
                current = {}
            _check_end(opened, offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        problem = one_line(error)
    if problem is not None:  # the sample that it is in is not whole
        yield {"key": "", "problem": ("damaged shard", f"{store.url}: {problem}")}


def _check_end(opened: Any, offset: int) -> None:
    """ReadError unless there are zeros, and nothing else, after the last file that is there."""
    opened.seek(offset)
    if len(opened.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off: it ends without the zeros that end a tar")
    opened.seek(offset)
    while block := opened.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"at byte {offset:,} there is no header: it is damaged, or several tars are joined"
            )


def read_tar(
    chunk: dict, settings: BuildSettings
) -> Iterator[tuple[str, dict, Callable[[], tuple[bytes, dict]]]]:
    """Name, what is said beforehand (nothing), and reader of each sample of a chunk."""
    store = Store(chunk["file"])
    file = store.url.rsplit("/", 1)[-1]
    with store.fs.open(store.root, "rb") as opened:
        for sample in chunk["samples"]:
            name = f"{file}/{sample['key']}".rstrip("/")
            yield name, {}, functools.partial(_read, opened, sample, name, settings)


def _read(
    opened: Any, sample: dict, name: str, settings: BuildSettings
) -> tuple[bytes, dict[str, Any]]:
    if "problem" in sample:
        raise RejectedError(*sample["problem"])
    there = sample["files"]
    photos = [ending for ending in there if ending in _PHOTOS]
    if len(photos) != 1:
        number = "no photo" if not photos else f"{len(photos)} photos, not one"
        raise RejectedError("row", f"{name} holds {number}: {', '.join(there)}")
    (photo,) = photos

    def content(ending: str) -> bytes:
        offset, size = there[ending]
        if size > MAX_BYTES:
            raise RejectedError("too large", f"{name}.{ending} is too large")
        opened.seek(offset)
        return opened.read(size)

    fields: dict[str, Any] = {}
    for role, endings in BESIDE.items():
        for ending in endings:
            if ending[1:] in there:
                fields.setdefault(role + ending, content(ending[1:]))
    if "json" in there:
        try:
            row = json.loads(content("json"))
        except (ValueError, RecursionError) as error:
            raise RejectedError("row", f"{name}.json is not JSON: {one_line(error)}") from None
        if isinstance(row, dict):
            fields |= fields_of(row, settings)
            fields.pop("image", None)
    return content(photo), fields
