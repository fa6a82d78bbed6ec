"""The rows that ask for features, in any shape a person holds them, as one Arrow table and typed keys."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView
from feature_store.engines.engine import Spine
from feature_store.engines.spine import (
    TimeRange,
    check_columns,
    check_timed,
    is_query,
    no_files,
    table_of,
    times_of,
    unreadable,
)
from feature_store.errors import SpineError
from feature_store.timestamps import DAY, iso, micros, parse_time

#: How far back a retrieval without spine and start goes where no view has a ttl: Feast's own default.
_RANGE_WITHOUT_TTL = 30 * DAY


#: A time as people write one: aware or naive (UTC), a day (its midnight), or ISO 8601 text.
Moment = dt.datetime | dt.date | str


def time_range(request: Request, start: Moment | None, end: Moment | None, now: int) -> TimeRange:
    """The range that Feast's rules give: to `now` unless told, from the longest ttl before the end, or 30 days.

    Raises SpineError where the start is after the end, or one is no time.
    """
    last = now if end is None else _bound(end)
    longest = max((view.ttl for view, _ in request.by_view() if isinstance(view, PlainView)), default=0)
    first = last - (longest or _RANGE_WITHOUT_TTL) if start is None else _bound(start)
    if first > last:
        raise SpineError(f"start_date {iso(first)} is after end_date {iso(last)}.")
    return TimeRange(first, last)


def _bound(time: Moment) -> int:
    if isinstance(time, str):
        try:
            return parse_time(time)
        except ValueError as error:
            raise SpineError(f"'{time}' is no time; write it like 2018-08-01T12:00:00Z.") from error
    if isinstance(time, dt.datetime):
        return micros(time)
    return micros(dt.datetime(time.year, time.month, time.day, tzinfo=dt.UTC))


def read_spine(entity_df: Any) -> pa.Table:
    """A spine as an Arrow table, every column as it was.

    `entity_df` is a pandas or Polars frame, an Arrow table, the path of a Parquet file (or a glob), or SQL for DuckDB
    (a text that begins with SELECT, WITH or FROM). Raises SpineError for anything else.
    """
    if is_query(entity_df):
        return _read_sql(entity_df)
    if isinstance(entity_df, str | Path):
        return _read_files(str(entity_df))
    return table_of(entity_df)


def _read_sql(query: str) -> pa.Table:
    with duckdb.connect() as connection:
        try:
            return connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise SpineError(f"the spine's SQL failed: {error}") from error


def _read_files(text: str) -> pa.Table:
    try:
        if any(c in text for c in "*?[") and not Path(text).is_file():
            with duckdb.connect() as connection:
                return connection.read_parquet(text).to_arrow_table()
        if not Path(text).exists():
            raise no_files(text)
        return pq.read_table(text)
    except (OSError, pa.ArrowInvalid, duckdb.Error) as error:
        raise unreadable(text, error) from error


def spine_of(table: pa.Table, keys: Mapping[str, ValueType]) -> Spine:
    """The times and typed entity columns of a spine table.

    Raises SpineError for a missing column, a time column that is no timestamp or has nulls, or a key that does not
    read as its declared type.
    """
    check_columns(table.schema, keys)
    times = times_of(table)
    check_timed(times.null_count)
    return Spine(
        times=np.asarray(times),
        keys={name: typed(table[name], key_type, f"key '{name}' of the spine") for name, key_type in keys.items()},
    )
