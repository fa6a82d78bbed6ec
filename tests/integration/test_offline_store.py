"""Feast's offline store interface through the unmodified SDK: every value and every file it leaves behind."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FileSource
from feast.data_source import PushMode
from feast.dqm.errors import ValidationFailed
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.repo_config import load_repo_config
from feast.saved_dataset import ValidationReference

from feature_store.adapters.feast import feature_logs, offline_write
from feature_store.adapters.feast.offline_store import IsochronOfflineStore, end_given
from feature_store.adapters.feast.offline_write import BatchesWritten
from feature_store.adapters.feast.saved_dataset import write_folder
from feature_store.aggregations.reference import Event, value
from feature_store.definitions.view import WindowedView
from feature_store.engines.spark.engine import SparkEngine
from feature_store.errors import (
    NotCarried,
    NotFolded,
    RequestError,
    SourceError,
    SpineError,
    StoreNotReady,
    StoreUnavailable,
)
from feature_store.layer import FeatureLayer
from feature_store.retrieval.historical import HistoricalFeatures
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, iso, micros, moment, parse_time
from tests.processes import run

pytestmark = pytest.mark.filterwarnings("ignore")

START = micros(dt.datetime(2024, 3, 1, tzinfo=dt.UTC))
UTC, NAIVE = pa.timestamp("us", "UTC"), pa.timestamp("us")
ORDERS = pa.schema(
    [
        ("cust", pa.int64()),
        ("shop", pa.string()),
        ("paid", pa.float64()),
        ("note", pa.string()),
        ("at", UTC),
        ("seen", NAIVE),
    ]
)


def _orders(rng: random.Random, count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        at = START + rng.randrange(0, 12 * HOUR, 30 * SECOND)
        rows.append(
            {
                "cust": rng.randrange(6),
                "shop": rng.choice(["north", "south", "é"]),
                "paid": rng.choice([None, 1.5, 2.25, 10.0, float(number)]),
                "note": rng.choice([None, "gift", ""]),
                "at": at,
                "seen": at + rng.randrange(0, 3 * HOUR, 60 * SECOND),
            }
        )
    return rows


def _prices(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "item": rng.choice(["tea", "salt"]),
            "valid_from": START + rng.randrange(12) * HOUR,
            "entered": START + rng.randrange(18) * HOUR,
            "eur": float(number),
        }
        for number in range(40)
    ]


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{n: _moment(v, schema.field(n).type) for n, v in row.items()} for row in rows], schema)


def _moment(given: Any, kind: pa.DataType) -> Any:
    if not pa.types.is_timestamp(kind) or given is None:
        return given
    return moment(given) if kind.tz else moment(given).replace(tzinfo=None)


@pytest.fixture(scope="module")
def orders() -> list[dict[str, Any]]:
    return _orders(random.Random(3), 400)


@pytest.fixture(scope="module")
def prices() -> list[dict[str, Any]]:
    return _prices(random.Random(5))


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory, orders: list, prices: list) -> Path:
    repo = tmp_path_factory.mktemp("shop") / "shop_repo"
    shutil.copytree(Path(__file__).parent / "shop_repo", repo, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for number in range(3):
        (repo / "orders" / f"day={number}").mkdir(parents=True)
        pq.write_table(_table(orders[number::3], ORDERS), repo / "orders" / f"day={number}" / "rows.parquet")
    schema = pa.schema([("item", pa.string()), ("valid_from", UTC), ("entered", UTC), ("eur", pa.float64())])
    pq.write_table(_table(prices, schema), repo / "prices.parquet")
    done = run(repo, "feast", "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    return repo


@pytest.fixture
def repo(applied: Path, tmp_path: Path) -> Path:
    """A copy of the applied repository, to write into."""
    return Path(shutil.copytree(applied, tmp_path / "shop_repo"))


@pytest.fixture
def store(repo: Path) -> FeatureStore:
    return FeatureStore(str(repo))


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def _spine(rows: int = 60) -> pd.DataFrame:
    rng = random.Random(9)
    times = [START + rng.randrange(0, 16 * HOUR, 30 * SECOND) for _ in range(rows)]
    return pd.DataFrame(
        {
            "row": range(rows),
            "customer": [rng.randrange(8) for _ in range(rows)],
            "branch": [rng.choice(["north", "south", "west"]) for _ in range(rows)],
            "item": [rng.choice(["tea", "salt", "none"]) for _ in range(rows)],
            "event_timestamp": pd.to_datetime(times, unit="us", utc=True),
        }
    )


FEATURES = [
    "spend:sum_2h",
    "traffic:in_1h",
    "average:mean_2h",
    "price:euros",
    "last_order:amount",
]


def _windowed(repo: Path, view: str, key: str, orders: list, name: str) -> Callable[[Any, int, bool], Any]:
    """The value of a windowed feature for a key as of a time, by brute force; on request of what was known then."""
    found = FeatureLayer(repo).definitions.view(view)
    assert isinstance(found, WindowedView)
    aggregation = found.aggregation(name)

    def expected(of: Any, t: int, known: bool) -> Any:
        events = [
            Event(r["at"], {"amount": r["paid"]}, r["seen"])
            for r in orders
            if r[key] == of and (not known or r["seen"] <= t)
        ]
        return value(events, aggregation, t)

    return expected


def _price(prices: list[dict[str, Any]], item: str, t: int, known: bool) -> float | None:
    rows = [r for r in prices if r["item"] == item and r["valid_from"] <= t and (not known or r["entered"] <= t)]
    best = max(rows, key=lambda r: (r["valid_from"], r["entered"], r["eur"]), default=None)
    return best["eur"] if best and best["valid_from"] >= t - 3 * HOUR else None


def _near(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected


# -- history ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_features_as_of_what_was_known(applied: Path, orders: list, prices: list, known: bool) -> None:
    spine = _spine()
    job = FeatureStore(str(applied)).get_historical_features(spine, FEATURES, filter_by_created_timestamp=known)
    sum_2h = _windowed(applied, "spend", "cust", orders, "sum_2h")
    in_1h = _windowed(applied, "traffic", "shop", orders, "in_1h")
    rows = job.to_arrow().to_pylist()
    assert [r["row"] for r in rows] == spine["row"].tolist()
    for row in rows:
        t = micros(row["event_timestamp"])
        assert row["sum_2h"] == _near(sum_2h(row["customer"], t, known))
        assert row["in_1h"] == in_1h(row["branch"], t, known)
        assert row["euros"] == _price(prices, row["item"], t, known)
    assert sum(row["in_1h"] for row in rows) > 0


def test_what_was_known_is_another_answer_than_what_is_known_now(applied: Path) -> None:
    store = FeatureStore(str(applied))
    now = store.get_historical_features(_spine(), FEATURES).to_df()
    then = store.get_historical_features(_spine(), FEATURES, filter_by_created_timestamp=True).to_df()
    for name in ("sum_2h", "in_1h", "euros", "amount"):
        assert not now[name].equals(then[name]), name


@pytest.mark.parametrize("full", [False, True])
def test_without_a_spine_every_row_of_the_range_asks(applied: Path, orders: list, full: bool) -> None:
    store = FeatureStore(str(applied))
    start, end = START + 2 * HOUR, START + 4 * HOUR
    features = ["spend:sum_2h", "average:mean_2h", "last_order:note"]
    job = store.get_historical_features(
        None, features, full, start_date=moment(start).replace(tzinfo=None), end_date=moment(end)
    )
    found = job.to_df()
    asked = {(r["cust"], r["shop"], r["at"]) for r in orders if start <= r["at"] <= end}
    asked |= {(customer, None, at) for customer, _, at in asked}
    times = found["event_timestamp"].map(lambda t: micros(t.to_pydatetime()))
    assert set(zip(found["customer"], found["branch"], times, strict=True)) == asked
    assert len(found) == len(asked)
    again = store.get_historical_features(found[["customer", "branch", "event_timestamp"]], features, full).to_df()
    pd.testing.assert_frame_equal(again, found)
    assert found.columns[3:].tolist() == (
        ["spend__sum_2h", "average__mean_2h", "last_order__note", "spend__orders"]
        if full
        else ["sum_2h", "mean_2h", "note", "orders"]
    )
    assert job.full_feature_names is full
    assert (job.metadata.min_event_timestamp, job.metadata.max_event_timestamp) == (moment(start), moment(end))


def test_without_a_spine_the_start_is_the_longest_ttl_before_the_end(applied: Path, prices: list) -> None:
    job = FeatureStore(str(applied)).get_historical_features(None, ["price:euros"], end_date=moment(START + 5 * HOUR))
    found = {(r["item"], micros(r["event_timestamp"])) for r in job.to_arrow().to_pylist()}
    wanted = {2 * HOUR, 3 * HOUR, 4 * HOUR, 5 * HOUR}
    assert found == {(p["item"], p["valid_from"]) for p in prices if p["valid_from"] - START in wanted}


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_an_end_that_nobody_gave_is_now_whatever_the_machines_zone(
    zone: str, store: FeatureStore, repo: Path, local_zone: Callable[[str], None]
) -> None:
    now = time.time_ns() // 1_000
    ages = {"past": -2 * MINUTE, "future": 2 * HOUR}
    rows = [{"item": n, "valid_from": now + age, "entered": now, "eur": 1.0} for n, age in ages.items()]
    schema = pq.read_schema(repo / "prices.parquet")
    pq.write_table(_table(rows, schema), repo / "prices.parquet")
    local_zone(zone)
    assert store.get_historical_features(None, ["price:euros"]).to_df()["item"].tolist() == ["past"]


@pytest.fixture
def local_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_zone(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def test_a_naive_end_that_a_person_gave_is_utc(local_zone: Callable[[str], None]) -> None:
    local_zone("Asia/Tokyo")
    given = dt.datetime(2024, 3, 1, 12)  # noqa: DTZ001
    assert end_given(given, START) == given
    tokyo_now = moment(START).astimezone().replace(tzinfo=None)
    assert end_given(tokyo_now, START + SECOND) == moment(START)
    local_zone("America/New_York")
    twice = dt.datetime(2024, 11, 3, 1, 30)  # noqa: DTZ001
    for hour in (5, 6):
        assert end_given(twice, micros(dt.datetime(2024, 11, 3, hour, 30, 5, tzinfo=dt.UTC))) == dt.datetime(
            2024, 11, 3, hour, 30, tzinfo=dt.UTC
        )


def test_a_range_that_ends_before_it_starts_and_a_job_as_sql_are_refused(applied: Path) -> None:
    store = FeatureStore(str(applied))
    with pytest.raises(SpineError, match="is after end_date"):
        store.get_historical_features(None, FEATURES, start_date=moment(START + 1), end_date=moment(START))
    with pytest.raises(NotCarried, match="to_sql is not carried"):
        store.get_historical_features(_spine(), FEATURES).to_sql()


# -- saved datasets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["saved/training.parquet", "saved/training"])
def test_a_saved_dataset_comes_back_as_it_was(path: str, store: FeatureStore, repo: Path) -> None:
    spine = _spine().assign(kind=pd.Categorical(["a", "b", "a"] * 20), naive=pd.Timestamp("2024-03-01").as_unit("ns"))
    job = store.get_historical_features(spine, FEATURES, full_feature_names=True)
    made = store.create_saved_dataset(job, "training", SavedDatasetFileStorage(path))
    pd.testing.assert_frame_equal(made.to_df(), job.to_df())
    again = FeatureStore(str(repo)).get_saved_dataset("training")
    pd.testing.assert_frame_equal(again.to_df(), job.to_df())
    assert again.to_arrow().equals(job.to_arrow())
    assert (repo / path).is_dir() is not path.endswith(".parquet")


@pytest.mark.parametrize("path", ["saved/training.parquet", "saved/training"])
def test_a_saved_dataset_is_overwritten_only_if_that_is_allowed(path: str, store: FeatureStore, repo: Path) -> None:
    first, second = (store.get_historical_features(_spine(n), FEATURES) for n in (5, 7))
    store.create_saved_dataset(first, "training", SavedDatasetFileStorage(path))
    before = _files(repo)
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        store.create_saved_dataset(second, "training", SavedDatasetFileStorage(path))
    assert _files(repo) == before
    assert len(store.get_saved_dataset("training").to_df()) == 5
    store.create_saved_dataset(second, "training", SavedDatasetFileStorage(path), allow_overwrite=True)
    assert _files(repo) == before
    assert len(store.get_saved_dataset("training").to_df()) == 7


def test_a_folder_can_take_the_place_of_a_file_and_a_file_that_of_a_folder(store: FeatureStore, repo: Path) -> None:
    job = store.get_historical_features(_spine(3), FEATURES)
    (repo / "as_folder").write_text("in the way")
    (repo / "as_file.parquet").mkdir()
    job.persist(SavedDatasetFileStorage("as_folder"), allow_overwrite=True)
    job.persist(SavedDatasetFileStorage("as_file.parquet"), allow_overwrite=True)
    assert pq.read_table(repo / "as_folder").equals(job.to_arrow())
    assert pq.read_table(repo / "as_file.parquet").equals(job.to_arrow())


def test_an_empty_retrieval_can_be_saved_too(store: FeatureStore) -> None:
    job = store.get_historical_features(_spine().iloc[:0], FEATURES)
    for path in ("none.parquet", "none"):
        store.create_saved_dataset(job, "none", SavedDatasetFileStorage(path))
        assert store.get_saved_dataset("none").to_arrow().schema.equals(job.to_arrow().schema)


def test_a_retrieval_that_fails_leaves_nothing_where_it_was_to_be_saved(store: FeatureStore, repo: Path) -> None:
    job = store.get_historical_features(_spine(), FEATURES)
    (repo / "prices.parquet").unlink()
    before = _files(repo)
    for path in ("saved/new.parquet", "saved/new"):
        with pytest.raises(SourceError, match="no Parquet file at"):
            store.create_saved_dataset(job, "new", SavedDatasetFileStorage(path))
    with pytest.raises(SourceError, match="no Parquet file at"):
        job.to_remote_storage()
    with pytest.raises(SourceError, match="is not a local path"):
        job.persist(SavedDatasetFileStorage("s3://bucket/new.parquet"))
    assert _files(repo) == before


def test_a_retrieval_is_exported_as_files(store: FeatureStore, repo: Path, tmp_path: Path) -> None:
    job = store.get_historical_features(_spine(), FEATURES)
    assert job.supports_remote_storage_export()
    first, second = job.to_remote_storage(), job.to_remote_storage()
    assert not set(first) & set(second)
    assert all(Path(file).is_relative_to(repo / "data" / "staging") for file in first + second)
    assert pa.concat_tables(map(pq.read_table, first)).equals(job.to_arrow())
    write_folder(job.to_arrow(), tmp_path / "cut", rows_a_file=7)
    assert len(_files(tmp_path / "cut")) == 9
    assert pa.concat_tables(pq.read_table(f) for f in sorted((tmp_path / "cut").iterdir())).equals(job.to_arrow())


class _AtMost:
    """A profile that allows so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows, self.seen = rows, 0

    def validate(self, frame: pd.DataFrame) -> Any:
        self.seen = len(frame)
        return type("Report", (), {"is_success": len(frame) <= self.rows, "errors": []})()


