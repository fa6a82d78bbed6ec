"""A plain view's rows in the online store: per entity the current row, and those still waiting for their time.

Layout of a value, version 1, little-endian::

    "IP" | u8 version | u8 0 | 8 bytes schema fingerprint | u32 rows, then per row, by event time:
    i64 event time | i64 created time (lowest: none) | null bits, one a feature, eight a byte
    | eight bytes a fixed-width feature | u32 length and bytes a variable-width one (features in name order in each)

Text and bytes are stored as they are, lists as MessagePack.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView
from feature_store.errors import CorruptState
from feature_store.stores.online.embedded import EmbeddedBackend, Snapshot, Transaction
from feature_store.stores.online.keys import BUCKETS, Keyspace, bucket_of, entity_key, generation_key
from feature_store.stores.online.records import (
    Bucket,
    Generation,
    bucket_record,
    claim_next,
    delete_others,
    generation_of,
)
from feature_store.stores.online.status import Status
from feature_store.stores.online.values import from_arrow, is_variable, to_arrow
from feature_store.timestamps import BEGINNING

_HEADER = struct.Struct("<2sBB8sI")
_ROW = struct.Struct("<qq")
_MAGIC, _VERSION = b"IP", 1

#: Columns of a table of rows beside keys and features.
TIME, CREATED = "__time", "__created"


@dataclass(frozen=True)
class Row:
    """One row of a plain view: times in microseconds (`created` is BEGINNING where missing), values in name order."""

    time: int
    created: int
    values: tuple[Any, ...]

    @property
    def rank(self) -> tuple:
        """What decides between rows: event time, created time, then the values in feature name order."""
        return self.time, self.created, tuple(map(_canonical, self.values))


def _canonical(value: Any) -> tuple:
    """A value's place in the canonical order: null lowest, NaN highest, text by its bytes, lists element by element."""
    if value is None:
        return (0,)
    if isinstance(value, float):
        return (1, 1, 0.0) if math.isnan(value) else (1, 0, value)
    if isinstance(value, list):
        return (1, 0, tuple(map(_canonical, value)))
    return (1, 0, value.encode() if isinstance(value, str) else value)


@dataclass(frozen=True)
class RowCodec:
    """Encodes and decodes the rows of one plain view."""

    view: PlainView

    @cached_property
    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.view.fingerprint[:16])

    @cached_property
    def _fixed(self) -> list[int]:
        return [i for i, f in enumerate(self.view.features) if not (is_variable(f.type) or f.type.is_list)]

    @cached_property
    def _variable(self) -> list[int]:
        return [i for i, f in enumerate(self.view.features) if is_variable(f.type) or f.type.is_list]

    @cached_property
    def _struct(self) -> struct.Struct:
        codes = "".join("d" if self.view.features[i].type.is_float else "q" for i in self._fixed)
        return struct.Struct("<" + codes)

    def encode(self, rows: Sequence[Row]) -> bytes:
        return b"".join([_HEADER.pack(_MAGIC, _VERSION, 0, self.fingerprint, len(rows)), *map(self._encode, rows)])

    def _encode(self, row: Row) -> bytes:
        nulls = sum((v is None) << i for i, v in enumerate(row.values))
        fixed = self._struct.pack(*(0 if row.values[i] is None else row.values[i] for i in self._fixed))
        parts = [_ROW.pack(row.time, row.created), nulls.to_bytes(self._null_bytes, "little"), fixed]
        for i in self._variable:
            data = self._variable_bytes(row.values[i], self.view.features[i].type)
            parts.append(struct.pack("<I", len(data)) + data)
        return b"".join(parts)

    @property
    def _null_bytes(self) -> int:
        return (len(self.view.features) + 7) // 8

    @staticmethod
    def _variable_bytes(value: Any, value_type: ValueType) -> bytes:
        if value is None:
            return b""
        if value_type.is_list:
            return msgspec.msgpack.encode(value)
        return value.encode() if value_type is ValueType.STRING else value

    def decode(self, data: bytes) -> list[Row]:
        """The rows in a stored value, by event time. Raises CorruptState for another version or definition."""
        if len(data) < _HEADER.size or data[:3] != _MAGIC + bytes([_VERSION]):
            raise CorruptState(
                f"view '{self.view.name}': a stored row is of no version that can be read; bootstrap it."
            )
        _, _, _, fingerprint, count = _HEADER.unpack_from(data)
        if fingerprint != self.fingerprint:
            raise CorruptState(f"view '{self.view.name}': a stored row is of another definition; bootstrap it again.")
        rows, at = [], _HEADER.size
        try:
            for _ in range(count):
                row, at = self._decode(data, at)
                rows.append(row)
        except (struct.error, ValueError, msgspec.MsgspecError) as error:
            raise CorruptState(f"view '{self.view.name}': a stored row is cut off; bootstrap it again.") from error
        if at != len(data):
            raise CorruptState(f"view '{self.view.name}': a stored row is cut off; bootstrap it again.")
        return rows

    def _decode(self, data: bytes, at: int) -> tuple[Row, int]:
        time, created = _ROW.unpack_from(data, at)
        at += _ROW.size
        nulls = int.from_bytes(data[at : at + self._null_bytes], "little")
        at += self._null_bytes
        values: list[Any] = [None] * len(self.view.features)
        for i, value in zip(self._fixed, self._struct.unpack_from(data, at), strict=True):
            values[i] = value
        at += self._struct.size
        for i in self._variable:
            (length,) = struct.unpack_from("<I", data, at)
            at += 4
            values[i] = _variable_value(data[at : at + length], self.view.features[i].type, bool(nulls >> i & 1))
            at += length
        return Row(time, created, tuple(None if nulls >> i & 1 else v for i, v in enumerate(values))), at


