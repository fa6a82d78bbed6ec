"""DuckDB's history against the slow obvious truth: every value of random views over random logs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import tzset
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import SourceError
from feature_store.retrieval.historical import retrieve
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.store import OnlineStore
from feature_store.testing import assert_features_equal
from feature_store.testing.event_logs import (
    ANCHORS,
    KEY_VALUES,
    Layout,
    Log,
    LogRow,
    event_logs,
    layouts,
    random_log,
    values_array,
    values_of,
)
from feature_store.testing.views import (
    COLUMNS,
    KEYS,
    aggregation,
    aggregation_sets,
    definitions,
    every_aggregation,
    expected_table,
    hops,
    inside,
    newest_row,
    windowed,
)
from feature_store.timestamps import DAY, END, HOUR, MINUTE, SECOND

#: How many times as many examples to try. At 1 every run tries the same ones; above it they are drawn anew.
MORE = int(os.environ.get("ISOCHRON_EXAMPLES", "1"))


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count * MORE, derandomize=MORE == 1, deadline=None, suppress_health_check=slow)


KEY = (Field("customer", ValueType.INT64),)


@pytest.fixture(autouse=True, scope="module")
def far_from_greenwich() -> Iterator[None]:
    """The machine's own time zone is not UTC: nothing may depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        tzset()
        yield
    tzset()


@contextlib.contextmanager
def engine_over(log: Log, layout: Layout, threads: int | None = None) -> Iterator[DuckDBEngine]:
    """An engine whose root holds the log's files in a folder `log`."""
    with tempfile.TemporaryDirectory() as root:
        log.write(Path(root) / "log", layout)
        engine = DuckDBEngine(Path(root))
        if threads:
            engine._connection.execute(f"SET threads = {threads}")
        try:
            yield engine
        finally:
            engine.close()


