"""Feast's logs of served features, as Parquet files of a folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.infra.offline_stores.file_source import FileLoggingDestination
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import RepoConfig

from feature_store.adapters.feast.settings import local_path
from feature_store.clock import SystemClock
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.errors import RequestError, SourceError
from feature_store.stores.offline.append import converted, publish, staged


def write_logs(
    config: RepoConfig, data: pa.Table | Path, source: LoggingSource, logging: LoggingConfig, registry: BaseRegistry
) -> None:
    """Adds logs, a table or a Parquet file or folder of such, to the folder of a FileLoggingDestination.

    One new file, or with `partition_by` one for each value of those columns in a folder of its name. As in Feast's
    own stores the folder is named after the value alone; unlike them the file keeps the column. All files are
    complete before the first one shows.

    Raises RequestError for a column of the source's schema that the logs lack, one that only they have, or one that
    does not read as its type; SourceError for data that cannot be read, or a destination that is no local folder.
    """
    destination = logging.destination
    if not isinstance(destination, FileLoggingDestination):
        raise SourceError(f"logs cannot go to {type(destination).__name__}; use a FileLoggingDestination.")
    folder = local_path(config, destination.path, "logging destination")
    if folder.is_file():
        raise SourceError(f"logging destination {folder} is a file; name a folder.")
    rows = _conforming(_read(data) if isinstance(data, Path) else data, source.get_schema(registry))
    now = SystemClock().now()
    with ExitStack() as stack:
        parts = _parts(rows, destination.partition_by or [])
        files = [stack.enter_context(staged(folder.joinpath(*names), part)) for names, part in parts]
        for file in files:
            publish(file, now)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"logs {path} cannot be read as Parquet: {error}") from error


def _conforming(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Logs in the schema's order and kinds of types, so that the files of one destination read as one table. A kind's
    finer variants (a time's unit, a number's width) stay as they were logged.
    """
    if missing := [name for name in schema.names if name not in rows.column_names]:
        raise RequestError(missing[0], f"is missing in the logs; they have: {', '.join(rows.column_names)}")
    if unknown := [name for name in rows.column_names if name not in schema.names]:
        raise RequestError(unknown[0], f"is no column of the logs' schema; it has: {', '.join(schema.names)}")
    return pa.table({field.name: _of_kind(rows[field.name], field) for field in schema})


def _of_kind(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if pa.types.is_timestamp(field.type) and pa.types.is_timestamp(column.type):
        return converted(column, pa.timestamp(column.type.unit, field.type.tz), field.name)
    wanted = of_arrow(field.type)
    if wanted and wanted is not ValueType.TIMESTAMP and of_arrow(column.type) is wanted:
        return column
    return converted(column, field.type, field.name)


def _parts(rows: pa.Table, names: list[str]) -> list[tuple[list[str], pa.Table]]:
    """The rows by the values of the named columns, each with its folders; no rows are no parts."""
    if missing := [name for name in names if name not in rows.column_names]:
        raise RequestError(missing[0], "is named in partition_by, but is no column of the logs")
    parts: list[tuple[list[str], pa.Table]] = [([], rows)] if len(rows) else []
    for name in names:
        parts = [
            ([*folders, _folder_name(value)], part.filter(_equal(part[name], value)))
            for folders, part in parts
            for value in pc.unique(part[name])
        ]
    return parts


def _equal(column: pa.ChunkedArray, value: pa.Scalar) -> pa.ChunkedArray:
    return pc.equal(column, value) if value.is_valid else column.is_null()


def _folder_name(value: pa.Scalar) -> str:
    return quote(str(value.as_py()), safe=" :+,@=") if value.is_valid else "__HIVE_DEFAULT_PARTITION__"
