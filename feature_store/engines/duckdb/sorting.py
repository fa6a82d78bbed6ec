"""The rows of a source in the order of entity, event time and created time, a chunk of entities at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.definitions.view import StoredView
from feature_store.engines.duckdb.scan import CREATED, TIME, Scan, quote
from feature_store.errors import SourceError
from feature_store.timestamps import BEGINNING

#: Rows that are worked on at a time, except where one entity has more: few enough for the processor's caches.
CHUNK_ROWS = 400_000

_ENTITY, _ORDER = "__entity", "__order"

#: Bits of an integer that SQL shifts and adds without overflowing.
_BITS = 62


@dataclass(frozen=True)
class Chunk:
    """Sorted rows of the entities `first` to `last`, all of them: the entity and event time of each, and `rows`."""

    rows: pa.Table
    entity: np.ndarray
    times: np.ndarray
    first: int
    last: int


@dataclass(frozen=True)
class SortedRows:
    """A scan joined to table `entity` (the keys' numbers, below `entities`) and sorted; `columns`, as the scan calls
    them, come along.

    Where the files' statistics say that entity and time fit into one integer, that integer is what is sorted by: half
    the bytes for DuckDB to move.
    """

    view: StoredView
    reading: Scan
    columns: tuple[str, ...]
    entities: int

    @cached_property
    def _packing(self) -> tuple[int, int] | None:
        """The bits of an integer that hold a time, and the time that they count from; None where no integer will do."""
        first, last = self.reading.first, self.reading.last
        if first is None or last is None:
            return None
        bits = max(last - first, 0).bit_length()
        return (bits, first) if bits + self.entities.bit_length() <= _BITS else None

    @property
    def sql(self) -> str:
        created = [f"coalesce({CREATED}, {BEGINNING}) AS {CREATED}"] if self.view.source.created_field else []
        columns = map(quote, self.columns)
        keys = {f"entity.{_ENTITY}": _ENTITY, TIME: TIME}
        if self._packing is not None:
            bits, first = self._packing
            packed = f"(entity.{_ENTITY} << {bits}) + ({TIME} - {first})"
            # A file replaced since its footer was read may hold other times, which would run into the entity's bits.
            keys = {f"CASE WHEN {TIME} BETWEEN {first} AND {self.reading.last} THEN {packed} END": _ORDER}
        selected = [*(f"{key} AS {name}" for key, name in keys.items()), *created, *columns]
        order = [*keys.values(), *([CREATED] if created else [])]
        return (
            f"SELECT * FROM (SELECT {', '.join(selected)} FROM ({self.reading.admitted}) source "
            f"{self._joined}) ORDER BY {', '.join(order)}"
        )

    @property
    def _joined(self) -> str:
        """Joins a source to the numbered entities; a view without keys has the one entity."""
        if not self.view.keys:
            return "CROSS JOIN entity"
        return f"JOIN entity USING ({', '.join(quote(self.reading.names[k.name]) for k in self.view.keys)})"

    def chunks(self, session: duckdb.DuckDBPyConnection) -> Iterator[Chunk]:
        """About CHUNK_ROWS at a time, cut between entities; every entity is in one chunk, also where it has no row."""
        first, held, count = 0, [], 0
        reader = session.sql(self.sql).to_arrow_reader(CHUNK_ROWS)
        for batch in reader:
            held.append(batch)
            count += len(batch)
            if count < CHUNK_ROWS or self._entity_at(held[0], 0) == (last := self._entity_at(batch, len(batch) - 1)):
                continue
            rows = pa.Table.from_batches(held)
            cut = int(np.searchsorted(self._keys(rows)[0], last))
            yield self._chunk(rows.slice(0, cut), first, last - 1)
            first, held, count = last, rows.slice(cut).to_batches(), count - cut
        yield self._chunk(pa.Table.from_batches(held, reader.schema), first, self.entities - 1)

    def whole(self, session: duckdb.DuckDBPyConnection) -> Chunk:
        """All rows at once."""
        return self._chunk(session.sql(self.sql).to_arrow_table(), 0, self.entities - 1)

    def _chunk(self, rows: pa.Table, first: int, last: int) -> Chunk:
        return Chunk(rows, *self._keys(rows), first, last)

    def _keys(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        if self._packing is None:
            return numbers(rows, _ENTITY), numbers(rows, TIME)
        bits, first = self._packing
        if rows[_ORDER].null_count:
            raise SourceError(
                f"view '{self.view.name}': a file of source '{self.view.source.name}' holds times that its footer does "
                "not name; it was written while it was read. Run it again."
            )
        order = numbers(rows, _ORDER)
        return order >> bits, (order & ((1 << bits) - 1)) + first

    def _entity_at(self, batch: pa.RecordBatch, row: int) -> int:
        return int(self._keys(pa.Table.from_batches([batch.slice(row, 1)]))[0][0])


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of integers without nulls."""
    return np.asarray(table[name].combine_chunks())
