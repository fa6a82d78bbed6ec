"""Blocking connections to Redis nodes, and the few of each node that threads share."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import hiredis

from feature_store.stores.online.redis.failures import Crowded, Lost, Overdue, Passing, Unreached, Untrusted, said
from feature_store.stores.online.redis.greeting import Greeting
from feature_store.stores.online.redis.settings import Address, Connection

_RECEIVED = 1 << 16


class BlockingConnection:
    """One connection, for one thread at a time. Every wait ends at a `deadline` of the monotonic clock.

    Raises Failure: Unreached before anything was sent, Lost or Overdue afterwards.
    """

    def __init__(self, address: Address, connection: Connection, deadline: float) -> None:
        self.address = address
        self.run_id = ""
        #: Answers that are still to come: whoever asks next would take them for its own.
        self.awaited = 0
        self._reader = hiredis.Reader()
        self._socket = _connected(address, connection.tls, deadline)
        # Also where nobody closes it: who drops a store need not know that it has connections.
        self._finally = weakref.finalize(self, self._socket.close)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @classmethod
    def greeted(cls, address: Address, greeting: Greeting, deadline: float) -> BlockingConnection:
        """One whose server knows us, and that may be used. Raises ConfigError too, for how the server is set up."""
        made = cls(address, greeting.connection, deadline)
        try:
            made.run_id = greeting.check(made.ask(greeting.data, greeting.count, deadline), address)
        except Lost as failure:
            made.close()
            raise Unreached(str(failure)) from failure
        except BaseException:
            made.close()
            raise
        return made

    def ask(self, data: bytes, count: int, deadline: float) -> list[Any]:
        """The answers to so many commands, errors as values."""
        self.send(data, count, deadline)
        answers: list[Any] = []
        self.receive(answers, deadline)
        return answers

    def send(self, data: bytes, count: int, deadline: float) -> None:
        self.awaited += count
        left: bytes | memoryview = data
        try:
            while left:
                self._until(deadline)
                taken = self._socket.send(left)
                if taken == len(left):
                    return
                left = memoryview(left)[taken:]
        except (TimeoutError, BlockingIOError, ssl.SSLWantWriteError) as error:
            raise Overdue(f"{_named(self.address)} did not take the request in time") from error
        except OSError as error:
            raise Lost(f"{_named(self.address)}: {said(error)}") from error

    def receive(self, answers: list[Any], deadline: float) -> None:
        """Adds all answers that are awaited, or those that came; what has arrived at the deadline still counts."""
        try:
            while self.awaited:
                self._until(deadline)
                data = self._socket.recv(_RECEIVED)
                if not data:
                    raise Lost(f"{_named(self.address)} closed the connection")
                self._reader.feed(data)
                while self.awaited and (answer := self._reader.gets()) is not False:
                    answers.append(answer)
                    self.awaited -= 1
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError) as error:
            raise Overdue(f"{_named(self.address)} did not answer in time") from error
        except OSError as error:
            raise Lost(f"{_named(self.address)}: {said(error)}") from error
        except hiredis.ProtocolError as error:
            raise Lost(f"{_named(self.address)} answered what is no answer of Redis: {error}") from error

    def usable(self) -> bool:
        """Whether it is open as far as this side knows, and nothing lies there that nobody asked for."""
        return not self._reader.has_data() and not self._poll.poll(0)

    def close(self) -> None:
        self._finally()

    def _until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        self._socket.settimeout(left if left > 0 else 0)


class Pool:
    """The connections to one node. A thread takes one and gives it back, in whatever state; there are at most `most`
    at a time where that is not None.
    """

    def __init__(self, connect: Callable[[float], BlockingConnection], most: int | None = None) -> None:
        self._connect = connect
        self._room = threading.Semaphore(most) if most else None
        self._idle: list[BlockingConnection] = []
        self._closed = False

    def take(self, deadline: float) -> BlockingConnection:
        """One for the caller alone. Raises Failure, ConfigError."""
        if self._room and not self._room.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise Crowded("all max_connections connections are in use")
        try:
            return self._usable() or self._connect(deadline)
        except BaseException:
            self._make_room()
            raise

    def give(self, connection: BlockingConnection) -> None:
        """Takes one back. A connection that an answer may still come on is closed."""
        if connection.awaited or self._closed:
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:  # meanwhile
                self.close()
        self._make_room()

    def close(self) -> None:
        """Closes those that nobody uses now; the others are when they are given back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _usable(self) -> BlockingConnection | None:
        while self._idle:
            try:
                found = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if found.usable():
                return found
            found.close()
        return None

    def _make_room(self) -> None:
        if self._room:
            self._room.release()


def _connected(address: Address, tls: ssl.SSLContext | None, deadline: float) -> socket.socket:
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreached(f"{_named(address)}: {said(error)}") from error
    failure: Passing = Unreached(f"{_named(address)} has no address")
    for place, (family, kind, protocol, _, name) in enumerate(found):
        # Each has its share of the time: one that swallows everything must not keep us from the others.
        share = max(deadline - time.monotonic(), 0) / (len(found) - place)
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(share)
            made.connect(name)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return made if tls is None else _secured(made, tls, address, deadline)
        except (TimeoutError, BlockingIOError) as error:
            made.close()
            failure = Overdue(f"{_named(address)} did not answer in time")
            failure.__cause__ = error
        except OSError as error:
            made.close()
            failure = Unreached(f"{_named(address)}: {said(error)}")
            failure.__cause__ = error
        except BaseException:
            made.close()
            raise
    raise failure


def _secured(plain: socket.socket, tls: ssl.SSLContext, address: Address, deadline: float) -> socket.socket:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    plain.settimeout(left)
    try:
        return tls.wrap_socket(plain, server_hostname=address[0])
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
        raise TimeoutError from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise  # it went away: a lost connection like any other
    except ssl.SSLError as error:
        raise Untrusted(f"{_named(address)}: {said(error)}") from error


def _named(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
