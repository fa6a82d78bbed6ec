"""The serving app over real HTTP, on a repository that Feast applied: what it answers, logs, takes in and refuses."""

from __future__ import annotations

import datetime as dt
import math
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.fraud_generator import FraudData
from feature_store.clock import ManualClock
from feature_store.definitions.view import OnDemandView
from feature_store.errors import CorruptState, ModelError, UnknownName
from feature_store.layer import FeatureLayer
from feature_store.retrieval.on_demand import OnDemandError
from feature_store.stores.online.backend import Write
from feature_store.stores.online.keys import Keyspace
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, iso, micros, moment, parse_time
from models.booster import FraudModel, feature_matrix, load, train
from serving.app import create_app
from serving.decision_log import (
    CorruptDecision,
    Decision,
    DecisionLog,
    DecisionLogError,
    DecisionNotLogged,
    decode_value,
    encode_value,
    read_decisions,
)
from serving.errors import body_of, status_of
from serving.schemas import PushResponse, ScoreResponse
from serving.server import ServerNotStarted, running

#: The data begins 30 days before: the longest window is full. Events before OPENED are bootstrapped, later ones pushed.
OPENED = parse_time("2018-05-01T00:00:00Z")
TRANSACTIONS, LABELS = "transaction_events", "label_events"
DELAY = 7 * DAY
KNOWN = {"customer_id": 1, "terminal_id": 1, "amount": 49.9}
NOW = iso(OPENED)


@dataclass
class Served:
    """A running app and what is behind it."""

    client: httpx.Client
    url: str
    layer: FeatureLayer
    clock: ManualClock
    log: DecisionLog

    def score(self, **request: Any) -> httpx.Response:
        return self.client.post("/fraud/score", json={**KNOWN, "event_time": iso(self.clock.now()), **request})

    def push(self, rows: pa.Table, source: str = TRANSACTIONS, **more: Any) -> httpx.Response:
        df = {n: [iso(micros(v)) if isinstance(v, dt.datetime) else v for v in rows[n].to_pylist()] for n in RAW}
        return self.client.post("/push", json={"push_source_name": source, "df": df, **more})

    def decisions(self) -> list[Decision]:
        return list(read_decisions(self.log.path))


RAW = ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT", "TX_FRAUD")


@pytest.fixture(scope="module")
def model(fraud_repo: Path, fraud_data: FraudData, tmp_path_factory: pytest.TempPathFactory) -> FraudModel:
    """A model trained on the numbers of `fraud_v1` of ten days, as a server loads it."""
    with FeatureLayer(fraud_repo, clock=ManualClock(OPENED)) as layer:
        spine = spine_of(between(fraud_data.transactions, OPENED - 10 * DAY, OPENED))
        features = layer.get_historical_features(spine, "fraud_v1").to_arrow()
        handle = layer.prepare("fraud_v1")
    names = [n for n in handle.feature_names if pa.types.is_integer(t := features[n].type) or pa.types.is_floating(t)]
    labels = between(fraud_data.transactions, OPENED - 10 * DAY, OPENED)["TX_FRAUD"].to_numpy()
    folder = tmp_path_factory.mktemp("model")
    train(features, labels, names, fingerprint=handle.fingerprint).save(folder, {}, moment(OPENED))
    return load(folder)


def between(transactions: pa.Table, start: int, end: int) -> pa.Table:
    times = pc.cast(transactions["TX_DATETIME"], pa.int64())
    return transactions.filter(pc.and_(pc.greater_equal(times, start), pc.less(times, end)))


def spine_of(transactions: pa.Table) -> pa.Table:
    return pa.table(
        {
            "event_timestamp": transactions["TX_DATETIME"],
            "customer_id": transactions["CUSTOMER_ID"],
            "terminal_id": transactions["TERMINAL_ID"],
            "TX_AMOUNT": transactions["TX_AMOUNT"],
            "TX_DATETIME": transactions["TX_DATETIME"],
        }
    )


@contextmanager
def serving(repo: Path, model: FraudModel, folder: Path, bootstrapped: bool = True) -> Iterator[Served]:
    """An app on a copy of the repository, its clock at OPENED."""
    copy = shutil.copytree(repo, folder / "feature_repo")
    clock, log = ManualClock(OPENED), DecisionLog(folder / "log" / "decisions.jsonl")
    with ExitStack() as stack:
        layer = stack.enter_context(FeatureLayer(copy, clock=clock))
        stack.callback(layer.store.backend.close)
        if bootstrapped:
            layer.bootstrap(until=OPENED)
        url = stack.enter_context(running(create_app(layer, model, log, clock, code_commit="c0ffee")))
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False))
        yield Served(client, url, layer, clock, log)


@pytest.fixture
def served(fraud_repo: Path, model: FraudModel, tmp_path: Path) -> Iterator[Served]:
    with serving(fraud_repo, model, tmp_path) as app:
        yield app


