"""Reads that are asked for at the same time, done as one.

A read of sixteen rows costs the store and the decoder little more than a read of one. Under load a server finds several
requests ready in one turn of its event loop, and more come while a store on the network is asked: those for the same
features as of now are read together, and each gets its rows of the answer. A request that comes alone does not wait;
one that comes while the store is being asked waits for that round trip, and goes with the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from feature_store.clock import Clock
from feature_store.definitions.types import ValueType
from feature_store.errors import IsochronError, StoreError
from feature_store.retrieval.online import Prepared
from serving.encodings import Rows

#: The most rows that are read together: beyond that nothing is saved, and who waits waits longer.
MOST_ROWS = 128

Entities = Mapping[str, Sequence[Any]]

#: The Python type whose values a read takes as they are, by a key's type.
_TAKEN: dict[ValueType, type] = {ValueType.INT32: int, ValueType.INT64: int, ValueType.STRING: str}


class Gathering:
    """Reads through one handle, as of now."""

    def __init__(self, prepared: Prepared, clock: Clock) -> None:
        self._prepared, self._clock = prepared, clock
        # A function is only given the rows of one request, though it should treat each row alone.
        together = prepared.keys and not prepared.request.on_demand
        kinds = {name: _TAKEN.get(value_type) for name, value_type in prepared.keys.items()} if together else {}
        self._kinds = {} if None in kinds.values() else kinds
        self._open: _Batch | None = None
        self._under_way = 0

    async def read(self, entities: Entities) -> Rows:
        """The rows of a request. Raises what Prepared.read raises."""
        count = self._count(entities)
        if count is None:
            return Rows.all_of(await self._prepared.read_async(entities, self._clock.now()))
        batch = self._open
        if batch is not None and batch.rows + count > MOST_ROWS:
            batch.let_go()
            batch = None
        if batch is None:
            batch = self._open = _Batch()
            batch.task = asyncio.get_running_loop().create_task(self._close(batch))
        low = batch.rows
        batch.add(entities, count)
        assert batch.task is not None
        try:
            # One who is not waited for any more must not take the others' answer away.
            rows = await asyncio.shield(batch.task)
        except StoreError:
            raise
        except IsochronError:
            if len(batch.asked) == 1:
                raise
            # What is refused, or not in the store, may be another request's.
            return Rows.all_of(await self._prepared.read_async(entities, self._clock.now()))
        return Rows(rows.answer, low, low + count, rows.lists)

    def _count(self, entities: Entities) -> int | None:
        """How many rows are asked for, where they can be read with those of others: all keys are there, and as they
        should be.
        """
        count = None
        for name, kind in self._kinds.items():
            values = entities.get(name, ())
            if set(map(type, values)) != {kind} or len(values) != (count or len(values)):
                return None
            count = len(values)
        if count is None or count > MOST_ROWS or any(len(values) != count for values in entities.values()):
            return None
        return count

    async def _close(self, batch: _Batch) -> Rows:
        """Reads what has come together: those who were ready with the first one have had their turn before."""
        if self._under_way and self._open is batch:
            await batch.turn()
        if self._open is batch:
            self._open = None
        entities = batch.asked[0]
        if len(batch.asked) > 1:
            entities = {name: [v for asked in batch.asked for v in asked[name]] for name in self._kinds}
        self._under_way += 1
        try:
            return Rows.all_of(await self._prepared.read_async(entities, self._clock.now()))
        finally:
            self._under_way -= 1
            if self._open is not None:
                self._open.let_go()


class _Batch:
    """Requests that are read together."""

    def __init__(self) -> None:
        self.asked: list[Entities] = []
        self.rows = 0
        self.task: asyncio.Task[Rows] | None = None
        self._waiting: asyncio.Future[None] | None = None

    def add(self, entities: Entities, count: int) -> None:
        self.asked.append(entities)
        self.rows += count

    async def turn(self) -> None:
        """Waits until it is let go: when the read before it ends, or it is full."""
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting

    def let_go(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
