"""SQL that reads a source: typed keys, times as microseconds, and the columns a view needs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import pyarrow as pa

from feature_store.definitions.erasure import NO_ERASURES, UNTIL, Erased, Erasures
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import StoredView
from feature_store.stores.offline.columns import check_readable, time_field, type_read
from feature_store.stores.offline.parquet import ParquetFiles, open_source
from feature_store.timestamps import SECOND, moment, parse_time

TIME, CREATED, ROW = "__time", "__created", "__row"

#: What the engine calls further columns beside a scan's.
OWN_NAMES = ("__entity", "__order", "__only", "tie")

#: What tables of erased entities are called, before their number.
_ERASED = "__erased_"

#: A row's place is its file's place times this, plus its place in the file.
ROWS_A_FILE = 1 << 40
_FILE = "CAST(file_index AS BIGINT)"

#: Times that can be written as a literal: in Python's calendar, and in 64 bits of nanoseconds.
_DATED = parse_time("0001-01-02T00:00:00Z"), parse_time("9999-12-30T00:00:00Z")
_DATED_NS = parse_time("1678-01-01T00:00:00Z"), parse_time("2262-01-01T00:00:00Z")

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
    """A SELECT over a source's files: `admitted` keeps rows with all keys and a time, `rejected` counts the rest.

    `names` says what each key and column is called in `admitted`: SQL does not tell names apart that differ in case
    alone, and the engine's own are taken.
    `files` are those that may hold the asked time range, `columns` what is read of them (physical names), `rows` an
    upper bound of the rows. No event time lies before `first` or after `last`, where the files tell (else None).
    `erased` are tables that `admitted` names: whoever runs it makes them first.
    """

    admitted: str
    rejected: str
    names: dict[str, str]
    files: ParquetFiles
    columns: tuple[str, ...]
    rows: int
    first: int | None
    last: int | None
    erased: Mapping[str, pa.Table]


def scan(
    view: StoredView,
    columns: Mapping[str, ValueType | None],
    root: Path,
    start: int | None = None,
    end: int | None = None,
    erasures: Erasures = NO_ERASURES,
) -> Scan:
    """The scan of a view's source for these columns: mapped names and the types to read them as (None: as it is).

    The event time (delay added) is `__time` and the created time `__created`, both in
    microseconds; `__row` is the row's place in the source. With `start` and `end` only rows with
    start <= event time <= end: files and row groups outside are not read. Records of erased entities are left
    out.
    Raises SourceError for a missing file or column, or a type that cannot be read as declared.
    """
    everything = open_source(view.source, root)
    needed_by = f"view '{view.name}'"
    source = view.source
    # Every file answers for its columns before any is left out: a broken one is named whatever is asked.
    time = time_field(everything, source.timestamp_field, needed_by)
    fields = {name: everything.column(name, needed_by) for name in (*(k.name for k in view.keys), *columns)}
    types = {name: type_read(view, name, fields[name], wanted) for name, wanted in columns.items()}
    low, high = (None if bound is None else bound - source.delay for bound in (start, end))
    created = time_field(everything, source.created_field, needed_by) if source.created_field else None
    times = [time.name, *([created.name] if created else [])]
    files = everything.between(time.name, low, high)
    parts, opened = [], 0
    for group in files.alike([*times, *(f.name for f in fields.values())]):
        parts.append(_Part(view, types, group, opened, low, high))
        opened += len(group.files)
    rejected = " UNION ALL ".join(part.rejected for part in parts)
    first, last = files.bounds(time.name)
    names = _apart([*(k.name for k in view.keys), *columns])
    erased = erasures.of(view.keys)
    return Scan(
        admitted=_without(erased, " UNION ALL ".join(part.admitted for part in parts), names, source.delay),
        rejected=f"SELECT sum(rows)::BIGINT FROM ({rejected})",
        names=names,
        files=files,
        columns=tuple(dict.fromkeys([*times, *(f.name for f in fields.values())])),
        rows=files.rows_between(time.name, low, high),
        first=_within_both(first, low, max, source.delay),
        last=_within_both(last, high, min, source.delay),
        erased={f"{_ERASED}{number}": one.table for number, one in enumerate(erased)},
    )


def _without(erased: Sequence[Erased], admitted: str, names: Mapping[str, str], delay: int) -> str:
    """Rows without those of erased entities that were known by their erasure: see definitions/erasure.py."""
    for number, one in enumerate(erased):
        gone = f"{_ERASED}{number}"
        same = " AND ".join(f"__record.{quote(names[key.name])} = {gone}.{quote(key.name)}" for key in one.keys)
        known = f"coalesce(__record.{CREATED}, __record.{TIME} - {delay})"
        admitted = f"SELECT * FROM ({admitted}) __record ANTI JOIN {gone} ON {same} AND {known} <= {gone}.{UNTIL}"
    return admitted


def _within_both(bound: int | None, asked: int | None, tighter: Callable[[int, int], int], delay: int) -> int | None:
    if bound is None or asked is None:
        bound = asked if bound is None else bound
        return None if bound is None else bound + delay
    return tighter(bound, asked) + delay


class _Part:
    """The scan of files with the same columns, whose times are of one type: naive ones and zoned ones do not mix in one
    column of SQL, and a column that only some files have could take the name of one of DuckDB's own.

    `opened` files come before them in the scan.
    """

    def __init__(
        self,
        view: StoredView,
        columns: Mapping[str, ValueType],
        files: ParquetFiles,
        opened: int,
        low: int | None,
        high: int | None,
    ) -> None:
        source, needed_by = view.source, f"view '{view.name}'"
        names = _apart([*(k.name for k in view.keys), *columns])
        keys = {key.name: _typed(files, files.column(key.name, needed_by), key.type, needed_by) for key in view.keys}
        happened = time_field(files, source.timestamp_field, needed_by)
        time = _time_sql(_place(files, happened.name), happened.type)
        created = "NULL::BIGINT"
        if source.created_field:
            created_field = time_field(files, source.created_field, needed_by)
            created = _time_sql(_place(files, created_field.name), created_field.type)
        values = {
            name: _value(files, files.column(name, needed_by), wanted, needed_by)
            for name, wanted in columns.items()
            if name not in keys
        }
        selected = [
            *(f"{sql} AS {quote(names[name])}" for name, sql in keys.items()),
            f"{time} + {source.delay} AS {TIME}",
            f"{created} AS {CREATED}",
            f"(({_FILE} + {opened}) * {ROWS_A_FILE} + file_row_number) AS {ROW}",
            *(f"{sql} AS {quote(names[name])}" for name, sql in values.items()),
        ]
        present = " AND ".join(f"{sql} IS NOT NULL" for sql in (*keys.values(), time))
        within = _within(files, happened, low, high)
        table = _table(files)
        self.admitted = f"SELECT {', '.join(selected)} FROM {table} WHERE {' AND '.join([present, *within])}"
        self.rejected = f"SELECT count(*) AS rows FROM {table} WHERE NOT ({present})"


def _apart(names: Iterable[str]) -> dict[str, str]:
    """A name for each name that no other and nothing of the engine's has, whatever the case."""
    given: dict[str, str] = {}
    taken = {TIME, CREATED, ROW, *OWN_NAMES}
    for name in dict.fromkeys(names):
        free = name
        while free.lower() in taken:
            free += "_"
        given[name] = free
        taken.add(free.lower())
    return given


