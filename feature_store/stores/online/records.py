"""The records that say what the online store holds of a view: its generation, and its 256 buckets.

A reader fetches them with the values. A missing bucket record means the store lost a part of the view: *not ready*,
never an empty window.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import msgspec

from feature_store.definitions.view import StoredView
from feature_store.errors import CorruptState, StoreNotReady
from feature_store.timestamps import BEGINNING

Positions = dict[int, tuple[int, int]]
"""Log positions: (epoch, next offset) by partition."""


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """Which generation of a view readers use.

    `number` is part of its keys; `fingerprint` that of the definition it was filled for; `cut` the event time
    (microseconds) up to which its bootstrap folded the event log; `partitions` the log positions folded since.
    """

    number: int
    fingerprint: str
    cut: int = BEGINNING
    partitions: Positions = {}

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Generation:
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise CorruptState(f"a generation record cannot be read ({error}); bootstrap the view again.") from error


def read_generation(record: bytes | None, view: StoredView) -> Generation:
    """The generation that a view's record names. Raises StoreNotReady when there is none for this definition."""
    if record is None:
        raise StoreNotReady(view.name, "it was never filled")
    generation = Generation.decode(record)
    if generation.fingerprint != view.fingerprint:
        raise StoreNotReady(view.name, "it was filled for another definition of this view")
    return generation


def read_bucket(record: bytes | None, view: StoredView, bucket: int) -> Bucket:
    """One bucket's record. Raises StoreNotReady when it is missing: the store lost a part of the view."""
    if record is None:
        raise StoreNotReady(view.name, f"bucket {bucket} is missing")
    return Bucket.decode(record)


def merged(a: Positions, b: Positions) -> Positions:
    """The further of two positions in every partition; a later epoch is further than any offset."""
    return {p: max(a.get(p, (0, 0)), b.get(p, (0, 0))) for p in a.keys() | b.keys()}


_HEADER = struct.Struct("<2sBBIIqH")
_PARTITION = struct.Struct("<IIQ")
_MAGIC, _VERSION = b"IB", 2


@dataclass(frozen=True)
class Bucket:
    """One bucket of one view: `fence` rises when its keys were taken away, reads below `exact_from` need history.

    `partitions` maps a log partition to (epoch, next offset) as this bucket has folded it; a bucket no record fell
    into lags behind the view's own. `successor` is the generation that is being filled beside this one (0: none):
    whoever writes into this bucket writes into that one's too.

    Layout, version 2, little-endian: ``IB`` | u8 version | u8 0 | u32 fence | u32 successor | i64 exact_from
    | u16 count, then per partition u32 id | u32 epoch | u64 next.
    """

    exact_from: int
    fence: int = 0
    partitions: Positions = field(default_factory=dict)
    successor: int = 0

    def encode(self) -> bytes:
        count = len(self.partitions)
        header = _HEADER.pack(_MAGIC, _VERSION, 0, self.fence, self.successor, self.exact_from, count)
        return header + b"".join(_PARTITION.pack(p, *self.partitions[p]) for p in sorted(self.partitions))

    @classmethod
    def decode(cls, data: bytes) -> Bucket:
        if len(data) < _HEADER.size or data[:3] != _MAGIC + bytes([_VERSION]):
            raise CorruptState("a bucket record is of no version that can be read; bootstrap the view again.")
        _, _, _, fence, successor, exact_from, count = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + count * _PARTITION.size:
            raise CorruptState("a bucket record is cut off; bootstrap the view again.")
        parts = _PARTITION.iter_unpack(data[_HEADER.size :])
        return cls(exact_from, fence, {p: (epoch, following) for p, epoch, following in parts}, successor)

    def moved(self, partition: int, epoch: int, following: int) -> Bucket:
        """The record after a partition was folded up to an offset; it never goes back."""
        return Bucket(
            self.exact_from,
            self.fence,
            merged(self.partitions, {partition: (epoch, following)}),
            self.successor,
        )
