"""A windowed view's online state: filled from the event log, appended to by events, read as of any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, ColumnFold, EventLog, Events
from feature_store.aggregations.events import to_arrow as numbers_to_arrow
from feature_store.aggregations.finalize import finalize
from feature_store.aggregations.measures import State, combine
from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.errors import BootstrapSuperseded, PositionGap, RequestError
from feature_store.stores.online.embedded import EmbeddedBackend, Snapshot, Transaction
from feature_store.stores.online.head import HeadCodec, rows_of
from feature_store.stores.online.keys import BUCKETS, KINDS, Keyspace, bucket_of, entity_key, generation_key
from feature_store.stores.online.records import (
    Bucket,
    Generation,
    bucket_record,
    claim_next,
    claimed,
    delete_others,
    generation_of,
    positions_of,
)
from feature_store.stores.online.staircase import Base, Ordered, StaircaseCodec, newest, present_first
from feature_store.stores.online.values import from_arrow, to_arrow
from feature_store.timestamps import BEGINNING, SECOND

#: How far behind its clock a writer settles events: what arrives within it needs no special care.
SETTLE = 60 * SECOND

#: Head rows beyond which an append also compacts, and past rows beyond which it settles without waiting.
COMPACT_ROWS = 64
LONGEST_HEAD = 1_024

#: Entities written in one transaction by a bootstrap.
_CHUNK = 20_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WindowedRead:
    """What the store holds of some entities, as of a time each.

    `values` by aggregation name; `known` whether the entity has any event here; `exact_from` the earliest time its
    state can answer exactly; `positions` per entity the log positions its bucket has folded since the bootstrap of
    this `generation`.
    """

    values: dict[str, pa.Array]
    known: np.ndarray
    exact_from: np.ndarray
    positions: list[dict[int, tuple[int, int]]]
    generation: Generation


@dataclass(frozen=True)
class Appended:
    """What an append did: rows `applied`, rows `repeated` (their position was folded before), the `next` offset."""

    applied: int
    repeated: int
    next: int


@dataclass(frozen=True)
class WindowedOnline:
    """One windowed view in an embedded store. `settle` in microseconds."""

    backend: EmbeddedBackend
    project: str
    view: WindowedView
    settle: int = SETTLE
    _codec: StaircaseCodec = field(init=False)
    _head: HeadCodec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_codec", StaircaseCodec(self.view))
        object.__setattr__(self, "_head", HeadCodec.of(self.view))

    @cached_property
    def _types(self) -> dict[str, ValueType]:
        return self.view.column_types()

    # -- filling ------------------------------------------------------------------------------------------------

    def begin(self) -> Keyspace:
        """Begins a generation. From here on appends go into it too, so that a log read afterwards misses none."""
        with self.backend.writing() as txn:
            return claim_next(txn, self.project, self.view.name)

    def bootstrap(
        self, log: EventLog, now: int, until: int, progress: Progress | None = None, space: Keyspace | None = None
    ) -> int:
        """Replaces the view's state by the fold of an event log and says how many entities it has.

        `now` is the writer's clock: events before `now - settle` are settled into staircases, later ones stay raw;
        `until` is the event time up to which the log was read. The generation `space` (a new one, if not begun
        before) is filled beside the old one and readers switch in one transaction, so a failure leaves what was
        there. Log positions carry over. Raises BootstrapSuperseded when another bootstrap began meanwhile.
        """
        exact_from = now - self.settle
        space = space or self.begin()
        entities = [entity_key(values) for values in _key_rows(log.keys, self.view)]
        bases, heads = self._fold(log.events, exact_from)
        for low in range(0, len(entities), _CHUNK):
            with self.backend.writing() as txn:
                for i in range(low, min(low + _CHUNK, len(entities))):
                    if len(bases[i].starts) or any(map(len, bases[i].lasts.values())):
                        txn.put(space.entity(b"S", entities[i]), self._codec.encode(bases[i]))
                    if heads[i]:
                        key = space.entity(b"H", entities[i])
                        txn.put(key, (txn.get(key) or b"") + heads[i])
            if progress:
                progress(min(low + _CHUNK, len(entities)), len(entities))
        self._switch(space, exact_from, until)
        return len(entities)

    def _fold(self, events: Events, exact_from: int) -> tuple[list[Base], list[bytes]]:
        settled, recent = _split(events, exact_from)
        rows = self._head.encode(rows_of(recent, self._types, np.arange(len(recent.times))))
        offsets = recent.offsets.tolist()
        heads = [b"".join(rows[a:b]) for a, b in pairwise(offsets)]
        return self._codec.build(settled, exact_from), heads

    def _switch(self, space: Keyspace, exact_from: int, until: int) -> None:
        with self.backend.writing() as txn:
            overtaken = claimed(txn, self.project, self.view.name) != space.generation
            if overtaken:
                for kind in KINDS:
                    txn.delete_prefix(space.prefix(kind))
            else:
                self._publish(txn, space, exact_from, until)
        if overtaken:
            raise BootstrapSuperseded(self.view.name)

    def _publish(self, txn: Transaction, space: Keyspace, exact_from: int, until: int) -> None:
        key = generation_key(self.project, self.view.name)
        partitions = positions_of(txn.get(key))
        for bucket in range(BUCKETS):
            txn.put(space.bucket(bucket), Bucket(exact_from, partitions=partitions).encode())
        txn.put(key, Generation(space.generation, self.view.fingerprint, until, partitions).encode())
        delete_others(txn, space)

    # -- appending ----------------------------------------------------------------------------------------------

    def append(
        self,
        txn: Transaction,
        keys: pa.Table,
        events: Events,
        now: int,
        partition: int,
        offset: int | None,
        epoch: int = 0,
    ) -> Appended:
        """Appends events to the heads of their entities, together with the log position they cover.

        `events` holds one event an entity slot, in log order; `keys` their join keys. `offset` is that of the first;
        events below the partition's next offset were folded before and change nothing; None appends at the next one.
        Raises PositionGap where events would be skipped, StoreNotReady before a bootstrap.
        """
        generation = generation_of(txn, self.project, self.view)
        _check_position(partition, offset)
        following = self._following(generation, partition, epoch, offset)
        first = following if offset is None else offset
        repeated = min(max(following - first, 0), len(events.times))
        fresh = np.arange(repeated, len(events.times))
        after = first + len(events.times)
        if not fresh.size:
            return Appended(0, repeated, following)
        space = Keyspace(self.project, self.view.name, generation.number)
        entities = [entity_key(values) for values in _key_rows(keys.slice(repeated), self.view)]
        grouped: dict[bytes, list[bytes]] = {}
        for entity, row in zip(entities, self._head.encode(rows_of(events, self._types, fresh)), strict=True):
            grouped.setdefault(entity, []).append(row)
        for bucket in {bucket_of(entity) for entity in grouped}:
            record = bucket_record(txn, space, bucket)
            moved = Bucket(record.exact_from, record.fence, {**record.partitions, partition: (epoch, after)})
            txn.put(space.bucket(bucket), moved.encode())
        begun = Keyspace(self.project, self.view.name, claimed(txn, self.project, self.view.name))
        for entity, rows in grouped.items():
            self._extend(txn, space, entity, b"".join(rows), now)
            if begun.generation > space.generation:
                key = begun.entity(b"H", entity)
                txn.put(key, (txn.get(key) or b"") + b"".join(rows))
        partitions = {**generation.partitions, partition: (epoch, after)}
        txn.put(
            generation_key(self.project, self.view.name),
            msgspec.structs.replace(generation, partitions=partitions).encode(),
        )
        return Appended(len(fresh), repeated, after)

    def _following(self, generation: Generation, partition: int, epoch: int, offset: int | None) -> int:
        """The next offset of a partition; one that was never seen starts wherever its first events do."""
        known_epoch, following = generation.partitions.get(partition, (epoch, offset or 0))
        if epoch != known_epoch or (offset is not None and offset > following):
            raise PositionGap(self.view.name, partition, following, offset or 0)
        return following

    def _extend(self, txn: Transaction, space: Keyspace, entity: bytes, rows: bytes, now: int) -> None:
        key = space.entity(b"H", entity)
        before = txn.get(key) or b""
        head = before + rows
        # Once every so many rows, not on every append past them: future rows stay raw however often one looks.
        if self._head.count(head) // (COMPACT_ROWS or 1) > self._head.count(before) // (COMPACT_ROWS or 1):
            head = self._compact(txn, space, entity, head, now)
        if head:
            txn.put(key, head)
        else:
            txn.delete(key)

    def _compact(self, txn: Transaction, space: Keyspace, entity: bytes, head: bytes, now: int) -> bytes:
        """Folds settled head rows into the entity's staircase and returns the rows that stay raw."""
        stored = txn.get(space.entity(b"S", entity))
        base = self._codec.decode(stored) if stored else None
        floor = base.exact_from if base else bucket_record(txn, space, bucket_of(entity)).exact_from
        rows = self._head.split(head)
        times = self._head.times(head)
        cut = max(floor, now - self.settle)
        if np.count_nonzero((times >= cut) & (times < now)) > LONGEST_HEAD:
            cut = max(cut, now)
        settled = b"".join(row for row, time in zip(rows, times.tolist(), strict=True) if time < cut)
        if not settled:
            return head
        merged = self._codec.merge(base, self._head.events([settled]), cut)
        txn.put(space.entity(b"S", entity), self._codec.encode(merged))
        return b"".join(row for row, time in zip(rows, times.tolist(), strict=True) if time >= cut)

    # -- reading ------------------------------------------------------------------------------------------------

    def read(
        self, txn: Snapshot, names: Iterable[str], entities: Sequence[bytes | None], times: np.ndarray
    ) -> WindowedRead:
        """The named aggregations for each entity (None: a null key, which has no events) as of its time."""
        generation = generation_of(txn, self.project, self.view)
        space = Keyspace(self.project, self.view.name, generation.number)
        if not entities:
            empty = {name: pa.array([], self.view.feature_type(name).arrow) for name in names}
            return WindowedRead(empty, np.zeros(0, bool), np.zeros(0, np.int64), [], generation)
        bases: list[Base | None] = []
        heads: list[bytes | None] = []
        exact_from: list[int] = []
        positions: list[dict[int, tuple[int, int]]] = []
        for entity in entities:
            if entity is None:
                bases.append(None)
                heads.append(None)
                exact_from.append(BEGINNING)
                positions.append({})
                continue
            record = bucket_record(txn, space, bucket_of(entity))
            stored = txn.get(space.entity(b"S", entity))
            bases.append(self._codec.decode(stored) if stored else None)
            heads.append(txn.get(space.entity(b"H", entity)))
            last = bases[-1]
            exact_from.append(last.exact_from if last else record.exact_from)
            positions.append(record.partitions)
        known = np.array([b is not None or bool(h) for b, h in zip(bases, heads, strict=True)], bool)
        wanted = [self.view.aggregation(name) for name in names]
        values = _Reading(self._codec, bases, self._head.events(heads), times).values(wanted)
        return WindowedRead(values, known, np.array(exact_from, np.int64), positions, generation)


