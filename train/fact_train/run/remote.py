"""A run whose ``--out`` is the URL of an object store: ``s3://``, ``gs://``, what fsspec opens.

Such a run works in a local folder, of which process 0 keeps a copy at the URL. An object is there
whole or not at all, but a checkpoint is many: it counts once the list of its files, which is
uploaded last, is there.
"""

import contextlib
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from fact_jax.utils.errors import UserError, first_line
from fact_jax.utils.files import free_path, replace_folder
from fact_train.multihost.collectives import raise_on_all_processes
from fact_train.multihost.processes import host_name
from fact_train.run.folder import now

UPLOAD_SECONDS = 20.0
RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
"""A lock that is not renewed for so long is one of a run that was killed."""
_LOCK, _COPY = "lock.json", ".copy-of"


def is_url(out: str | os.PathLike) -> bool:
    """Is this ``SCHEME://...``, and no path?"""
    return "://" in str(out)


class RemoteFolder:
    """Keeps the URL of a run a copy of ``folder``, which is ``runs/SCHEME/BUCKET/PATH``.

    UserError if ``url`` is no such URL.
    """

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        parts = [part for part in rest.split("/") if part]
        if len(parts) < 2 or {".", ".."} & set(parts) or re.search(r"[*?\[\]#]|::", url):
            raise UserError(f"--out {url}: expected {scheme or 's3'}://BUCKET/RUN")
        self.url, self.folder = f"{scheme}://{'/'.join(parts)}", Path("runs", scheme, *parts)
        self.failure: UserError | None = None
        """Why the run must stop: another one has taken the URL over."""
        self.say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self._own: dict[str, Any] = {"owner": secrets.token_hex(8), "since": now()}
        self._own |= {"host": host_name(), "process": os.getpid()}
        self._checkpoints: dict[str, dict[str, tuple[int, int]]] = {}  # those at the URL
        self._files: dict[str, tuple[int, int]] = {}  # and the other files
        self._down = False

    @contextlib.contextmanager
    def connected(self) -> Iterator[list[str]]:
        """Lock the URL and, unless ``folder`` was the last to be copied there, fetch it.

        Then upload in the background; what fails is tried again, the last time on leaving. Every
        process of a run enters and leaves it, the first does the work. UserError if the URL cannot
        be used or another run uses it, and at the end if something could not be uploaded. Gives
        warnings, as ``lock_folder`` does: none.
        """
        if jax.process_index() != 0:
            yield []
            with raise_on_all_processes():
                return
        with contextlib.ExitStack() as held:
            with _one_line(f"--out {self.url} cannot be used"):
                self._fs, self._root = _open(self.url)
                copy = self._lock()
                held.callback(self._unlock)
                held.enter_context(self._every(RENEW_SECONDS, self._renew))
                self._fetch(copy)
            try:
                with self._every(UPLOAD_SECONDS, self._try_upload):
                    yield []
            except BaseException:
                with contextlib.suppress(Exception):  # the next start here tries it again
                    self._upload()
                raise
            stale = f"{self.url} is not up to date, {self.folder} is: the same command uploads it"
            with raise_on_all_processes(), _one_line(stale):
                self._upload()
        self.say(f"uploaded to {self.url}")

    @contextlib.contextmanager
    def _every(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        """Do this every so many seconds, in a thread."""
        leaving = threading.Event()

        def work() -> None:
            while not leaving.wait(seconds) and self.failure is None:
                with contextlib.suppress(Exception):  # the next time it may work
                    action()

        thread = threading.Thread(target=work, name="upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join()

    def _lock(self) -> str | None:
        """Take the lock; says which folder was the last to be copied here."""
        found = self._read_lock()
        if found.get("host"):
            who = f"host {found['host']}, process {found.get('process')}, {found.get('since')}"
            self.say(f"{self.url} is in use or was left by a run that was killed ({who}); waiting")
            until = time.monotonic() + EXPIRE_SECONDS
            while (again := self._read_lock()) == found and time.monotonic() < until:
                time.sleep(EXPIRE_SECONDS / 60)
            if again.get("host") and again != found:
                raise UserError(
                    f"another run is using {self.url} ({who}): "
                    "wait for it or stop it, or give another --out"
                )
        self._write_lock(self._own | {"copy": found.get("copy")})
        return found.get("copy")

    def _read_lock(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self._fs.cat_file(f"{self._root}/{_LOCK}"))
            return found if isinstance(found, dict) else {}
        return {}

    def _write_lock(self, content: dict[str, Any]) -> None:
        content = content | {"renewed": now(), "number": secrets.token_hex(4)}
        self._fs.pipe_file(f"{self._root}/{_LOCK}", json.dumps(content).encode())

    def _renew(self) -> None:
        found = self._read_lock()
        if found.get("owner") != self._own["owner"]:
            self.failure = UserError(f"another run has taken {self.url} over")
            raise self.failure
        self._write_lock(found)

    def _unlock(self) -> None:
        with contextlib.suppress(Exception):  # then it expires
            found = self._read_lock()
            if found.get("owner") != self._own["owner"]:
                return
            if found.get("copy") is None:
                self._fs.rm_file(f"{self._root}/{_LOCK}")
            else:
                self._write_lock({"copy": found["copy"]})

    def _fetch(self, copy: str | None) -> None:
        """Make the folder what the URL holds, unless it is a copy that may be newer."""
        sizes = {
            name[len(self._root) + 1 :]: info["size"]
            for name, info in self._fs.find(self._root, detail=True).items()
            if not name.endswith("/")  # an empty object that stands for a folder
        }
        if sizes.keys() - {_LOCK} and "config.json" not in sizes:
            raise UserError(f"--out {self.url} holds files that are not of a run: give another")
        listed = self._read_lists(sizes)
        if not self._is_copy(copy, max(map(int, listed), default=-1)):
            if self.folder.exists():
                aside = free_path(self.folder.with_name(f"{self.folder.name}-before"))
                self.folder.rename(aside)
                self.say(f"{self.folder} is not what {self.url} holds: moved to {aside}")
            names = [n for n in sizes if n != _LOCK and not n.startswith("checkpoints/")]
            names += [f"checkpoints/{step}/{n}" for step, files in listed.items() for n in files]
            copy = secrets.token_hex(8)
            with replace_folder(self.folder) as new:
                self._get(names, new)
                (new / _COPY).write_text(copy)
            self._files = _files(self.folder)
            self._write_lock(self._own | {"copy": copy})
        for step, files in listed.items():
            local = _files(self.folder / "checkpoints" / step)
            same = {name: size for name, (size, _) in local.items()} == files
            self._checkpoints[step] = local if same else {}

    def _is_copy(self, copy: str | None, newest: int) -> bool:
        """Was the folder the last that was copied, and has it checkpoint ``newest`` or a later?"""
        mark = self.folder / _COPY
        if copy is None or not mark.exists() or mark.read_text() != copy:
            return False
        return max(map(int, self._steps()), default=-1) >= newest

    def _read_lists(self, sizes: dict[str, int]) -> dict[str, dict[str, int]]:
        """Step -> the sizes of its files, of every checkpoint that is whole."""
        folders = {name.split("/")[1] for name in sizes if name.startswith("checkpoints/")}
        listed = {}
        for step in sorted(name for name in folders if name.isdecimal()):
            files = {}
            if f"checkpoints/{step}.json" in sizes:
                with contextlib.suppress(ValueError, TypeError):
                    files = dict(json.loads(self._fs.cat_file(self._list(step))))
            if files and all(sizes.get(f"checkpoints/{step}/{n}") == s for n, s in files.items()):
                listed[step] = files
            else:
                self.say(f"warning: checkpoint {int(step)} at {self.url} is not whole; left out")
                self._checkpoints[step] = {}  # the next upload removes it
        return listed

    def _get(self, names: list[str], folder: Path) -> None:
        """Fetch these files into the folder; UserError if one would not be below it."""
        for name in names:
            if {"", ".", ".."} & set(name.split("/")):
                raise UserError(f"{self.url}: {name!r} is no name of a file of a run")
        if names:
            self.say(f"fetching the run from {self.url} ...")
            self._fs.get([f"{self._root}/{n}" for n in names], [str(folder / n) for n in names])

    def _try_upload(self) -> None:
        try:
            self._upload()
            self._down = False
        except UserError:
            pass  # the run is about to stop for it
        except Exception as error:
            if not self._down:
                reason = first_line(error, 200)
                self.say(f"warning: cannot upload to {self.url} ({reason}); trying again")
            self._down = True

    def _upload(self) -> None:
        """Bring the URL up to date."""
        self._renew()
        last = "export/training.json"  # which says what the other exported files are
        self._upload_files(lambda name: name == "config.json")  # which says that it is a run's
        self._upload_checkpoints()
        self._upload_files(lambda name: name != last)
        self._upload_files(lambda name: name == last)

    def _upload_checkpoints(self) -> None:
        steps = self._steps()
        for step in steps:
            path = self.folder / "checkpoints" / step
            files = _files(path)
            if files and files != self._checkpoints.get(step):
                with _unless_gone(path):
                    self._remove(step)
                    self._checkpoints[step] = {}  # of what may be there from here on
                    self._put(path, files, f"checkpoints/{step}/")
                    sizes = {name: size for name, (size, _) in files.items()}
                    self._fs.pipe_file(self._list(step), json.dumps(sizes).encode())
                    self._checkpoints[step] = files
        for step in self._checkpoints.keys() - set(steps):
            self._remove(step)

    def _upload_files(self, wanted: Callable[[str], bool]) -> None:
        """Those that have changed, of what is no checkpoint."""
        changed = {
            name: about
            for name, about in _files(self.folder).items()
            if self._files.get(name) != about and not name.startswith("checkpoints/")
        }
        names = [name for name in changed if wanted(name)]
        with _unless_gone(*(self.folder / name for name in names)):
            self._put(self.folder, names, "")
            self._files |= {name: changed[name] for name in names}

    def _put(self, folder: Path, names: Iterable[str], place: str) -> None:
        there = [f"{self._root}/{place}{name}" for name in names]
        if there:
            self._fs.put([str(folder / name) for name in names], there)

    def _remove(self, step: str) -> None:
        if step in self._checkpoints:
            for place in (self._list(step), f"{self._root}/checkpoints/{step}"):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(place, recursive=True)
            del self._checkpoints[step]

    def _list(self, step: str) -> str:
        return f"{self._root}/checkpoints/{step}.json"

    def _steps(self) -> list[str]:
        """The names of the checkpoints in the folder, in their order."""
        found = (path.name for path in self.folder.glob("checkpoints/*"))
        return sorted(name for name in found if name.isdecimal())


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system, which takes credentials from the environment, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(f"--out {url} needs: pip install 'fact-jax[cloud]' ({error})") from error
    except ValueError as error:
        raise UserError(f"--out {url}: {first_line(error, 200)}") from error


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has its own: no bucket, no credentials, no network
        raise UserError(f"{what} ({first_line(error, 200)})") from error


@contextlib.contextmanager
def _unless_gone(*paths: Path) -> Iterator[None]:
    """What the run removes or replaces meanwhile is looked at again the next time."""
    try:
        yield
    except FileNotFoundError:
        if all(path.exists() for path in paths):
            raise


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Path below the folder -> size and time of change of its files; hidden ones are temporary."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not name.startswith(".") and "/." not in name:
                found[name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found
