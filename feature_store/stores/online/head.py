"""The raw head: rows of recent and future events, appended as they come and folded by whoever reads.

Layout of one row, version 1, little-endian, without padding::

    i64 event time | i64 created time | null bits, one a column, eight a byte | eight bytes a column | text bytes

Columns are the view's aggregated columns in name order. A fixed-width column holds its value (int64 or float64), a
text column the length of its bytes, which follow the row in the same order. Rows without text have one size, so a
head is a numpy record array as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, Events
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.stores.online.values import fixed_dtype, from_arrow, is_variable, to_arrow


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
    """Encodes and decodes the head rows of one view."""

    types: Mapping[str, ValueType]

    @classmethod
    def of(cls, view: WindowedView) -> HeadCodec:
        return cls(view.column_types())

    @cached_property
    def _dtype(self) -> np.dtype:
        fields: list[tuple] = [("time", "<i8"), ("created", "<i8"), ("nulls", "u1", ((len(self.types) + 7) // 8,))]
        fields += [(f"c{i}", "<i8" if is_variable(t) else fixed_dtype(t)) for i, t in enumerate(self.types.values())]
        return np.dtype(fields)

    @cached_property
    def _text(self) -> list[tuple[int, ValueType]]:
        return [(i, t) for i, t in enumerate(self.types.values()) if is_variable(t)]

    def encode(self, rows: Rows) -> list[bytes]:
        """The bytes of each row."""
        records = np.zeros(len(rows), self._dtype)
        records["time"], records["created"] = rows.times, rows.created
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

    def count(self, head: bytes) -> int:
        """How many rows a head has."""
        return len(self.split(head)) if self._text else len(head) // self._dtype.itemsize

    def times(self, head: bytes) -> np.ndarray:
        """The event time of each row of a head, in the order they were appended."""
        return self.decode(head)[0]["time"].astype(np.int64)

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
        decoded = [self.decode(head) if head else (np.zeros(0, self._dtype), {}) for head in heads]
        records = np.concatenate([r for r, _ in decoded]) if len(decoded) != 1 else decoded[0][0]
        texts = {f"c{i}": [b for _, t in decoded for b in t.get(f"c{i}", [])] for i, _ in self._text}
        sizes = [len(r) for r, _ in decoded]
        entity = np.repeat(np.arange(len(heads)), sizes)
        times, created = records["time"].astype(np.int64), records["created"].astype(np.int64)
        order = np.lexsort((created, times, entity))
        return Events(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            times=times[order],
            created=created[order],
            columns={n: self._column(i, n, records, texts, order) for i, n in enumerate(self.types)},
        )

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


def rows_of(events: Events, types: Mapping[str, ValueType], index: np.ndarray) -> Rows:
    """Some events as head rows; values that count as null (NaN, infinities) are null here already."""
    columns = {}
    for name, value_type in types.items():
        column = events.columns[name]
        stored = from_arrow(column.arrow.take(pa.array(index)), value_type)
        columns[name] = [v if ok else None for v, ok in zip(stored, column.valid[index].tolist(), strict=True)]
    return Rows(events.times[index], events.created[index], columns)
