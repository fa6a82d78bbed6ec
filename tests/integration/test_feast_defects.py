"""What goes wrong in Feast 0.67's own offline stores and must not here, through its unmodified SDK.

What each test says of Feast was seen with 0.67.0, on its default store (dask) unless the DuckDB one is named.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from feast.data_source import PushMode
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

from feature_store.timestamps import HOUR, MINUTE, moment, parse_time
from tests.processes import run

pytestmark = pytest.mark.filterwarnings("ignore")

START = parse_time("2024-01-01")
UTC = pa.timestamp("us", "UTC")
ROWS = pa.schema([("a", pa.string()), ("b", pa.string()), ("at", UTC), ("made", UTC), ("x", pa.float64())])

CONFIG = """
project: pairs
provider: local
registry: data/registry.db
offline_store: {type: feature_store.adapters.feast.IsochronOfflineStore}
online_store: {type: feature_store.adapters.feast.IsochronOnlineStore}
batch_engine: {type: feature_store.adapters.feast.IsochronEngine}
entity_key_serialization_version: 3
"""
DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Float64

keys = [Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in ("a", "b")]
first, second = keys
rows = FileSource(name="rows", path="rows", timestamp_field="at", created_timestamp_column="made")
schema = [Field(name="x", dtype=Float64)]
kept = FeatureView(name="kept", entities=keys, source=PushSource(name="pushed", batch_source=rows), schema=schema)
short = FeatureView(name="short", entities=keys, source=rows, ttl=timedelta(hours=1), schema=schema)
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("pairs")
    (repo / "feature_store.yaml").write_text(CONFIG)
    (repo / "definitions.py").write_text(DEFINITIONS)
    (repo / "rows").mkdir()
    done = run(repo, "feast", "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    return repo


@pytest.fixture
def store(repo: Path) -> FeatureStore:
    for file in (repo / "rows").iterdir():
        file.unlink()
    return FeatureStore(str(repo))


@pytest.fixture
def hold(repo: Path) -> Callable[[list[tuple]], None]:
    """Makes the source hold these rows of (a, b, at, made, x), in so many row groups."""

    def write(rows: list[tuple]) -> None:
        times = [(a, b, moment(START + at), moment(START + made), x) for a, b, at, made, x in rows]
        table = pa.Table.from_pylist([dict(zip(ROWS.names, row, strict=True)) for row in times], ROWS)
        pq.write_table(table, repo / "rows" / "0.parquet", row_group_size=3)

    return write


def _spine(keys: list[tuple[str, str]], times: list[int], **columns: Any) -> pd.DataFrame:
    at = pd.to_datetime([START + t for t in times], unit="us", utc=True)
    return pd.DataFrame({"a": [a for a, _ in keys], "b": [b for _, b in keys], "event_timestamp": at, **columns})


def _values(store: FeatureStore, spine: pd.DataFrame, view: str = "kept") -> list[float | None]:
    frame = store.get_historical_features(spine, [f"{view}:x"]).to_df()
    pd.testing.assert_frame_equal(frame[spine.columns.tolist()], spine, check_dtype=False)
    return [None if pd.isna(x) else x for x in frame["x"]]


def test_training_rows_with_equal_key_and_time_are_all_kept(store: FeatureStore, hold: Callable) -> None:
    """Feast keeps one of them, also where their other columns differ (its DuckDB store keeps all)."""
    hold([("a", "b", 0, 0, 1.0)])
    assert _values(store, _spine([("a", "b")] * 3, [HOUR] * 3)) == [1.0] * 3
    assert _values(store, _spine([("a", "b")] * 3, [HOUR] * 3, label=[0, 1, 1])) == [1.0] * 3


def test_rows_without_a_live_value_are_kept_with_null(store: FeatureStore, hold: Callable) -> None:
    """Feast drops a row before its key's first value, and one whose value the ttl has ended, from the training data;
    a key that was never seen it keeps. Its DuckDB store keeps all.
    """
    hold([("a", "b", HOUR, HOUR, 1.0)])
    keys, times = [("a", "b"), ("z", "z"), ("a", "b"), ("a", "b")], [0, HOUR, HOUR, 9 * HOUR]
    assert _values(store, _spine(keys, times)) == [None, None, 1.0, 1.0]
    assert _values(store, _spine(keys, times), "short") == [None, None, 1.0, None]


def test_rows_keep_their_order(store: FeatureStore, hold: Callable) -> None:
    """Feast sorts the training data by time, and by what its joins leave (both stores)."""
    hold([("a", "b", 0, 0, 1.0), ("a", "c", 0, 0, 2.0)])
    times = [5 * HOUR, HOUR, 3 * HOUR, HOUR]
    assert _values(store, _spine([("a", "b"), ("a", "c"), ("z", "z"), ("a", "b")], times)) == [1.0, 2.0, None, 1.0]


def test_of_rows_of_one_time_the_one_created_last_counts(store: FeatureStore, hold: Callable) -> None:
    """Feast sorts by created time, then by event time with a sort that is not stable: of 40 keys with 5 such rows each
    36 got another row than the last one. (Its DuckDB store gets them right.)
    """
    rng = random.Random(1)
    rows = [(f"k{n % 40}", "b", 0, made * MINUTE, float(made)) for n, made in enumerate(rng.sample(range(200), 200))]
    hold(rows)
    keys = sorted({row[0] for row in rows})
    last = [max(made for key, _, _, made, _ in rows if key == wanted) / MINUTE for wanted in keys]
    assert _values(store, _spine([(key, "b") for key in keys], [HOUR] * 40)) == last


def test_keys_of_two_texts_are_not_run_together(store: FeatureStore, hold: Callable) -> None:
    """Feast's DuckDB store makes one text of a row's keys. No defect of 0.67.0 any more: it writes each text's length
    before it, and keeps these apart as we do.
    """
    hold([("a", "bc", 0, 0, 1.0), ("ab", "c", 0, 0, 2.0), ("1", "11", 0, 0, 3.0), ("11", "1", 0, 0, 4.0)])
    keys = [("ab", "c"), ("a", "bc"), ("11", "1"), ("1", "11"), ("abc", ""), ("", "abc")]
    assert _values(store, _spine(keys, [HOUR] * 6)) == [2.0, 1.0, 4.0, 3.0, None, None]
    store.materialize(moment(START), moment(START + HOUR), ["kept"])
    online = store.get_online_features(["kept:x"], [{"a": a, "b": b} for a, b in keys]).to_dict()
    assert online["x"] == [2.0, 1.0, 4.0, 3.0, None, None]


def _chunked(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame whose columns each have several Arrow chunks."""
    tables = [pa.Table.from_pandas(frame, preserve_index=False) for frame in frames]
    frame = pa.concat_tables(tables).to_pandas(types_mapper=pd.ArrowDtype)
    assert pa.Table.from_pandas(frame)["a"].num_chunks == len(frames)
    return frame


