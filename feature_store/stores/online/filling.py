"""Filling a windowed view from its event log: the fold of the past, at batch speed, beside what readers use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, EventLog, Events
from feature_store.stores.online.backend import APPEND, SET, Change, Write
from feature_store.stores.online.entities import entity_keys
from feature_store.stores.online.erasing import erase
from feature_store.stores.online.head import rows_of
from feature_store.stores.online.keys import Keyspace, bucket_of
from feature_store.stores.online.windowed import WindowedOnline

#: Entities written at once.
_CHUNK = 5_000

Progress = Callable[[int, int], None]


def bootstrap(
    online: WindowedOnline,
    log: EventLog,
    now: int,
    until: int,
    progress: Progress | None = None,
    space: Keyspace | None = None,
) -> int:
    """Replaces a view's state by the fold of an event log and says how many entities it has.

    `now` is the writer's clock: events before `now - settle` are settled into staircases, later ones stay raw; `until`
    is the event time up to which the log was read. The generation `space` (a new one, if not begun before) is filled
    beside the old one and readers change over at the end, so a failure leaves what was there. Log positions carry over.
    Raises BootstrapSuperseded when another bootstrap began meanwhile.
    """
    exact_from = now - online.settle
    space = space or online.generations.begin()
    entities = entity_keys(log.keys, online.view.keys)
    settled, recent = _split(log.events, exact_from)
    for low in range(0, len(entities), _CHUNK):
        high = min(low + _CHUNK, len(entities))
        bases = online.builder.build(_slice(settled, low, high), exact_from)
        heads = _heads(online, _slice(recent, low, high))
        writes: dict[int, list[Change]] = {}
        for entity, base, head in zip(entities[low:high], bases, heads, strict=True):
            changes = writes.setdefault(bucket_of(entity), [])
            if len(base.starts) or any(map(len, base.lasts.values())):
                changes.append((SET, space.entity(b"S", entity), online.codec.encode(base)))
            if head:
                # Appended: what came while this generation was being filled lies there already.
                changes.append((APPEND, space.entity(b"H", entity), head))
        online.backend.apply([Write([], changes) for changes in writes.values() if changes], once=True)
        if progress:
            progress(high, len(entities))
    for erasure in online.erasures().since(log.erasures):
        # Made while this generation was being filled: readers must not find the entity again when they change over.
        erase(online, erasure, only=space)
    online.generations.publish(space, exact_from, until)
    return len(entities)


def _heads(online: WindowedOnline, events: Events) -> list[bytes]:
    rows = online.head.encode(rows_of(events, online.types, np.arange(len(events.times))))
    return [b"".join(rows[a:b]) for a, b in pairwise(events.offsets.tolist())]


def _slice(events: Events, low: int, high: int) -> Events:
    """The events of some entities."""
    first, last = int(events.offsets[low]), int(events.offsets[high])
    return Events(
        events.offsets[low : high + 1] - first,
        events.times[first:last],
        events.created[first:last],
        {n: _column(c, slice(first, last), c.arrow.slice(first, last - first)) for n, c in events.columns.items()},
    )


def _split(events: Events, cut: int) -> tuple[Events, Events]:
    """The events before a time and those from it on, entity by entity."""
    before = events.times < cut
    return _only(events, before), _only(events, ~before)


def _only(events: Events, mask: np.ndarray) -> Events:
    rows = np.flatnonzero(mask)
    counts = np.bincount(events.entity[rows], minlength=len(events.offsets) - 1)
    return Events(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        events.times[rows],
        events.created[rows],
        {n: _column(c, rows, c.arrow.take(pa.array(rows))) for n, c in events.columns.items()},
    )


def _column(column: Column, rows: slice | np.ndarray, arrow: pa.Array) -> Column:
    return Column(column.type, column.values[rows], column.valid[rows], arrow)