def _reference(rows: int) -> ValidationReference:
    reference = ValidationReference("sizes", "training")
    reference._profile = _AtMost(rows)
    return reference


def test_a_retrieval_is_validated_against_a_reference(store: FeatureStore) -> None:
    job = store.get_historical_features(_spine(), FEATURES)
    assert len(job.to_df(validation_reference=_reference(60))) == 60
    with pytest.raises(ValidationFailed):
        job.to_df(validation_reference=_reference(59))


def test_spark_gives_the_same_and_its_executors_write_folders(store: FeatureStore, repo: Path) -> None:
    spine = _spine()
    pq.write_table(pa.Table.from_pandas(spine), repo / "spine.parquet")
    ours = store.get_historical_features(spine, FEATURES, filter_by_created_timestamp=True).to_df()
    config = (repo / "feature_store.yaml").read_text()
    conf = {"spark.sql.shuffle.partitions": 3, "spark.driver.memory": "1g"}
    on_spark = f"engine: spark\n  spark_master: local[2]\n  spark_conf: {json.dumps(conf)}"
    (repo / "feature_store.yaml").write_text(config.replace("memory_limit: 1GB", on_spark))
    store = FeatureStore(str(repo))
    with contextlib.closing(SparkEngine(repo, "local[2]", conf)) as kept_running:
        kept_running._session.get()
        theirs = store.get_historical_features(spine, FEATURES, filter_by_created_timestamp=True)
        pd.testing.assert_frame_equal(theirs.to_df(), ours, rtol=1e-9)
        with pytest.raises(SpineError, match="already has a column 'orders', the name of a requested feature"):
            store.get_historical_features(spine.assign(orders=1), ["average:mean_2h"]).to_df()  # an input's name
        job = store.get_historical_features(str(repo / "spine.parquet"), FEATURES, filter_by_created_timestamp=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HistoricalFeatures, "to_arrow", None)  # nothing comes through this process
            store.create_saved_dataset(job, "training", SavedDatasetFileStorage("saved"))
    pd.testing.assert_frame_equal(store.get_saved_dataset("training").to_df(), ours, rtol=1e-9)


