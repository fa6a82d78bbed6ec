"""Events in folding order, and folds over ranges of them.

Events lie sorted by entity and, within an entity, by order key (event time, created time, value): the one order in
which every engine folds. A window is then a range of neighbours, found by binary search, and its value is a pure
function of the events in that range: neither other entities, nor how much history was loaded, nor the number of
threads can change a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from feature_store.aggregations.finalize import finalize
from feature_store.aggregations.measures import State, combine, identity, lift, measure_of, put, take
from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.types import ValueType
from feature_store.timestamps import BEGINNING


@dataclass(frozen=True)
class Column:
    """One column of events: `values` (int64, float64, or the rank of each value for other types), `valid`, and the
    Arrow array that looked-up values are taken from. NaN, infinities and nulls are not valid; -0.0 is 0.0.
    """

    type: ValueType
    values: np.ndarray
    valid: np.ndarray
    arrow: pa.Array

    @classmethod
    def of(cls, array: pa.Array, column_type: ValueType) -> Column:
        """A column as the algebra wants it, from an Arrow array of that type."""
        valid = ~np.asarray(array.is_null())
        if column_type.is_float:
            values = np.asarray(array.cast(pa.float64()).fill_null(0.0)) + 0.0
            valid = valid & np.isfinite(values)
            values = np.where(valid, values, 0.0)
            array = pa.array(values, column_type.arrow, mask=~valid, from_pandas=False) if len(values) else array
        elif column_type.is_integer or column_type is ValueType.TIMESTAMP:
            values = np.asarray(array.cast(pa.int64()).fill_null(0))
        elif column_type is ValueType.BOOL:
            values = np.asarray(array.cast(pa.uint8()).fill_null(0)).astype(np.int64)
        elif column_type.is_list:
            values = np.zeros(len(array), np.int64)
        else:
            values = _ranks(array)
        return cls(column_type, values, valid, array)


def _ranks(array: pa.Array) -> np.ndarray:
    """For each string or byte string its place in byte order, which is the canonical order of such values."""
    encoded = array.cast(pa.binary()).dictionary_encode()
    order = pa.compute.array_sort_indices(encoded.dictionary)
    rank = np.empty(len(order), np.int64)
    rank[np.asarray(order)] = np.arange(len(order))
    indices = np.asarray(encoded.indices.fill_null(0))
    return rank[indices] if len(rank) else np.zeros(len(array), np.int64)


@dataclass(frozen=True)
class Events:
    """The events of many entities. Those of entity `e` are rows `offsets[e]` to `offsets[e + 1]`, by event time.

    `times` and `created` are int64 microseconds (`created` is BEGINNING where it is missing, the lowest).
    """

    offsets: np.ndarray
    times: np.ndarray
    created: np.ndarray
    columns: dict[str, Column]

    def rank(self, entity: np.ndarray, time: np.ndarray | int) -> np.ndarray:
        """How many events (counted over all rows) lie before `time` in each entity's range, vectorized bisection.

        An entity of -1 has no events: its rank is 0.
        """
        known = entity >= 0
        safe = np.where(known, entity, 0)
        if len(self.offsets) < 2:
            return np.zeros(len(entity), np.int64)
        low, high = self.offsets[safe], np.where(known, self.offsets[safe + 1], self.offsets[safe])
        low, high = np.where(known, low, 0), np.where(known, high, 0)
        times = np.broadcast_to(np.asarray(time, np.int64), entity.shape)
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) >> 1
            before = self.times[middle] < times[open_]
            low[open_] = np.where(before, middle + 1, low[open_])
            high[open_] = np.where(before, high[open_], middle)
        return low

    def ordered_by(self, column: str) -> np.ndarray:
        """A permutation of the rows into the order keys of one column: it moves rows of equal times only."""
        values = self.columns[column].values
        entity = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        tied = (entity[1:] == entity[:-1]) & (self.times[1:] == self.times[:-1])
        if not tied.any():
            return np.arange(len(values))
        return np.lexsort((values, self.created, self.times, entity))


@dataclass(frozen=True)
class EventLog:
    """A view's events in folding order, with the key values of each entity (one row an entity, by key name).

    `skipped` counts source rows without a key or an event time.
    """

    keys: pa.Table
    events: Events
    skipped: int = 0


@dataclass(frozen=True)
class ColumnFold:
    """Folds over the non-null values of one column, in its order: `rows` are the event rows of those values."""

    column: Column
    rows: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, events: Events, column: str) -> ColumnFold:
        order = events.ordered_by(column)
        valid = events.columns[column].valid[order]
        return cls(events.columns[column], order[valid], np.concatenate([[0], np.cumsum(valid)]))

    @property
    def values(self) -> np.ndarray:
        return self.column.values[self.rows]

    def narrow(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranges of event rows as ranges of this column's non-null values. Ties at one time never straddle an edge."""
        return self.before[low], self.before[high]

    def fold(self, low: np.ndarray, high: np.ndarray, measures: Iterable[str]) -> State:
        """The state of each range of non-null values."""
        return fold_ranges(self.values, low, high, measures)


