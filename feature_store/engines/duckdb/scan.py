"""SQL that reads a source: typed keys, times as microseconds, and the columns a view needs."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import StoredView
from feature_store.errors import SourceError
from feature_store.stores.offline.parquet import ParquetFiles, open_source

TIME, CREATED = "__time", "__created"

_SQL_TYPES = {
    ValueType.BOOL: "BOOLEAN",
    ValueType.INT32: "INTEGER",
    ValueType.INT64: "BIGINT",
    ValueType.FLOAT32: "FLOAT",
    ValueType.FLOAT64: "DOUBLE",
    ValueType.STRING: "VARCHAR",
    ValueType.BYTES: "BLOB",
}


@dataclass(frozen=True)
class Scan:
    """A SELECT over a source's files: `admitted` keeps rows with all keys and a time, `rejected` counts the rest."""

    admitted: str
    rejected: str


def scan(view: StoredView, columns: Mapping[str, ValueType], root: Path) -> Scan:
    """The scan of a view's source for these columns (mapped names and the types to read them as).

    Keys keep their names; the event time (delay added) is `__time` and the created time `__created`, both in
    microseconds. Raises SourceError for a missing file or column, or a type that cannot be read as declared.
    """
    files = open_source(view.source, root)
    needed_by = f"view '{view.name}'"
    keys = {key.name: _typed(files, key.name, key.type, needed_by) for key in view.keys}
    time = _micros(files, view.source.timestamp_field, needed_by)
    created = _micros(files, view.source.created_field, needed_by) if view.source.created_field else "NULL::BIGINT"
    selected = [
        *(f"{sql} AS {quote(name)}" for name, sql in keys.items()),
        f"{time} + {view.source.delay} AS {TIME}",
        f"{created} AS {CREATED}",
        *(f"{_value(files, name, t, needed_by)} AS {quote(name)}" for name, t in columns.items() if name not in keys),
    ]
    present = " AND ".join(f"{sql} IS NOT NULL" for sql in (*keys.values(), time))
    table = _table(files)
    return Scan(
        admitted=f"SELECT {', '.join(selected)} FROM {table} WHERE {present}",
        rejected=f"SELECT count(*) FROM {table} WHERE NOT ({present})",
    )


def _table(files: ParquetFiles) -> str:
    """The files as a table whose columns are named by their place: SQL would not tell names apart by case alone.

    A file's path is taken as it is, also where it holds the characters of a pattern.
    """
    paths = ", ".join(literal(glob.escape(file)) for file in files.files)
    names = ", ".join(_place(files, name) for name in files.schemas[0].names)
    return f"read_parquet([{paths}], union_by_name = true, hive_partitioning = false) AS file({names})"


def _place(files: ParquetFiles, physical: str) -> str:
    return f"c{files.schemas[0].names.index(physical)}"


def _value(files: ParquetFiles, name: str, wanted: ValueType, needed_by: str) -> str:
    """A column as wanted; a column wanted as BOOL that is not one is only asked whether it has a value."""
    field = files.column(name, needed_by)
    found = of_arrow(field.type)
    if wanted is ValueType.BOOL and found is not ValueType.BOOL:
        column = _place(files, field.name)
        present = f"{column} IS NOT NULL"
        if found and found.is_float:
            present += f" AND isfinite({column})"
        return f"CASE WHEN {present} THEN TRUE END"
    return _typed(files, name, wanted, needed_by)


def _typed(files: ParquetFiles, name: str, wanted: ValueType, needed_by: str) -> str:
    field = files.column(name, needed_by)
    found = of_arrow(field.type)
    if not readable(found, wanted):
        raise SourceError(
            f"{needed_by}: column '{field.name}' of source '{files.source.name}' ({files.source.path}) is "
            f"{field.type}, but is declared as {wanted.feast_name}. Correct the declaration, or the file."
        )
    if wanted.element is ValueType.TIMESTAMP:
        place = _place(files, field.name)
        return place if wanted.is_list else _time_sql(place, field.type)
    sql_type = _SQL_TYPES[wanted.element] + ("[]" if wanted.is_list else "")
    return f"CAST({_place(files, field.name)} AS {sql_type})"


def readable(found: ValueType | None, wanted: ValueType) -> bool:
    """Whether a physical type can be read as a declared one without losing anything but float precision."""
    if found is None or found.is_list != wanted.is_list:
        return False
    have, want = found.element, wanted.element
    if have is want:
        return True
    if want.is_float:
        return have.is_numeric
    return have.is_integer and want.is_integer


def _micros(files: ParquetFiles, column: str, needed_by: str) -> str:
    field = files.physical_column(column, needed_by)
    if of_arrow(field.type) is not ValueType.TIMESTAMP:
        raise SourceError(
            f"{needed_by}: time column '{field.name}' of source '{files.source.name}' ({files.source.path}) is "
            f"{field.type}, not a timestamp. Write it as a timestamp."
        )
    return _time_sql(_place(files, field.name), field.type)


def _time_sql(name: str, arrow_type: pa.DataType) -> str:
    """A time column as microseconds; DuckDB's // truncates, so nanoseconds are floored by hand (dates before 1970)."""
    if pa.types.is_timestamp(arrow_type) and arrow_type.unit == "ns":
        nanos = f"epoch_ns({name})"
        return f"(({nanos} - ((({nanos} % 1000) + 1000) % 1000)) // 1000)"
    return f"epoch_us({name})" if pa.types.is_timestamp(arrow_type) else f"epoch_us(CAST({name} AS TIMESTAMP))"


def quote(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
