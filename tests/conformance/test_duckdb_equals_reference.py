"""DuckDB's history against the slow obvious truth: every value of random views over random logs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import SourceError
from feature_store.retrieval.historical import retrieve
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.store import OnlineStore
from feature_store.testing.event_logs import (
    Layout,
    Log,
    LogRow,
    random_log,
)
from feature_store.testing.views import (
    COLUMNS,
    HISTORY_FUNCTIONS,
    aggregation,
    definitions,
    every_aggregation,
    windowed,
)
from feature_store.timestamps import DAY, END, HOUR, MINUTE, SECOND
from tests.conformance.cases import (
    KEY,
    Asked,
    Case,
    PlainCase,
    bits,
    cases,
    engine_over,
    examples,
    far_from_greenwich,
    plain_cases,
    times,
)

__all__ = ["far_from_greenwich"]

# -- windows ----------------------------------------------------------------------------------------------------------


@examples(150)
@given(cases())
def test_every_windowed_value_equals_the_reference(case: Case) -> None:
    with engine_over(case.log, case.layout) as engine:
        case.check(case.retrieve(engine))


@pytest.mark.parametrize("seed", range(3))
def test_every_function_on_every_column_equals_the_reference_on_volume(seed: int) -> None:
    windows = [(0, 0), (6 * SECOND, 2 * SECOND), (HOUR, 5 * MINUTE), (21 * MINUTE, 7 * MINUTE)]
    aggregations = every_aggregation([windows[seed], windows[3]], COLUMNS, HISTORY_FUNCTIONS)
    log = random_log(seed, 400, KEY, COLUMNS, span=3 * HOUR)
    layout = Layout(files=3, row_group=50, shuffle=seed)
    times = [t + beside for row in log.rows[:12] for t in [row.time or 0] for beside in (0, 1, HOUR)]
    asked = Asked(KEY, tuple((log.entities[i % len(log.entities)], time) for i, time in enumerate(times)))
    case = Case(log, layout, windowed(aggregations, KEY, layout.source(log)), asked)
    with engine_over(log, layout) as engine:
        case.check(case.retrieve(engine))


#   hop     |.......|.......|.......|        window = 2 hops
#   event           e                        e = 2 hops after the epoch
#   counted          [--------------)        from one microsecond after e until a whole hop past e + window
def test_an_event_enters_one_microsecond_after_itself_and_leaves_with_its_hop() -> None:
    hop, window = 5 * SECOND, 10 * SECOND
    for event in (2 * hop, 2 * hop + 1, 3 * hop - 1, -2 * hop, -2 * hop - 1):
        leaves = event // hop * hop + window + hop
        asked = [event - 1, event, event + 1, leaves - 1, leaves]
        log = Log(KEY, {}, (LogRow((1,), event, None, {}),))
        view = windowed([aggregation("count", "*", window, hop)], KEY, Layout().source(log))
        case = Case(log, Layout(), view, Asked(KEY, tuple(((1,), t) for t in asked)))
        with engine_over(log, Layout()) as engine:
            result = case.retrieve(engine)
        assert result["count_all_10s_5s"].to_pylist() == [0, 0, 1, 1, 0], event
        case.check(result)


@examples(25)
@given(cases(), st.integers(0, 99), st.integers(1, 2))
def test_order_of_files_row_groups_and_threads_change_no_bit(case: Case, seed: int, threads: int) -> None:
    plain = Layout(unit=case.layout.unit, created=case.layout.created, delay=case.layout.delay)
    case = replace(case, layout=plain, view=windowed(case.view.aggregations, case.view.keys, plain.source(case.log)))
    other = replace(plain, files=3, row_group=2, shuffle=seed)
    with engine_over(case.log, plain) as one, engine_over(case.log, other, threads) as two:
        assert bits(case.retrieve(one)) == bits(case.retrieve(two))


@examples(25)
@given(cases(), st.data())
def test_a_row_alone_has_the_bits_it_has_among_others(case: Case, data: st.DataObject) -> None:
    assume(case.asked.rows)
    row = data.draw(st.integers(0, len(case.asked.rows) - 1))
    with engine_over(case.log, case.layout) as engine:
        whole = case.retrieve(engine).slice(row, 1)
        alone = case.retrieve(engine, case.asked.only([row]))
        assert bits(alone.select(case.names)) == bits(whole.select(case.names))


def test_volume_shuffled_over_files_and_threads_changes_no_bit() -> None:
    columns = {name: COLUMNS[name] for name in ("real", "whole", "text")}
    log = random_log(7, 3_000, KEY, columns, span=DAY)
    aggregations = every_aggregation([(0, 0), (HOUR, 5 * MINUTE)], columns, HISTORY_FUNCTIONS)
    asked = Asked(KEY, tuple((row.keys, (row.time or 0) + 1) for row in log.rows[::40]))
    results = []
    for layout, threads in (
        (Layout(), 1),
        (Layout(shuffle=1, files=4, row_group=100), 1),
        (Layout(shuffle=2, files=3, row_group=7), 2),
    ):
        case = Case(log, layout, windowed(aggregations, KEY, layout.source(log)), asked)
        with engine_over(log, layout, threads) as engine:
            results.append(bits(case.retrieve(engine)))
    assert results[0] == results[1] == results[2]


def test_minus_zero_is_zero_in_every_windowed_value() -> None:
    names = ("min", "max", "first", "last", "last_3", "sum", "mean")
    log = Log(KEY, {"real": ValueType.FLOAT64}, tuple(LogRow((1,), t, None, {"real": -0.0}) for t in (1, 2)))
    view = windowed([aggregation(f, "real", name=f) for f in names], KEY, Layout().source(log))
    case = Case(log, Layout(), view, Asked(KEY, (((1,), 10),)))
    with engine_over(log, Layout()) as engine:
        result = case.retrieve(engine)
    assert {name: repr(result[name].to_pylist()[0]) for name in names} == {
        **dict.fromkeys(names, "0.0"),
        "last_3": "[0.0, 0.0]",
    }


def test_a_column_that_is_only_counted_counts_neither_nulls_nor_nan_nor_infinities() -> None:
    nan, inf = float("nan"), float("inf")
    columns = {
        "real": [None, nan, inf, -inf, 0.0, -0.0],
        "single": [None, nan, inf, -inf, 0.0, 1.5],
        "text": [None, "", "a", "b", "c", "d"],
        "flag": [None, None, True, False, True, False],
    }
    rows = tuple(LogRow((1,), i, None, {n: v[i] for n, v in columns.items()}) for i in range(6))
    log = Log(KEY, {name: COLUMNS[name] for name in columns}, rows)
    view = windowed([aggregation("count", name, name=name) for name in sorted(columns)], KEY, Layout().source(log))
    case = Case(log, Layout(), view, Asked(KEY, (((1,), 10),)))
    with engine_over(log, Layout()) as engine:
        (found,) = case.retrieve(engine).select(sorted(columns)).to_pylist()
    assert found == {"real": 2, "single": 2, "text": 5, "flag": 4}


#   order key     event time, then created time (none is lowest), then value: the one order in every engine
def test_ties_in_time_are_in_order_of_created_time_and_then_of_value() -> None:
    rows = [(5, None, "z"), (5, 2, "b"), (5, 1, "y"), (5, 2, "é"), (5, 2, None), (5, 2, "c"), (4, 9, "x")]
    log = Log(KEY, {"text": ValueType.STRING}, tuple(LogRow((1,), t, c, {"text": v}) for t, c, v in rows))
    names = ("first", "last", "last_20")
    view = windowed([aggregation(f, "text", name=f) for f in names], KEY, Layout().source(log))
    case = Case(log, Layout(), view, Asked(KEY, (((1,), 10),)))
    for shuffle in range(3):
        with engine_over(log, Layout(shuffle=shuffle, files=3)) as engine:
            (found,) = case.retrieve(engine).select(names).to_pylist()
        assert found == {"first": "x", "last": "é", "last_20": ["é", "c", "b", "y", "z", "x"]}


def test_integer_sums_are_exact_beyond_64_bits_inside_and_null_outside() -> None:
    largest = 2**63 - 1
    values = [largest, largest, -largest, -largest, 5, largest - 5, 1]
    rows = tuple(LogRow((1,), i, None, {"whole": v}) for i, v in enumerate(values))
    log = Log(KEY, {"whole": ValueType.INT64}, rows)
    view = windowed([aggregation("sum", "whole", name="sum")], KEY, Layout().source(log))
    case = Case(log, Layout(), view, Asked(KEY, tuple(((1,), t) for t in range(8))))
    with engine_over(log, Layout()) as engine:
        result = case.retrieve(engine)
    assert result["sum"].to_pylist() == [None, largest, None, largest, 0, 5, largest, None]


def of_a_file(tmp_path: Path, values: Sequence[Any], arrow_type: pa.DataType, *functions: str) -> dict[str, Any]:
    """Functions, none of which tells its column's type, of one entity's events with these values in their file."""
    (tmp_path / "log").mkdir()
    rows = {"customer": [1] * len(values), "it": pa.array(values, arrow_type), "ts": times(range(len(values)))}
    pq.write_table(pa.table(rows), tmp_path / "log" / "a.parquet")
    made = [aggregation(f, "it", name=f, column_type=ValueType.FLOAT64) for f in functions]
    view = windowed(made, KEY, Source(name="s", path="log", timestamp_field="ts"))
    spine = pa.table({"customer": [1], "event_timestamp": times([len(values) + 1])})
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        (found,) = retrieve(definitions(view).resolve([f"view:{f}" for f in functions]), spine, engine).to_pylist()
    return {f: found[f] for f in functions}


@pytest.mark.parametrize(
    ("values", "arrow_type", "distinct"),
    [
        ([2**53, 2**53 + 1, None, 2**53], pa.int64(), 2),
        ([1, 200, 1], pa.uint8(), 2),
        ([0.0, -0.0, 1.5, math.nan, math.inf, None], pa.float32(), 2),
        (["a", "b", None, "a", "A"], pa.string(), 3),
        (["a", "b", None, "a"], pa.dictionary(pa.int32(), pa.string()), 2),
        ([b"a", b"", None, b"a"], pa.binary(), 2),
        ([True, None, True], pa.bool_(), 1),
        ([-1, -1_000, 0, 999, 1_000, None], pa.timestamp("ns"), 3),
        ([0, 1, 0], pa.date32(), 2),
    ],
)
def test_distinct_values_are_told_apart_in_the_type_that_their_file_has(
    values: list[Any], arrow_type: pa.DataType, distinct: int, tmp_path: Path
) -> None:
    found = of_a_file(tmp_path, values, arrow_type, "count_distinct", "approx_count_distinct", "count")
    present = [v for v in values if v is not None and (not isinstance(v, float) or math.isfinite(v))]
    assert found == {"count_distinct": distinct, "approx_count_distinct": distinct, "count": len(present)}


def test_numbers_are_counted_distinct_and_folded_in_the_type_of_their_file(tmp_path: Path) -> None:
    values = [2**53, 2**53 + 1, 2**53 + 1]
    functions = ("count_distinct", "mean", "approx_quantile_100")
    found = of_a_file(tmp_path, values, pa.int64(), *functions)
    assert found == {
        "count_distinct": 2,
        "mean": 2.0**53,
        "approx_quantile_100": 2.0**53 * (1 + 2.0**-8),
    }


@pytest.mark.parametrize(
    ("function", "values", "arrow_type", "reason"),
    [
        ("mean", ["a"], pa.string(), "is string, on which mean .aggregation 'mean'. is not defined"),
        ("approx_quantile_50", [True], pa.bool_(), "is bool, on which approx_quantile_p"),
        ("count", [[1]], pa.list_(pa.int64()), "on which count_distinct .aggregation 'count_distinct'. is not defined"),
        ("count", [1], pa.uint64(), "is uint64"),
    ],
)
def test_a_column_of_a_type_that_a_function_does_not_take_is_refused(
    function: str, values: list[Any], arrow_type: pa.DataType, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=reason):
        of_a_file(tmp_path, values, arrow_type, "count_distinct", function)


def test_look_alike_composite_keys_are_two_entities() -> None:
    keys = (Field("a", ValueType.STRING), Field("b", ValueType.STRING))
    rows = [(("1", "11"), 1), (("11", "1"), 2), (("1", "11"), 3), (("111", ""), 4), (("", "111"), 5)]
    log = Log(keys, {}, tuple(LogRow(k, t, None, {}) for k, t in rows))
    asked = Asked(keys, tuple((k, 10) for k in [("1", "11"), ("11", "1"), ("111", ""), ("", "111"), ("1", "1")]))
    case = Case(log, Layout(), windowed([aggregation("count", "*", name="n")], keys, Layout().source(log)), asked)
    with engine_over(log, Layout()) as engine:
        assert case.retrieve(engine)["n"].to_pylist() == [2, 1, 1, 1, 0]


def test_files_of_other_time_units_in_one_folder_are_one_log(tmp_path: Path) -> None:
    log = Log(KEY, {}, tuple(LogRow((1,), t, None, {}) for t in (-1, 2, -1)))
    view = windowed([aggregation("count", "*", name="n")], KEY, Layout().source(log))
    (tmp_path / "log").mkdir()
    pq.write_table(log.table(Layout(unit="us")), tmp_path / "log" / "a.parquet")
    # The third row lies 794 nanoseconds inside the microsecond before the epoch.
    pq.write_table(log.table(Layout(unit="ns")), tmp_path / "log" / "b.parquet")
    asked = Asked(KEY, tuple(((1,), t) for t in (-1, 0, 2, 3)))
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        assert Case(log, Layout(), view, asked).retrieve(engine)["n"].to_pylist() == [0, 4, 4, 6]


def test_names_swapped_by_a_mapping_are_read_from_their_columns(tmp_path: Path) -> None:
    source = Source(name="s", path="log", timestamp_field="ts", field_mapping={"k": "v", "v": "k"})
    rows = pa.table(
        {"k": pa.array([1, None, 3], pa.int64()), "v": pa.array([9, 9, None], pa.int64()), "ts": times([1, 2, 3])}
    )
    (tmp_path / "log").mkdir()
    pq.write_table(rows, tmp_path / "log" / "a.parquet")
    view = windowed(
        [aggregation("count", "*", name="n"), aggregation("last", "v", column_type=ValueType.INT64, name="v_last")],
        (Field("k", ValueType.INT64),),
        source,
    )
    spine = pa.table({"k": [9, 1, 3], "event_timestamp": times([10, 10, 10])})
    engine = DuckDBEngine(tmp_path)
    result = retrieve(definitions(view).resolve(["view:n", "view:v_last"]), spine, engine)
    assert (result["n"].to_pylist(), result["v_last"].to_pylist()) == ([2, 0, 0], [1, None, None])
    engine.close()


# -- plain views ------------------------------------------------------------------------------------------------------


@examples(100)
@given(plain_cases())
def test_every_plain_value_equals_the_as_of_join_by_hand(case: PlainCase) -> None:
    with engine_over(case.log, case.layout) as engine:
        case.check(case.retrieve(engine))


@examples(20)
@given(plain_cases(), st.integers(0, 9))
def test_order_of_files_changes_no_bit_of_a_plain_value(case: PlainCase, seed: int) -> None:
    other = replace(case.layout, files=3, row_group=1, shuffle=seed)
    with engine_over(case.log, case.layout) as one, engine_over(case.log, other, 2) as two:
        assert bits(case.retrieve(one)) == bits(case.retrieve(two))


#   row                 r
#   ttl                 [---------]
#   live                [---------]   at r + ttl still, one microsecond later no more
def test_ttl_is_strict_and_the_row_at_the_asked_time_counts() -> None:
    log = Log(KEY, {"whole": ValueType.INT64}, (LogRow((1,), 100, None, {"whole": 5}),))
    view = PlainView(
        name="view", keys=KEY, features=(Field("whole", ValueType.INT64),), source=Layout().source(log), ttl=SECOND
    )
    asked = Asked(KEY, tuple(((1,), t) for t in (99, 100, 100 + SECOND, 101 + SECOND)))
    with engine_over(log, Layout()) as engine:
        result = PlainCase(log, Layout(), view, asked).retrieve(engine)
    assert result["whole"].to_pylist() == [None, 5, 5, None]


def test_nan_stays_nan_in_a_plain_view_and_a_newer_null_is_a_value() -> None:
    rows = tuple(LogRow((1,), t, None, {"real": v}) for t, v in ((1, 2.0), (2, float("nan")), (3, None)))
    log = Log(KEY, {"real": ValueType.FLOAT64}, rows)
    view = PlainView(name="view", keys=KEY, features=(Field("real", ValueType.FLOAT64),), source=Layout().source(log))
    case = PlainCase(log, Layout(), view, Asked(KEY, tuple(((1,), t) for t in (1, 2, 3))))
    with engine_over(log, Layout()) as engine:
        assert repr(case.retrieve(engine)["real"].to_pylist()) == "[2.0, nan, None]"


# -- known wrong, until it is mended ----------------------------------------------------------------------------------


def wrong(reason: str, *raises: type[Exception]) -> pytest.MarkDecorator:
    """A test that shows a wrong value; it fails as soon as the value is right."""
    return pytest.mark.xfail(reason=reason, strict=True, raises=raises or AssertionError)


@pytest.mark.parametrize("zones", [("UTC", None), (None, "UTC")])
def test_naive_times_are_utc_also_beside_files_with_zoned_ones(tmp_path: Path, zones: tuple) -> None:
    log = Log(KEY, {}, (LogRow((1,), HOUR, None, {}),))
    view = windowed([aggregation("count", "*", name="n")], KEY, Layout().source(log))
    (tmp_path / "log").mkdir()
    for i, zone in enumerate(zones):
        pq.write_table(log.table(Layout(zone=zone)), tmp_path / "log" / f"{i}.parquet")
    case = Case(log, Layout(), view, Asked(KEY, (((1,), HOUR), ((1,), HOUR + 1))))
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        assert case.retrieve(engine)["n"].to_pylist() == [0, 2]


def test_columns_that_differ_by_case_in_several_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    rows = {"customer": [1], "Amount": [100], "amount": [1], "ts": times([5])}
    pq.write_table(pa.table(rows), tmp_path / "log" / "a.parquet")
    later = {"customer": [1], "amount": [2], "Amount": [200], "ts": times([6])}
    pq.write_table(pa.table(later), tmp_path / "log" / "b.parquet")
    source = Source(name="s", path="log", timestamp_field="ts")
    view = windowed([aggregation("last", "amount", name="it", column_type=ValueType.INT64)], KEY, source)
    spine = pa.table({"customer": [1, 1], "event_timestamp": times([6, 7])})
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine, pytest.raises(SourceError, match="but for case"):
        retrieve(definitions(view).resolve(["view:it"]), spine, engine)


def test_columns_that_differ_by_case_are_two_columns(tmp_path: Path) -> None:
    fields = (Field("Amount", ValueType.INT64), Field("amount", ValueType.INT64))
    source = Source(name="s", path="log", timestamp_field="ts")
    (tmp_path / "log").mkdir()
    pq.write_table(
        pa.table({"customer": [1], "Amount": [100], "amount": [1], "ts": times([5])}), tmp_path / "log" / "a.parquet"
    )
    engine = DuckDBEngine(tmp_path)
    view = PlainView(name="view", keys=KEY, features=fields, source=source)
    spine = pa.table({"customer": [1], "event_timestamp": times([10])})
    with contextlib.closing(engine):
        result = retrieve(definitions(view).resolve(["view:Amount", "view:amount"]), spine, engine)
    assert (result["Amount"].to_pylist(), result["amount"].to_pylist()) == ([100], [1])


@pytest.mark.parametrize("where", ["history", "online"])
def test_times_in_lists_are_whole_microseconds_in_files_of_any_unit(tmp_path: Path, where: str) -> None:
    nanos = pa.array([-1_500, 2_999], pa.int64()).view(pa.timestamp("ns"))
    rows = pa.table({"customer": [1], "seen": pa.ListArray.from_arrays([0, 2], nanos), "ts": times([5])})
    (tmp_path / "log").mkdir()
    pq.write_table(rows, tmp_path / "log" / "a.parquet")
    source = Source(name="s", path="log", timestamp_field="ts")
    view = PlainView(name="view", keys=KEY, features=(Field("seen", ValueType.TIMESTAMP_LIST),), source=source)
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        if where == "history":
            spine = pa.table({"customer": [1], "event_timestamp": times([10])})
            found = retrieve(definitions(view).resolve(["view:seen"]), spine, engine)["seen"].combine_chunks()
        else:
            online = OnlineStore(EmbeddedBackend(tmp_path / "store"), "project").plain(view)
            online.replace(engine.newest_rows(view, None, END, HOUR), HOUR)
            found = online.read(["seen"], [b"i\x80\0\0\0\0\0\0\1"], pa.array([10]).to_numpy()).values["seen"]
            online.backend.close()
    assert found.flatten().cast(pa.int64()).to_pylist() == [-2, 2]


def test_the_sign_of_zero_decides_a_tie_whatever_the_order_of_rows() -> None:
    found = set()
    for values in ((0.0, -0.0), (-0.0, 0.0)):
        log = Log(KEY, {"real": ValueType.FLOAT64}, tuple(LogRow((1,), 5, None, {"real": v}) for v in values))
        feature = (Field("real", ValueType.FLOAT64),)
        view = PlainView(name="view", keys=KEY, features=feature, source=Layout().source(log))
        with engine_over(log, Layout()) as engine:
            case = PlainCase(log, Layout(), view, Asked(KEY, (((1,), 10),)))
            found.add(repr(case.retrieve(engine)["real"].to_pylist()))
    assert len(found) == 1


def test_a_time_column_whose_name_is_another_columns_mapped_name_is_itself(tmp_path: Path) -> None:
    source = Source(name="s", path="log", timestamp_field="ts", field_mapping={"other": "ts"})
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table({"customer": [1], "ts": times([5]), "other": times([500])}), tmp_path / "log" / "a.parquet")
    view = windowed([aggregation("count", "*", name="n")], KEY, source)
    spine = pa.table({"customer": [1], "event_timestamp": times([10])})
    with contextlib.closing(DuckDBEngine(tmp_path)) as engine:
        assert retrieve(definitions(view).resolve(["view:n"]), spine, engine)["n"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("function", "values", "truth"),
    [
        ("mean", [1.7e308, 1.7e308], 1.7e308),
        ("var", [1e160, 1e160], 0.0),
        ("std", [1.7e308, 1.7e308], 0.0),
        ("var", [1e154, -1e154, 1e154], 1.3333333333333333e308),
    ],
)
@wrong("an intermediate result overflows though the value is finite: null instead of it")
def test_a_finite_result_of_huge_values_is_no_null(function: str, values: list[float], truth: float) -> None:
    rows = tuple(LogRow((1,), i, None, {"real": v}) for i, v in enumerate(values))
    log = Log(KEY, {"real": ValueType.FLOAT64}, rows)
    view = windowed([aggregation(function, "real", name="it")], KEY, Layout().source(log))
    with engine_over(log, Layout()) as engine:
        found = Case(log, Layout(), view, Asked(KEY, (((1,), 10),))).retrieve(engine)["it"].to_pylist()
    assert found == [pytest.approx(truth)]
