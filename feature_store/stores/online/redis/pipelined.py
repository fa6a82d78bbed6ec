"""One connection to a Redis node that serves all requests of an event loop: they are written as they come and answered
in turn, so that requests under way together share system calls and round trips.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast

import hiredis
from redis import exceptions

from feature_store.stores.online.redis.settings import Connection

_Waiting = tuple[float, "asyncio.Future[Any]"]


class PipelinedConnection(asyncio.Protocol):
    """A connection under way or open. `timeout` in seconds bounds the wait for any answer."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[_Waiting] = deque()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.closed = False

    @classmethod
    async def open(cls, host: str, port: int, connection: Connection, timeout: float) -> PipelinedConnection:
        """Connects, says who we are and which database is meant. Raises Redis' own errors and OSError."""
        tls = connection.tls
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(
            lambda: cls(timeout), host, port, ssl=tls, server_hostname=host if tls and tls.check_hostname else None
        )
        _, made = await asyncio.wait_for(opening, timeout)
        try:
            options = connection.options
            if "password" in options:
                user = [options["username"]] if "username" in options else []
                await made.request("AUTH", *user, options["password"])
            if options.get("db"):
                await made.request("SELECT", str(options["db"]))
        except BaseException:
            made.close()
            raise
        return made

    async def request(self, *command: str | bytes) -> Any:
        """The answer to a command. Raises the error that Redis answers with, or of a lost connection."""
        answer = await self.send(hiredis.pack_command(command))  # type: ignore[arg-type]
        if isinstance(answer, hiredis.ReplyError):
            raise _error(answer)
        return answer

    def send(self, command: bytes) -> asyncio.Future[Any]:
        """Sends a packed command with those of the same turn of the loop; its answer, an error as a value."""
        future = self._loop.create_future()
        if self.closed or self._transport is None:
            future.set_exception(exceptions.ConnectionError("the connection is closed"))
            return future
        self._waiting.append((self._loop.time() + self._timeout, future))
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(command)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look_after)
        return future

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._lose(exceptions.ConnectionError("the connection was closed"))

    # -- asyncio's protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do what asyncio's do, and are of another class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not False:
                if not self._waiting:
                    raise hiredis.ProtocolError("an answer that nobody asked for")
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_result(answer)
        except hiredis.ProtocolError as error:
            self._abort(exceptions.ConnectionError(f"Redis answered what is no answer: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(exceptions.ConnectionError(f"the connection was lost: {exc or 'closed by Redis'}"))

    # -- inside -------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        data, self._out = b"".join(self._out), []
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    def _look_after(self) -> None:
        """Gives up a connection whose oldest question was not answered in time: the others would be late too."""
        self._watch = None
        if not self._waiting:
            return
        due = self._waiting[0][0]
        if due <= self._loop.time():
            self._abort(exceptions.TimeoutError("Redis did not answer in time"))
        else:
            self._watch = self._loop.call_at(due, self._look_after)

    def _abort(self, error: Exception) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)


def _error(answer: hiredis.ReplyError) -> exceptions.RedisError:
    text = str(answer)
    if text.startswith(("WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH", "ERR invalid password")):
        return exceptions.AuthenticationError(text)
    return exceptions.ResponseError(text)
