"""The feature server beside Feast's own: the same requests over the same rows, and Feast's remote client on both.

Feast's server runs over Feast's own SQLite store. Where it answers otherwise the difference is named here, and in
docs/serving.md.
"""

from __future__ import annotations

import datetime as dt
import math
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
from feast import FeatureStore
from feast.permissions.client.http_auth_requests_wrapper import HttpSessionManager

from feature_store.clock import SystemClock
from feature_store.timestamps import DAY, SECOND, micros
from tests.feature_servers import Served, serving
from tests.processes import BIN, run

pytestmark = pytest.mark.filterwarnings("ignore")

DEFINITIONS = """
from datetime import timedelta
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
place = Entity(name="place", join_keys=["place_name"], value_type=ValueType.STRING)
rows = FileSource(name="rows", path="rows.parquet", timestamp_field="event_timestamp")
pushed = PushSource(name="pushed", batch_source=rows)
TYPES = {"Bool": Bool, "Int32": Int32, "Int64": Int64, "Float32": Float32, "Float64": Float64, "String": String,
         "Bytes": Bytes, "UnixTimestamp": UnixTimestamp}
LISTS = {f"{name}s": Array(t) for name, t in TYPES.items() if name != "UnixTimestamp"}
every = FeatureView(
    name="every", entities=[user], source=pushed, ttl=timedelta(0),
    schema=[Field(name=f"f_{name}", dtype=t) for name, t in {**TYPES, **LISTS}.items()],
)
pair = FeatureView(name="pair", entities=[user, place], source=rows, schema=[Field(name="visits", dtype=Int64)])
short = FeatureView(
    name="short", entities=[user], source=rows, ttl=timedelta(hours=1), schema=[Field(name="speed", dtype=Float64)]
)
trip = RequestSource(name="trip", schema=[Field(name="distance", dtype=Float64)])


@on_demand_feature_view(sources=[short, trip], schema=[Field(name="hours", dtype=Float64)], mode="python")
def estimate(inputs: dict[str, Any]) -> dict[str, Any]:
    rows = zip(inputs["distance"], inputs["speed"], strict=True)
    return {"hours": [distance / (speed or 10.0) for distance, speed in rows]}


everything = FeatureService(name="everything", features=[every, pair])
trips = FeatureService(name="trips", features=[short[["speed"]], estimate])
"""
SQLITE = "online_store: {type: sqlite, path: data/online.db}"
OURS = """
offline_store: {type: feature_store.adapters.feast.IsochronOfflineStore}
online_store: {type: feature_store.adapters.feast.IsochronOnlineStore}
batch_engine: {type: feature_store.adapters.feast.IsochronEngine}
"""

NOW = SystemClock().now() // SECOND * SECOND
#: Times of rows: with microseconds, with milliseconds, whole.
TIMES = [pd.Timestamp(NOW - 600 * SECOND + part, unit="us", tz="UTC") for part in (123_456, 250_000, 0)]
STAMP = dt.datetime(2024, 5, 1, 8, 30, 15, 500_000, tzinfo=dt.UTC)
EVERY: dict[str, list[Any]] = {
    "user_id": [1, 2, 3],
    "event_timestamp": TIMES,
    "f_Bool": [True, False, None],
    "f_Int32": [-(2**31), 2**31 - 1, None],
    "f_Int64": [2**53 + 1, -(2**62), 0],
    "f_Float32": [0.1, -2.5, None],
    "f_Float64": [0.1 + 0.2, 5e-324, None],
    "f_String": ['naïve "],[" ', "", None],
    "f_Bytes": [b"\x00\xff", b"", None],
    "f_UnixTimestamp": [STAMP, dt.datetime(1969, 12, 31, tzinfo=dt.UTC), None],
    "f_Bools": [[True, False], [True], None],
    "f_Int32s": [[1, 2], [3], None],
    "f_Int64s": [[2**53 + 1], [-1, 0], None],
    "f_Float32s": [[0.1, 2.0], [1.0], None],
    "f_Float64s": [[0.1], [1e300, -0.5], None],
    "f_Strings": [["a", ""], ["é"], None],
    "f_Bytess": [[b"\x00", b"a"], [b"b"], None],
}
PAIR = {"user_id": [1, 2], "place_name": ["home", "work"], "event_timestamp": TIMES[:2], "visits": [3, 4]}
SHORT = {
    "user_id": [1, 2],
    "event_timestamp": [TIMES[0], pd.Timestamp(NOW - DAY, unit="us", tz="UTC")],
    "speed": [50.0, 60.0],
}
FEATURES = [f"every:{name}" for name in EVERY if name.startswith("f_")]


