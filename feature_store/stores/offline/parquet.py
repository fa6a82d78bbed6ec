"""The Parquet files behind a source: where they lie and what columns they hold."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.source import Source
from feature_store.errors import SourceError


@dataclass(frozen=True)
class ParquetFiles:
    """The files of one source, sorted, and the schema of each."""

    source: Source
    files: tuple[str, ...]
    schemas: tuple[pa.Schema, ...]

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
    return ParquetFiles(source, tuple(files), tuple(_schema(source, file) for file in files))


def _local(source: Source) -> str:
    path = source.path.removeprefix("file://")
    if "://" in path:
        raise SourceError(f"source '{source.name}': {source.path} is not a local path; only local files are read yet.")
    return path


def _files(source: Source, root: Path) -> list[str]:
    path = root / _local(source)
    if path.is_file():
        return [str(path)]
    pattern = str(path / "**" / "*.parquet") if path.is_dir() else str(path)
    return sorted(f for f in glob.glob(pattern, recursive=True) if Path(f).is_file())


def _schema(source: Source, file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"source '{source.name}': {file} is not a readable Parquet file ({error}).") from error
