"""HTTP servers under test, each a process of its own on its core."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cores import cpu_seconds, pin
from benchmarks.http_load import LoadFailed, ask, post
from benchmarks.online_sides import HOST, Command

_PATIENCE = 60.0
_PAUSE = 0.05
_LOG_LINES = 15


class ServerFailed(Exception):
    """A server that ended or did not answer in time; the text is the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server and what requests go to. Its process leads a session of its own."""

    process: subprocess.Popen
    port: int
    path: str

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    def request(self, body: bytes) -> bytes:
        """A request to its path as it goes over the wire."""
        return post(HOST, self.path, body)

    def cpu_seconds(self) -> float:
        """Processor time its processes have used."""
        return cpu_seconds(self.process.pid)


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as plug:
        plug.bind((HOST, 0))
        return plug.getsockname()[1]


@contextmanager
def running(command: Command, port: int, core: int | None, first: bytes) -> Iterator[Server]:
    """The server, from its first answer to the body `first` on; it is gone afterwards. Raises ServerFailed."""
    log = command.folder / f"server-{port}.log"
    command.folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.arguments,
            cwd=command.folder,
            env={**os.environ, **command.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Its workers come later and stay on the core of the process that starts them.
    pin(process.pid, core)
    server = Server(process, port, command.path)
    try:
        _wait(server, server.request(first), log)
        yield server
    finally:
        _end(process)


def _wait(server: Server, request: bytes, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            ask(server.address, request)
            return
        except OSError as error:
            if server.process.poll() is not None or time.monotonic() > end:
                raise ServerFailed(_last_words(log)) from error
        except LoadFailed as error:
            raise ServerFailed(f"{error}\n{_last_words(log)}") from error
        time.sleep(_PAUSE)


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def _end(process: subprocess.Popen) -> None:
    """Ends the process and what it started: the session is its own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
