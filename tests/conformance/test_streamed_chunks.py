"""What must not show in a value: where sorted rows are cut, how they are packed, which file a row lies in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from time import tzset
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from feature_store.aggregations import events
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.engines.duckdb import engine as engine_module
from feature_store.engines.duckdb import sorting
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import MemoryLimitReached, SourceError
from feature_store.retrieval.historical import retrieve
from feature_store.testing.event_logs import values_array
from feature_store.testing.views import aggregation, definitions, windowed
from feature_store.timestamps import HOUR
from tests.conformance.cases import Case, PlainCase, cases, engine_over, examples, plain_cases

KEY = (Field("customer", ValueType.INT64),)


def times(values: list[int], zone: str | None = "UTC") -> pa.Array:
    return values_array(values, ValueType.TIMESTAMP).cast(pa.timestamp("us")).cast(pa.timestamp("us", zone))


@pytest.fixture(params=[(1, 62), (2, 0), (7, 62)], ids=["1 row, packed", "2 rows, not packed", "7 rows, packed"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few rows, with entity and time in one integer or in two; runs of known values a few at a time."""
    rows, bits = request.param
    monkeypatch.setattr(sorting, "CHUNK_ROWS", rows)
    monkeypatch.setattr(sorting, "_BITS", bits)
    monkeypatch.setattr(events, "RUNS_AT_ONCE", rows)


@pytest.mark.usefixtures("cut")
@examples(25)
@given(cases())
def test_windows_do_not_show_where_rows_are_cut(case: Case) -> None:
    with engine_over(case.log, case.layout) as engine:
        case.check(case.retrieve(engine))


@pytest.mark.usefixtures("cut")
@examples(25)
@given(plain_cases())
def test_newest_rows_do_not_show_where_rows_are_cut(case: PlainCase) -> None:
    with engine_over(case.log, case.layout) as engine:
        case.check(case.retrieve(engine))


@pytest.mark.usefixtures("cut")
def test_ties_in_several_chunks_are_each_won_by_their_own_row(tmp_path: Path) -> None:
    rows = {"customer": [1, 1, 2, 2, 3, 3], "ts": times([5] * 6), "m": [1.0, 2.0, 4.0, 3.0, 5.0, 6.0]}
    assert newest(tmp_path, [rows], [1, 2, 3]) == [2.0, 4.0, 6.0]


def newest(folder: Path, files: list[dict[str, Any]], customers: list[int], column: str = "m") -> list[Any]:
    """The newest value of a column for each customer as of late, from files with these columns."""
    (folder / "log").mkdir(exist_ok=True)
    for i, rows in enumerate(files):
        pq.write_table(pa.table(rows), folder / "log" / f"{i}.parquet")
    value_type = ValueType.TIMESTAMP if pa.types.is_timestamp(pa.table(files[0])[column].type) else ValueType.FLOAT64
    source = Source(name="log", path="log", timestamp_field="ts")
    view = PlainView(name="view", keys=KEY, features=(Field(column, value_type),), source=source)
    spine = pa.table({"customer": customers, "event_timestamp": times([HOUR] * len(customers))})
    with contextlib.closing(DuckDBEngine(folder)) as engine:
        return retrieve(definitions(view).resolve([f"view:{column}"]), spine, engine)[column].to_pylist()


def test_rows_of_files_with_other_time_types_have_places_of_their_own(tmp_path: Path) -> None:
    files = [
        {"customer": [1, 2], "ts": times([5, 5]), "m": [1.0, 2.0]},
        {"customer": [3, 4], "ts": times([5, 5], None), "m": [3.0, 4.0]},
        {"customer": [5, 6], "ts": times([5, 5]).cast(pa.timestamp("ns", "UTC")), "m": [5.0, 6.0]},
    ]
    assert newest(tmp_path, files, [6, 5, 4, 3, 2, 1]) == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_naive_and_zoned_values_of_one_feature_are_the_same_instants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    tzset()
    files = [
        {"customer": [1], "ts": times([5]), "m": times([HOUR], None)},
        {"customer": [2], "ts": times([5]), "m": times([HOUR])},
    ]
    found = newest(tmp_path, files, [1, 2])
    monkeypatch.undo()
    tzset()
    assert [moment.timestamp() for moment in found] == [3600.0, 3600.0]
    assert os.environ.get("TZ") != "Asia/Tokyo"


@pytest.mark.parametrize("extra", ["file_row_number", "file_index", "c0", "C1", "filename"])
def test_a_column_that_only_a_later_file_has_changes_nothing(extra: str, tmp_path: Path) -> None:
    files: list[dict[str, Any]] = [
        {"customer": [1], "ts": times([5]), "m": [1.0]},
        {"customer": [2], "ts": times([5]), "m": [2.0], extra: [77]},
    ]
    assert newest(tmp_path, files, [1, 2, 77]) == [1.0, 2.0, None]
    assert newest(tmp_path / ".", list(reversed(files)), [1, 2, 77]) == [1.0, 2.0, None]


