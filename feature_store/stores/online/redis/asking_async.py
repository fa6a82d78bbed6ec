"""Requests that do not hold up an event loop: over connections of its own, one to each node."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from feature_store.errors import ConfigError
from feature_store.stores.online.redis.calls import Batch, Call, batches
from feature_store.stores.online.redis.failures import Failure, Lost, Overdue, worse
from feature_store.stores.online.redis.lines import Lines
from feature_store.stores.online.redis.patience import Patience
from feature_store.stores.online.redis.pipelined import PipelinedConnection
from feature_store.stores.online.redis.settings import Address
from feature_store.stores.online.redis.site import Site

#: Batches with the open connections to their nodes.
_Ready = list[tuple[Batch, PipelinedConnection]]


class AskingAsync:
    """The requests of all event loops to one store. `learn` learns its nodes until a deadline, in a thread."""

    def __init__(self, site: Site, learn: Callable[[float], None]) -> None:
        self._site, self._learn = site, learn
        self._lines: dict[asyncio.AbstractEventLoop, Lines] = {}

    async def carry_out(self, calls: Sequence[Call]) -> None:
        """Has every call answered, tried again until the deadline where a failure may pass. Raises StoreError."""
        patience = Patience(self._site.timeout)
        lines = self._lines.get(asyncio.get_running_loop()) or self._new_lines()
        failure: Failure | None = None
        if ready := self._ready(calls, lines):
            # A connection looks after its own time; a timer for each request would be felt.
            failure = await self._exchange(ready)
            if failure is None:
                return
        await self._persist(calls, lines, patience, failure)

    async def answer(self, call: Call) -> Any:
        """The answer to one call, and the same otherwise: most reads are one, and what several need would be felt."""
        patience = Patience(self._site.timeout)
        lines = self._lines.get(asyncio.get_running_loop()) or self._new_lines()
        failure: Failure | None = None
        if line := self._line(call, lines):
            outcome = await line.send(call.data, 1)
            if isinstance(outcome, Failure):
                failure = self._site.doubted(line.address, outcome)
            elif not isinstance(outcome[0], hiredis.ReplyError):
                return outcome[0]
        await self._persist([call], lines, patience, failure)
        return call.answer

    def close(self) -> None:
        """Closes the connections of all loops, each in its own thread."""
        closed, self._lines = self._lines, {}
        for loop, lines in list(closed.items()):
            if loop.is_running():
                with contextlib.suppress(RuntimeError):  # it has ended, and closed them, in this moment
                    loop.call_soon_threadsafe(lines.close)
            elif not loop.is_closed():
                lines.close()

    async def _persist(self, calls: Sequence[Call], lines: Lines, patience: Patience, failure: Failure | None) -> None:
        """Goes on after a failure, or (None) where something was not ready, until the deadline."""
        try:
            async with asyncio.timeout(patience.left):
                while (failure := await self._try(calls, lines, patience, failure)) is not None:
                    pass
        except TimeoutError as error:
            self._doubt_nodes(calls)
            raise self._site.refusal(patience.reason(Overdue())) from error

    async def _try(
        self, calls: Sequence[Call], lines: Lines, patience: Patience, before: Failure | None
    ) -> Failure | None:
        if before is not None:
            await asyncio.sleep(self._site.pause(patience, before))
        due = [call for call in calls if call.open]
        if failure := await self._prepare(due, lines):
            return failure
        ready = self._ready(due, lines)
        return await self._exchange(ready) if ready else Lost("a connection was closed at once")

    async def _prepare(self, calls: Sequence[Call], lines: Lines) -> Failure | None:
        """Sees to it that nodes are known and connections open; why they are not. Raises ConfigError."""
        topology = self._site.topology
        if not topology.known:
            learned = await lines.together("nodes", self._learn_in_a_thread)
            if isinstance(learned, ConfigError):
                raise learned
            if learned is not None:
                return learned
            lines.keep_only(topology.masters())
        try:
            addresses = [batch.address for batch in batches(calls, topology)]
        except Failure as failure:
            return failure
        return await self._open(addresses, lines)

    async def _open(self, addresses: Sequence[Address], lines: Lines) -> Failure | None:
        worst: Failure | None = None
        for address, line in zip(addresses, await asyncio.gather(*map(lines.to, addresses)), strict=True):
            if isinstance(line, ConfigError):
                raise line
            if isinstance(line, Failure):
                worst = worse(worst, self._site.doubted(address, line))
        return worst

    async def _learn_in_a_thread(self) -> None:
        await asyncio.to_thread(self._learn, self._site.deadline)

    def _line(self, call: Call, lines: Lines) -> PipelinedConnection | None:
        """The open connection to the node of a call, if there is one."""
        topology = self._site.topology
        return lines.ready(topology.node(call.tag)) if topology.known else None

    def _ready(self, calls: Sequence[Call], lines: Lines) -> _Ready | None:
        """The batches of calls, where there is an open connection to the node of each."""
        if not self._site.topology.known:
            return None
        found: _Ready = []
        with contextlib.suppress(Failure):
            for batch in batches(calls, self._site.topology):
                line = lines.ready(batch.address)
                if line is None:
                    return None
                found.append((batch, line))
        return found or None

    async def _exchange(self, ready: _Ready) -> Failure | None:
        """Sends batches, all of them before it waits; the failure that decides where a call has no answer."""
        sent = [(batch, line.send(*batch.unsent())) for batch, line in ready]
        worst: Failure | None = None
        for batch, future in sent:
            outcome = await future
            if isinstance(outcome, Failure):
                failure: Failure | None = self._site.doubted(batch.address, outcome)
            else:
                failure = batch.take(outcome, self._site.topology)
            worst = worse(worst, failure)
        return worst

    def _doubt_nodes(self, calls: Sequence[Call]) -> None:
        """Doubts the nodes that were waited for in vain."""
        with contextlib.suppress(Failure):
            for batch in batches([call for call in calls if call.open], self._site.topology):
                self._site.topology.doubt(batch.address)

    def _new_lines(self) -> Lines:
        loop = asyncio.get_running_loop()
        for other in list(self._lines):
            if other.is_closed():
                self._forget(other)
        made = self._lines[loop] = Lines(self._connect, lambda: self._forget(loop))
        return made

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lines.pop(loop, None)

    async def _connect(self, node: Address) -> PipelinedConnection:
        return await PipelinedConnection.open(node, self._site.greeting, self._site.timeout)
