"""The raw head: rows of recent and future events, appended as they come and folded by whoever reads.

Layout of one row, version 2, little-endian::

    i64 event time | i64 created time, if the source has one | null bits, one a column, in whole 8 bytes
    | eight bytes a column | text bytes

Columns are the view's aggregated columns in name order. A fixed-width column holds its value (int64 or float64), a
text column the length of its bytes, which follow the row in the same order. Rows without text have one size of whole
words, so that many heads are one array of words as they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, Events
from feature_store.definitions.erasure import when_known
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.errors import CorruptState
from feature_store.stores.online.values import fixed_dtype, from_arrow, is_variable, to_arrow
from feature_store.timestamps import BEGINNING


@dataclass(frozen=True)
class Rows:
    """Events of one or more entities as the head holds them: times and created times, and per column its values."""

    times: np.ndarray
    created: np.ndarray
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class HeadCodec:
    """Encodes and decodes the head rows of one view; `created` says whether its source has a created time."""

    types: Mapping[str, ValueType]
    created: bool = True

    @classmethod
    def of(cls, view: WindowedView) -> HeadCodec:
        return cls(view.column_types(), view.source.created_field is not None)

    @cached_property
    def _dtype(self) -> np.dtype:
        fields: list[tuple] = [
            ("time", "<i8"),
            *([("created", "<i8")] if self.created else []),
            ("nulls", "u1", ((len(self.types) + 63) // 64 * 8,)),
        ]
        fields += [(f"c{i}", "<i8" if is_variable(t) else fixed_dtype(t)) for i, t in enumerate(self.types.values())]
        return np.dtype(fields)

    @cached_property
    def _text(self) -> list[tuple[int, ValueType]]:
        return [(i, t) for i, t in enumerate(self.types.values()) if is_variable(t)]

    def encode(self, rows: Rows) -> list[bytes]:
        """The bytes of each row."""
        records = np.zeros(len(rows), self._dtype)
        records["time"] = rows.times
        if self.created:
            records["created"] = rows.created
        texts: list[list[bytes]] = [[] for _ in range(len(rows))]
        for i, (name, value_type) in enumerate(self.types.items()):
            values = rows.columns[name]
            null = np.fromiter((v is None for v in values), bool, len(values))
            records["nulls"][:, i // 8] |= null.astype(np.uint8) << (i % 8)
            if is_variable(value_type):
                data = [b"" if v is None else v.encode() if isinstance(v, str) else v for v in values]
                records[f"c{i}"] = [len(d) for d in data]
                for parts, part in zip(texts, data, strict=True):
                    parts.append(part)
            else:
                records[f"c{i}"] = [0 if v is None else v for v in values]
        size, whole = self._dtype.itemsize, records.tobytes()
        return [whole[i * size : (i + 1) * size] + b"".join(texts[i]) for i in range(len(rows))]

    @property
    def dtype(self) -> np.dtype:
        """A row as numpy reads it, without its text."""
        return self._dtype

    @property
    def fixed(self) -> bool:
        """Whether rows have no text, and so one size."""
        return not self._text

    def field(self, column: str) -> str:
        """The name of a column's field in a row."""
        return f"c{list(self.types).index(column)}"

    @property
    def row_size(self) -> int:
        """Bytes of a row; of one with text, without the text."""
        return self._dtype.itemsize

    def split(self, head: bytes) -> list[bytes]:
        """The rows of a head, each as its bytes."""
        size = self._dtype.itemsize
        if not self._text:
            return [head[i : i + size] for i in range(0, len(head), size)]
        rows, at = [], 0
        while at < len(head):
            record = np.frombuffer(head, self._dtype, 1, at)[0]
            end = at + size + sum(int(record[f"c{i}"]) for i, _ in self._text)
            rows.append(head[at:end])
            at = end
        return rows

    def times(self, head: bytes) -> np.ndarray:
        """The event time of each row of a head, in the order they were appended."""
        return self.decode(head)[0]["time"].astype(np.int64)

    def known(self, head: bytes, delay: int) -> np.ndarray:
        """When each row of a head was known, `delay` being the source's; in the order they were appended."""
        records = self.decode(head)[0]
        return when_known(records["time"].astype(np.int64), self._created(records), delay)

    def decode(self, head: bytes) -> tuple[np.ndarray, dict[str, list[bytes]]]:
        """The fixed-width records of a head, and the bytes of each text column beside them."""
        if not self._text:
            return np.frombuffer(head, self._dtype), {}
        rows = self.split(head)
        size = self._dtype.itemsize
        records = np.frombuffer(b"".join(row[:size] for row in rows), self._dtype)
        texts: dict[str, list[bytes]] = {f"c{i}": [] for i, _ in self._text}
        for row, record in zip(rows, records, strict=True):
            at = size
            for i, _ in self._text:
                length = int(record[f"c{i}"])
                texts[f"c{i}"].append(row[at : at + length])
                at += length
        return records, texts

    def events(self, heads: Sequence[bytes | None]) -> Events:
        """The rows of many entities' heads as events in folding order, an entity for each head."""
        sizes, records, texts = self._joined(heads)
        entity = np.repeat(np.arange(len(heads)), sizes)
        times, created = records["time"].astype(np.int64), self._created(records)
        order = np.lexsort((created, times, entity))
        return Events(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            times=times[order],
            created=created[order],
            columns={n: self._column(i, n, records, texts, order) for i, n in enumerate(self.types)},
        )

    def _joined(self, heads: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, dict[str, list[bytes]]]:
        """How many rows each head has, all their records, and the bytes of each text column beside them."""
        if not self._text:
            lengths = np.array([len(head) if head else 0 for head in heads], np.int64)
            sizes, rest = np.divmod(lengths, self._dtype.itemsize)
            if rest.any():
                raise CorruptState("a stored head is cut off; bootstrap its view again.")
            return sizes, np.frombuffer(b"".join(head for head in heads if head), self._dtype), {}
        decoded = [self.decode(head) if head else (np.zeros(0, self._dtype), {}) for head in heads]
        texts = {f"c{i}": [b for _, t in decoded for b in t.get(f"c{i}", [])] for i, _ in self._text}
        records = np.concatenate([r for r, _ in decoded]) if decoded else np.zeros(0, self._dtype)
        return np.array([len(r) for r, _ in decoded], np.int64), records, texts

    def _created(self, records: np.ndarray) -> np.ndarray:
        if not self.created:
            return np.full(len(records), BEGINNING, np.int64)
        return records["created"].astype(np.int64)

    def raw(self, heads: Sequence[bytes | None]) -> RawRows:
        """The rows of many entities' heads, an entity for each head, by event time; of text, whether it is there."""
        sizes, records, _ = self._joined(heads)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        times, order = records["time"], None
        if len(times) > 1:
            # Rows mostly come in the order of time: only where one does not, within an entity, are they sorted.
            follows = np.ones(len(times), bool)
            follows[offsets[:-1][sizes > 0]] = False
            if (follows[1:] & (times[1:] <= times[:-1])).any():
                values = [records[f"c{i}"] for i in reversed(range(len(self.types)))]
                entity = np.repeat(np.arange(len(heads)), sizes)
                order = np.lexsort((*values, self._created(records), times, entity))
        return RawRows(self, records if order is None else records[order], offsets)

    def _column(self, i: int, name: str, records: np.ndarray, texts: dict, order: np.ndarray) -> Column:
        value_type = self.types[name]
        null = (records["nulls"][:, i // 8] >> (i % 8) & 1).astype(bool)[order]
        if not is_variable(value_type) and value_type is not ValueType.BOOL:
            # The columns were made clean when they were written: finite or null.
            values = records[f"c{i}"][order]
            array = pa.array(values, mask=null)
            if value_type is ValueType.TIMESTAMP:
                array = array.view(value_type.arrow)
            return Column(value_type, values, ~null, array)
        if is_variable(value_type):
            data = [None if null[k] else texts[f"c{i}"][row] for k, row in enumerate(order.tolist())]
            array = pa.array(data, pa.binary())
            return Column.of(array.cast(value_type.arrow), value_type)
        raw = [None if n else v for n, v in zip(null.tolist(), records[f"c{i}"][order].tolist(), strict=True)]
        return Column.of(to_arrow(raw, value_type), value_type)


@dataclass(frozen=True, eq=False)
class RawRows:
    """Head rows of many entities by event time; those of entity e are `offsets[e]` to `offsets[e + 1]`."""

    codec: HeadCodec
    records: np.ndarray
    offsets: np.ndarray

    def clean(self, column: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A column's non-null values (int64 or float64) and how many of them lie before each row; None: as many."""
        i = list(self.codec.types).index(column)
        values = self.records[f"c{i}"]
        null = self.records["nulls"][:, i // 8] & (1 << i % 8)
        if not null.any():
            return values, None
        return values[null == 0], np.append(0, np.cumsum(null == 0))

    def before(self, times: np.ndarray) -> np.ndarray:
        """How many rows, counted over all, lie before each entity's time, (anything, entities)."""
        mine = self.records["time"]
        if not len(mine):
            return np.zeros(times.shape, np.int64)
        entities, first = np.arange(len(self.offsets) - 1), mine.min()
        bits = int(mine.max() + 1 - first).bit_length()
        if bits + len(self.offsets).bit_length() > 63:
            return self._bisected(times)
        # Entity and time in one integer: one sorted array for all.
        together = (np.repeat(entities, np.diff(self.offsets)) << bits) + (mine - first)
        asked = (entities << bits) + (np.clip(times, first, mine.max() + 1) - first)
        return np.searchsorted(together, asked)

    def _bisected(self, times: np.ndarray) -> np.ndarray:
        """The same where 63 bits do not hold both."""
        found = np.broadcast_to(self.offsets[:-1], times.shape).copy()
        ends, mine = self.offsets[1:], self.records["time"]
        step = 1 << int((ends - self.offsets[:-1]).max()).bit_length() >> 1
        while step:
            ahead = found + step
            found += ((mine.take(ahead - 1, mode="clip") < times) & (ahead <= ends)) * step
            step >>= 1
        return found


def rows_of(events: Events, types: Mapping[str, ValueType], index: np.ndarray) -> Rows:
    """Some events as head rows; values that count as null (NaN, infinities) are null here already."""
    columns = {}
    for name, value_type in types.items():
        column = events.columns[name]
        stored = from_arrow(column.arrow.take(pa.array(index)), value_type)
        columns[name] = [v if ok else None for v, ok in zip(stored, column.valid[index].tolist(), strict=True)]
    return Rows(events.times[index], events.created[index], columns)