@pytest.fixture(scope="module")
def refusing(fraud_repo: Path, model: FraudModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An app that nothing is pushed to and whose clock stands still."""
    with serving(fraud_repo, model, tmp_path_factory.mktemp("refusing")) as app:
        yield app


class TestScore:
    def test_logged_features_are_those_of_history_while_events_stream_in(
        self, served: Served, fraud_data: FraudData, model: FraudModel
    ) -> None:
        # Each transaction is scored at its own time, then pushed; a label is pushed once it is seven days old:
        #
        #   ...bootstrapped | score push  score push   score ...
        #             OPENED     ^ labels of 7 days before it go first
        rows = between(fraud_data.transactions, OPENED, OPENED + DAY)
        labels_until = OPENED - DELAY
        for at in range(rows.num_rows):
            row = rows.slice(at, 1)
            time = micros(row["TX_DATETIME"][0].as_py())
            served.clock.set(time)
            due = between(fraud_data.transactions, labels_until, time - DELAY)
            if due.num_rows:
                assert served.push(due, LABELS).status_code == 200
                labels_until = time - DELAY
            answer = served.score(
                transaction_id=row["TRANSACTION_ID"][0].as_py(),
                customer_id=row["CUSTOMER_ID"][0].as_py(),
                terminal_id=row["TERMINAL_ID"][0].as_py(),
                amount=row["TX_AMOUNT"][0].as_py(),
                event_time=iso(time),
            )
            assert answer.status_code == 200, answer.text
            assert served.push(row, offset=at).status_code == 200

        decisions = served.decisions()
        assert [d.request["transaction_id"] for d in decisions] == rows["TRANSACTION_ID"].to_pylist()
        expected = served.layer.get_historical_features(spine_of(rows), "fraud_v1").to_arrow()
        names = served.layer.prepare("fraud_v1").feature_names
        differences = [
            (decision.request["transaction_id"], name, decision.features[name], value)
            for at, decision in enumerate(decisions)
            for name in names
            if not same(name, decision.features[name], value := expected[name][at].as_py())
        ]
        assert differences == []
        assert [list(decision.features) for decision in decisions] == [names] * len(decisions)
        # Not all windows were empty, and the events that were pushed are in the positions.
        assert sum(decision.features["count_amount_86400s"] for decision in decisions) > len(decisions)
        assert decisions[-1].positions["customer_spend"].keys() <= {0}
        assert any(d.positions["customer_spend"] for d in decisions)

    def test_the_score_is_the_models_on_the_logged_features_bit_for_bit(
        self, refusing: Served, model: FraudModel
    ) -> None:
        answer = ScoreResponse.model_validate_json(refusing.score(transaction_id=7).content)
        decision = refusing.decisions()[-1]
        logged = pa.table({name: [decision.features[name]] for name in model.feature_names})
        assert float(model.predict(feature_matrix(logged, model.feature_names))[0]) == decision.score == answer.score
        assert 0 < answer.score < 1

    def test_an_answer_names_its_decision_and_the_decision_says_what_it_was_made_from(
        self, refusing: Served, model: FraudModel
    ) -> None:
        answer = ScoreResponse.model_validate_json(refusing.score(transaction_id=8, amount=20).content)
        decision = next(d for d in refusing.decisions() if d.decision_id == answer.decision_id)
        assert (answer.transaction_id, answer.as_of, answer.warnings) == (8, NOW, [])
        assert answer.model_version == decision.model_version == model.version
        assert answer.fingerprint == decision.fingerprint == refusing.layer.prepare("fraud_v1").fingerprint
        assert decision.as_of == decision.logged_at == OPENED
        assert decision.request == {"transaction_id": 8, **KNOWN, "amount": 20.0, "event_time": moment(OPENED)}
        assert (decision.service, decision.code_commit, decision.warnings) == ("fraud_v1", "c0ffee", ())
        assert set(decision.unknown.values()) == {False}
        assert decision.positions == {"customer_spend": {}, "customer_recent": {}, "terminal_risk": {}}
        assert decision.statuses["mean_amount"] == "PRESENT"
        assert isinstance(decision.features["last_amounts"], list)
        assert decision.features["last_transaction_time"].tzinfo is not None

    def test_times_with_an_offset_and_without_are_the_same_moment(self, refusing: Served) -> None:
        texts = ("2018-05-01T00:00:00Z", "2018-05-01T02:00:00+02:00", "2018-05-01T00:00:00", "2018-05-01 00:00:00.000")
        assert [refusing.score(event_time=text).json()["as_of"] for text in texts] == [NOW] * 4

    def test_unknown_entities_are_scored_on_empty_windows_and_said_so(self, refusing: Served) -> None:
        answer = refusing.score(customer_id=10**9)
        assert answer.status_code == 200
        assert answer.json()["warnings"] == [
            "customer_id is unknown: no view holds anything of it, so it was scored on empty windows"
        ]
        decision = refusing.decisions()[-1]
        assert decision.features["count_amount_2592000s"] == 0
        assert decision.features["sum_amount_2592000s"] is None
        assert decision.features["last_amounts"] == []
        assert decision.statuses["mean_amount"] == "NOT_FOUND"
        assert decision.unknown == {
            "customer_spend": True,
            "customer_recent": True,
            "customer_profile": True,
            "terminal_risk": False,
        }
        both = refusing.score(customer_id=-(2**63), terminal_id=2**63 - 1).json()["warnings"]
        assert [text.split()[0] for text in both] == ["customer_id", "terminal_id"]

    def test_the_near_future_is_scored_and_the_far_one_refused(self, refusing: Served) -> None:
        assert refusing.score(event_time=iso(OPENED + MINUTE)).status_code == 200
        answer = refusing.score(event_time=iso(OPENED + MINUTE + 1))
        assert (answer.status_code, answer.json()["field"]) == (422, "event_time")
        assert "more than 1m ahead of the server's clock" in answer.json()["message"]

    def test_a_time_that_only_history_could_answer_is_refused(self, refusing: Served) -> None:
        answer = refusing.score(event_time=iso(OPENED - DAY))
        assert answer.status_code == 409
        assert answer.json()["error"] == "NotExactOnline"
        assert answer.json()["view"] in ("customer_spend", "customer_recent", "terminal_risk")
        assert answer.json()["retryable"] is False

    def test_many_clients_at_once_get_the_score_that_one_gets(self, refusing: Served) -> None:
        def ask(customer: int) -> None:
            response = httpx.post(
                f"{refusing.url}/fraud/score",
                json={**KNOWN, "customer_id": customer, "event_time": NOW},
                trust_env=False,
            )
            scores[customer] = response.json()["score"]

        scores: dict[int, float] = {}
        before = len(refusing.decisions())
        threads = [threading.Thread(target=ask, args=(customer,)) for customer in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scores == {customer: refusing.score(customer_id=customer).json()["score"] for customer in range(16)}
        assert len(refusing.decisions()) == before + 32


SCORE = {**KNOWN, "event_time": NOW}
BAD_TRANSACTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "text amount": ({"amount": "49.90"}, "amount", "number"),
    "boolean amount": ({"amount": True}, "amount", "number"),
    "negative amount": ({"amount": -0.01}, "amount", "greater than or equal to 0"),
    "null amount": ({"amount": None}, "amount", "number"),
    "text id": ({"customer_id": "1"}, "customer_id", "integer"),
    "float id": ({"customer_id": 1.0}, "customer_id", "integer"),
    "boolean id": ({"terminal_id": True}, "terminal_id", "integer"),
    "id of 64 bits and a sign": ({"terminal_id": 2**63}, "terminal_id", "less than or equal to 9223372036854775807"),
    "null id": ({"customer_id": None}, "customer_id", "integer"),
    "text transaction": ({"transaction_id": "x"}, "transaction_id", "integer"),
    "unknown field": ({"currency": "EUR"}, "currency", "not permitted"),
    "no time": ({"event_time": "yesterday"}, "event_time", "ISO 8601"),
    "number as time": ({"event_time": 1525132800}, "event_time", "ISO 8601"),
    "digits as time": ({"event_time": "1525132800"}, "event_time", "ISO 8601"),
    "time before the calendar": ({"event_time": "0001-01-01T00:00:00+14:00"}, "event_time", "ISO 8601"),
    "list as time": ({"event_time": [NOW]}, "event_time", "ISO 8601"),
}
BAD_BODIES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "NotJson"),
    "not JSON": (b"customer=1", 400, "NotJson"),
    "NaN": (orjson.dumps(SCORE).replace(b"49.9", b"NaN"), 400, "NotJson"),
    "Infinity": (orjson.dumps(SCORE).replace(b"49.9", b"-Infinity"), 400, "NotJson"),
    "beyond a double": (orjson.dumps(SCORE).replace(b"49.9", b"1e999"), 400, "NotJson"),
    "not UTF-8": (b'{"amount": "\xff"}', 400, "NotJson"),
    "half a character": (b'{"\\ud800": 1}', 400, "NotJson"),
    "deep": (b"[" * 5_000 + b"]" * 5_000, 400, "NotJson"),
    "a list": (b"[1]", 422, "RequestError"),
    "a number": (b"1", 422, "RequestError"),
    "long": (b" " * 20_000, 413, "BodyTooLarge"),
}


class TestRefusal:
    @pytest.mark.parametrize("case", BAD_TRANSACTIONS)
    def test_a_bad_transaction_is_refused_with_field_and_reason_and_without_its_value(
        self, refusing: Served, case: str
    ) -> None:
        changes, field, reason = BAD_TRANSACTIONS[case]
        before = len(refusing.decisions())
        answer = refusing.client.post("/fraud/score", json={**SCORE, **changes})
        body = answer.json()
        assert (answer.status_code, body["error"], body["field"]) == (422, "RequestError", field)
        assert body["retryable"] is False
        assert reason in body["message"]
        assert str(changes[field]) not in body["message"].replace("9223372036854775807", "")
        assert set(body) == {"error", "field", "message", "retryable"}
        assert len(refusing.decisions()) == before

    @pytest.mark.parametrize("field", SCORE)
    def test_a_missing_field_is_named(self, refusing: Served, field: str) -> None:
        answer = refusing.client.post("/fraud/score", json={n: v for n, v in SCORE.items() if n != field})
        assert answer.status_code == 422
        assert answer.json()["message"] == f"'{field}' is refused: field required."

    def test_several_faults_are_all_said(self, refusing: Served) -> None:
        answer = refusing.client.post("/fraud/score", json={**SCORE, "amount": "x", "event_time": "x", "more": 1})
        assert answer.json()["field"] == "amount"
        assert "'event_time': input should be ISO 8601" in answer.json()["message"]
        assert "'more': extra inputs" in answer.json()["message"]

    @pytest.mark.parametrize("route", ["/fraud/score", "/push"])
    @pytest.mark.parametrize("case", BAD_BODIES)
    def test_a_bad_body_is_refused(self, refusing: Served, route: str, case: str) -> None:
        body, status, error = BAD_BODIES[case]
        if (case, route) == ("long", "/push"):
            body = body * 1_000
        answer = refusing.client.post(route, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]) == (status, error)

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
    def test_a_body_that_a_page_elsewhere_could_send_is_refused(self, refusing: Served, kind: str | None) -> None:
        headers = {"content-type": kind} if kind else {}
        answer = refusing.client.post("/fraud/score", content=orjson.dumps(SCORE), headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (415, "WrongMediaType")

    def test_a_declared_character_set_is_fine(self, refusing: Served) -> None:
        headers = {"content-type": "application/JSON; charset=utf-8"}
        assert refusing.client.post("/fraud/score", content=orjson.dumps(SCORE), headers=headers).status_code == 200

    def test_what_is_not_served_is_said_in_the_same_shape(self, refusing: Served) -> None:
        assert refusing.client.get("/fraud/scores").json() == {
            "error": "NotServed",
            "message": "Not Found.",
            "retryable": False,
        }
        answer = refusing.client.get("/fraud/score")
        assert (answer.status_code, answer.headers["allow"], answer.json()["error"]) == (405, "POST", "NotServed")

    @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_no_json_breaks_the_server(self, served: Served, data: st.DataObject) -> None:
        changed = data.draw(st.dictionaries(st.sampled_from([*SCORE, "transaction_id", "x"]), JSON, max_size=3))
        answer = served.client.post("/fraud/score", json={**SCORE, **changed})
        assert answer.status_code in (200, 409, 422), answer.text
        column = data.draw(st.sampled_from([*EVENT, "OTHER"]))
        df = {**EVENT, column: data.draw(JSON | st.lists(JSON, min_size=1, max_size=1))}
        answer = served.client.post("/push", json={"push_source_name": TRANSACTIONS, "df": df})
        assert answer.status_code in (200, 422), answer.text

    def test_every_error_has_a_status_and_a_body(self) -> None:
        for error, status in (
            (CorruptState("bytes"), 500),
            (OnDemandError(ON_DEMAND, "failed"), 500),
            (ModelError("other features"), 503),
            (UnknownName("view", "a", ["b"]), 404),
        ):
            assert status_of(error) == status
            assert body_of(error)["error"] == type(error).__name__
            assert body_of(error)["message"] == str(error)
        assert body_of(OnDemandError(ON_DEMAND, "failed"))["view"] == "v"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
ON_DEMAND = OnDemandView(name="v", mode="python", inputs=(), request=(), features=(), body=b"", text="", python="3.11")


class TestPush:
    def test_an_event_counts_only_after_its_own_time(self, served: Served, fraud_data: FraudData) -> None:
        # The server's clock stands an hour later; only the transaction's own time decides:
        #
        #   score ...  event | score at its time: not counted | score a microsecond later: counted
        before = counted(served)
        event = OPENED + 10 * SECOND
        served.clock.set(OPENED + HOUR)
        pushed = served.push(an_event(fraud_data, event))
        assert PushResponse.model_validate_json(pushed.content).model_dump() == {
            "views": {
                name: {"applied": 1, "repeated": 0, "next": 1, "erased": 0}
                for name in ("customer_recent", "customer_spend")
            }
        }
        assert counted(served, event) == before
        assert counted(served, event + 1) == before + 1
        decision = served.decisions()[-1]
        assert decision.features["last_transaction_time"] == moment(event)
        assert decision.features["seconds_since_last"] == 1e-6
        assert decision.positions["customer_spend"] == {0: (0, 1)}
        assert (decision.as_of, decision.logged_at) == (event + 1, OPENED + HOUR)

    def test_the_same_offset_twice_changes_nothing(self, served: Served, fraud_data: FraudData) -> None:
        row = an_event(fraud_data, OPENED)
        assert served.push(row, offset=41).json()["views"]["customer_spend"] == {
            "applied": 1,
            "repeated": 0,
            "next": 42,
            "erased": 0,
        }
        served.clock.advance(SECOND)
        served.score()
        assert served.push(row, offset=41).json()["views"]["customer_spend"] == {
            "applied": 0,
            "repeated": 1,
            "next": 42,
            "erased": 0,
        }
        served.score()
        first, second = served.decisions()
        assert (first.features, first.positions, first.score) == (second.features, second.positions, second.score)

    def test_rows_that_overlap_what_was_pushed_count_once(self, served: Served, fraud_data: FraudData) -> None:
        rows = pa.concat_tables([an_event(fraud_data, OPENED), an_event(fraud_data, OPENED + SECOND)])
        before = counted(served)
        assert served.push(rows.slice(0, 1), offset=0).status_code == 200
        done = served.push(rows, offset=0).json()["views"]["customer_spend"]
        assert done == {"applied": 1, "repeated": 1, "next": 2, "erased": 0}
        served.clock.advance(2 * SECOND)
        assert counted(served) == before + 2

    def test_a_gap_is_refused_with_the_offset_that_is_expected(self, served: Served, fraud_data: FraudData) -> None:
        assert served.push(an_event(fraud_data, OPENED), offset=0, partition=3).status_code == 200
        answer = served.push(an_event(fraud_data, OPENED), offset=2, partition=3)
        assert answer.status_code == 409
        body = answer.json()
        assert (body["error"], body["partition"], body["expected"], body["offered"]) == ("PositionGap", 3, 1, 2)
        assert served.push(an_event(fraud_data, OPENED), offset=1, partition=3).status_code == 200

    def test_one_bad_row_refuses_all(self, served: Served, fraud_data: FraudData) -> None:
        before = counted(served)
        good = an_event(fraud_data, OPENED)
        early = an_event(fraud_data, OPENED + 2 * HOUR)
        answer = served.push(pa.concat_tables([good, early]))
        assert (answer.status_code, answer.json()["field"]) == (422, "TX_DATETIME")
        assert "of row 1" in answer.json()["message"]
        served.clock.advance(SECOND)
        assert counted(served) == before

    def test_a_label_counts_a_week_after_its_transaction(self, served: Served, fraud_data: FraudData) -> None:
        served.score()
        assert served.push(an_event(fraud_data, OPENED - DELAY, fraud=1), LABELS).status_code == 200
        served.clock.advance(1)
        served.score()
        before, after = served.decisions()
        assert after.features["count_fraud_86400s"] == before.features["count_fraud_86400s"] + 1

    @pytest.mark.parametrize(
        ("changes", "status", "field", "reason"),
        [
            ({"to": "offline"}, 422, "to", "only the online store"),
            ({"to": "online_and_offline"}, 422, "to", "only the online store"),
            ({"push_source_name": "transactions"}, 404, None, "label_events, transaction_events"),
            ({"partition": -1}, 422, "partition", "greater than or equal to 0"),
            ({"offset": -1}, 422, "offset", "greater than or equal to 0"),
            ({"offset": 2**63}, 422, "offset", "less than or equal to"),
            ({"feature_view": "customer_spend"}, 422, "feature_view", "not permitted"),
            ({"df": {}}, 422, "df", "no columns"),
            ({"df": {"a": 1}}, 422, "df.a", "list"),
            ({"df": [[1]]}, 422, "df", "dictionary"),
        ],
    )
    def test_a_push_that_cannot_be_taken_is_refused(
        self, refusing: Served, changes: dict[str, Any], status: int, field: str | None, reason: str
    ) -> None:
        self._refused(refusing, {"push_source_name": TRANSACTIONS, "df": EVENT, **changes}, status, field, reason)

    @pytest.mark.parametrize(
        ("column", "values", "reason"),
        [
            ("TX_DATETIME", [NOW, NOW], "has 2 values where the first column has 1"),
            ("TX_DATETIME", ["now"], "is no time in row 0"),
            ("TX_DATETIME", [1525132800], "is no time in row 0"),
            ("TX_DATETIME", [None], "is null in row 0"),
            ("TX_AMOUNT", ["49.90"], "string"),
            ("TX_AMOUNT", [{"EUR": 1}], "struct"),
            ("CUSTOMER_ID", [None], "is null in row 0"),
            ("CUSTOMER_ID", ["1"], "string"),
            ("CUSTOMER_ID", [1.5], "Int64"),
            ("CUSTOMER_ID", [2**63], "beyond 64 bits"),
            ("CUSTOMER_ID", None, "is missing"),
        ],
    )
    def test_a_bad_column_is_refused(
        self, refusing: Served, column: str, values: list[Any] | None, reason: str
    ) -> None:
        df = {name: held for name, held in {**EVENT, column: values}.items() if held is not None}
        # The layer names some columns as the views do, some as the file does.
        names = (column, {"CUSTOMER_ID": "customer_id", "TX_AMOUNT": "amount"}.get(column, column))
        self._refused(refusing, {"push_source_name": TRANSACTIONS, "df": df}, 422, names, reason)

    def test_values_of_different_types_in_one_column_are_refused(self, refusing: Served) -> None:
        df = {name: values * 2 for name, values in EVENT.items()} | {"TX_AMOUNT": [1, "x"]}
        self._refused(refusing, {"push_source_name": TRANSACTIONS, "df": df}, 422, "TX_AMOUNT", "different types")

    def _refused(
        self, served: Served, body: dict[str, Any], status: int, field: str | tuple[str, ...] | None, reason: str
    ) -> None:
        answer = served.client.post("/push", json=body)
        assert answer.status_code == status, answer.text
        fields = field if isinstance(field, tuple) else (field,)
        assert answer.json().get("field") in fields
        assert reason in answer.json()["message"]

    def test_feasts_own_arguments_are_taken(self, served: Served) -> None:
        body = {"push_source_name": TRANSACTIONS, "df": EVENT, "to": "online", "allow_registry_cache": True}
        assert served.client.post("/push", json=body).status_code == 200


EVENT: dict[str, list[Any]] = {
    "CUSTOMER_ID": [1],
    "TERMINAL_ID": [1],
    "TX_DATETIME": ["2018-05-01T00:00:00Z"],
    "TX_AMOUNT": [49.9],
}


def an_event(data: FraudData, time: int, fraud: int = 0) -> pa.Table:
    """A transaction of customer 1 at terminal 1 at a time."""
    values = {**KNOWN, "TRANSACTION_ID": 10**6, "CUSTOMER_ID": 1, "TERMINAL_ID": 1, "TX_AMOUNT": 49.9}
    row = {**values, "TX_FRAUD": fraud, "TX_DATETIME": moment(time).replace(tzinfo=None)}
    return pa.Table.from_pylist([{name: row[name] for name in RAW}], data.transactions.select(RAW).schema)


def counted(served: Served, time: int | None = None) -> int:
    """How many transactions of customer 1 in 30 days a score at a time sees; at the clock's, if not told."""
    assert served.score(event_time=iso(served.clock.now() if time is None else time)).status_code == 200
    return served.decisions()[-1].features["count_amount_2592000s"]


class TestHealth:
    def test_an_empty_store_is_said_and_never_scored_on(
        self, fraud_repo: Path, model: FraudModel, tmp_path: Path
    ) -> None:
        with serving(fraud_repo, model, tmp_path, bootstrapped=False) as served:
            health = served.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "not ready")
            views = ["customer_profile", "customer_recent", "customer_spend", "terminal_risk"]
            assert health.json()["not_ready"] == dict.fromkeys(views, "it was never filled")
            answer = served.score()
            assert (answer.status_code, answer.json()["error"]) == (503, "StoreNotReady")
            assert answer.json()["retryable"] is True
            assert answer.json()["view"] in views
            pushed = served.client.post("/push", json={"push_source_name": TRANSACTIONS, "df": EVENT})
            assert (pushed.status_code, pushed.json()["error"]) == (503, "StoreNotReady")
            assert served.decisions() == []

            served.layer.bootstrap(["customer_spend", "customer_recent"], until=OPENED)
            assert sorted(served.client.get("/health").json()["not_ready"]) == ["customer_profile", "terminal_risk"]
            served.layer.bootstrap(until=OPENED)
            health = served.client.get("/health")
            assert health.status_code == 200
            assert health.json() == {
                "status": "ready",
                "model_version": model.version,
                "fingerprint": model.fingerprint,
            }
            assert served.score().status_code == 200

    def test_a_store_that_lost_a_part_or_cannot_be_read_is_an_error_never_an_empty_window(
        self, served: Served, caplog: pytest.LogCaptureFixture
    ) -> None:
        space = Keyspace("fraud", "customer_spend", 1)
        backend = served.layer.store.backend
        backend.delete(iter(records := list(backend.scan(space.tail(b"B")))))
        assert len(records) == 256
        answer = served.score()
        assert (answer.status_code, answer.json()["error"], answer.json()["view"]) == (
            503,
            "StoreNotReady",
            "customer_spend",
        )
        assert "is missing" in answer.json()["message"]
        served.layer.bootstrap(["customer_spend"], until=OPENED)
        assert served.score().status_code == 200

        space = Keyspace("fraud", "customer_spend", 2)
        backend.apply([Write([], [("S", key, b"garbage")]) for key in list(backend.scan(space.tail(b"S")))])
        answer = served.score()
        assert (answer.status_code, answer.json()["error"], answer.json()["retryable"]) == (500, "CorruptState", False)
        assert "/fraud/score failed" in caplog.text
        assert len(served.decisions()) == 1


