"""Filling a view again: overlapping, backwards, after it was dropped, after it changed, and while events go in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from datasets.fraud_generator import FraudData
from feature_store import FeatureLayer
from feature_store.clock import ManualClock
from feature_store.errors import BootstrapSuperseded, StoreNotReady
from feature_store.timestamps import DAY, HOUR, arrow_micros
from tests.processes import output_of

RECENT = ["customer_recent:last_transaction_time"]


def _end(data: FraudData) -> int:
    return int(arrow_micros(data.transactions["TX_DATETIME"]).to_numpy().max()) + HOUR


def test_the_later_of_two_overlapping_bootstraps_stands(repo: Path, fraud_data: FraudData) -> None:
    end = _end(fraud_data)
    with FeatureLayer(repo, clock=ManualClock(end)) as layer:
        inner: list[dict[str, int]] = []

        def another(view: str, done: int, of: int) -> None:
            if not inner:
                inner.append({})
                inner[0] = layer.bootstrap(["customer_spend"], end)

        with pytest.raises(BootstrapSuperseded, match="another bootstrap of view 'customer_spend' began after this"):
            layer.bootstrap(["customer_spend"], end - 20 * DAY, another)
        keys = {"customer_id": [1, 2, 3]}
        answer = layer.prepare(["customer_spend:count_amount_2592000s"]).read(keys, end)
        again = FeatureLayer(repo, clock=ManualClock(end))
        assert inner == [again.bootstrap(["customer_spend"], end)]
        same = again.prepare(["customer_spend:count_amount_2592000s"]).read(keys, end)
        assert answer.to_dict() == same.to_dict()
        assert sum(answer.to_dict()["count_amount_2592000s"]) > 0


def test_events_pushed_while_a_view_is_filled_are_kept_once(repo: Path, fraud_data: FraudData) -> None:
    end = _end(fraud_data)
    row = fraud_data.transactions.slice(0, 1)
    with FeatureLayer(repo, clock=ManualClock(end)) as layer:
        layer.bootstrap(["customer_spend", "customer_recent"], end)
        names = ["customer_spend:count_amount_2592000s"]
        key = {"customer_id": row["CUSTOMER_ID"].to_pylist()}
        late = _moved(row, end - HOUR)
        before = layer.prepare(names).read(key, end).to_dict()["count_amount_2592000s"][0]

        def push(view: str, done: int, of: int) -> None:
            layer.append_events("transaction_events", late, offset=0)

        layer.bootstrap(["customer_spend"], end, push)
        layer.append_events("transaction_events", late, offset=0)
        assert layer.prepare(names).read(key, end).to_dict()["count_amount_2592000s"] == [before + 1]


def _moved(row: pa.Table, time: int) -> pa.Table:
    at = row.column_names.index("TX_DATETIME")
    return row.set_column(at, "TX_DATETIME", pa.array([time], pa.int64()).cast(pa.timestamp("us")))


def test_a_backfill_of_older_days_takes_nothing_away(repo: Path) -> None:
    output_of(repo, "feast", "materialize", "2018-01-01T00:00:00", "2018-05-11T00:00:00")
    with FeatureLayer(repo) as layer:
        newest = layer.prepare(RECENT).read({"customer_id": [1]}, layer.clock.now()).to_dict()
    said = output_of(repo, "feast", "materialize", "2018-01-01T00:00:00", "2018-04-15T00:00:00")
    assert "customer_recent: the online store is filled further already; left as it is" in said
    with FeatureLayer(repo) as layer:
        assert layer.prepare(RECENT).read({"customer_id": [1]}, layer.clock.now()).to_dict() == newest


def test_a_view_that_was_dropped_and_declared_again_starts_anew(repo: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
    services, fraud = repo / "services.py", repo / "fraud.py"
    texts = services.read_text(), fraud.read_text()
    services.write_text("")
    fraud.write_text(fraud.read_text().split("terminal_risk = ")[0])
    output_of(repo, "feast", "apply")
    services.write_text(texts[0])
    fraud.write_text(texts[1])
    output_of(repo, "feast", "apply")
    with FeatureLayer(repo) as layer:
        with pytest.raises(StoreNotReady, match="view 'terminal_risk': it was never filled"):
            layer.get_online_features(["terminal_risk:count_fraud_86400s"], {"terminal_id": [1]})
        assert layer.get_online_features(RECENT, {"customer_id": [1]}).to_dict()["last_transaction_time"] != [None]
