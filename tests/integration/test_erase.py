"""Erasing entities in applied repositories: by the library, by the command, and as unmodified Feast sees it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from feast import FeatureStore
from feast.repo_config import load_repo_config

from feature_store import FeatureLayer
from feature_store.adapters.feast.offline_store import IsochronOfflineStore
from feature_store.clock import ManualClock
from feature_store.errors import ErasureIncomplete, ErasureLogError, RequestError, TrainingSetError, UnknownName
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, iso, moment, parse_time
from infra.redis.groups import SingleServer
from tests.processes import output_of, run

pytestmark = pytest.mark.filterwarnings("ignore")

#: Some days before the fraud data's end.
NOW = parse_time("2018-05-05T12:00:00Z")
FRAUD = ["customer_profile:mean_amount", "customer_spend:count_amount_2592000s", "customer_recent:last_amounts"]


@pytest.fixture(params=["embedded", "redis"])
def filled(request: pytest.FixtureRequest, repo: Path) -> Iterator[FeatureLayer]:
    """The fraud example filled as of NOW, in each kind of store."""
    if request.param == "redis":
        server: SingleServer = request.getfixturevalue("redis_single")
        server.flush()
        use_redis(repo, server.connection_string)
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        layer.bootstrap(until=NOW)
        yield layer
        layer.store.backend.close()


def use_redis(repo: Path, connection_string: str, **more: Any) -> None:
    config = yaml.safe_load((repo / "feature_store.yaml").read_text())
    config["online_store"] |= {"backend": "redis", "connection_string": connection_string, **more}
    (repo / "feature_store.yaml").write_text(yaml.safe_dump(config))


def online(layer: FeatureLayer, *customers: int, as_of: int | None = None) -> dict[str, list[Any]]:
    keys = {"customer_id": list(customers)}
    return layer.prepare(FRAUD).read(keys, layer.clock.now() if as_of is None else as_of).to_dict()


def history(layer: FeatureLayer, *customers: int, as_of: int) -> dict[str, list[Any]]:
    times = pa.array([moment(as_of)] * len(customers), pa.timestamp("us", "UTC"))
    spine = pa.table({"customer_id": list(customers), "event_timestamp": times})
    return layer.get_historical_features(spine, FRAUD).to_arrow().drop_columns(["event_timestamp"]).to_pydict()


def never_seen(layer: FeatureLayer, customer: int) -> None:
    """The store and history say of a customer what they say of one that never was."""
    found = layer.prepare(FRAUD).read({"customer_id": [customer, 10**9]}, layer.clock.now())
    assert {name: some[0] for name, some in found.unknown.items()} == dict.fromkeys(found.unknown, True)
    for values in (found.to_dict(), history(layer, customer, 10**9, as_of=layer.clock.now())):
        values.pop("customer_id")
        assert all(one == other for one, other in values.values()), values
    assert [statuses[0] for statuses in found.statuses.values()] == [s[1] for s in found.statuses.values()]


def event(layer: FeatureLayer, customer: int, time: int) -> pa.Table:
    rows = pq.read_table(layer.config.root / "data" / "transactions.parquet").slice(0, 1)
    rows = rows.set_column(rows.column_names.index("CUSTOMER_ID"), "CUSTOMER_ID", pa.array([customer]))
    at = pa.array([time], pa.int64()).cast(pa.timestamp("us"))
    return rows.set_column(rows.column_names.index("TX_DATETIME"), "TX_DATETIME", at)


def test_an_erased_customer_is_nobody_whatever_comes_then(filled: FeatureLayer) -> None:
    others = [c for c in range(1, 9) if c != 2]
    before = online(filled, *others), history(filled, *others, as_of=NOW)
    assert sum(online(filled, 2)["count_amount_2592000s"]) > 0
    erased = filled.erase({"customer_id": np.int64(2)})
    assert erased.erased_at == NOW
    assert erased.views == {
        "book_customer": 0,
        "customer_profile": 1,
        "customer_recent": 1,
        "customer_spend": 1,
    }
    never_seen(filled, 2)
    assert (online(filled, *others), history(filled, *others, as_of=NOW)) == before

    # A late push is taken from the log, but counts nowhere; what happens later is a new customer's.
    done = filled.append_events("transaction_events", event(filled, 2, NOW - HOUR), offset=0)
    assert {(one.applied, one.erased, one.next) for one in done.values()} == {(0, 1, 1)}
    row = {"customer_id": 2, "PROFILE_TIME": NOW - HOUR, "x_customer_id": 1.0, "y_customer_id": 1.0}
    row |= {"mean_amount": 1.0, "std_amount": 1.0, "mean_nb_tx_per_day": 1.0}
    assert filled.write_to_online_store("customer_profile", [row]) == 0
    times = pa.array([NOW], pa.int64()).cast(pa.timestamp("us"))
    table = pa.table({**{name: [value] for name, value in row.items()}, "PROFILE_TIME": times})
    assert filled.write_to_online_store("customer_profile", table) == 0
    never_seen(filled, 2)
    assert filled.erase({"customer_id": 2}).views == dict.fromkeys(erased.views, 0), "twice is as good as once"
    filled.clock.set(NOW + MINUTE)  # type: ignore[attr-defined]
    done = filled.append_events("transaction_events", event(filled, 2, NOW + SECOND), offset=1)
    assert {(one.applied, one.erased) for one in done.values()} == {(1, 0)}
    assert online(filled, 2)["count_amount_2592000s"] == [1]

    filled.bootstrap(until=NOW)
    assert online(filled, 2, as_of=NOW)["count_amount_2592000s"] == [0]
    assert online(filled, *others, as_of=NOW)["count_amount_2592000s"] == before[0]["count_amount_2592000s"]


def test_feasts_materialize_brings_nobody_back(filled: FeatureLayer) -> None:
    filled.erase({"customer_id": 2})
    filled.store.backend.close()  # the embedded store is one process' at a time
    output_of(filled.config.root, "feast", "materialize", "2018-01-01T00:00:00", iso(NOW).removesuffix("Z"))
    never_seen(filled, 2)
    assert sum(online(filled, 3)["count_amount_2592000s"]) > 0


def test_an_erased_terminal_has_no_labels_that_become_known_later(filled: FeatureLayer) -> None:
    """Labels are events seven days after their rows: the rows were there when the terminal was erased."""
    features, keys = ["terminal_risk:count_fraud_604800s"], {"terminal_id": list(range(100))}

    def counts() -> list[int]:
        return filled.prepare(features).read(keys, NOW + 3 * DAY).to_dict()["count_fraud_604800s"]

    before = counts()
    most = int(np.argmax(before))
    assert before[most] > 3
    filled.erase({"terminal_id": most})
    assert counts() == [0 if t == most else n for t, n in enumerate(before)]
    times = pa.array([moment(NOW + 3 * DAY)] * 100, pa.timestamp("us", "UTC"))
    past = filled.get_historical_features(pa.table({**keys, "event_timestamp": times}), features).to_arrow()
    assert past["count_fraud_604800s"][most].as_py() == 0


def test_a_long_lived_layer_and_handle_hear_of_an_erasure_by_another_process(repo: Path) -> None:
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        layer.bootstrap(until=NOW)
        handle = layer.prepare(FRAUD, history=True)
        layer.store.backend.close()
        output_of(repo, "isochron", "erase", "--key", "customer_id=2", "--yes", "--repo", ".")
        for as_of in (NOW, NOW - DAY):
            assert handle.read({"customer_id": [2]}, as_of).to_dict()["last_amounts"] == [[]]
        done = layer.append_events("transaction_events", event(layer, 2, NOW))
        assert {one.erased for one in done.values()} == {1}


def test_the_log_of_erasures(filled: FeatureLayer) -> None:
    filled.append_events("transaction_events", event(filled, 3, NOW), partition=7, offset=41)
    log = filled.config.erasures
    assert not log.exists()
    filled.erase({"customer_id": 2})
    filled.erase({"customer_id": "2"})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.name == "registry.erasures.jsonl"
    assert lines[0] == {
        "project": "fraud",
        "keys": {"customer_id": "2"},
        "erased_at": NOW,
        "positions": {
            "customer_profile": {},
            "customer_recent": {"7": [0, 42]},
            "customer_spend": {"7": [0, 42]},
        },
    }
    assert lines[1] == lines[0]
    # Another project of the same registry file.
    log.write_text(log.read_text().replace('"project":"fraud"', '"project":"antifraud"'))
    assert history(filled, 2, as_of=NOW)["count_amount_2592000s"] != [0]


@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        ({"customer": 1}, UnknownName, "no join key is named 'customer'; there are: customer_id, terminal_id"),
        ({"customer_id": 1, "terminal_id": 2}, RequestError, "are the join keys of no view; views are keyed by .cust"),
        ({}, RequestError, "are the join keys of no view"),
        ({"customer_id": "two"}, RequestError, "'customer_id' is no value of its type: customer_id is Int64"),
        ({"customer_id": True}, RequestError, "is no value of its type"),
        ({"customer_id": 2**63}, RequestError, "is no value of its type"),
        ({"customer_id": 2.0}, RequestError, "'customer_id' is a float, which no join key is"),
        ({"customer_id": None}, RequestError, "'customer_id' is a NoneType, which no join key is"),
    ],
)
def test_keys_that_nobody_has_are_refused_and_nothing_is_written(
    keys: dict[str, Any], error: type[Exception], reason: str, fraud_repo: Path
) -> None:
    with FeatureLayer(fraud_repo) as layer:
        with pytest.raises(error, match=reason):
            layer.erase(keys)
        assert not layer.config.erasures.exists()


def test_a_store_that_does_not_answer_leaves_the_erasure_standing(repo: Path) -> None:
    use_redis(repo, "localhost:1", timeout=0.2)
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        with pytest.raises(ErasureIncomplete, match=r"is written down .* may still hold it. .*localhost:1") as raised:
            layer.erase({"customer_id": 2})
        assert raised.value.retryable
        assert "customer_spend" in raised.value.problems
        assert history(layer, 2, as_of=NOW)["count_amount_2592000s"] == [0]


def test_a_log_that_cannot_be_written_or_read_stops_the_work(repo: Path) -> None:
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        layer.config.erasures.mkdir()
        with pytest.raises(ErasureLogError, match=r"registry.erasures.jsonl: cannot be written .*; nothing was erased"):
            layer.erase({"customer_id": 2})
        layer.config.erasures.rmdir()
        layer.config.erasures.write_text('{"project": "fraud", "keys": {"customer_id": "2"}}\n')
        with pytest.raises(ErasureLogError, match="line 1 is no erasure"):
            history(layer, 2, as_of=NOW)


class TestCommand:
    def test_it_asks_first(self, repo: Path) -> None:
        done = run(repo, "isochron", "erase", "--key", "customer_id=2")
        assert done.returncode == 1
        assert (
            "Erase customer_id 2 from book_customer, customer_profile, customer_recent, customer_spend of fraud? "
            "It cannot be undone" in done.stdout
        )
        assert not (repo / "data" / "registry.erasures.jsonl").exists()

    def test_it_says_what_was_erased_where(self, repo: Path) -> None:
        output_of(repo, "isochron", "bootstrap", "--until", iso(NOW))
        said = output_of(repo, "isochron", "erase", "--key", "customer_id=2", "--yes")
        assert said.splitlines()[:-1] == [
            f"{view}: left out of history; entities that the online store held: {held}"
            for view, held in [
                ("book_customer", 0),
                ("customer_profile", 1),
                ("customer_recent", 1),
                ("customer_spend", 1),
            ]
        ]
        assert said.splitlines()[-1].startswith("erased as of 2")
        with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
            never_seen(layer, 2)

    @pytest.mark.parametrize(
        ("arguments", "code", "reason"),
        [
            (("--key", "customer=1", "--yes"), 1, "no join key is named 'customer'; there are: customer_id, terminal"),
            (("--key", "customer_id=1.5", "--yes"), 1, "is no value of its type: customer_id is Int64"),
            (("--key", "customer_id"), 2, "is not of the form NAME=VALUE"),
            (("--key", "customer_id=1", "--key", "customer_id=2"), 2, "names a join key twice"),
            ((), 2, "Missing option '--key'"),
        ],
    )
    def test_wrong_usage_has_its_own_code(
        self, arguments: tuple[str, ...], code: int, reason: str, fraud_repo: Path
    ) -> None:
        done = run(fraud_repo, "isochron", "erase", *arguments)
        assert (done.returncode, reason in done.stderr) == (code, True), done.stderr


# -- training sets ----------------------------------------------------------------------------------------------------


def test_a_rebuild_after_an_erasure_says_so_and_one_that_it_does_not_touch_is_the_same(
    repo: Path, tmp_path: Path
) -> None:
    spine = pa.table(
        {
            "customer_id": [2, 3],
            "event_timestamp": pa.array([moment(NOW)] * 2, pa.timestamp("us", "UTC")),
        }
    )
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        layer.erase({"customer_id": 4})
        made = layer.training_set(spine, FRAUD, tmp_path / "set")
        assert made.manifest.erasures == 1
        layer.erase({"terminal_id": 5})
        layer.erase({"customer_id": 5})
        again = layer.rebuild_training_set(made.path / "manifest.json", tmp_path / "again")
        assert (again.manifest.data, again.manifest.erasures) == (made.manifest.data, 2)
        layer.erase({"customer_id": 2})
        with pytest.raises(
            TrainingSetError,
            match=rf"not the manifest's bytes; erased since: 2 by customer_id, the last at {iso(NOW)}, whose records",
        ) as raised:
            layer.rebuild_training_set(made.path / "manifest.json", tmp_path / "third")
        assert "customer_id 2" not in str(raised.value)
        assert layer.training_set(spine, FRAUD, tmp_path / "third").manifest.erasures == 3


def test_an_erasure_while_a_set_is_read_fails_the_run(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feature_store.retrieval import training_set

    spine = pa.table({"customer_id": [2], "event_timestamp": pa.array([moment(NOW)], pa.timestamp("us", "UTC"))})
    write: Callable[..., Any] = training_set._write_rows
    with FeatureLayer(repo, clock=ManualClock(NOW)) as layer:
        monkeypatch.setattr(
            training_set, "_write_rows", lambda *given: (write(*given), layer.erase({"customer_id": 2}))[0]
        )
        with pytest.raises(TrainingSetError, match="was erased while they were read; run it again"):
            layer.training_set(spine, FRAUD, tmp_path / "set")
    assert not (tmp_path / "set").exists()


# -- unmodified Feast, composite keys, created times ------------------------------------------------------------------

START = parse_time("2024-03-01T00:00:00Z")
LAST = START + 12 * HOUR


def _orders() -> pa.Table:
    """Orders that were seen up to three hours after they happened, some never dated so."""
    rng = random.Random(3)
    at = [START + rng.randrange(0, 12 * HOUR, 30 * SECOND) for _ in range(300)]
    seen = [rng.choice([None, t + rng.randrange(0, 3 * HOUR, MINUTE)]) for t in at]
    return pa.table(
        {
            "cust": [rng.randrange(5) for _ in at],
            "shop": [rng.choice(["north", "south", "é"]) for _ in at],
            "paid": [rng.choice([None, 1.5, 10.0, float(i)]) for i, _ in enumerate(at)],
            "note": [rng.choice([None, "gift", ""]) for _ in at],
            "at": pa.array(at, pa.int64()).cast(pa.timestamp("us", "UTC")),
            "seen": pa.array(seen, pa.int64()).cast(pa.timestamp("us")),
        }
    )


def _gone(orders: pa.Table, erased_at: int, **values: Any) -> pa.Array:
    """Which orders have these values and were known by a time."""
    micros = [orders[name].cast(pa.int64()) for name in ("seen", "at")]
    found = pc.less_equal(pc.coalesce(*micros), erased_at)
    for name, value in values.items():
        found = pc.and_(found, pc.equal(orders[name], value))
    return found


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A shop in which customer 1, branch é of customer 2, and branch north were erased at different times; and one
    whose files never had their records of until then.
    """
    orders, folder = _orders(), tmp_path_factory.mktemp("shops")
    erased = [
        (START + 6 * HOUR, {"cust": 1}, {"customer": 1}),
        (START + 8 * HOUR, {"cust": 2, "shop": "é"}, {"customer": 2, "branch": "é"}),
        (START + 9 * HOUR, {"shop": "north"}, {"branch": "north"}),
    ]
    repos = []
    for name in ("erased", "without"):
        repos.append(folder / name / "shop_repo")
        shutil.copytree(Path(__file__).parent / "shop_repo", repos[-1], ignore=shutil.ignore_patterns("__pycache__"))
        (repos[-1] / "orders").mkdir()
        pq.write_table(orders, repos[-1] / "orders" / "rows.parquet")
        prices = {"item": ["tea"], "valid_from": orders["at"].slice(0, 1), "entered": orders["at"].slice(0, 1)}
        pq.write_table(pa.table({**prices, "eur": [1.0]}), repos[-1] / "prices.parquet")
        output_of(repos[-1], "feast", "apply")
    with FeatureLayer(repos[0], clock=(clock := ManualClock())) as layer:
        for time, _, keys in erased:
            clock.set(time)
            layer.erase(keys)
        # The pair is an entity of last_order alone; a customer or a branch also one of each view keyed by it.
        assert list(layer.erase({"customer": 2, "branch": "é"}).views) == ["last_order"]
    return repos[0], repos[1]


