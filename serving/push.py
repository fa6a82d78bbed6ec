"""Pushed rows: from JSON columns to the events of a push source."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from feature_store.definitions.repository import Definitions
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.errors import RequestError
from feature_store.layer import FeatureLayer
from feature_store.stores.online.appending import Appended
from feature_store.timestamps import arrow_timestamps, parse_time
from serving.schemas import PushRequest


def push(layer: FeatureLayer, request: PushRequest) -> dict[str, Appended]:
    """Appends a request's rows to every online view on its source, all or none; what was done, by view.

    Raises RequestError for what cannot be taken (another store than the online one, columns of unequal length or of
    mixed types, a time that is no time, and all that FeatureLayer.append_events refuses); UnknownName; PositionGap;
    StoreNotReady.
    """
    if request.to != "online":
        raise RequestError("to", "must be 'online': only the online store is carried yet, the archive is filled apart")
    rows = table_of(request.df, time_columns(layer.definitions, request.push_source_name))
    return layer.append_events(request.push_source_name, rows, request.partition, request.offset)


def time_columns(definitions: Definitions, push_source: str) -> set[str]:
    """The columns that the views on a push source read as times, by every name that a row may give them."""
    views = [v for v in definitions.stored_views() if isinstance(v, WindowedView)]
    return {name for v in views if v.source.push_source == push_source for name in _time_columns(v)}


def _time_columns(view: WindowedView) -> set[str]:
    source = view.source
    types = {key.name: key.type for key in view.keys} | view.column_types()
    named = {name for name, value_type in types.items() if value_type is ValueType.TIMESTAMP}
    physical = {source.physical(name) for name in named} | {source.timestamp_field}
    if source.created_field:
        physical.add(source.created_field)
    return physical | {source.field_mapping.get(name, name) for name in physical}


def table_of(columns: dict[str, list[Any]], times: set[str]) -> pa.Table:
    """JSON columns as an Arrow table; those named in `times` hold ISO 8601 text or null and become timestamps.

    Raises RequestError that names the column.
    """
    if not columns:
        raise RequestError("df", "has no columns")
    rows = len(next(iter(columns.values())))
    for name, values in columns.items():
        if len(values) != rows:
            raise RequestError(name, f"has {len(values)} values where the first column has {rows}")
    return pa.table({name: _timestamps(name, v) if name in times else _plain(name, v) for name, v in columns.items()})


def _timestamps(name: str, values: list[Any]) -> pa.Array:
    return arrow_timestamps(pa.array([_micros(name, row, value) for row, value in enumerate(values)], pa.int64()))


def _micros(name: str, row: int, value: Any) -> int | None:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            return parse_time(value)
    except ValueError as cause:
        raise _no_time(name, row) from cause
    raise _no_time(name, row)


def _no_time(name: str, row: int) -> RequestError:
    return RequestError(name, f"is no time in row {row}; write it as ISO 8601 text such as 2018-08-01T12:00:00Z")


def _plain(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as cause:
        raise RequestError(name, "holds values of different types, or an integer beyond 64 bits") from cause
