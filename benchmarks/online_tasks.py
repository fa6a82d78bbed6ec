"""What workers do for the online bench: answer once, for the check of values, and measure many calls one by one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.online_data import DAY, Rows, Truth, Values, View
from benchmarks.online_sides import Place, open_side

#: Calls of a round: enough for a 99th percentile, and not so many that one contender's turn lasts for long.
_FEWEST, _MOST = 100, 2_000
_WARM_UP = 20

Figures = dict[str, float]


class Reads:
    """A way of reading: `opener` is the method of the side that gives it, called with `arguments`."""

    def __init__(self, side: str, place: Place, opener: str, arguments: tuple, requests: list[list[int]]) -> None:
        self._read = getattr(open_side(side, place), opener)(*arguments)
        self._requests = cycle(requests)
        self._estimate = _estimated(self._read, islice(self._requests, _WARM_UP))

    def answer(self, keys: list[int]) -> Values:
        """The values read for those keys."""
        answer = self._read(keys)
        return answer if isinstance(answer, dict) else answer.to_dict()

    def size(self, keys: list[bytes]) -> int:
        """Bytes that a bare MGET of those keys brings."""
        return sum(len(value) for value in self._read(keys) if value)

    def measure(self, seconds: float) -> Figures:
        """One round of about so many seconds: see `timed`."""
        return timed(self._read, islice(self._requests, _calls(seconds, self._estimate)))


class Writes:
    """A way of writing batches of `rows` rows of a view, every one newer than all before."""

    def __init__(self, side: str, place: Place, view: View, rows: int) -> None:
        opened = open_side(side, place)
        self._writer, self._read = opened.writer(view), opened.reader(view)
        self._batches, self._rows = view.newer(rows), rows
        self._estimate = _estimated(self._writer.write, self._prepared(3))

    def newest_wins(self) -> tuple[Values, Values]:
        """Writes newer rows, then older ones of the same keys: what is read then, and what must be read."""
        newer = next(self._batches)
        older = Rows(newer.keys, newer.times - DAY, newer.values + 1.0)
        for rows in (newer, older):
            self._writer.write(self._writer.prepare(rows))
        keys = newer.keys.tolist()
        return self._read(keys), Truth(newer).answer(keys)

    def measure(self, seconds: float) -> Figures:
        """One round of about so many seconds: rows a second by the median call (`rate`), microseconds of the 99th
        percentile of a call (`p99`) and of processor time a row (`cpu`). Rows are prepared before.
        """
        calls = _calls(seconds, self._estimate, fewest=5)
        figures = timed(self._writer.write, self._prepared(calls))
        return {"rate": self._rows * 1e6 / figures["p50"], "p99": figures["p99"], "cpu": figures["cpu"] / self._rows}

    def _prepared(self, number: int) -> Iterator[Any]:
        return (self._writer.prepare(rows) for rows in islice(self._batches, number))


def _estimated(run: Callable[[Any], Any], requests: Iterable[Any]) -> float:
    """Seconds a call takes when warm, roughly: the median of a few."""
    return timed(run, requests)["p50"] / 1e6


def _calls(seconds: float, estimate: float, fewest: int = _FEWEST) -> int:
    return min(_MOST, max(fewest, round(seconds / estimate)))


def timed(run: Callable[[Any], Any], requests: Iterable[Any]) -> Figures:
    """Runs a call for each request, one after the other: microseconds of the median call (`p50`) and of the 99th
    percentile (`p99`), and of processor time a call in this process (`cpu`).
    """
    waiting = list(requests)
    clock, durations = time.perf_counter_ns, []
    gc.collect()
    cpu = time.process_time()
    for request in waiting:
        start = clock()
        run(request)
        durations.append(clock() - start)
    cpu = time.process_time() - cpu
    p50, p99 = np.percentile(durations, [50, 99]) / 1e3
    return {"p50": float(p50), "p99": float(p99), "cpu": cpu / len(waiting) * 1e6}