@pytest.mark.parametrize("name", ["__created", "__order", "__row", "__entity", "tie", "Customer"])
def test_columns_with_the_engines_own_names_are_columns_like_others(name: str, tmp_path: Path) -> None:
    rows = {"customer": [1, 1, 2], "ts": times([5, 6, 7]), name: [1.0, 2.0, 8.0]}
    assert newest(tmp_path, [rows], [1, 2], name) == [2.0, 8.0]
    total = aggregation("sum", name, column_type=ValueType.FLOAT64, name="total")
    view = windowed([total], KEY, Source(name="log", path="log", timestamp_field="ts"))
    spine = pa.table({"customer": [1, 2], "event_timestamp": times([HOUR, HOUR])})
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        assert retrieve(definitions(view).resolve(["view:total"]), spine, engine)["total"].to_pylist() == [3.0, 8.0]


@pytest.mark.parametrize("names", [("a", "A"), ("__time", "__entity"), ("__row", "__order")])
def test_keys_of_any_names_are_apart(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    one, other = names
    rows = {one: [1, 1, 2], other: [2, 3, 2], "ts": times([5, 5, 5]), "m": [1.0, 2.0, 4.0]}
    pq.write_table(pa.table(rows), tmp_path / "log" / "0.parquet")
    keys = tuple(Field(name, ValueType.INT64) for name in sorted(names))
    source = Source(name="log", path="log", timestamp_field="ts")
    total = windowed([aggregation("sum", "m", column_type=ValueType.FLOAT64, name="total")], keys, source)
    newest_m = PlainView(name="newest", keys=keys, features=(Field("m", ValueType.FLOAT64),), source=source)
    spine = pa.table({one: [1, 1, 2], other: [2, 3, 2], "event_timestamp": times([HOUR] * 3)})
    request = definitions(total, newest_m).resolve(["view:total", "newest:m"])
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        found = retrieve(request, spine, engine)
        assert engine.event_log(total, None, HOUR).keys.column_names == [k.name for k in keys]
    assert (found["total"].to_pylist(), found["m"].to_pylist()) == ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])


@pytest.mark.parametrize("order", [[2, 1], [2]])
def test_a_file_replaced_between_match_and_fetch_is_an_error(
    order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = engine_module._values

    def replaced_before(*arguments: Any) -> Any:
        other = pa.table({"customer": order, "ts": times([5] * len(order)), "m": [float(c) for c in order]})
        pq.write_table(other, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "log" / "0.parquet")
        return fetch(*arguments)

    monkeypatch.setattr(engine_module, "_values", replaced_before)
    with pytest.raises(SourceError, match="was replaced while it was read; run it again"):
        newest(tmp_path, [{"customer": [1, 2], "ts": times([5, 5]), "m": [1.0, 2.0]}], [1, 2])


def test_times_beyond_a_footers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file replaced after its footer was read, before its rows are: its times would run into the entity's bits."""
    (tmp_path / "log").mkdir()
    rows = {"customer": [1, 2], "ts": times([5, 6]), "m": [1.0, 2.0]}
    pq.write_table(pa.table(rows), tmp_path / "log" / "0.parquet")
    total = aggregation("sum", "m", column_type=ValueType.FLOAT64, name="total")
    view = windowed([total], KEY, Source(name="log", path="log", timestamp_field="ts"))
    spine = pa.table({"customer": [1, 2], "event_timestamp": times([HOUR, HOUR])})
    register = engine_module._register_entities

    def replaced_before(*arguments: Any) -> None:
        pq.write_table(pa.table(rows | {"ts": times([5, 6_000])}), tmp_path / "log" / "0.parquet")
        register(*arguments)

    monkeypatch.setattr(engine_module, "_register_entities", replaced_before)
    request = definitions(view).resolve(["view:total"])
    with (
        contextlib.closing(DuckDBEngine(tmp_path)) as engine,
        pytest.raises(SourceError, match=r"was written while it was read\. Run it again"),
    ):
        retrieve(request, spine, engine)


def test_too_little_memory_is_said_wherever_it_runs_out(tmp_path: Path) -> None:
    count = 1_000_000
    rows = {"customer": pa.array([i * 7919 % 1_000 for i in range(count)]), "ts": times(list(range(count)))}
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table(rows | {"m": pa.array([1.0] * count)}), tmp_path / "log" / "0.parquet")
    source = Source(name="log", path="log", timestamp_field="ts")
    total = windowed([aggregation("sum", "m", column_type=ValueType.FLOAT64, name="total")], KEY, source)
    plain = PlainView(name="plain", keys=KEY, features=(Field("m", ValueType.FLOAT64),), source=source)
    spine = pa.table({"customer": list(range(1_000)), "event_timestamp": times([count] * 1_000)})
    request = definitions(total, plain).resolve(["view:total", "plain:m"])
    outcomes = []
    for limit in range(10, 60, 5):
        with contextlib.closing(DuckDBEngine(tmp_path, f"{limit}MB")) as engine:
            try:
                found = retrieve(request, spine, engine)
                outcomes.append((set(found["total"].to_pylist()), set(found["m"].to_pylist())))
            except MemoryLimitReached:
                outcomes.append(None)
    assert outcomes[0] is None
    assert outcomes[-1] is not None
    assert {repr(outcome) for outcome in outcomes if outcome} == {repr(({1_000.0}, {1.0}))}
