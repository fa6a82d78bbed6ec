"""The bytes of staircases: written one by one, read one by one or many at once as they lie.

Layout, version 2, little-endian; every part is filled up with zeros to whole words of 8 bytes::

    "IS" | u8 version | u8 0 | u32 entries | i64 exact_from | 8 bytes fingerprint | i64 origin
    | u32 numbers: per column, in name order, whether it has counts of its own (0: every event has a value), and how
      many steps each of its minima and maxima has
    | code of each start | u32 events from each start on
    per column, in name order:
      | u32 values from each start on, if it has counts of its own
      | per measure field, in name order: 8 bytes an entry; or, for a minimum or maximum of few steps, a u8 an entry
        that is a step's number, then 8 bytes a step
    per column that has a `first`, in name order: values (values.py), i64 times, i64 created, one an entry
    per column that has a `last`: the same, of the newest values

A code is 0 for the beginning of time, else 1 + (start - origin) / grain, the grain being the greatest common divisor of
all hops; u32 where the longest window allows, else i64. A minimum or maximum of suffixes changes a few times only
(about the logarithm of the number of events), hence the steps.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from feature_store.aggregations.measures import State, field_types, identity
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.errors import CorruptState
from feature_store.stores.online.staircase import Base, ColumnPlan, Ordered, column_plans
from feature_store.stores.online.values import decode_values, encode_values
from feature_store.timestamps import BEGINNING

_HEADER = struct.Struct("<2sBBIq8sq")
_HEADER_WORDS = _HEADER.size // 8
_MAGIC, _VERSION = b"IS", 2
_MOST = 2**32 - 1

#: Most steps whose number fits the byte an entry has for it.
MOST_STEPS = 255

_STEPPED = ("min", "max")


@dataclass(frozen=True)
class _Field:
    """One field of a column's states: its type, and where its number of steps stands (None: it has none)."""

    column: str
    name: str
    dtype: np.dtype
    number: int | None


