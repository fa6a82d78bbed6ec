"""The feature server over real HTTP: what it answers in each encoding, refuses, takes in, and says of itself."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pyarrow as pa
import pytest

from datasets.fraud_generator import FraudData
from feature_store.clock import ManualClock
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, Field, OnDemandView, PlainView, Service
from feature_store.layer import FeatureLayer
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, iso, micros, parse_time
from infra.redis.groups import SingleServer
from serving.encodings import ARROW, COMPACT
from serving.feature_requests import Limits
from tests.feature_servers import Served, serving, started
from tests.made_repos import make_repo
from tests.processes import BIN

OPENED = parse_time("2018-05-01T00:00:00Z")
#: What `fraud_v1` reads of a request, for some known customers and an unknown one.
ENTITIES = {
    "customer_id": [1, 2, 10**9],
    "terminal_id": [1, 2, 3],
    "TX_AMOUNT": [49.9, 10.0, 20],
    "TX_DATETIME": [iso(OPENED)] * 3,
}


@pytest.fixture(scope="module")
def filled(fraud_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose store is filled as of OPENED. Copy it before writing into it."""
    repo = Path(shutil.copytree(fraud_repo, tmp_path_factory.mktemp("filled") / "feature_repo"))
    with FeatureLayer(repo, clock=ManualClock(OPENED)) as layer:
        layer.bootstrap(until=OPENED)
        layer.store.backend.close()
    return repo


@pytest.fixture(scope="module")
def fraud(filled: Path) -> Iterator[Served]:
    """A server that nothing is pushed to and whose clock stands still."""
    with serving(filled, OPENED) as served:
        yield served