class TestMetrics:
    def test_decisions_refusals_events_and_unknown_entities_are_counted(
        self, served: Served, fraud_data: FraudData, model: FraudModel
    ) -> None:
        served.score()
        served.score(customer_id=10**9)
        served.score(amount=-1)
        served.push(an_event(fraud_data, OPENED), offset=0)
        served.push(an_event(fraud_data, OPENED), offset=0)
        answer = served.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.text.splitlines()
        for line in (
            "isochron_decision_seconds_count 2.0",
            'isochron_decisions_total{outcome="scored"} 1.0',
            'isochron_decisions_total{outcome="scored_with_warnings"} 1.0',
            'isochron_unknown_entities_total{key="customer_id"} 1.0',
            'isochron_refused_requests_total{reason="RequestError",route="/fraud/score"} 1.0',
            'isochron_events_applied_total{view="customer_spend"} 1.0',
            'isochron_events_repeated_total{view="customer_spend"} 1.0',
            f'isochron_model_info{{fingerprint="{model.fingerprint}",version="{model.version}"}} 1.0',
        ):
            assert line in lines

    def test_two_apps_in_one_process_count_apart(self, refusing: Served, served: Served) -> None:
        refusing.score()
        assert "isochron_decision_seconds_count 0.0" in served.client.get("/metrics").text.splitlines()


