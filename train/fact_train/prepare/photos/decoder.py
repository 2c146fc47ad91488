"""Decoding in a process of its own, so that a photo which crashes or hangs a decoder stops nothing.

The process lives as long as this one. It answers each photo with its pixels, already shrunk, or
with what is wrong; where it dies, hangs or wants too much memory, the photo is rejected and
another process takes its place.
"""

import functools
import json
import os
import resource
import select
import subprocess
import sys
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from fact_jax.face import limit_side, read_image
from fact_jax.face.images import ImageBytes, one_line
from fact_jax.utils.errors import UserError
from fact_train.prepare.settings import RejectedError

SECONDS = 120.0
MEMORY = 6 << 30
"""Bytes beyond what the process takes anyhow: some copies of the largest photo."""
# What a line of ``read_image`` says after the name -> the reason that it is counted under.
_REASONS = {
    " is too small": "too small",
    " is too large": "too large",
    " is a HEIC picture": "HEIC",
}
_SERVE = "from fact_train.prepare.photos.decoder import serve; serve()"


class Decoder:
    """Photos' bytes to pixels; ``code`` is what its process runs."""

    def __init__(self, code: str = _SERVE, seconds: float = SECONDS):
        self._code, self._seconds = code, seconds
        self._process: subprocess.Popen | None = None

    def __call__(
        self, content: bytes, name: str, longest: int
    ) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """The photo in sRGB, no side over ``longest``, and height and width as stored, upright."""
        if self._process is None:
            path = os.pathsep.join(part for part in sys.path if part)
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, {"name": name, "longest": longest}, content)
            if not select.select([process.stdout], [], [], self._seconds)[0]:
                raise TimeoutError(f"takes longer than {self._seconds:g} s to decode")
            head, pixels = _receive(process.stdout)
        except (OSError, EOFError, ValueError) as error:
            what = str(error) if isinstance(error, TimeoutError) else "crashes the decoder"
            self.close()
            raise RejectedError("not readable", f"{name} {what}") from None
        if "error" in head:
            line = head["error"].removeprefix(name)  # which may say anything
            reason = next((why for part, why in _REASONS.items() if line.startswith(part)), None)
            raise RejectedError(reason or "not readable", head["error"])
        height, width = head["full"]
        return np.frombuffer(pixels, np.uint8).reshape(head["shape"]), (height, width)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


@functools.lru_cache(maxsize=1)
def decoder() -> Decoder:
    """The decoder of this process."""
    return Decoder()


def serve() -> None:
    """Answer photos until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    with open("/proc/self/statm", encoding="ascii") as opened:
        taken = int(opened.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = taken + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            head, content = _receive(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            full = read_image(ImageBytes(content, head["name"]), to_srgb=True)
            image, _ = limit_side(full, np.zeros((5, 2), np.float32), head["longest"])
            found = {"shape": image.shape, "full": full.shape[:2]}
            _send(answers, found, np.ascontiguousarray(image).tobytes())
        except UserError as error:
            _send(answers, {"error": str(error)}, b"")
        except Exception as error:  # whatever a decoder does with what nobody thought of
            line = f"{head['name']} cannot be decoded: {type(error).__name__}: {one_line(error)}"
            _send(answers, {"error": line}, b"")


def _send(stream: BinaryIO | Any, head: dict, content: bytes) -> None:
    line = json.dumps(head | {"bytes": len(content)}).encode() + b"\n"
    stream.write(line)
    stream.write(content)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> tuple[dict, bytes]:
    line = stream.readline()
    if not line:
        raise EOFError
    head = json.loads(line)
    content = stream.read(head["bytes"])
    if len(content) != head["bytes"]:
        raise EOFError
    return head, content
