"""Where Feast stores the rows of a retrieval: a Parquet file or a folder of them, whole or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from feature_store.adapters.feast.settings import local_path
from feature_store.errors import SourceError

#: Rows of one file in a folder.
ROWS_A_FILE = 1_000_000


def location_of(storage: SavedDatasetStorage, config: RepoConfig) -> Path:
    """The path of a saved dataset; raises SourceError where it is not one of local Parquet files."""
    if not isinstance(storage, SavedDatasetFileStorage):
        raise SourceError(f"a saved dataset cannot go to {type(storage).__name__}; use a SavedDatasetFileStorage.")
    options = storage.file_options
    if options.file_format is not None and not isinstance(options.file_format, ParquetFormat):
        kind = type(options.file_format).__name__
        raise SourceError(f"saved dataset {options.uri}: {kind} is not written; use Parquet.")
    return local_path(config, options.uri, "saved dataset")


@contextmanager
def saving(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder; it takes the name when the block ends well.

    Raises Feast's SavedDatasetLocationAlreadyExists where something is there and may not be overwritten, before the
    block and again after it. What is overwritten stays readable until the new one is complete; a reader that comes in
    the instant between finds, of folders, neither.
    """
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield temporary
        _check_free(path, overwrite)
        _swap(temporary, path)
    finally:
        _remove(temporary)


def _check_free(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise SavedDatasetLocationAlreadyExists(location=str(path))


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists() or (path.is_file() and temporary.is_file()):
        os.replace(temporary, path)
        return
    former = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    os.rename(path, former)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(former, path)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_folder(table: pa.Table, folder: Path, rows_a_file: int = ROWS_A_FILE) -> None:
    """Writes a table as files whose names are in the order of its rows; an empty one too, for its columns."""
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, max(len(table), 1), rows_a_file)):
        pq.write_table(table.slice(first, rows_a_file), folder / f"part-{number:05d}.parquet", compression="zstd")
