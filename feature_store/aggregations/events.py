"""Events in folding order, and the values of windows over them.

Events lie sorted by entity and, within an entity, by order key (event time, created time, value): the one order in
which every engine folds. A window is then a range of neighbours, found by binary search, and its value is a pure
function of the events in that range: neither other entities, nor how much history was loaded, nor the number of
threads can change a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from feature_store.aggregations.finalize import finalize
from feature_store.aggregations.folding import fold_ranges
from feature_store.aggregations.known import Runs, fold_known
from feature_store.aggregations.measures import State, combine, identity, measure_of, put, take
from feature_store.aggregations.sketches import SKETCHED, evaluate_sets
from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.erasure import NO_ERASURES, Erasures
from feature_store.definitions.types import ValueType

#: A window's length and hop; a range [low, high) of places for each window.
Window = tuple[int, int]
Range = tuple[np.ndarray, np.ndarray]

#: Functions that are looked up in a copy of a window's values where those known at a time do not lie together.
COPIED = ("last_n", *SKETCHED)
COPIED_AT_ONCE = 4_000_000

#: Runs of known values that are held at a time; where windows have more, they are folded by a tree instead.
RUNS_AT_ONCE = 500_000


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
        valid = ~np.asarray(array.is_null()) if array.null_count else np.ones(len(array), bool)
        if column_type.is_float:
            return cls._of_floats(array, column_type, valid)
        if column_type.is_integer or column_type is ValueType.TIMESTAMP:
            values = np.asarray(array.cast(pa.int64()).fill_null(0))
        elif column_type is ValueType.BOOL:
            values = np.asarray(array.cast(pa.uint8()).fill_null(0)).astype(np.int64)
        elif column_type.is_list:
            values = np.zeros(len(array), np.int64)
        else:
            values = _ranks(array)
        return cls(column_type, values, valid, array)

    @classmethod
    def _of_floats(cls, array: pa.Array, column_type: ValueType, valid: np.ndarray) -> Column:
        values = np.asarray(array.cast(pa.float64()).fill_null(0.0))
        finite = np.isfinite(values)
        negative_zero = (values == 0) & np.signbit(values)
        if finite.all() and not negative_zero.any():
            return cls(column_type, values, valid, array)
        valid = valid & finite
        values = np.where(valid, values, 0.0) + 0.0
        return cls(column_type, values, valid, pa.array(values, column_type.arrow, mask=~valid, from_pandas=False))


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

    `times` and `created` are int64 microseconds (`created` is BEGINNING where it is missing, the lowest). `known` is
    when each event was known, where that limits who may see it (knowledge-time joins), else None.
    """

    offsets: np.ndarray
    times: np.ndarray
    created: np.ndarray
    columns: dict[str, Column]
    known: np.ndarray | None = None

    @cached_property
    def entity(self) -> np.ndarray:
        """The entity of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @cached_property
    def _tied(self) -> np.ndarray:
        """The rows that share their entity and time with a neighbour."""
        same = self.times[1:] == self.times[:-1]
        if not same.any():
            return np.zeros(0, np.int64)
        same &= self.entity[1:] == self.entity[:-1]
        return np.flatnonzero(np.append(same, False) | np.append(False, same))

    def rank(self, entity: np.ndarray, time: np.ndarray) -> np.ndarray:
        """How many events (counted over all rows) lie before `time` in each entity's range.

        An entity of -1 has no events: its rank is 0.
        """
        if not len(self.times):
            return np.zeros(len(entity), np.int64)
        if self._composite is None:
            return self._bisected(entity, time)
        first, bits, composite = self._composite
        beyond = int(self.times.max()) + 1
        return np.searchsorted(composite, (entity << bits) + (np.clip(time, first, beyond) - first))

    @cached_property
    def _composite(self) -> tuple[int, int, np.ndarray] | None:
        """The least time, the bits that hold a time from there on, and entity and time of each event in one integer;
        None where 63 bits do not hold both.
        """
        first = int(self.times.min())
        bits = (int(self.times.max()) + 1 - first).bit_length()
        if bits + len(self.offsets).bit_length() > 63:
            return None
        return first, bits, (self.entity << bits) + (self.times - first)

    def _bisected(self, entity: np.ndarray, time: np.ndarray) -> np.ndarray:
        known = entity >= 0
        safe = np.where(known, entity, 0)
        low = np.where(known, self.offsets[safe], 0)
        high = np.where(known, self.offsets[safe + 1], 0)
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) >> 1
            before = self.times[middle] < time[open_]
            low[open_] = np.where(before, middle + 1, low[open_])
            high[open_] = np.where(before, high[open_], middle)
        return low

    def starts(self, entity: np.ndarray) -> np.ndarray:
        """Where each entity's range begins; 0 for an entity of -1."""
        return np.where(entity >= 0, self.offsets[np.maximum(entity, 0)], 0)

    def ordered_by(self, column: str) -> np.ndarray:
        """A permutation of the rows into the order keys of one column: it moves rows of equal times only."""
        order = np.arange(len(self.times))
        if (tied := self._tied).size:
            keys = (self.columns[column].values, self.created, self.times, self.entity)
            order[tied] = tied[np.lexsort(tuple(key[tied] for key in keys))]
        return order


