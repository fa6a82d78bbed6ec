"""A plain view's rows in the online store: written so that the newest stays, read as of any time they can answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from typing import TypeVar

import numpy as np
import pyarrow as pa

from feature_store.definitions.erasure import (
    NO_ERASURES,
    Erasures,
    LoadErasures,
    left_out,
    no_erasures,
    when_known,
)
from feature_store.definitions.view import PlainView
from feature_store.errors import BootstrapSuperseded, CorruptState, StoreNotReady
from feature_store.stores.online.backend import NEWER, SET, UNDECIDED, Backend, Change, Write, settle
from feature_store.stores.online.blocks import Lists
from feature_store.stores.online.entities import entity_keys
from feature_store.stores.online.keys import Keyspace, bucket_of, buckets_of, entity_values
from feature_store.stores.online.records import Bucket
from feature_store.stores.online.rows import CREATED, TIME, Chosen, PackedRows, Row, RowCodec, keep
from feature_store.stores.online.status import Status
from feature_store.stores.online.values import from_arrow
from feature_store.stores.online.view import Found, OnlineView, ViewRead
from feature_store.timestamps import BEGINNING

__all__ = ["CREATED", "TIME", "PlainOnline"]

logger = logging.getLogger(__name__)

Done = TypeVar("Done")

_ONE, _FIRST = np.ones(1, bool), np.zeros(1, np.int64)

#: Rows written at once: what is held in memory, and how long the store is kept busy by one request, stay bounded.
_CHUNK = 20_000

#: Values offered in one write where its keys may be of any bucket.
_OFFERED = 128


@dataclass(frozen=True)
class _Guard:
    """What writes into a bucket are guarded by: its record. With it the generation that is filled beside (0: none), and
    the erasures that had been made when it was read: one made later breaks it, where it matters.
    """

    record: bytes
    successor: int
    erasures: Erasures


@dataclass(frozen=True)
class _Few:
    """One of a few rows to be written: its entity, and the row as it was given and encoded."""

    entity: bytes
    row: Row
    encoded: bytes


@dataclass(frozen=True)
class _Share:
    """Entities that are offered values in one write: their places, and their buckets."""

    places: np.ndarray
    buckets: list[int]


class _Gone(Exception):
    """A bucket that was to be written into is not there: its generation was left, or the store lost it."""

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        super().__init__(bucket)


class _ErasedMeanwhile(Exception):
    """An entity was erased after rows to be written were looked at for erased ones: look again."""


class PlainOnline(OnlineView):
    """One plain view in an online store."""

    kinds = (b"P",)

    def __init__(self, backend: Backend, project: str, view: PlainView, erasures: LoadErasures = no_erasures) -> None:
        super().__init__(backend, project, view, erasures)
        self.view = view
        self._codec = RowCodec(view)
        self._chosen = lru_cache(maxsize=64)(self._codec.chosen)
        # Guards by bucket of the generation that was written into last, and the erasures heard of last. Threads share
        # them: each guard stands for itself, and is never changed.
        self._guards: tuple[int, dict[int, _Guard]] = (0, {})
        self._heard = NO_ERASURES

    # -- writing ------------------------------------------------------------------------------------------------

    def replace(self, table: pa.Table, now: int, space: Keyspace | None = None) -> int:
        """Replaces the view's rows by a table's (keys, `__time`, `__created`, features); how many entities.

        `space` is the generation to fill, begun before the table was read, so that what is written meanwhile is kept;
        a new one, if not given. Readers see the former rows until all of them are written. Raises BootstrapSuperseded
        when another filling began meanwhile.
        """
        space = space or self.generations.begin()
        count = self._write(space, table, now)
        self.generations.publish(space, BEGINNING, BEGINNING)
        return count

    def write(self, table: pa.Table, now: int) -> int:
        """Adds rows: the newer event time wins, then the newer created time, then the greater values; how many keys.

        Rows later than `now` wait beside the current one; those at or below an erasure are left out, which is logged.
        Raises StoreNotReady when what is stored is of another definition: a few rows are no replacement for it.
        """
        return self._write(self._current_space(), table, now)

    def write_rows(self, entities: Sequence[bytes], rows: Sequence[Row], now: int) -> int:
        """The same for a few rows, given beside their entities. Raises RequestError for a value of the wrong type."""
        few = [_Few(*one, self._codec.checked(one[1])) for one in zip(entities, rows, strict=True)]
        return self._leaving_out(partial(self._write_few, self._current_space(), few, now))

    def _current_space(self) -> Keyspace:
        """The generation that readers use; an empty one is opened where there is none."""
        if self._seen is None:
            self.generations.open_empty()
            self.notice(self.backend.get([self._record_key])[0])
        assert self._seen is not None
        return self._seen[2]

    def _write_few(self, space: Keyspace, few: Sequence[_Few], now: int, erasures: Erasures) -> int:
        few = self._few_without_erased(few, erasures)
        by_entity: dict[bytes, list[Row]] = {}
        for one in few:
            by_entity.setdefault(one.entity, []).append(self._codec.stored(one.row))
        undecided: Iterable[bytes] = by_entity
        if len(by_entity) == len(few) and max((one.row.time for one in few), default=now) <= now:
            entities = list(by_entity)
            values = lambda places: [few[place].encoded for place in places]  # noqa: E731
            space, undecided = self._offer(space, entities, values, erasures)
        if undecided:
            self._merge(space, undecided, by_entity, now, erasures)
        return len(by_entity)

    def _write(self, space: Keyspace, table: pa.Table, now: int) -> int:
        entities: set[bytes] = set()
        for low in range(0, table.num_rows, _CHUNK):
            chunk = table.slice(low, _CHUNK).combine_chunks()
            entities |= self._leaving_out(partial(self._write_some, space, chunk, now))
        return len(entities)

    def _leaving_out(self, write: Callable[[Erasures], Done]) -> Done:
        """Makes a write that leaves out what is erased, and again where that changed meanwhile: twice does no harm."""
        erasures = self._heard
        while True:
            with contextlib.suppress(_ErasedMeanwhile):
                return write(erasures)
            erasures = self._heard = self.erasures()

    def _without_erased(self, table: pa.Table, erasures: Erasures) -> pa.Table:
        erased = erasures.of(self.view.keys)
        if not erased:
            return table
        created = table[CREATED].combine_chunks().cast(pa.int64()).fill_null(BEGINNING)
        known = when_known(np.asarray(table[TIME]), np.asarray(created), self.view.source.delay)
        gone = left_out(erased, table, known)
        self._say(int(np.count_nonzero(gone)))
        return table.filter(pa.array(~gone))

    def _few_without_erased(self, few: Sequence[_Few], erasures: Erasures) -> Sequence[_Few]:
        erased = erasures.of(self.view.keys)
        if not erased:
            return few
        names = [key.name for key in self.view.keys]
        kept = []
        for one in few:
            known = one.row.time - self.view.source.delay if one.row.created == BEGINNING else one.row.created
            values = dict(zip(names, entity_values(one.entity) or (), strict=True))
            if not any(some.covers_one(values, known) for some in erased):
                kept.append(one)
        self._say(len(few) - len(kept))
        return kept

    def _say(self, count: int) -> None:
        if count:
            logger.warning("view '%s': %d rows of erased entities were left out", self.view.name, count)

    def _check(self, erasures: Erasures) -> None:
        """Raises _ErasedMeanwhile where there are others now. Called after the guards of a write were read: an erasure
        is written down before it breaks guards, so one that is not heard of here breaks these.
        """
        if self.erasures() is not erasures:
            raise _ErasedMeanwhile

    def _write_some(self, space: Keyspace, table: pa.Table, now: int, erasures: Erasures) -> set[bytes]:
        table = self._without_erased(table, erasures)
        entities = entity_keys(table, self.view.keys)
        distinct = set(entities)
        undecided: Iterable[bytes] = distinct
        # Several rows of an entity, and rows that wait, need a look at what is stored; the others go without one.
        if len(distinct) == len(entities) and not (np.asarray(table[TIME]) > now).any():
            space, undecided = self._offer(space, entities, self._codec.encoder(table), erasures)
        if undecided:
            self._merge(space, undecided, self._rows_by_entity(table, entities), now, erasures)
        return distinct

    def _rows_by_entity(self, table: pa.Table, entities: Sequence[bytes]) -> dict[bytes, list[Row]]:
        rows: dict[bytes, list[Row]] = {}
        for entity, row in zip(entities, self._rows(table), strict=True):
            rows.setdefault(entity, []).append(row)
        return rows

    def _rows(self, table: pa.Table) -> Iterable[Row]:
        times = table[TIME].to_pylist()
        created = [BEGINNING if c is None else c for c in table[CREATED].to_pylist()]
        columns = [from_arrow(table[f.name].combine_chunks(), f.type) for f in self.view.features]
        values = zip(*columns, strict=True) if columns else [()] * len(times)
        return [Row(t, c, tuple(v)) for t, c, v in zip(times, created, values, strict=True)]

    def _offer(
        self,
        space: Keyspace,
        entities: Sequence[bytes],
        values: Callable[[np.ndarray], list[bytes]],
        erasures: Erasures,
    ) -> tuple[Keyspace, list[bytes]]:
        """Offers each entity a value of one row, which the store takes if it is newer: the generation that was written
        into in the end, and those entities that the store could not decide on.

        `values` gives those of the entities at some places; entities differ.
        """
        pending = self._shares(entities)
        undecided: list[bytes] = []
        while pending:
            try:
                guards = self._guarded(space, {bucket for share in pending for bucket in share.buckets}, erasures)
            except _Gone as gone:
                space = self._moved(space, gone)
                continue
            writes = (self._offers(space, share, guards, entities, values) for share in pending)
            # Of several the next is made while the store looks at the one before.
            outcomes = self.backend.apply(writes if len(pending) > 1 else list(writes))
            for share, outcome in zip(pending, outcomes, strict=True):
                if outcome is not None and UNDECIDED in outcome:
                    places = share.places.tolist()
                    undecided += {entities[places[i % len(places)]] for i, d in enumerate(outcome) if d == UNDECIDED}
            pending = [share for share, outcome in zip(pending, outcomes, strict=True) if outcome is None]
            if pending:
                self._guards = (0, {})
                space = self._still(space)
        return space, undecided

    def _shares(self, entities: Sequence[bytes]) -> list[_Share]:
        """What is written in one write each: by bucket, for each bucket of a write has to be guarded."""
        buckets = buckets_of(entities)
        if len(entities) < 2:
            return [_Share(_FIRST, buckets)] if entities else []
        numbers = np.array(buckets, np.int64)
        order = np.argsort(numbers, kind="stable")
        ascending = numbers[order]
        starts = range(0, len(order), _OFFERED) if self.backend.one_place else _starts(ascending)
        ends = [*starts[1:], len(order)]
        return [_Share(order[a:b], ascending[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]

    def _offers(
        self,
        space: Keyspace,
        share: _Share,
        guards: dict[int, _Guard],
        entities: Sequence[bytes],
        values: Callable[[np.ndarray], list[bytes]],
    ) -> Write:
        offered, mine = values(share.places), [entities[place] for place in share.places.tolist()]
        changes: list[Change] = []
        # Those that link to no generation, or to an earlier one, are filled anew by whoever fills the latest.
        successor = max(guards[bucket].successor for bucket in share.buckets)
        for into in (space, *self._filled(successor)):
            changes += zip(repeat(NEWER), into.entities(b"P", mine, share.buckets), offered, strict=False)
        return Write([(space.buckets[b], guards[b].record) for b in dict.fromkeys(share.buckets)], changes)

    def _filled(self, successor: int) -> list[Keyspace]:
        """The generation of that number, which is being filled beside the one written into; none for 0."""
        return [self.generations.space(successor)] if successor else []

    def _guarded(self, space: Keyspace, buckets: Iterable[int], erasures: Erasures) -> dict[int, _Guard]:
        """What writes into these buckets are guarded by: as remembered, or read.

        Raises _ErasedMeanwhile where more was erased than `erasures`; _Gone where a record is missing.
        """
        number, known = self._guards
        if number != space.generation:
            known = {}
            self._guards = (space.generation, known)
        used = {bucket: known.get(bucket) for bucket in buckets}
        if wanted := [bucket for bucket, guard in used.items() if guard is None or guard.erasures is not erasures]:
            found = self.backend.get([space.bucket(bucket) for bucket in wanted])
            # After the records: an erasure is written down before it breaks them. One not heard of here breaks these.
            heard = self.erasures()
            for bucket, record in zip(wanted, found, strict=True):
                if record is None:
                    raise _Gone(bucket)
                used[bucket] = known[bucket] = _Guard(record, Bucket.decode(record).successor, heard)
            if heard is not erasures:
                raise _ErasedMeanwhile
        return used  # type: ignore[return-value]

    def _moved(self, space: Keyspace, gone: _Gone) -> Keyspace:
        """The generation to write into instead of one that is gone. Raises StoreNotReady where there is no other."""
        self._guards = (0, {})
        moved = self._still(space)
        if moved.generation == space.generation:
            raise StoreNotReady(self.view.name, f"bucket {gone.bucket} is missing")
        return moved

    def _still(self, space: Keyspace) -> Keyspace:
        """The generation to write into after a guard did not hold: one being filled itself, else what readers use now.

        Raises BootstrapSuperseded where another filling was begun after the one written into.
        """
        current = self.notice(self.backend.get([self._record_key])[0]).number
        if space.generation <= current:
            return self.generations.space(current)
        if self.generations.claimed() != space.generation:
            raise BootstrapSuperseded(self.view.name)
        return space

    def _merge(
        self,
        space: Keyspace,
        entities: Iterable[bytes],
        rows: dict[bytes, list[Row]],
        now: int,
        erasures: Erasures,
    ) -> None:
        """Writes rows beside those stored, which are read first: for ties, and for rows that wait for their time."""
        while True:
            try:
                beside = self._merge_into(space, entities, rows, now, erasures)
                break
            except _Gone as gone:
                space = self._moved(space, gone)
        for into, some in beside.values():
            # One that is gone was overtaken by another filling, which begins with what was written before it.
            with contextlib.suppress(_Gone):
                self._merge_into(into, dict.fromkeys(some), rows, now, erasures)

    def _merge_into(
        self,
        space: Keyspace,
        entities: Iterable[bytes],
        rows: dict[bytes, list[Row]],
        now: int,
        erasures: Erasures,
    ) -> dict[int, tuple[Keyspace, list[bytes]]]:
        """The same in one generation; the entities whose buckets link to others that are being filled, by these.

        Raises _Gone where the generation has a bucket no more.
        """
        beside: dict[int, tuple[Keyspace, list[bytes]]] = {}

        def keys(entity: bytes) -> list[bytes]:
            return [space.bucket(bucket_of(entity)), space.entity(b"P", entity)]

        def merge(entity: bytes, found: Sequence[bytes | None]) -> Write:
            record, stored = found
            self._check(erasures)
            if record is None:
                raise _Gone(bucket_of(entity))
            for into in self._filled(Bucket.decode(record).successor):
                beside.setdefault(into.generation, (into, []))[1].append(entity)
            kept = keep([*(self._codec.decode(stored) if stored else []), *rows[entity]], now)
            bucket, key = keys(entity)
            return Write([(bucket, record), (key, stored)], [(SET, key, self._codec.encode(kept, now))])

        settle(self.backend, list(entities), keys, merge, f"write rows of view '{self.view.name}'")
        return beside

    # -- erasing ------------------------------------------------------------------------------------------------

    def kept(self, stored: Sequence[bytes | None], until: int) -> Sequence[bytes | None]:
        """The rows that were known later; of a value that nobody can read nothing."""
        rows: list[Row] = []
        with contextlib.suppress(CorruptState):
            rows = self._codec.decode(stored[0]) if stored[0] else []
        times, created = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("time", "created"))
        known = when_known(times, created, self.view.source.delay)
        later = [row for row, time in zip(rows, known.tolist(), strict=True) if time > until]
        return [self._codec.encode(later, until) if later else None]

    # -- reading ------------------------------------------------------------------------------------------------

    def decode(
        self, names: Sequence[str], stored: Sequence[Sequence[bytes | None]], times: np.ndarray, found: Found
    ) -> ViewRead:
        """The named features of each stored value as of its time."""
        chosen, values = self._chosen(tuple(names)), stored[0]
        if len(values) == 1 and values[0] is not None and (single := self._codec.single(values[0])):
            time, row = single
            if self._current(time, int(times[0])):
                block = Lists(chosen.names, chosen.types, 1, [[value] for value in chosen.pick(row)])
                return ViewRead(block, _ONE, found, None, None, np.array([time]))
        return self._packed(chosen, values, times, found) or self._one_by_one(chosen, values, times, found)

    def _current(self, time: int, asked: int) -> bool:
        return time <= asked and not (self.view.ttl and time < asked - self.view.ttl)

    def _packed(
        self, chosen: Chosen, values: Sequence[bytes | None], times: np.ndarray, found: Found
    ) -> ViewRead | None:
        """The answer straight from the bytes, where every value holds one row that is not later than its time."""
        data: Sequence[bytes] = values  # type: ignore[assignment]
        lines = None
        if None in values:
            there = [value is not None for value in values]
            data = [value for value in values if value is not None]
            lines = np.where(there, np.cumsum(there) - 1, -1)
        words = self._codec.words(data)
        if words is None:
            return None
        asked = times if lines is None else times[lines >= 0]
        at = words[:, 2].view(np.int64)
        if (at > asked).any():
            return None
        statuses: list[Status | None] | None = None
        if lines is not None:
            statuses = [Status.NOT_FOUND if line < 0 else None for line in lines.tolist()]
        event_times = at if lines is None else np.where(lines < 0, BEGINNING, at[lines] if len(at) else BEGINNING)
        known = np.ones(len(values), bool) if lines is None else lines >= 0
        if self.view.ttl and (old := (event_times < times - self.view.ttl) & known).any():
            statuses = statuses or [None] * len(values)
            for row in np.flatnonzero(old).tolist():
                statuses[row] = Status.OUTSIDE_MAX_AGE
            lines = np.where(old, -1, np.arange(len(values)) if lines is None else lines)
            event_times = np.where(old, BEGINNING, event_times)
        block = PackedRows(chosen, words, lines, data)
        return ViewRead(block, known, found, None, statuses, event_times)

    def _one_by_one(self, chosen: Chosen, values: Sequence[bytes | None], times: np.ndarray, found: Found) -> ViewRead:
        """The answer from values that hold several rows."""
        rows, statuses, exact_from, event_times = [], [], [], []
        for value, time in zip(values, times.tolist(), strict=True):
            row, status, exact = self._find(value, time)
            rows.append(row)
            statuses.append(status)
            exact_from.append(exact)
            event_times.append(row.time if row else BEGINNING)
        lists = [[row.values[i] if row else None for row in rows] for i in chosen.features]
        block = Lists(chosen.names, chosen.types, len(values), lists)
        known = np.array([status is not Status.NOT_FOUND for status in statuses], bool)
        return ViewRead(
            block,
            known,
            found,
            np.array(exact_from, np.int64),
            statuses,
            np.array(event_times, np.int64),
        )

    def _find(self, value: bytes | None, time: int) -> tuple[Row | None, Status | None, int]:
        """The row as of a time, a status for all its features (None: look at each value), and exact from when."""
        if value is None:
            return None, Status.NOT_FOUND, BEGINNING
        rows = self._codec.decode(value)
        row = next((r for r in reversed(rows) if r.time <= time), None)
        if row is None:
            return None, Status.NOT_FOUND, rows[0].time
        if not self._current(row.time, time):
            return None, Status.OUTSIDE_MAX_AGE, BEGINNING
        return row, None, BEGINNING


def _starts(ascending: np.ndarray) -> list[int]:
    """Where each run of equal numbers begins."""
    return [0, *(np.flatnonzero(ascending[1:] != ascending[:-1]) + 1).tolist()]
