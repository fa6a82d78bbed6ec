"""How Spark reads a source: typed keys, times as microseconds, and the columns a view needs.

Inside Spark every column has a name of ours (`k0` a key, `x0` a value), so that dots, backticks and cases of the names
in files and views meet nothing that parses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.definitions.erasure import NO_ERASURES, Erased, Erasures
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import StoredView
from feature_store.errors import SourceError
from feature_store.stores.offline.columns import check_readable, time_field, type_read
from feature_store.stores.offline.parquet import ParquetFiles, open_source
from feature_store.timestamps import DAY

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

TIME, CREATED = "time", "created"

_SQL_TYPES = {
    ValueType.BOOL: "BOOLEAN",
    ValueType.INT32: "INT",
    ValueType.INT64: "BIGINT",
    ValueType.FLOAT32: "FLOAT",
    ValueType.FLOAT64: "DOUBLE",
    ValueType.STRING: "STRING",
    ValueType.BYTES: "BINARY",
    ValueType.TIMESTAMP: "BIGINT",
}
_INT64 = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Part:
    """Files that lie alike: the columns to read of them with their Spark types, what is selected, and which rows."""

    files: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    selected: tuple[str, ...]
    where: str

    def frame(self, spark: SparkSession) -> DataFrame:
        schema = ", ".join(f"{quote(name)} {spark_type}" for name, spark_type in self.columns)
        rows = spark.read.schema(schema).parquet(*map(_path, self.files))
        return rows.toDF(*(f"c{i}" for i in range(len(self.columns)))).where(self.where).selectExpr(*self.selected)

    def sql(self) -> str:
        named = ", ".join(f"c{i} {quote(name)} {t}" for i, (name, t) in enumerate(self.columns))
        files = ", ".join(self.files[:3]) + (", ..." if len(self.files) > 3 else "")
        return f"SELECT {', '.join(self.selected)}\nFROM parquet({files}) AS file({named})\nWHERE {self.where}"


@dataclass(frozen=True)
class Scan:
    """The rows of a source with all keys and a time: `k0`, `k1`..., `time` (delay added) and, if the source has it,
    `created` in microseconds, and `x0`, `x1`... for the asked columns, whose types are `types`.

    `files` are those that may hold the asked time range, `read` the columns read of them (physical names), `rows` an
    upper bound of the rows. `without` are erased entities, whose records are left out.
    """

    parts: tuple[Part, ...]
    types: tuple[ValueType, ...]
    created: bool
    files: tuple[str, ...]
    files_in_all: int
    read: tuple[str, ...]
    rows: int
    without: tuple[Without, ...]

    def frame(self, spark: SparkSession) -> DataFrame:
        first, *others = (part.frame(spark) for part in self.parts)
        for other in others:
            first = first.unionAll(other)
        for erased in self.without:
            first = erased.leave_out(spark, first)
        return first

    def sql(self) -> str:
        rows = "\nUNION ALL\n".join(part.sql() for part in self.parts)
        for number, erased in enumerate(self.without):
            rows = f"SELECT * FROM ({rows})\nANTI JOIN erased_{number} ON {erased.condition}"
        return rows


@dataclass(frozen=True)
class Without:
    """Erased entities: a table of their keys and of the time until which their records are left out, and the condition
    on which a row is one of them, on the columns of both.
    """

    table: pa.Table
    condition: str

    @classmethod
    def of(cls, erased: Erased, view: StoredView, created: bool) -> Without:
        """As definitions/erasure.py says; `created` tells whether the rows have a created time."""
        places = {key.name: i for i, key in enumerate(view.keys)}
        names = [f"gone_k{places[key.name]}" for key in erased.keys]
        same = [f"{name.removeprefix('gone_')} = {name}" for name in names]
        happened = f"{TIME} - {view.source.delay}L"
        known = f"coalesce({CREATED}, {happened})" if created else happened
        table = erased.table.rename_columns([*names, "gone_until"])
        return cls(table, " AND ".join([*same, f"{known} <= gone_until"]))

    def leave_out(self, spark: SparkSession, rows: DataFrame) -> DataFrame:
        from pyspark.sql import functions as fn
        from pyspark.sql.pandas.types import from_arrow_schema

        gone = spark.createDataFrame(self.table, from_arrow_schema(self.table.schema))
        return rows.join(fn.broadcast(gone), fn.expr(self.condition), "left_anti")


def scan(
    view: StoredView,
    columns: Mapping[str, ValueType | None],
    root: Path,
    start: int | None = None,
    end: int | None = None,
    erasures: Erasures = NO_ERASURES,
) -> Scan:
    """The scan of a view's source for these columns: mapped names and the types to read them as (None: as it is).

    With `start` and `end` only rows with start <= event time <= end: files and row groups outside are not read.
    Records of erased entities are left out.
    Raises SourceError for a missing file or column, or a type that cannot be read as declared.
    """
    everything = open_source(view.source, root)
    needed_by = f"view '{view.name}'"
    source = view.source
    # Every file answers for its columns before any is left out: a broken one is named whatever is asked.
    time = time_field(everything, source.timestamp_field, needed_by)
    created = time_field(everything, source.created_field, needed_by) if source.created_field else None
    keys = [(everything.column(key.name, needed_by), key.type) for key in view.keys]
    fields = {name: everything.column(name, needed_by) for name in columns}
    values = [(field, type_read(view, name, field, columns[name])) for name, field in fields.items()]
    low, high = (None if bound is None else bound - source.delay for bound in (start, end))
    files = everything.between(time.name, low, high)
    _check_names(files)
    needed = [time, *([created] if created else []), *(field for field, _ in (*keys, *values))]
    read = tuple(dict.fromkeys(field.name for field in needed))
    parts = []
    for alike in _alike(files, read):
        column = _Columns(alike, read, needed_by)
        time_sql = column.time(time.name)
        key_sql = [column.typed(field, wanted) for field, wanted in keys]
        parts.append(
            Part(
                alike.files,
                tuple((name, column.spark_type(name)) for name in read),
                (
                    *(f"{sql} AS k{i}" for i, sql in enumerate(key_sql)),
                    f"{time_sql} + {source.delay}L AS {TIME}",
                    *([f"{column.time(created.name)} AS {CREATED}"] if created else []),
                    *(f"{column.value(field, wanted)} AS x{i}" for i, (field, wanted) in enumerate(values)),
                ),
                " AND ".join(
                    [
                        *(f"{column.place(field.name)} IS NOT NULL" for field, _ in keys),
                        f"{column.place(time.name)} IS NOT NULL",
                        *column.within(time.name, low, high),
                    ]
                ),
            )
        )
    return Scan(
        parts=tuple(parts),
        types=tuple(t for _, t in values),
        created=created is not None,
        files=files.files,
        files_in_all=len(everything.files),
        read=read,
        rows=files.rows_between(time.name, low, high),
        without=tuple(Without.of(erased, view, created is not None) for erased in erasures.of(view.keys)),
    )


@dataclass(frozen=True)
class _Columns:
    """SQL for the columns of files that lie alike; `names` are the columns read, in order."""

    files: ParquetFiles
    names: tuple[str, ...]
    needed_by: str

    def place(self, physical: str) -> str:
        return f"c{self.names.index(physical)}"

    def arrow_type(self, physical: str) -> pa.DataType:
        return self.files.schemas[0].field(physical).type

    def spark_type(self, physical: str) -> str:
        """How Spark calls what the files hold. Raises SourceError where it cannot read that."""
        arrow_type = self.arrow_type(physical)
        if found := _physical_type(arrow_type, physical in _int96(self.files)):
            return found
        raise SourceError(
            f"{self.needed_by}: column '{physical}' of source '{self.files.source.name}' ({self.files.source.path}) "
            f"is {arrow_type}, which Spark does not read. Write it as another type."
        )

    def time(self, physical: str) -> str:
        return _micros(self.place(physical), self.spark_type(physical))

    def within(self, time: str, low: int | None, high: int | None) -> list[str]:
        """Conditions on the time: the column's own, by which Spark prunes row groups, and the exact ones."""
        place, kind = self.place(time), self.spark_type(time)
        micros = _micros(place, kind)
        conditions = []
        for sign, bound in ((">=", low), ("<=", high)):
            if bound is not None:
                conditions += [*_pushed(place, kind, sign, bound), f"{micros} {sign} {bound}L"]
        return conditions

    def value(self, field: pa.Field, wanted: ValueType) -> str:
        """A column as wanted; a column wanted as BOOL that is not one is only asked whether it has a value."""
        found = of_arrow(field.type)
        if wanted is ValueType.BOOL and found is not ValueType.BOOL:
            place = self.place(field.name)
            present = f"{place} IS NOT NULL"
            if found and found.is_float:
                present += f" AND abs({place}) < DOUBLE('Infinity')"  # which NaN is not: it is the greatest
            return f"CASE WHEN {present} THEN TRUE END"
        return self.typed(field, wanted)

    def typed(self, field: pa.Field, wanted: ValueType) -> str:
        check_readable(self.files, field, wanted, self.needed_by)
        found = of_arrow(field.type)
        place, kind = self.place(field.name), self.spark_type(field.name)
        if not wanted.is_list:
            return _cast(place, kind, found, wanted)
        element = kind.removeprefix("ARRAY<").removesuffix(">")
        return f"transform({place}, x -> {_cast('x', element, found and found.element, wanted.element)})"