def test_no_chunk_of_a_table_is_lost(store: FeatureStore, hold: Callable) -> None:
    """Feast turns `table.to_batches()[0]` into what it writes online: of a frame whose Arrow columns have several
    chunks, `write_to_online_store` keeps the first chunk, silently, in any store (the rest never reaches ours); so
    does a materialization by Feast's own engine of what an offline store pulls in several chunks. History of such a
    frame fails there with an AttributeError.
    """
    hold([(f"k{n}", "b", 0, 0, float(n)) for n in range(10)])
    asked = _chunked([_spine([(f"k{n}", "b")], [HOUR]) for n in range(10)])
    assert _values(store, asked) == [float(n) for n in range(10)]
    pushed = _chunked(
        [
            pd.DataFrame({"a": ["new"], "b": [str(n)], "at": [moment(START)], "made": [moment(START)], "x": [float(n)]})
            for n in range(4)
        ]
    )
    store.push("pushed", pushed, to=PushMode.OFFLINE)
    assert _values(store, _spine([("new", str(n)) for n in range(4)], [HOUR] * 4)) == [0.0, 1.0, 2.0, 3.0]
    source = store.get_data_source("rows")
    columns = ["a", "b"], ["x"], "at", "made"
    bounds = moment(START), moment(START + HOUR)
    offline = store._get_provider().offline_store
    for pull in (offline.pull_latest_from_table_or_query, offline.pull_all_from_table_or_query):
        pulled = pull(store.config, source, *columns, *bounds).to_arrow()
        assert len(pulled) == 14
        assert len(pulled.to_batches()) == 1


def test_a_saved_dataset_that_was_overwritten_is_read_whole(store: FeatureStore, hold: Callable) -> None:
    """Feast's registry keeps the time range of the first dataset of a name, and reads only that of the second; and
    what it reads lacks the spine's other columns.
    """
    hold([("a", "b", 0, 0, 1.0)])
    storage = SavedDatasetFileStorage("saved.parquet")
    for rows in (2, 4):
        spine = _spine([("a", "b")] * rows, [n * HOUR for n in range(rows)], note=range(rows))
        job = store.get_historical_features(spine, ["kept:x"])
        store.create_saved_dataset(job, "training", storage, allow_overwrite=True)
        pd.testing.assert_frame_equal(store.get_saved_dataset("training").to_df(), job.to_df())
