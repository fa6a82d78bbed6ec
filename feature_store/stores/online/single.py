"""One entity's windows, folded in plain Python: for a single row that is several times faster than numpy.

The same numbers, bit for bit, as windowed.Reading gives: sums run from the oldest event to the newest in both.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.types import ValueType
from feature_store.stores.online.head import HeadCodec
from feature_store.stores.online.steps import MOST_STEPS, StaircaseCodec

_HEADER = struct.Struct("<2sBBIq8sq")
_FOLDED = ("count", "sum", "mean", "min", "max")


@dataclass(frozen=True)
class _Column:
    """A column as it is read: `name` (`*` for events), its fields, whether they are floats."""

    name: str
    floats: bool
    fields: tuple[str, ...]


class SingleFold:
    """Folds the windows of one entity at a time, for some aggregations of one view."""

    def __init__(self, codec: StaircaseCodec, head: HeadCodec, aggregations: list[Aggregation]) -> None:
        self._codec, self._head, self._aggregations = codec, head, aggregations
        self._windows = list(dict.fromkeys((a.window, a.hop) for a in aggregations))
        self._numbers = struct.Struct(f"<{sum(1 + self._stepped(c) for c in codec.columns)}I")

    def _stepped(self, column: str) -> int:
        return sum(field.number is not None for field in self._codec.fields[column])

    @cached_property
    def able(self) -> bool:
        """Whether the aggregations are such that this way is open to them."""
        return self._head.fixed and all(a.function.kind in _FOLDED for a in self._aggregations)

    def fold(self, base: bytes | None, head: bytes | None, time: int) -> list[Any] | None:
        """The value of each aggregation as of a time, None for null; None for all where the numbers must be folded the
        other way: head rows out of order or with nulls.
        """
        rows = self._head_rows(head) if head else None
        if head and rows is None:
            return None
        stairs = _Stairs(self._codec, self._numbers, base) if base else None
        found: dict[tuple[str, int, int], dict[str, Any]] = {}
        values = []
        for a in self._aggregations:
            key = (a.column, a.window, a.hop)
            if key not in found:
                found[key] = self._state(a, stairs, rows, time)
            values.append(_finalized(a, found[key]))
        return values

    def _head_rows(self, head: bytes) -> tuple[list[int], np.ndarray] | None:
        if len(head) % self._head.row_size:
            return None
        records = np.frombuffer(head, self._head.dtype)
        times = records["time"].tolist()
        if records["nulls"].any() or any(map(int.__ge__, times, times[1:])):
            return None
        return times, records

    def _state(
        self, a: Aggregation, stairs: _Stairs | None, rows: tuple[list[int], np.ndarray] | None, time: int
    ) -> dict[str, Any]:
        tail = a.tail(time)
        state = stairs.state(a.column, stairs.entry(tail)) if stairs else {"n": 0}
        if rows is None:
            return state
        low = 0 if tail is None else bisect_left(rows[0], tail)
        high = bisect_left(rows[0], time)
        if low >= high:
            return state
        state["n"] += high - low
        if a.column != "*":
            self._add(state, a.column, rows[1][self._head.field(a.column)][low:high].tolist())
        return state

    def _add(self, state: dict[str, Any], column: str, values: list[Any]) -> None:
        """Folds head values into a column's state: whatever fields the column has."""
        for field in self._codec.fields[column]:
            name = field.name
            if name == "sum":
                total = 0.0
                for value in values:
                    total += value
                state[name] = state.get(name, 0.0) + total
            elif name == "sum_high":
                state["sum"] = state.get("sum", 0) + sum(values)
            elif name in ("min", "max"):
                pick = min if name == "min" else max
                best = pick(values)
                state[name] = pick(state[name], best) if name in state else best


class _Stairs:
    """One staircase as it lies, and where its parts begin."""

    def __init__(self, codec: StaircaseCodec, numbers: struct.Struct, data: bytes) -> None:
        codec.check(data)
        self._codec, self._data = codec, data
        _, _, _, self._count, self.exact_from, _, self._origin = _HEADER.unpack_from(data)
        self._given = numbers.unpack_from(data, _HEADER.size)
        wide = codec.code_type.itemsize == 8
        at = _HEADER.size + 8 * codec.number_words
        end = at + self._count * codec.code_type.itemsize
        self._codes = memoryview(data)[at:end].cast("q" if wide else "I")
        self._events = (end + 7) // 8 * 8
        self._places: dict[str, tuple[int, dict[str, tuple[int, int | None]]]] = {}
        self._lay_out(self._events + (4 * self._count + 7) // 8 * 8)

    def _lay_out(self, at: int) -> None:
        count = self._count
        for column, fields in self._codec.fields.items():
            counts = self._events
            if self._given[self._codec.counts[column]]:
                counts, at = at, at + (4 * count + 7) // 8 * 8
            places: dict[str, tuple[int, int | None]] = {}
            for field in fields:
                steps = self._given[field.number] if field.number is not None else count
                if field.number is not None and steps <= MOST_STEPS and steps < count:
                    index, at = at, at + (count + 7) // 8 * 8
                    places[field.name] = (at, index)
                    at += 8 * steps
                else:
                    places[field.name] = (at, None)
                    at += 8 * count
            self._places[column] = (counts, places)
        if at > len(self._data):
            self._codec.decode(self._data)

    def entry(self, tail: int | None) -> int:
        """The entry that answers a window from `tail`; how many there are if none does."""
        if tail is None:
            return 0
        return bisect_left(self._codes, max((tail - self._origin) // self._codec.grain + 1, 1))

    def state(self, column: str, entry: int) -> dict[str, Any]:
        """A column's state from an entry on, with the limbs of integer sums as one `sum`; without fields if empty."""
        if entry >= self._count:
            return {"n": 0}
        counts, places = self._places.get(column, (self._events, {}))
        state: dict[str, Any] = {"n": int.from_bytes(self._data[counts + 4 * entry : counts + 4 * entry + 4], "little")}
        if not state["n"]:
            return state
        for field in self._codec.fields.get(column, ()):
            at, index = places[field.name]
            place = at + 8 * (entry if index is None else self._data[index + entry])
            (state[field.name],) = struct.unpack_from("<d" if field.dtype.kind == "f" else "<q", self._data, place)
        if "sum_high" in state:
            state["sum"] = (state.pop("sum_high") << 32) + state.pop("sum_low")
        return state


def _finalized(a: Aggregation, state: dict[str, Any]) -> Any:
    """The value of an aggregation, None for null: finalize.py's rules for one state."""
    n, kind = state["n"], a.function.kind
    if kind == "count":
        return n
    if not n:
        return None
    value = state["sum" if kind == "mean" else kind]
    if kind == "mean":
        value = _as_float(value) / n
    if isinstance(value, int):
        return value if kind != "sum" or -(2**63) <= value < 2**63 else None
    if a.output is ValueType.FLOAT32:
        value = float(np.float32(value))
    return value if math.isfinite(value) else None


def _as_float(total: Any) -> float:
    """An integer total as the algebra makes a float of it: by its limbs."""
    return (total >> 32) * 2.0**32 + (total & 0xFFFFFFFF) if isinstance(total, int) else total
