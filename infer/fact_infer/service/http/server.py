"""The HTTP server's process: from its first to its last request."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fact_infer.service.engine import Engine
from fact_jax.utils.errors import UserError

GRACE = 10.0
_HEADER_SECONDS = 20.0
_CONNECTIONS = 512


class _Protocol(H11Protocol):
    """Closes a connection whose first request has not begun in time; its body has a time too."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_HEADER_SECONDS, self._check)

    def _check(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """A first signal lets what is drawn finish, a second ends at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine
        self.signal: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, which would hide a clean exit.
        before = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            self.should_exit = self.force_exit = True
            return
        self.signal = number
        print("ending: what is drawn is finished, the rest refused", file=sys.stderr)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._engine.drain(GRACE)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._engine.failed is not None:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; UserError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}") from None
    return found


def run(
    app: FastAPI, engine: Engine, sock: socket.socket, ready: Callable[[str], None]
) -> int | None:
    """Serve until a signal ends it; gives the exit status.

    ``ready`` is called with the address once models are loaded. Raises what went wrong in loading.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config, engine)
    host, port = sock.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def announce() -> None:
        while not (engine.ready or engine.failed or server.should_exit):
            threading.Event().wait(0.05)
        if engine.ready:
            ready(where)

    threading.Thread(target=announce, daemon=True).start()
    asyncio.run(server.serve(sockets=[sock]))
    if engine.failed is not None:
        raise engine.failed
    return None if server.signal is None else 128 + server.signal if server.force_exit else 0