@dataclass(frozen=True)
class EventLog:
    """A view's events in folding order, with the key values of each entity (one row an entity, by key name).

    `skipped` counts source rows without a key or an event time; `erasures` are those whose records were left out.
    """

    keys: pa.Table
    events: Events
    skipped: int = 0
    erasures: Erasures = NO_ERASURES


@dataclass(frozen=True)
class ColumnFold:
    """Folds over the non-null values of one column (over all events, for `*`), in its order.

    `rows` are the event rows of those values, `before[i]` counts them among the first i events, `known` is when each
    was known (None: always).
    """

    column: Column
    rows: np.ndarray
    before: np.ndarray
    known: np.ndarray | None

    @classmethod
    def of(cls, events: Events, column: str) -> ColumnFold:
        count = len(events.times)
        if column == "*":
            everything = Column(ValueType.BOOL, np.ones(count, np.int64), np.ones(count, bool), pa.nulls(count))
            return cls(everything, np.arange(count), np.arange(count + 1), events.known)
        found, rows = events.columns[column], events.ordered_by(column)
        before = np.arange(count + 1)
        if not found.valid.all():
            valid = found.valid[rows]
            rows, before = rows[valid], np.append(0, np.cumsum(valid))
        return cls(found, rows, before, None if events.known is None else events.known[rows])

    @cached_property
    def values(self) -> np.ndarray:
        return self.column.values[self.rows]

    def narrow(self, low: np.ndarray, high: np.ndarray) -> Range:
        """Ranges of event rows as ranges of this column's non-null values. Ties at one time never straddle an edge."""
        return self.before[low], self.before[high]

    def fold(self, low: np.ndarray, high: np.ndarray, measures: Iterable[str]) -> State:
        """The state of each range of non-null values."""
        return fold_ranges(self.values, low, high, measures)

    def states(self, aggregations: list[Aggregation], ranges: Mapping[Window, Range]) -> dict[Window, State]:
        """What the aggregations of each window need of it. Every measure is folded once for all windows together."""
        states: dict[Window, State] = {w: {"n": np.maximum(high - low, 0)} for w, (low, high) in ranges.items()}
        for measure in measures_of(aggregations, self.column.type):
            windows = _windows(a for a in aggregations if measure in measures_of([a], self.column.type))
            low, high = (np.concatenate([ranges[w][side] for w in windows]) for side in (0, 1))
            folded = fold_ranges(self.values, low, high, [measure])
            for i, window in enumerate(windows):
                size = len(ranges[window][0])
                states[window] |= take(folded, slice(i * size, (i + 1) * size))
        return states


def measures_of(aggregations: Iterable[Aggregation], column: ValueType) -> list[str]:
    """The measures that some aggregations of one column need, sorted."""
    return sorted({m for a in aggregations if (m := measure_of(a.function, column))})


def evaluate(
    events: Events, aggregations: Iterable[Aggregation], entity: np.ndarray, time: np.ndarray
) -> dict[str, pa.Array]:
    """The value of every aggregation for each pair of entity (row of `offsets`, -1 if it has no events) and time.

    Returns Arrow arrays by aggregation name. The contract's definition: events with floor_H(t - W) <= event time < t,
    and where `events.known` is given only those known at or before t.
    """
    aggregations = list(aggregations)
    head = events.rank(entity, time)
    tails = {window: _tail_ranks(events, entity, time, *window) for window in _windows(aggregations)}
    values: dict[str, pa.Array] = {}
    for column in sorted({a.column for a in aggregations}):
        here = [a for a in aggregations if a.column == column]
        fold = ColumnFold.of(events, column)
        ranges = {window: fold.narrow(tails[window], head) for window in _windows(here)}
        if fold.known is None:
            values |= _column_values(fold, here, ranges)
        else:
            values |= _known_values(fold, fold.known, here, ranges, time)
    return values


