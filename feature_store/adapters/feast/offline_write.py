"""Feast's writes to the files behind a view: pushed rows become a new file of the source's folder."""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast import FeatureView
from feast.data_source import PushSource
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.repo_config import RepoConfig

from feature_store.adapters.feast.compile import READS_TAG, compile_registry
from feature_store.adapters.feast.online_store import IsochronOnlineStoreConfig, registry_file
from feature_store.adapters.feast.pull import file_source
from feature_store.adapters.feast.registry import read_registry, stamp_of
from feature_store.adapters.feast.settings import local_path, online_store, root_of
from feature_store.clock import SystemClock
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.view import StoredView, WindowedView
from feature_store.engines.stream.admission import admit
from feature_store.errors import NotFolded, SourceError, StoreError, StoreNotReady
from feature_store.stores.offline.append import (
    appendable_folder,
    check_present,
    digest_of,
    like_files,
    publish,
    staged,
)
from feature_store.stores.offline.parquet import open_source
from feature_store.stores.online.appending import Batch, Position, append

_INDEX = re.compile(r"__index_level_\d+__")


class BatchesWritten:
    """How often each view wrote each batch of rows to a source that several views share.

    Feast's push writes one batch once for every view on the push source, though it is one event log: of the views'
    n-th writes of equal rows the first counts. Rows that are pushed again are written again, by the same views.
    Writers in several threads may come in any order. Only the last batches are remembered.
    """

    def __init__(self, remembered: int = 4_096) -> None:
        self._lock, self._remembered = threading.Lock(), remembered
        self._written: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()

    def is_first(self, source: str, digest: str, view: str) -> bool:
        """Counts a view's write of a batch; whether no other view has written it as often."""
        with self._lock:
            views = self._written.setdefault((source, digest), Counter())
            self._written.move_to_end((source, digest))
            if len(self._written) > self._remembered:
                self._written.popitem(last=False)
            views[view] += 1
            return all(count < views[view] for other, count in views.items() if other != view)

    def not_written(self, source: str, digest: str, view: str) -> None:
        """Takes a count back: the write failed, and another view's write of the rows is to be the first."""
        with self._lock:
            self._written[source, digest][view] -= 1


_BATCHES = BatchesWritten()


def write_batch(
    config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
) -> None:
    """Adds rows to the folder of a view's source, as one new file, whole or not at all.

    Feast calls this for `push(to=OFFLINE)` once for every view on the push source, with the same rows; they are
    written once (BatchesWritten). No view is appointed to write for the others: the pusher's registry may be older
    than ours and know nothing of the appointed one, and the rows would be lost.

    The rows must fit the source's files and every view on its push source: RequestError for a missing, unknown or
    mistyped column, a row without a key or a time, an event time over an hour ahead. SourceError where the source is
    not a folder of Parquet files on this machine, or only reads another source's files. Then nothing is written. A
    row whose features are all null is a row like any other; no rows are nothing to write.

    What is written is then folded by every filled online view on the push source. Where the online store fails,
    the rows are in the log all the same: NotFolded says so.
    """
    declared = file_source(getattr(feature_view, "batch_source", None), f"view '{feature_view.name}'")
    if reads := declared.tags.get(READS_TAG):
        raise SourceError(
            f"source '{declared.name}' only reads the files of source '{reads}'; push the rows to that source, once."
        )
    source = Source(
        name=declared.name,
        path=declared.path,
        timestamp_field=declared.timestamp_field,
        field_mapping=dict(declared.field_mapping or {}),
    )
    files = open_source(source, root_of(config))
    folder = appendable_folder(files, local_path(config, declared.path, f"source '{declared.name}'"))
    rows = like_files(_without_index(table, files.schemas[0]), files)
    push = _push_source(feature_view)
    now = SystemClock().now()
    readers = _readers(current_definitions(config), feature_view.name, push)
    for view in readers:
        _check_rows(view, rows, now)
    if len(rows) and _write(folder, rows, feature_view.name, push, now) and push is not None:
        _fold(config, readers, rows, now)
    if progress:
        progress(len(rows))


def _write(folder: Path, rows: pa.Table, view: str, push: str | None, now: int) -> bool:
    """Writes rows unless another view wrote them for the same push; whether it did."""
    with staged(folder, rows) as file:
        if push is None:
            publish(file, now)
            return True
        source, digest = f"{folder}\n{push}", digest_of(file)
        if _BATCHES.is_first(source, digest, view):
            try:
                publish(file, now)
            except BaseException:
                _BATCHES.not_written(source, digest, view)
                raise
            return True
    return False


def _fold(config: RepoConfig, readers: list[StoredView], rows: pa.Table, now: int) -> None:
    """Appends rows that are in the log to the online views that fold it."""
    if not isinstance(config.online_store, IsochronOnlineStoreConfig):
        return
    store = online_store(config)
    try:
        filled = [v for v in readers if isinstance(v, WindowedView) and v.online and store.holds(v)]
        admitted = [(store.windowed(view), admit(view, rows, now)) for view in filled]
        append([Batch(online, one.keys, one.events) for online, one in admitted], now, Position())
    except (StoreError, StoreNotReady) as error:
        raise NotFolded([view.name for view in readers if isinstance(view, WindowedView)], error) from error


def _push_source(view: FeatureView) -> str | None:
    stream = getattr(view, "stream_source", None)
    return stream.name if isinstance(stream, PushSource) else None


def _without_index(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows without the column that the nameless index of a pandas frame became on its way: it is no data."""
    made = [name for name in table.column_names if _INDEX.fullmatch(name) and name not in schema.names]
    return table.drop_columns(made)


def _readers(definitions: Definitions, name: str, push: str | None) -> list[StoredView]:
    """The views that will read what is written through one of them."""
    return [
        v for v in definitions.stored_views() if v.name == name or (push is not None and v.source.push_source == push)
    ]


def _check_rows(view: StoredView, rows: pa.Table, now: int) -> None:
    if isinstance(view, WindowedView):
        admit(view, rows, now)
    else:
        check_present(rows, [*(view.source.physical(key.name) for key in view.keys), view.source.timestamp_field])


def current_definitions(config: RepoConfig) -> Definitions:
    """The definitions as the registry file has them now."""
    return _compiled(config.project, read_registry(registry_file(config)))


@lru_cache(maxsize=8)
def _compiled(project: str, content: bytes) -> Definitions:
    return compile_registry(RegistryProto.FromString(content), project, stamp_of(content))
