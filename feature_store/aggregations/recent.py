"""The newest distinct values of ranges."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from itertools import islice
from typing import Any

import numpy as np


def newest_distinct(values: np.ndarray, low: np.ndarray, high: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the newest n distinct values in each range low to high, the newest first.

    A value lies where it came last. Returns how many places each range has, and the places of one range after the
    other. One pass over the values in order, which remembers the n newest: costs length + number of ranges * n.
    """
    order = np.argsort(high, kind="stable")
    recent: OrderedDict[Any, int] = OrderedDict()
    found, ends = array("q"), array("q")
    seen = 0
    for first, last in zip(low[order].tolist(), high[order].tolist(), strict=True):
        _advance(recent, values, seen, last, n)
        seen = last
        newest = list(islice(reversed(recent.values()), n))
        while newest and newest[-1] < first:
            newest.pop()
        found.extend(newest)
        ends.append(len(found))
    return _in_order_of_ranges(np.frombuffer(found, np.int64), np.frombuffer(ends, np.int64), order)


def _advance(recent: OrderedDict[Any, int], values: np.ndarray, start: int, stop: int, n: int) -> None:
    """Takes in the values from start to stop: each moves to the end, and beyond n the oldest is forgotten.

    A value that is not among the n newest comes back among them only by coming again.
    """
    for place, value in enumerate(values[start:stop].tolist(), start):
        recent[value] = place
        recent.move_to_end(value)
        if len(recent) > n:
            recent.popitem(last=False)


def _in_order_of_ranges(found: np.ndarray, ends: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and places by range, from places that lie in the order in which the ranges were gone through."""
    counts, starts = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    counts[order] = np.diff(ends, prepend=0)
    starts[order] = ends - counts[order]
    shift = starts - (np.cumsum(counts) - counts)
    return counts, found[np.repeat(shift, counts) + np.arange(len(found))]
