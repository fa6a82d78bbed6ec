"""Functions of the set of values in a window: distinct counts, quantiles, the newest distinct values.

They do not fold like the measures of measures.py: no state small enough combines. Each is computed for all ranges of
a column at once, on the stretches of the column that some range needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from feature_store.aggregations.distinct import Distinct, estimates
from feature_store.aggregations.hashing import hashes_of
from feature_store.aggregations.quantiles import quantiles
from feature_store.aggregations.recent import newest_distinct
from feature_store.aggregations.spans import Spans
from feature_store.definitions.aggregation import Aggregation

if TYPE_CHECKING:
    from feature_store.aggregations.events import ColumnFold

#: The functions that are computed here.
SKETCHED = ("count_distinct", "approx_count_distinct", "approx_quantile_p", "last_distinct_n")

#: How many of the smallest hashes count_distinct and approx_count_distinct look at where they estimate.
SMALLEST_HASHES = {"count_distinct": 4_096, "approx_count_distinct": 1_024}

#: Values worked on at a time, except where one entity needs more. It bounds memory, and short windows cost little
#: beside long ones.
_BATCH = 1 << 20


def evaluate_sets(
    fold: ColumnFold, aggregations: Iterable[Aggregation], low: np.ndarray, high: np.ndarray
) -> dict[str, pa.Array]:
    """The values of aggregations of one column, whose functions are in SKETCHED, over ranges low to high of its
    non-null values, by aggregation name. Ranges where low >= high are empty windows.
    """
    wanted = [a for a in aggregations if a.function.kind in SKETCHED]
    if not wanted:
        return {}
    filled = np.flatnonzero(low < high)
    sets = _Sets(fold, len(low), filled, low[filled], high[filled])
    return (
        sets.counts([a for a in wanted if a.function.kind in SMALLEST_HASHES])
        | sets.quantiles([a for a in wanted if a.function.kind == "approx_quantile_p"])
        | sets.newest([a for a in wanted if a.function.kind == "last_distinct_n"])
    )


class _Sets:
    """The ranges of one evaluation: `filled` are the numbers, of `length`, of those that are not empty."""

    def __init__(self, fold: ColumnFold, length: int, filled: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        self._column, self._length, self._filled = fold.column, length, filled
        spans = Spans.of(low, high)
        self._rows = fold.rows[spans.places()]
        self._batches = list(spans.batches(low, _BATCH))
        self._low, self._high = spans.moved(low, high)

    def _ranges(self, part: slice, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._low[ranges] - part.start, self._high[ranges] - part.start

    def counts(self, aggregations: Sequence[Aggregation]) -> dict[str, pa.Array]:
        if not aggregations:
            return {}
        kinds: list[str] = sorted({a.function.kind for a in aggregations})
        found = {kind: np.zeros(self._length, np.int64) for kind in kinds}
        hashes = hashes_of(self._column, self._rows)
        for part, ranges in self._batches:
            for kind, numbers in _distinct_counts(hashes[part], *self._ranges(part, ranges), kinds).items():
                found[kind][self._filled[ranges]] = numbers
        return {a.name: pa.array(found[a.function.kind]) for a in aggregations}

    def quantiles(self, aggregations: Sequence[Aggregation]) -> dict[str, pa.Array]:
        if not aggregations:
            return {}
        percents = np.array(sorted({a.function.n for a in aggregations}), np.int64)
        found = np.zeros((len(percents), self._length))
        for part, ranges in self._batches:
            low, high = (np.tile(edge, len(percents)) for edge in self._ranges(part, ranges))
            asked = np.repeat(percents, len(ranges))
            values = quantiles(self._column.values[self._rows[part]], low, high, asked)
            found[:, self._filled[ranges]] = values.reshape(len(percents), len(ranges))
        empty = np.ones(self._length, bool)
        empty[self._filled] = False
        return {a.name: pa.array(found[np.searchsorted(percents, a.function.n)], mask=empty) for a in aggregations}

    def newest(self, aggregations: Sequence[Aggregation]) -> dict[str, pa.Array]:
        if not aggregations:
            return {}
        most = max(a.function.n for a in aggregations)
        counts, places = newest_distinct(self._column.values[self._rows], self._low, self._high, most)
        return {a.name: self._lists(a, counts, places) for a in aggregations}

    def _lists(self, aggregation: Aggregation, counts: np.ndarray, places: np.ndarray) -> pa.Array:
        """Lists of the first n of each range's places, as values."""
        number = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.zeros(self._length, np.int64)
        sizes[self._filled] = np.minimum(counts, aggregation.function.n)
        rows = self._rows[places[number < aggregation.function.n]]
        values = self._column.arrow.cast(aggregation.output.element.arrow).take(pa.array(rows, pa.int64()))
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32()), values)


def _distinct_counts(
    hashes: np.ndarray, low: np.ndarray, high: np.ndarray, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """What each kind of count says of each range: the number of distinct values, or beyond its bound the estimate."""
    distinct = Distinct.of(hashes)
    exact = distinct.count(low, high)
    # approx_count_distinct estimates from its bound on, count_distinct is exact on its own, as the contract has it.
    many = {kind: np.flatnonzero(exact >= SMALLEST_HASHES[kind] + (kind == "count_distinct")) for kind in kinds}
    asked = np.concatenate([many[kind] for kind in kinds])
    k = np.concatenate([np.full(len(many[kind]), SMALLEST_HASHES[kind]) for kind in kinds])
    smallest = distinct.kth_hash(low[asked], high[asked], k) if len(asked) else np.zeros(0, np.uint64)
    found, at = {}, 0
    for kind in kinds:
        found[kind] = exact.copy()
        found[kind][many[kind]] = estimates(smallest[at : at + len(many[kind])], SMALLEST_HASHES[kind])
        at += len(many[kind])
    return found
