"""Distinct values of ranges: how many there are, and an estimate from the smallest hashes where they are many.

Values are told apart by their 64-bit hashes (hashing.py). Both numbers are functions of the set of values alone, so
neither order nor the way a set was put together can change them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_store.aggregations.spans import Spans
from feature_store.aggregations.wavelet import Level, count_below


@dataclass(frozen=True)
class Distinct:
    """An array of values, made ready to be asked about the distinct ones of its ranges.

    `ranks` holds each value's place among the distinct `hashes` in ascending order, `previous` the place where the
    same value came last before, -1 where it did not.
    """

    hashes: np.ndarray
    ranks: np.ndarray
    previous: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray) -> Distinct:
        """From the hash of every value."""
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        ascending = hashes[order]
        first = np.ones(len(hashes), bool)
        first[1:] = ascending[1:] != ascending[:-1]
        ranks, previous = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
        ranks[order] = np.cumsum(first, dtype=np.int32) - 1
        previous[order] = np.where(first, -1, np.roll(order, 1))
        return cls(ascending[first], ranks, previous)

    def count(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """How many distinct values each range low to high has."""
        return _count(self.previous, low, high)

    def kth_hash(self, low: np.ndarray, high: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The k-th smallest of the distinct hashes in each range, 1 <= k <= their number."""
        return self.hashes[_kth_rank(self.ranks, self.previous, low, high, k)]


def _count(previous: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many distinct values there are in each range: those that did not come before inside of it."""
    found = np.zeros(len(low), np.int64)
    filled = np.flatnonzero(low < high)
    low, high = low[filled], high[filled]
    spans = Spans.of(low, high)
    # Counted from where a span starts, numbers are small and need few bits; what came before the span counts as never.
    since = previous[spans.places()] - np.repeat(spans.starts - 1, spans.lengths).astype(np.int32)
    bound = low - spans.starts[spans.holding(low)] + 1
    found[filled] = count_below(np.maximum(since, 0), *spans.moved(low, high), bound)
    return found


def _kth_rank(ranks: np.ndarray, previous: np.ndarray, low: np.ndarray, high: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The k-th smallest distinct rank of each range: bisection on the bits of the ranks, for all ranges at once.

    On each level a range goes on with its smaller or its larger half of ranks, depending on how many distinct ones the
    smaller half has, and what no range goes on with is dropped. Ranges with about as many distinct values take nearly
    the same way, so that most of the array is gone after a few levels.
    """
    for bit in reversed(range(int(ranks.max(initial=0)).bit_length())):
        level = Level.of(ranks, bit)
        before_low, before_high = level.clear_before(low), level.clear_before(high)
        ranks, previous = level.divide(ranks), level.divide(_renumbered(previous, level))
        smaller = _count(previous[: level.zeros[-1]], before_low, before_high)
        taken = k > smaller
        k = k - np.where(taken, smaller, 0)
        low, high = level.step(low, before_low, taken), level.step(high, before_high, taken)
        ranks, previous, low, high = _needed(ranks, previous, low, high)
    return ranks[low]


def _renumbered(previous: np.ndarray, level: Level) -> np.ndarray:
    """Places on a level as places on the next one; equal values have equal bits, so they keep together in order."""
    before = level.zeros[:-1]
    moved = level.step(np.arange(len(previous), dtype=np.int32), before, ~level.clear)
    return np.where(previous < 0, -1, moved.take(previous, mode="wrap")).astype(np.int32)


def _needed(
    ranks: np.ndarray, previous: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same without the elements that lie in no range."""
    spans = Spans.of(low, high)
    places = spans.places()
    shift = np.repeat(spans.starts - spans.begins, spans.lengths)
    kept = previous[places] - shift
    kept[kept < np.repeat(spans.begins, spans.lengths)] = -1
    return ranks[places], kept.astype(np.int32), *spans.moved(low, high)


def estimates(kth: np.ndarray, k: int) -> np.ndarray:
    """How many distinct values a set has whose k-th smallest hash is given: floor((k - 1) * 2^64 / hash).

    In whole numbers, for a float's last bit would differ between engines; at most the largest int64.
    """
    distinct, inverse = np.unique(kth, return_inverse=True)
    found = [min(((k - 1) << 64) // max(smallest, 1), (1 << 63) - 1) for smallest in distinct.tolist()]
    return np.array(found, np.int64)[inverse]