def _cast(place: str, kind: str, found: ValueType | None, wanted: ValueType) -> str:
    if wanted is ValueType.TIMESTAMP:
        return _micros(place, kind)
    cast = f"CAST({place} AS {_SQL_TYPES[wanted]})"
    if wanted is ValueType.FLOAT32 and found is ValueType.FLOAT64:
        lost = f"abs({cast}) = FLOAT('Infinity') AND abs({place}) < DOUBLE('Infinity')"
        message = f"concat('[CAST_OVERFLOW] the value ', {place}, ' of the type DOUBLE cannot be cast to FLOAT')"
        return f"IF({lost}, raise_error({message}), {cast})"
    return cast


def _micros(place: str, kind: str) -> str:
    """A time as microseconds, floored. Nanoseconds come as whole numbers."""
    if kind == "BIGINT":
        return f"({place} div 1000L - IF({place} % 1000L < 0L, 1L, 0L))"
    return f"unix_micros({place})" if kind == "TIMESTAMP" else f"unix_micros(CAST({place} AS TIMESTAMP))"


def _pushed(place: str, kind: str, sign: str, bound: int) -> list[str]:
    """A condition that Spark hands to the Parquet reader; never stricter than the exact one."""
    if kind == "BIGINT":
        nanos = bound * 1_000 + (999 if sign == "<=" else 0)
        return [f"{place} {sign} {nanos}L"] if _INT64[0] < nanos < _INT64[1] else []
    if not _INT64[0] < bound < _INT64[1]:
        return []
    if kind == "DATE":
        return [f"{place} {sign} date_from_unix_date({bound // DAY + (1 if sign == '<=' else 0)})"]
    moment = f"timestamp_micros({bound}L)"
    return [f"{place} {sign} {moment if kind == 'TIMESTAMP' else f'CAST({moment} AS TIMESTAMP_NTZ)'}"]


