"""A feature server while its repository changes: new definitions without a restart and without a failed request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.clock import ManualClock
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, Field, PlainView, Service
from feature_store.layer import FeatureLayer
from feature_store.timestamps import DAY, HOUR, moment, parse_time
from serving import current
from tests.feature_servers import Served, serving, started
from tests.made_repos import make_repo, write_compiled, write_registry
from tests.processes import output_of

NOW = parse_time("2024-05-01T12:00:00Z")
SOURCE = Source(name="s", path="rows.parquet", timestamp_field="at", push_source="rows")


def view(name: str, *features: str) -> PlainView:
    fields = tuple(Field(feature, ValueType.INT64) for feature in features)
    return PlainView(name=name, keys=(Field("id", ValueType.INT64),), features=fields, source=SOURCE)


OLD, NEW, OTHER, LATER = view("a", "x"), view("a", "x", "y"), view("b", "x"), view("c", "x")
OLD_SERVICE, NEW_SERVICE = (
    Service("s", tuple(FeatureRef(view="a", feature=f, shown_as="a") for f in features)) for features in ("x", "xy")
)
ROWS = pa.table({"id": [1, 2], "at": [moment(NOW - HOUR)] * 2, "x": [10, 20], "y": [1, 2]})
ASK = {"entities": {"id": [1, 2]}}


def fill(repo: Path, *names: str) -> None:
    """What a process of its own does that was started after the apply."""
    layer = FeatureLayer(repo, clock=ManualClock(NOW))
    layer.bootstrap(names, until=NOW)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    repo = make_repo(tmp_path / "repo", [OLD, OTHER], [OLD_SERVICE])
    pq.write_table(ROWS, repo / "rows.parquet")
    fill(repo)
    return repo


@pytest.fixture
def served(repo: Path) -> Iterator[Served]:
    """A server that does not look by itself."""
    with serving(repo, NOW, poll=3_600) as app:
        yield app


def apply(repo: Path, *, state: str = "second") -> None:
    write_registry(repo, state)
    write_compiled(repo, [NEW, OTHER, LATER], [NEW_SERVICE, Service("t", NEW_SERVICE.features[1:])], state)


def test_a_changed_view_is_served_as_it_was_until_it_is_filled_then_as_it_is(repo: Path, served: Served) -> None:
    old = {"id": [1, 2], "x": [10, 20]}
    assert served.columns({"feature_service": "s", **ASK}) == old
    apply(repo)
    # What is asked for by a new name is looked for at once; the former service goes on.
    answer = served.ask({"features": ["a:y"], **ASK})
    assert (answer.status_code, answer.json()["error"], answer.json()["view"]) == (503, "StoreNotReady", "a")
    assert served.ask({"feature_service": "t", **ASK}).status_code == 503
    assert served.columns({"feature_service": "s", **ASK}) == old
    assert served.columns({"features": ["a:x", "b:x"], **ASK, "full_feature_names": True})["a__x"] == [10, 20]
    pushed = {"id": [1], "at": ["2024-05-01T11:30:00Z"], "x": [11], "y": [5]}
    assert served.client.post("/push", json={"push_source_name": "rows", "df": pushed}).is_success
    assert served.columns({"feature_service": "s", **ASK})["x"] == [11, 20]
    health = served.client.get("/health")
    assert (health.status_code, health.json()["waiting"], health.json()["new"]) == (200, ["a"], [])
    assert served.ask({"features": ["a:none"], **ASK}).status_code == 404

    fill(repo, "a")
    # The first read after the switch notices it, and is answered by the new definition.
    assert served.columns({"feature_service": "s", **ASK}) == {**old, "y": [1, 2]}
    assert served.columns({"feature_service": "t", **ASK})["y"] == [1, 2]
    assert served.client.get("/health").json()["waiting"] == []


def test_a_view_that_is_new_makes_nobody_unready(repo: Path, served: Served) -> None:
    assert served.client.get("/health").json()["status"] == "ready"
    apply(repo)
    assert served.ask({"features": ["c:x"], **ASK}).status_code == 503
    fill(repo, "a")
    served.ask({"features": ["c:x"], **ASK})
    health = served.client.get("/health")
    assert (health.status_code, health.json()["new"]) == (200, ["c"])
    fill(repo, "c")
    assert served.columns({"features": ["c:x"], **ASK})["x"] == [10, 20]
    assert served.client.get("/health").json()["new"] == []
    # From here on it counts: lost again, the server is not ready.
    served.layer.store.delete_view("c")
    health = served.client.get("/health")
    assert (health.status_code, health.json()["not_ready"]) == (503, {"c": "it was never filled"})


def test_no_request_fails_while_definitions_change_again_and_again(repo: Path) -> None:
    with serving(repo, NOW, poll=0.05) as served, hammering(served.url, ["s", "a:x", "b:x"]) as seen:
        for n in range(3):
            for views, services in (([NEW, OTHER], [NEW_SERVICE]), ([OLD, OTHER], [OLD_SERVICE])):
                write_registry(repo, "")
                time.sleep(0.05)
                state = f"state {n} of {len(views[0].features)}"
                write_registry(repo, state[:5])
                time.sleep(0.05)
                write_registry(repo, state)
                write_compiled(repo, views, services, state)
                time.sleep(0.1)
                fill(repo, "a")
                time.sleep(0.1)
    assert set(seen) == {("s", 200, ("id", "x")), ("s", 200, ("id", "x", "y")), *KEPT}
    assert min(seen.values()) > 5


KEPT = {("a:x", 200, ("id", "x")), ("b:x", 200, ("id", "x"))}


@contextmanager
def hammering(url: str, asked: list[str]) -> Iterator[Counter[tuple[str, int, tuple[str, ...]]]]:
    """Clients that ask without a pause: how often each question got which status and columns."""
    seen: Counter[tuple[str, int, tuple[str, ...]]] = Counter()
    failed: list[BaseException] = []
    done = threading.Event()

    def ask(question: str) -> None:
        body: dict[str, Any] = {"entities": {"id": [1, 2]}}
        body |= {"features": [question]} if ":" in question else {"feature_service": question}
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                while not done.is_set():
                    answer = client.post("/get-online-features", json=body)
                    names = answer.json()["metadata"]["feature_names"] if answer.is_success else [answer.text]
                    seen[question, answer.status_code, tuple(names)] += 1
        except httpx.HTTPError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(question,)) for question in asked]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failed == []


CONFIG = """
project: spending
provider: local
registry: data/registry.db
offline_store: {type: feature_store.adapters.feast.IsochronOfflineStore}
online_store: {type: feature_store.adapters.feast.IsochronOnlineStore}
batch_engine: {type: feature_store.adapters.feast.IsochronEngine}
entity_key_serialization_version: 3
"""
DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Float64, Int64
from feature_store.adapters.feast import aggregate, windowed_view

key = Entity(name="key", join_keys=["id"], value_type=ValueType.INT64)
rows = FileSource(name="rows", path="rows.parquet", timestamp_field="at")
spend = windowed_view(
    name="spend",
    entities=[key],
    source=PushSource(name="events", batch_source=rows),
    features=aggregate("sum", "x", Int64, windows=[timedelta(days=d) for d in DAYS]),
)
profile = FeatureView(name="profile", entities=[key], source=rows, schema=[Field(name="y", dtype=Int64)])
moving = FeatureService(name="moving", features=[spend])
still = FeatureService(name="still", features=[profile])
"""