@dataclass(frozen=True)
class _Reading:
    """One read under way: the staircases and heads of some entities, and the time each is asked for."""

    codec: StaircaseCodec
    bases: list[Base | None]
    heads: Events
    times: np.ndarray

    def values(self, aggregations: list[Aggregation]) -> dict[str, pa.Array]:
        slots = np.arange(len(self.bases))
        end = self.heads.rank(slots, self.times)
        values: dict[str, pa.Array] = {}
        folds: dict[str, ColumnFold] = {}
        windows: dict[tuple[int, int], tuple[list[int | None], np.ndarray]] = {}
        states: dict[tuple[str, int, int], State] = {}
        for a in aggregations:
            window = (a.window, a.hop)
            if window not in windows:
                tails = [a.tail(t) for t in self.times.tolist()]
                low = self.heads.rank(slots, np.array([BEGINNING if t is None else t for t in tails], np.int64))
                windows[window] = (tails, low)
            tails, low = windows[window]
            if a.column != "*" and a.column not in folds:
                folds[a.column] = ColumnFold.of(self.heads, a.column)
            if a.function.kind in ("first", "last", "last_n"):
                values[a.name] = self._ordered(a, folds[a.column], tails, low, end)
                continue
            if (a.column, *window) not in states:
                states[a.column, *window] = self._state(a.column, folds.get(a.column), tails, low, end)
            column_type = self.codec.columns[a.column].type if a.column != "*" else ValueType.INT64
            values[a.name] = numbers_to_arrow(*finalize(a.function, column_type, states[a.column, *window]), a.output)
        return values

    def _state(self, column: str, fold: ColumnFold | None, tails: list, low: np.ndarray, end: np.ndarray) -> State:
        """Base and head of one column over one window, combined."""
        parts = [
            self.codec.state_at(column, base, base.entry(tail) if base else 0)
            for base, tail in zip(self.bases, tails, strict=True)
        ]
        settled = parts[0] if len(parts) == 1 else {f: np.concatenate([p[f] for p in parts]) for f in parts[0]}
        if fold is None:
            return combine(settled, {"n": end - low}, ())
        measures = self.codec.columns[column].measures
        return combine(settled, fold.fold(*fold.narrow(low, end), measures), measures)

    def _ordered(self, a: Aggregation, fold: ColumnFold, tails: list, low: np.ndarray, end: np.ndarray) -> pa.Array:
        first, last = fold.narrow(low, end)
        found = []
        for base, tail, f, n in zip(self.bases, tails, first.tolist(), last.tolist(), strict=True):
            raw = _raw_values(self.heads, fold, fold.rows[f:n])
            found.append(
                self._first(a, base, tail, raw) if a.function.kind == "first" else self._last(a, base, tail, raw)
            )
        if a.function.kind == "last_n":
            return to_arrow(found, a.output)
        return to_arrow([values[0] if values else None for values in found], a.output)

    def _first(self, a: Aggregation, base: Base | None, tail: int | None, raw: Ordered) -> list[Any]:
        entry = base.entry(tail) if base else 0
        candidates = raw.at([0]) if len(raw) else raw
        if base and entry < len(base.starts) and present_first(base.firsts[a.column].times[entry]):
            settled = base.firsts[a.column].at([entry])
            if not len(candidates) or settled.keys()[0] <= candidates.keys()[0]:
                candidates = settled
        return candidates.values

    def _last(self, a: Aggregation, base: Base | None, tail: int | None, raw: Ordered) -> list[Any]:
        n = a.function.n or 1
        settled = base.lasts[a.column] if base else Ordered([], [], [])
        inside = [i for i, time in enumerate(settled.times) if tail is None or time >= tail]
        return newest(settled.at(inside), raw, n).values


