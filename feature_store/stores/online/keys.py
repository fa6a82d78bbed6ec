"""The key codec: which bytes name a value in the online store.

Layout, version 2 (integers big-endian)::

    { two hex digits of the bucket } | version 0x02 | kind | u8 length, project | u8 length, view
    | u32 generation | entity key

The bucket in braces is what Redis Cluster calls a hash tag: all keys of a bucket lie on one node, so that one script
changes them together. What follows it is the key's *tail*.

kind is V (the views of a project), which ends after the project and lies in its own bucket; G (generation record) or C
(claim: which generation was last begun), which end after the view and lie in the view's own bucket; B (bucket record),
which ends after the generation; S (suffix staircase), H (raw head) or P (plain rows). Names are preceded by their
lengths, so no project or view is a prefix of another: deleting `fraud` never touches `antifraud`.

An entity key is, for each join key in name order, a type tag and the value: `i` and eight bytes with the sign bit
flipped, or `s`/`b`, u32 length and the bytes. So ("1", "11") and ("11", "1") differ. An entity key too long for the
backend is 0xFF and its 32-byte BLAKE2b hash.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from feature_store.errors import ConfigError

VERSION = b"\x02"
BUCKETS = 256

#: Kinds of values that belong to one generation of a view: bucket records, staircases, heads, plain rows.
KINDS = (b"B", b"S", b"H", b"P")
LONGEST_KEY = 511
_LONGEST_NAME = 120

_TAGS = tuple(b"{%02x}" % bucket for bucket in range(BUCKETS))
TAG_LENGTH = 4

#: What the key of an entity begins with that is too long to be written out.
_HASHED = b"\xff"

KeyValue = int | str | bytes


def entity_key(values: Sequence[KeyValue]) -> bytes:
    """The bytes of one entity's join key values, in join key name order. Times are integers, booleans 0 or 1."""
    return b"".join(map(_encode, values))


def buckets_of(entities: Sequence[bytes]) -> list[int]:
    """The bucket of each entity."""
    crc32 = zlib.crc32
    return [crc32(entity) & 255 for entity in entities]


def integer_keys(values: np.ndarray) -> list[bytes]:
    """The bytes of many entities whose one join key is an integer (int64)."""
    if len(values) == 1:
        return [_encode(int(values[0]))]
    tagged = np.empty((len(values), 9), np.uint8)
    tagged[:, 0] = ord("i")
    tagged[:, 1:] = (values.astype(np.int64) ^ np.int64(-(2**63))).astype(">i8").view(np.uint8).reshape(-1, 8)
    whole = tagged.tobytes()
    return [whole[at : at + 9] for at in range(0, len(whole), 9)]


def _encode(value: KeyValue) -> bytes:
    if isinstance(value, int):
        return b"i" + struct.pack(">Q", value + (1 << 63))
    data = value.encode() if isinstance(value, str) else value
    return (b"s" if isinstance(value, str) else b"b") + struct.pack(">I", len(data)) + data


def entity_values(entity: bytes) -> tuple[KeyValue, ...] | None:
    """The join key values behind an entity key (booleans are 0 or 1); None of one that is only a hash."""
    values: list[KeyValue] = []
    at = 0
    while at < len(entity):
        tag = entity[at : at + 1]
        if tag == b"i":
            values.append(struct.unpack_from(">Q", entity, at + 1)[0] - (1 << 63))
            at += 9
            continue
        if tag == _HASHED:
            return None
        (length,) = struct.unpack_from(">I", entity, at + 1)
        data = entity[at + 5 : at + 5 + length]
        values.append(data.decode() if tag == b"s" else data)
        at += 5 + length
    return tuple(values)


def bucket_of(entity: bytes) -> int:
    """The entity's bucket, 0 to 255: CRC-32, the same in every process and version."""
    return zlib.crc32(entity) & (BUCKETS - 1)


def _name(text: str) -> bytes:
    data = text.encode()
    if len(data) > _LONGEST_NAME:
        raise ConfigError(f"'{text}' is longer than the {_LONGEST_NAME} bytes a project or view name may have online.")
    return bytes([len(data)]) + data


def project_tails(project: str) -> list[bytes]:
    """What the tails of one project's keys start with, for every kind."""
    return [VERSION + kind + _name(project) for kind in (b"V", b"G", b"C", *KINDS)]


def _of_view(kind: bytes, project: str, view: str) -> bytes:
    names = _name(project) + _name(view)
    return _TAGS[bucket_of(names)] + VERSION + kind + names


def views_key(project: str) -> bytes:
    """Where the names of a project's views lie that were ever filled."""
    name = _name(project)
    return _TAGS[bucket_of(name)] + VERSION + b"V" + name


def generation_key(project: str, view: str) -> bytes:
    """Where a view's generation record lies."""
    return _of_view(b"G", project, view)


def claim_key(project: str, view: str) -> bytes:
    """Where the number of the generation that was last begun lies, a u32."""
    return _of_view(b"C", project, view)


@dataclass(frozen=True)
class Keyspace:
    """The keys of one generation of one view."""

    project: str
    view: str
    generation: int

    def every_generation(self) -> list[bytes]:
        """What the tails of the view's keys start with, in all its generations, for every kind."""
        return [self._named(kind) for kind in KINDS]

    def tail(self, kind: bytes) -> bytes:
        """What the tails of keys of a kind start with, in this generation."""
        return self._named(kind) + struct.pack(">I", self.generation)

    def _named(self, kind: bytes) -> bytes:
        return VERSION + kind + _name(self.project) + _name(self.view)

    def entity_in(self, key: bytes) -> bytes:
        """The entity that an entity's key carries, or its hash: what follows the generation."""
        return key[TAG_LENGTH + len(self.tail(b"B")) :]

    def number_in(self, key: bytes) -> int:
        """The generation that a key of this view carries."""
        at = TAG_LENGTH + len(self._named(b"B"))
        return int.from_bytes(key[at : at + 4], "big")

    @cached_property
    def buckets(self) -> tuple[bytes, ...]:
        """Where each bucket's record lies."""
        tail = self.tail(b"B")
        return tuple(tag + tail for tag in _TAGS)

    @cached_property
    def _prefixes(self) -> dict[bytes, tuple[bytes, ...]]:
        return {kind: tuple(tag + self.tail(kind) for tag in _TAGS) for kind in KINDS}

    def bucket(self, bucket: int) -> bytes:
        return self.buckets[bucket]

    def entity(self, kind: bytes, entity: bytes) -> bytes:
        """Where an entity's value of a kind (S, H or P) lies."""
        prefix = self._prefixes[kind][bucket_of(entity)]
        if len(prefix) + len(entity) <= LONGEST_KEY:
            return prefix + entity
        return prefix + _HASHED + hashlib.blake2b(entity, digest_size=32).digest()

    def entities(self, kind: bytes, entities: Sequence[bytes], buckets: Sequence[int]) -> list[bytes]:
        """The same for many entities, whose buckets are known."""
        return self.of_kinds((kind,), entities, buckets)

    def of_kinds(self, kinds: Sequence[bytes], entities: Sequence[bytes], buckets: Sequence[int]) -> list[bytes]:
        """The same of several kinds, one after the other."""
        keys: list[bytes] = []
        if len(self._prefixes[kinds[0]][0]) + max(map(len, entities), default=0) > LONGEST_KEY:
            for kind in kinds:
                keys += [self.entity(kind, entity) for entity in entities]
            return keys
        for kind in kinds:
            prefixes = self._prefixes[kind]
            keys += [prefixes[bucket] + entity for bucket, entity in zip(buckets, entities, strict=True)]
        return keys
