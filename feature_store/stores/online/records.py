"""The records that say what the online store holds of a view: its generation, and its 256 buckets.

A reader fetches them with the values. A missing bucket record means the store lost a part of the view: *not ready*,
never an empty window.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import msgspec

from feature_store.errors import CorruptState


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """Which generation of a view readers use.

    `number` is part of its keys; `fingerprint` that of the definition it was filled for; `partitions` maps a log
    partition to (epoch, next offset), the positions folded so far.
    """

    number: int
    fingerprint: str
    partitions: dict[int, tuple[int, int]] = {}

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Generation:
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise CorruptState(f"a generation record cannot be read ({error}); bootstrap the view again.") from error


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
        parts = _PARTITION.iter_unpack(data[_HEADER.size : _HEADER.size + count * _PARTITION.size])
        return cls(exact_from, fence, {p: (epoch, following) for p, epoch, following in parts})
