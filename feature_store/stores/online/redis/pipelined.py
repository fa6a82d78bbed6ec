"""One connection to a Redis node that serves all requests of an event loop: they are written as they come and answered
in turn, so that requests under way together share system calls and round trips.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, cast

import hiredis

from feature_store.stores.online.redis.failures import Failure, Lost, Overdue, Unreached, Untrusted, said
from feature_store.stores.online.redis.greeting import Greeting
from feature_store.stores.online.redis.settings import Address

#: What a request ends in: all its answers, errors among them as values, or why there are none. A value and no
#: exception, for nobody may be left who waits for it.
Outcome = list[Any] | Failure


class _Waiting:
    """A request that waits for so many answers more, until `due` at the latest."""

    __slots__ = ("answers", "due", "future", "missing")

    def __init__(self, due: float, missing: int, future: asyncio.Future[Outcome]) -> None:
        self.due, self.missing, self.future = due, missing, future
        self.answers: list[Any] = []


class PipelinedConnection(asyncio.Protocol):
    """A connection under way or open. `timeout` in seconds bounds the wait for any answer."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self.closed = False
        self._named = f"{address[0]}:{address[1]}"
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[_Waiting] = deque()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, address: Address, greeting: Greeting, timeout: float) -> PipelinedConnection:
        """One whose server knows us, and that may be used. Raises Failure, or ConfigError for how either is set up."""
        tls = greeting.connection.tls
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, made = await loop.create_connection(lambda: cls(address, timeout), *address, ssl=tls)
        except TimeoutError as error:
            raise Overdue("did not take a connection in time") from error
        except ssl.SSLEOFError as error:
            raise Unreached(f"{address[0]}:{address[1]} closed the connection") from error
        except ssl.SSLError as error:
            raise Untrusted(f"{address[0]}:{address[1]}: {said(error)}") from error
        except OSError as error:
            raise Unreached(f"{address[0]}:{address[1]}: {said(error)}") from error
        try:
            answers = await made.send(greeting.data, greeting.count)
            if isinstance(answers, Failure):
                raise answers
            greeting.check(answers, address)
        except BaseException:
            made.close()
            raise
        return made

    def send(self, data: bytes, count: int) -> asyncio.Future[Outcome]:
        """Sends so many packed commands, with those of others in the same turn of the loop."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if self.closed:
            future.set_result(Unreached(f"the connection to {self._named} is closed"))
            return future
        self._waiting.append(_Waiting(self._loop.time() + self._timeout, count, future))
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look_after)
        return future

    def close(self) -> None:
        """Gives up whatever is under way. To be called in the loop's own thread."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(Lost(f"the connection to {self._named} was closed"))

    # -- asyncio's protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not False:
                self._take(answer)
        except hiredis.ProtocolError as error:
            self._abort(Lost(f"{self._named} answered what is no answer of Redis: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        why = said(exc) if isinstance(exc, OSError) else "the connection was closed"
        self._lose(Lost(f"{self._named}: {why}"))

    # -- inside -------------------------------------------------------------------------------------------------

    def _take(self, answer: Any) -> None:
        """Gives an answer to the request whose turn it is, also where nobody waits for it any more."""
        if not self._waiting:
            raise hiredis.ProtocolError("an answer that nobody asked for")
        first = self._waiting[0]
        first.answers.append(answer)
        first.missing -= 1
        if not first.missing:
            self._waiting.popleft()
            if not first.future.done():
                first.future.set_result(first.answers)

    def _flush(self) -> None:
        data, self._out = b"".join(self._out), []
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    def _look_after(self) -> None:
        """Gives up a connection whose oldest question was not answered in time: the others would be late too."""
        self._watch = None
        if not self._waiting:
            return
        due = self._waiting[0].due
        if due <= self._loop.time():
            self._abort(Overdue(f"{self._named} did not answer in time"))
        else:
            self._watch = self._loop.call_at(due, self._look_after)

    def _abort(self, failure: Failure) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._lose(failure)

    def _lose(self, failure: Failure) -> None:
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_result(failure)