@dataclass
class Both:
    """Feast's server over its own store, and ours over ours, with the same rows."""

    feast: httpx.Client
    ours: Served
    repo: Path

    def asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both answers, by feature: values, statuses and event times."""
        answers = (self.feast.post("/get-online-features", json=body), self.ours.ask(body))
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert set(answer.json()) == {"metadata", "results"}
        feasts, ours = (answer.json() for answer in answers)
        for result in ours["results"]:
            # Feast's SQLite store keeps whole seconds.
            result["event_timestamps"] = [time[:19] + "Z" for time in result["event_timestamps"]]
        return _by_feature(feasts), _by_feature(ours)


def _by_feature(told: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(told["metadata"]["feature_names"], told["results"], strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("both")
    repos = {}
    for name, stores in (("feast", SQLITE), ("ours", OURS)):
        repos[name] = folder / name
        (repos[name] / "data").mkdir(parents=True)
        config = f"project: both\nprovider: local\nregistry: data/registry.db\n{stores}\n"
        (repos[name] / "feature_store.yaml").write_text(f"{config}entity_key_serialization_version: 3\n")
        (repos[name] / f"both_{name}.py").write_text(DEFINITIONS)
        done = run(repos[name], "feast", "apply", "--skip-source-validation")
        assert done.returncode == 0, done.stdout + done.stderr
        store = FeatureStore(str(repos[name]))
        for view, rows in (("every", EVERY), ("pair", PAIR), ("short", SHORT)):
            store.write_to_online_store(view, pd.DataFrame(rows))
    with feast_server(repos["feast"], folder) as url, serving(repos["ours"], NOW) as ours:
        # Feast's server may close a connection that is kept while the next request is on its way.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=url, trust_env=False, timeout=60, limits=limits) as client:
            yield Both(client, ours, repos["ours"])


@contextmanager
def feast_server(repo: Path, folder: Path) -> Iterator[str]:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        port = plug.getsockname()[1]
    log = folder / "feast.log"
    with log.open("wb") as output:
        command = [str(BIN / "feast"), "serve", "--port", str(port), "--no-access-log", "--type", "http"]
        environment = {**os.environ, "FEAST_USAGE": "False"}
        process = subprocess.Popen(
            command, cwd=repo, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_values_of_every_type_statuses_and_times_are_those_of_feasts_server(both: Both) -> None:
    feasts, ours = both.asked({"features": FEATURES, "entities": {"user_id": [1, 2]}})
    assert set(ours) == set(feasts) == {"user_id", *(ref.partition(":")[2] for ref in FEATURES)}
    for name in feasts:
        assert types(ours[name]["values"]) == types(feasts[name]["values"]), name
        assert ours[name] == feasts[name], name
    assert ours["f_UnixTimestamp"]["values"] == [micros(STAMP) // SECOND, -86_400]
    assert ours["f_Float32"]["values"][0] == 0.10000000149011612
    body = {"features": FEATURES, "entities": {"user_id": [1, 2]}}
    times = both.ours.ask(body).json()["results"][-1]["event_timestamps"]
    assert [time[19:] for time in times] == [".123456Z", ".250Z"]


def types(value: Any) -> Any:
    return [types(one) for one in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize("full", [True, False])
def test_services_composite_keys_and_full_names(both: Both, full: bool) -> None:
    entities = {"user_id": [1, 2, 1], "place_name": ["home", "work", "work"]}
    body = {"feature_service": "everything", "entities": entities, "full_feature_names": full}
    feasts, ours = both.asked(body)
    visits = "pair__visits" if full else "visits"
    assert ours[visits]["values"] == feasts[visits]["values"] == [3, 4, None]
    assert ours == feasts


def test_what_is_null_unknown_or_too_old_is_said_where_feast_says_present(both: Both) -> None:
    feasts, ours = both.asked({"features": [*FEATURES, "short:speed"], "entities": {"user_id": [3, 2, 99]}})
    for name in (ref.partition(":")[2] for ref in FEATURES):
        # A null that was written is PRESENT in Feast, and a time is then the lowest number.
        assert ours[name]["values"] == [None if v == -(2**63) else v for v in feasts[name]["values"]], name
        null = ours[name]["values"][0] is None
        assert feasts[name]["statuses"] == ["PRESENT", "PRESENT", "NOT_FOUND"]
        assert ours[name]["statuses"] == ["NULL_VALUE" if null else "PRESENT", "PRESENT", "NOT_FOUND"]
    # Feast's online store does not apply a ttl.
    assert (feasts["speed"]["values"], feasts["speed"]["statuses"][1]) == ([None, 60.0, None], "PRESENT")
    assert ours["speed"]["values"] == [None, None, None]
    assert ours["speed"]["statuses"] == ["NOT_FOUND", "OUTSIDE_MAX_AGE", "NOT_FOUND"]
    assert ours["speed"]["event_timestamps"] == ["1970-01-01T00:00:00Z"] * 3


def test_on_demand_features_of_the_requests_values(both: Both) -> None:
    body = {"feature_service": "trips", "entities": {"user_id": [1, 99], "distance": [100.0, 20]}}
    feasts, ours = both.asked(body)
    assert ours["hours"] == feasts["hours"]
    assert ours["hours"]["values"] == [2.0, 2.0]
    assert set(ours) == set(feasts) == {"user_id", "speed", "hours"}


@pytest.mark.parametrize(
    ("body", "feasts", "ours"),
    [
        ({"feature_service": "none", "entities": {"user_id": [1]}}, 404, 404),
        ({"features": ["none:f"], "entities": {"user_id": [1]}}, 404, 404),
        ({"features": ["short:speed"], "entities": "user_id"}, 422, 422),
        # Without a key, or with a feature that does not exist, Feast fails.
        ({"features": ["short:speed"], "entities": {"place_name": ["home"]}}, 500, 422),
        ({"features": ["short:height"], "entities": {"user_id": [1]}}, 500, 404),
    ],
)
def test_what_feast_refuses_is_refused(both: Both, body: dict[str, Any], feasts: int, ours: int) -> None:
    assert both.feast.post("/get-online-features", json=body).status_code == feasts
    assert both.ours.ask(body).status_code == ours


# -- Feast's remote client ------------------------------------------------------------------------------------------


def remote(both: Both, folder: Path, url: str) -> FeatureStore:
    """A Feast repository whose online store is a server."""
    repo = folder / httpx.URL(url).netloc.decode().replace(":", "_")
    repo.mkdir()
    config = f"project: both\nprovider: local\nregistry: {both.repo}/data/registry.db\n"
    store = f"online_store: {{type: remote, path: {url}}}\nentity_key_serialization_version: 3\n"
    (repo / "feature_store.yaml").write_text(config + store)
    return FeatureStore(str(repo))


@pytest.fixture
def clients(both: Both, tmp_path: Path) -> Iterator[tuple[FeatureStore, FeatureStore]]:
    """Clients of Feast's server and of ours."""
    yield remote(both, tmp_path, str(both.feast.base_url)), remote(both, tmp_path, both.ours.url)
    HttpSessionManager.close_session()


