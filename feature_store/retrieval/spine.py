"""The rows that ask for features, in any shape a person holds them, as one Arrow table and typed keys."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import PlainView
from feature_store.engines.engine import Spine
from feature_store.errors import SpineError
from feature_store.timestamps import DAY, arrow_micros, iso, micros, parse_time

EVENT_TIMESTAMP = "event_timestamp"

#: How far back a retrieval without spine and start goes where no view has a ttl: Feast's own default.
_RANGE_WITHOUT_TTL = 30 * DAY


#: A query, after comments: SELECT, WITH or FROM and a space. (`with_labels.parquet` is a file.)
_SQL = re.compile(r"(\s|--[^\n]*\n|/\*.*?\*/)*(select|with|from)[\s(]", re.IGNORECASE | re.DOTALL)


#: A time as people write one: aware or naive (UTC), a day (its midnight), or ISO 8601 text.
Moment = dt.datetime | dt.date | str


@dataclass(frozen=True)
class TimeRange:
    """Asks for all rows with start <= event time <= end (microseconds) in place of a spine."""

    start: int
    end: int


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
    (a text that starts with SELECT or WITH). Raises SpineError for anything else.
    """
    if isinstance(entity_df, pa.Table):
        return entity_df
    if isinstance(entity_df, str) and _SQL.match(entity_df) and not entity_df.endswith(".parquet"):
        return _read_sql(entity_df)
    if isinstance(entity_df, str | Path):
        return _read_files(str(entity_df))
    if type(entity_df).__module__.startswith("polars"):
        frame = entity_df.collect() if type(entity_df).__name__ == "LazyFrame" else entity_df
        return frame.to_arrow()
    if type(entity_df).__module__.startswith("pandas"):
        try:
            return pa.Table.from_pandas(entity_df, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise SpineError(
                f"the spine's columns must each have a name of their own and hold one type: {error}"
            ) from error
    raise SpineError(
        f"a spine cannot be a {type(entity_df).__name__}; give a pandas or Polars frame, an Arrow table, "
        "the path of a Parquet file, or SQL."
    )


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
            what = "no file" if " " not in text else "neither a file nor SQL that begins with SELECT, WITH or FROM"
            raise SpineError(f"the spine {text} is {what}.")
        return pq.read_table(text)
    except (OSError, pa.ArrowInvalid, duckdb.Error) as error:
        raise SpineError(f"the spine {text} cannot be read as Parquet: {error}") from error


def check_spine(schema: pa.Schema, request: Request, inputs: bool = False) -> None:
    """Raises SpineError where a spine of this schema lacks a column, holds the time as something else, has two columns
    of one name, or one of a feature's name.
    """
    if doubled := sorted({n for n in schema.names if schema.names.count(n) > 1}):
        raise SpineError(f"the spine has two columns named '{doubled[0]}'; rename one.")
    _check_columns(schema, request.keys)
    if taken := [name for _, name in request.output_columns(inputs) if name in schema.names]:
        raise SpineError(
            f"the spine already has a column '{taken[0]}', the name of a requested feature; rename it, or ask for full "
            "feature names."
        )


def _check_columns(schema: pa.Schema, keys: Mapping[str, ValueType]) -> None:
    if missing := [c for c in (*keys, EVENT_TIMESTAMP) if c not in schema.names]:
        raise SpineError(
            f"the spine has no column '{missing[0]}'; it has: {', '.join(schema.names)}. "
            f"It needs {', '.join([EVENT_TIMESTAMP, *keys])}."
        )
    time = schema.field(EVENT_TIMESTAMP).type
    if of_arrow(time) is not ValueType.TIMESTAMP:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is {time}, not a timestamp; convert it first.")


def spine_of(table: pa.Table, keys: Mapping[str, ValueType]) -> Spine:
    """The times and typed entity columns of a spine table.

    Raises SpineError for a missing column, a time column that is no timestamp or has nulls, or a key that does not
    read as its declared type.
    """
    _check_columns(table.schema, keys)
    time = table[EVENT_TIMESTAMP]
    if pa.types.is_date(time.type):
        time = time.cast(pa.timestamp("us"))
    if time.null_count:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is null in {time.null_count} rows; every row needs a time.")
    return Spine(
        times=np.asarray(arrow_micros(time)),
        keys={name: typed(table[name], key_type, f"key '{name}' of the spine") for name, key_type in keys.items()},
    )
