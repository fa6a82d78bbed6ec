"""The rows that ask, in Spark: numbered in their order, with their times and typed keys.

However they were given, a frame of them has the columns `row` (its number, from 0 without gaps), `t` (event time in
microseconds), `k0`, `k1`... (the request's keys) and, as far as asked for, `c0`, `c1`... (columns of the spine, as
their carriers).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.erasure import Erasures
from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType
from feature_store.engines.spark.carriers import check_carried, encode
from feature_store.engines.spark.failures import crossing, spark_errors
from feature_store.engines.spark.scan import TIME, scan
from feature_store.engines.spine import (
    EVENT_TIMESTAMP,
    TimeRange,
    check_spine,
    check_timed,
    is_query,
    no_files,
    table_of,
    times_of,
    unreadable,
)
from feature_store.errors import SpineError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

#: Rows of a spine's file that are read at a time.
BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Bounds:
    """How many rows ask, and their first and last time (microseconds; 0 where there are none)."""

    rows: int
    first: int
    last: int


class SparkSpine(Protocol):
    """The rows that ask."""

    @property
    def schema(self) -> pa.Schema:
        """Their columns."""

    @property
    def table(self) -> pa.Table | None:
        """The rows themselves, where they lie in this process."""

    def frame(self, columns: Sequence[str]) -> DataFrame:
        """The rows, with these of their columns."""

    def bounds(self) -> Bounds:
        """Looks at every row: raises SpineError where one has no time, ColumnError where a key is none of its type."""


def open_spine(spark: SparkSession, entity_df: Any, request: Request, root: Path, erasures: Erasures) -> SparkSpine:
    """The rows of a frame, of Parquet files, of an SQL query, or of a time range (without what is erased).

    Raises SpineError where they cannot be read, or their columns are not what the request needs.
    """
    if isinstance(entity_df, TimeRange):
        return _query_rows(spark, _between(spark, request, root, entity_df, erasures), request)
    if is_query(entity_df):
        with spark_errors("the spine's SQL failed", SpineError, SpineError):
            return _query_rows(spark, spark.sql(entity_df), request)
    if isinstance(entity_df, str | Path):
        return _file_rows(spark, str(entity_df), request)
    return _table_rows(spark, table_of(entity_df), request)


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark schema of carriers."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


# -- what every spine must be ---------------------------------------------------------------------------------------


def _check_typed(schema: pa.Schema, request: Request) -> None:
    """Raises SpineError where a spine of this schema is none; ColumnError where a key is of a type that is none of its
    own, which the executors would find only with the rows.
    """
    check_spine(schema, request)
    _asking(schema.empty_table(), pa.array([], pa.int64()), request.keys, ())


def _asking(rows: pa.Table, numbers: pa.Array, keys: Mapping[str, ValueType], columns: Sequence[str]) -> pa.Table:
    """Rows of a spine as a frame has them; a missing time stays null."""
    asking = {"row": numbers, "t": times_of(rows)}
    for i, (name, key_type) in enumerate(keys.items()):
        asking[f"k{i}"] = encode(typed(rows[name], key_type, f"key '{name}' of the spine"))
    return pa.table(asking | {f"c{i}": encode(rows[name]) for i, name in enumerate(columns)})


def _frame_schema(schema: pa.Schema, keys: Mapping[str, ValueType], columns: Sequence[str]) -> StructType:
    for name in columns:
        check_carried(name, schema.field(name).type)
    return spark_schema(_asking(schema.empty_table(), pa.array([], pa.int64()), keys, columns).schema)


def _bounds(frame: DataFrame) -> Bounds:
    from pyspark.sql import functions as fn

    with spark_errors("the spine could not be read", SpineError, SpineError):
        found = frame.agg(fn.count("row"), fn.count("t"), fn.min("t"), fn.max("t")).collect()[0]
    rows, timed, first, last = found
    check_timed(rows - timed)
    return Bounds(rows, first or 0, last or 0)


# -- a frame or table -----------------------------------------------------------------------------------------------


@dataclass
class TableRows:
    """Rows that lie in this process."""

    spark: SparkSession
    table: pa.Table
    keys: Mapping[str, ValueType]
    frames: dict[tuple[str, ...], DataFrame] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    def frame(self, columns: Sequence[str]) -> DataFrame:
        if tuple(columns) not in self.frames:
            schema = _frame_schema(self.schema, self.keys, columns)
            asking = _asking(self.table, pa.array(np.arange(len(self.table))), self.keys, columns)
            with spark_errors("the spine could not be handed to Spark", SpineError):
                self.frames[tuple(columns)] = self.spark.createDataFrame(asking, schema)
        return self.frames[tuple(columns)]

    def bounds(self) -> Bounds:
        times = _asking(self.table, pa.array(np.arange(len(self.table))), self.keys, ())["t"]
        check_timed(times.null_count)
        numbers = np.asarray(times)
        return Bounds(len(numbers), int(numbers.min()), int(numbers.max())) if len(numbers) else Bounds(0, 0, 0)


def _table_rows(spark: SparkSession, table: pa.Table, request: Request) -> TableRows:
    _check_typed(table.schema, request)
    return TableRows(spark, table, request.keys)


# -- Parquet files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A row group of a file; `first` is the number of its first row in the spine."""

    file: str
    group: int
    first: int
    rows: int


