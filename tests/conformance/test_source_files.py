"""What the files of a source may look like, and that a value never depends on which of them is read first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import ColumnError, DefinitionError, RequestError, SourceError
from feature_store.retrieval.historical import retrieve
from feature_store.retrieval.online import as_of_times
from feature_store.timestamps import SECOND

KEY = Field("id", ValueType.INT64)


def _view(path: str, column: str = "x", keys: tuple[Field, ...] = (KEY,)) -> WindowedView:
    total = Aggregation(
        name="total", function=Function("sum"), column=column, window=0, hop=0, output=ValueType.FLOAT64
    )
    source = Source(name="log", path=path, timestamp_field="at")
    return WindowedView(name="view", keys=keys, aggregations=(total,), source=source)


def _write(file: Path, x: pa.Array, **more: pa.Array) -> None:
    at = pa.array([SECOND] * len(x), pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"id": pa.array([1] * len(x)), "at": at, "x": x, **more}), file)


def _total(view: WindowedView, root: Path, key: pa.Array | None = None) -> list:
    definitions = Definitions(project="p", stamp="s", views={view.name: view}, services={})
    time = pa.array([2 * SECOND], pa.int64()).cast(pa.timestamp("us"))
    spine = pa.table({"id": pa.array([1]) if key is None else key, "event_timestamp": time})
    return retrieve(definitions.resolve(["view:total"]), spine, DuckDBEngine(root))["total"].to_pylist()


def test_files_that_disagree_on_a_type_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    _write(tmp_path / "log" / "a.parquet", pa.array([1]))
    _write(tmp_path / "log" / "b.parquet", pa.array([10.75]))
    with pytest.raises(SourceError, match=r"column 'x' of source 'log' is double in .*b\.parquet but int64 in"):
        _total(_view("log"), tmp_path)


def test_a_file_without_a_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    _write(tmp_path / "log" / "a.parquet", pa.array([1.0]))
    pq.write_table(pq.read_table(tmp_path / "log" / "a.parquet").drop_columns(["x"]), tmp_path / "log" / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet of source 'log' has no column 'x'"):
        _total(_view("log"), tmp_path)


def test_a_path_with_the_characters_of_a_pattern_is_that_file(tmp_path: Path) -> None:
    _write(tmp_path / "e[1].parquet", pa.array([1.0]))
    _write(tmp_path / "e1.parquet", pa.array([5.0]))
    assert _total(_view("e[1].parquet"), tmp_path) == [1.0]


def test_columns_that_differ_by_case_are_told_apart(tmp_path: Path) -> None:
    _write(tmp_path / "log.parquet", pa.array([1.0]), X=pa.array([100.0]))
    assert _total(_view("log.parquet", "x"), tmp_path) == [1.0]
    assert _total(_view("log.parquet", "X"), tmp_path) == [100.0]


def test_a_whole_number_key_beyond_what_floats_hold_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "log.parquet", pa.array([1.0]))
    assert _total(_view("log.parquet"), tmp_path, pa.array([1.0])) == [1.0]
    with pytest.raises(ColumnError, match=r"beyond 2\^53"):
        _total(_view("log.parquet"), tmp_path, pa.array([float(2**53)]))


def test_one_key_name_of_two_types_is_refused() -> None:
    other = PlainView(
        name="other",
        keys=(Field("id", ValueType.STRING),),
        features=(Field("y", ValueType.INT64),),
        source=Source(name="rows", path="rows.parquet", timestamp_field="at"),
    )
    definitions = Definitions(project="p", stamp="s", views={"view": _view("log"), "other": other}, services={})
    with pytest.raises(DefinitionError, match="join key 'id': is string here and int64 in another view"):
        _ = definitions.resolve(["view:total", "other:y"]).keys


def test_times_of_numpy_are_read_in_their_unit() -> None:
    times = np.array(["2020-01-01T00:00:00.000001"], "datetime64[ns]")
    assert as_of_times(times, 1).tolist() == [1_577_836_800_000_001]
    assert as_of_times(times[0], 2).tolist() == [1_577_836_800_000_001] * 2
    assert as_of_times(np.array([5]), 1).tolist() == [5]
    for wrong in (np.array(["NaT"], "datetime64[us]"), [1.5], "yesterday", object()):
        with pytest.raises(RequestError, match="'as_of' is"):
            as_of_times(wrong, 1)  # type: ignore[arg-type]
