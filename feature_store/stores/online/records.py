"""The records that say what the online store holds of a view: its generation, and its 256 buckets.

A reader fetches them with the values. A missing bucket record means the store lost a part of the view: *not ready*,
never an empty window.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from feature_store.definitions.view import StoredView
from feature_store.errors import CorruptState, StoreNotReady
from feature_store.stores.online.embedded import Snapshot, Transaction
from feature_store.stores.online.keys import BUCKETS, KINDS, Keyspace, claim_key, generation_key
from feature_store.timestamps import BEGINNING


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """Which generation of a view readers use.

    `number` is part of its keys; `fingerprint` that of the definition it was filled for; `cut` the event time
    (microseconds) up to which its bootstrap folded the event log; `partitions` maps a log partition to (epoch, next
    offset), the positions folded since.
    """

    number: int
    fingerprint: str
    cut: int = BEGINNING
    partitions: dict[int, tuple[int, int]] = {}

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Generation:
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise CorruptState(f"a generation record cannot be read ({error}); bootstrap the view again.") from error


def next_number(txn: Snapshot, project: str, view: str) -> int:
    """The number of a view's next generation: above every one that any key in the store carries."""
    space = Keyspace(project, view, 0)
    held = (number for kind in KINDS for number in _numbers(txn, space, kind))
    return max(claimed(txn, project, view), *held, 0) + 1


def claim_next(txn: Transaction, project: str, view: str) -> Keyspace:
    """Begins a generation: a number of its own, remembered so that whoever began earlier can see it was overtaken."""
    number = next_number(txn, project, view)
    txn.put(claim_key(project, view), struct.pack("<I", number))
    return Keyspace(project, view, number)


def claimed(txn: Snapshot, project: str, view: str) -> int:
    """The number of the generation that was last begun, 0 if none was."""
    record = txn.get(claim_key(project, view))
    return struct.unpack("<I", record)[0] if record else 0


def delete_others(txn: Transaction, space: Keyspace) -> None:
    """Deletes the values of every other generation of a view, whatever wrote them."""
    for kind in KINDS:
        for number in list(_numbers(txn, space, kind)):
            if number != space.generation:
                txn.delete_prefix(Keyspace(space.project, space.view, number).prefix(kind))


def _numbers(txn: Snapshot, space: Keyspace, kind: bytes) -> Iterator[int]:
    """The generations of which the store holds keys of a kind: one look-up each."""
    prefix = space.every_generation(kind)
    key = txn.first_from(prefix)
    while key is not None and key.startswith(prefix):
        number = int.from_bytes(key[len(prefix) : len(prefix) + 4], "big")
        yield number
        key = txn.first_from(Keyspace(space.project, space.view, number + 1).prefix(kind))


def positions_of(record: bytes | None) -> dict[int, tuple[int, int]]:
    """The log positions in a generation record; none where there is no record, or none that can be read."""
    if record is None:
        return {}
    with contextlib.suppress(CorruptState):
        return Generation.decode(record).partitions
    return {}


def generation_of(txn: Snapshot, project: str, view: StoredView) -> Generation:
    """The generation of a view that readers use. Raises StoreNotReady when there is none for this definition."""
    record = txn.get(generation_key(project, view.name))
    if record is None:
        raise StoreNotReady(view.name, "it was never filled")
    generation = Generation.decode(record)
    if generation.fingerprint != view.fingerprint:
        raise StoreNotReady(view.name, "it was filled for another definition of this view")
    return generation


def bucket_record(txn: Snapshot, space: Keyspace, bucket: int) -> Bucket:
    """One bucket's record. Raises StoreNotReady when it is missing: the store lost a part of the view."""
    record = txn.get(space.bucket(bucket))
    if record is None:
        raise StoreNotReady(space.view, f"bucket {bucket} is missing")
    return Bucket.decode(record)


def check_ready(txn: Snapshot, project: str, view: StoredView) -> None:
    """Raises StoreNotReady unless every record that reads of this view need is there."""
    space = Keyspace(project, view.name, generation_of(txn, project, view).number)
    for bucket in range(BUCKETS):
        bucket_record(txn, space, bucket)


_HEADER = struct.Struct("<2sBBIqH")
_PARTITION = struct.Struct("<IIQ")
_MAGIC, _VERSION = b"IB", 1


@dataclass(frozen=True)
class Bucket:
    """One bucket of one view: `fence` rises when its keys were taken away, reads below `exact_from` need history.

    `partitions` maps a log partition to (epoch, next offset) as this bucket has folded it; a bucket no record fell
    into lags behind the view's own.

    Layout, version 1, little-endian: ``IB`` | u8 version | u8 0 | u32 fence | i64 exact_from | u16 count, then per
    partition u32 id | u32 epoch | u64 next.
    """

    exact_from: int
    fence: int = 0
    partitions: dict[int, tuple[int, int]] = field(default_factory=dict)

    def encode(self) -> bytes:
        header = _HEADER.pack(_MAGIC, _VERSION, 0, self.fence, self.exact_from, len(self.partitions))
        return header + b"".join(_PARTITION.pack(p, *self.partitions[p]) for p in sorted(self.partitions))

    @classmethod
    def decode(cls, data: bytes) -> Bucket:
        if len(data) < _HEADER.size or data[:3] != _MAGIC + bytes([_VERSION]):
            raise CorruptState("a bucket record is of no version that can be read; bootstrap the view again.")
        _, _, _, fence, exact_from, count = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + count * _PARTITION.size:
            raise CorruptState("a bucket record is cut off; bootstrap the view again.")
        parts = _PARTITION.iter_unpack(data[_HEADER.size : _HEADER.size + count * _PARTITION.size])
        return cls(exact_from, fence, {p: (epoch, following) for p, epoch, following in parts})