@pytest.mark.filterwarnings("ignore")
def test_feast_apply_and_materialize_under_a_running_server(tmp_path: Path) -> None:
    repo = tmp_path / "spending"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text(CONFIG)
    (repo / "spending_views.py").write_text(DEFINITIONS.replace("DAYS", "(1,)"))
    clock_now = int(time.time()) * 1_000_000
    rows = {"id": [1, 2], "at": [moment(clock_now - 2 * DAY), moment(clock_now - HOUR)], "x": [5, 7], "y": [1, 2]}
    pq.write_table(pa.table(rows), repo / "rows.parquet")
    output_of(repo, "feast", "apply")
    output_of(repo, "isochron", "bootstrap", "--repo", ".")
    with started(repo, tmp_path) as server:
        day, week = ("sum_x_86400s",), ("sum_x_86400s", "sum_x_604800s")
        with hammering(server.url, ["moving", "still", "profile:y"]) as seen:
            (repo / "spending_views.py").write_text(DEFINITIONS.replace("DAYS", "(1, 7)"))
            output_of(repo, "feast", "apply")
            time.sleep(1.5)
            before = dict(seen)
            output_of(repo, "isochron", "bootstrap", "--repo", ".")
            time.sleep(1.5)
        assert set(before) == {
            ("moving", 200, ("id", *day)),
            ("still", 200, ("id", "y")),
            ("profile:y", 200, ("id", "y")),
        }
        assert set(seen) - set(before) == {("moving", 200, ("id", *week))}
        body = {"feature_service": "moving", "entities": {"id": [1, 2]}}
        told = httpx.post(f"{server.url}/get-online-features", json=body, trust_env=False).json()
        assert [result["values"] for result in told["results"]] == [[1, 2], [None, 7], [5, 7]]


def test_definitions_changed_through_the_sdk_are_compiled_by_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FeatureStore.delete_feature_service calls no plug-in: nobody leaves compiled definitions.
    monkeypatch.setattr(current, "PATIENCE", 0)
    repo = tmp_path / "spending"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text(CONFIG)
    (repo / "spending_views.py").write_text(DEFINITIONS.replace("DAYS", "(1,)"))
    pq.write_table(pa.table({"id": [1], "at": [moment(NOW)], "x": [5], "y": [1]}), repo / "rows.parquet")
    output_of(repo, "feast", "apply")
    fill(repo)
    with serving(repo, NOW, poll=0.1) as served:
        services = ("moving", "still")
        assert [served.ask({"feature_service": name, **ASK}).status_code for name in services] == [200, 200]
        delete = "from feast import FeatureStore; FeatureStore('.').delete_feature_service('moving')"
        output_of(repo, "python", "-c", delete)
        for _ in range(600):
            if served.ask({"feature_service": "moving", **ASK}).status_code == 404:
                break
            time.sleep(0.1)
        assert [served.ask({"feature_service": name, **ASK}).status_code for name in services] == [404, 200]
