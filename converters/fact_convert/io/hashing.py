"""SHA-256 of tensors and files: the content hash in our files' metadata."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fact_convert.io.lazy_tensor import State, release
from fact_convert.io.parallel import thread_map
from fact_jax.utils.errors import UserError

CONTENT = "content"
"""Where a file's metadata says what it holds: the :func:`content_hash` of its tensors."""
_HASH = re.compile(r"[0-9a-f]{64}")


def content_hash(state: State) -> str:
    """SHA-256 over names, dtypes, shapes and data, independent of order and file format."""

    def line(name: str) -> str:
        array = np.asarray(state[name])
        text = tensor_line(name, array)
        release(array)
        return text

    return combined_sha256(thread_map(line, list(state)))


def check_content(path: str | os.PathLike, state: State, metadata: Mapping[str, str]) -> None:
    """UserError if a file's tensors are not those whose hash its metadata carries.

    A few are read at a time. Files of other programs carry none, and are not read.
    """
    said = metadata.get(CONTENT, "")
    if _HASH.fullmatch(said) and content_hash(state) != said:
        raise UserError(
            f"{path}: damaged, or changed by another program: its tensors are not those that were "
            "written (metadata 'content')"
        )


def tensor_line(name: str, array: np.ndarray) -> str:
    """One tensor's line for :func:`combined_sha256`, with the SHA-256 of its data in C order."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(flat.data).hexdigest()
    return f"{name} {array.dtype.name} {list(array.shape)} {digest}\n"


def combined_sha256(lines: Iterable[str]) -> str:
    """The content hash of tensors given by their :func:`tensor_line`."""
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as sha256sum has it."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
