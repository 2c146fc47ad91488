"""``fact-infer serve`` and ``ui`` as programs, on the shipped miniature."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import httpx

from tests.infer.service.conftest import MINIATURE


@contextlib.contextmanager
def program(*words):
    """The running program and a client of it, once models are loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fact_infer", *words, "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=MINIATURE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/readyz").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(process.communicate()[1])
            time.sleep(0.1)
        yield process, client
    finally:
        client.close()
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
