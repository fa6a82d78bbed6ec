"""What a retrieval reads: the files and columns it needs, and nothing else; and what explain says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.spine import TimeRange
from feature_store.errors import ConfigError, MemoryLimitReached, SourceError
from feature_store.retrieval.historical import HistoricalFeatures, retrieve
from feature_store.testing.views import aggregation, definitions, windowed
from feature_store.timestamps import DAY, HOUR, micros
from tests.conformance.cases import spoil_values

KEY = (Field("customer", ValueType.INT64),)
START = datetime(2024, 1, 1, tzinfo=UTC)


def source(delay: int = 0) -> Source:
    return Source(name="payments", path="payments", timestamp_field="at", delay=delay)


def plain(ttl: int = 0) -> PlainView:
    features = (Field("amount", ValueType.FLOAT64), Field("city", ValueType.STRING))
    return PlainView(name="newest", keys=KEY, features=features, source=source(), ttl=ttl)


def spend(delay: int = 0) -> WindowedView:
    return windowed(
        [aggregation("sum", "amount", DAY, HOUR, column_type=ValueType.FLOAT64, name="sum_1d")], KEY, source(delay)
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five days of payments, a file a day, one payment an hour."""
    (tmp_path / "payments").mkdir()
    for day in range(5):
        at = [START + timedelta(days=day, hours=hour) for hour in range(24)]
        rows = {"customer": [1] * 24, "at": pa.array(at, pa.timestamp("us", "UTC")), "amount": [1.0] * 24}
        rows |= {"city": ["Ulm"] * 24, "unused": [day] * 24}
        pq.write_table(pa.table(rows), tmp_path / "payments" / f"day-{day}.parquet")
    return tmp_path


@pytest.fixture
def engine(root: Path) -> Iterator[DuckDBEngine]:
    with contextlib.closing(DuckDBEngine(root)) as opened:
        yield opened


def spine(*days: float) -> pa.Table:
    times = pa.array([START + timedelta(days=day) for day in days], pa.timestamp("us", "UTC"))
    return pa.table({"customer": pa.array([1] * len(days), pa.int64()), "event_timestamp": times})


def spoil(root: Path, *days: int) -> None:
    """Spoils the values of some days' files."""
    for day in days:
        spoil_values(root / "payments" / f"day-{day}.parquet")


def test_files_outside_the_windows_are_not_read(root: Path, engine: DuckDBEngine) -> None:
    request = definitions(spend()).resolve(["view:sum_1d"])
    whole = retrieve(request, spine(2.5), engine)
    spoil(root, 0, 3, 4)
    assert retrieve(request, spine(2.5), engine).equals(whole)
    assert whole["sum_1d"].to_pylist() == [24.0]
    with pytest.raises(SourceError):
        retrieve(request, spine(1.5), engine)


def test_a_delay_moves_what_is_read(root: Path, engine: DuckDBEngine) -> None:
    spoil(root, 0, 3, 4)
    request = definitions(spend(delay=2 * DAY)).resolve(["view:sum_1d"])
    assert retrieve(request, spine(4.5), engine)["sum_1d"].to_pylist() == [24.0]


def test_rows_older_than_the_ttl_and_columns_nobody_asked_for_are_not_read(root: Path, engine: DuckDBEngine) -> None:
    spoil(root, 0, 1, 3, 4)
    request = definitions(plain(ttl=12 * HOUR)).resolve(["newest:amount"])
    assert retrieve(request, spine(2.6, 2.9), engine)["amount"].to_pylist() == [1.0, 1.0]


def test_explain_names_stages_sql_files_columns_and_rows(root: Path, engine: DuckDBEngine) -> None:
    request = definitions(plain(), spend()).resolve(["newest:amount", "view:sum_1d"])
    text = HistoricalFeatures(request, spine(1.5, 2.5), engine).explain()
    lines = text.splitlines()
    assert lines[0] == "spine: 2 rows"
    assert lines[1] == "1. as-of join newest: newest row at or before event_timestamp -> amount"
    assert "reads 3 of 5 files, about 72 rows" in lines[2]
    assert lines[3] == "   columns: at, customer, amount"
    assert "2. windows view: sum_1d = sum(amount) over 1d" in lines
    assert lines[-1] == "columns: amount, sum_1d"
    assert "unused" not in text
    assert "city" not in lines[3]
    assert sum("read_parquet" in line for line in lines) == 3  # rows to match, values of the matched, events


def test_explain_of_a_key_alone(engine: DuckDBEngine) -> None:
    request = definitions(spend()).resolve(["view:customer"], full_names=True)
    assert HistoricalFeatures(request, spine(2.5), engine).explain().splitlines()[-1] == "columns: view__customer"


def test_explain_reads_no_values(root: Path, engine: DuckDBEngine) -> None:
    spoil(root, 0, 1, 2, 3, 4)
    request = definitions(spend()).resolve(["view:sum_1d"])
    assert "reads 2 of 5 files" in HistoricalFeatures(request, spine(2.5), engine).explain()


def test_a_memory_limit_spills_first_and_is_then_named(tmp_path: Path) -> None:
    """A million rows sort in 60 MB by way of the disk, to the same values; in 10 MB they do not, as the error says."""
    count = 1_000_000
    at = pa.array(range(count), pa.int64()).cast(pa.timestamp("us", "UTC"))
    rows = {"customer": pa.array([i * 7919 % 1_000 for i in range(count)]), "at": at, "amount": pa.array([1.0] * count)}
    pq.write_table(pa.table(rows), tmp_path / "payments", row_group_size=100_000)
    asked = pa.table({"customer": pa.array(range(1_000)), "event_timestamp": pa.array([count] * 1_000).cast(at.type)})
    request = definitions(spend()).resolve(["view:sum_1d"])
    with contextlib.closing(DuckDBEngine(tmp_path, "60MB")) as engine:
        assert set(retrieve(request, asked, engine)["sum_1d"].to_pylist()) == {1_000.0}
    with (
        contextlib.closing(DuckDBEngine(tmp_path, "10MB")) as engine,
        pytest.raises(MemoryLimitReached, match="Raise memory_limit"),
    ):
        retrieve(request, asked, engine)


def test_explain_of_a_time_range_prunes_by_it(root: Path, engine: DuckDBEngine) -> None:
    request = definitions(spend()).resolve(["view:sum_1d"])
    between = TimeRange(micros(START + timedelta(days=2)), micros(START + timedelta(days=2, hours=5)))
    text = HistoricalFeatures(request, between, engine).explain()
    assert "asking: every key and time of the views' rows from 2024-01-03T00:00:00Z to 2024-01-03T05:00:00Z" in text
    assert "reads 2 of 5 files" in text


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(root: Path) -> None:
    (root / "payments").rename(root / "payments[1]")
    moved = WindowedView(
        name="view",
        keys=KEY,
        aggregations=spend().aggregations,
        source=Source(name="payments", path="payments[1]", timestamp_field="at"),
    )
    with contextlib.closing(DuckDBEngine(root)) as engine:
        assert retrieve(definitions(moved).resolve(["view:sum_1d"]), spine(2.5), engine)["sum_1d"].to_pylist() == [24.0]


def test_a_memory_limit_that_is_no_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory_limit '4 parsecs' is no size; write it like 4GB"):
        DuckDBEngine(tmp_path, "4 parsecs")