class TestRead:
    def test_a_service_is_answered_as_the_layer_does(self, fraud: Served) -> None:
        told = fraud.ask({"feature_service": "fraud_v1", "entities": ENTITIES}).json()
        answer = fraud.layer.prepare("fraud_v1").read(ENTITIES, OPENED)
        wanted = answer.to_dict()
        assert told["metadata"]["feature_names"] == list(wanted)
        for name, result in zip(wanted, told["results"], strict=True):
            assert result["values"] == [v // 1 if isinstance(v, bool) else seconds(v) for v in wanted[name]], name
            assert result["statuses"] == answer.statuses.get(name, ["PRESENT"] * 3), name
        statuses = dict(zip(wanted, (r["statuses"] for r in told["results"]), strict=True))
        assert statuses["mean_amount"] == ["PRESENT", "PRESENT", "NOT_FOUND"]
        assert statuses["sum_amount_2592000s"][2] == "NULL_VALUE"
        assert wanted["count_amount_2592000s"][0] > 0

    def test_references_and_full_names(self, fraud: Served) -> None:
        features = ["customer_profile:mean_amount", "customer_spend:count_amount_86400s", "customer_profile:std_amount"]
        body = {"features": features, "entities": {"customer_id": [1]}}
        assert list(fraud.columns(body)) == ["customer_id", "mean_amount", "count_amount_86400s", "std_amount"]
        named = fraud.columns({**body, "full_feature_names": True})
        assert list(named) == ["customer_id", *(ref.replace(":", "__") for ref in features)]
        assert list(named.values()) == list(fraud.columns(body).values())

    def test_a_service_goes_before_references_and_further_columns_are_left_out(self, fraud: Served) -> None:
        body = {"feature_service": "fraud_v1", "features": ["no:such"], "entities": {**ENTITIES, "driver": [1, 2, 3]}}
        assert fraud.columns(body) == fraud.columns({"feature_service": "fraud_v1", "entities": ENTITIES})

    def test_keys_may_come_as_text(self, fraud: Served) -> None:
        body = {"features": ["customer_profile:mean_amount"], "entities": {"customer_id": ["1", 2.0, None]}}
        told = fraud.ask(body).json()["results"]
        assert told[0]["values"] == [1, 2, None]
        assert told[1]["statuses"] == ["PRESENT", "PRESENT", "NOT_FOUND"]

    def test_as_of_one_time_or_one_a_row(self, fraud: Served) -> None:
        features, keys = ["customer_spend:sum_amount_3600s"], [1, 1, 2]
        handle = fraud.layer.prepare(features)
        times = [OPENED - 30 * SECOND, OPENED, OPENED + 30 * SECOND]
        for as_of, wanted in ((iso(times[0]), times[0]), ([iso(t) for t in times], times)):
            body = {"features": features, "entities": {"customer_id": keys}, "as_of": as_of}
            answer = handle.read({"customer_id": keys}, wanted).to_dict()
            assert fraud.columns(body) == {n: [seconds(v) for v in values] for n, values in answer.items()}
        late = {"features": features, "entities": {"customer_id": [1]}, "as_of": iso(OPENED + MINUTE + 1)}
        assert_refused(fraud.ask(late), 422, "as_of", "more than 1m ahead of the server's clock")
        early = {"features": features, "entities": {"customer_id": [1]}, "as_of": iso(OPENED - DAY)}
        answer = fraud.ask(early)
        assert (answer.status_code, answer.json()["error"], answer.json()["view"]) == (
            409,
            "NotExactOnline",
            "customer_spend",
        )

    def test_the_encodings_say_the_same(self, fraud: Served) -> None:
        body = {"feature_service": "fraud_v1", "entities": ENTITIES}
        columns = fraud.columns(body)
        compact = fraud.ask(body, COMPACT)
        assert compact.headers["content-type"] == COMPACT
        told = compact.json()
        assert told["statuses"] == {"customer_profile": ["PRESENT", "PRESENT", "NOT_FOUND"]}
        arrow = fraud.ask(body, ARROW)
        assert arrow.headers["content-type"] == ARROW
        table = pa.ipc.open_stream(arrow.content).read_all()
        assert table["customer_profile@status"].to_pylist() == told["statuses"]["customer_profile"]
        assert table.schema.field("last_transaction_time").type == pa.timestamp("us", "UTC")
        for name, values in columns.items():
            assert [seconds(v) for v in table[name].to_pylist()] == values, name
            if name != "last_transaction_time":
                assert told["columns"][name] == values, name
        assert [t and micros(dt.datetime.fromisoformat(t)) for t in told["columns"]["last_transaction_time"]] == [
            t and micros(t) for t in table["last_transaction_time"].to_pylist()
        ]

    def test_the_views_metadata_is_told_to_who_asks(self, fraud: Served) -> None:
        body = {"features": ["customer_profile:mean_amount"], "entities": {"customer_id": [1]}}
        assert "feature_view_metadata" not in fraud.ask(body).json()["metadata"]
        told = fraud.ask({**body, "include_feature_view_version_metadata": True}).json()["metadata"]
        view = fraud.layer.definitions.view("customer_profile")
        assert told["feature_view_metadata"] == [{"name": "customer_profile", "fingerprint": view.fingerprint}]

    def test_no_rows_are_an_answer(self, fraud: Served) -> None:
        body = {"features": ["customer_profile:mean_amount"], "entities": {"customer_id": []}}
        assert fraud.ask(body).json()["results"] == [{"values": [], "statuses": [], "event_timestamps": []}] * 2
        assert pa.ipc.open_stream(fraud.ask(body, ARROW).content).read_all().num_rows == 0

    def test_many_at_once_get_what_one_gets(self, fraud: Served) -> None:
        # Those for the same features are read together; a bad one among them is refused alone.
        plain = ["customer_profile:mean_amount", "customer_profile:std_amount"]
        asked = [{"features": plain, "entities": {"customer_id": [k, k + 1]}} for k in range(40)]
        asked += [{"features": plain[:1], "entities": {"customer_id": [k]}} for k in range(20)]
        asked += [{"features": plain, "entities": {"customer_id": bad}} for bad in (["x"], [2**70], [1.5], [True])]
        asked += [{"feature_service": "fraud_v1", "entities": ENTITIES}]
        alone = [(r.status_code, r.json()) for r in map(fraud.ask, asked)]
        assert [status for status, _ in alone] == [200] * 60 + [422] * 4 + [200]

        async def together() -> list[tuple[int, Any]]:
            limits = httpx.Limits(max_connections=len(asked))
            async with httpx.AsyncClient(base_url=fraud.url, trust_env=False, limits=limits, timeout=30) as client:
                told = await asyncio.gather(*(client.post("/get-online-features", json=body) for body in asked * 3))
            return [(answer.status_code, answer.json()) for answer in told]

        assert asyncio.run(together()) == alone * 3


def seconds(value: Any) -> Any:
    """A value as Feast's JSON has it."""
    return int(value.timestamp()) if isinstance(value, dt.datetime) else value


def assert_refused(answer: httpx.Response, status: int, where: str | None, reason: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.get("field") == where
    assert reason in body["message"]
    assert isinstance(body["retryable"], bool)


KNOWN = {"features": ["customer_profile:mean_amount"], "entities": {"customer_id": [1]}}
REFUSED: dict[str, tuple[bytes | dict[str, Any], int, str | None, str]] = {
    "empty": (b"", 400, None, "is not JSON"),
    "no JSON": (b"customer=1", 400, None, "is not JSON"),
    "cut off": (b'{"entities": {"customer_id": [1', 400, None, "is not JSON"),
    "more behind it": (orjson.dumps(KNOWN) + b"x", 400, None, "is not JSON"),
    "NaN": (b'{"features": ["a:b"], "entities": {"customer_id": [NaN]}}', 400, None, "is not JSON"),
    "not UTF-8": (b'{"features": ["a:b"], "entities": {"customer_id": ["\xff"]}}', 400, None, "is not JSON"),
    "half a character": (b'{"features": ["a:b"], "entities": {"c": ["\\ud800"]}}', 400, None, "is not JSON"),
    "deep": (b'{"entities": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 422, "entities", "got `array`"),
    "deep elsewhere": (b'{"features": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, "nested too deep"),
    "a list": (b"[1]", 422, "body", "expected `object`, got `array`"),
    "no entities": ({"features": ["customer_profile:mean_amount"]}, 422, "entities", "is missing"),
    "entities as a list": ({**KNOWN, "entities": [{"customer_id": 1}]}, 422, "entities", "got `array`"),
    "one value": ({**KNOWN, "entities": {"customer_id": 1}}, 422, "entities", "expected `array`, got `int`"),
    "an object as key": ({**KNOWN, "entities": {"customer_id": [{"a": 1}]}}, 422, "entities", "got `object`"),
    "no features": ({"entities": {"customer_id": [1]}}, 422, "features", "is empty"),
    "features as text": ({**KNOWN, "features": "customer_profile:mean_amount"}, 422, "features", "got `str`"),
    "features of numbers": ({**KNOWN, "features": [1]}, 422, "features", "expected `str`, got `int`"),
    "a long name": ({**KNOWN, "features": ["x" * 501]}, 422, "features", "length <= 500"),
    "an unknown field": ({**KNOWN, "as_off": "2018-05-01"}, 422, "as_off", "is no field of a request"),
    "a number as time": ({**KNOWN, "as_of": 1525132800}, 422, "as_of", "got `int`"),
    "no time": ({**KNOWN, "as_of": "yesterday"}, 422, "as_of", "is no time"),
    "times of other rows": ({**KNOWN, "as_of": ["2018-05-01"] * 2}, 422, "as_of", "has 2 times for 1 rows"),
    "a flag as text": ({**KNOWN, "full_feature_names": "yes"}, 422, "full_feature_names", "got `str`"),
    "an unknown service": (
        {"feature_service": "fraud_v9", "entities": {}},
        404,
        None,
        "there are: fraud_book, fraud_v1",
    ),
    "an unknown view": ({**KNOWN, "features": ["customers:age"]}, 404, None, "customer_profile"),
    "an unknown feature": ({**KNOWN, "features": ["customer_profile:age"]}, 404, None, "mean_amount"),
    "no reference": ({**KNOWN, "features": ["mean_amount"]}, 404, None, "of the form view:feature"),
    "a feature twice": ({**KNOWN, "features": KNOWN["features"] * 2}, 422, "mean_amount", "is the name of two"),
    "history only": (
        {**KNOWN, "features": ["book_customer:CUSTOMER_ID_NB_TX_1DAY_WINDOW"]},
        422,
        "book_customer",
        "online=False",
    ),
    "a missing key": ({**KNOWN, "entities": {}}, 422, "customer_id", "is missing"),
    "another key": ({**KNOWN, "entities": {"terminal_id": [1]}}, 422, "customer_id", "is missing"),
    "a key that is no number": ({**KNOWN, "entities": {"customer_id": ["one"]}}, 422, "customer_id", "read as Int64"),
    "a key beyond 64 bits": ({**KNOWN, "entities": {"customer_id": [2**63]}}, 422, "customer_id", "read as Int64"),
    "a list as key": ({**KNOWN, "entities": {"customer_id": [[1]]}}, 422, "customer_id", "read as Int64"),
    "columns of unequal length": (
        {**KNOWN, "entities": {"customer_id": [1], "x": [1, 2]}},
        422,
        "customer_id",
        "one length",
    ),
    "a missing request value": (
        {"feature_service": "fraud_v1", "entities": {**ENTITIES, "TX_AMOUNT": ["x", "y", "z"]}},
        422,
        "TX_AMOUNT",
        "does not read as Float64",
    ),
}


class TestRefusal:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_cannot_be_answered_is_refused_with_a_reason(self, fraud: Served, case: str) -> None:
        body, status, where, reason = REFUSED[case]
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"content-type": "application/json"}
        assert_refused(
            fraud.client.post("/get-online-features", content=content, headers=headers), status, where, reason
        )

    def test_a_function_that_fails_on_a_requests_values_names_its_view(self, fraud: Served) -> None:
        # The function of transaction_context takes the time's weekday.
        answer = fraud.ask({"feature_service": "fraud_v1", "entities": {**ENTITIES, "TX_DATETIME": [None] * 3}})
        assert (answer.status_code, answer.json()["error"], answer.json()["view"]) == (
            422,
            "FunctionFailed",
            "transaction_context",
        )

    def test_media_types_methods_and_paths(self, fraud: Served) -> None:
        for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            answer = fraud.client.post("/get-online-features", content=orjson.dumps(KNOWN), headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (415, "WrongMediaType")
        headers = {"content-type": "application/json; charset=utf-8"}
        assert fraud.client.post("/get-online-features", content=orjson.dumps(KNOWN), headers=headers).is_success
        for path, allowed in (("/get-online-features", "POST"), ("/push", "POST")):
            answer = fraud.client.get(path)
            assert (answer.status_code, answer.headers["allow"], answer.json()["error"]) == (405, allowed, "NotServed")
        assert fraud.client.delete("/health").headers["allow"] == "GET"
        assert fraud.client.head("/health").status_code == 200
        assert fraud.client.get("/features").json()["message"] == "Not Found."

    def test_limits_of_rows_and_bytes(self, filled: Path, tmp_path: Path) -> None:
        repo = shutil.copytree(filled, tmp_path / "feature_repo")
        with serving(repo, OPENED, limits=Limits(body=2_000, entities=3)) as served:
            ask = {**KNOWN, "entities": {"customer_id": [1, 2, 3]}}
            assert served.ask(ask).is_success
            ask["entities"]["customer_id"].append(4)
            assert_refused(served.ask(ask), 422, "entities", "has 4 rows; one request may ask for 3")
            for path in ("/get-online-features", "/push", "/write-to-online-store"):
                headers = {"content-type": "application/json"}
                answer = served.client.post(path, content=b" " * 2_001, headers=headers)
                assert (answer.status_code, answer.json()["error"]) == (413, "BodyTooLarge")
                # In parts, without a length that was told before.
                answer = served.client.post(path, content=iter([b" " * 500] * 5), headers=headers)
                assert answer.status_code == 413
            assert served.ask({**KNOWN, "entities": {"customer_id": [1]}}).is_success

    def test_a_huge_batch_within_the_limits_is_answered(self, fraud: Served) -> None:
        told = fraud.columns({**KNOWN, "entities": {"customer_id": list(range(10_000))}})
        assert len(told["mean_amount"]) == 10_000
        wanted = fraud.layer.prepare(KNOWN["features"]).read({"customer_id": list(range(10_000))}, OPENED).to_dict()
        assert told == wanted
        assert_refused(fraud.ask({**KNOWN, "entities": {"customer_id": [1] * 10_001}}), 422, "entities", "10,001 rows")


#: A view of all types that rows can be written to, and what to write; its source calls one column otherwise.
STOCK = PlainView(
    name="stock",
    keys=(Field("shop", ValueType.BYTES), Field("sku", ValueType.STRING)),
    features=(
        Field("codes", ValueType.BYTES_LIST),
        Field("counted_at", ValueType.TIMESTAMP),
        Field("open", ValueType.BOOL),
        Field("photo", ValueType.BYTES),
        Field("price", ValueType.FLOAT32),
        Field("prices", ValueType.FLOAT64_LIST),
        Field("quantity", ValueType.INT64),
    ),
    source=Source(
        name="stock_file",
        path="stock.parquet",
        timestamp_field="at",
        created_field="made",
        field_mapping={"qty": "quantity"},
        push_source="stock_rows",
    ),
)
NOW = parse_time("2024-05-01T12:00:00Z")
ROW = {
    "shop": [base64.b64encode(b"\x00\xff").decode()] * 2,
    "sku": ["a", "é"],
    "at": ["2024-05-01T10:00:00.5Z", "2024-05-01T11:00:00"],
    "made": [None, "2024-05-01T11:30:00Z"],
    "codes": [[], [base64.b64encode(b"x").decode()]],
    "counted_at": [1_714_550_400, "2024-05-01T08:00:00Z"],
    "open": [True, None],
    "photo": [None, ""],
    "price": [0.5, "NaN"],
    "prices": [[1, 2.5], None],
    "quantity": [2**53 + 1, None],
}
ASKED = {"features": [f"stock:{f.name}" for f in STOCK.features], "entities": {n: ROW[n] for n in ("shop", "sku")}}


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Served]:
    with serving(make_repo(tmp_path / "repo", [STOCK]), NOW) as served:
        yield served


class TestWriting:
    def test_rows_of_every_type_are_read_back_as_they_were_written(self, stock: Served) -> None:
        body = {"feature_view_name": "stock", "df": ROW, "allow_registry_cache": False}
        answer = stock.client.post("/write-to-online-store", json=body)
        assert (answer.status_code, answer.json()) == (200, {"view": "stock", "entities": 2})
        told = stock.columns(ASKED)
        wanted = {name: ROW[name] for name in ASKED["entities"] | {f.name: 0 for f in STOCK.features}}
        assert told == {**wanted, "counted_at": [1_714_550_400, 1_714_550_400]}
        times = stock.ask(ASKED).json()["results"][-1]["event_timestamps"]
        assert times == ["2024-05-01T10:00:00.500Z", "2024-05-01T11:00:00Z"]
        # What was read can be written again, by the names of Feast's remote client.
        again = {**told, "event_timestamp": ["2024-05-01T11:30:00"] * 2, "created": [None, None]}
        assert stock.client.post("/write-to-online-store", json={"feature_view_name": "stock", "df": again}).is_success
        assert stock.columns(ASKED) == told
        assert set(stock.ask(ASKED).json()["results"][-1]["event_timestamps"]) == {"2024-05-01T11:30:00Z"}

    def test_of_an_entity_the_newer_event_time_stays(self, stock: Served) -> None:
        for at, quantity in (("2024-05-01T10:00:00Z", 1), ("2024-05-01T09:00:00Z", 2), ("2024-05-01T10:00:01Z", 3)):
            df = {name: values[:1] for name, values in ROW.items()} | {"at": [at], "qty": [quantity]}
            del df["quantity"]
            assert stock.client.post("/push", json={"push_source_name": "stock_rows", "df": df}).json() == {
                "views": {"stock": {"entities": 1}}
            }
        assert stock.columns(ASKED)["quantity"] == [3, None]

    @pytest.mark.parametrize(
        ("column", "values", "reason"),
        [
            ("sku", None, "is missing; view 'stock' needs it"),
            ("at", None, "is missing; view 'stock' needs it"),
            ("quantity", None, "is missing"),
            ("sku", [None, "a"], "null"),
            ("at", ["2024-05-01T10:00:00Z", None], "null"),
            ("at", ["soon", "2024-05-01T10:00:00Z"], "is no time in row 0"),
            ("at", [10**15, 0], "is no time in row 0"),
            ("counted_at", [True, None], "is no time in row 0"),
            ("photo", ["%", None], "is no base64 text in row 0"),
            ("photo", [1, None], "is no base64 text in row 0"),
            ("shop", ["é", None], "is no base64 text in row 0"),
            ("price", ["cheap", None], "does not read as Float32"),
            ("price", [None, True], "is a boolean in row 1"),
            ("quantity", [1.5, None], "is a fraction in row 0"),
            ("quantity", [2**63, None], "does not read as Int64"),
            ("quantity", [True, None], "does not read as Int64"),
            ("open", [1, None], "does not read as Bool"),
            ("codes", ["x", None], "does not read as Array(Bytes)"),
            ("prices", [[[1]], None], "does not read as Array(Float64)"),
            ("sku", [["a"], "b"], "does not read as String"),
            ("sku", ["a"], "has 1 values where the first column has 2"),
        ],
    )
    def test_a_bad_column_is_refused_by_both_routes(
        self, stock: Served, column: str, values: list[Any] | None, reason: str
    ) -> None:
        df = {name: held for name, held in {**ROW, column: values}.items() if held is not None}
        for path, named in (("/write-to-online-store", "feature_view_name"), ("/push", "push_source_name")):
            name = "stock" if named == "feature_view_name" else "stock_rows"
            assert_refused(stock.client.post(path, json={named: name, "df": df}), 422, column, reason)
        assert not stock.layer.store.holds(STOCK)

    def test_what_is_unknown_or_windowed_takes_no_rows(self, fraud: Served) -> None:
        def write(view: str) -> httpx.Response:
            return fraud.client.post("/write-to-online-store", json={"feature_view_name": view, "df": {"a": [1]}})

        assert_refused(write("customer_spend"), 422, "customer_spend", "push the raw events")
        assert_refused(write("customers"), 404, None, "customer_profile")
        assert_refused(write("transaction_context"), 404, None, "customer_profile")
        answer = fraud.client.post("/push", json={"push_source_name": "payments", "df": {"a": [1]}})
        assert_refused(answer, 404, None, "label_events, transaction_events")
        answer = fraud.client.post("/write-to-online-store", json={"feature_view_name": "stock", "df": {}, "x": 1})
        assert_refused(answer, 422, "x", "not permitted")

    def test_pushed_events_are_in_the_next_read(self, filled: Path, fraud_data: FraudData, tmp_path: Path) -> None:
        with serving(Path(shutil.copytree(filled, tmp_path / "feature_repo")), OPENED) as served:
            served.clock.advance(HOUR)
            ask = {"features": ["customer_spend:count_amount_86400s"], "entities": {"customer_id": [1]}}
            before = served.columns(ask)["count_amount_86400s"][0]
            event = {"CUSTOMER_ID": [1], "TERMINAL_ID": [1], "TX_AMOUNT": [9.5], "TX_DATETIME": [iso(OPENED + MINUTE)]}
            body = {"push_source_name": "transaction_events", "df": event, "offset": 7}
            for applied, repeated in ((1, 0), (0, 1)):
                told = served.client.post("/push", json=body).json()["views"]["customer_spend"]
                assert told == {"applied": applied, "repeated": repeated, "next": 8, "erased": 0}
            assert served.columns(ask)["count_amount_86400s"][0] == before + 1


class TestHealth:
    def test_views_that_are_not_ready_are_named_and_never_read_as_empty(self, fraud_repo: Path, tmp_path: Path) -> None:
        with serving(Path(shutil.copytree(fraud_repo, tmp_path / "feature_repo")), OPENED) as served:
            health = served.client.get("/health")
            views = ["customer_profile", "customer_recent", "customer_spend", "terminal_risk"]
            assert (health.status_code, health.json()["status"]) == (503, "not ready")
            assert health.json()["not_ready"] == dict.fromkeys(views, "it was never filled")
            answer = served.ask(KNOWN)
            assert (answer.status_code, answer.json()["error"], answer.json()["view"]) == (
                503,
                "StoreNotReady",
                "customer_profile",
            )
            assert answer.json()["retryable"] is True
            served.layer.bootstrap(until=OPENED)
            assert served.client.get("/health").json() == {
                "status": "ready",
                "not_ready": {},
                "waiting": [],
                "new": [],
                "definitions": served.layer.definitions.stamp,
            }
            assert served.ask(KNOWN).is_success

    def test_a_store_that_cannot_be_read_is_our_fault(
        self, filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serving(Path(shutil.copytree(filled, tmp_path / "feature_repo")), OPENED) as served:
            with served.layer.store.backend._environment().begin(write=True) as transaction:
                for key in [key for key, value in transaction.cursor() if value.startswith(b"IP")]:
                    transaction.put(key, b"garbage")
            answer = served.ask(KNOWN)
            assert (answer.status_code, answer.json()["error"], answer.json()["retryable"]) == (
                500,
                "CorruptState",
                False,
            )
            assert "/get-online-features failed" in caplog.text

    def test_metrics(self, filled: Path, tmp_path: Path) -> None:
        with serving(Path(shutil.copytree(filled, tmp_path / "feature_repo")), OPENED) as served:
            served.ask({**KNOWN, "entities": {"customer_id": [1, 2, 10**9]}})
            served.ask({**KNOWN, "features": ["a:b"]})
            served.client.get("/nothing/1")
            served.client.get("/nothing/2")
            text = served.client.get("/metrics")
            assert text.headers["content-type"].startswith("text/plain")
            lines = text.text.splitlines()
            for line in (
                'isochron_http_requests_total{route="/get-online-features",status="200"} 1.0',
                'isochron_http_requests_total{route="/get-online-features",status="404"} 1.0',
                'isochron_http_requests_total{route="other",status="404"} 2.0',
                "isochron_read_seconds_count 1.0",
                "isochron_rows_read_total 3.0",
                'isochron_rows_unknown_total{view="customer_profile"} 1.0',
                'isochron_refused_requests_total{reason="UnknownName",route="/get-online-features"} 1.0',
                f'isochron_definitions_info{{project="fraud",stamp="{served.layer.definitions.stamp}"}} 1.0',
                "isochron_views_waiting 0.0",
            ):
                assert line in lines, text.text


class TestRedis:
    def test_redis_answers_as_the_embedded_store(self, redis_single: SingleServer, tmp_path: Path) -> None:
        redis_single.flush()
        online = {"backend": "redis", "connection_string": redis_single.connection_string}
        with serving(make_repo(tmp_path / "redis", [STOCK], online=online), NOW) as remote:
            with serving(make_repo(tmp_path / "embedded", [STOCK]), NOW) as embedded:
                for served in (remote, embedded):
                    body = {"feature_view_name": "stock", "df": ROW}
                    assert served.client.post("/write-to-online-store", json=body).is_success
                for _ in range(2):  # the first read may go another way than the next ones
                    assert remote.ask(ASKED).json() == embedded.ask(ASKED).json()
                assert remote.client.get("/health").json() == embedded.client.get("/health").json()

            async def together() -> list[Any]:
                async with httpx.AsyncClient(base_url=remote.url, trust_env=False, timeout=30) as client:
                    asked = [client.post("/get-online-features", json=ASKED) for _ in range(50)]
                    return [answer.json() for answer in await asyncio.gather(*asked)]

            assert asyncio.run(together()) == [remote.ask(ASKED).json()] * 50


class TestProcess:
    def test_it_starts_from_the_compiled_definitions_without_what_it_does_not_need(
        self, filled: Path, tmp_path: Path
    ) -> None:
        program = """
import sys
from pathlib import Path
from feature_store.clock import SystemClock
from feature_store.layer import FeatureLayer
import feature_store.cli, serving.start
from serving.features import FeatureServer
from serving.server import running
import httpx
layer = FeatureLayer(sys.argv[1])
with running(FeatureServer(layer, SystemClock())) as url, httpx.Client(base_url=url, trust_env=False) as client:
    assert client.get("/health").status_code == 200, client.get("/health").text
    body = {"features": ["customer_profile:mean_amount"], "entities": {"customer_id": [1]}}
    assert client.post("/get-online-features", json=body).status_code == 200
unwanted = {"feast", "duckdb", "pandas", "sklearn", "lightgbm", "pyspark", "fastapi", "pydantic", "numba"}
print(sorted(unwanted & set(sys.modules)))
"""
        repo = shutil.copytree(filled, tmp_path / "feature_repo")
        ran = subprocess.run([sys.executable, "-c", program, str(repo)], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr

    def test_it_answers_within_two_seconds_of_processor_time(self, filled: Path, tmp_path: Path) -> None:
        # Of processor time, for other tests may keep this machine busy: an import of Feast alone takes more than twice.
        with started(Path(shutil.copytree(filled, tmp_path / "feature_repo")), tmp_path) as server:
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
            words = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
            assert (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") < 2.0

    def test_sigterm_answers_what_is_under_way(self, filled: Path, tmp_path: Path) -> None:
        repo = Path(shutil.copytree(filled, tmp_path / "feature_repo"))
        with started(repo, tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)) as plug:
            body = orjson.dumps(KNOWN)
            head = "POST /get-online-features HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\n\r\n"
            plug.sendall(head.encode() + body[:10])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            plug.sendall(body[10:])
            answer = b""
            while part := plug.recv(65_536):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["metadata"]["feature_names"] == [
                "customer_id",
                "mean_amount",
            ]
            assert server.process.wait(10) == 0
            assert "Traceback" not in server.log.read_text()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health", trust_env=False)

    def test_a_taken_port_or_no_repository_is_said_in_a_line(self, filled: Path, fraud: Served, tmp_path: Path) -> None:
        def failed(*options: str) -> str:
            command = [str(BIN / "isochron"), "serve-features", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
            assert done.returncode == 1, done.stdout + done.stderr
            return done.stderr.strip().splitlines()[-1]

        port = str(httpx.URL(fraud.url).port)
        assert failed("--repo", str(filled), "--port", port).startswith(f"isochron: no server on 127.0.0.1:{port}")
        assert failed("--repo", str(tmp_path)).startswith("isochron: ")

    def test_a_client_that_goes_away_harms_nobody(self, fraud: Served, caplog: pytest.LogCaptureFixture) -> None:
        port = httpx.URL(fraud.url).port
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as plug:
                plug.sendall(b"POST /get-online-features HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
                plug.sendall(b"content-length: 1000\r\n\r\n{")
        assert fraud.ask(KNOWN).is_success
        assert "Exception in ASGI" not in caplog.text


def test_rows_are_told_what_a_function_makes_of_them(tmp_path: Path) -> None:
    # A function is given the rows of one request only, however many come at once.
    import dill

    def count(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"rows": [len(inputs["x"])] * len(inputs["x"])}

    view = OnDemandView(
        name="counted",
        mode="python",
        inputs=(),
        request=(Field("x", ValueType.INT64),),
        features=(Field("rows", ValueType.INT64),),
        body=dill.dumps(count, recurse=True),
        text="",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )
    service = Service("counting", (FeatureRef(view="counted", feature="rows", shown_as="counted"),))
    with serving(make_repo(tmp_path / "repo", [view], [service]), NOW) as served:
        told: list[list[int]] = []

        def ask(rows: int) -> None:
            told.append(served.columns({"feature_service": "counting", "entities": {"x": [0] * rows}})["rows"])

        threads = [threading.Thread(target=ask, args=(rows,)) for rows in (1, 2, 3, 4) * 5]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == sorted([rows] * rows for rows in (1, 2, 3, 4) * 5)
