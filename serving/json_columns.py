"""Columns of rows as JSON carries them, read as the types that a plain view declares.

JSON has no times, bytes or NaN: a time is ISO 8601 text, or whole seconds since the epoch as in Feast's answers; bytes
are base64 text; NaN and the infinities are the texts "NaN", "Infinity" and "-Infinity". So whatever an answer holds
can be written back.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView
from feature_store.errors import RequestError
from feature_store.timestamps import SECOND, arrow_timestamps, parse_time

Columns = Mapping[str, list[Any]]

#: How Feast's remote client calls the time columns of the rows it writes, whatever the source's columns are called.
FEASTS_TIME, FEASTS_CREATED = "event_timestamp", "created"

#: Seconds from the epoch to the end of the year 9999: what is beyond was meant as another unit.
_MOST_SECONDS = 253_402_300_799

_NOT_FINITE: dict[Any, float] = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def check_lengths(columns: Columns) -> int:
    """How many rows columns have. Raises RequestError where there is no column, or lengths differ."""
    if not columns:
        raise RequestError("df", "has no columns")
    rows = len(next(iter(columns.values())))
    for name, values in columns.items():
        if len(values) != rows:
            raise RequestError(name, f"has {len(values)} values where the first column has {rows}")
    return rows


def table_of_view(view: PlainView, columns: Columns) -> pa.Table:
    """A plain view's rows as its source has them: join keys, times and features, by the source's names.

    Columns may have the names in the source's files or the mapped ones; times also those of Feast's remote client.
    What the view does not use is left out. Raises RequestError that names the column.
    """
    rows = check_lengths(columns)
    source = view.source
    taken: dict[str, pa.Array] = {}
    for field in (*view.keys, *view.features):
        physical = source.physical(field.name)
        name = _given(view, columns, physical, field.name)
        if name is None:
            raise RequestError(field.name, f"is missing; view '{view.name}' needs it")
        taken[physical] = array_of(name, columns[name], field.type)
    features = {f.name for f in view.features}
    feasts = FEASTS_TIME if FEASTS_TIME not in features else source.timestamp_field
    if (name := _given(view, columns, source.timestamp_field, feasts)) is None:
        raise RequestError(source.timestamp_field, f"is missing; view '{view.name}' needs it")
    taken[source.timestamp_field] = array_of(name, columns[name], ValueType.TIMESTAMP)
    if source.created_field:
        feasts = FEASTS_CREATED if FEASTS_CREATED not in features else source.created_field
        name = _given(view, columns, source.created_field, feasts)
        taken[source.created_field] = (
            array_of(name, columns[name], ValueType.TIMESTAMP) if name else pa.nulls(rows, ValueType.TIMESTAMP.arrow)
        )
    return pa.table(taken)


def _given(view: PlainView, columns: Columns, physical: str, also: str) -> str | None:
    """The name under which columns carry a column of the source, or None."""
    mapped = view.source.field_mapping.get(physical, physical)
    return next((name for name in (physical, mapped, also) if name in columns), None)


def array_of(name: str, values: Sequence[Any], wanted: ValueType) -> pa.Array:
    """JSON values as a declared type; raises RequestError that names the column and the row."""
    read = _reader(wanted.element)
    try:
        if wanted.is_list:
            values = [None if v is None else [read(name, row, x) for x in _list(v)] for row, v in enumerate(values)]
        else:
            values = [read(name, row, v) for row, v in enumerate(values)]
        if wanted is ValueType.TIMESTAMP:
            return arrow_timestamps(pa.array(values, pa.int64()))
        return pa.array(values, wanted.arrow)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError) as cause:
        raise RequestError(name, f"does not read as {wanted.feast_name}") from cause


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _reader(wanted: ValueType) -> Callable[[str, int, Any], Any]:
    """What reads one JSON value of a scalar type."""
    if wanted is ValueType.TIMESTAMP:
        return micros_of
    if wanted is ValueType.BYTES:
        return bytes_of
    return _float_of if wanted.is_float else _integer_of if wanted.is_integer else lambda name, row, value: value


def micros_of(name: str, row: int, value: Any) -> int | None:
    """A time in microseconds of ISO 8601 text, or of whole seconds since the epoch. Raises RequestError."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST_SECONDS:
        return value * SECOND
    return micros_of_text(name, row, value)


def micros_of_text(name: str, row: int, value: Any) -> int | None:
    """A time in microseconds of ISO 8601 text. Raises RequestError."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            return parse_time(value)
    except (ValueError, OverflowError) as cause:
        raise _no_time(name, row) from cause
    raise _no_time(name, row)


def _no_time(name: str, row: int) -> RequestError:
    return RequestError(name, f"is no time in row {row}; write it as ISO 8601 text such as 2018-08-01T12:00:00Z")


def bytes_of(name: str, row: int, value: Any) -> bytes | None:
    """Bytes of base64 text. Raises RequestError."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RequestError(name, f"is no base64 text in row {row}") from cause
    raise RequestError(name, f"is no base64 text in row {row}")


def _float_of(name: str, row: int, value: Any) -> Any:
    if isinstance(value, bool):
        raise RequestError(name, f"is a boolean in row {row}, not a number")
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _integer_of(name: str, row: int, value: Any) -> Any:
    if isinstance(value, float) and not value.is_integer():
        raise RequestError(name, f"is a fraction in row {row}, not an integer")
    return value