@dataclass(frozen=True)
class FileRows:
    """Rows in Parquet files that the executors read, in the order of the sorted paths."""

    spark: SparkSession
    schema: pa.Schema
    pieces: tuple[Piece, ...]
    keys: Mapping[str, ValueType]
    table: None = None

    def frame(self, columns: Sequence[str]) -> DataFrame:
        tasks = max(min(len(self.pieces), self.spark.sparkContext.defaultParallelism * 4), 1)
        numbers = self.spark.range(0, len(self.pieces), 1, tasks)
        schema = _frame_schema(self.schema, self.keys, columns)
        return numbers.mapInArrow(_reading(self.pieces, self.keys, tuple(columns)), schema)

    def bounds(self) -> Bounds:
        return _bounds(self.frame(()))


def _file_rows(spark: SparkSession, text: str, request: Request) -> FileRows:
    pieces: list[Piece] = []
    schema: pa.Schema | None = None
    first = 0
    for file in _files(text):
        try:
            footer = pq.read_metadata(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise unreadable(text, error) from error
        here = footer.schema.to_arrow_schema()
        schema = schema or here
        if other := [f for f in schema if here.get_field_index(f.name) < 0 or here.field(f.name).type != f.type]:
            raise SpineError(f"the spine's column '{other[0].name}' is not {other[0].type} in {file}; write all alike.")
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            pieces.append(Piece(file, group, first, rows))
            first += rows
    if schema is None:
        raise no_files(text)
    _check_typed(schema, request)
    return FileRows(spark, schema, tuple(pieces), request.keys)


def _files(text: str) -> list[str]:
    """The files of a path, sorted: itself, every file below a folder that is not hidden, or those that fit a glob."""
    path = Path(text).absolute()
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        return sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    below = [f for f in path.rglob("*") if f.is_file() and not any(p[0] in "._" for p in f.relative_to(path).parts)]
    if partitioned := [f for f in below if any("=" in part for part in f.relative_to(path).parts[:-1])]:
        raise SpineError(
            f"the spine {text} holds columns in folder names ({partitioned[0]}); write them into the files."
        )
    return sorted(map(str, below))


def _reading(pieces: Sequence[Piece], keys: Mapping[str, ValueType], columns: Sequence[str]) -> Any:
    """Reads the pieces whose numbers come in."""
    needed = list(dict.fromkeys([EVENT_TIMESTAMP, *keys, *columns]))

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for piece in (pieces[number.as_py()] for batch in batches for number in batch["id"]):
            first = piece.first
            with pq.ParquetFile(piece.file) as file:
                for rows in file.iter_batches(BATCH_ROWS, row_groups=[piece.group], columns=needed):
                    numbers = pa.array(np.arange(first, first + len(rows)))
                    first += len(rows)
                    yield from _asking(pa.table(rows), numbers, keys, columns).combine_chunks().to_batches()

    return crossing(read)


# -- a query, a time range ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueryRows:
    """Rows that Spark made and keeps (`kept`: `row` and the columns by place), so that all stages see the same ones."""

    kept: DataFrame
    schema: pa.Schema
    keys: Mapping[str, ValueType]
    table: None = None

    def frame(self, columns: Sequence[str]) -> DataFrame:
        needed = list(dict.fromkeys([EVENT_TIMESTAMP, *self.keys, *columns]))
        places = [self.schema.get_field_index(name) for name in needed]
        schema = _frame_schema(self.schema, self.keys, columns)
        frame = self.kept.select("row", *(f"c{place}" for place in places))
        return frame.mapInArrow(_typing(needed, self.keys, tuple(columns)), schema)

    def bounds(self) -> Bounds:
        return _bounds(self.frame(()))


def _query_rows(spark: SparkSession, rows: DataFrame, request: Request) -> QueryRows:
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import to_arrow_type

    fields = []
    for column in rows.schema.fields:
        try:
            fields.append(pa.field(column.name, to_arrow_type(column.dataType, timezone="UTC")))
        except PySparkException as error:
            raise SpineError(
                f"the spine's column '{column.name}' is {column.dataType.simpleString()}, which has no equal in Arrow; "
                "convert it, or leave it out."
            ) from error
    schema = pa.schema(fields)
    _check_typed(schema, request)
    with spark_errors("the spine's SQL failed", SpineError, SpineError):
        return QueryRows(_numbered(rows), schema, request.keys)


def _numbered(rows: DataFrame) -> DataFrame:
    """The rows with their number in the order they have, kept so that they are made once: a lost part is an error,
    not other rows.
    """
    from pyspark.sql import functions as fn

    named = rows.toDF(*(f"c{i}" for i in range(len(rows.columns))))
    kept = named.withColumn("row", fn.monotonically_increasing_id()).localCheckpoint()
    part = fn.shiftright("row", 33)
    counts = {r[0]: r[1] for r in kept.groupBy(part.alias("part")).count().collect()}
    firsts = [0]
    for number in range(max(counts, default=0)):
        firsts.append(firsts[-1] + counts.get(number, 0))
    first = fn.element_at(fn.array(*map(fn.lit, firsts)), (part + 1).cast("int"))
    return kept.withColumn("row", first.cast("bigint") + fn.col("row").bitwiseAND((1 << 33) - 1))


def _typing(names: Sequence[str], keys: Mapping[str, ValueType], columns: Sequence[str]) -> Any:
    """Types rows whose columns, after `row`, are the named ones."""

    def typing(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = pa.table(batch).drop_columns(["row"]).rename_columns(list(names))
            yield from _asking(rows, batch["row"], keys, columns).combine_chunks().to_batches()

    return crossing(typing)


def _between(spark: SparkSession, request: Request, root: Path, between: TimeRange, erasures: Erasures) -> DataFrame:
    """The distinct keys and event times of all rows of the request's views in a time range, in the order of time and
    keys; a key that a view does not have is null there, and nulls come last.
    """
    from pyspark.sql import functions as fn

    union: DataFrame | None = None
    for view, refs in request.by_view():
        places = {refs[0].key_column(key.name): f"k{i}" for i, key in enumerate(view.keys)}
        rows = scan(view, {}, root, between.start, between.end, erasures).frame(spark)
        keys = [
            (fn.col(places[name]) if name in places else fn.lit(None).cast(spark_schema(_one(t)).fields[0].dataType))
            for name, t in request.keys.items()
        ]
        found = rows.select(*(key.alias(f"k{i}") for i, key in enumerate(keys)), fn.col(TIME)).distinct()
        union = found if union is None else union.unionAll(found)
    if union is None:
        raise SpineError("a request without stored features has no rows of its own; give an entity_df.")
    order = [fn.col(TIME), *(fn.col(f"k{i}").asc_nulls_last() for i in range(len(request.keys)))]
    rows = union.distinct().orderBy(*order)
    return rows.withColumn(TIME, fn.timestamp_micros(TIME)).toDF(*request.keys, EVENT_TIMESTAMP)


def _one(value_type: ValueType) -> pa.Schema:
    return pa.schema([pa.field("x", value_type.arrow)])
