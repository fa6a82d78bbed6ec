"""The Parquet files behind a source: where they lie, what columns they hold, and which of them hold a time range."""

from __future__ import annotations

import datetime as dt
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.source import Source
from feature_store.errors import SourceError
from feature_store.timestamps import micros


@dataclass(frozen=True)
class ParquetFiles:
    """The files of one source, sorted, the footer of each, and a mark that another content of it would not have."""

    source: Source
    files: tuple[str, ...]
    footers: tuple[pq.FileMetaData, ...]
    marks: tuple[tuple[int, int, int], ...]

    @cached_property
    def schemas(self) -> tuple[pa.Schema, ...]:
        return tuple(footer.schema.to_arrow_schema() for footer in self.footers)

    @property
    def rows(self) -> int:
        return sum(footer.num_rows for footer in self.footers)

    def between(self, column: str, start: int | None, end: int | None) -> ParquetFiles:
        """The files that may hold a time with start <= time <= end (microseconds) in this physical column.

        Judged by the statistics in the footers; a file without them stays. One file stays in any case, for its schema.
        """
        kept = [i for i, footer in enumerate(self.footers) if _rows_between(footer, column, start, end)] or [0]
        return self.only(kept)

    def alike(self, columns: Sequence[str]) -> list[ParquetFiles]:
        """The files in groups, in each of which all have the same columns, and these ones are of one type."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, schema in enumerate(self.schemas):
            types = (schema.field(column).type for column in columns)
            groups.setdefault((tuple(schema.names), *types), []).append(i)
        return [self.only(kept) for kept in groups.values()]

    def changed(self) -> str | None:
        """The first file that is no longer what was opened, if there is one."""
        for file, mark in zip(self.files, self.marks, strict=True):
            try:
                if _mark(file) != mark:
                    return file
            except FileNotFoundError:
                return file
        return None

    def only(self, kept: Sequence[int]) -> ParquetFiles:
        """Some of the files, by their places."""
        return replace(
            self,
            files=tuple(self.files[i] for i in kept),
            footers=tuple(self.footers[i] for i in kept),
            marks=tuple(self.marks[i] for i in kept),
        )

    def rows_between(self, column: str, start: int | None, end: int | None) -> int:
        """An upper bound of the rows with such a time: those of the row groups that may hold one."""
        return sum(_rows_between(footer, column, start, end) for footer in self.footers)

    def bounds(self, column: str) -> tuple[int | None, int | None]:
        """Times that none in this physical column lies before, or after; None where the statistics do not say."""
        found = [bounds for footer in self.footers for bounds in _all_bounds(footer, column)]
        lows, highs = [low for low, _ in found if low is not None], [high for _, high in found if high is not None]
        whole = bool(found) and len(lows) == len(highs) == len(found)
        return (min(lows), max(highs)) if whole else (None, None)

    def column(self, name: str, needed_by: str) -> pa.Field:
        """A column by the name views use for it. Raises SourceError when a file has none, or another type of it."""
        return self.physical_column(self.source.physical(name), needed_by)

    def physical_column(self, physical: str, needed_by: str) -> pa.Field:
        """A column by its name in the files; raises SourceError likewise."""
        kinds = []
        for file, schema in zip(self.files, self.schemas, strict=True):
            if physical not in schema.names:
                raise SourceError(
                    f"{needed_by}: {file} of source '{self.source.name}' has no column '{physical}'; "
                    f"it has: {', '.join(schema.names)}. Correct the file, or the source's field_mapping."
                )
            if len(self.files) > 1 and sum(n.lower() == physical.lower() for n in schema.names) > 1:
                raise SourceError(
                    f"{needed_by}: {file} of source '{self.source.name}' has two columns named '{physical}' but for "
                    "case, which several files read as one table do not tell apart. Rename one, or write one file."
                )
            here, first = schema.field(physical).type, self.schemas[0].field(physical).type
            kinds.append(here)
            if here != first and not (pa.types.is_timestamp(here) and pa.types.is_timestamp(first)):
                raise SourceError(
                    f"{needed_by}: column '{physical}' of source '{self.source.name}' is {here} in {file} "
                    f"but {first} in {self.files[0]}. Write all files alike."
                )
        return pa.field(physical, _finest(kinds))


def _finest(kinds: list[pa.DataType]) -> pa.DataType:
    """The one type of all files, or of times of several units the finest."""
    return next((kind for kind in kinds if pa.types.is_timestamp(kind) and kind.unit == "ns"), kinds[0])


def _rows_between(footer: pq.FileMetaData, column: str, start: int | None, end: int | None) -> int:
    rows = 0
    for number, (low, high) in enumerate(_all_bounds(footer, column)):
        before = end is not None and low is not None and low > end
        after = start is not None and high is not None and high < start
        rows += 0 if before or after else footer.row_group(number).num_rows
    return rows


def _all_bounds(footer: pq.FileMetaData, column: str) -> list[tuple[int | None, int | None]]:
    """The least and greatest time of each row group."""
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    groups = map(footer.row_group, range(footer.num_row_groups))
    if column not in paths:
        return [(None, None) for _ in groups]
    return [_bounds(group.column(paths.index(column))) for group in groups]


def _bounds(chunk: pq.ColumnChunkMetaData) -> tuple[int | None, int | None]:
    """The least and greatest time of a row group in microseconds, None where its statistics do not say."""
    try:
        statistics = chunk.statistics
        if statistics is None or not statistics.has_min_max:
            return None, None
        return _time(statistics.min, 0), _time(statistics.max, 1)
    except (OverflowError, ValueError):  # a year that Python's calendar does not have
        return None, None


def _time(value: object, margin: int) -> int | None:
    """Finer units than microseconds are floored on reading, so an upper bound gets one more."""
    if isinstance(value, dt.datetime):
        return micros(value) + margin
    if isinstance(value, dt.date):
        return micros(dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC))
    return None


def open_source(source: Source, root: Path) -> ParquetFiles:
    """Finds a source's files: a path that is a file, a folder (every .parquet below it) or a glob.

    Relative paths start at the repository's folder `root`. Raises SourceError when there is no file, or when one is
    not Parquet.
    """
    files = _files(source, root)
    if not files:
        raise SourceError(
            f"source '{source.name}': no Parquet file at {root / _local(source)}. "
            "Put the file there, or correct the source's path and apply again."
        )
    marks = tuple(_mark(file) for file in files)
    return ParquetFiles(source, tuple(files), tuple(_footer(source, file) for file in files), marks)


def _mark(file: str) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _local(source: Source) -> str:
    path = source.path.removeprefix("file://")
    if "://" in path:
        raise SourceError(f"source '{source.name}': {source.path} is not a local path; only local files are read yet.")
    return path


def _files(source: Source, root: Path) -> list[str]:
    path = root / _local(source)
    if path.is_file():
        return [str(path)]
    pattern = glob.escape(str(path)) + "/**/*.parquet" if path.is_dir() else str(path)
    return sorted(f for f in glob.glob(pattern, recursive=True) if Path(f).is_file())


def _footer(source: Source, file: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"source '{source.name}': {file} is not a readable Parquet file ({error}).") from error
