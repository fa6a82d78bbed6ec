"""The rows that ask for features, in any shape a person holds them, as one Arrow table and typed keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.engines.engine import Spine
from feature_store.errors import SpineError
from feature_store.timestamps import arrow_micros

EVENT_TIMESTAMP = "event_timestamp"


def read_spine(entity_df: Any) -> pa.Table:
    """A spine as an Arrow table, every column as it was.

    `entity_df` is a pandas or Polars frame, an Arrow table, the path of a Parquet file (or a glob), or SQL for DuckDB
    (a text that starts with SELECT or WITH). Raises SpineError for anything else.
    """
    if isinstance(entity_df, pa.Table):
        return entity_df
    if isinstance(entity_df, str | Path):
        return _read_text(str(entity_df))
    if type(entity_df).__module__.startswith("polars"):
        return entity_df.to_arrow()
    if type(entity_df).__module__.startswith("pandas"):
        try:
            return pa.Table.from_pandas(entity_df, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SpineError(f"the spine's columns must each hold one type: {error}") from error
    raise SpineError(
        f"a spine cannot be a {type(entity_df).__name__}; give a pandas or Polars frame, an Arrow table, "
        "the path of a Parquet file, or SQL."
    )


def _read_text(text: str) -> pa.Table:
    if text.lstrip()[:6].upper().startswith(("SELECT", "WITH")):
        with duckdb.connect() as connection:
            try:
                return connection.sql(text).to_arrow_table()
            except duckdb.Error as error:
                raise SpineError(f"the spine's SQL failed: {error}") from error
    try:
        if any(c in text for c in "*?["):
            with duckdb.connect() as connection:
                return connection.read_parquet(text).to_arrow_table()
        return pq.read_table(text)
    except (OSError, pa.ArrowInvalid, duckdb.Error) as error:
        raise SpineError(f"the spine {text} cannot be read as Parquet: {error}") from error


def spine_of(table: pa.Table, keys: Mapping[str, ValueType]) -> Spine:
    """The times and typed entity columns of a spine table.

    Raises SpineError for a missing column, a time column that is no timestamp or has nulls, or a key that does not
    read as its declared type.
    """
    if missing := [c for c in (*keys, EVENT_TIMESTAMP) if c not in table.column_names]:
        raise SpineError(
            f"the spine has no column '{missing[0]}'; it has: {', '.join(table.column_names)}. "
            f"It needs {EVENT_TIMESTAMP} and: {', '.join(keys)}."
        )
    time = table[EVENT_TIMESTAMP]
    if of_arrow(time.type) is not ValueType.TIMESTAMP:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is {time.type}, not a timestamp; convert it first.")
    if pa.types.is_date(time.type):
        time = time.cast(pa.timestamp("us"))
    if time.null_count:
        raise SpineError(f"the spine's {EVENT_TIMESTAMP} is null in {time.null_count} rows; every row needs a time.")
    return Spine(
        times=np.asarray(arrow_micros(time)),
        keys={name: typed(table[name], key_type, f"key '{name}' of the spine") for name, key_type in keys.items()},
    )