def _variable_value(data: bytes, value_type: ValueType, null: bool) -> Any:
    if null:
        return None
    if not value_type.is_list:
        return data.decode() if value_type is ValueType.STRING else data
    element = float if value_type.element.is_float else bytes if value_type.element is ValueType.BYTES else Any
    return msgspec.msgpack.decode(data, type=list[element | None])  # type: ignore[valid-type]


@dataclass(frozen=True)
class PlainRead:
    """What the store holds of some entities as of a time each: values and statuses by feature, and the event time
    (BEGINNING: none) of the row they come from. Reads below `exact_from` need history.
    """

    values: dict[str, pa.Array]
    statuses: list[Status | None]
    event_times: list[int]
    exact_from: np.ndarray


@dataclass(frozen=True)
class PlainOnline:
    """One plain view in an embedded store."""

    backend: EmbeddedBackend
    project: str
    view: PlainView

    @cached_property
    def _codec(self) -> RowCodec:
        return RowCodec(self.view)

    def replace(self, table: pa.Table, now: int) -> int:
        """Replaces the view's rows by a table's (keys, `__time`, `__created`, features); how many entities."""
        with self.backend.writing() as txn:
            return self._write(txn, self._start(txn), table, now)

    def write(self, table: pa.Table, now: int) -> int:
        """Adds rows: the newer event time wins, then the newer created time, then the greater values; how many keys.

        Rows later than `now` wait beside the current one. All rows are written, or none. Raises StoreNotReady when
        what is stored is of another definition: a few rows are no replacement for it.
        """
        with self.backend.writing() as txn:
            if txn.get(generation_key(self.project, self.view.name)) is None:
                return self._write(txn, self._start(txn), table, now)
            return self._write(txn, generation_of(txn, self.project, self.view).number, table, now)

    def _start(self, txn: Transaction) -> int:
        """Begins a new, empty generation in the place of all others, and returns its number."""
        space = claim_next(txn, self.project, self.view.name)
        delete_others(txn, space)
        for bucket in range(BUCKETS):
            txn.put(space.bucket(bucket), Bucket(BEGINNING).encode())
        record = Generation(space.generation, self.view.fingerprint)
        txn.put(generation_key(self.project, self.view.name), record.encode())
        return space.generation

    def _write(self, txn: Transaction, number: int, table: pa.Table, now: int) -> int:
        space = Keyspace(self.project, self.view.name, number)
        rows: dict[bytes, list[Row]] = {}
        for entity, row in zip(self._entities(table), self._rows(table), strict=True):
            rows.setdefault(entity, []).append(row)
        for entity, added in rows.items():
            key = space.entity(b"P", entity)
            stored = txn.get(key)
            kept = keep([*self._codec.decode(stored), *added] if stored else added, now)
            txn.put(key, self._codec.encode(kept))
        return len(rows)

    def _entities(self, table: pa.Table) -> Iterable[bytes]:
        if not self.view.keys:
            return [b""] * table.num_rows
        columns = [from_arrow(table[k.name].combine_chunks(), k.type) for k in self.view.keys]
        return [entity_key(values) for values in zip(*columns, strict=True)]

    def _rows(self, table: pa.Table) -> Iterable[Row]:
        times = table[TIME].to_pylist()
        created = [BEGINNING if c is None else c for c in table[CREATED].to_pylist()]
        columns = [from_arrow(table[f.name].combine_chunks(), f.type) for f in self.view.features]
        values = zip(*columns, strict=True) if columns else [()] * len(times)
        return [Row(t, c, tuple(v)) for t, c, v in zip(times, created, values, strict=True)]

    def read(
        self, txn: Snapshot, names: Sequence[str], entities: Sequence[bytes | None], times: np.ndarray
    ) -> PlainRead:
        """The named features of each entity (None: a null key, never found) as of its time."""
        space = Keyspace(self.project, self.view.name, generation_of(txn, self.project, self.view).number)
        found = [self._find(txn, space, e, t) for e, t in zip(entities, times.tolist(), strict=True)]
        index = {f.name: i for i, f in enumerate(self.view.features)}
        values = {
            n: to_arrow([row.values[index[n]] if row else None for row, _, _ in found], self.view.feature_type(n))
            for n in names
        }
        event_times = [row.time if row else BEGINNING for row, _, _ in found]
        return PlainRead(values, [s for _, s, _ in found], event_times, np.array([e for _, _, e in found], np.int64))

    def _find(
        self, txn: Snapshot, space: Keyspace, entity: bytes | None, time: int
    ) -> tuple[Row | None, Status | None, int]:
        """The row as of a time, a status for all its features (None: look at each value), and exact from when."""
        if entity is None:
            return None, Status.NOT_FOUND, BEGINNING
        bucket_record(txn, space, bucket_of(entity))
        stored = txn.get(space.entity(b"P", entity))
        if stored is None:
            return None, Status.NOT_FOUND, BEGINNING
        rows = self._codec.decode(stored)
        row = next((r for r in reversed(rows) if r.time <= time), None)
        if row is None:
            return None, Status.NOT_FOUND, rows[0].time
        if self.view.ttl and row.time < time - self.view.ttl:
            return None, Status.OUTSIDE_MAX_AGE, BEGINNING
        return row, None, BEGINNING


def keep(rows: Iterable[Row], now: int) -> list[Row]:
    """The current row (the greatest at or before `now`) and, per later event time, the greatest; by event time."""
    best: dict[int, Row] = {}
    for row in rows:
        slot = row.time if row.time > now else BEGINNING
        if slot not in best or row.rank > best[slot].rank:
            best[slot] = row
    return [best[slot] for slot in sorted(best)]
