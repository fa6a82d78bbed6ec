"""Adds files to a folder of Parquet files: each is there whole or not at all, and no other is touched."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.errors import ColumnError, RequestError, SourceError
from feature_store.stores.offline.parquet import ParquetFiles
from feature_store.timestamps import moment, parse_time


def appendable_folder(files: ParquetFiles, path: Path) -> Path:
    """The folder that rows for a source can be added to; raises SourceError where its path is a file or a pattern."""
    if path.is_dir():
        return path
    kind = "one file" if path.is_file() else "a pattern"
    raise SourceError(
        f"source '{files.source.name}': {path} is {kind}; rows are added as new files, for readers of a file that is "
        "rewritten see half of it. Declare a folder as the source's path, put the present files into it, apply again."
    )


def like_files(rows: pa.Table, files: ParquetFiles) -> pa.Table:
    """Rows with the columns of a source's files, in their order and of their types, so that all are read as one table.

    The rows may name a column as in the files or as mapped; what converts without losing anything does. Raises
    RequestError that names the column when one is missing, is in no file, or holds what the files' type cannot.
    """
    schema, mapping = files.schemas[0], files.source.field_mapping
    given = {name: _given(rows, name, mapping) for name in schema.names}
    if unknown := [name for name in rows.column_names if name not in given.values()]:
        known = ", ".join(schema.names)
        raise RequestError(unknown[0], f"is no column of source '{files.source.name}'; it has: {known}")
    fields = [files.physical_column(name, "appended rows") for name in schema.names]
    arrays = [converted(rows[given[field.name]], field.type, given[field.name]) for field in fields]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _given(rows: pa.Table, physical: str, mapping: dict[str, str]) -> str:
    """The name that rows give a column of the files: the mapped one, or the files' own unless it means another."""
    mapped = mapping.get(physical, physical)
    names = [mapped] if physical in mapping.values() else [mapped, physical]
    found = [name for name in dict.fromkeys(names) if name in rows.column_names]
    if not found:
        raise RequestError(mapped, f"is missing; there are: {', '.join(rows.column_names)}")
    if len(found) > 1 or rows.column_names.count(found[0]) > 1:
        raise RequestError(mapped, f"is given twice{f', also as {physical!r}' if len(found) > 1 else ''}")
    return found[0]


def converted(column: pa.ChunkedArray, wanted: pa.DataType, name: str) -> pa.Array:
    """A column as a file's own type. Text is read as a time, naive times are UTC, finer ones than microseconds floored.

    Raises RequestError where a value would not come out as it went in (a float's last digits apart).
    """
    array = column.combine_chunks()
    if array.null_count == len(array):
        return pa.nulls(len(array), wanted)
    value_type = of_arrow(wanted)
    try:
        if value_type is ValueType.TIMESTAMP:
            return _times(array, wanted, name)
        if value_type is not None:
            array = typed(pa.chunked_array([array]), value_type, "it")
            if pa.types.is_dictionary(wanted):
                return array.cast(wanted.value_type).dictionary_encode().cast(wanted)
        made = array.cast(wanted)
        if value_type is None and not made.cast(array.type).equals(array):
            raise RequestError(name, f"is {array.type} and holds a value that the files' {wanted} cannot")
        return made
    except ColumnError as error:
        raise RequestError(name, f"is refused: {str(error).rstrip('.')}; the files have {wanted}") from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise RequestError(name, f"is {array.type} and does not read as the files' {wanted}: {error}") from error


def _times(array: pa.Array, wanted: pa.DataType, name: str) -> pa.Array:
    if of_arrow(array.type) is ValueType.STRING:
        array = pa.array([_parsed(text, name) for text in array.to_pylist()], pa.timestamp("us", "UTC"))
    micros = typed(pa.chunked_array([array]), ValueType.TIMESTAMP, "it").view(pa.int64()).view(pa.timestamp("us"))
    exact = micros.cast(pa.timestamp(wanted.unit) if pa.types.is_timestamp(wanted) else wanted)
    if not exact.cast(pa.timestamp("us")).equals(micros):
        raise RequestError(name, f"holds a time that the files' {wanted} cannot")
    return exact.view(pa.int64()).view(wanted) if pa.types.is_timestamp(wanted) else exact


def _parsed(text: str | None, name: str) -> dt.datetime | None:
    try:
        return None if text is None else moment(parse_time(text))
    except ValueError as error:
        raise RequestError(name, f"holds '{text}', which is no time; write it like 2018-08-01T12:00:00Z") from error


def check_present(rows: pa.Table, columns: list[str]) -> None:
    """Raises RequestError where one of these columns has a null: such a row would be read by nobody."""
    for name in columns:
        if rows[name].null_count:
            first = pc.index(rows[name].is_null(), True).as_py()
            raise RequestError(name, f"is null in row {first}; every row needs its keys and its time")


@contextmanager
def staged(folder: Path, table: pa.Table) -> Iterator[Path]:
    """A table as a file of this folder that no reader sees: `publish` it, or it goes when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".part.{os.getpid()}.{secrets.token_hex(6)}.tmp"
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, now: int) -> Path:
    """Gives a staged file its name among the folder's: names sort by time (`now`, microseconds), none is reused."""
    final = temporary.with_name(f"part-{now:020d}-{secrets.token_hex(6)}.parquet")
    os.rename(temporary, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return final


def digest_of(temporary: Path) -> str:
    """SHA-256 of a staged file, in hex: equal rows give equal files."""
    with temporary.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