def test_feasts_remote_client_reads_from_both_the_same(both: Both, clients: tuple[FeatureStore, FeatureStore]) -> None:
    service = clients[0].get_feature_service("everything")
    rows = [{"user_id": 1, "place_name": "home"}, {"user_id": 2, "place_name": "work"}]
    for features in (service, FEATURES, ["pair:visits", "every:f_String"]):
        for full in (False, True):
            feasts, ours = (
                client.get_online_features(features, entity_rows=rows, full_feature_names=full).to_dict()
                for client in clients
            )
            assert ours == feasts
    answer = both.ours.layer.prepare(["every:f_Float64", "pair:visits"]).read(
        {"user_id": [1, 2], "place_name": ["home", "work"]}, NOW
    )
    told = clients[1].get_online_features(["every:f_Float64", "pair:visits"], entity_rows=rows).to_dict()
    assert told == answer.to_dict()


def test_feasts_remote_client_reads_what_is_unknown(clients: tuple[FeatureStore, FeatureStore]) -> None:
    for client in clients:
        told = client.get_online_features(["pair:visits", "every:f_Int64"], {"user_id": [99], "place_name": ["x"]})
        assert told.to_dict() == {"user_id": [99], "place_name": ["x"], "visits": [None], "f_Int64": [None]}