class TestPage:
    def test_it_says_what_runs_and_needs_nothing_from_elsewhere(self, refusing: Served, model: FraudModel) -> None:
        page = refusing.client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert model.version in page.text
        assert "{{" not in page.text
        assert "//" not in page.text.replace("// Ids go out", "")

    def test_the_schema_says_what_a_transaction_is(self, refusing: Served) -> None:
        schema = refusing.client.get("/openapi.json").json()
        body = schema["paths"]["/fraud/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["properties"]["event_time"]["format"] == "date-time"
        assert body["required"] == ["customer_id", "terminal_id", "amount", "event_time"]
        assert body["additionalProperties"] is False


class TestStart:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: replace(m, fingerprint="f00d"), "Train it again on the applied definitions"),
            (lambda m: replace(m, feature_names=("age", *m.feature_names[1:])), "lacks: age"),
            (lambda m: replace(m, feature_names=("last_amounts", *m.feature_names[1:])), "are none: last_amounts"),
        ],
    )
    def test_a_model_of_other_features_is_refused(
        self,
        fraud_repo: Path,
        model: FraudModel,
        tmp_path: Path,
        change: Callable[[FraudModel], FraudModel],
        reason: str,
    ) -> None:
        clock = ManualClock(OPENED)
        with FeatureLayer(fraud_repo, clock=clock) as layer, pytest.raises(ModelError, match=reason):
            create_app(layer, change(model), DecisionLog(tmp_path / "decisions.jsonl"), clock)

    def test_a_log_or_port_that_is_taken_is_refused(self, refusing: Served, model: FraudModel) -> None:
        app = create_app(refusing.layer, model, DecisionLog(refusing.log.path), refusing.clock)
        with pytest.raises(ServerNotStarted, match="the app failed to start"), running(app):
            pass
        with pytest.raises(ServerNotStarted, match="cannot be bound"), running(app, port=httpx.URL(refusing.url).port):
            pass

    def test_stopping_closes_the_log(self, fraud_repo: Path, model: FraudModel, tmp_path: Path) -> None:
        with serving(fraud_repo, model, tmp_path) as served:
            served.score()
        with served.log:
            assert len(served.decisions()) == 1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health", trust_env=False)

    def test_a_server_scores_without_feast(self, fraud_repo: Path, model: FraudModel, tmp_path: Path) -> None:
        repo = shutil.copytree(fraud_repo, tmp_path / "feature_repo")
        model.save(tmp_path / "model", {}, moment(OPENED))
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT_FEAST, str(repo), str(tmp_path), NOW],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == ["200", "200", "200"]


