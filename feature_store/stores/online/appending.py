"""Appending events to windowed views: raw rows to the heads of their entities, together with the log position they
cover, and now and then a compaction that folds settled rows into the staircase.

An append is written bucket by bucket, each together with the position up to which the bucket has folded the log, and
guarded by what its record was. Whoever is interrupted appends again from the same position: buckets that are done know
it. The view's own record follows when all its buckets are done.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Events
from feature_store.definitions.erasure import NO_ERASURES, Erasures, left_out, when_known
from feature_store.errors import PositionGap, RequestError
from feature_store.stores.online.backend import APPEND, SET, TRIM, Backend, Change, Write
from feature_store.stores.online.entities import entity_keys
from feature_store.stores.online.head import rows_of
from feature_store.stores.online.keys import TAG_LENGTH, Keyspace, bucket_of, generation_key
from feature_store.stores.online.records import Bucket, Generation, merged, read_bucket, read_generation
from feature_store.stores.online.windowed import WindowedOnline

logger = logging.getLogger(__name__)

#: Head rows beyond which an append also compacts, and past rows beyond which it settles without waiting.
COMPACT_ROWS = 64
LONGEST_HEAD = 1_024


@dataclass(frozen=True)
class Position:
    """Where in its log a batch begins: `offset` None stands for the one that follows the last."""

    partition: int = 0
    offset: int | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.partition < 2**32:
            raise RequestError("partition", f"is {self.partition}, not a number from 0 to 4,294,967,295")
        if self.offset is not None and not 0 <= self.offset < 2**63:
            raise RequestError("offset", f"is {self.offset}, not a number from 0 on")


@dataclass(frozen=True)
class Batch:
    """Events for one view, one an entity slot in log order, with their join keys."""

    online: WindowedOnline
    keys: pa.Table
    events: Events


@dataclass(frozen=True)
class Appended:
    """What an append did: rows `applied`, rows `repeated` (their position was folded before), the `next` offset, rows
    `erased` (at or below the erasure of their entity: left out, though their positions are taken).
    """

    applied: int
    repeated: int
    next: int
    erased: int = 0


def append(batches: Sequence[Batch], now: int, position: Position) -> list[Appended]:
    """Appends batches, one a view of the same log, and says what was done for each.

    Events below a partition's next offset were folded before and change nothing; those at or below the erasure of their
    entity are left out. Where the store applies writes
    together, all batches are appended or none; else an error half way leaves some of them appended, and the same call
    with the same offset finishes the work. Raises PositionGap where events would be skipped, StoreNotReady before a
    bootstrap.
    """
    if not batches:
        return []
    backend = batches[0].online.backend
    under_way = [_Append(batch, position) for batch in batches]
    touched: list[tuple[_Append, bytes]] = []
    while pending := [a for a in under_way if not a.done]:
        for one in pending:
            one.reload(backend)
        pending = [a for a in pending if not a.done]
        due: list[tuple[_Append, int | None, Write]] = []
        due += [(one, bucket, one.write(bucket)) for one in pending for bucket in sorted(one.pending)]
        due += [(one, None, one.record()) for one in pending if backend.together or not one.pending]
        # A batch without an offset cannot be told from its own repetition.
        once = position.offset is None and not backend.together
        outcomes = backend.apply([write for _, _, write in due], once)
        for (one, bucket, write), outcome in zip(due, outcomes, strict=True):
            if outcome is not None:
                one.finish(bucket)
                touched += [(one, key) for key in one.grown(write, outcome)]
    for one in under_way:
        compact(one.batch.online, [key for other, key in touched if other is one], now)
    return [one.result() for one in under_way]


@dataclass
class _Append:
    """One batch under way: which buckets are still to be written, and what their records were when last read."""

    batch: Batch
    position: Position
    pending: set[int] = field(default_factory=set)
    done: bool = False
    _first: int | None = None
    _rows: dict[int, list[tuple[bytes, int, bytes]]] = field(default_factory=dict)
    _generation: Generation | None = None
    _stored: bytes | None = None
    _records: dict[int, bytes | None] = field(default_factory=dict)
    _beside: dict[int, bytes | None] = field(default_factory=dict)
    _repeated: int = 0
    _allocated: bool = False
    _erasures: Erasures = NO_ERASURES
    _erased: set[int] = field(default_factory=set)

    @property
    def _online(self) -> WindowedOnline:
        return self.batch.online

    @property
    def _space(self) -> Keyspace:
        assert self._generation is not None
        return self._online.generations.space(self._generation.number)

    @property
    def _count(self) -> int:
        return len(self.batch.events.times)

    @property
    def _after(self) -> int:
        assert self._first is not None
        return self._first + self._count

    def reload(self, backend: Backend) -> None:
        """Reads what the next writes are guarded by."""
        online = self._online
        self._stored = backend.get([generation_key(online.project, online.view.name)])[0]
        self._generation = read_generation(self._stored, online.view)
        if self._first is None or (self.position.offset is None and not self._allocated):
            self._begin(backend)
        buckets = sorted(self.pending)
        space = self._space
        self._records = dict(zip(buckets, backend.get([space.bucket(b) for b in buckets]), strict=True))
        self._beside = {}
        held = {b: read_bucket(record, online.view, b) for b, record in self._records.items()}
        beside = [b for b in buckets if held[b].successor]
        keys = [online.generations.space(held[b].successor).bucket(b) for b in beside]
        self._beside = dict(zip(beside, backend.get(keys), strict=True)) if keys else {}
        # After the guards: an erasure is written down before it breaks guards, so one not heard of here breaks these.
        self._leave_out(online.erasures())

    def _leave_out(self, erasures: Erasures) -> None:
        """Settles which rows (their places in the batch) are at or below an erasure."""
        if erasures is self._erasures:
            return
        self._erasures, view, events = erasures, self._online.view, self.batch.events
        known = when_known(events.times, events.created, view.source.delay)
        gone = np.flatnonzero(left_out(erasures.of(view.keys), self.batch.keys, known))
        self._erased = set(gone[gone >= self._repeated].tolist())
        if self._erased:
            logger.warning("view '%s': %d events of erased entities were left out", view.name, len(self._erased))

    def _begin(self, backend: Backend) -> None:
        """Settles the offset of the first event and what is to be written of the batch."""
        assert self._generation is not None
        partition, offset, epoch = self.position.partition, self.position.offset, self.position.epoch
        known_epoch, following = self._generation.partitions.get(partition, (epoch, offset or 0))
        if epoch != known_epoch or (offset is not None and offset > following):
            raise PositionGap(self._online.view.name, partition, following, offset or 0)
        self._first = following if offset is None else offset
        self._repeated = min(max(following - self._first, 0), self._count)
        if self._repeated == self._count:
            self.done = True
            return
        if offset is None and not backend.together:
            self._allocate(backend)
        self._group()

    def _allocate(self, backend: Backend) -> None:
        """Takes offsets for a batch that came without: they are this writer's alone, in whatever order writers end."""
        online, key = self._online, generation_key(self._online.project, self._online.view.name)
        partition, epoch = self.position.partition, self.position.epoch
        while True:
            generation = read_generation(self._stored, online.view)
            first = generation.partitions.get(partition, (epoch, 0))[1]
            moved = _moved(generation, partition, epoch, first + self._count)
            if backend.apply([Write([(key, self._stored)], [(SET, key, moved.encode())])])[0] is not None:
                self._first, self._allocated = first, True
                return
            self._stored = backend.get([key])[0]

    def _group(self) -> None:
        self._rows = {}
        online, fresh = self._online, np.arange(self._repeated, self._count)
        entities = entity_keys(self.batch.keys.slice(self._repeated), online.view.keys)
        rows = online.head.encode(rows_of(self.batch.events, online.types, fresh))
        for entity, row, at in zip(entities, rows, fresh.tolist(), strict=True):
            self._rows.setdefault(bucket_of(entity), []).append((entity, at, row))
        self.pending = set(self._rows)

    def write(self, bucket: int) -> Write:
        """The write of one bucket: its entities' rows, and the position they cover, in every generation."""
        online, space = self._online, self._space
        stored = self._records[bucket]
        record = read_bucket(stored, online.view, bucket)
        equal: list[tuple[bytes, bytes | None]] = [(space.bucket(bucket), stored)]
        changes = self._into(space, bucket, record)
        if record.successor:
            beside = online.generations.space(record.successor)
            equal.append((beside.bucket(bucket), self._beside[bucket]))
            if self._beside[bucket] is not None:
                filling = read_bucket(self._beside[bucket], online.view, bucket)
                changes += self._into(beside, bucket, filling)
        return Write(equal, changes)

    def _into(self, space: Keyspace, bucket: int, record: Bucket) -> list[Change]:
        assert self._first is not None
        partition, epoch = self.position.partition, self.position.epoch
        # Offsets that were just allocated are nobody else's, so none of them can have been folded.
        folded = self._first if self._allocated else record.partitions.get(partition, (epoch, 0))[1]
        grouped: dict[bytes, list[bytes]] = {}
        for entity, at, row in self._rows[bucket]:
            if self._first + at >= folded and at not in self._erased:
                grouped.setdefault(entity, []).append(row)
        changes: list[Change] = [(APPEND, space.entity(b"H", e), b"".join(rows)) for e, rows in grouped.items()]
        changes.append((SET, space.bucket(bucket), record.moved(partition, epoch, self._after).encode()))
        return changes

    def record(self) -> Write:
        """The write of the view's own record: it never goes back."""
        assert self._generation is not None
        key = generation_key(self._online.project, self._online.view.name)
        moved = _moved(self._generation, self.position.partition, self.position.epoch, self._after)
        return Write([(key, self._stored)], [(SET, key, moved.encode())])

    def finish(self, bucket: int | None) -> None:
        """Notes that a bucket's write was applied; None: that of the view's record, which is the last."""
        if bucket is None:
            self.done = True
        else:
            self.pending.discard(bucket)

    def grown(self, write: Write, outcome: Sequence[int]) -> Iterable[bytes]:
        """The heads that have grown past so many rows that they should be compacted.

        Not those of a generation that is being filled: its staircases are still to come.
        """
        size, tail = (COMPACT_ROWS or 1) * self._online.head.row_size, self._space.tail(b"H")
        for (what, key, rows), length in zip(write.changes, outcome, strict=True):
            # Once every so many rows, not on every append past them: future rows stay raw however often one looks.
            if what == APPEND and length // size > (length - len(rows)) // size and key.startswith(tail, TAG_LENGTH):
                yield key

    def result(self) -> Appended:
        applied = self._count - self._repeated - len(self._erased)
        return Appended(applied, self._repeated, max(self._after, self._following()), len(self._erased))

    def _following(self) -> int:
        assert self._generation is not None
        return self._generation.partitions.get(self.position.partition, (0, 0))[1]


