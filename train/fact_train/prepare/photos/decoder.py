"""Decoding in a process of its own, so that a photo which crashes or hangs a decoder stops nothing.

The process lives as long as this one. It answers each photo with its pixels, already shrunk, or
with what is wrong; where it hangs, or dies of a photo that is the first it was asked about, the
photo is rejected and another process takes its place.
"""

import contextlib
import functools
import json
import os
import resource
import select
import subprocess
import sys
import threading
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
    """Photos' bytes to pixels, one at a time; ``code`` is what its process runs."""

    def __init__(self, code: str = _SERVE, seconds: float = SECONDS):
        self._code, self._seconds = code, seconds
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(
        self, content: bytes, name: str, longest: int
    ) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """The photo in sRGB, no side over ``longest``, and height and width as stored, upright."""
        with self._lock:  # a runner of Beam has several threads
            head, pixels = self._ask(content, name, longest)
        if "error" in head:
            line = head["error"].removeprefix(name)  # which may say anything
            reason = next((why for part, why in _REASONS.items() if line.startswith(part)), None)
            raise RejectedError(reason or "not readable", head["error"])
        height, width = head["full"]
        return np.frombuffer(pixels, np.uint8).reshape(head["shape"]), (height, width)

    def _ask(self, content: bytes, name: str, longest: int) -> tuple[dict, bytes]:
        fresh = self._process is None
        if self._process is None:
            path = os.pathsep.join(part for part in sys.path if part)
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
                process_group=0,  # Ctrl-C is for this process, which ends the other
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, {"name": name, "longest": longest}, content)
            if not select.select([process.stdout], [], [], self._seconds)[0]:
                raise TimeoutError(f"takes longer than {self._seconds:g} s to decode")
            return _receive(process.stdout)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            hangs = isinstance(error, TimeoutError)
            if not (fresh or hangs):  # it may have ended by what was before this photo
                return self._ask(content, name, longest)
            what = str(error) if hangs else "crashes the decoder"
            raise RejectedError("not readable", f"{name} {what}") from None
        except BaseException:  # as Ctrl-C: the next photo is not to get this one's answer
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def decoder() -> Decoder:
    """The decoder of this process; one that was forked has its own."""
    return _decoder_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _decoder_of(process: int) -> Decoder:
    return Decoder()


def serve() -> None:
    """Answer photos until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    with open("/proc/self/statm", encoding="ascii") as opened:
        taken = int(opened.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = taken + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            _answer(answers, *_receive(sys.stdin.buffer))


def _answer(answers: BinaryIO, head: dict, content: bytes) -> None:
    found: dict[str, Any] = {}
    pixels = b""
    try:
        full = read_image(ImageBytes(content, head["name"]), to_srgb=True)
        image, _ = limit_side(full, np.zeros((5, 2), np.float32), head["longest"])
        found = {"shape": image.shape, "full": full.shape[:2]}
        pixels = np.ascontiguousarray(image).tobytes()
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:  # whatever a decoder does with what nobody thought of
        line = f"{head['name']} cannot be decoded: {type(error).__name__}: {one_line(error)}"
        found = {"error": line}
    _send(answers, found, pixels)


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