_PHYSICAL = (
    (pa.types.is_boolean, "BOOLEAN"),
    (pa.types.is_int8, "TINYINT"),
    (lambda t: pa.types.is_int16(t) or pa.types.is_uint8(t), "SMALLINT"),
    (lambda t: pa.types.is_int32(t) or pa.types.is_uint16(t), "INT"),
    (lambda t: pa.types.is_int64(t) or pa.types.is_uint32(t) or pa.types.is_duration(t), "BIGINT"),
    (pa.types.is_uint64, "DECIMAL(20, 0)"),
    (pa.types.is_float32, "FLOAT"),
    (pa.types.is_float64, "DOUBLE"),
    (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t), "STRING"),
    (lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_binary_view(t), "BINARY"),
    (pa.types.is_fixed_size_binary, "BINARY"),
    (pa.types.is_date, "DATE"),
)


def _physical_type(arrow_type: pa.DataType, int96: bool) -> str | None:
    """What Spark reads a column of a Parquet file as, by its Arrow type; None where it cannot."""
    if pa.types.is_dictionary(arrow_type):
        return _physical_type(arrow_type.value_type, int96)
    if pa.types.is_timestamp(arrow_type):
        if arrow_type.unit == "ns" and not int96:
            return "BIGINT"
        return "TIMESTAMP" if arrow_type.tz or int96 else "TIMESTAMP_NTZ"
    if pa.types.is_decimal(arrow_type):
        return f"DECIMAL({arrow_type.precision}, {arrow_type.scale})" if arrow_type.precision <= 38 else None
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        element = _physical_type(arrow_type.value_type, int96)
        return element and f"ARRAY<{element}>"
    if pa.types.is_struct(arrow_type):
        # Only asked whether there is one: its first part that Spark reads is enough to tell.
        parts = [(field.name, _physical_type(field.type, int96)) for field in arrow_type]
        return next((f"STRUCT<{quote(name)}: {kind}>" for name, kind in parts if kind), None)
    return next((name for test, name in _PHYSICAL if test(arrow_type)), None)


def _int96(files: ParquetFiles) -> set[str]:
    """The columns with times in the old 96 bits, which Arrow calls nanoseconds but Spark gives as times."""
    schema = files.footers[0].schema
    leaves = (schema.column(i) for i in range(len(schema)))
    return {
        leaf.path.split(".")[0] if leaf.path not in files.schemas[0].names else leaf.path
        for leaf in leaves
        if leaf.physical_type == "INT96"
    }


def _alike(files: ParquetFiles, names: Iterable[str]) -> list[ParquetFiles]:
    """The files in groups whose columns of these names Spark reads in one way: files may differ in their time units."""
    groups: dict[tuple, list[int]] = {}
    for i in range(len(files.files)):
        one = _some(files, [i])
        int96 = _int96(one)
        kinds = tuple(_physical_type(one.schemas[0].field(name).type, name in int96) for name in names)
        groups.setdefault(kinds, []).append(i)
    return [_some(files, places) for places in groups.values()]


def _some(files: ParquetFiles, places: list[int]) -> ParquetFiles:
    return files.only(places)


def _check_names(files: ParquetFiles) -> None:
    """Refuses files that Spark would leave out without a word, or not find."""
    for file in files.files:
        if Path(file).name.startswith(("_", ".")) or ":" in Path(file).name:
            raise SourceError(
                f"source '{files.source.name}': Spark does not read {file}: names that begin with _ or . or hold a "
                "colon are not data to it. Rename the file."
            )


def _path(file: str) -> str:
    """A file's path as it is, also where it holds the characters of a pattern."""
    return "file://" + "".join(f"\\{c}" if c in "{}[]*?\\" else c for c in str(Path(file).absolute()))


def quote(name: str) -> str:
    """A name as an SQL identifier."""
    return "`" + name.replace("`", "``") + "`"
