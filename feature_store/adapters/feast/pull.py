"""Rows of a Feast source as they lie in its files: all of a time range, or the newest of each key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from feast import FileSource
from feast.data_format import ParquetFormat
from feast.data_source import DataSource, PushSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL

from feature_store.config import RepoConfig
from feature_store.definitions.columns import typed
from feature_store.definitions.erasure import Erasures, LoadErasures, left_out, when_known
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import Field, PlainView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import SourceError
from feature_store.stores.offline.parquet import ParquetFiles, open_source
from feature_store.timestamps import BEGINNING, DAY, END, SECOND, arrow_timestamps

_UNIT = {"s": SECOND, "ms": 1_000, "us": 1}
_INT64 = -(2**63), 2**63 - 1


def file_source(source: DataSource | None, subject: str) -> FileSource:
    """The source of Parquet files behind a Feast source; raises SourceError where it is none."""
    batch = source.batch_source if isinstance(source, PushSource) else source
    if not isinstance(batch, FileSource):
        raise SourceError(f"{subject}: its source is {_kind(batch)}; use a FileSource of Parquet files.")
    if batch.file_format is not None and not isinstance(batch.file_format, ParquetFormat):
        raise SourceError(f"{subject}: source '{batch.name}' holds {_kind(batch.file_format)}; use Parquet files.")
    return batch


def _kind(thing: object) -> str:
    return "nothing" if thing is None else type(thing).__name__


@dataclass(frozen=True)
class Pull:
    """What is pulled of a source: columns by their name in its files, and the rows with start <= time <= end
    (microseconds, None: no bound). No features at all means every column: Feast asks so for what a function reads.

    `stored` are files that Feast had stored itself (saved datasets and logs): every column of them comes, for Feast
    knows only some.
    """

    source: Source
    keys: tuple[str, ...]
    features: tuple[str, ...]
    time: str
    created: str | None = None
    start: int | None = None
    end: int | None = None
    stored: bool = False

    @property
    def columns(self) -> list[str]:
        named = (*self.keys, *self.features, self.time, *([self.created] if self.created else []))
        return [name for name in dict.fromkeys(named) if name != DUMMY_ENTITY_ID]

    def fields(self, files: ParquetFiles) -> dict[str, pa.Field]:
        """The columns' fields in the files, by the names they were asked for: those of the files, or mapped ones."""
        here = files.schemas[0].names
        physical = {name: name if name in here else self.source.physical(name) for name in self.columns}
        if not self.features:
            physical |= {name: name for name in here if name not in physical.values()}
        return {name: files.physical_column(column, "a pull") for name, column in physical.items()}


def all_rows(pull: Pull, root: Path, erasures: LoadErasures) -> pa.Table:
    """Every row in the range, in the order of the files and of their rows, in the files' own types; without those of
    erased entities, but for stored files: what was derived and kept is nobody's log.

    Raises SourceError for a missing file or column, files of different types, or a time column that is no time.
    """
    files = open_source(pull.source, root)
    fields = _stored_fields(pull, files) if pull.stored else pull.fields(files)
    time = _time_field(pull, fields[pull.time])
    kept = files.between(time.name, pull.start, pull.end) if pull.start is not None or pull.end is not None else files
    schema = pa.schema([field.with_name(name) for name, field in fields.items()])
    tables = [_read(pull, file, here, fields) for file, here in zip(kept.files, kept.schemas, strict=True)]
    metadata = files.schemas[0].metadata if pull.stored else None
    rows = pa.concat_tables([_cast(table, schema) for table in tables]).combine_chunks()
    rows = rows if pull.stored else _without_erased(pull, rows, fields, erasures())
    return (rows if pull.stored else _with_dummy_key(pull, rows)).replace_schema_metadata(metadata)


def latest_rows(pull: Pull, config: RepoConfig, erasures: LoadErasures) -> pa.Table:
    """The newest row of each key in the range, in the order of keys, in the files' own types; times are floored to
    microseconds. Rows of erased entities are left out.

    Newest by event time, then by created time, then by the values, as in history and online: the same row whatever
    the order of files. Rows without a key or a time are of nobody and left out.
    """
    files = open_source(pull.source, config.root)
    fields = pull.fields(files)
    _time_field(pull, fields[pull.time])
    names = _mapped(pull, fields)
    view = PlainView(
        name=pull.source.name,
        keys=tuple(_typed_field(pull, names[key], fields[key]) for key in pull.keys if key != DUMMY_ENTITY_ID),
        features=tuple(
            _typed_field(pull, names[name], field)
            for name, field in fields.items()
            if name not in (*pull.keys, pull.time, pull.created)
        ),
        source=pull.source,
    )
    engine = DuckDBEngine(config.root, config.memory_limit, erasures)
    try:
        end = END if pull.end is None else pull.end
        rows = engine.newest_rows(view, pull.start, end, end)
    finally:
        engine.close()
    names |= {pull.time: "__time"} | ({pull.created: "__created"} if pull.created else {})
    arrays = {name: _restored(rows[names[name]], field.type) for name, field in fields.items()}
    return _with_dummy_key(pull, pa.table(arrays))


def _mapped(pull: Pull, fields: dict[str, pa.Field]) -> dict[str, str]:
    """The views' names of the columns, by the names they were asked for."""
    return {name: pull.source.field_mapping.get(field.name, field.name) for name, field in fields.items()}


