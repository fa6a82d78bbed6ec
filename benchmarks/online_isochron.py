"""Isochron's side of the online bench: its repository over the bench's Redis, used as its users use it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.online_data import KEY, TIME, WINDOWED, EventLog, Rows, View
from benchmarks.online_sides import HOST, Command, Place, Read
from benchmarks.repos import apply_repo
from feature_store import FeatureLayer
from feature_store.clock import ManualClock, SystemClock
from feature_store.stores.online.compiled import load
from feature_store.stores.online.keys import integer_keys

SIDE = "benchmarks.online_isochron:Isochron"

_DEFINITIONS = ["online_definitions.py", "online_windows.py"]

#: Rows written at once while a view is filled.
_FILLED = 20_000


class Isochron:
    """Implements `benchmarks.online_sides.IsochronSide`."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @property
    def _repo(self) -> Path:
        return self._place.folder

    def _layer(self, now: int | None = None) -> FeatureLayer:
        """The layer of the side's repository, which is made where there is none; by another clock, if told the time."""
        if not (self._repo / "registry.db").exists():
            store = {"backend": "redis", "connection_string": f"{HOST}:{self._place.port}"}
            adapters = "feature_store.adapters.feast"
            stores = {
                "offline_store": {"type": f"{adapters}.IsochronOfflineStore"},
                "online_store": {"type": f"{adapters}.IsochronOnlineStore", **store},
                "batch_engine": {"type": f"{adapters}.IsochronEngine"},
            }
            apply_repo(self._repo, stores, _DEFINITIONS, by_isochron=True)
        return FeatureLayer(self._repo, clock=SystemClock() if now is None else ManualClock(now))

    # -- plain views --------------------------------------------------------------------------------------------

    def fill(self, view: View) -> None:
        layer = self._layer()
        for rows in view.rows().blocks(_FILLED):
            layer.write_to_online_store(view.name, rows.table())

    def reader(self, view: View) -> Read:
        layer = self._layer()
        handle = layer.prepare(self._features(view))
        now = layer.clock.now
        return lambda ids: handle.read({KEY: ids}, now()).to_dict()

    @staticmethod
    def _features(view: View) -> list[str]:
        return [f"{view.name}:f{number}" for number in range(view.features)]

    def sdk_reader(self, view: View) -> Read:
        from feast import FeatureStore

        self._layer().close()
        store, features = FeatureStore(str(self._repo)), self._features(view)
        return lambda ids: store.get_online_features(features, {KEY: ids}).to_dict()

    def writer(self, view: View) -> Writing:
        return Writing(self._layer(), view.name)

    def server(self, view: View, port: int) -> Command:
        self._layer().close()
        program = str(Path(sys.executable).with_name("isochron"))
        arguments = [program, "serve-features", "--repo", ".", "--host", HOST, "--port", str(port)]
        return Command(arguments, self._repo)

    # -- windows ------------------------------------------------------------------------------------------------

    def fill_windows(self, log: EventLog) -> None:
        layer = self._layer(log.cut)
        layer.bootstrap([log.name], log.cut)
        layer.clock.set(log.until)  # type: ignore[attr-defined]
        recent = log.table(recent=True).sort_by(TIME)
        for start in range(0, recent.num_rows, _FILLED):
            layer.append_events(f"{log.name}_events", recent.slice(start, _FILLED), offset=start)

    def window_reader(self, log: EventLog, compiled: bool) -> Callable[[list[int]], Any]:
        if compiled:
            load()
        layer = self._layer()
        handle = layer.prepare([f"{log.name}:{name}" for name in WINDOWED])
        until = log.until
        return lambda ids: handle.read({KEY: ids}, until)

    def window_keys(self, log: EventLog, keys: list[int]) -> list[bytes]:
        layer = self._layer()
        online = layer.store.view(layer.definitions.stored_view(log.name))
        online.read([WINDOWED[0]], integer_keys(_int64(keys)), _int64([log.until] * len(keys)))
        return online.look_up(integer_keys(_int64(keys))).keys


class Writing:
    """Writes rows of one view: a single one by name, many as a table."""

    def __init__(self, layer: FeatureLayer, view: str) -> None:
        self._layer, self._view = layer, view

    def prepare(self, rows: Rows) -> pa.Table | list[dict[str, Any]]:
        return rows.table() if len(rows) > 1 else rows.table().to_pylist()

    def write(self, prepared: pa.Table | list[dict[str, Any]]) -> None:
        self._layer.write_to_online_store(self._view, prepared)


def _int64(numbers: list[int]) -> Any:
    import numpy as np

    return np.array(numbers, np.int64)
