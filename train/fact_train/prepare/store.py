"""Files of a folder or of an object store's prefix, by fsspec; written whole or not at all."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names that ``atomic_write`` gives to what it has not finished."""


class Store:
    """What lies under ``url``: a path, or ``gs://``, ``s3://``, ``hdfs://`` and so on."""

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            if "://" in url:
                self.fs, root = fsspec.core.url_to_fs(url)
            else:  # a path may hold "::", by which fsspec chains file systems
                self.fs, root = fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(url))
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {one_line(error)}") from None
        self.root = root.rstrip("/")
        self.local = self.fs.protocol == "file" or "file" in self.fs.protocol

    def check_access(self) -> None:
        """UserError where an object store does not answer, as without credentials."""
        try:
            self.fs.info(self.root)
        except FileNotFoundError:
            pass
        except Exception as error:  # each store's library has errors of its own
            raise UserError(f"{self.url} cannot be reached: {one_line(error)}") from error

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; UserError for anything else."""
        try:
            found = json.loads(self.read(name))
            if not isinstance(found, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{self.path(name)} is damaged: {one_line(error)}") from None
        return found

    def write(self, name: str, content: bytes | str) -> None:
        """A file, whole or not at all. UserError for one that an object store does not take."""
        content = content.encode() if isinstance(content, str) else content
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), content)
            except OSError as error:  # which names no bucket
                raise UserError(f"{self.url} cannot be written: {one_line(error)}") from error
            return
        with self.writing(name) as temporary:
            temporary.write_bytes(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path on this machine, whose file has the name ``name`` afterwards."""
        path = self.path(name)
        if self.local:
            with atomic_write(path) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "file")
            yield temporary
            self.fs.put_file(str(temporary), path)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A path on this machine with the file's content."""
        if self.local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, Path(name).name)
            self.fs.get_file(self.path(name), str(copy))
            yield copy

    def lines(self, name: str) -> Iterator[dict]:
        """The objects of a JSONL file; UserError for a line that is none."""
        with self.fs.open(self.path(name), "rb") as opened:
            for number, line in enumerate(io.TextIOWrapper(opened, encoding="utf-8"), start=1):
                try:
                    found = json.loads(line)
                    if not isinstance(found, dict):
                        raise ValueError("no object")
                except ValueError as error:
                    raise UserError(
                        f"{self.path(name)}: line {number} is damaged: {one_line(error)}"
                    ) from None
                yield found

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none where there is no such folder."""
        try:
            self.fs.invalidate_cache()
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return [name for name in names if not _TEMPORARY.fullmatch(name)]

    def sweep(self, folder: str = "") -> None:
        """Remove what killed writes left in a folder of this machine."""
        for path in Path(self.path(folder)).glob(".*.tmp") if self.local else ():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """A file or a folder, if it is there."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)


def json_line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n"