WITHOUT_FEAST = """
import sys
from pathlib import Path
import httpx
from feature_store.clock import ManualClock
from feature_store.layer import FeatureLayer
from feature_store.timestamps import parse_time
from models.booster import load
from serving.app import create_app
from serving.decision_log import DecisionLog
from serving.server import running

repo, folder, now = sys.argv[1:]
clock = ManualClock(parse_time(now))
layer = FeatureLayer(repo, clock=clock)
layer.bootstrap(until=clock.now())
app = create_app(layer, load(Path(folder) / "model"), DecisionLog(Path(folder) / "decisions.jsonl"), clock)
with running(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
    print(client.get("/health").status_code)
    transaction = {"customer_id": 1, "terminal_id": 1, "amount": 9.5, "event_time": now}
    print(client.post("/fraud/score", json=transaction).status_code)
    df = {"CUSTOMER_ID": [1], "TERMINAL_ID": [1], "TX_AMOUNT": [9.5], "TX_DATETIME": [now]}
    print(client.post("/push", json={"push_source_name": "transaction_events", "df": df}).status_code)
assert "feast" not in sys.modules
"""


DECISION = Decision(
    decision_id="d1",
    request={"transaction_id": None, "amount": 0.1, "event_time": moment(OPENED + 1)},
    service="fraud_v1",
    as_of=OPENED + 1,
    features={
        "null": None,
        "integer": 2**63 - 1,
        "float": 0.1 + 0.2,
        "whole": 1.0,
        "least": 5e-324,
        "zero": -0.0,
        "nan": math.nan,
        "infinite": -math.inf,
        "true": True,
        "text": "naïve\n\u2028\x00",
        "bytes": b"\x00\xff",
        "time": moment(OPENED + 1),
        "early": moment(-1),
        "list": [0.1, None, math.nan],
        "times": [moment(OPENED), None],
        "empty": [],
    },
    statuses={"null": "NULL_VALUE"},
    unknown={"view": False},
    positions={"view": {0: (0, 2**63), 2**32 - 1: (1, 0)}, "other": {}},
    cuts={"view": (1, OPENED)},
    fingerprint="f00d",
    model_version="m1",
    score=0.1 + 0.2,
    warnings=("a warning",),
    logged_at=OPENED + 2,
    code_commit="c0ffee",
)


