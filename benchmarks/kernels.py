"""Loops over arrays, compiled by numba where it is installed; plain Python otherwise, for tiny data only.

Rows are grouped by entity: those of entity `e` are `offsets[e]` to `offsets[e + 1]`, in time order.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

try:
    if os.environ.get("NUMBA_DISABLE_JIT") == "1":
        raise ImportError
    from numba import njit
except ImportError:

    def njit(**_: Any) -> Any:
        return lambda function: function


compiled = njit(cache=True, nogil=True)


@compiled
def group_offsets(entity, entities):
    """Where each entity's rows start, of rows that carry its number."""
    offsets = np.zeros(entities + 1, np.int64)
    for e in entity:
        offsets[e + 1] += 1
    for e in range(entities):
        offsets[e + 1] += offsets[e]
    return offsets


@compiled
def grouped(entity, offsets, times, values):
    """Times and one value a row, moved into their groups. Rows keep their order within one."""
    place = offsets[:-1].copy()
    moved_times, moved_values = np.empty_like(times), np.empty_like(values)
    for row in range(len(entity)):
        at = place[entity[row]]
        place[entity[row]] = at + 1
        moved_times[at] = times[row]
        moved_values[at] = values[row]
    return moved_times, moved_values


@compiled
def newest_at(offsets, times, entity, asked):
    """The place of each entity's newest row at or before the time asked, -1 where there is none."""
    found = np.empty(len(entity), np.int64)
    for row in range(len(entity)):
        first = offsets[entity[row]]
        low, high = first, offsets[entity[row] + 1]
        while low < high:
            middle = (low + high) >> 1
            if times[middle] <= asked[row]:
                low = middle + 1
            else:
                high = middle
        found[row] = low - 1 if low > first else -1
    return found


@compiled
def scan_windows(
    first, last, offsets, times, values, asked_offsets, asked, asked_rows, windows, hops, count, total, top
):
    """Count, sum and maximum of the events in each window before each asked time, for entities `first` to `last`.

    The windows come from the shortest to the longest, and each lies within the next. `count`, `total` and `top` (a
    line for each asked row, a column for each window) are filled in place; `asked_rows` says which line is whose.
    An entity whose windows overlap much is swept once per window, any other is read back from each asked time.
    """
    widest = len(windows) - 1
    longest = 0
    for e in range(first, last):
        longest = max(longest, offsets[e + 1] - offsets[e])
    sums, queue = np.empty(longest + 1), np.empty(longest, np.int64)
    for e in range(first, last):
        start, end = offsets[e], offsets[e + 1]
        tail, head, work = start, start, 0
        for q in range(asked_offsets[e], asked_offsets[e + 1]):
            low = (asked[q] - windows[widest]) // hops[widest] * hops[widest]
            while tail < end and times[tail] < low:
                tail += 1
            while head < end and times[head] < asked[q]:
                head += 1
            work += head - tail
        if work <= 4 * len(windows) * (end - start):
            _read_back(e, start, end, times, values, asked_offsets, asked, asked_rows, windows, hops, count, total, top)
            continue
        sums[0] = 0.0
        for at in range(start, end):
            sums[at - start + 1] = sums[at - start] + values[at]
        for w in range(len(windows)):
            _sweep(
                e, start, end, times, values, asked_offsets, asked, asked_rows, w, windows[w], hops[w], sums, queue,
                count, total, top,
            )  # fmt: skip


@compiled
def _read_back(e, start, end, times, values, asked_offsets, asked, asked_rows, windows, hops, count, total, top):
    head = start
    for q in range(asked_offsets[e], asked_offsets[e + 1]):
        while head < end and times[head] < asked[q]:
            head += 1
        at, added, highest = head, 0.0, -np.inf
        for w in range(len(windows)):
            low = (asked[q] - windows[w]) // hops[w] * hops[w]
            while at > start and times[at - 1] >= low:
                at -= 1
                added += values[at]
                highest = max(highest, values[at])
            row = asked_rows[q]
            count[row, w], total[row, w], top[row, w] = head - at, added, highest


@compiled
def _sweep(
    e, start, end, times, values, asked_offsets, asked, asked_rows, w, window, hop, sums, queue, count, total, top
):  # fmt: skip
    tail, head, front, back = start, start, 0, 0  # queue[front:back]: the events that may still be the maximum
    for q in range(asked_offsets[e], asked_offsets[e + 1]):
        while head < end and times[head] < asked[q]:
            while back > front and values[queue[back - 1]] <= values[head]:
                back -= 1
            queue[back] = head
            back += 1
            head += 1
        low = (asked[q] - window) // hop * hop
        while tail < head and times[tail] < low:
            tail += 1
        while front < back and queue[front] < tail:
            front += 1
        row = asked_rows[q]
        count[row, w], total[row, w] = head - tail, sums[head - start] - sums[tail - start]
        top[row, w] = values[queue[front]] if front < back else -np.inf
