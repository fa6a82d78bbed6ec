"""Windows over a sorted stream of events and asking rows, a bounded part of it at a time.

A task gets its keys' events and asking rows in the order of key and time, an asking row before the events of its own
time. It evaluates a chunk of them and carries on only the events that windows of later rows can still reach: with
finite windows one key's events, however many, pass through the memory that its longest window takes. A value is a
function of the events in its window alone, so no chunk's edge shows in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.aggregations.events import Column, Events, evaluate
from feature_store.definitions.aggregation import Aggregation, reach
from feature_store.definitions.types import ValueType
from feature_store.engines.spark.carriers import encode
from feature_store.engines.spark.scan import CREATED, TIME
from feature_store.timestamps import BEGINNING

#: The number of an asking row; null in the rows of events.
ROW = "row"


@dataclass(frozen=True)
class WindowFold:
    """Evaluates aggregations over rows with the columns `entity` (several, sorted by), `time`, `row`, `created` if the
    source has it, and a column `x0`, `x1`... for each of `columns` (name and type).
    """

    aggregations: tuple[Aggregation, ...]
    columns: tuple[tuple[str, ValueType], ...]
    entity: tuple[str, ...]
    knowledge_time: bool
    chunk_rows: int

    def schema(self) -> pa.Schema:
        """Of what comes out: the number of the asking row and `v0`, `v1`... for the aggregations, as carriers."""
        return pa.table({ROW: pa.array([], pa.int64()), **self._values(self._no_events(), [], [])}).schema

    def empty_values(self) -> list[object]:
        """The value of each aggregation over no event."""
        return [array[0].as_py() for array in self._values(self._no_events(), [-1], [0]).values()]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        held: list[pa.Table] = []
        carried = fresh = 0
        for batch in chain(batches, [None]):
            if batch is not None:
                held.append(pa.Table.from_batches([batch]))
                fresh += len(batch)
            # A chunk is at least as long as what was carried on to it: work stays in proportion.
            if not fresh or (batch is not None and fresh < max(self.chunk_rows, carried)):
                continue
            rows = pa.concat_tables(held).combine_chunks()
            number, asks = self._numbered(rows), np.asarray(rows[ROW].is_valid())
            if asks.any():
                yield self._evaluated(rows, number, asks)
            held = [self._still_reached(rows, number, asks)]
            carried, fresh = len(held[0]), 0

    def _numbered(self, rows: pa.Table) -> np.ndarray:
        """The number of each row's entity among the rows: neighbours of equal keys are one."""
        fresh = np.zeros(len(rows) - 1, bool)
        for name in self.entity:
            column = rows[name].chunk(0)
            fresh |= np.asarray(pc.not_equal(column[1:], column[:-1]))
        return np.concatenate([[0], np.cumsum(fresh)])

    def _evaluated(self, rows: pa.Table, number: np.ndarray, asks: np.ndarray) -> pa.RecordBatch:
        happened, asking = rows.filter(pa.array(~asks)), rows.filter(pa.array(asks))
        times = _numbers(happened, TIME)
        has_created = CREATED in rows.column_names
        created = happened[CREATED].combine_chunks() if has_created else pa.nulls(len(times), pa.int64())
        events = Events(
            offsets=np.searchsorted(number[~asks], np.arange(number[-1] + 2)),
            times=times,
            created=np.asarray(created.fill_null(BEGINNING)),
            columns=self._columns(happened),
            known=np.where(np.asarray(created.is_valid()), np.asarray(created.fill_null(0)), times)
            if self.knowledge_time
            else None,
        )
        values = self._values(events, number[asks], _numbers(asking, TIME))
        return pa.RecordBatch.from_pydict({ROW: asking[ROW].combine_chunks(), **values})

    def _values(self, events: Events, entity: npt.ArrayLike, time: npt.ArrayLike) -> dict[str, pa.Array]:
        values = evaluate(events, self.aggregations, np.asarray(entity, np.int64), np.asarray(time, np.int64))
        return {f"v{i}": encode(values[a.name].cast(a.output.arrow)) for i, a in enumerate(self.aggregations)}

    def _no_events(self) -> Events:
        nothing = np.zeros(0, np.int64)
        return Events(np.zeros(1, np.int64), nothing, nothing, self._columns(None))

    def _columns(self, rows: pa.Table | None) -> dict[str, Column]:
        columns = {}
        for i, (name, t) in enumerate(self.columns):
            array = pa.nulls(0, t.arrow) if rows is None else rows[f"x{i}"].combine_chunks().cast(t.arrow)
            columns[name] = Column.of(array, t)
        return columns

    def _still_reached(self, rows: pa.Table, number: np.ndarray, asks: np.ndarray) -> pa.Table:
        """The events of the last entity that a window of a row at or after the last time may hold."""
        times = _numbers(rows, TIME)
        start = reach(self.aggregations, int(times[-1]))
        held = ~asks & (number == number[-1])
        return rows.filter(pa.array(held if start is None else held & (times >= start)))


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    return np.asarray(rows[name].combine_chunks())
