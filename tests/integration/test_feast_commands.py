"""Unmodified Feast against our repository: its commands and its SDK."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feature_store import FeatureLayer
from feature_store.stores.online.keys import project_tails
from feature_store.stores.online.store import OnlineStore
from tests.processes import output_of, run

SDK = """
import datetime as dt, json, sys, warnings
warnings.simplefilter("ignore")
import pandas as pd
from feast import FeatureStore
from feature_store import FeatureLayer
from tests.processes import output_of, run
store, layer = FeatureStore("."), FeatureLayer(".")
t = pd.Timestamp("2018-05-10 12:00:00", tz="UTC")
rows = pd.DataFrame({"customer_id": [1, 2, 999], "terminal_id": [5, 6, 7], "TX_AMOUNT": [10.0, 20.0, 30.0],
                     "TX_DATETIME": [t] * 3})
spine = rows.assign(event_timestamp=t)
service = store.get_feature_service("fraud_v1")
history = store.get_historical_features(spine, service).to_df()
book = store.get_historical_features(spine, store.get_feature_service("fraud_book"), full_feature_names=True).to_df()
answer = store.get_online_features(service, rows.to_dict("records"))
statuses = {n: list(r.statuses) for n, r in zip(answer.proto.metadata.feature_names.val, answer.proto.results)}
ours = layer.get_online_features("fraud_v1", rows.to_dict("list"))
print(json.dumps({
    "history": list(history.columns), "book": list(book.columns), "online": list(answer.to_dict()),
    "proto": list(answer.proto.metadata.feature_names.val), "layer_online": list(ours.to_dict()),
    "layer_history": list(layer.get_historical_features(spine, "fraud_v1").to_df().columns),
    "statuses": {n: statuses[n] for n in ("customer_id", "mean_amount", "count_amount_86400s", "sum_amount_86400s")},
    "count": history["count_amount_2592000s"].tolist(), "profile": answer.to_dict()["mean_amount"],
    "layer_count": layer.get_historical_features(spine, "fraud_v1").to_df()["count_amount_2592000s"].tolist(),
}))
"""


def test_feasts_commands_and_sdk_work(repo: Path) -> None:
    assert "customer_spend" in output_of(repo, "feast", "stream-feature-views", "list")
    assert "transaction_context" in output_of(repo, "feast", "on-demand-feature-views", "list")
    assert "No changes to infrastructure" in output_of(repo, "feast", "plan")
    output_of(repo, "feast", "materialize", "2018-01-01T00:00:00", "2018-05-11T00:00:00")
    done = run(repo, "python", "-c", SDK)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    present, null, missing = 1, 2, 3
    assert seen["count"] == seen["layer_count"]
    assert seen["count"][0] > 0
    assert seen["count"][2] == 0
    assert seen["profile"][0] == pytest.approx(85.72314289985064)
    assert seen["profile"][2] is None
    assert seen["statuses"]["customer_id"] == [0, 1, missing][1:2] * 3
    assert seen["statuses"]["mean_amount"] == [present, present, missing]
    assert seen["statuses"]["count_amount_86400s"] == [present] * 3
    assert seen["statuses"]["sum_amount_86400s"] == [null] * 3
    output_of(repo, "feast", "delete", "fraud_book")
    assert "fraud_book" not in FeatureLayer(repo).definitions.services


def test_columns_keep_the_services_order_in_twenty_processes(repo: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
        wanted = layer.prepare("fraud_v1").feature_names
        inputs = [r.column(False) for r in layer.prepare("fraud_v1").request.stored]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda seed: run(repo, "python", "-c", SDK, seed=str(seed)), range(20)))
    assert [d.returncode for d in done] == [0] * 20, done[0].stderr
    seen = [json.loads(d.stdout) for d in done]
    asked = ["customer_id", "terminal_id", "TX_AMOUNT", "TX_DATETIME", "event_timestamp"]
    extra = [name for name in inputs if name not in wanted]
    for one in seen:
        assert one["history"] == [*asked, *wanted, *extra]
        assert one["layer_history"] == [*asked, *wanted]
        assert one["online"] == one["proto"] == one["layer_online"] == ["customer_id", "terminal_id", *wanted]
        assert one["book"] == seen[0]["book"]
    assert seen[0]["book"][-3:] == [f"book_terminal__fraud_share_{n}d" for n in (1, 30, 7)]


def test_an_apply_that_changes_nothing_changes_no_fingerprint(repo: Path) -> None:
    before = FeatureLayer(repo).definitions
    output_of(repo, "feast", "apply")
    after = FeatureLayer(repo).definitions
    assert after.stamp != before.stamp
    assert {n: v.fingerprint for n, v in after.views.items()} == {n: v.fingerprint for n, v in before.views.items()}
    assert after.services == before.services


def test_teardown_takes_this_projects_values_and_no_others(repo: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
    other = Path(shutil.copytree(repo, repo.parent / "other"))
    config = (repo / "feature_store.yaml").read_text()
    (other / "feature_store.yaml").write_text(
        config.replace("project: fraud", "project: antifraud").replace(
            "data/online.lmdb", str(repo / "data/online.lmdb")
        )
    )
    (other / "data" / "registry.db").unlink()
    output_of(other, "feast", "apply")
    with FeatureLayer(other) as layer:
        layer.bootstrap()
    output_of(repo, "feast", "teardown")
    with FeatureLayer(other) as layer:
        answer = layer.get_online_features(["customer_profile:mean_amount"], {"customer_id": [1]})
        assert answer.to_dict()["mean_amount"] == [pytest.approx(85.72314289985064)]
        store = layer.store
        assert _keys(store, "fraud") == []
        assert len(_keys(store, "antifraud")) > 256


def _keys(store: OnlineStore, project: str) -> list[bytes]:
    return list(store.backend.scan(*project_tails(project)))


PUSH = """
import warnings; warnings.simplefilter("ignore")
import pandas as pd
from feast import FeatureStore
from feature_store.clock import SystemClock
store = FeatureStore(".")
now = pd.Timestamp.now(tz="UTC")
row = lambda t, x: pd.DataFrame({"customer_id": [1], "x_customer_id": [x], "y_customer_id": [0.0], "mean_amount": [x],
    "std_amount": [0.0], "mean_nb_tx_per_day": [0.0], "PROFILE_TIME": [t]})