# -- pushes to the offline store ----------------------------------------------------------------------------------


def _order(at: int, **columns: Any) -> dict[str, Any]:
    return {"cust": 1, "shop": "north", "paid": 5.0, "note": "new", "at": at, "seen": at, **columns}


def _frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return _table(list(rows), ORDERS).to_pandas()


def _counts(store: FeatureStore, at: int, features: list[str] | None = None) -> tuple[int, int]:
    spine = pd.DataFrame(
        {"customer": [1], "branch": ["north"], "event_timestamp": [pd.Timestamp(at, unit="us", tz="UTC")]}
    )
    row = store.get_historical_features(spine, ["spend:orders", "traffic:in_1h"]).to_df().iloc[0]
    return int(row["orders"]), int(row["in_1h"])


LATER = START + 20 * HOUR


def test_pushed_rows_are_folded_by_every_filled_online_view(store: FeatureStore, repo: Path) -> None:
    """Raw events come online by a push to the log: each view on the source folds them, once, and a refill agrees."""
    asked, at = ["spend:orders", "traffic:in_1h"], LATER + MINUTE
    keys = {"customer": [1], "branch": ["north"]}
    with FeatureLayer(repo) as layer:
        layer.bootstrap(["spend"], LATER)
        store.push("orders_pushed", _frame(_order(LATER), _order(LATER + 1)), to=PushMode.OFFLINE)
        orders, in_1h = _counts(store, at)
        assert layer.prepare(asked[:1]).read(keys, at).to_dict()["orders"] == [orders]
        with pytest.raises(StoreNotReady, match="view 'traffic': it was never filled"):
            layer.prepare(asked[1:]).read(keys, at)
        layer.bootstrap(["spend", "traffic"], at)
        assert layer.prepare(asked).read(keys, at).to_dict() | keys == {"orders": [orders], "in_1h": [in_1h]} | keys
        away = StoreUnavailable("here", "is away", "wait")
        with (
            mock.patch.object(type(layer.store.backend), "apply", side_effect=away),
            pytest.raises(
                NotFolded, match=r"the rows are written to the log, .* is away; wait.*bootstrap spend traffic"
            ),
        ):
            store.push("orders_pushed", _frame(_order(LATER)), to=PushMode.OFFLINE)
        assert _counts(store, at)[0] == orders + 1