def _moved(generation: Generation, partition: int, epoch: int, following: int) -> Generation:
    partitions = merged(generation.partitions, {partition: (epoch, following)})
    return Generation(generation.number, generation.fingerprint, generation.cut, partitions)


def compact(online: WindowedOnline, heads: Sequence[bytes], now: int) -> None:
    """Folds the settled rows of some heads (their keys) into the staircases beside them.

    Whoever comes second finds its guards broken and leaves it: the next append looks again.
    """
    if not heads:
        return
    wanted = [(key, *_beside(online, key)) for key in dict.fromkeys(heads)]
    found = online.backend.get([key for keys in wanted for key in keys])
    writes = []
    for i, (head, stairs, _) in enumerate(wanted):
        rows, stored, record = found[3 * i : 3 * i + 3]
        if rows and record and (write := _compaction(online, now, head, stairs, rows, stored, record)):
            writes.append(write)
    if online.backend.together:
        # One that is broken must not take the others with it.
        for write in writes:
            online.backend.apply([write])
    else:
        online.backend.apply(writes)


def _beside(online: WindowedOnline, head: bytes) -> tuple[bytes, bytes]:
    """Where the staircase and the bucket record of a head lie."""
    space = online.generations.space(online.generations.space(0).number_in(head))
    entity = head[TAG_LENGTH + len(space.tail(b"H")) :]
    return head[:TAG_LENGTH] + space.tail(b"S") + entity, space.bucket(int(head[1:3], 16))


def _compaction(
    online: WindowedOnline, now: int, head: bytes, stairs: bytes, rows: bytes, stored: bytes | None, record: bytes
) -> Write | None:
    base = online.codec.decode(stored) if stored else None
    bucket = Bucket.decode(record)
    floor = base.exact_from if base else bucket.exact_from
    times = online.head.times(rows)
    cut = max(floor, now - online.settle)
    if np.count_nonzero((times >= cut) & (times < now)) > LONGEST_HEAD:
        cut = max(cut, now)
    split = online.head.split(rows)
    settled = b"".join(row for row, time in zip(split, times.tolist(), strict=True) if time < cut)
    if not settled:
        return None
    kept = b"".join(row for row, time in zip(split, times.tolist(), strict=True) if time >= cut)
    merged_base = online.builder.merge(base, online.head.events([settled]), cut)
    changes: list[Change] = [
        (SET, stairs, online.codec.encode(merged_base)),
        (TRIM, head, struct.pack("<I", len(rows)) + kept),
    ]
    return Write([(stairs, stored)], changes, [(head, rows)])
