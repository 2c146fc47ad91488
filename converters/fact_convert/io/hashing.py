"""SHA-256 of tensors and files: the content hash in our files' metadata."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fact_convert.io.lazy_tensor import LazyTensor, release
from fact_convert.io.parallel import thread_map
from fact_jax.utils.errors import UserError

CONTENT = "content"
"""Where a file's metadata says what it holds: the :func:`content_hash` of its tensors."""
_HASH = re.compile(r"[0-9a-f]{64}")


def content_hash(tensors: Iterable[tuple[str, np.ndarray | LazyTensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and data, independent of order and file format."""
    named = list(tensors)

    def line(entry: tuple[str, np.ndarray | LazyTensor]) -> str:
        array = np.asarray(entry[1])
        text = tensor_line(entry[0], array, tensor_sha256(array))
        release(array)
        return text

    return combined_sha256(thread_map(line, named))


def check_content(
    path: str | os.PathLike, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """UserError if a file's tensors are not those whose hash its metadata carries.

    A few are read at a time. Files of other programs carry none, and are not read.
    """
    said = metadata.get(CONTENT, "")
    if _HASH.fullmatch(said) and content_hash(state.items()) != said:
        raise UserError(
            f"{path}: damaged, or changed by another program: its tensors are not those that were "
            "written (metadata 'content')"
        )


def tensor_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's data in C order."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat.data).hexdigest()


def tensor_line(name: str, array: np.ndarray | LazyTensor, numbers: str) -> str:
    """One tensor's line for :func:`combined_sha256`; ``numbers`` is its digest."""
    return f"{name} {array.dtype.name} {list(array.shape)} {numbers}\n"


def combined_sha256(lines: Iterable[str]) -> str:
    """The content hash of tensors given by their :func:`tensor_line`."""
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as sha256sum has it."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