def test_pushed_rows_are_events_once_for_every_view(store: FeatureStore, repo: Path) -> None:
    orders, in_1h = _counts(store, LATER + MINUTE)
    before = {f: (repo / "orders" / f).read_bytes() for f in _files(repo / "orders")}
    store.push("orders_pushed", _frame(_order(LATER)), to=PushMode.OFFLINE)
    assert _counts(store, LATER + MINUTE) == (orders + 1, in_1h + 1)
    store.push("orders_pushed", _frame(_order(LATER)), to=PushMode.OFFLINE)
    assert _counts(store, LATER + MINUTE) == (orders + 2, in_1h + 2)
    after = _files(repo / "orders")
    assert len(after) == len(before) + 2
    assert {f: (repo / "orders" / f).read_bytes() for f in before} == before
    last = store.get_historical_features(
        pd.DataFrame({"customer": [1], "branch": ["north"], "event_timestamp": [moment(LATER)]}), ["last_order:note"]
    )
    assert last.to_df()["note"].tolist() == ["new"]


def test_a_frame_written_to_one_view_is_written(store: FeatureStore) -> None:
    orders, in_1h = _counts(store, LATER + MINUTE)
    for view in ("traffic", "traffic", "last_order", "spend"):
        store.write_to_offline_store(view, _frame(_order(LATER)))
    assert _counts(store, LATER + MINUTE) == (orders + 2, in_1h + 2)