def _check_position(partition: int, offset: int | None) -> None:
    if not 0 <= partition < 2**32:
        raise RequestError("partition", f"is {partition}, not a number from 0 to 4,294,967,295")
    if offset is not None and not 0 <= offset < 2**63:
        raise RequestError("offset", f"is {offset}, not a number from 0 on")


def _raw_values(events: Events, fold: ColumnFold, rows: np.ndarray) -> Ordered:
    values = from_arrow(fold.column.arrow.take(pa.array(rows)), fold.column.type)
    return Ordered(events.times[rows].tolist(), events.created[rows].tolist(), values)


def _split(events: Events, cut: int) -> tuple[Events, Events]:
    """The events before a time and those from it on, entity by entity."""
    entity = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets))
    before = events.times < cut
    return _only(events, entity, before), _only(events, entity, ~before)


def _only(events: Events, entity: np.ndarray, mask: np.ndarray) -> Events:
    rows = np.flatnonzero(mask)
    counts = np.bincount(entity[rows], minlength=len(events.offsets) - 1)
    return Events(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        events.times[rows],
        events.created[rows],
        {
            n: Column(c.type, c.values[rows], c.valid[rows], c.arrow.take(pa.array(rows)))
            for n, c in events.columns.items()
        },
    )


def _key_rows(keys: pa.Table, view: WindowedView) -> list[tuple]:
    if not view.keys:
        return [()] * keys.num_rows
    columns = [from_arrow(keys[k.name].combine_chunks(), k.type) for k in view.keys]
    return list(zip(*columns, strict=True))
