"""Point-in-time matching: for each asking row the place of its row in the source, before any value is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Events
from feature_store.aggregations.known import last_known

NONE = -1


@dataclass(frozen=True)
class Matches:
    """What asking rows found: the place in the source (`rows`, NONE where there is none) and event time of each.

    `tie` is the number of the tie that an asking row ended in (NONE: no tie): the rows of the source with the same
    key, event time and created time. Tie `ties[i]` has the row `tied_rows[i]`.
    """

    rows: np.ndarray
    times: np.ndarray
    tie: np.ndarray
    ties: np.ndarray
    tied_rows: np.ndarray

    @classmethod
    def joined(cls, parts: Iterable[Matches]) -> Matches:
        """The matches of several parts of a spine, one after another; their ties numbered through."""
        whole: list[Matches] = []
        numbered = 0
        for part in parts:
            tie = np.where(part.tie == NONE, NONE, part.tie + numbered)
            whole.append(replace(part, tie=tie, ties=part.ties + numbered))
            numbered += int(part.ties.max(initial=NONE)) + 1
        return cls(*(np.concatenate([getattr(m, name) for m in whole]) for name in cls.__dataclass_fields__))

    def untied(self, ties: np.ndarray, winners: np.ndarray) -> Matches:
        """The same matches where each tie is won by one row."""
        winner = np.empty(len(ties), np.int64)
        winner[ties] = winners
        return replace(self, rows=np.where(self.tie == NONE, self.rows, winner[self.tie]))

    def row_times(self) -> pa.Array:
        """The event time of each asking row's row, null where there is none."""
        return pa.array(self.times, mask=self.rows == NONE)


def match(events: Events, places: np.ndarray, entity: np.ndarray, time: np.ndarray) -> Matches:
    """The newest event at or before each time, `places` being the events' places in the source.

    Where `events.known` is given, the newest of those known at that time.
    """
    if not len(places):
        nothing = np.zeros(0, np.int64)
        return Matches(
            np.full(len(time), NONE), np.zeros(len(time), np.int64), np.full(len(time), NONE), nothing, nothing
        )
    place = events.rank(entity, time + 1)
    place = place - 1 if events.known is None else last_known(events.known, place, time)
    found = (entity >= 0) & (place >= events.starts(entity))
    safe = np.where(found, place, 0)
    rows, times = np.where(found, places[safe], NONE), events.times[safe]
    tie, ties, tied = _ties(events, safe, found)
    return Matches(rows, times, tie, ties, places[tied])


def _ties(events: Events, place: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of the tie that each found place ends, and for every tie its members' places."""
    count = len(events.times)
    parts = (events.entity, events.times, events.created)
    fresh = np.concatenate([[True], np.any([part[1:] != part[:-1] for part in parts], axis=0)])[:count]
    start = np.maximum.accumulate(np.where(fresh, np.arange(count), 0))
    ends = distinct(place[found & (start[place] < place)])
    size = ends - start[ends] + 1
    ties = np.repeat(np.arange(len(ends)), size)
    members = np.arange(len(ties)) - np.repeat(np.cumsum(size) - size, size) + np.repeat(start[ends], size)
    number = np.searchsorted(ends, place)
    ended = found & (number < len(ends)) & (np.append(ends, NONE)[np.minimum(number, len(ends))] == place)
    return np.where(ended, number, NONE), ties, members


def distinct(places: np.ndarray) -> np.ndarray:
    """The distinct places, ascending. (numpy's own `unique` hashes, several times slower than one sort here.)"""
    ordered = np.sort(places)
    return ordered[np.diff(ordered, prepend=NONE - 1) > 0]
