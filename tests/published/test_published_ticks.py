"""As-of joins of real quotes, of which many share a time: the answer is one, however their rows lie in files.

Needs the published files: ISOCHRON_DATA names a folder with `ticks/oanda_forex_quotes.parquet` (the rows that are
looked up) and `ticks/fxcm_forex_quotes.parquet` (the rows that ask).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.retrieval.historical import retrieve
from feature_store.testing.views import definitions

pytestmark = pytest.mark.published

FEATURES = {"ask": ValueType.FLOAT64, "bid": ValueType.FLOAT64, "seq": ValueType.INT64}
VIEW = PlainView(
    name="quotes",
    keys=(Field("symbol", ValueType.STRING),),
    features=tuple(Field(name, t) for name, t in FEATURES.items()),
    source=Source(name="quotes", path="quotes", timestamp_field="ts"),
)


@pytest.fixture(scope="module")
def ticks() -> Path:
    folder = os.environ.get("ISOCHRON_DATA")
    if not folder:
        pytest.skip("set ISOCHRON_DATA to the folder that holds ticks/oanda_forex_quotes.parquet")
    return Path(folder) / "ticks"


@pytest.fixture(scope="module")
def spine(ticks: Path) -> pa.Table:
    asked = pq.read_table(ticks / "fxcm_forex_quotes.parquet", columns=["symbol", "ts", "seq"])
    return asked.rename_columns(["symbol", "event_timestamp", "asking_seq"])


def matched(quotes: pa.Table, spine: pa.Table, folder: Path, files: int, row_group: int) -> np.ndarray:
    """The sequence numbers that the spine's rows find among quotes laid out in this many files; -1 is none."""
    (folder / "quotes").mkdir(parents=True)
    size = -(-len(quotes) // files)
    for i in range(files):
        part = quotes.slice(i * size, size)
        pq.write_table(part, folder / "quotes" / f"{i}.parquet", row_group_size=row_group)
    with contextlib.closing(DuckDBEngine(folder)) as engine:
        found = retrieve(definitions(VIEW).resolve([f"quotes:{name}" for name in FEATURES]), spine, engine)
    return found["seq"].fill_null(-1).to_numpy()


def expected(quotes: pa.Table, spine: pa.Table) -> np.ndarray:
    """The same by pandas: of equal times the row with the greatest values by name, then the newest before each time."""
    by_time = quotes.to_pandas().sort_values(["symbol", "ts", "ask", "bid", "seq"])
    newest = by_time.drop_duplicates(["symbol", "ts"], keep="last").sort_values("ts", kind="stable")
    asked = spine.to_pandas().reset_index().sort_values("event_timestamp", kind="stable")
    found = pd.merge_asof(
        asked, newest, left_on="event_timestamp", right_on="ts", by="symbol", direction="backward"
    ).sort_values("index")
    return found["seq"].fillna(-1).to_numpy().astype(np.int64)


def test_shuffled_quotes_give_the_same_matches(ticks: Path, spine: pa.Table, tmp_path: Path) -> None:
    quotes = pq.read_table(ticks / "oanda_forex_quotes.parquet")
    tied = len(quotes) - quotes.group_by(["symbol", "ts"]).aggregate([]).num_rows
    truth = expected(quotes, spine)
    hashes = set()
    for seed, (files, row_group) in enumerate([(1, 1_000_000), (1, 997), (7, 10_000)]):
        order = np.random.default_rng(seed).permutation(len(quotes)) if seed else np.arange(len(quotes))
        found = matched(quotes.take(pa.array(order)), spine, tmp_path / str(seed), files, row_group)
        assert np.array_equal(found, truth)
        hashes.add(hashlib.sha256(found.astype("<i8").tobytes()).hexdigest())
    assert len(hashes) == 1
    assert tied > 100, "these quotes would prove nothing about ties"
    print(f"\n{len(spine):,} rows, {tied:,} quotes share a time with another; matched seq sha256 {hashes.pop()}")