for t, x in ((now - pd.Timedelta("1h"), 1.0), (now - pd.Timedelta("2h"), 2.0), (now + pd.Timedelta("1d"), 3.0)):
    store.write_to_online_store("customer_profile", row(t, x))
print(store.get_online_features(["customer_profile:mean_amount"], [{"customer_id": 1}]).to_dict()["mean_amount"])
spend = store.get_stream_feature_view("customer_recent")
try:
    store.write_to_online_store("customer_recent", pd.DataFrame({"customer_id": [1], "last_transaction_time": [now],
        "last_amounts": [[1.0]], "TX_DATETIME": [now]}))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_writes_of_plain_rows_keep_the_newest_and_ready_aggregates_are_refused(repo: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
    done = run(repo, "python", "-c", PUSH)
    assert done.returncode == 0, done.stderr
    value, refusal = done.stdout.splitlines()
    assert value == "[1.0]"
    assert refusal.startswith("Refused view 'customer_recent' is windowed")


def test_a_registry_caught_half_written_is_read_again(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_store.adapters.feast import registry as module

    path = repo / "data" / "registry.db"
    content = path.read_bytes()
    path.write_bytes(b"")
    monkeypatch.setattr(module.time, "sleep", lambda _: path.write_bytes(content))
    assert module.read_registry(path) == content


def test_the_compiled_definitions_are_rebuilt_when_the_registry_moved_on(repo: Path) -> None:
    compiled = repo / "data" / "registry.isochron.json"
    stale = json.loads(compiled.read_bytes())
    compiled.write_text(json.dumps({**stale, "stamp": "of another day", "services": {}}))
    definitions = FeatureLayer(repo).definitions
    assert sorted(definitions.services) == ["fraud_book", "fraud_v1"]
    assert json.loads(compiled.read_bytes())["stamp"] == definitions.stamp


def test_a_layer_opens_from_the_compiled_file_without_feast(repo: Path) -> None:
    code = (
        "import sys; from feature_store import FeatureLayer\n"
        "layer = FeatureLayer('data/registry.isochron.json')\n"
        "print(sorted(layer.definitions.services), 'feast' in sys.modules, 'pandas' in sys.modules)"
    )
    done = run(repo, "python", "-c", code)
    assert done.stdout.split("]")[1].split() == ["False", "False"], done.stderr


def test_times_before_what_the_store_holds_come_from_history(repo: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
        t = dt.datetime(2018, 5, 1, 9, 30, tzinfo=dt.UTC)
        answer = layer.get_online_features(["customer_spend:count_amount_604800s"], {"customer_id": [1, 2]}, as_of=t)
        assert min(answer.to_dict()["count_amount_604800s"]) > 0
