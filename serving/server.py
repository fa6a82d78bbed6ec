"""Runs an app with uvicorn: until the process is stopped, or in a thread for as long as a block lasts."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from feature_store.errors import IsochronError

#: uvicorn's own, which it sets up for the terminal.
logger = logging.getLogger("uvicorn.error")

#: Only this machine reaches the server unless it is told otherwise.
HOST = "127.0.0.1"
PORT = 8000

#: Seconds that requests under way get to end when the server stops.
_GRACE = 5

#: Seconds that an idle connection is kept: longer than clients keep theirs, or their next request meets a closed one.
_KEPT = 75

_APP_FAILED = "the app failed to start; the log says why"


class ServerNotStarted(IsochronError):
    """The server could not listen, or its app could not start."""

    def __init__(self, host: str, port: int, problem: str) -> None:
        self.host, self.port = host, port
        super().__init__(f"no server on {host}:{port}: {problem}.")


def run(app: Any, host: str = HOST, port: int = PORT) -> None:
    """Serves an ASGI app until the process gets SIGINT or SIGTERM. Raises ServerNotStarted."""
    listening = _listening(host, port)
    server = _Server(_config(app, host, port, "info"))
    logger.info("serving on %s; stop it with CTRL+C", _url(listening))
    server.run_on(listening)
    if not server.started:
        raise ServerNotStarted(host, port, _APP_FAILED)


@contextmanager
def running(app: Any, host: str = HOST, port: int = 0) -> Iterator[str]:
    """Serves an ASGI app in a thread and yields its base URL once it answers; port 0 is any free one.

    Requests under way when the block ends are answered first. Raises ServerNotStarted.
    """
    listening = _listening(host, port)
    server = _Server(_config(app, host, port, "warning"))
    address = _url(listening)
    thread = threading.Thread(target=server.run_on, args=(listening,), name="isochron-server", daemon=True)
    thread.start()
    server.settled.wait()
    try:
        if not server.started:
            raise ServerNotStarted(host, port, _APP_FAILED)
        yield address
    finally:
        server.should_exit = True
        thread.join()


#: Answers up to this many bytes leave in one write; of longer ones the copy would cost more than the second write.
_JOINED = 1 << 16


class _Transport:
    """A transport that sends the head of an answer together with its body.

    uvicorn writes one after the other, and each write is a system call and a packet: of a short answer that is half of
    what sending it costs.
    """

    def __init__(self, transport: Any) -> None:
        self._transport, self._head = transport, b""

    def write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if not head and data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and data[9:12] != b"100":
            self._head = data
        elif head and len(data) > _JOINED:
            self._transport.write(head)
            self._transport.write(data)
        else:
            self._transport.write(head + data if head else data)

    def flush(self) -> None:
        """Sends a head whose answer has no body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """HTTP as uvicorn speaks it, in fewer writes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._joining = _Transport(transport)
        super().connection_made(cast("asyncio.Transport", self._joining))

    def on_response_complete(self) -> None:
        self._joining.flush()
        super().on_response_complete()


class _Server(uvicorn.Server):
    """A server that says when its start is over, well or not."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the serving. The signal was answered then: uvicorn would raise it again, before anything is closed."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()

    def run_on(self, listening: socket.socket) -> None:
        """Serves until it is told to stop, and closes the socket."""
        try:
            with listening:
                self.run(sockets=[listening])
        except SystemExit:
            # How uvicorn leaves when the app fails to start, having logged why.
            if self.started:
                raise
        finally:
            self.settled.set()


def _config(app: Any, host: str, port: int, log_level: str) -> uvicorn.Config:
    # No access log: a line for each request takes time that a score has not, and the metrics count requests.
    return uvicorn.Config(
        app,
        host,
        port,
        log_level=log_level,
        access_log=False,
        http=_Protocol,
        ws="none",
        # Nothing asks who the client is behind a proxy.
        proxy_headers=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=_GRACE,
    )


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as cause:
        listening.close()
        raise ServerNotStarted(host, port, f"it cannot be bound ({cause})") from cause
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
