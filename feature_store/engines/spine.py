"""What a spine must be, whichever engine reads it: its shapes, its columns, its times."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.errors import SpineError
from feature_store.timestamps import arrow_micros

EVENT_TIMESTAMP = "event_timestamp"

#: A query, after comments: SELECT, WITH or FROM and a space. (`with_labels.parquet` is a file.)
_SQL = re.compile(r"(\s|--[^\n]*\n|/\*.*?\*/)*(select|with|from)[\s(]", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class TimeRange:
    """Asks for all rows with start <= event time <= end (microseconds) in place of a spine."""

    start: int
    end: int


def is_query(entity_df: Any) -> bool:
    """Whether a spine is an SQL text; any other text, and every Path, is one of files."""
    return isinstance(entity_df, str) and bool(_SQL.match(entity_df)) and not entity_df.endswith(".parquet")


def table_of(entity_df: Any) -> pa.Table:
    """A pandas or Polars frame or an Arrow table as an Arrow table, every column as it was.

    Raises SpineError for anything else, and for a pandas frame whose columns Arrow cannot hold.
    """
    if isinstance(entity_df, pa.Table):
        return entity_df
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


def no_files(text: str) -> SpineError:
    """The error of a text that is no query, and of no file either."""
    what = "no file" if " " not in text else "neither a file nor SQL that begins with SELECT, WITH or FROM"
    return SpineError(f"the spine {text} is {what}.")


def unreadable(text: str, error: Exception) -> SpineError:
    """The error of a spine's files that something is wrong with."""
    return SpineError(f"the spine {text} cannot be read as Parquet: {error}")


def check_spine(schema: pa.Schema, request: Request, inputs: bool = False) -> None:
    """Raises SpineError where a spine of this schema lacks a column, holds the time as something else, has two columns
    of one name, or one of a feature's name (with `inputs`, also of a feature that only on-demand views asked for).
    """
    if doubled := sorted({n for n in schema.names if schema.names.count(n) > 1}):
        raise SpineError(f"the spine has two columns named '{doubled[0]}'; rename one.")
    check_columns(schema, request.keys)
    for _, name in request.output_columns(inputs):
        check_free(name, schema)


def check_columns(schema: pa.Schema, keys: Iterable[str]) -> None:
    """Raises SpineError where a spine of this schema lacks its time or a key, or holds the time as something else."""
    if missing := [c for c in (*keys, EVENT_TIMESTAMP) if c not in schema.names]:
        raise SpineError(
            f"the spine has no column '{missing[0]}'; it has: {', '.join(schema.names)}. "
            f"It needs {', '.join([EVENT_TIMESTAMP, *keys])}."
        )
    time = schema.field(EVENT_TIMESTAMP).type
    if of_arrow(time) is not ValueType.TIMESTAMP:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is {time}, not a timestamp; convert it first.")


def check_free(name: str, schema: pa.Schema) -> None:
    """Raises SpineError where a spine of this schema has a column with a requested feature's name."""
    if name in schema.names:
        raise SpineError(
            f"the spine already has a column '{name}', the name of a requested feature; rename it, or ask for full "
            "feature names."
        )


def times_of(rows: pa.Table) -> pa.Array:
    """The times of a spine's rows in microseconds; a missing one stays null."""
    time = rows[EVENT_TIMESTAMP]
    return arrow_micros(time.cast(pa.timestamp("us")) if pa.types.is_date(time.type) else time)


def check_timed(missing: int) -> None:
    """Raises SpineError where rows of a spine have no time."""
    if missing:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is null in {missing} rows; every row needs a time.")
