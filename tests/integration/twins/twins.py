"""Two applied repositories of one set of definitions, filled by the same calls of Feast's SDK."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from feast import FeatureStore
from feast.infra.online_stores.online_store import OnlineStore
from feast.type_map import feast_value_type_to_python_type

from feature_store.timestamps import BEGINNING, micros, moment
from infra.redis.ports import free_ports
from tests.integration.twins.definitions import Definitions, View, text_of
from tests.integration.twins.rows import LONG_AGO, Key, Row, frame_of, python_value, write_file
from tests.processes import BIN, output_of

PROJECT = "twins"


def stores_of(connection: str) -> dict[str, dict[str, Any]]:
    """What each twin's feature_store.yaml says beside the project; they share a Redis, in two databases."""
    return {
        "feast": {
            "offline_store": {"type": "file"},
            "online_store": {"type": "redis", "connection_string": f"{connection},db=1"},
        },
        "ours": {
            "offline_store": {"type": "feature_store.adapters.feast.IsochronOfflineStore"},
            "online_store": {
                "type": "feature_store.adapters.feast.IsochronOnlineStore",
                "backend": "redis",
                "connection_string": connection,
            },
            "batch_engine": {"type": "feature_store.adapters.feast.IsochronEngine"},
        },
    }


def make_repositories(root: Path, definitions: Definitions, connection: str) -> dict[str, Path]:
    """The two folders: the definitions are applied in ours, and Feast's reads a copy of that registry."""
    (root / "data").mkdir()
    repos = {name: root / name for name in ("feast", "ours")}
    for name, stores in stores_of(connection).items():
        write_config(repos[name], stores)
    (repos["ours"] / "definitions.py").write_text(text_of(definitions, root / "data"))
    output_of(repos["ours"], "feast", "apply", "--skip-source-validation")
    shutil.copy(repos["ours"] / "registry.db", repos["feast"])
    return repos


def write_config(repo: Path, stores: Mapping[str, Any]) -> None:
    """A new folder with its feature_store.yaml."""
    repo.mkdir()
    config = {"project": PROJECT, "provider": "local", "registry": "registry.db", **stores}
    (repo / "feature_store.yaml").write_text(yaml.safe_dump(config | {"entity_key_serialization_version": 3}))


@contextmanager
def feast_servers(repos: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """`feast serve` in each folder: the URLs, which answer once `wait_for` has returned."""
    ports = dict(zip(repos, free_ports(len(repos)), strict=True))
    running = []
    try:
        for name, repo in repos.items():
            command = [str(BIN / "feast"), "serve", "--port", str(ports[name]), "--no-access-log", "--workers", "1"]
            with (repo / "server.log").open("wb") as log:
                running.append(subprocess.Popen(command, cwd=repo, stdout=log, stderr=log, start_new_session=True))
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        for process in running:
            # Workers of the server's own are in its group.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_for(url: str, seconds: float = 60) -> None:
    """Returns when a server is healthy."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.1)


@dataclass
class Twins:
    """Both stores, and what came in by view and entity: values as a read of ours must give them."""

    feast: FeatureStore
    ours: FeatureStore
    data: Path
    came_in: dict[str, dict[Key, list[Row]]] = field(default_factory=dict)

    def fill(self, view: View, rows: Sequence[Row], now: int) -> None:
        """Brings rows into both, the way that the view is filled."""
        self.came_in[view.name] = {}
        write_file(view, rows if view.filling == "materialize" else [], self.data)
        if view.filling == "materialize":
            for store in (self.feast, self.ours):
                store.materialize(moment(LONG_AGO), moment(now), [view.name])
            self._take(view, [Row(r.key, r.time, r.created, _read(view, r.values)) for r in rows])
            return
        half = len(rows) // 2
        for part in filter(None, (rows[:half], rows[half:])):
            with self._watching(view):
                for store in (self.feast, self.ours):
                    if view.filling == "push":
                        store.push(f"{view.name}_pushed", frame_of(view, part))
                    else:
                        store.write_to_online_store(view.name, frame_of(view, part))

    @contextmanager
    def _watching(self, view: View) -> Iterator[None]:
        """Notes the rows that reach our store: what Feast's converter made of them is what both stores get."""
        store: OnlineStore = self.ours._get_provider().online_store
        write = store.online_write_batch

        def note(config: Any, table: Any, data: Any, progress: Any) -> None:
            self._take(view, [_row(view, *one) for one in data])
            write(config, table, data, progress)

        store.online_write_batch = note  # type: ignore[method-assign]
        try:
            yield
        finally:
            del store.online_write_batch

    def _take(self, view: View, rows: Sequence[Row]) -> None:
        for row in rows:
            self.came_in[view.name].setdefault(row.key, []).append(row)

    def rows(self, view: View, key: Key) -> list[Row]:
        """All that came in of an entity."""
        return self.came_in[view.name].get(key, [])

    def newest(self, view: View, key: Key, now: int) -> list[Row]:
        """The row that counts now: several where nothing but their values tells them apart, none where none came in."""
        past = [row for row in self.rows(view, key) if row.time <= now]
        best = max(((row.time, row.created or BEGINNING) for row in past), default=None)
        return [row for row in past if (row.time, row.created or BEGINNING) == best]


def _read(view: View, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: python_value(values[f.name], f.type) for f in view.features}


def _row(view: View, key: Any, values: Mapping[str, Any], time: Any, created: Any) -> Row:
    keys = dict(zip(key.join_keys, key.entity_values, strict=True))
    entity = tuple(feast_value_type_to_python_type(keys[k.name]) for k in view.keys)
    plain = {name: feast_value_type_to_python_type(value) for name, value in values.items()}
    return Row(entity, micros(time), micros(created) if view.created else None, plain)
