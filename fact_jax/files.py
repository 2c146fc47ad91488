"""Writing files so that nothing is ever half-written, and nothing there before is lost."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is synced and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was. An OSError names
    ``path``.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def create(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """A new file, filled by ``write`` (which is given a temporary path), whole or not at all.

    It is called ``path`` or, where that name is taken, ``NAME-2.SUFFIX`` and so on; gives the path
    that it got. Never overwrites anything, whoever else writes there at the same time.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        write(temporary)
        sync(temporary)
        while True:
            free = free_path(path)
            try:
                _rename_new(temporary, free)
                break
            except FileExistsError:
                continue
    sync(path.parent)
    return free


def free_path(path: str | os.PathLike) -> Path:
    """The first of ``NAME.SUFFIX``, ``NAME-2.SUFFIX``, ... that no file, folder or link has."""
    path, number = Path(path), 1
    free = path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name for a temporary file beside ``path``; what is left of it is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        # A write to an open file fails without a name, and the temporary one says nothing.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file; FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name, then fill it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
