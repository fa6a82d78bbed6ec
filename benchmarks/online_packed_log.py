"""Windows by hand over raw events: one string an entity, to which every event is appended, folded by the reader.

It is given what makes it fastest: events arrive in the order of time, there are no nulls, and what is older than any
window is trimmed for free.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import redis

from benchmarks.online_data import KEY, WINDOWED, WINDOWS, EventLog, Values
from benchmarks.online_sides import HOST, Place

_KEY = struct.Struct("<cq")
EVENT = np.dtype([("time", "<i8"), ("amount", "<f8")])
_PIPELINED = 100


class PackedLog:
    """Implements the windowed side. A key is a letter, then the entity's key."""

    LETTER = b"e"

    def __init__(self, place: Place) -> None:
        self._redis = redis.Redis(HOST, place.port)

    def fill_windows(self, log: EventLog) -> None:
        keys, times, amounts = log.columns()
        order = np.argsort(keys, kind="stable")
        events = np.empty(len(order), EVENT)
        events["time"], events["amount"] = times[order], amounts[order]
        entities, starts = np.unique(keys[order], return_index=True)
        with self._redis.pipeline(transaction=False) as pipe:
            for number, (entity, own) in enumerate(zip(entities.tolist(), np.split(events, starts[1:]), strict=True)):
                pipe.set(_KEY.pack(self.LETTER, entity), own.tobytes())
                if number % _PIPELINED == _PIPELINED - 1:
                    pipe.execute()
            pipe.execute()

    def window_reader(self, log: EventLog, compiled: bool = False) -> Callable[[list[int]], Values]:
        """One MGET through redis-py, folded in numpy; there is no compiled path."""
        mget, until = self._redis.mget, log.until

        def read(keys: list[int]) -> Values:
            return fold(keys, mget(self.window_keys(log, keys)), until)

        return read

    def window_keys(self, log: EventLog, keys: list[int]) -> list[bytes]:
        """The keys in Redis that a read of these entities fetches."""
        pack, letter = _KEY.pack, self.LETTER
        return [pack(letter, key) for key in keys]


def fold(keys: list[int], stored: list[bytes | None], until: int) -> Values:
    """Key column and `WINDOWED` as lists, as of `until`, of one string of events a key; a key without one has none."""
    strings = [string or b"" for string in stored]
    ends = np.cumsum([len(string) for string in strings]) // EVENT.itemsize
    # One event more than there are: a place behind the last one is a place too.
    events = np.frombuffer(b"".join([*strings, bytes(EVENT.itemsize)]), EVENT)
    borders = _borders(events["time"], ends, until)
    counts, totals, tops = _windows(events["amount"], borders)
    some = counts > 0
    means = np.divide(totals, counts, where=some, out=np.zeros(totals.shape))
    columns = [*counts.T.tolist(), *_lists(totals, some), *_lists(means, some), *_lists(tops, some)]
    return {KEY: keys, **dict(zip(WINDOWED, columns, strict=True))}


def _borders(times: np.ndarray, ends: np.ndarray, until: int) -> np.ndarray:
    """For each entity (a line) where each window starts, longest first, and where the reader's time is, as places in
    all events; an entity's events end at `ends`.
    """
    asked = np.array([(until - window) // hop * hop for window, hop in reversed(WINDOWS)] + [until])
    if len(ends) == 1:
        return np.searchsorted(times[: ends[0]], asked)[np.newaxis]
    # All entities and windows bisected at once: numpy's own search would copy each entity's times first.
    low = np.broadcast_to(np.concatenate([[0], ends[:-1]])[:, np.newaxis], (len(ends), len(asked))).copy()
    high = np.broadcast_to(ends[:, np.newaxis], low.shape).copy()
    for _ in range(int(np.max(high - low, initial=0)).bit_length()):
        middle = (low + high) >> 1
        before = (times[middle] < asked) & (low < high)
        low = np.where(before, middle + 1, low)
        high = np.where(before, high, middle)
    return low


def _windows(amounts: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, sum and maximum of each entity's windows, shortest first.

    A window holds all shorter ones: every event is folded once, into the piece between two starts, and a window is the
    pieces behind its start.
    """
    empty = borders[:, 1:] == borders[:, :-1]
    pieces = [ufunc.reduceat(amounts, borders.ravel()).reshape(borders.shape)[:, :-1] for ufunc in (np.add, np.maximum)]
    totals, tops = np.where(empty, 0.0, pieces[0]), np.where(empty, -np.inf, pieces[1])
    counts = borders[:, -1:] - borders[:, -2::-1]
    return counts, np.cumsum(totals[:, ::-1], axis=1), np.maximum.accumulate(tops[:, ::-1], axis=1)


def _lists(values: np.ndarray, some: np.ndarray) -> list[list[Any]]:
    """A list a window; None where it has no events."""
    columns = values.T.tolist()
    if not some.all():
        for window, entity in zip(*(places.tolist() for places in np.nonzero(~some.T)), strict=True):
            columns[window][entity] = None
    return columns
