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
    """The files of one source, sorted, and the schema of the first; every file must have the columns that are read."""

    source: Source
    files: tuple[str, ...]
    schema: pa.Schema

    def column(self, name: str, needed_by: str) -> pa.Field:
        """A column by the name views use for it. Raises SourceError when the file has none."""
        physical = self.source.physical(name)
        if physical not in self.schema.names:
            raise SourceError(
                f"{needed_by}: source '{self.source.name}' ({self.source.path}) has no column '{physical}'; "
                f"it has: {', '.join(self.schema.names)}. Correct the file, or the source's field_mapping."
            )
        return self.schema.field(physical)


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
    return ParquetFiles(source, tuple(files), _schema(source, files[0]))


def exists(source: Source, root: Path) -> bool:
    return bool(_files(source, root))


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