def _without_erased(pull: Pull, rows: pa.Table, fields: dict[str, pa.Field], erasures: Erasures) -> pa.Table:
    if not erasures.log:
        return rows
    mapped = _mapped(pull, fields)
    keys = {name: _typed_field(pull, mapped[name], fields[name]) for name in pull.keys if name != DUMMY_ENTITY_ID}
    columns = {key.name: typed(rows[name], key.type, f"column '{name}'") for name, key in keys.items()}
    times, created = (_micros(rows, name) for name in (pull.time, pull.created))
    gone = left_out(erasures.of(tuple(keys.values())), pa.table(columns), when_known(times, created, 0))
    return rows.filter(pa.array(~gone))


def _micros(rows: pa.Table, name: str | None) -> np.ndarray:
    """A column of times in microseconds, BEGINNING where null or where there is no such column."""
    if name is None:
        return np.full(len(rows), BEGINNING)
    column = typed(rows[name], ValueType.TIMESTAMP, f"column '{name}'")
    return np.asarray(column.view(pa.int64()).fill_null(BEGINNING))


def _stored_fields(pull: Pull, files: ParquetFiles) -> dict[str, pa.Field]:
    """All columns of all files; a file that lacks one (its writer did not know it yet) has nulls there."""
    try:
        schema = pa.unify_schemas(files.schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SourceError(f"{pull.source.path}: its files do not read as one table ({error}).") from error
    if missing := [name for name in pull.columns if name not in schema.names]:
        raise SourceError(
            f"{pull.source.path}: no file has column '{missing[0]}'; there are: {', '.join(schema.names)}."
        )
    return {field.name: field for field in schema}


def _time_field(pull: Pull, field: pa.Field) -> pa.Field:
    if of_arrow(field.type) is not ValueType.TIMESTAMP:
        raise SourceError(f"source '{pull.source.name}': time column '{field.name}' is {field.type}, not a timestamp.")
    return field


def _typed_field(pull: Pull, name: str, field: pa.Field) -> Field:
    value_type = of_arrow(field.type)
    if value_type is None:
        raise SourceError(
            f"source '{pull.source.name}': column '{field.name}' is {field.type}, which has no equal as a feature. "
            "Write it as another type."
        )
    return Field(name, value_type)


def _read(pull: Pull, file: str, schema: pa.Schema, fields: dict[str, pa.Field]) -> pa.Table:
    present = {name: pc.field(field.name) for name, field in fields.items() if field.name in schema.names}
    time = fields[pull.time].name
    if time not in schema.names:
        raise SourceError(f"{file} has no column '{time}'; it has: {', '.join(schema.names)}.")
    within = _within(time, schema.field(time).type, pull.start, pull.end)
    try:
        return pads.dataset(file, format="parquet", schema=schema).to_table(columns=present, filter=within)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise SourceError(f"source '{pull.source.name}': {file} could not be read: {error}") from error


def _within(time: str, arrow_type: pa.DataType, start: int | None, end: int | None) -> pc.Expression | None:
    """The rows with start <= time <= end, asked of the column as it lies in the file. Finer units are floored."""
    if pa.types.is_timestamp(arrow_type) and arrow_type.unit == "ns":
        low, high = (start or 0) * 1_000, (end or 0) * 1_000 + 999
    else:
        unit = _UNIT[arrow_type.unit] if pa.types.is_timestamp(arrow_type) else DAY
        low, high = -(-(start or 0) // unit), (end or 0) // unit
    column = pc.field(time)
    conditions = [column >= _at(low, arrow_type)] if start is not None else []
    conditions += [column <= _at(high, arrow_type)] if end is not None else []
    return _all(conditions)


def _all(conditions: Iterable[pc.Expression]) -> pc.Expression | None:
    whole = None
    for condition in conditions:
        whole = condition if whole is None else whole & condition
    return whole


def _at(time: int, arrow_type: pa.DataType) -> pa.Scalar:
    if not pa.types.is_timestamp(arrow_type):
        days = min(max(time, -(2**31)), 2**31 - 1)
        return pa.scalar(days, pa.int32()).cast(pa.date32()).cast(arrow_type)
    return pa.scalar(min(max(time, _INT64[0]), _INT64[1]), arrow_type)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    missing = {field.name: pa.nulls(len(table), field.type) for field in schema if field.name not in table.column_names}
    present = {name: _same_time(table[name], schema.field(name).type) for name in table.column_names}
    return pa.Table.from_arrays([(present | missing)[name] for name in schema.names], schema=schema)


def _same_time(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """Files may hold times in different units and zones; the instant stays, in the finest unit."""
    if pa.types.is_timestamp(wanted) and pa.types.is_timestamp(column.type):
        column = column.combine_chunks()
        naive = column.view(pa.int64()).view(pa.timestamp(column.type.unit)).cast(pa.timestamp(wanted.unit))
        return naive.view(pa.int64()).view(wanted)
    return column.cast(wanted)


def _restored(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.Array:
    """A column of the engine, times as microseconds, as the files have it."""
    array = column.combine_chunks()
    if of_arrow(wanted) is not ValueType.TIMESTAMP:
        return array.cast(wanted)
    naive = arrow_timestamps(array.cast(pa.int64())).view(pa.int64()).view(pa.timestamp("us"))
    if not pa.types.is_timestamp(wanted):
        return naive.cast(wanted)
    return naive.cast(pa.timestamp(wanted.unit)).view(pa.int64()).view(wanted)


def _with_dummy_key(pull: Pull, rows: pa.Table) -> pa.Table:
    """Feast's engines look for a key in every row; a view without keys gets the one that Feast's own stores give."""
    if any(key != DUMMY_ENTITY_ID for key in pull.keys):
        return rows
    return rows.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(rows), pa.string()))