def test_pushes_at_the_same_time_are_each_written_once(store: FeatureStore) -> None:
    orders, _ = _counts(store, LATER + MINUTE)
    frames = [_frame(_order(LATER, paid=float(n % 2))) for n in range(8)]
    threads = [threading.Thread(target=store.push, args=("orders_pushed", f, True, PushMode.OFFLINE)) for f in frames]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _counts(store, LATER + MINUTE)[0] == orders + 8


def test_batches_are_told_apart_by_source_content_and_view() -> None:
    batches = BatchesWritten(remembered=2)
    pushes = [
        ("a", True),
        ("b", False),
        ("b", True),
        ("a", False),
        ("c", False),
        ("a", True),
        ("c", False),
        ("c", False),
    ]
    assert [batches.is_first("orders", "x", view) for view, _ in pushes] == [first for _, first in pushes]
    assert batches.is_first("orders", "y", "b")
    assert batches.is_first("others", "x", "b")


def test_no_row_of_a_push_is_lost(store: FeatureStore) -> None:
    orders, _ = _counts(store, LATER + 2 * HOUR)
    rows = [_order(LATER + n * MINUTE, paid=None, note=None) for n in range(4)]
    # A frame that was cut out of another one carries its index; one of Arrow columns carries several chunks.
    store.push("orders_pushed", _frame(*rows).iloc[[1, 3]], to=PushMode.OFFLINE)
    chunked = pa.concat_tables([_table(rows[:1], ORDERS), _table(rows[1:], ORDERS)])
    store.push("orders_pushed", chunked.to_pandas(types_mapper=pd.ArrowDtype), to=PushMode.OFFLINE)
    assert _counts(store, LATER + 2 * HOUR)[0] == orders + 6


def test_nothing_is_written_for_no_rows(store: FeatureStore, repo: Path) -> None:
    before = _files(repo)
    store.push("orders_pushed", _frame(), to=PushMode.OFFLINE)
    assert _files(repo) == before


def test_times_may_come_as_text_in_any_unit_and_naive(store: FeatureStore, repo: Path) -> None:
    orders, _ = _counts(store, LATER + MINUTE)
    texts = _frame(_order(LATER)).assign(at=iso(LATER), seen=iso(LATER).rstrip("Z"))
    finer = _frame(_order(LATER)).astype({"at": "datetime64[ns, Europe/Berlin]", "seen": "datetime64[ns]"})
    bare = _frame(_order(LATER)).assign(at=pd.Timestamp(LATER, unit="us"))
    for frame in (texts, finer, bare):
        store.push("orders_pushed", frame, to=PushMode.OFFLINE)
    assert _counts(store, LATER + MINUTE)[0] == orders + 3
    assert {str(pq.read_schema(repo / "orders" / f).field("at").type) for f in _files(repo / "orders")} == {str(UTC)}


