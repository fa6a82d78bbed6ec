"""The key codec: which bytes name a value in the online store.

Layout, version 1 (integers big-endian, so that keys of one view lie together and scan in order)::

    version 0x01 | kind | u8 length, project | u8 length, view | u32 generation | u8 bucket | entity key

kind is G (generation record: ends after the view), C (claim: which generation was last begun, ends there too),
B (bucket record: ends after the bucket), S (suffix staircase), H (raw head) or P (plain rows). Names are preceded by
their lengths, so no project or view is a prefix of another: deleting `fraud` never touches `antifraud`.

An entity key is, for each join key in name order, a type tag and the
value: `i` and eight bytes with the sign bit flipped, or `s`/`b`, u32 length and the bytes. So ("1", "11") and
("11", "1") differ. An entity key too long for the backend is 0xFF and its 32-byte BLAKE2b hash.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from feature_store.errors import ConfigError

VERSION = b"\x01"
BUCKETS = 256

#: Kinds of values that belong to one generation of a view: bucket records, staircases, heads, plain rows.
KINDS = (b"B", b"S", b"H", b"P")
LONGEST_KEY = 511
_LONGEST_NAME = 120

KeyValue = int | str | bytes


def entity_key(values: Sequence[KeyValue]) -> bytes:
    """The bytes of one entity's join key values, in join key name order. Times are integers, booleans 0 or 1."""
    return b"".join(map(_encode, values))


def _encode(value: KeyValue) -> bytes:
    if isinstance(value, int):
        return b"i" + struct.pack(">Q", value + (1 << 63))
    data = value.encode() if isinstance(value, str) else value
    return (b"s" if isinstance(value, str) else b"b") + struct.pack(">I", len(data)) + data


def bucket_of(entity: bytes) -> int:
    """The entity's bucket, 0 to 255: CRC-32, the same in every process and version."""
    return zlib.crc32(entity) & (BUCKETS - 1)


def _name(text: str) -> bytes:
    data = text.encode()
    if len(data) > _LONGEST_NAME:
        raise ConfigError(f"'{text}' is longer than the {_LONGEST_NAME} bytes a project or view name may have online.")
    return bytes([len(data)]) + data


def project_prefixes(project: str) -> list[bytes]:
    """What the keys of one project start with, for every kind."""
    return [VERSION + kind + _name(project) for kind in (b"G", b"C", *KINDS)]


def generation_key(project: str, view: str) -> bytes:
    """Where a view's generation record lies."""
    return VERSION + b"G" + _name(project) + _name(view)


def claim_key(project: str, view: str) -> bytes:
    """Where the number of the generation that was last begun lies, a u32."""
    return VERSION + b"C" + _name(project) + _name(view)


def view_of(generation: bytes) -> str:
    """The view that a generation record's key is of."""
    at = 3 + generation[2]
    return generation[at + 1 :].decode()


@dataclass(frozen=True)
class Keyspace:
    """The keys of one generation of one view."""

    project: str
    view: str
    generation: int

    def every_generation(self, kind: bytes) -> bytes:
        """What the keys of a kind start with, in all generations of the view."""
        return VERSION + kind + _name(self.project) + _name(self.view)

    def prefix(self, kind: bytes) -> bytes:
        """What the keys of a kind start with, in this generation."""
        return self.every_generation(kind) + struct.pack(">I", self.generation)

    def bucket(self, bucket: int) -> bytes:
        return self.prefix(b"B") + bytes([bucket])

    def entity(self, kind: bytes, entity: bytes) -> bytes:
        """Where an entity's value of a kind (S, H or P) lies."""
        key = self.prefix(kind) + bytes([bucket_of(entity)]) + entity
        if len(key) <= LONGEST_KEY:
            return key
        return key[: len(key) - len(entity)] + b"\xff" + hashlib.blake2b(entity, digest_size=32).digest()
