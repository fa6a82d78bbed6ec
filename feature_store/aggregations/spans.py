"""The stretches of an array that some ranges need: work on them alone, and nothing of one reaches another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Spans:
    """Disjoint stretches `starts[s]` to `stops[s]` of an array, in its order.

    Each is the union of ranges that overlap, so every range lies in one span; ranges that only touch are two spans.
    Side by side the spans are an array of their own, in which span `s` begins at `begins[s]`.
    """

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, low: np.ndarray, high: np.ndarray) -> Spans:
        """The spans of ranges low to high, of which none is empty."""
        order = np.argsort(low, kind="stable")
        low, reach = low[order], np.maximum.accumulate(high[order])
        first = np.ones(len(low), bool)
        first[1:] = low[1:] >= reach[:-1]
        last = np.append(first[1:], len(low) > 0)
        return cls(low[first], reach[last[: len(low)]])

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @cached_property
    def begins(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def places(self) -> np.ndarray:
        """The place in the whole array of each element of the spans, side by side."""
        return np.repeat(self.starts - self.begins, self.lengths) + np.arange(int(self.lengths.sum()))

    def holding(self, low: np.ndarray) -> np.ndarray:
        """The number of the span in which each range lies, by the range's low end."""
        return np.searchsorted(self.starts, low, side="right") - 1

    def moved(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranges of the whole array as ranges of the spans side by side."""
        span = self.holding(low)
        shift = self.starts[span] - self.begins[span]
        return low - shift, high - shift

    def batches(self, low: np.ndarray, most: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The spans side by side cut into slices of whole spans, and with each the numbers of the ranges inside it.

        A slice has fewer than `most` elements more than the longest span. `low` is in the whole array.
        """
        batch = self.begins // most
        of_range = batch[self.holding(low)]
        ranges = np.argsort(of_range, kind="stable")
        for number in np.unique(batch):
            spans = np.flatnonzero(batch == number)
            first, last = np.searchsorted(of_range[ranges], [number, number + 1])
            stop = self.begins[spans[-1]] + self.lengths[spans[-1]]
            yield slice(int(self.begins[spans[0]]), int(stop)), ranges[first:last]
