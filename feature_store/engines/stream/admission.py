"""Admission: from raw rows, as a source has them, to events. A pure function of the rows and their append time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.aggregations.events import Column, Events
from feature_store.definitions.columns import typed
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.errors import ColumnError, RequestError
from feature_store.stores.online.rows import CREATED, TIME, Row
from feature_store.timestamps import BEGINNING, END, HOUR, arrow_micros, iso, micros

#: How far ahead of its append time an event may be dated.
MOST_AHEAD = HOUR


@dataclass(frozen=True)
class Admitted:
    """Rows as events of one view, in their order: join keys by name, and one event a row."""

    keys: pa.Table
    events: Events


def admit(view: WindowedView, rows: pa.Table, appended_at: int) -> Admitted:
    """The events of a view in raw rows, whose columns have the source's names, mapped or as in its file.

    Raises RequestError that names the column and the first row when a row has no key or no event time, a value of the
    wrong type, or an event time more than an hour ahead of `appended_at`. Either all rows are admitted or none.
    """
    keys = {key.name: _present(_column(view, rows, key.name, key.type), key.name) for key in view.keys}
    times = np.asarray(_present(_micros(view, rows, view.source.timestamp_field), view.source.timestamp_field))
    if len(times) and int(times.max()) > END - view.source.delay:
        raise RequestError(view.source.timestamp_field, "holds a time beyond the calendar")
    times = times + view.source.delay
    if late := np.flatnonzero(times > appended_at + MOST_AHEAD).tolist():
        raise RequestError(
            view.source.timestamp_field,
            f"of row {late[0]} gives event time {iso(times[late[0]])}, more than an hour ahead of {iso(appended_at)}",
        )
    created = (
        pc.fill_null(_micros(view, rows, view.source.created_field), BEGINNING)
        if view.source.created_field
        else np.full(rows.num_rows, BEGINNING, np.int64)
    )
    types = view.column_types()
    return Admitted(
        pa.table(keys) if keys else pa.table({"__rows": np.zeros(rows.num_rows)}),
        Events(
            np.arange(rows.num_rows + 1),
            times,
            np.asarray(created),
            {name: _folded(view, rows, name, types.get(name)) for name in view.columns},
        ),
    )


def admit_table(view: PlainView, rows: pa.Table) -> pa.Table:
    """The rows of a plain view as the online store takes them (keys, `__time`, `__created`, features), from raw rows
    whose columns have the source's names, mapped or as in its file. Raises RequestError as `admit` does.
    """
    columns = {key.name: _present(_column(view, rows, key.name, key.type), key.name) for key in view.keys}
    source = view.source
    columns[TIME] = _present(_micros(view, rows, source.timestamp_field), source.timestamp_field)
    created = _micros(view, rows, source.created_field) if source.created_field else pa.nulls(rows.num_rows, pa.int64())
    columns[CREATED] = created
    columns |= {f.name: _column(view, rows, f.name, f.type) for f in view.features}
    return pa.table(columns)


def admit_rows(view: PlainView, rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple], list[Row]]:
    """The same from a few rows given by name: the key values of each, and the row. Times are datetimes or microseconds.

    Raises RequestError for a row that lacks a column or a key; values are the store's to read or refuse.
    """
    keys = [key.name for key in view.keys]
    features = [f.name for f in view.features]
    time, created = view.source.timestamp_field, view.source.created_field
    time = view.source.field_mapping.get(time, time)
    try:
        entities = [tuple([row[name] for name in keys]) for row in rows]
        admitted = [
            Row(
                _moment(time, row[time]),
                BEGINNING if created is None or row[created] is None else _moment(created, row[created]),
                tuple([row[name] for name in features]),
            )
            for row in rows
        ]
    except KeyError as error:
        raise RequestError(str(error.args[0]), f"is missing; view '{view.name}' needs it in every row") from error
    if any(None in entity for entity in entities):
        raise RequestError(keys[0], "or another key is null; every row needs its keys")
    return entities, admitted


def _moment(name: str, value: Any) -> int:
    if isinstance(value, dt.datetime):
        return micros(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RequestError(name, f"is a {type(value).__name__}, not a time")


def _physical(view: StoredView, rows: pa.Table, physical: str) -> pa.ChunkedArray:
    """A column by its name in the source's files; the rows may give it that name or the mapped one."""
    mapped = view.source.field_mapping.get(physical, physical)
    if mapped == physical and (place := rows.schema.get_field_index(physical)) >= 0:
        return rows.column(place)
    given = [name for name in dict.fromkeys((physical, mapped)) if rows.schema.get_field_index(name) >= 0]
    if len(given) == 2:
        raise RequestError(physical, f"is given twice, also as '{mapped}'; send one of them")
    if given:
        return rows[given[0]]
    raise RequestError(physical, f"is missing; view '{view.name}' needs it; there are: {', '.join(rows.column_names)}")


def _column(view: StoredView, rows: pa.Table, name: str, wanted: ValueType) -> pa.Array:
    column = _physical(view, rows, view.source.physical(name) if view.source.field_mapping else name)
    try:
        return typed(column, wanted, f"column '{name}'")
    except ColumnError as error:
        raise RequestError(name, f"is refused: {str(error).rstrip('.')}") from error


def _folded(view: WindowedView, rows: pa.Table, name: str, wanted: ValueType | None) -> Column:
    """A column as the view folds it; with no type wanted, as the rows have it."""
    read_as = wanted or _own_type(view, rows, name)
    return Column.of(_counted(view, rows, name, read_as), read_as)


def _own_type(view: WindowedView, rows: pa.Table, name: str) -> ValueType:
    column_type = _physical(view, rows, view.source.physical(name)).type
    if pa.types.is_null(column_type):
        return ValueType.BOOL
    found = of_arrow(column_type)
    if found is None:
        raise RequestError(name, f"is {column_type}, which has no equal as a feature")
    if unfit := view.unfit(name, found):
        raise RequestError(name, f"is {column_type}, on which {unfit.function.kind} is not defined")
    return found.widened


def _counted(view: WindowedView, rows: pa.Table, name: str, wanted: ValueType) -> pa.Array:
    """A column as the view folds it; one that is only counted may have any type, for only its presence counts."""
    column = _physical(view, rows, view.source.physical(name)).combine_chunks()
    found = of_arrow(column.type)
    if wanted is ValueType.BOOL and found is not ValueType.BOOL:
        present = column.is_valid()
        if found and found.is_float:
            present = pc.and_(present, pc.fill_null(pc.is_finite(column), False))
        return pc.if_else(present, True, pa.scalar(None, pa.bool_()))
    return _column(view, rows, name, wanted)


def _micros(view: StoredView, rows: pa.Table, name: str) -> pa.Array:
    column = _physical(view, rows, name)
    if of_arrow(column.type) is not ValueType.TIMESTAMP:
        raise RequestError(name, f"is {column.type}, not a timestamp")
    return pa.array(arrow_micros(column))


def _present(array: pa.Array, name: str) -> pa.Array:
    if array.null_count:
        first = np.flatnonzero(np.asarray(array.is_null())).tolist()[0]
        raise RequestError(name, f"is null in row {first}; every event needs its keys and its time")
    return array
