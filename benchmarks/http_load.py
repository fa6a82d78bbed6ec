"""A load generator for one machine: keep-alive connections over which prebuilt requests go, one process, no threads.

A loop over epoll rather than asyncio: it must cost far less a request than any server under it.
"""

from __future__ import annotations

import gc
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

#: Seconds without any answer after which a server counts as stuck.
_PATIENCE = 60.0
_RECEIVED_AT_ONCE = 1 << 18
_LONGEST_HEAD = 4_096
#: Bytes of a wrong answer that an error tells.
_TOLD = 300
_LENGTH = b"\r\ncontent-length:"


class LoadFailed(Exception):
    """A server that answered something else than 200 with a length, closed a connection, or did not answer."""


@dataclass(frozen=True)
class Load:
    """What came back within `seconds`: how many answers and bytes of their bodies, how long each took from the send
    (seconds), and the processor time of this process.
    """

    seconds: float
    answers: int
    size: int
    durations: list[float] = field(repr=False)
    cpu: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds

    def percentile(self, percent: float) -> float:
        """Seconds of an answer."""
        return float(np.percentile(self.durations, percent))


def post(host: str, path: str, body: bytes) -> bytes:
    """A request as it goes over the wire."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask(address: tuple[str, int], request: bytes) -> bytes:
    """The body of one answer. Raises LoadFailed, OSError."""
    with socket.create_connection(address) as plug:
        connection = _Connection(plug)
        connection.send(request)
        while not connection.receive():
            pass
        return connection.body


def run_load(address: tuple[str, int], requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Sends the requests in turn over so many connections, the next one of a connection when the last is answered.

    What is on its way when the time is up is waited for, not counted. Raises LoadFailed, OSError.
    """
    gc.collect()
    with ExitStack() as open_ones, selectors.DefaultSelector() as ready:
        plugs = [open_ones.enter_context(socket.create_connection(address)) for _ in range(connections)]
        waiting = cycle(requests)
        cpu, start = time.process_time(), time.perf_counter()
        for plug in plugs:
            connection = _Connection(plug)
            ready.register(plug, selectors.EVENT_READ, connection)
            connection.send(next(waiting))
        durations, size = _answers(ready, waiting, start + seconds)
        _drain(ready)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Load(min(elapsed, seconds), len(durations), size, durations, cpu)


def _answers(ready: selectors.BaseSelector, waiting: Iterator[bytes], end: float) -> tuple[list[float], int]:
    """How long every answer before `end` took, and the bytes of all."""
    durations, size = [], 0
    while time.perf_counter() < end:
        for key, _ in _select(ready):
            connection: _Connection = key.data
            if not connection.receive():
                continue
            now = time.perf_counter()
            if now > end:
                ready.unregister(key.fileobj)
                continue
            durations.append(now - connection.sent)
            size += connection.size
            connection.send(next(waiting))
    return durations, size


def _drain(ready: selectors.BaseSelector) -> None:
    while ready.get_map():
        for key, _ in _select(ready):
            if key.data.receive():
                ready.unregister(key.fileobj)


def _select(ready: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
    found = ready.select(_PATIENCE)
    if not found:
        raise LoadFailed(f"no answer for {_PATIENCE:g} s")
    return found


class _Connection:
    """One keep-alive connection with at most one request on its way.

    `sent` is when that one went out (by time.perf_counter), `size` the bytes of its answer's body.
    """

    def __init__(self, plug: socket.socket) -> None:
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._plug = plug
        self._buffer = memoryview(bytearray(_RECEIVED_AT_ONCE))
        self._have = self._head = self.size = 0
        self.sent = 0.0

    @property
    def body(self) -> bytes:
        """Of a complete answer."""
        return bytes(self._buffer[self._head : self._head + self.size])

    def send(self, request: bytes) -> None:
        self.sent = time.perf_counter()
        self._have = self._head = 0
        self._plug.sendall(request)

    def receive(self) -> bool:
        """Takes what has arrived; whether the answer is complete."""
        arrived = self._plug.recv_into(self._buffer[self._have :])
        if not arrived:
            raise LoadFailed(f"connection closed after {self._have} bytes of an answer")
        self._have += arrived
        if not self._head and not self._read_head():
            return False
        return self._have >= self._head + self.size

    def _read_head(self) -> bool:
        """Finds the end of the head and the length of the body, once the head is there."""
        received = bytes(self._buffer[: min(self._have, _LONGEST_HEAD)])
        end = received.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        head = received[:end].lower()
        place = head.find(_LENGTH)
        if not head.startswith(b"http/1.1 200 ") or place < 0:
            raise LoadFailed(f"not a 200 with a length: {received[:_TOLD].decode(errors='replace')}")
        self.size = int(head[place + len(_LENGTH) : head.index(b"\r", place + 2)])
        self._head = end
        if end + self.size > len(self._buffer):
            larger = memoryview(bytearray(end + self.size))
            larger[: self._have] = self._buffer[: self._have]
            self._buffer = larger
        return True