def test_every_answer_of_feast_is_that_of_files_without_the_records(shops: tuple[Path, Path]) -> None:
    orders, (with_erasures, without) = _orders(), shops
    rng = random.Random(9)
    times = [START + rng.randrange(0, 16 * HOUR, 30 * SECOND) for _ in range(80)]
    spine = pd.DataFrame(
        {
            "customer": [rng.randrange(6) for _ in times],
            "branch": [rng.choice(["north", "south", "é"]) for _ in times],
            "event_timestamp": pd.to_datetime(times, unit="us", utc=True),
        }
    )
    one = _gone(orders, START + 6 * HOUR, cust=1)
    pair = _gone(orders, START + 9 * HOUR, cust=2, shop="é")
    branch = _gone(orders, START + 9 * HOUR, shop="north")
    keyed = {
        "spend": (one, ["spend:sum_2h", "spend:orders"], ["cust"]),
        "traffic": (branch, ["traffic:in_1h"], ["shop"]),
        "last_order": (pc.or_(pc.or_(one, pair), branch), ["last_order:amount", "last_order:note"], ["cust", "shop"]),
    }
    for view, (gone, features, keys) in keyed.items():
        pq.write_table(orders.filter(pc.invert(gone)), without / "orders" / "rows.parquet")
        answers = [_answers(repo, view, features, keys, spine) for repo in (with_erasures, without)]
        for name, found in answers[0].items():
            assert found == answers[1][name], (view, name)
        assert answers[0]["all"] != orders.to_pylist()