NOW = time.time_ns() // 1_000
REFUSED = {
    "text for a number": ({"paid": ["much"]}, "'amount' is refused: it is .*string, but is declared as Float64"),
    "a fraction for a whole number": ({"cust": [1.5]}, "'customer' is refused: it holds a value that is no Int64"),
    "no key": ({"shop": [None]}, "'branch' is null in row 0|'shop' is null in row 0"),
    "no time": ({"at": [None]}, "'at' is null in row 0"),
    "text that is no time": ({"at": ["noon"]}, "'at' holds 'noon', which is no time"),
    "a number for a time": ({"at": [5]}, "'at' is refused: it is int64"),
    "an event of tomorrow": ({"at": [moment(NOW + DAY)]}, "more than an hour ahead"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(case: str, store: FeatureStore, repo: Path) -> None:
    columns, reason = REFUSED[case]
    before = _files(repo)
    with pytest.raises(RequestError, match=reason):
        store.push("orders_pushed", _frame(_order(LATER)).assign(**columns), to=PushMode.OFFLINE)
    assert _files(repo) == before


def test_columns_that_do_not_fit_are_refused_and_nothing_is_written(store: FeatureStore, repo: Path) -> None:
    view, before = store.get_stream_feature_view("spend"), _files(repo)
    mapped = _table([_order(LATER)], ORDERS).rename_columns(["customer", "branch", "amount", "note", "at", "seen"])
    lacking, more = mapped.drop_columns(["note"]), mapped.append_column("tip", pa.array([1.0]))
    twice = mapped.append_column("amount", pa.array([1.0]))
    for table, reason in (
        (lacking, "'note' is missing; there are: customer"),
        (more, "'tip' is no column of source 'orders'; it has: cust, shop"),
        (twice, "'amount' is given twice"),
    ):
        with pytest.raises(RequestError, match=reason):
            IsochronOfflineStore.offline_write_batch(store.config, view, table, None)
    assert _files(repo) == before
    done: list[int] = []
    IsochronOfflineStore.offline_write_batch(store.config, view, _table([_order(LATER)], ORDERS), done.append)
    assert done == [1]
    assert len(_files(repo)) == len(before) + 1


def test_a_source_of_one_file_is_not_rewritten(store: FeatureStore, repo: Path) -> None:
    before, content = _files(repo), (repo / "prices.parquet").read_bytes()
    frame = pd.DataFrame({"item": ["tea"], "valid_from": [moment(START)], "entered": [moment(START)], "eur": [1.0]})
    with pytest.raises(SourceError, match=r"prices.parquet is one file; .* Declare a folder"):
        store.write_to_offline_store("price", frame)
    assert _files(repo) == before
    assert (repo / "prices.parquet").read_bytes() == content


def test_a_folder_that_is_not_there_is_named(store: FeatureStore, repo: Path) -> None:
    shutil.rmtree(repo / "orders")
    with pytest.raises(SourceError, match="source 'orders': no Parquet file at"):
        store.push("orders_pushed", _frame(_order(LATER)), to=PushMode.OFFLINE)
    assert not (repo / "orders").exists()


# -- logs of served features --------------------------------------------------------------------------------------


def _logs(store: FeatureStore, service: str, days: list[int], euros: float = 1.0) -> pa.Table:
    """Logs as Feast's schema has them: one row a day, at noon."""
    from feast.feature_logging import FeatureServiceLoggingSource

    schema = FeatureServiceLoggingSource(store.get_feature_service(service), store.project).get_schema(store.registry)
    times = [START + day * DAY + 12 * HOUR for day in days]
    known: dict[str, list[Any]] = {
        "customer": days,
        "item": ["tea"] * len(days),
        "price__euros": [euros] * len(days),
        "__log_timestamp": [moment(t) for t in times],
        "__log_date": [moment(t).date() for t in times],
        "__request_id": [f"request {day}" for day in days],
    }
    return pa.table({f.name: pa.array(known.get(f.name, [None] * len(days)), f.type) for f in schema})


def _read_logs(store: FeatureStore, service: str, first: int, last: int) -> pa.Table:
    """What Feast reads of the logs of these days, in the order of time; Parquet keeps seconds as milliseconds."""
    bounds = moment(START + first * DAY), moment(START + last * DAY + DAY)
    found = store.get_feature_service(service)
    job = store._get_provider().retrieve_feature_service_logs(found, *bounds, store.config, store.registry)
    schema = _logs(store, service, []).schema
    return job.to_arrow().select(schema.names).cast(schema).sort_by("__log_timestamp")


@pytest.mark.parametrize("service", ["served", "by_day"])
def test_logs_come_back_as_they_were_written(service: str, store: FeatureStore, repo: Path, tmp_path: Path) -> None:
    written = store.get_feature_service(service)
    store.write_logged_features(_logs(store, service, [0, 1, 1]), written)
    (tmp_path / "flushed").mkdir()
    pq.write_table(_logs(store, service, [2]), tmp_path / "flushed" / "a.parquet")
    pq.write_table(_logs(store, service, [4]), tmp_path / "flushed" / "b.parquet")
    store.write_logged_features(tmp_path / "flushed", written)
    whole = _logs(store, service, [0, 1, 1, 2, 4])
    assert _read_logs(store, service, 0, 9).equals(whole)
    assert _read_logs(store, service, 1, 3).equals(_logs(store, service, [1, 1, 2]))
    files = _files(repo / "logs" / service)
    if service == "by_day":
        assert {f.split("/")[0] for f in files} == {"2024-03-01", "2024-03-02", "2024-03-03", "2024-03-05"}
    else:
        assert len(files) == 2


def test_logs_are_validated_against_a_reference(store: FeatureStore) -> None:
    service = store.get_feature_service("served")
    store.write_logged_features(_logs(store, "served", [0, 1, 2]), service)
    start, end, allowed = moment(START), moment(START + 2 * DAY), _reference(2)
    assert store.validate_logged_features(service, start, end, allowed, cache_profile=False) is None
    assert allowed._profile.seen == 2
    with pytest.raises(ValidationFailed):
        store.validate_logged_features(service, start, end, _reference(1), cache_profile=False)


def test_logs_of_a_service_that_gained_a_feature_are_read_with_the_older_ones(store: FeatureStore, repo: Path) -> None:
    older = _logs(store, "served", [0]).drop_columns(["price__euros"])
    (repo / "logs" / "served").mkdir(parents=True)
    pq.write_table(older, repo / "logs" / "served" / "older.parquet")
    store.write_logged_features(_logs(store, "served", [1], 7.0), store.get_feature_service("served"))
    read = _read_logs(store, "served", 0, 9)
    assert read["price__euros"].to_pylist() == [None, 7.0]
    assert read["customer"].to_pylist() == [0, 1]


def test_logs_that_do_not_fit_are_refused_and_nothing_is_written(
    store: FeatureStore, repo: Path, tmp_path: Path
) -> None:
    service, logs, before = store.get_feature_service("by_day"), _logs(store, "by_day", [0, 1]), _files(repo)
    at = logs.column_names.index("price__euros")
    for table, reason in (
        (logs.drop_columns(["customer"]), "'customer' is missing in the logs"),
        (logs.set_column(at, "price__euros", pa.array(["a", "b"])), "'price__euros' is refused: it is string"),
        (logs.append_column("more", pa.array([1, 2])), "'more' is no column of the logs' schema"),
    ):
        with pytest.raises(RequestError, match=reason):
            store.write_logged_features(table, service)
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        store.write_logged_features(tmp_path / "nowhere", service)
    store.write_logged_features(logs.slice(2), service)
    assert _files(repo) == before


# -- rows of a source ---------------------------------------------------------------------------------------------

KEYS, VALUES = ["cust", "shop"], ["paid", "note"]


def _pull(repo: Path, source: FileSource, which: str, start: int | None, end: int | None, **columns: Any) -> pa.Table:
    asked = {
        "join_key_columns": KEYS,
        "feature_name_columns": VALUES,
        "timestamp_field": "at",
        "created_timestamp_column": "seen",
        **columns,
    }
    bounds = {"start_date": start, "end_date": end}
    times = {name: None if t is None else moment(t) for name, t in bounds.items()}
    method = getattr(IsochronOfflineStore, f"pull_{which}_from_table_or_query")
    return method(load_repo_config(repo, repo / "feature_store.yaml"), source, **asked, **times).to_arrow()


@pytest.fixture
def source(applied: Path) -> FileSource:
    return FeatureStore(str(applied)).get_data_source("orders_pushed").batch_source


@pytest.mark.parametrize(("start", "end"), [(None, None), (START + HOUR, None), (None, START + HOUR), (START, START)])
def test_all_rows_of_a_range_as_they_lie_in_the_files(
    start: int | None, end: int | None, applied: Path, source: FileSource, orders: list
) -> None:
    pulled = _pull(applied, source, "all", start, end)
    low, high = (START - DAY if start is None else start), (START + DAY if end is None else end)
    rows = [r for part in range(3) for r in orders[part::3] if low <= r["at"] <= high]
    assert pulled.equals(_table(rows, ORDERS).select([*KEYS, *VALUES, "at", "seen"]))


@pytest.mark.parametrize(("start", "end"), [(None, None), (START + HOUR, START + 5 * HOUR)])
def test_the_newest_row_of_each_key(
    start: int | None, end: int | None, applied: Path, source: FileSource, orders: list
) -> None:
    pulled = _pull(applied, source, "latest", start, end)
    newest: dict[tuple, tuple] = {}
    for row in orders:
        if (start or row["at"]) <= row["at"] <= (end or row["at"]):
            rank = (row["at"], row["seen"], row["paid"] is not None, row["paid"] or 0, row["note"] or "")
            key = row["cust"], row["shop"]
            newest[key] = max(newest.get(key, (rank, row)), (rank, row), key=lambda pair: pair[0])
    rows = [newest[key][1] for key in sorted(newest, key=lambda k: (k[0], k[1].encode()))]
    assert pulled.equals(_table(rows, ORDERS).select([*KEYS, *VALUES, "at", "seen"]))


def test_ties_go_to_the_same_row_whatever_the_order_of_files(repo: Path, source: FileSource) -> None:
    tied = [_order(LATER, paid=paid, note=note) for paid, note in ((1.0, "z"), (2.0, "a"), (2.0, "b"), (None, "zz"))]
    shutil.rmtree(repo / "orders")
    for order in (tied, tied[::-1]):
        for number, row in enumerate(order):
            (repo / "orders").mkdir(exist_ok=True)
            pq.write_table(_table([row], ORDERS), repo / "orders" / f"{number}.parquet")
        row = _pull(repo, source, "latest", None, LATER).to_pylist()[0]
        assert (row["paid"], row["note"]) == (2.0, "b")
        spine = pd.DataFrame({"customer": [1], "branch": ["north"], "event_timestamp": [moment(LATER)]})
        history = FeatureStore(str(repo)).get_historical_features(spine, ["last_order:amount", "last_order:note"])
        assert history.to_df()[["amount", "note"]].values.tolist() == [[2.0, "b"]]


def test_files_of_all_kinds_of_times_are_pulled_as_one_table(repo: Path) -> None:
    kinds = [pa.timestamp("s"), pa.timestamp("ms", "UTC"), pa.timestamp("us"), pa.timestamp("ns", "Asia/Tokyo")]
    (repo / "mixed").mkdir()
    for number, kind in enumerate(kinds):
        at = (
            pa.array([START, START + SECOND], pa.timestamp("us"))
            .cast(pa.timestamp(kind.unit))
            .view(pa.int64())
            .view(kind)
        )
        table = pa.table(
            {"k.ey": pa.array([number, number], pa.int16()), "at": at, "v": pa.array([1.0, 2.0], pa.float32())}
        )
        pq.write_table(table, repo / "mixed" / f"{number}.parquet")
    source = FileSource(name="mixed", path="mixed", timestamp_field="at")
    columns = {"join_key_columns": ["k.ey"], "feature_name_columns": ["v"], "created_timestamp_column": None}
    everything = _pull(repo, source, "all", START, START + SECOND, **columns)
    assert everything.schema.field("at").type == kinds[3]
    assert everything["at"].cast(pa.int64()).to_pylist() == [START * 1_000, (START + SECOND) * 1_000] * 4
    latest = _pull(repo, source, "latest", START, START + SECOND - 1, **columns)
    assert latest["k.ey"].to_pylist() == [0, 1, 2, 3]
    assert latest["v"].to_pylist() == [1.0] * 4
    assert latest.schema.equals(everything.schema)
    assert _pull(repo, source, "all", START + 1, START + SECOND, **columns)["v"].to_pylist() == [2.0] * 4
    far = _pull(repo, source, "all", parse_time("0001-01-01"), parse_time("9999-12-31"), **columns)
    assert len(far) == 8


def test_times_finer_than_microseconds_are_floored_when_they_are_compared(repo: Path) -> None:
    finer = pa.timestamp("ns", "UTC")
    rows = pa.table({"k": [1, 2], "at": pa.array([START * 1_000 + 999, START * 1_000 + 1_000], finer)})
    pq.write_table(rows, repo / "finer.parquet")
    source = FileSource(name="finer", path="finer.parquet", timestamp_field="at")
    columns = {"join_key_columns": ["k"], "feature_name_columns": [], "created_timestamp_column": None}
    assert _pull(repo, source, "all", START, START, **columns).equals(rows.slice(0, 1))
    assert _pull(repo, source, "all", START + 1, None, **columns).equals(rows.slice(1))
    latest = _pull(repo, source, "latest", START, START, **columns)
    assert latest.equals(pa.table({"k": [1], "at": pa.array([START * 1_000], finer)}))


def test_no_features_at_all_means_every_column(applied: Path, source: FileSource, orders: list) -> None:
    everything = _pull(applied, source, "all", None, None, feature_name_columns=[])
    assert everything.column_names == ["cust", "shop", "at", "seen", "paid", "note"]
    latest = _pull(applied, source, "latest", None, None, feature_name_columns=[])
    assert latest.select(everything.column_names).equals(
        _pull(applied, source, "latest", None, None).select(everything.column_names)
    )


def test_a_pull_that_cannot_be_is_refused(applied: Path, source: FileSource) -> None:
    for which in ("all", "latest"):
        with pytest.raises(SourceError, match="has no column 'tip'; it has: cust, shop"):
            _pull(applied, source, which, None, None, feature_name_columns=["tip"])
        with pytest.raises(SourceError, match="time column 'note' is string, not a timestamp"):
            _pull(applied, source, which, None, None, timestamp_field="note")
        with pytest.raises(SourceError, match="no Parquet file at"):
            _pull(applied, FileSource(name="gone", path="gone", timestamp_field="at"), which, None, None)
        with pytest.raises(SourceError, match="is not a local path"):
            _pull(applied, FileSource(name="far", path="s3://b/f", timestamp_field="at"), which, None, None)


def test_feasts_own_engine_and_online_store_work_on_our_offline_store(repo: Path, prices: list) -> None:
    """Unmodified Feast materializes a plain view through `pull_latest_from_table_or_query` into its SQLite store."""
    (repo / "feature_store.yaml").write_text(
        "project: shop\nprovider: local\nregistry: data/other.db\nentity_key_serialization_version: 3\n"
        "offline_store: {type: feature_store.adapters.feast.IsochronOfflineStore}\n"
        "online_store: {type: sqlite, path: data/online.db}\n"
    )
    done = run(repo, "feast", "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    store = FeatureStore(str(repo))
    store.materialize(moment(START), moment(START + 5 * HOUR), ["price"])
    past = [p for p in prices if p["valid_from"] <= START + 5 * HOUR]
    newest = {p["item"]: p["eur"] for p in sorted(past, key=lambda p: (p["valid_from"], p["entered"], p["eur"]))}
    found = store.get_online_features(["price:euros"], [{"item": item} for item in newest]).to_dict()
    assert dict(zip(found["item"], found["euros"], strict=True)) == newest


# -- sources ------------------------------------------------------------------------------------------------------


def test_the_columns_of_a_source_are_those_of_its_files(store: FeatureStore, source: FileSource) -> None:
    provider = store._get_provider()
    found = dict(provider.get_table_column_names_and_types_from_data_source(store.config, source))
    assert found == {field.name: str(field.type) for field in ORDERS}
    gone = FileSource(name="gone", path="gone", timestamp_field="at")
    with pytest.raises(SourceError, match="no Parquet file at"):
        provider.get_table_column_names_and_types_from_data_source(store.config, gone)


def test_a_plan_refuses_a_source_that_cannot_be_read_and_waits_for_one_that_is_not_there(repo: Path) -> None:
    prices = pq.read_table(repo / "prices.parquet")
    at = prices.column_names.index("entered")
    pq.write_table(prices.set_column(at, "entered", pa.array(["late"] * len(prices))), repo / "prices.parquet")
    done = run(repo, "feast", "plan")
    assert done.returncode == 1
    assert "source 'prices': time column 'entered' is string, not a timestamp" in done.stderr
    assert "Traceback" not in done.stderr
    (repo / "prices.parquet").unlink()
    done = run(repo, "feast", "plan")
    assert done.returncode == 0, done.stderr
    assert "source 'prices': there is nothing at prices.parquet yet" in done.stdout + done.stderr


def test_logs_without_a_partition_value_have_a_folder_of_their_own() -> None:
    rows = pa.table({"shop": ["a", None, "b", None], "n": [1, 2, 3, 4]})
    parts = {folders[0]: part["n"].to_pylist() for folders, part in feature_logs._parts(rows, ["shop"])}
    assert parts == {"a": [1], "__HIVE_DEFAULT_PARTITION__": [2, 4], "b": [3]}


def test_rows_whose_file_could_not_be_named_are_written_by_the_next_view(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, _ = _counts(store, LATER + MINUTE)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(offline_write, "publish", full)
        with pytest.raises(OSError, match="no space left"):
            store.write_to_offline_store("traffic", _frame(_order(LATER)))
    store.write_to_offline_store("last_order", _frame(_order(LATER)))
    assert _counts(store, LATER + MINUTE)[0] == orders + 1
