"""Liveness of the other processes of a run.

JAX notices a dead process by missing heartbeats, after a minute, and then aborts all others with
stack traces. A TCP connection to it breaks at once.
"""

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import jax

from fact_jax.utils.errors import UserError, first_line, printable
from fact_train.multihost.collectives import process_all, process_gather
from fact_train.multihost.processes import coordinator_host, host_name

_CONNECT_SECONDS = 10
# For a main thread that fails alike to end by itself, with what it has to say.
_FAILED_SECONDS = 3.0
_BYE = "bye"


class PeerMonitor:
    """While it is entered, a process that dies or fails ends all the others: one line, status 2.

    Every process holds a connection to process 0, which passes on what it hears. Use as a context
    manager; every process of a run enters and leaves it. A process alone has no peers.
    """

    def __init__(self) -> None:
        self._index, self._count = jax.process_index(), jax.process_count()
        self._connections: dict[int, socket.socket] = {}
        self._hosts: list[str] = []
        self._heard: tuple[str, bool] | None = None  # what to say, and is somebody gone?
        self._told, self._leaving = threading.Event(), threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> "PeerMonitor":
        if self._count > 1:
            with contextlib.suppress(OSError):  # then it is as JAX has it
                self._connect()
            if process_all(len(self._connections) == (1 if self._index else self._count - 1)):
                threading.Thread(target=self._listen, name="peers", daemon=True).start()
            else:
                self._close()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if not self._connections:
            return
        message = _BYE
        if error is not None:
            own = isinstance(error, UserError | KeyboardInterrupt | SystemExit)
            if not own:  # perhaps what a lost process does to a computation
                self._told.wait(_FAILED_SECONDS)
            if self._heard and (self._heard[1] or not own):
                self._end(self._heard[0])
            message = f"{self._name(self._index)}: {first_line(error, 300)}"
            # Nobody may come any more to where JAX lets all processes meet at the end.
            atexit.register(self._exit, _status(error))
        self._leaving.set()
        self._send(message)
        if error is None:
            self._close()

    def _connect(self) -> None:
        listener = None
        if self._index == 0:
            listener = socket.create_server(("", 0), backlog=self._count)
        port = listener.getsockname()[1] if listener else 0
        token = secrets.token_hex(16)
        said = process_gather(f"{host_name()} {coordinator_host() or host_name()} {port} {token}")
        self._hosts = [text.split()[0] for text in said]
        own, given, port, token = said[0].split()
        hello = f"{token} "
        if listener is None:
            connection = _reach([given, own], int(port))
            connection.sendall(f"{hello}{self._index:8d}".encode())
            self._connections[0] = connection
            return
        with listener:
            until = time.monotonic() + _CONNECT_SECONDS
            while len(self._connections) < self._count - 1:
                listener.settimeout(max(until - time.monotonic(), 0.01))
                connection, _ = listener.accept()
                connection.settimeout(1.0)
                text = connection.recv(len(hello) + 8, socket.MSG_WAITALL).decode(errors="replace")
                if text.startswith(hello):
                    self._connections[int(text[len(hello) :])] = connection
                else:
                    connection.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                _keep_alive(connection)
                selector.register(connection, selectors.EVENT_READ, (process, connection))
            while selector.get_map() and not self._leaving.is_set():
                for key, _ in selector.select(timeout=1.0):
                    process, connection = key.data
                    try:
                        text = connection.recv(4096).decode(errors="replace")
                    except OSError:
                        text = ""
                    if text == _BYE:
                        selector.unregister(connection)
                    elif not self._leaving.is_set():
                        return self._hear(text, process)

    def _hear(self, text: str, process: int) -> None:
        lost = not text or text.startswith("lost ")
        line = text.removeprefix("lost ") or f"{self._name(process)} is gone: it was killed, or its"
        line += "" if text else " host or the network failed"
        self._heard = line, lost
        self._told.set()
        if self._index == 0:
            self._send(f"lost {line}" if lost else line)
        # Where process 0 is lost JAX is about to abort: there is no time to lose.
        if lost or not self._leaving.wait(_FAILED_SECONDS):
            self._end(line)

    def _end(self, line: str) -> None:
        self._ending.acquire()  # for good: of the two threads one speaks, and ends the process
        advice = "start all again to go on from the newest checkpoint"
        with contextlib.suppress(OSError):
            os.write(2, f"error: {printable(line)}; {advice}\n".encode())
        self._exit(2)

    def _exit(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        until = time.monotonic() + _FAILED_SECONDS + 1.0
        # Process 0 goes last: JAX aborts the others when it does.
        for connection in self._connections.values() if self._index == 0 else ():
            with contextlib.suppress(OSError):
                connection.settimeout(max(until - time.monotonic(), 0.01))
                while connection.recv(4096):
                    pass
        os._exit(status)

    def _name(self, process: int) -> str:
        return f"process {process} of {self._count} ({self._hosts[process]})"

    def _send(self, text: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(text.encode())

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections = {}


def _status(error: BaseException) -> int:
    """The exit status that this error leads to."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | OSError | MemoryError) else 1


def _reach(hosts: list[str], port: int) -> socket.socket:
    """A connection to the first of these names of one host that answers; OSError if none does."""
    for host in hosts:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS / 4)
            connection.settimeout(None)
            return connection
    raise OSError(f"none of {hosts} answers at port {port}")


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice a host that is gone without a word within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # Linux; elsewhere the system's own times
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