def _answers(repo: Path, view: str, features: list[str], keys: list[str], spine: pd.DataFrame) -> dict[str, Any]:
    """What Feast's SDK says of a view in every way that it reads one."""
    store, config = FeatureStore(str(repo)), load_repo_config(repo, repo / "feature_store.yaml")
    source = store.get_data_source("orders_pushed").batch_source
    columns = {
        "join_key_columns": keys,
        "feature_name_columns": ["paid", "note"],
        "timestamp_field": "at",
        "created_timestamp_column": "seen",
    }
    bounds = {"start_date": moment(START), "end_date": moment(LAST)}
    store.materialize(moment(START), moment(LAST), [view])
    names = [{"cust": "customer", "shop": "branch"}[key] for key in keys]
    rows = spine[names].drop_duplicates().to_dict("records")
    return {
        "history": store.get_historical_features(spine, features).to_arrow().to_pylist(),
        "known": store.get_historical_features(spine, features, filter_by_created_timestamp=True)
        .to_arrow()
        .to_pylist(),
        "range": store.get_historical_features(features=features, **bounds).to_arrow().to_pylist(),
        "all": IsochronOfflineStore.pull_all_from_table_or_query(config, source, **columns).to_arrow().to_pylist(),
        "latest": IsochronOfflineStore.pull_latest_from_table_or_query(config, source, **columns, **bounds)
        .to_arrow()
        .to_pylist(),
        "online": store.get_online_features(features, rows).to_dict(),
    }