def _within(files: ParquetFiles, time: pa.Field, low: int | None, high: int | None) -> list[str]:
    """Conditions on the time: one on the column itself, which DuckDB prunes row groups by, and the exact one."""
    place = _place(files, time.name)
    micros_sql = _time_sql(place, time.type)
    exact = [f"{micros_sql} >= {low}"] if low is not None else []
    exact += [f"{micros_sql} <= {high}"] if high is not None else []
    coarse = []
    if pa.types.is_timestamp(time.type):
        # A second of room each way: units are floored, and pruning needs no precision.
        coarse += [f"{place} >= {_literal_time(low - SECOND, time.type)}"] if _writable(low, time.type) else []
        coarse += [f"{place} <= {_literal_time(high + SECOND, time.type)}"] if _writable(high, time.type) else []
    return coarse + exact


def _writable(bound: int | None, arrow_type: pa.DataType) -> TypeGuard[int]:
    first, last = _DATED_NS if arrow_type.unit == "ns" else _DATED
    return bound is not None and first <= bound <= last


def _literal_time(time: int, arrow_type: pa.DataType) -> str:
    kind = ("TIMESTAMPTZ" if arrow_type.tz else "TIMESTAMP") + ("_NS" if arrow_type.unit == "ns" else "")
    text = f"{moment(time):%Y-%m-%d %H:%M:%S.%f}"
    return f"{kind} '{text}+00'" if arrow_type.tz else f"{kind} '{text}'"


def _table(files: ParquetFiles) -> str:
    """The files as a table whose columns are named by their place: SQL would not tell names apart by case alone.

    A file's path is taken as it is, also where it holds the characters of a pattern.
    """
    paths = ", ".join(literal(glob.escape(file)) for file in files.files)
    names = ", ".join(_place(files, name) for name in files.schemas[0].names)
    return f"read_parquet([{paths}], union_by_name = true, hive_partitioning = false) AS file({names})"


def _place(files: ParquetFiles, physical: str) -> str:
    return f"c{files.schemas[0].names.index(physical)}"


def _value(files: ParquetFiles, field: pa.Field, wanted: ValueType, needed_by: str) -> str:
    """A column as wanted; a column wanted as BOOL that is not one is only asked whether it has a value."""
    found = of_arrow(field.type)
    if wanted is ValueType.BOOL and found is not ValueType.BOOL:
        column = _place(files, field.name)
        present = f"{column} IS NOT NULL"
        if found and found.is_float:
            present += f" AND isfinite({column})"
        return f"CASE WHEN {present} THEN TRUE END"
    return _typed(files, field, wanted, needed_by)


def _typed(files: ParquetFiles, field: pa.Field, wanted: ValueType, needed_by: str) -> str:
    check_readable(files, field, wanted, needed_by)
    if wanted.element is ValueType.TIMESTAMP:
        place = _place(files, field.name)
        if wanted.is_list:
            return f"list_transform({place}, lambda x: make_timestamp({_time_sql('x', field.type.value_type)}))"
        return _time_sql(place, field.type)
    sql_type = _SQL_TYPES[wanted.element] + ("[]" if wanted.is_list else "")
    return f"CAST({_place(files, field.name)} AS {sql_type})"


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