def fold_ranges(values: np.ndarray, low: np.ndarray, high: np.ndarray, measures: Iterable[str]) -> State:
    """The state of `values[low:high]` for every pair, folded from the first value to the last.

    Doubling: after step k, element i holds the fold of the 2^k values from i on; a range takes one such block for each
    bit of its length. The blocks start where the range starts, so equal ranges give equal bits wherever they lie.
    Costs len(values) * log2(longest range), whatever the number of ranges or their overlap.
    """
    measures = tuple(measures)
    length = np.maximum(high - low, 0)
    if not measures:
        return {"n": length.astype(np.int64)}
    blocks = lift(values, measures)
    result = identity(measures, values.dtype, len(low))
    position = low.copy()
    step = 1
    longest = int(length.max(initial=0))
    while step <= longest:
        due = np.flatnonzero(length & step)
        if due.size:
            put(result, due, combine(take(result, due), take(blocks, position[due]), measures))
            position[due] += step
        step *= 2
        if step <= longest:
            half = step // 2
            blocks = combine(take(blocks, slice(None, -half)), take(blocks, slice(half, None)), measures)
    return result


def evaluate(
    events: Events, aggregations: Iterable[Aggregation], entity: np.ndarray, time: np.ndarray
) -> dict[str, pa.Array]:
    """The value of every aggregation for each pair of entity (row of `offsets`, -1 if it has no events) and time.

    Returns Arrow arrays by aggregation name. The contract's definition: events with floor_H(t - W) <= event time < t.
    """
    aggregations = list(aggregations)
    head = events.rank(entity, time)
    tails = {key: _tail_ranks(events, entity, time, *key) for key in {(a.window, a.hop) for a in aggregations}}
    values: dict[str, pa.Array] = {}
    for column in sorted({a.column for a in aggregations}):
        here = [a for a in aggregations if a.column == column]
        if column == "*":
            values |= {a.name: pa.array(head - tails[a.window, a.hop], pa.int64()) for a in here}
            continue
        fold = ColumnFold.of(events, column)
        for window in sorted({(a.window, a.hop) for a in here}):
            low, high = fold.narrow(tails[window], head)
            values |= _window_values(fold, [a for a in here if (a.window, a.hop) == window], low, high)
    return values


def _tail_ranks(events: Events, entity: np.ndarray, time: np.ndarray, window: int, hop: int) -> np.ndarray:
    return events.rank(entity, (time - window) // hop * hop if window else BEGINNING)


def _window_values(
    fold: ColumnFold, aggregations: list[Aggregation], low: np.ndarray, high: np.ndarray
) -> dict[str, pa.Array]:
    measures = {m for a in aggregations if (m := measure_of(a.function, fold.column.type))}
    state = fold.fold(low, high, sorted(measures))
    return {
        a.name: _looked_up(fold, a, low, high)
        if a.function.kind in ("first", "last", "last_n")
        else to_arrow(*finalize(a.function, fold.column.type, state), a.output)
        for a in aggregations
    }


def _looked_up(fold: ColumnFold, aggregation: Aggregation, low: np.ndarray, high: np.ndarray) -> pa.Array:
    array = fold.column.arrow.cast(aggregation.output.element.arrow)
    if aggregation.function.kind == "last_n":
        return _newest(fold, array, low, high, aggregation.function.n)
    index = low if aggregation.function.kind == "first" else high - 1
    empty = low >= high
    if not len(fold.rows):
        return pa.nulls(len(low), array.type)
    return array.take(pa.array(fold.rows[np.where(empty, 0, index)], mask=empty))


def _newest(fold: ColumnFold, array: pa.Array, low: np.ndarray, high: np.ndarray, n: int) -> pa.Array:
    """Lists of up to n values, the newest first."""
    count = np.minimum(np.maximum(high - low, 0), n)
    offsets = np.concatenate([[0], np.cumsum(count)])
    back = np.arange(offsets[-1]) - np.repeat(offsets[:-1], count)
    rows = np.repeat(high, count) - 1 - back
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), array.take(pa.array(fold.rows[rows], pa.int64())))


def to_arrow(values: np.ndarray, valid: np.ndarray, output: ValueType) -> pa.Array:
    """Values with their validity as an Arrow array of the feature's type."""
    array = pa.array(values, mask=~valid)
    if output is ValueType.TIMESTAMP:
        return array.cast(pa.int64()).view(output.arrow)
    return array.cast(output.arrow, safe=False)