def test_feasts_remote_client_writes(both: Both, clients: tuple[FeatureStore, FeatureStore]) -> None:
    rows = {name: values[:1] for name, values in EVERY.items()}
    later = [pd.Timestamp(NOW - 60 * SECOND, unit="us", tz="UTC")]
    # Bytes are what the client cannot send.
    rows |= {"user_id": [7], "event_timestamp": later, "f_Bytes": [None], "f_Bytess": [None], "f_Int64": [41]}
    for client in clients:
        client.write_to_online_store("every", pd.DataFrame(rows))
        client.push("pushed", pd.DataFrame({**rows, "user_id": [8]}))
    feasts, ours = both.asked({"features": FEATURES, "entities": {"user_id": [7, 8]}})
    assert ours["f_Int64"]["values"] == [41, 41]
    for name in feasts:
        assert ours[name]["values"] == feasts[name]["values"], name
        assert ours[name]["event_timestamps"] == feasts[name]["event_timestamps"], name


def test_what_feasts_remote_client_makes_of_nan_and_empty_lists_is_its_own(
    both: Both, clients: tuple[FeatureStore, FeatureStore]
) -> None:
    rows = {name: [value[0]] for name, value in EVERY.items()}
    rows |= {"user_id": [9], "f_Float64": [math.nan], "f_Float32": [math.inf], "f_Float64s": [[]]}
    body = {"features": ["every:f_Float64", "every:f_Float32", "every:f_Float64s"], "entities": {"user_id": [9]}}
    df = {**rows, "event_timestamp": [TIMES[0].isoformat()], "f_Float64": ["NaN"], "f_Float32": ["Infinity"]}
    df = {n: v for n, v in df.items() if n not in ("f_Bytes", "f_Bytess", "f_UnixTimestamp")}
    df |= {"f_Bytes": [None], "f_Bytess": [None], "f_UnixTimestamp": [0]}
    request = {"feature_view_name": "every", "df": df}
    assert both.ours.client.post("/write-to-online-store", json=request).is_success
    told = both.ours.columns(body)
    assert told == {"user_id": [9], "f_Float64": ["NaN"], "f_Float32": ["Infinity"], "f_Float64s": [[]]}
    # In the words of protobuf's JSON, which the client takes for text; and no list without a value has a type to it.
    client = clients[1]
    assert client.get_online_features(body["features"][:1], {"user_id": [9]}).to_dict()["f_Float64"] == ["NaN"]
    with pytest.raises(TypeError, match="Couldn't infer value type from empty value"):
        client.get_online_features(body["features"], {"user_id": [9]})
