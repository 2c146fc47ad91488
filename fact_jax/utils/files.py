"""Atomic writes of files and folders."""

import contextlib
import ctypes
import datetime
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from fact_jax.utils.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux' system call renameat2."""
_LOCKED: dict[Path, object] = {}
"""Folders that a thread of this process has locked."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary file beside ``path``; on success it is synced and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was. An OSError names
    ``path``. Without ``replace``, UserError if something has that name when the file is whole.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            with _kept(path):
                _rename_new(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Give an empty folder beside ``path`` that takes its place when everything in it is written.

    It is on disk before it has that name; what was there is removed afterwards. The two change
    names in one step where the system can (Linux), else in two, and :func:`recover` undoes the
    first if the process dies between them. On an exception ``path`` is left as it was. An OSError
    names ``path``. UserError for a folder that this program runs in and, without ``replace``, if
    ``path`` is at the end anything but an empty folder.
    """
    path = Path(path)
    require_elsewhere(path)
    old = _beside(path, "old")
    recover(path)
    with _temporary(path, folder=True) as temporary:
        try:
            yield temporary
            os.sync()  # of thousands of files: one wait for all instead of one for each
            if not (replace and path.exists()):
                with _kept(path):
                    os.rename(temporary, path)  # refuses whatever is not an empty folder
            elif not _exchange(temporary, path):
                os.rename(path, old)
                os.rename(temporary, path)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)
            _remove(old)
    sync(path.parent)


def recover(path: str | os.PathLike) -> bool:
    """Clear away what killed processes left of writing ``path``; whether a living one writes it.

    A folder that had been moved aside, to be replaced, comes back if nothing has its name.
    """
    path, writing = Path(path), False
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for left in [left for left in path.parent.iterdir() if leftover.fullmatch(left.name)]:
            opened = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if not _lock(opened):
                    writing = True
                elif left.suffix == ".old" and not os.path.lexists(path):
                    os.rename(left, path)
                else:
                    _remove(left)
            finally:
                os.close(opened)
    return writing


def create(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
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


@contextlib.contextmanager
def folder_lock(folder: Path, *, keep: bool = True) -> Iterator[str | None]:
    """Keep others that ask for it, processes and threads, out of a folder; UserError if one is in.

    The lock is the system's, on the file ``.lock``: it goes with the process that has it, however
    that ends, and a network file system (NFS, Lustre) passes it on to other hosts. Gives a warning
    where the file system knows no locks. Without ``keep`` the file is removed at the end.
    """
    path, mine, name = folder / ".lock", object(), folder.resolve()
    if _LOCKED.setdefault(name, mine) is not mine:  # the system's lock is the process's
        raise UserError(f"another thread of this process is writing in {folder}: wait for it")
    with contextlib.ExitStack() as locked:
        locked.callback(_LOCKED.pop, name)
        while True:
            file = locked.enter_context(open(path, "a+"))
            warning = _lock_file(file, folder)
            if _is_file(file, path):
                break
            # It was removed by who had it; another may have made and locked it anew.
            file.close()
        file.truncate(0)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n")
        file.flush()
        try:
            yield warning
        finally:
            if not keep and _is_file(file, path):
                path.unlink()


def _lock_file(file: TextIO, folder: Path) -> str | None:
    """Lock an open file, or say why it cannot be; UserError if another process has."""
    try:
        # Unlike flock's, it is not inherited by forked data workers, which may outlive the run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            who = file.read(200).strip()
            raise UserError(
                f"another process is writing in {folder} ({who or 'it does not say which'}): "
                "wait for it or stop it, or name another folder"
            ) from error
        return f"{folder} cannot be locked ({error.strerror}): start only one process in it"
    return None


def _is_file(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


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


def require_elsewhere(path: Path) -> None:
    """UserError for the folder where this program runs, or one around it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed
        return
    target = Path(os.path.realpath(path))
    if target == here or target in here.parents:
        raise UserError(f"{path}: the folder where this program runs is not replaced; name another")


def require_local(path: Path) -> None:
    """UserError for the URL of an object store, which as a path would be a folder named ``gs:``."""
    scheme, *rest = path.parts or ("",)
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", scheme) and not os.path.lexists(scheme):
        raise UserError(
            f"{scheme}//{'/'.join(rest)} is a URL; mount the bucket as a folder "
            "(gs: install gcsfuse, s3: mountpoint-s3 or rclone) and give that folder"
        )


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


@contextlib.contextmanager
def _temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary file or folder beside ``path``; what is left of it is removed.

    It is locked as long as this process lives, so that others know it from what is left of a
    killed one.
    """
    require_local(path)
    temporary, opened = _beside(path, "tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary.mkdir()
        flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        opened = os.open(temporary, flags, 0o666)
        _lock(opened)
        yield temporary
    except OSError as error:
        # A write to an open file fails without a name, and the temporary one says nothing.
        name = error.filename
        if error.errno is None or not (name is None or str(name).startswith(str(temporary))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)
        if opened is not None:
            os.close(opened)


def _lock(opened: int) -> bool:
    """Lock an open file or folder until it is closed.

    False if another process has, or the file system knows no locks.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Say in one line that something has the name already."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise UserError(f"{path}: kept, something else was written there meanwhile") from error


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file; FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name, then fill it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