class TestDecisionLog:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "decisions.jsonl"

    def test_every_value_comes_back_as_it_was(self, path: Path) -> None:
        with DecisionLog(path) as log:
            log.append(DECISION)
        (read,) = read_decisions(path)
        assert repr(read) == repr(DECISION)
        assert path.read_bytes().count(b"\n") == 1

    def test_random_floats_come_back_bit_for_bit(self) -> None:
        drawn = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64, endpoint=False).view(np.float64)
        held = orjson.loads(orjson.dumps([encode_value(value) for value in drawn.tolist()]))
        back = np.array(decode_value(held))
        assert np.array_equal(back, drawn, equal_nan=True)
        assert np.array_equal(np.signbit(back), np.signbit(drawn) & ~np.isnan(drawn))

    def test_a_torn_last_line_is_said_by_the_reader_and_set_aside_by_the_next_writer(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with DecisionLog(path) as log:
            log.append(DECISION)
            log.append(DECISION)
        whole = path.read_bytes()
        for cut in (1, 10, len(whole) // 2 - 1):
            torn = whole[:-cut]
            path.write_bytes(torn)
            caplog.clear()
            assert len(list(read_decisions(path))) == 1
            assert "ends in a torn line of" in caplog.text
        with DecisionLog(path) as log:
            assert "moved to" in caplog.text
            log.append(DECISION)
        assert path.read_bytes() == whole
        assert path.with_name("decisions.jsonl.torn").read_bytes() == torn[len(whole) // 2 :] + b"\n"

    def test_a_file_that_is_one_torn_line_is_set_aside_whole(self, path: Path) -> None:
        path.write_bytes(b"x" * 200_000)
        with DecisionLog(path) as log:
            log.append(DECISION)
        assert len(list(read_decisions(path))) == 1
        assert path.with_name("decisions.jsonl.torn").stat().st_size == 200_001

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{", "unexpected end"),
            (b"", "input data is empty"),
            (b"[]", "no JSON object"),
            (b"{}", "lacks 'request'"),
            (b'{"request":{},"features":{},"as_of":"x","logged_at":"x"}', "isoformat"),
            (b'{"request":{},"features":{},"as_of":null,"logged_at":"x"}', "NoneType"),
            (b'{"request":{},"features":{"a":{"bytes":"?"}},"as_of":"x","logged_at":"x"}', "base64"),
        ],
    )
    def test_a_corrupt_line_is_an_error_that_names_it(self, path: Path, line: bytes, reason: str) -> None:
        with DecisionLog(path) as log:
            log.append(DECISION)
        whole = path.read_bytes()
        path.write_bytes(whole + line + b"\n" + whole)
        read = read_decisions(path)
        assert next(read).decision_id == "d1"
        with pytest.raises(CorruptDecision, match=reason) as caught:
            next(read)
        assert caught.value.line == 2
        assert caught.value.__cause__ is not None

    def test_threads_write_whole_lines(self, path: Path) -> None:
        with DecisionLog(path) as log:
            threads = [threading.Thread(target=lambda: [log.append(DECISION) for _ in range(200)]) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [repr(d) for d in read_decisions(path)] == [repr(DECISION)] * 1_600

    def test_a_full_disk_leaves_no_part_of_a_line(self, path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with DecisionLog(path) as log:
            log.append(DECISION)
            size = path.stat().st_size
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
                with pytest.raises(DecisionNotLogged, match="It was not answered") as caught:
                    log.append(DECISION)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert isinstance(caught.value.__cause__, OSError)
            assert path.stat().st_size == size
            log.append(DECISION)
        assert len(list(read_decisions(path))) == 2

    def test_a_decision_that_cannot_be_logged_is_not_answered(self, served: Served) -> None:
        served.log.close()
        answer = served.score()
        assert (answer.status_code, answer.json()["error"]) == (503, "DecisionNotLogged")
        assert answer.json()["retryable"] is True
        assert "score" not in answer.json()

    def test_a_second_writer_is_refused_and_the_file_is_its_owners(self, path: Path) -> None:
        with DecisionLog(path), pytest.raises(DecisionLogError, match="being written by another"):
            DecisionLog(path).open()
        assert path.stat().st_mode & 0o077 == 0

    def test_what_cannot_be_opened_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(DecisionLogError, match="cannot be opened: Is a directory"):
            DecisionLog(tmp_path).open()
        with pytest.raises(DecisionLogError, match="cannot be read: No such file"):
            list(read_decisions(tmp_path / "none"))


def same(name: str, logged: Any, rebuilt: Any) -> bool:
    """Whether two values of a feature meet the contract's tolerances (a deviation is judged by its square)."""
    if not isinstance(logged, float) or not isinstance(rebuilt, float):
        return logged == rebuilt
    if name.startswith("std_amount_"):
        return math.isclose(logged**2, rebuilt**2, rel_tol=1e-6, abs_tol=1e-9 * 1_000**2)
    return math.isclose(logged, rebuilt, rel_tol=1e-9)
