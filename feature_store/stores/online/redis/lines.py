"""The connections of one event loop: one to each node, opened by whoever needs it first, closed when the loop ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from feature_store.errors import ConfigError
from feature_store.stores.online.redis.failures import Failure, Lost
from feature_store.stores.online.redis.pipelined import PipelinedConnection
from feature_store.stores.online.redis.settings import Address

Result = TypeVar("Result")

Open = Callable[[Address], Awaitable[PipelinedConnection]]


class Lines:
    """The connections of the running loop, by node. To be used in its thread only."""

    def __init__(self, connect: Open, ended: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._connect, self._ended = connect, ended
        self._lines: dict[Address, PipelinedConnection] = {}
        self._tasks: dict[object, asyncio.Task[Any]] = {}
        self._keeper: AsyncGenerator[None] | None = None
        self._closed = False

    def ready(self, address: Address) -> PipelinedConnection | None:
        """The connection to a node, if it is open."""
        found = self._lines.get(address)
        return found if found is not None and not found.closed else None

    async def to(self, address: Address) -> PipelinedConnection | Failure | ConfigError:
        """The connection to a node, or why there is none."""
        found = self.ready(address)
        return found if found is not None else await self.together(address, lambda: self._opened(address))

    async def together(
        self, what: object, do: Callable[[], Coroutine[Any, Any, Result]]
    ) -> Result | Failure | ConfigError:
        """What `do` results in, done once for all who want it meanwhile. It goes on when one of them is cancelled."""
        task = self._tasks.get(what)
        if task is None:
            # The error as a value: where all who waited were cancelled, nobody would fetch an exception.
            task = self._tasks[what] = self.loop.create_task(_as_value(do()))
            task.add_done_callback(lambda _: self._tasks.pop(what, None))
        return await asyncio.shield(task)

    def keep_only(self, addresses: Sequence[Address]) -> None:
        """Closes connections to nodes that are none of these: they are no masters any more."""
        for address in self._lines.keys() - set(addresses):
            self._lines.pop(address).close()

    def close(self) -> None:
        """Closes all connections; those that are being opened when they are open. Nobody who waits is cancelled."""
        self._closed = True
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    async def _opened(self, address: Address) -> PipelinedConnection:
        if self._keeper is None:
            self._keeper = self._until_the_loop_ends()
            await anext(self._keeper)
        made = await self._connect(address)
        if self._closed:
            made.close()
            raise Lost("the store was closed")
        self._lines[address] = made
        return made

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        """Loops close what generators are left when they end, and nothing else tells of their end."""
        try:
            yield
        finally:
            self.close()
            self._ended()


async def _as_value(doing: Coroutine[Any, Any, Result]) -> Result | Failure | ConfigError:
    try:
        return await doing
    except (Failure, ConfigError) as error:
        return error