@dataclass(frozen=True)
class StaircaseCodec:
    """Encodes and decodes the staircases of one view."""

    view: WindowedView

    @cached_property
    def columns(self) -> dict[str, ColumnPlan]:
        return column_plans(self.view)

    @cached_property
    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.view.fingerprint[:16])

    @cached_property
    def first_half(self) -> int:
        """What a staircase begins with, as a u32."""
        return int.from_bytes(_MAGIC + bytes([_VERSION, 0]), "little")

    @cached_property
    def third_word(self) -> int:
        """The fingerprint where it lies in a staircase, as an i64."""
        return int.from_bytes(self.fingerprint, "little", signed=True)

    @cached_property
    def grain(self) -> int:
        """What every start is a multiple of."""
        return math.gcd(*(a.hop for a in self.view.aggregations if a.window)) or 1

    @cached_property
    def code_type(self) -> np.dtype:
        longest = max((a.window + a.hop for a in self.view.aggregations), default=0)
        return np.dtype("<u4") if longest // self.grain < _MOST - 1 else np.dtype("<i8")

    @cached_property
    def counts(self) -> dict[str, int]:
        """Where among the numbers stands whether a column has counts of its own."""
        return {name: self._numbered.index((name, "n")) for name in self.columns}

    @cached_property
    def fields(self) -> dict[str, list[_Field]]:
        """The fields of each column's states beside its count, in the order in which they lie."""
        return {
            name: [_Field(name, part, t, self._number(name, part)) for part, t in _fields(plan)]
            for name, plan in self.columns.items()
        }

    @cached_property
    def _numbered(self) -> list[tuple[str, str]]:
        found = []
        for name, plan in self.columns.items():
            found += [(name, "n"), *((name, part) for part, _ in _fields(plan) if part in _STEPPED)]
        return found

    def _number(self, column: str, part: str) -> int | None:
        return self._numbered.index((column, part)) if part in _STEPPED else None

    @cached_property
    def number_words(self) -> int:
        return (len(self._numbered) + 1) // 2

    # -- writing ------------------------------------------------------------------------------------------------

    def encode(self, base: Base) -> bytes:
        """The bytes of a staircase. Raises OverflowError past 4,294,967,295 events of one entity."""
        count, events = len(base.starts), base.states["*"]["n"]
        origin, codes = self._codes(base.starts)
        numbers = np.zeros(len(self._numbered), "<u4")
        parts = [_padded(codes.tobytes()), _counts(events)]
        for name in self.columns:
            state = base.states[name]
            if not np.array_equal(state["n"], events):
                numbers[self.counts[name]] = 1
                parts.append(_counts(state["n"]))
            for f in self.fields[name]:
                values = state[f.name].astype(f.dtype.newbyteorder("<"))
                if f.number is not None:
                    steps, index = _stepped(values)
                    numbers[f.number] = len(steps)
                    if _is_indexed(len(steps), count):
                        parts.append(_padded(index.astype(np.uint8).tobytes()))
                        values = steps
                parts.append(values.tobytes())
        for name, plan in self.columns.items():
            parts += [_encode_ordered(base.firsts[name], plan.type)] if plan.first else []
        for name, plan in self.columns.items():
            parts += [_encode_ordered(base.lasts[name], plan.type)] if plan.last else []
        header = _HEADER.pack(_MAGIC, _VERSION, 0, count, base.exact_from, self.fingerprint, origin)
        return b"".join([header, _padded(numbers.tobytes()), *parts])

    def _codes(self, starts: np.ndarray) -> tuple[int, np.ndarray]:
        finite = starts != BEGINNING
        origin = int(starts[finite][0]) if finite.any() else 0
        codes = np.where(finite, (np.where(finite, starts, origin) - origin) // self.grain + 1, 0)
        return origin, codes.astype(self.code_type)

    # -- reading one --------------------------------------------------------------------------------------------

    def decode(self, data: bytes) -> Base:
        """The staircase in these bytes. Raises CorruptState when they are of another version or definition."""
        self.check(data)
        try:
            return self._decode(data)
        except (struct.error, ValueError, IndexError) as error:
            raise CorruptState(f"view '{self.view.name}': a stored value is cut off; bootstrap it again.") from error

    def check(self, data: bytes) -> None:
        """Raises CorruptState when bytes are not a staircase of this version and definition."""
        if len(data) < _HEADER.size or data[:3] != _MAGIC + bytes([_VERSION]):
            raise CorruptState(
                f"view '{self.view.name}': a stored value is of no version that can be read; bootstrap it."
            )
        if data[16:24] != self.fingerprint:
            raise CorruptState(f"view '{self.view.name}': a stored value is of another definition; bootstrap it again.")

    def _decode(self, data: bytes) -> Base:
        _, _, _, count, exact_from, _, origin = _HEADER.unpack_from(data)
        numbers, at = _array(data, _HEADER.size, "<u4", len(self._numbered))
        codes, at = _array(data, at, self.code_type, count)
        wide = codes.astype(np.int64)
        starts = np.where(wide > 0, (wide - 1) * self.grain + origin, BEGINNING)
        events, at = _array(data, at, "<u4", count)
        states: dict[str, State] = {"*": {"n": events.astype(np.int64)}}
        firsts, lasts = {}, {}
        for name in self.columns:
            state: State = {"n": states["*"]["n"]}
            if numbers[self.counts[name]]:
                n, at = _array(data, at, "<u4", count)
                state["n"] = n.astype(np.int64)
            for f in self.fields[name]:
                steps = int(numbers[f.number]) if f.number is not None else 0
                if f.number is not None and _is_indexed(steps, count):
                    index, at = _array(data, at, "|u1", count)
                    values, at = _array(data, at, f.dtype, steps)
                    state[f.name] = values[index]
                else:
                    state[f.name], at = _array(data, at, f.dtype, count)
            states[name] = state
        for name, plan in self.columns.items():
            if plan.first:
                firsts[name], at = _decode_ordered(data, at, plan.type)
        for name, plan in self.columns.items():
            if plan.last:
                lasts[name], at = _decode_ordered(data, at, plan.type)
        if at != len(data):
            raise ValueError("it does not end where it should")
        return Base(exact_from, starts, states, firsts, lasts)


class Staircases:
    """Many staircases as they lie behind one another, None for an entity without one.

    `exact_from` is each one's, BEGINNING where there is none.
    """

    def __init__(self, codec: StaircaseCodec, stored: Sequence[bytes | None]) -> None:
        self.codec = codec
        sizes = np.array([len(data) if data else 0 for data in stored], np.int64)
        present = sizes > 0
        # A last staircase of zeros for those who have none: it has no entries.
        joined = b"".join([*filter(None, stored), bytes(_HEADER.size)])
        if (sizes & 7).any() or (present & (sizes < _HEADER.size)).any():
            self._blame(stored)
        self._words = np.frombuffer(joined, "<i8")
        self._halves, self._doubles, self._bytes = (self._words.view(t) for t in ("<u4", "<f8", "u1"))
        ends = np.cumsum(sizes) // 8
        self._at = np.where(present, ends - sizes // 8, len(self._words) - _HEADER_WORDS)
        self._end = np.where(present, ends, len(self._words))
        wrong = (self._halves[2 * self._at] != codec.first_half) | (self._words[self._at + 2] != codec.third_word)
        if (wrong & present).any():
            self._blame(stored)
        self.entries = self._halves[2 * self._at + 1].astype(np.int64)
        self.exact_from = np.where(present, self._words[self._at + 1], BEGINNING)
        self._origin = self._words[self._at + 3]
        self._lay_out(stored)

    def _blame(self, stored: Sequence[bytes | None]) -> None:
        """Raises CorruptState for the first value that is no staircase of this version and definition."""
        for data in stored:
            if data is not None:
                self.codec.decode(data)

    def _lay_out(self, stored: Sequence[bytes | None]) -> None:
        """Finds where each part of each staircase begins, in words."""
        codec, count = self.codec, self.entries
        numbers = 2 * (self._at + _HEADER_WORDS)
        at = self._at + _HEADER_WORDS + np.where(count > 0, codec.number_words, 0)
        halves = (count + 1) // 2
        self._codes = at
        at = at + (halves if codec.code_type.itemsize == 4 else count)
        self._events = at
        at = at + halves
        self._counts: dict[str, np.ndarray] = {}
        self._fields: dict[tuple[str, str], tuple[np.ndarray, np.ndarray | None]] = {}
        for name in codec.columns:
            own = self._number(numbers, codec.counts[name]) > 0
            self._counts[name] = np.where(own, at, self._events)
            at = at + np.where(own, halves, 0)
            for f in codec.fields[name]:
                if f.number is None:
                    self._fields[name, f.name] = (at, None)
                    at = at + count
                    continue
                steps = self._number(numbers, f.number)
                indexed = (steps <= MOST_STEPS) & (steps < count)
                self._fields[name, f.name] = (at + np.where(indexed, (count + 7) // 8, 0), np.where(indexed, at, -1))
                at = at + np.where(indexed, (count + 7) // 8 + steps, count)
        if ((at > self._end) & (count > 0)).any():
            self._blame(stored)

    def _number(self, numbers: np.ndarray, which: int) -> np.ndarray:
        """A number out of each staircase; of those without entries it means nothing."""
        return self._halves.take(numbers + which, mode="clip").astype(np.int64)

    def find(self, tails: np.ndarray) -> np.ndarray:
        """The entry that answers a window from each tail, (windows, entities); the number of entries if none does.

        A tail of BEGINNING asks for everything.
        """
        codec = self.codec
        codes = self._halves if codec.code_type.itemsize == 4 else self._words
        before = self._codes * (8 // codec.code_type.itemsize) - 1
        wanted = np.maximum((tails - self._origin) // codec.grain + 1, 1)
        wanted[tails == BEGINNING] = 0
        # Flat arrays of one type, each step in place: this is the longest part of a read.
        wanted = np.minimum(wanted, np.iinfo(codes.dtype).max).astype(codes.dtype).ravel()
        place = np.tile(before, len(tails))
        last = np.tile(before + self.entries, len(tails))
        step = 1 << int(self.entries.max(initial=0)).bit_length() >> 1
        while step:
            ahead = place + step
            below = codes.take(ahead, mode="clip") < wanted
            below &= ahead <= last
            np.copyto(place, ahead, where=below)
            step >>= 1
        return place.reshape(tails.shape) - before

    def events(self, found: np.ndarray) -> np.ndarray:
        """How many events there are from each entry on."""
        return self._gather(self._halves, 2 * self._events + found, found, 0).astype(np.int64)

    def state(self, column: str, found: np.ndarray, measures: Sequence[str]) -> State:
        """Some measures of a column's state from each entry on, flat; those of no event behind the last entry."""
        none = identity(measures, self.codec.columns[column].dtype, 1)
        n = self._gather(self._halves, 2 * self._counts[column] + found, found, 0).astype(np.int64)
        state: State = {"n": n.ravel()}
        for f in self.codec.fields[column]:
            if f.name not in none:
                continue
            at, index = self._fields[column, f.name]
            place = at + found
            if index is not None:
                numbers = self._gather(self._bytes, 8 * index + found, found, 0).astype(np.int64)
                place = np.where(index >= 0, at + numbers, place)
            source = self._doubles if f.dtype.kind == "f" else self._words
            state[f.name] = self._gather(source, place, found, none[f.name][0]).ravel()
        return state

    def _gather(self, source: np.ndarray, place: np.ndarray, found: np.ndarray, none: float) -> np.ndarray:
        return np.where(found < self.entries, source.take(place, mode="clip"), none)


def _fields(plan: ColumnPlan) -> list[tuple[str, np.dtype]]:
    types = field_types(plan.measures, plan.dtype)
    return [(name, dtype) for name, dtype in types.items() if name != "n"]


def _is_indexed(steps: int, entries: int) -> bool:
    return steps <= MOST_STEPS and steps < entries


def _stepped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values where they change, and for each entry the number of its step."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new], np.cumsum(new) - 1


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _counts(n: np.ndarray) -> bytes:
    if n.max(initial=0) > _MOST:
        raise OverflowError(f"an entity has more than {_MOST:,} events")
    return _padded(n.astype("<u4").tobytes())


def _array(data: bytes, at: int, dtype: str | np.dtype, count: int) -> tuple[np.ndarray, int]:
    array = np.frombuffer(data, dtype, count, at)
    return array, at + (array.nbytes + 7) // 8 * 8


def _encode_ordered(ordered: Ordered, value_type: ValueType) -> bytes:
    times = np.array([*ordered.times, *ordered.created], "<i8").tobytes()
    return _padded(encode_values(ordered.values, value_type)) + times


def _decode_ordered(data: bytes, at: int, value_type: ValueType) -> tuple[Ordered, int]:
    values, end = decode_values(data, at, value_type)
    times, at = _array(data, at + (end - at + 7) // 8 * 8, "<i8", 2 * len(values))
    return Ordered(times[: len(values)].tolist(), times[len(values) :].tolist(), values), at