def _windows(aggregations: Iterable[Aggregation]) -> list[Window]:
    return sorted({(a.window, a.hop) for a in aggregations})


def _tail_ranks(events: Events, entity: np.ndarray, time: np.ndarray, window: int, hop: int) -> np.ndarray:
    if not len(events.times):
        return np.zeros(len(entity), np.int64)
    return events.rank(entity, (time - window) // hop * hop) if window else events.starts(entity)


def _column_values(
    fold: ColumnFold, aggregations: list[Aggregation], ranges: Mapping[Window, Range]
) -> dict[str, pa.Array]:
    states = fold.states(aggregations, ranges)
    values: dict[str, pa.Array] = {}
    for window, bounds in ranges.items():
        here = [a for a in aggregations if (a.window, a.hop) == window]
        values |= _window_values(fold, here, states[window], *bounds)
    return values


def _window_values(
    fold: ColumnFold, aggregations: list[Aggregation], state: State, low: np.ndarray, high: np.ndarray
) -> dict[str, pa.Array]:
    values = evaluate_sets(fold, aggregations, low, high)
    for a in aggregations:
        if a.function.kind in ("first", "last", "last_n"):
            values[a.name] = _looked_up(fold, a, low, high)
        elif a.name not in values:
            values[a.name] = to_arrow(*finalize(a.function, fold.column.type, state), a.output)
    return values


def _known_values(
    fold: ColumnFold,
    known: np.ndarray,
    aggregations: list[Aggregation],
    ranges: Mapping[Window, Range],
    time: np.ndarray,
) -> dict[str, pa.Array]:
    """The same from those values in each range that were known at its time.

    They lie in runs of neighbours: what is folded is folded run by run, what is looked up is looked up in a copy of
    the runs, a bounded number of values at a time.
    """
    values: dict[str, pa.Array] = {}
    for window, (low, high) in ranges.items():
        here = [a for a in aggregations if (a.window, a.hop) == window]
        runs = Runs.known_at(known, low, high, time, RUNS_AT_ONCE)
        if runs is None:
            values |= _scattered_values(fold, known, here, (window, low, high), time)
            continue
        state = _state_of_runs(fold, runs, measures_of(here, fold.column.type))
        copied = [a for a in here if a.function.kind in COPIED]
        values |= _window_values(fold, [a for a in here if a not in copied], state, *runs.ends())
        parts = [_window_values(part, copied, {}, *bounds) for part, bounds in _copies(fold, runs, copied)]
        values |= {a.name: pa.concat_arrays([p[a.name] for p in parts]) for a in copied}
    return values


def _scattered_values(
    fold: ColumnFold,
    known: np.ndarray,
    aggregations: list[Aggregation],
    ranges: tuple[Window, np.ndarray, np.ndarray],
    time: np.ndarray,
) -> dict[str, pa.Array]:
    """The values of a window whose known events form many runs: folds by a tree, what is looked up by halves."""
    window, low, high = ranges
    looked_up = [a for a in aggregations if a.function.kind in ("first", "last", *COPIED)]
    folded = [a for a in aggregations if a not in looked_up]
    values: dict[str, pa.Array] = {}
    if folded:
        state = fold_known(fold.values, known, low, high, time, measures_of(folded, fold.column.type))
        values |= _window_values(fold, folded, state, low, high)
    if looked_up:
        half = len(low) // 2
        parts = [
            _known_values(fold, known, looked_up, {window: (low[part], high[part])}, time[part])
            for part in (slice(None, half), slice(half, None))
        ]
        values |= {a.name: pa.concat_arrays([part[a.name] for part in parts]) for a in looked_up}
    return values


def _state_of_runs(fold: ColumnFold, runs: Runs, measures: list[str]) -> State:
    """The state of each window: those of its runs, combined from the first to the last."""
    folded = fold_ranges(fold.values, runs.low, runs.high, measures)
    state = identity(measures, fold.values.dtype, runs.windows)
    for nth in runs.nth():
        window = runs.window[nth]
        put(state, window, combine(take(state, window), take(folded, nth), measures))
    return state


def _copies(fold: ColumnFold, runs: Runs, wanted: list[Aggregation]) -> Iterator[tuple[ColumnFold, Range]]:
    """The known values of some windows after one another, as a fold of their own, with the range of each window."""
    if not wanted:
        return
    for part in runs.parts(COPIED_AT_ONCE):
        places, offsets = part.places()
        copy = replace(fold, rows=fold.rows[places], before=np.arange(len(places) + 1), known=None)
        yield copy, (offsets[:-1], offsets[1:])


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
