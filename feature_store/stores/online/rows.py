"""A plain view's rows as bytes: per entity the current row, and those still waiting for their time.

Layout of a value, version 2, little-endian::

    "IP" | u8 version | u8 waiting | u32 rows | 8 bytes schema fingerprint, then per row, by event time:
    i64 event time | i64 created time (lowest: none) | null bits, one a feature, in whole 8 bytes
    | fixed-width features: float64, int64 and times, float32, int32, booleans (a byte each); zeros up to whole 8 bytes
    | u32 length of each variable-width feature | their bytes

`waiting` is 1 where a row was later than its writer's clock: such a value does not yield to a newer one by its times.
Features lie in name order within each width. Text and bytes are stored as they are, lists as MessagePack. A row
without variable-width features has one size, so that many values are one array of 8-byte words as they lie.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from feature_store.definitions.columns import whole
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView
from feature_store.errors import CorruptState, RequestError
from feature_store.stores.online.backend import KEPT, REPLACED, UNDECIDED
from feature_store.stores.online.blocks import Block
from feature_store.stores.online.values import from_arrow, is_variable
from feature_store.timestamps import BEGINNING, END, micros

_HEADER = struct.Struct("<2sBBI8s")
_ROW = struct.Struct("<qq")
_MAGIC, _VERSION = b"IP", 2
_HEADER_WORDS = _HEADER.size // 8

#: Columns of a table of rows beside keys and features.
TIME, CREATED = "__time", "__created"

#: How each width lies: its numpy type, and its letter for struct, the widest first so that every value is aligned.
_WIDTHS: tuple[tuple[str, str, tuple[ValueType, ...]], ...] = (
    ("<f8", "d", (ValueType.FLOAT64,)),
    ("<i8", "q", (ValueType.INT64, ValueType.TIMESTAMP)),
    ("<f4", "f", (ValueType.FLOAT32,)),
    ("<i4", "i", (ValueType.INT32,)),
    ("|u1", "B", (ValueType.BOOL,)),
)


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


def newer(stored: bytes | None, offered: bytes) -> int:
    """Whether a value of one row replaces what is stored, told by the times alone: KEPT, REPLACED or UNDECIDED.

    UNDECIDED where times are equal and bytes are not, or the stored value holds several rows, one that waits for its
    time, or another schema: then the values decide, and whoever reads them.
    """
    if stored is None:
        return REPLACED
    if stored == offered:
        return KEPT
    if stored[: _HEADER.size] != offered[: _HEADER.size]:
        return UNDECIDED
    old, new = (_ROW.unpack_from(value, _HEADER.size) for value in (stored, offered))
    return UNDECIDED if old == new else REPLACED if new > old else KEPT


@dataclass(frozen=True)
class _Group:
    """The fixed-width features of one width: which they are, where in a row they begin (bytes), and how they lie."""

    dtype: np.dtype
    letter: str
    features: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class RowCodec:
    """Encodes and decodes the rows of one plain view."""

    view: PlainView

    @cached_property
    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.view.fingerprint[:16])

    @cached_property
    def _null_bytes(self) -> int:
        return (len(self.view.features) + 63) // 64 * 8

    @cached_property
    def _no_nulls(self) -> bytes:
        return bytes(self._null_bytes)

    @cached_property
    def _groups(self) -> list[_Group]:
        at, groups = _ROW.size + self._null_bytes, []
        for dtype, letter, types in _WIDTHS:
            here = tuple(i for i, f in enumerate(self.view.features) if f.type in types)
            if here:
                groups.append(_Group(np.dtype(dtype), letter, here, at))
                at += np.dtype(dtype).itemsize * len(here)
        return groups

    @cached_property
    def _fixed(self) -> list[int]:
        return [i for group in self._groups for i in group.features]

    @cached_property
    def _in_order(self) -> bool:
        """Whether a row's fixed-width values lie in the order of its features, and are all there is."""
        return self._fixed == list(range(len(self.view.features)))

    @cached_property
    def _variable(self) -> list[int]:
        return [i for i, f in enumerate(self.view.features) if is_variable(f.type) or f.type.is_list]

    @cached_property
    def _struct(self) -> struct.Struct:
        """The fixed-width part of a row behind its null bits, padded to whole words."""
        body = "<" + "".join(f"{len(g.features)}{g.letter}" for g in self._groups)
        return struct.Struct(f"{body}{-struct.calcsize(body) % 8}x")

    @cached_property
    def _row_size(self) -> int:
        """Bytes of a row up to its variable-width part."""
        return _ROW.size + self._null_bytes + self._struct.size

    @cached_property
    def _one_row(self) -> bytes:
        """What a value of a single row begins with."""
        return _HEADER.pack(_MAGIC, _VERSION, 0, 1, self.fingerprint)

    @cached_property
    def _header_words(self) -> np.ndarray:
        return np.frombuffer(self._one_row, "<u8")

    # -- writing ------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], now: int = END) -> bytes:
        """The value that holds these rows, by event time, written by a clock that says `now`."""
        waiting = any(row.time > now for row in rows)
        header = _HEADER.pack(_MAGIC, _VERSION, waiting, len(rows), self.fingerprint)
        return b"".join([header, *map(self._encode, rows)])

    def checked(self, row: Row) -> bytes:
        """The value of one row that comes from outside. Raises RequestError for a feature of the wrong type."""
        try:
            return self._one_row + self._encode(self.stored(row))
        except (struct.error, TypeError, AttributeError, ValueError, OverflowError) as error:
            for field, value in zip(self.view.features, row.values, strict=True):
                if not _is_of(value, field.type):
                    raise RequestError(
                        field.name, f"is a {type(value).__name__}, no {field.type.feast_name}"
                    ) from error
            raise

    def stored(self, row: Row) -> Row:
        """A row that comes from outside as the store holds it: times that are datetimes as microseconds."""
        if not self._moments:
            return row
        values = list(row.values)
        for i in self._moments:
            values[i] = _micros(values[i])
        return Row(row.time, row.created, tuple(values))

    @cached_property
    def _moments(self) -> list[int]:
        return [i for i, f in enumerate(self.view.features) if f.type.element is ValueType.TIMESTAMP]

    def _encode(self, row: Row) -> bytes:
        values, nulls = row.values, 0
        if None in values:
            nulls = sum((v is None) << i for i, v in enumerate(values))
        if nulls or not self._in_order:
            fixed = self._struct.pack(*[0 if values[i] is None else values[i] for i in self._fixed])
        else:
            fixed = self._struct.pack(*values)
        if not self._variable:
            return b"".join((_ROW.pack(row.time, row.created), nulls.to_bytes(self._null_bytes, "little"), fixed))
        data = [_variable_bytes(values[i], self.view.features[i].type) for i in self._variable]
        lengths = struct.pack(f"<{len(data)}I", *map(len, data))
        times = _ROW.pack(row.time, row.created)
        return b"".join([times, nulls.to_bytes(self._null_bytes, "little"), fixed, lengths, *data])

    def encoder(self, table: pa.Table) -> Callable[[np.ndarray], list[bytes]]:
        """What gives the values of one row each, of the rows of a table (`__time`, `__created`, features) at some
        places, column by column: so that the first can be on their way while the next are made.
        """
        arrays = {name: whole(column) for name, column in zip(table.column_names, table.columns, strict=True)}
        features = [arrays[field.name] for field in self.view.features]
        times, created = _integers(arrays[TIME]), _integers(arrays[CREATED])
        columns = [[_fixed_values(features[i], self.view.features[i].type) for i in g.features] for g in self._groups]
        nulls = self._null_bits(features) if any(array.null_count for array in features) else None
        size = _HEADER.size + self._row_size

        def encode(places: np.ndarray) -> list[bytes]:
            lying = np.zeros((len(places), size // 8), "<i8")
            lying[:, :_HEADER_WORDS] = self._header_words.view(np.int64)
            lying[:, _HEADER_WORDS], lying[:, _HEADER_WORDS + 1] = times[places], created[places]
            if nulls is not None:
                at = _HEADER.size + _ROW.size
                lying.view(np.uint8)[:, at : at + self._null_bytes] = nulls[places]
            for group, values in zip(self._groups, columns, strict=True):
                first = (_HEADER.size + group.at) // group.dtype.itemsize
                words = lying.view(group.dtype)
                for place, column in enumerate(values, first):
                    words[:, place] = column[places]
            whole = lying.tobytes()
            encoded = [whole[low : low + size] for low in range(0, len(whole), size)]
            return self._with_variable(encoded, table.take(pa.array(places))) if self._variable else encoded

        return encode

    def _null_bits(self, features: Sequence[pa.Array]) -> np.ndarray:
        """The null bits of each row, (rows, bytes)."""
        nulls = np.zeros((len(features[0]), 8 * self._null_bytes), bool)
        for i, array in enumerate(features):
            if array.null_count:
                nulls[:, i] = np.asarray(array.is_null())
        return np.packbits(nulls, axis=1, bitorder="little")

    def _with_variable(self, rows: list[bytes], table: pa.Table) -> list[bytes]:
        types = [self.view.features[i].type for i in self._variable]
        names = [self.view.features[i].name for i in self._variable]
        columns = [
            [_variable_bytes(v, t) for v in from_arrow(table[n].combine_chunks(), t)]
            for n, t in zip(names, types, strict=True)
        ]
        lengths = struct.Struct(f"<{len(types)}I")
        return [
            b"".join([row, lengths.pack(*map(len, data)), *data])
            for row, data in zip(rows, zip(*columns, strict=True), strict=True)
        ]

    # -- reading ------------------------------------------------------------------------------------------------

    def decode(self, data: bytes) -> list[Row]:
        """The rows in a stored value, by event time. Raises CorruptState for another version or definition."""
        count = self.count(data)
        rows, at = [], _HEADER.size
        try:
            for _ in range(count):
                row, at = self._decode(data, at)
                rows.append(row)
        except (struct.error, ValueError, msgspec.MsgspecError) as error:
            raise self._cut_off() from error
        if at != len(data):
            raise self._cut_off()
        return rows

    def count(self, data: bytes) -> int:
        """How many rows a stored value says it holds. Raises CorruptState for another version or definition."""
        if len(data) < _HEADER.size or data[:3] != _MAGIC + bytes([_VERSION]):
            raise CorruptState(
                f"view '{self.view.name}': a stored row is of no version that can be read; bootstrap it."
            )
        _, _, _, count, fingerprint = _HEADER.unpack_from(data)
        if fingerprint != self.fingerprint:
            raise CorruptState(f"view '{self.view.name}': a stored row is of another definition; bootstrap it again.")
        return count

    def _cut_off(self) -> CorruptState:
        return CorruptState(f"view '{self.view.name}': a stored row is cut off; bootstrap it again.")

    def _decode(self, data: bytes, at: int) -> tuple[Row, int]:
        time, created = _ROW.unpack_from(data, at)
        at += _ROW.size
        nulls = int.from_bytes(data[at : at + self._null_bytes], "little")
        at += self._null_bytes
        values: list[Any] = [None] * len(self.view.features)
        for i, value in zip(self._fixed, self._struct.unpack_from(data, at), strict=True):
            values[i] = value
        at += self._struct.size
        lengths = struct.unpack_from(f"<{len(self._variable)}I", data, at)
        at += 4 * len(lengths)
        for i, length in zip(self._variable, lengths, strict=True):
            if at + length > len(data):
                raise ValueError("a value ends behind the row")
            if not nulls >> i & 1:
                values[i] = _variable_value(data[at : at + length], self.view.features[i].type)
            at += length
        return Row(time, created, tuple(None if nulls >> i & 1 else v for i, v in enumerate(values))), at

    def single(self, data: bytes) -> tuple[int, tuple] | None:
        """The event time and the features of a value that holds one row of fixed width without nulls, else None."""
        if self._variable or data[: _HEADER.size] != self._one_row or len(data) != _HEADER.size + self._row_size:
            return None
        at = _HEADER.size + _ROW.size
        if data[at : at + self._null_bytes] != self._no_nulls:
            return None
        (time,) = struct.unpack_from("<q", data, _HEADER.size)
        return time, self._struct.unpack_from(data, at + self._null_bytes)

    def chosen(self, names: Sequence[str]) -> Chosen:
        """Some features, resolved once for many reads."""
        index = {f.name: i for i, f in enumerate(self.view.features)}
        return Chosen(self, tuple(names), tuple(index[name] for name in names))

    def words(self, values: Sequence[bytes]) -> np.ndarray | None:
        """Values of one row each as an array of 8-byte words (of its fixed-width part), a line a value; else None."""
        size = _HEADER.size + self._row_size
        if self._variable:
            values = [value[:size] for value in values]
        joined = b"".join(values)
        if len(joined) != len(values) * size:
            return None
        words = np.frombuffer(joined, "<u8").reshape(len(values), size // 8)
        return words if (words[:, :_HEADER_WORDS] == self._header_words).all() else None


@dataclass(frozen=True)
class Chosen:
    """Some features of a plain view: their names, and their places among all."""

    codec: RowCodec
    names: tuple[str, ...]
    features: tuple[int, ...]

    @cached_property
    def types(self) -> tuple[ValueType, ...]:
        return tuple(self.codec.view.features[i].type for i in self.features)

    @cached_property
    def pick(self) -> Callable[[tuple], Sequence[Any]]:
        """Takes the features out of the tuple of all fixed-width ones."""
        places = [self.codec._fixed.index(i) for i in self.features]
        if places == list(range(len(self.codec._fixed))):
            return tuple
        if len(places) == 1:
            return lambda values: (values[places[0]],)
        return operator.itemgetter(*places) if places else lambda values: ()

    @cached_property
    def groups(self) -> list[tuple[_Group, list[int], np.ndarray | None]]:
        """For each width the places in the answer that it fills, and which of its columns they are (None: all)."""
        made = []
        for group in self.codec._groups:
            places = [place for place, i in enumerate(self.features) if i in group.features]
            columns = [group.features.index(self.features[place]) for place in places]
            if places:
                every = columns == list(range(len(group.features)))
                made.append((group, places, None if every else np.array(columns)))
        return made

    @cached_property
    def variable(self) -> list[tuple[int, int]]:
        """For each variable-width feature its place in the answer and among the view's variable-width ones."""
        held = self.codec._variable
        return [(place, held.index(i)) for place, i in enumerate(self.features) if i in held]


class PackedRows(Block):
    """Rows of one size as they lie in the store: an answer's values, taken out when they are asked for.

    `words` has a line a stored value, `lines` says which line each row of the answer is (None: line by line), -1 for a
    row without values; `data` are the values themselves, for variable-width features.
    """

    def __init__(self, chosen: Chosen, words: np.ndarray, lines: np.ndarray | None, data: Sequence[bytes]) -> None:
        super().__init__(chosen.names, chosen.types, len(words) if lines is None else len(lines))
        self._chosen, self._words, self._lines, self._data = chosen, words, lines, data

    @cached_property
    def valid(self) -> np.ndarray | None:
        """Which values there are, (features, rows); None where all are."""
        codec = self._chosen.codec
        low = _HEADER_WORDS + _ROW.size // 8
        bits = self._words[:, low : low + codec._null_bytes // 8]
        if self._lines is None and not bits.any():
            return None
        spread = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1, bitorder="little")
        valid = spread[:, list(self._chosen.features)] == 0
        if self._lines is not None:
            valid = (
                np.where((self._lines >= 0)[:, None], valid[self._lines], False)
                if len(valid)
                else np.zeros((self.rows, len(self.names)), bool)
            )
        return valid.T

    def _matrix(self, group: _Group, columns: np.ndarray | None) -> np.ndarray:
        """The values of one width, (rows, features)."""
        low = _HEADER.size + group.at
        width = group.dtype.itemsize * len(group.features)
        raw = self._words.view(np.uint8)[:, low : low + width]
        matrix = raw.view(group.dtype) if raw.shape[0] else np.zeros((0, len(group.features)), group.dtype)
        matrix = matrix if columns is None else matrix[:, columns]
        if self._lines is None:
            return matrix
        return matrix[self._lines] if len(matrix) else np.zeros((self.rows, matrix.shape[1]), group.dtype)

    @cached_property
    def arrays(self) -> list[np.ndarray | None]:
        """The fixed-width features as numpy arrays, with whatever stands where there is no value; None for others."""
        found: list[np.ndarray | None] = [None] * len(self.names)
        for group, places, columns in self._chosen.groups:
            for place, column in zip(places, self._matrix(group, columns).T, strict=True):
                found[place] = column
        return found

    def lists(self) -> list[list[Any]]:
        """Every feature's values, None where there is none."""
        found: list[list[Any]] = [[]] * len(self.names)
        for group, places, columns in self._chosen.groups:
            lists = self._matrix(group, columns).T.tolist()
            for place, values in zip(places, lists, strict=True):
                found[place] = values
        if self._chosen.variable:
            self._fill_variable(found)
        if self.valid is not None:
            for place in np.flatnonzero(~self.valid.all(axis=1)).tolist():
                for row in np.flatnonzero(~self.valid[place]).tolist():
                    found[place][row] = None
        return found

    def _fill_variable(self, found: list[list[Any]]) -> None:
        codec = self._chosen.codec
        size, count = _HEADER.size + codec._row_size, len(codec._variable)
        lengths = struct.Struct(f"<{count}I")
        lines = range(len(self._data)) if self._lines is None else self._lines.tolist()
        valid = self.valid
        for place, _ in self._chosen.variable:
            found[place] = [None] * self.rows
        try:
            for row, line in enumerate(lines):
                if line < 0:
                    continue
                data = self._data[line]
                ends = np.cumsum(lengths.unpack_from(data, size)).tolist()
                start = size + lengths.size
                if start + ends[-1] != len(data):
                    raise codec._cut_off()
                for place, at in self._chosen.variable:
                    if valid is None or valid[place, row]:
                        low = start + (ends[at - 1] if at else 0)
                        found[place][row] = _variable_value(data[low : start + ends[at]], self.types[place])
        except (struct.error, ValueError, msgspec.MsgspecError) as error:
            raise codec._cut_off() from error


def _integers(times: pa.Array) -> np.ndarray:
    """int64 values, BEGINNING where null."""
    array = times.cast(pa.int64())
    return array.fill_null(BEGINNING).to_numpy() if array.null_count else array.to_numpy()


def _fixed_values(array: pa.Array, value_type: ValueType) -> np.ndarray:
    """A fixed-width column as numbers, 0 where null."""
    if value_type is ValueType.TIMESTAMP:
        array = array.view(pa.int64())
    elif value_type is ValueType.BOOL:
        array = array.cast(pa.uint8())
    if array.null_count:
        array = array.fill_null(0)
    return array.to_numpy(zero_copy_only=False)


def _micros(value: Any) -> Any:
    """A time, or a list of them, in microseconds; what is no datetime stays as it is."""
    if isinstance(value, list):
        return [_micros(one) for one in value]
    return micros(value) if isinstance(value, dt.datetime) else value


def _is_of(value: Any, value_type: ValueType) -> bool:
    """Whether a stored value may be of a type, null included."""
    if value is None:
        return True
    if value_type.is_list:
        return isinstance(value, list) and all(_is_of(v, value_type.element) for v in value)
    kinds = {ValueType.STRING: str, ValueType.BYTES: bytes}
    if value_type in kinds:
        return isinstance(value, kinds[value_type])
    bits = 31 if value_type is ValueType.INT32 else 63
    return isinstance(value, int | float) if value_type.is_float else isinstance(value, int) and abs(value) < 1 << bits


def _variable_bytes(value: Any, value_type: ValueType) -> bytes:
    if value is None:
        return b""
    if value_type.is_list:
        return msgspec.msgpack.encode(value)
    return value.encode() if value_type is ValueType.STRING else value


def _variable_value(data: bytes, value_type: ValueType) -> Any:
    if not value_type.is_list:
        return data.decode() if value_type is ValueType.STRING else data
    element = float if value_type.element.is_float else bytes if value_type.element is ValueType.BYTES else Any
    return msgspec.msgpack.decode(data, type=list[element | None])  # type: ignore[valid-type]


def keep(rows: Iterable[Row], now: int) -> list[Row]:
    """The current row (the greatest at or before `now`) and, per later event time, the greatest; by event time."""
    best: dict[int, Row] = {}
    for row in rows:
        slot = row.time if row.time > now else BEGINNING
        if slot not in best or row.rank > best[slot].rank:
            best[slot] = row
    return [best[slot] for slot in sorted(best)]