@dataclass(frozen=True)
class Asked:
    """The rows of a spine: key values in key order (None is null) and the time asked for."""

    keys: tuple[Field, ...]
    rows: tuple[tuple[tuple[Any, ...], int], ...]
    unit: str = "us"
    zone: str | None = "UTC"

    def table(self) -> pa.Table:
        columns = {
            key.name: values_array([keys[i] for keys, _ in self.rows], key.type) for i, key in enumerate(self.keys)
        }
        columns["event_timestamp"] = Layout(unit=self.unit, zone=self.zone).times([time for _, time in self.rows])
        columns["extra"] = pa.array([f"row {i}" for i in range(len(self.rows))])
        return pa.table(columns)

    @property
    def times(self) -> list[int]:
        return [time // 1_000 * 1_000 if self.unit == "ms" else time for _, time in self.rows]

    def only(self, rows: Sequence[int]) -> Asked:
        return replace(self, rows=tuple(self.rows[i] for i in rows))


@st.composite
def spines(draw: st.DrawFn, log: Log, steps: Sequence[int], delay: int = 0, most: int = 25) -> Asked:
    """Rows that ask at an event's own time and around it, where an event enters or leaves a window, on hop edges,
    at midnight; for entities seen and unseen, with null keys; some rows twice.
    """
    happened = sorted({row.time + delay for row in log.admitted if row.time is not None}) or [ANCHORS[0]]
    shifts = [0, 0, 0, *steps, *(a + b for a in steps for b in steps)]
    moments = st.builds(
        lambda event, shift, floored, beside: (event + shift) // (floored or 1) * (floored or 1) + beside,
        st.sampled_from(happened),
        st.sampled_from(shifts),
        st.sampled_from([0, 0, *steps, DAY]),
        st.sampled_from([0, 0, 0, 1, -1]),
    )
    seen = log.entities or [tuple(KEY_VALUES[k.type][0] for k in log.keys)]
    unseen = st.tuples(*(st.none() | st.sampled_from(KEY_VALUES[k.type]) for k in log.keys))
    keys = st.sampled_from(seen) | st.sampled_from(seen) | unseen
    rows = draw(st.lists(st.tuples(keys, moments), max_size=most))
    rows += [rows[i % len(rows)] for i in draw(st.lists(st.integers(0, 99), max_size=3)) if rows]
    return Asked(
        log.keys,
        tuple(rows),
        draw(st.sampled_from(["us", "ns", "ms"])),
        draw(st.sampled_from([None, "UTC", "Asia/Tokyo"])),
    )


@dataclass(frozen=True)
class Case:
    """One windowed view over one log, and the rows that ask."""

    log: Log
    layout: Layout
    view: WindowedView
    asked: Asked

    @property
    def names(self) -> list[str]:
        return [a.name for a in self.view.aggregations]

    def retrieve(self, engine: DuckDBEngine, asked: Asked | None = None) -> pa.Table:
        request = definitions(self.view).resolve([f"view:{name}" for name in self.names])
        return retrieve(request, (asked or self.asked).table(), engine)

    def check(self, result: pa.Table) -> None:
        """Every value equals the reference's; the rows are the spine's, in their order and with their columns."""
        spine = self.asked.table()
        assert result.column_names == [*spine.column_names, *self.names]
        assert result.select(spine.column_names).equals(spine)
        for a in self.view.aggregations:
            assert result.schema.field(a.name).type == a.output.arrow
        events = {keys: self.log.events(keys, self.layout.delay) for keys in {k for k, _ in self.asked.rows}}
        of_row = [events[keys] if None not in keys else [] for keys, _ in self.asked.rows]
        expected = expected_table(self.view, self.names, of_row, self.asked.times)

        def folded(name: str, row: int) -> list[Any]:
            return inside(of_row[row], self.view.aggregation(name), self.asked.times[row])

        assert_features_equal(result.select(self.names), expected, aggregations=self.view.aggregations, folded=folded)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Views with up to eight aggregations over up to three windows, on every layout of a log around their edges."""
    aggregations = draw(aggregation_sets())
    keys = draw(st.sampled_from(KEYS))
    layout = draw(layouts())
    used = {a.column: COLUMNS[a.column] for a in aggregations if a.column != "*"}
    steps = hops(aggregations)
    log = draw(event_logs(keys, used, steps or [SECOND, DAY])).floored(layout.unit)
    if not layout.created:
        log = log.subset([replace(row, created=None) for row in log.rows])
    return Case(log, layout, windowed(aggregations, keys, layout.source(log)), draw(spines(log, steps, layout.delay)))


def bits(table: pa.Table) -> list[str]:
    """A table's values as text that tells every bit of a float (but NaN's payload)."""
    return [repr(table[name].to_pylist()) for name in table.column_names]


# -- windows ----------------------------------------------------------------------------------------------------------


@examples(150)
@given(cases())
def test_every_windowed_value_equals_the_reference(case: Case) -> None:
    with engine_over(case.log, case.layout) as engine:
        case.check(case.retrieve(engine))


@pytest.mark.parametrize("seed", range(3))
def test_every_function_on_every_column_equals_the_reference_on_volume(seed: int) -> None:
    windows = [(0, 0), (6 * SECOND, 2 * SECOND), (HOUR, 5 * MINUTE), (21 * MINUTE, 7 * MINUTE)]
    aggregations = every_aggregation([windows[seed], windows[3]], COLUMNS)
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
    aggregations = every_aggregation([(0, 0), (HOUR, 5 * MINUTE)], columns)
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


def times(values: Sequence[int]) -> pa.Array:
    return values_array(values, ValueType.TIMESTAMP)


# -- plain views ------------------------------------------------------------------------------------------------------

#: A feature of every type that a plain view can have; lists hold no nulls here (see below).
PLAIN = {
    "real": ValueType.FLOAT64,
    "whole": ValueType.INT64,
    "text": ValueType.STRING,
    "flag": ValueType.BOOL,
    "moment": ValueType.TIMESTAMP,
    "many": ValueType.FLOAT64_LIST,
    "words": ValueType.STRING_LIST,
}


@dataclass(frozen=True)
class PlainCase:
    """One plain view over one log, and the rows that ask."""

    log: Log
    layout: Layout
    view: PlainView
    asked: Asked

    def retrieve(self, engine: DuckDBEngine) -> pa.Table:
        request = definitions(self.view).resolve([f"view:{f.name}" for f in self.view.features])
        return retrieve(request, self.asked.table(), engine)

    def check(self, result: pa.Table) -> None:
        names = [f.name for f in self.view.features]
        assert result.select(self.asked.table().column_names).equals(self.asked.table())
        found = [self._newest(keys, time) for (keys, _), time in zip(self.asked.rows, self.asked.times, strict=True)]
        expected = pa.table(
            {f.name: values_array([r and r[f.name] for r in found], f.type) for f in self.view.features}
        )
        assert_features_equal(result.select(names), expected)

    def _newest(self, keys: tuple[Any, ...], time: int) -> Any:
        rows = [
            ((r.time or 0) + self.layout.delay, r.created if self.layout.created else None, r.values)
            for r in self.log.admitted
            if r.keys == keys
        ]
        return newest_row(rows, self.view, time)


@st.composite
def plain_cases(draw: st.DrawFn) -> PlainCase:
    names = draw(st.lists(st.sampled_from(sorted(PLAIN)), min_size=1, max_size=4, unique=True))
    columns = {name: PLAIN[name] for name in sorted(names)}
    keys = draw(st.sampled_from(KEYS))
    layout = draw(layouts())
    ttl = draw(st.sampled_from([0, 0, 1, SECOND, HOUR]))
    steps = [SECOND, HOUR, *([ttl] if ttl else [])]
    scalars = {n: t for n, t in columns.items() if not t.is_list}
    log = draw(event_logs(keys, scalars, steps, max_rows=25)).floored(layout.unit)
    lists = {
        n: draw(st.lists(lists_of(t), min_size=len(log.rows), max_size=len(log.rows)))
        for n, t in columns.items()
        if t.is_list
    }
    rows = [
        replace(row, values={**{n: zeroed(v) for n, v in row.values.items()}, **{n: lists[n][i] for n in lists}})
        for i, row in enumerate(log.rows)
    ]
    log = Log(log.keys, columns, tuple(rows))
    view = PlainView(
        name="view",
        keys=keys,
        features=tuple(Field(n, t) for n, t in columns.items()),
        source=layout.source(log),
        ttl=ttl,
    )
    return PlainCase(log, layout, view, draw(spines(log, steps, layout.delay)))


def lists_of(value_type: ValueType) -> st.SearchStrategy[Any]:
    return st.none() | st.lists(values_of(value_type.element).filter(lambda v: v is not None).map(zeroed), max_size=3)


def zeroed(value: Any) -> Any:
    """-0.0 as 0.0: which of two rows wins that differ in this alone is judged by its own test below."""
    return value + 0.0 if isinstance(value, float) else value


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
@wrong("naive times are read in the machine's zone where another file of the source has zoned ones")
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


@wrong("SQL names know no case: DuckDB answers `amount` from `Amount`")
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
@wrong("times inside lists are not floored from nanoseconds", AssertionError, pa.ArrowInvalid)
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
            with online.backend.reading() as txn:
                found = online.read(txn, ["seen"], [b"i\x80\0\0\0\0\0\0\1"], pa.array([10]).to_numpy()).values["seen"]
            online.backend.close()
    assert found.flatten().cast(pa.int64()).to_pylist() == [-2, 2]


@wrong("rows that differ in the sign of a zero alone tie, and the first one read wins")
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
