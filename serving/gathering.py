"""Reads that are asked for in the same turn of the event loop, done as one.

A read of sixteen rows costs the store and the decoder little more than a read of one. Under load a server finds several
requests ready at once: those for the same features as of now are read together, and each gets its rows of the answer.
A request that comes alone is not held up.
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

    async def read(self, entities: Entities) -> Rows:
        """The rows of a request. Raises what Prepared.read raises."""
        count = self._count(entities)
        if count is None:
            return Rows.all_of(await self._prepared.read_async(entities, self._clock.now()))
        batch = self._open
        if batch is None or batch.rows + count > MOST_ROWS:
            batch = self._open = _Batch()
            batch.task = asyncio.get_running_loop().create_task(self._close(batch))
        low = batch.rows
        batch.add(entities, count)
        assert batch.task is not None
        try:
            rows = await batch.task
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
        """Reads what has come together. It begins when those who were ready with the first one have had their turn."""
        if self._open is batch:
            self._open = None
        entities = batch.asked[0]
        if len(batch.asked) > 1:
            entities = {name: [v for asked in batch.asked for v in asked[name]] for name in self._kinds}
        return Rows.all_of(await self._prepared.read_async(entities, self._clock.now()))


class _Batch:
    """Requests that are read together."""

    def __init__(self) -> None:
        self.asked: list[Entities] = []
        self.rows = 0
        self.task: asyncio.Task[Rows] | None = None

    def add(self, entities: Entities, count: int) -> None:
        self.asked.append(entities)
        self.rows += count
