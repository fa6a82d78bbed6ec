"""Knowledge time: which of a window's values were known when it was asked for.

By the contract a value counts if it was known (created) at or before the asked time. Values lie in the order of event
time, in which the known ones form runs: usually one that ends shortly before the window does. Runs are found from the
right, by descending in trees of block minima and maxima, so that a long stretch of unknown values (a day that was
loaded the day after) costs its logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from feature_store.aggregations.folding import fold_ranges
from feature_store.aggregations.measures import State, combine, identity, put, take


@dataclass(frozen=True)
class Runs:
    """Runs [low, high) of neighbours, each of a window (`window` is its number), ordered by window and place.

    There are `windows` windows; one may have no run.
    """

    window: np.ndarray
    low: np.ndarray
    high: np.ndarray
    windows: int

    @classmethod
    def known_at(
        cls, known: np.ndarray, low: np.ndarray, high: np.ndarray, time: np.ndarray, most: int | None = None
    ) -> Runs | None:
        """The runs of values with known <= time in each range [low, high); None where there are more than `most`."""
        tree = _Tree.of(known)
        count = 0
        open_ = np.flatnonzero(low < high)
        place = high[open_]
        found = []
        while open_.size:
            end = tree.last(place, time[open_], known_by=True) + 1
            inside = end > low[open_]
            open_, end = open_[inside], end[inside]
            start = np.maximum(tree.last(end, time[open_], known_by=False) + 1, low[open_])
            found.append((open_, start, end))
            count += len(open_)
            if most is not None and count > most and len(low) > 1:
                return None
            more = start > low[open_]
            open_, place = open_[more], start[more]
        if not found:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, nothing, len(low))
        window, first, last = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((first, window))
        return cls(window[order], first[order], last[order], len(low))

    @property
    def lengths(self) -> np.ndarray:
        """How many values the runs of each window hold."""
        return np.bincount(self.window, weights=self.high - self.low, minlength=self.windows).astype(np.int64)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The place of the first value in each window's runs, and the one after the last; 0, 0 where there is none."""
        first, last = np.zeros(self.windows, np.int64), np.zeros(self.windows, np.int64)
        first[self.window[::-1]] = self.low[::-1]
        last[self.window] = self.high
        return first, last

    def nth(self) -> Iterator[np.ndarray]:
        """The first runs of all windows, then the second ones, and so on."""
        starts = np.flatnonzero(np.diff(self.window, prepend=-1))
        place = np.arange(len(self.window)) - np.repeat(starts, np.diff(np.append(starts, len(self.window))))
        order = np.argsort(place, kind="stable")
        edges = np.cumsum(np.bincount(place))
        yield from np.split(order, edges[:-1]) if len(edges) else []

    def parts(self, most: int) -> Iterator[Runs]:
        """The runs of some windows after others, about `most` values at a time."""
        total = np.cumsum(self.lengths)
        first = 0
        while first < self.windows:
            done = total[first - 1] if first else 0
            last = max(int(np.searchsorted(total, done + most, "right")), first + 1)
            here = slice(*np.searchsorted(self.window, [first, last]))
            yield Runs(self.window[here] - first, self.low[here], self.high[here], last - first)
            first = last

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The place of every value in the runs, and where each window's begin among them (one more than windows)."""
        size = self.high - self.low
        ends = np.cumsum(size)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.low - (ends - size), size)
        return places, np.concatenate([[0], np.cumsum(self.lengths)])


def fold_known(
    values: np.ndarray, known: np.ndarray, low: np.ndarray, high: np.ndarray, time: np.ndarray, measures: Sequence[str]
) -> State:
    """The state of the values known at or before `time` in each range [low, high), however many runs they form.

    A merge sort tree: a range is put together from aligned blocks of 2^k places, in each of which the values lie in the
    order in which they became known, so that the known ones are a prefix. Costs n * log2(n)^2, whatever the number of
    ranges and the lag between happening and being known.
    """
    count = len(known)
    by_known = np.argsort(known, kind="stable")
    rank = np.empty(count, np.int64)
    rank[by_known] = np.arange(count)
    limit = np.searchsorted(known[by_known], time, "right")
    bits = count.bit_length()
    state = identity(measures, values.dtype, len(low))
    left, right, level = low.copy(), np.maximum(low, high), 0
    while (open_ := np.flatnonzero(left < right)).size:
        from_left, from_right = open_[left[open_] & 1 == 1], open_[right[open_] & 1 == 1]
        if from_left.size or from_right.size:
            in_block = np.sort((np.arange(count) >> level << bits) + rank)
            ordered = values[by_known[in_block & ((1 << bits) - 1)]]
            for ranges, block in ((from_left, left[from_left]), (from_right, right[from_right] - 1)):
                end = np.searchsorted(in_block, (block << bits) + limit[ranges])
                prefix = fold_ranges(ordered, block << level, end, measures)
                put(state, ranges, combine(take(state, ranges), prefix, measures))
        left[from_left] += 1
        right[from_right] -= 1
        left, right, level = left >> 1, right >> 1, level + 1
    return state


def last_known(known: np.ndarray, before: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The last place before `before` of a value known at or before `time`, for each pair; -1 where there is none."""
    return _Tree.of(known).last(before, time, known_by=True)


@dataclass(frozen=True)
class _Tree:
    """Minima and maxima of aligned blocks of 2^k values, for every k."""

    least: list[np.ndarray]
    greatest: list[np.ndarray]

    @classmethod
    def of(cls, values: np.ndarray) -> _Tree:
        least, greatest = [values], [values]
        while len(least[-1]) > 1:
            size = len(least[-1]) // 2 * 2
            rest_least, rest_greatest = least[-1][size:], greatest[-1][size:]
            least.append(np.concatenate([least[-1][:size].reshape(-1, 2).min(axis=1), rest_least]))
            greatest.append(np.concatenate([greatest[-1][:size].reshape(-1, 2).max(axis=1), rest_greatest]))
        return cls(least, greatest)

    def last(self, before: np.ndarray, limit: np.ndarray, known_by: bool) -> np.ndarray:
        """The last place before `before` whose value is at most the limit (above it if not `known_by`); -1: none."""
        result = np.full(len(before), -1, np.int64)
        block, found = before.copy(), np.zeros(len(before), bool)
        open_ = np.flatnonzero(before > 0)
        for level in range(len(self.least)):
            # An odd number of blocks before the place: the last of them has no sibling to its right and is looked at.
            odd = open_[(block[open_] & 1) == 1]
            hit = self._holds(level, block[odd] - 1, limit[odd], known_by)
            self._descend(level, odd[hit], block[odd[hit]] - 1, limit, known_by, result)
            found[odd[hit]] = True
            block[odd] -= 1
            open_ = open_[~found[open_] & (block[open_] > 0)]
            block[open_] >>= 1
            if not open_.size:
                break
        return result

    def _holds(self, level: int, block: np.ndarray, limit: np.ndarray, known_by: bool) -> np.ndarray:
        return self.least[level][block] <= limit if known_by else self.greatest[level][block] > limit

    def _descend(
        self, level: int, query: np.ndarray, block: np.ndarray, limit: np.ndarray, known_by: bool, result: np.ndarray
    ) -> None:
        """From a block that holds such a value to the last place that has one."""
        for below in range(level - 1, -1, -1):
            right = 2 * block + 1
            block = np.where(self._holds(below, right, limit[query], known_by), right, 2 * block)
        result[query] = block
