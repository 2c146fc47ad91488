"""Output paths: what may be replaced, and what is refused before anything is read.

A folder that was written here holds a list of its files, so that ``--force`` replaces those and
never what somebody else put there.
"""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from fact_convert.io.json_io import read_json
from fact_jax.utils.command_line import version_of
from fact_jax.utils.errors import UserError, listed
from fact_jax.utils.files import recover, replace_folder, require_elsewhere

MANIFEST = ".fact-jax.json"
"""In a folder that was written here: its files and their sizes."""
FILE_ENDINGS = (
    *(".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".onnx"),
    *(".gguf", ".ggml", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".hdf5", ".msgpack", ".pb"),
    *(".tflite", ".zip", ".tar", ".gz", ".7z", ".json", ".yaml", ".txt", ".png", ".jpg", ".jpeg"),
)
"""Endings of files, which no folder gets by mistake."""


@contextlib.contextmanager
def output_folder(path: str | os.PathLike, *, force: bool) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that becomes ``path`` when all went well.

    Raises UserError if ``path`` is there already, unless it is an empty folder, or ``force`` and it
    holds nothing but what was written here before: then it is replaced, and an exception leaves it
    as it was.
    """
    path = Path(path)
    check_folder(path, force=force)
    with replace_folder(path, replace=force) as folder:
        yield folder
        files = {name: found.st_size for name, found in sorted(_files(folder))}
        about = {"software": f"fact-jax {version_of()}", "files": files}
        (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        check_folder(path, force=force)  # it may have changed meanwhile


def check_folder(path: Path, *, force: bool | None) -> None:
    """UserError unless a folder can be written at ``path``: see :func:`output_folder`.

    ``force`` is None where it is not offered.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link; name the folder itself")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path}: is a file, where a folder is to be written")
    if not (held := [entry.name for entry in path.iterdir()]):
        return
    if not force:
        other = "" if force is None else ", or force it"
        raise UserError(f"{path}: exists already; choose another name{other}")
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path}: not replaced, since no run wrote it: it holds {listed(sorted(held))}; remove "
            "it yourself, or choose another name"
        )
    known = read_json(path / MANIFEST).get("files")
    known = known if isinstance(known, dict) else {}
    strange = [
        name
        for name, found in _files(path)
        if name != MANIFEST
        and not (stat.S_ISREG(found.st_mode) and known.get(name) == found.st_size)
    ]
    if strange:
        raise UserError(
            f"{path}: not replaced, since not everything in it is as it was written: "
            f"{listed(sorted(strange))}; move that away, or choose another name"
        )


def check_output(out: Path, inputs: Iterable[Path | None], *, folder: bool, force: bool) -> None:
    """UserError unless ``out`` is a place that can be written to; nothing is written yet.

    ``inputs`` are the paths that are read, as far as they are given: ``out`` must not be one of
    them, in one of them, or around one of them.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError as err:
        raise UserError(f"{str(out)!a}: not a name in UTF-8") from err
    target = Path(os.path.realpath(out))
    for given in inputs:
        if given is not None and given.exists():
            _check_apart(out, target, given)
    if folder:
        require_elsewhere(out)
    if out.name in ("", ".."):
        raise UserError(f"{out}: has no name of its own; name what shall be written")
    if folder and out.suffix.lower() in FILE_ENDINGS:
        raise UserError(
            f"{out}: a folder is to be written, and none ends in {out.suffix}; a file for PyTorch "
            "ends in .safetensors, .ckpt or .pt"
        )
    _check_parent(out)
    if folder:
        check_folder(out, force=force)
    elif out.is_dir():
        raise UserError(f"{out}: is a folder, where a file is to be written")
    elif os.path.lexists(out) and not out.is_file():
        raise UserError(f"{out}: is neither a file nor a folder")
    elif out.exists() and not force:
        raise UserError(f"{out}: exists already; --force replaces it")


def claim_output(out: Path, *, force: bool) -> None:
    """Remove temporary files of killed runs. UserError if another run is writing ``out``."""
    if recover(out) and not force:
        raise UserError(f"{out}: another run is writing it")


def check_free_space(out: Path, size: int) -> None:
    """UserError if the disk has less than ``size`` bytes free."""
    disk = shutil.disk_usage(_nearest_parent(out))
    if disk.total and disk.free < size:  # some file systems do not know
        raise UserError(f"{out}: takes {_bytes(size)}, and only {_bytes(disk.free)} are free there")


def _check_apart(out: Path, target: Path, given: Path) -> None:
    source = Path(os.path.realpath(given))
    if target == source or (out.exists() and out.samefile(given)):
        raise UserError(f"{out}: is read as well, and would be replaced; choose another name")
    if target in source.parents:
        raise UserError(f"{out}: holds {given}, which is read; choose another place")
    if source in target.parents:
        raise UserError(f"{out}: lies in {given}, which is read; choose another place")


def _check_parent(out: Path) -> None:
    above = _nearest_parent(out)
    if not above.is_dir():
        raise UserError(f"{out}: cannot be written, {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{out}: no permission to write in {above}")


def _nearest_parent(out: Path) -> Path:
    """The nearest thing above ``out`` that exists."""
    return next(above for above in (out.absolute()).parents if os.path.lexists(above))


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder but folders, by its path in it. Of a link, what it is itself."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in names + links:
            path = Path(root, name)
            yield path.relative_to(folder).as_posix(), path.lstat()


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
