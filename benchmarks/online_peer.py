"""Feast's own side: its Redis store, its SDK and its feature server, each at the setting that is best for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from benchmarks.online_data import KEY, Rows, View
from benchmarks.online_sides import HOST, Command, Place, Read
from benchmarks.repos import apply_repo
from feature_store.timestamps import moment

_BLOCK = 1_000
#: Seconds after which a registry is read again: longer than any run, so that none does it.
_NEVER = 1_000_000


class Feast:
    """Plain views only: Feast computes no windows online."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def fill(self, view: View) -> None:
        """Writes through the store's own batch call, past the SDK's way from pandas to protobuf."""
        store = self._store()
        table, online = store.get_feature_view(view.name), store._get_provider().online_store
        for block in view.rows().blocks(_BLOCK):
            online.online_write_batch(store.config, table, _protobuf(block), progress=None)

    def reader(self, view: View) -> Read:
        store, features = self._store(), references(view)
        return lambda keys: store.get_online_features(features, {KEY: keys}).to_dict()

    def writer(self, view: View) -> FeastWriter:
        return FeastWriter(self._store(), view.name)

    def server(self, view: View, port: int) -> Command:
        """One worker that is never replaced, no access log, no refresh of the registry."""
        feast = str(Path(sys.executable).with_name("feast"))
        address = ["--host", HOST, "--port", str(port)]
        options = ["--workers", "1", "--max-requests", "0", "--no-access-log", "--registry_ttl_sec", str(_NEVER)]
        self._store()
        return Command([feast, "serve", *address, *options], self._place.folder)

    def _store(self) -> FeatureStore:
        """The place's repository, made where there is none."""
        if not (self._place.folder / "feature_store.yaml").is_file():
            address = f"{HOST}:{self._place.port}"
            stores = {
                "registry": {"path": "registry.db", "cache_ttl_seconds": _NEVER},
                "offline_store": {"type": "file"},
                "online_store": {"type": "redis", "connection_string": address},
            }
            apply_repo(self._place.folder, stores, ["online_definitions.py"], by_isochron=False)
        return FeatureStore(str(self._place.folder))


class FeastWriter:
    """`write_to_online_store`, the SDK's call for rows that come in."""

    def __init__(self, store: FeatureStore, view: str) -> None:
        self._store, self._view = store, view

    def prepare(self, rows: Rows) -> pd.DataFrame:
        return rows.table().to_pandas()

    def write(self, prepared: pd.DataFrame) -> None:
        self._store.write_to_online_store(self._view, df=prepared)


def references(view: View) -> list[str]:
    """The features of a view as Feast names them in a request."""
    return [f"{view.name}:{name}" for name in view.names]


def _protobuf(rows: Rows) -> list[tuple[EntityKey, dict[str, Value], Any, None]]:
    """What a store's batch call takes of each row."""
    found = []
    for key, time, values in zip(rows.keys.tolist(), rows.times.tolist(), rows.values.tolist(), strict=True):
        entity = EntityKey(join_keys=[KEY], entity_values=[Value(int64_val=key)])
        # NaN, the only value that is not equal to itself, is null here: an empty Value.
        features = {
            name: Value(double_val=value) if value == value else Value()  # noqa: PLR0124
            for name, value in zip(rows.names, values, strict=True)
        }
        found.append((entity, features, moment(time), None))
    return found
