"""Spark's history against the slow obvious truth and against DuckDB's: the same plan, the same values."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from feature_store.aggregations import events as folding
from feature_store.aggregations import reference
from feature_store.aggregations.reference import Event
from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.erasure import NO_ERASURES, Erasure, Erasures
from feature_store.definitions.repository import Request
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, StoredView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.spark import session, slices, stages
from feature_store.engines.spark.engine import SparkEngine
from feature_store.engines.spark.stages import Sizes
from feature_store.engines.spark.windows import WindowFold
from feature_store.engines.spine import TimeRange
from feature_store.errors import ColumnError, ConfigError, IsochronError, RequestError, SourceError, SpineError
from feature_store.plan.historical import plan_historical
from feature_store.retrieval.historical import HistoricalFeatures, retrieve, retrieve_distributed
from feature_store.testing import assert_features_equal
from feature_store.testing.event_logs import Layout, Log, LogRow, random_log, values_array
from feature_store.testing.views import (
    COLUMNS,
    HISTORY_FUNCTIONS,
    aggregation,
    definitions,
    every_aggregation,
    inside,
    newest_row,
    windowed,
)
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND
from tests.conformance.cases import (
    KEY,
    Case,
    PlainCase,
    bits,
    cases,
    erasures,
    examples,
    far_from_greenwich,
    plain_cases,
    spoil_values,
    times,
)

__all__ = ["far_from_greenwich"]

#: Parts so small that a few rows make several chunks, slices and files.
SMALL = Sizes(chunk_rows=7, part_rows=10, hot_rows=8, broadcast_rows=30)

CONF = {
    "spark.sql.shuffle.partitions": 3,
    "spark.driver.memory": "1g",
    # A test's queries are many and small: what the compiler would gain later it loses at once.
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -Xshare:auto",
    "spark.sql.codegen.wholeStage": False,
}


@pytest.fixture(scope="module", autouse=True)
def spark(far_from_greenwich: None) -> Iterator[SparkEngine]:
    """Keeps one Spark running for all tests here; engines over other folders share it."""
    engine = SparkEngine(Path("/"), "local[2]", CONF)
    try:
        engine._session.get()
    except ConfigError as error:
        pytest.fail(f"{error} (`make install` brings it where it may)")
    yield engine
    engine.close()


@contextlib.contextmanager
def engines(root: Path, sizes: Sizes | None = None) -> Iterator[tuple[SparkEngine, DuckDBEngine]]:
    one, other = SparkEngine(root, sizes=sizes), DuckDBEngine(root)
    try:
        yield one, other
    finally:
        one.close()
        other.close()


def on_spark(
    request: Request,
    spine: Any,
    root: Path,
    sizes: Sizes | None = None,
    erased: Erasures = NO_ERASURES,
    **how: Any,
) -> pa.Table:
    with contextlib.closing(SparkEngine(root, sizes=sizes, erasures=lambda: erased)) as engine:
        return retrieve_distributed(request, spine, engine, **how).to_arrow()


def on_duckdb(request: Request, spine: pa.Table, root: Path, erased: Erasures = NO_ERASURES, **how: Any) -> pa.Table:
    with contextlib.closing(DuckDBEngine(root, erasures=lambda: erased)) as engine:
        return retrieve(request, spine, engine, **how)


def known_by(events: Sequence[Event], time: int, knowledge_time: bool) -> list[Event]:
    """All events, or with knowledge time those whose created time, or else event time, is not after a time."""
    return [e for e in events if not knowledge_time or (e.time if e.created is None else e.created) <= time]


# -- many views at once -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Views over logs of their own and one spine for all: a row has the keys of some views, and null for others. Some
    entities are `erased`.
    """

    cases: tuple[Case | PlainCase, ...]
    rows: tuple[tuple[dict[str, Any], int], ...]
    unit: str
    zone: str | None
    knowledge_time: bool
    erased: Erasures

    def views(self) -> list[StoredView]:
        named = []
        for i, case in enumerate(self.cases):
            source = msgspec.structs.replace(case.view.source, name=f"log{i}", path=f"log{i}")
            named.append(msgspec.structs.replace(case.view, name=f"view{i}", source=source))
        return named

    def request(self) -> Request:
        refs = []
        for view in self.views():
            made = view.aggregations if isinstance(view, WindowedView) else view.features
            refs += [f"{view.name}:{feature.name}" for feature in made]
        return definitions(*self.views()).resolve(refs, full_names=True)

    def write(self, root: Path) -> None:
        for i, case in enumerate(self.cases):
            case.log.write(root / f"log{i}", case.layout)

    def spine(self) -> pa.Table:
        keys = {key.name: key.type for case in self.cases for key in case.view.keys}
        columns = {name: values_array([row.get(name) for row, _ in self.rows], t) for name, t in keys.items()}
        columns["event_timestamp"] = Layout(unit=self.unit, zone=self.zone).times([time for _, time in self.rows])
        columns["extra"] = pa.array([f"row {i}" for i in range(len(self.rows))]).dictionary_encode()
        return pa.table(columns)

    @property
    def times(self) -> list[int]:
        return [time // 1_000 * 1_000 if self.unit == "ms" else time for _, time in self.rows]

    def check(self, result: pa.Table) -> None:
        """Every value of every view equals the reference's, in every row."""
        of_row: dict[str, list[list[Event]]] = {}
        expected: dict[str, pa.Array] = {}
        for view, case in zip(self.views(), self.cases, strict=True):
            log = case.log.without(self.erased, case.layout)
            if not case.layout.created:
                log = log.subset([replace(row, created=None) for row in log.rows])
            keys = [tuple(row.get(key.name) for key in view.keys) for row, _ in self.rows]
            here = [
                known_by(log.events(k, case.layout.delay), t, self.knowledge_time) if None not in k else []
                for k, t in zip(keys, self.times, strict=True)
            ]
            of_row[view.name] = here
            for name, array in _expected(view, here, self.times).items():
                expected[f"{view.name}__{name}"] = array
        request = self.request()
        by_name = {view.name: view for view in self.views()}

        def folded(column: str, row: int) -> list[Any]:
            name, feature = column.split("__", 1)
            view = by_name[name]
            if not isinstance(view, WindowedView):
                return []
            return inside(of_row[name][row], view.aggregation(feature), self.times[row])

        assert_features_equal(result.select(request.columns), pa.table(expected), request=request, folded=folded)


def _expected(view: StoredView, events: list[list[Event]], asked: list[int]) -> dict[str, pa.Array]:
    if isinstance(view, WindowedView):
        values = {
            a.name: [reference.value(e, a, t) for e, t in zip(events, asked, strict=True)] for a in view.aggregations
        }
        return {a.name: values_array(values[a.name], a.output) for a in view.aggregations}
    rows = [
        newest_row([(e.time, e.created, e.values) for e in here], view, t)
        for here, t in zip(events, asked, strict=True)
    ]
    return {f.name: values_array([r and r[f.name] for r in rows], f.type) for f in view.features}


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    chosen = (draw(cases()), draw(plain_cases()), draw(st.one_of(cases(), plain_cases())))
    rows: list[tuple[dict[str, Any], int]] = []
    for case in chosen:
        names = [key.name for key in case.view.keys]
        rows += [(dict(zip(names, keys, strict=True)), time) for keys, time in case.asked.rows]
    # Some rows ask for entities of two views at once.
    for i, j in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=10)) if rows else ():
        one, other = rows[i % len(rows)], rows[j % len(rows)]
        rows.append((other[0] | one[0], other[1]))
    unit, zone = draw(st.sampled_from(["us", "ns", "ms"])), draw(st.sampled_from([None, "UTC", "Asia/Tokyo"]))
    erased = Erasures(tuple(one for case in chosen for one in draw(erasures(case.log)).log))
    return Mixture(chosen, tuple(rows), unit, zone, draw(st.booleans()), erased)


# Nothing is shrunk: every attempt costs seconds.
@settings(examples(10), phases=[Phase.generate])
@given(mixtures(), st.sampled_from([Sizes(), SMALL]), st.sampled_from(["table", "files"]))
def test_every_value_equals_the_reference_and_duckdbs_to_the_bit(mixture: Mixture, sizes: Sizes, given_as: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mixture.write(root)
        spine, request = mixture.spine(), mixture.request()
        asked: Any = spine
        if given_as == "files":
            asked = root / "spine"
            asked.mkdir()
            half = len(spine) // 2
            pq.write_table(spine.slice(half), asked / "b.parquet", row_group_size=5)
            pq.write_table(spine.slice(0, half), asked / "a.parquet")
        how: Any = {"erased": mixture.erased, "knowledge_time": mixture.knowledge_time}
        found = on_spark(request, asked, root, sizes, **how)
        mixture.check(found)
        duckdb = on_duckdb(request, spine, root, **how)
        assert found.schema.equals(duckdb.schema)
        assert bits(found) == bits(duckdb)


def test_a_range_of_times_asks_for_no_row_of_an_erased_entity_and_its_plan_says_so(tmp_path: Path) -> None:
    keys = (Field("a", ValueType.STRING), Field("n", ValueType.INT32), Field("y", ValueType.BOOL))
    rows = [LogRow((a, n, n > 1), n * HOUR, None, {"real": 1.0}) for a in ("1", "11") for n in (1, 2)]
    log = Log(keys, {"real": ValueType.FLOAT64}, tuple(rows))
    log.write(tmp_path / "log", Layout(files=2))
    view = windowed([aggregation("sum", "real", name="sum")], keys, Layout().source(log))
    request = definitions(view).resolve(["view:sum"])
    gone = [{"a": "11", "y": "true"}, {"n": "1", "a": "1"}]
    erased = Erasures(tuple(Erasure("project", one, 2 * HOUR) for one in gone))
    between = TimeRange(0, DAY)
    found = on_spark(request, between, tmp_path, erased=erased)
    assert found.select(["a", "n"]).to_pylist() == [{"a": "11", "n": 1}, {"a": "1", "n": 2}]
    with contextlib.closing(DuckDBEngine(tmp_path, erasures=lambda: erased)) as engine:
        assert bits(found) == bits(HistoricalFeatures(request, between, engine).to_arrow())
    with contextlib.closing(SparkEngine(tmp_path, erasures=lambda: erased)) as engine:
        assert HistoricalFeatures(request, between, engine).explain().count("ANTI JOIN") == 2
    with contextlib.closing(SparkEngine(tmp_path)) as engine:
        assert "ANTI JOIN" not in HistoricalFeatures(request, between, engine).explain()


# -- volume, chunks and slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("knowledge_time", [False, True])
def test_a_hot_key_cut_into_slices_and_chunks_changes_no_bit(
    knowledge_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With knowledge time of a view without keys: all its rows are one entity.
    cut: list[list[tuple[int, int]]] = []

    def watched(*args: Any) -> Any:
        made = slices.hot_slices(*args)
        cut.append([(row[0], row["slice"]) for row in made.collect()] if made is not None else [])
        return made

    monkeypatch.setattr(stages, "hot_slices", watched)
    windows = [(6 * SECOND, 2 * SECOND), (21 * MINUTE, 7 * MINUTE)]
    aggregations = every_aggregation(windows, COLUMNS, HISTORY_FUNCTIONS)
    cold = random_log(1, 40, KEY, COLUMNS, span=8 * HOUR)
    hot = random_log(2, 600, KEY, COLUMNS, span=8 * HOUR, entities=1)
    log = cold.subset([*cold.rows, *(replace(row, keys=(7,)) for row in hot.rows)])
    log.write(tmp_path / "log", Layout(files=3, row_group=50, shuffle=1))
    view = windowed(aggregations, () if knowledge_time else KEY, Layout().source(log))
    request = definitions(view).resolve([f"view:{a.name}" for a in aggregations])
    # Slices begin at some events' times: every one of them asks.
    rows = [(row.keys[0], (row.time or 0) + beside) for row in log.rows for beside in (0, HOUR + 1)]
    spine = pa.table({"customer": [k for k, _ in rows], "event_timestamp": times([t for _, t in rows])})
    sizes = Sizes(chunk_rows=40, part_rows=30, hot_rows=90)
    found = on_spark(request, spine, tmp_path, sizes, knowledge_time=knowledge_time)
    (made,) = cut
    assert len(made) >= 3
    assert {key for key, _ in made} == (set(range(1, len(made) + 1)) if knowledge_time else {7})
    assert bits(found) == bits(on_duckdb(request, spine, tmp_path, knowledge_time=knowledge_time))


def test_slices_are_not_shorter_than_the_longest_window_and_cover_all_time() -> None:
    sample = sorted(random.Random(1).choices(range(0, DAY, SECOND), k=slices.MOST_SLICES - 1))
    for wanted, longest in ((4, HOUR), (200, HOUR), (200, 10 * HOUR), (2, 2 * DAY), (1, 0)):
        edges = slices._edges(sample, wanted, longest)
        assert all(b - a >= longest for a, b in pairwise(edges))
        assert len(edges) < wanted
    assert len(slices._edges(sample, 4, HOUR)) == 3


def stream(events: int, seed: int) -> tuple[pa.Table, tuple[Aggregation, ...]]:
    """What a task of one hot key gets: about an event a second, on whole seconds, and asking rows among them."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, events, events)) * SECOND
    asks = np.sort(rng.integers(0, events, events // 10)) * SECOND
    aggregations = tuple(
        aggregation(f, "real", window, hop, name=f"{f}_{window}")
        for f in ("sum", "std", "last_3", "count", "min", "approx_quantile_50")
        for window, hop in ((MINUTE, 10 * SECOND), (HOUR, MINUTE))
    )
    table = pa.table(
        {
            "k0": pa.array([1] * (events + len(asks))),
            "time": np.concatenate([time, asks]),
            "created": pa.nulls(events + len(asks), pa.int64()),
            "row": pa.array([None] * events + list(range(len(asks))), pa.int64()),
            "x0": pa.array([*rng.normal(size=events), *([None] * len(asks))], pa.float64(), from_pandas=False),
        }
    )
    order = np.lexsort((np.asarray(table["row"].is_null()), np.asarray(table["time"])))
    return table.take(order), aggregations


def test_windows_over_a_stream_hold_only_what_they_reach_and_no_chunk_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    table, aggregations = stream(30_000, seed=1)
    held: list[int] = []
    evaluate = folding.evaluate
    monkeypatch.setattr(
        "feature_store.engines.spark.windows.evaluate",
        lambda events, *rest: held.append(len(events.times)) or evaluate(events, *rest),
    )
    results = []
    for chunk_rows, batch_rows in ((10**9, 10**9), (1_000, 300), (50, 7), (5_000, 65_536)):
        held.clear()
        fold = WindowFold(aggregations, (("real", ValueType.FLOAT64),), ("k0",), False, chunk_rows)
        batches = table.to_batches(max_chunksize=batch_rows)
        made = pa.Table.from_batches(fold(iter(batches)), fold.schema()).sort_by("row")
        results.append(repr(made.to_pydict()))
        # An hour's window holds some 3,600 events and reaches a hop further: a chunk is at most twice as long.
        assert max(held) <= max(2 * chunk_rows, 3 * 3_700) + batch_rows
    assert len(set(results)) == 1


def test_ties_have_the_winner_they_have_in_duckdb_whatever_the_order_of_files(tmp_path: Path) -> None:
    rng = random.Random(4)
    nan, inf = float("nan"), float("inf")
    values: dict[str, list[Any]] = {
        "flag": [None, True, False],
        "many": [None, [], [0.0], [-0.0], [None], [0.0, nan], [1.5, None]],
        "real": [None, 0.0, -0.0, nan, inf, 1.5],
        "text": [None, "", "é", "z"],
        "words": [None, ["a"], ["a", None]],
    }
    types = (ValueType.BOOL, ValueType.FLOAT64_LIST, ValueType.FLOAT64, ValueType.STRING, ValueType.STRING_LIST)
    columns = dict(zip(values, types, strict=True))
    rows = [
        LogRow((key,), 5, rng.choice([None, 1, 2]), {n: rng.choice(values[n]) for n in columns})
        for key in range(150)
        for _ in range(4)
    ]
    log = Log(KEY, columns, tuple(rows))
    features = tuple(Field(name, t) for name, t in columns.items())
    spine = pa.table({"customer": range(150), "event_timestamp": times([9] * 150)})
    found = []
    for shuffle in range(2):
        layout = Layout(shuffle=shuffle, files=3)
        log.write(tmp_path / str(shuffle), layout)
        view = PlainView(name="view", keys=KEY, features=features, source=layout.source(log, path=str(shuffle)))
        request = definitions(view).resolve([f"view:{name}" for name in columns])
        found.append(bits(on_spark(request, spine, tmp_path)))
    assert found[0] == found[1] == bits(on_duckdb(request, spine, tmp_path))


def ask(*moments: int) -> pa.Table:
    return pa.table({"customer": [1] * len(moments), "event_timestamp": times(moments)})


# -- how files may lie ------------------------------------------------------------------------------------------------


def write(root: Path, path: str, **columns: Any) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    int96 = columns.pop("int96", False)
    pq.write_table(pa.table(columns), root / path, use_deprecated_int96_timestamps=int96)


PHYSICAL: dict[str, tuple[pa.Array, ValueType]] = {
    "tiny": (pa.array([-1, None], pa.int8()), ValueType.INT64),
    "short": (pa.array([-1, None], pa.int16()), ValueType.INT32),
    "byte": (pa.array([255, None], pa.uint8()), ValueType.INT64),
    "word": (pa.array([65_535, None], pa.uint16()), ValueType.FLOAT32),
    "double word": (pa.array([2**32 - 1, None], pa.uint32()), ValueType.INT64),
    "narrowed": (pa.array([2**31 - 1, None], pa.int64()), ValueType.INT32),
    "single": (pa.array([0.1, float("nan")], pa.float64()), ValueType.FLOAT32),
    "half `and` {more}.dots": (pa.array(["é", None]).dictionary_encode(), ValueType.STRING),
    "Case": (pa.array(["upper", None], pa.large_string()), ValueType.STRING),
    "case": (pa.array(["lower", None], pa.string_view()), ValueType.STRING),
    "bytes": (pa.array([b"\xff\x00", None], pa.large_binary()), ValueType.BYTES),
    "day": (pa.array([-1, None], pa.int32()).view(pa.date32()), ValueType.TIMESTAMP),
    "nanos": (pa.array([-1, None], pa.int64()).view(pa.timestamp("ns", "UTC")), ValueType.TIMESTAMP),
    "millis": (pa.array([-1, None], pa.int64()).view(pa.timestamp("ms")), ValueType.TIMESTAMP),
    "long ago": (pa.array([-5 * 10**16, None], pa.int64()).view(pa.timestamp("us")), ValueType.TIMESTAMP),
    "numbers": (pa.array([[1, None], None], pa.large_list(pa.int16())), ValueType.INT64_LIST),
    "singles": (pa.array([[0.1], []], pa.list_(pa.float64())), ValueType.FLOAT32_LIST),
    "flags": (pa.array([[True, None], None]), ValueType.BOOL_LIST),
}


def test_every_type_in_a_file_is_read_as_duckdb_reads_it(tmp_path: Path) -> None:
    columns = {name: array for name, (array, _) in PHYSICAL.items()}
    write(tmp_path, "odd [1] {a} %20 *.parquet", **columns, customer=[1, 2], at=times([5, 5]))
    write(tmp_path, "odd 1 a %20 x.parquet", **columns, customer=[3, 3], at=times([5, 5]))
    source = Source(name="s", path="odd [1] {a} %20 *.parquet", timestamp_field="at")
    features = tuple(Field(name, t) for name, (_, t) in PHYSICAL.items())
    view = PlainView(name="view", keys=KEY, features=features, source=source)
    request = definitions(view).resolve([f"view:{name}" for name in PHYSICAL])
    spine = pa.table({"customer": [2, 1, 3], "event_timestamp": times([9, 9, 9])})
    found, duckdb = on_spark(request, spine, tmp_path), on_duckdb(request, spine, tmp_path)
    assert found.schema.equals(duckdb.schema)
    assert bits(found) == bits(duckdb)


def test_times_of_every_unit_zone_and_width_in_one_folder_are_one_log(tmp_path: Path) -> None:
    moments = pa.array([-1, 2], pa.int64())
    write(tmp_path, "log/a.parquet", customer=[1, 1], at=moments.view(pa.timestamp("us", "Asia/Tokyo")))
    write(tmp_path, "log/b.parquet", customer=[1, 1], at=moments.view(pa.timestamp("us")))
    nanos = pa.array([-1_000 + 794, 2_999], pa.int64())
    write(tmp_path, "log/c.parquet", at=nanos.view(pa.timestamp("ns")), customer=[1, 1])
    write(tmp_path, "log/d.parquet", at=nanos.view(pa.timestamp("ns", "UTC")), customer=[1, 1])
    write(tmp_path, "log/e.parquet", customer=[1, 1], at=nanos.view(pa.timestamp("ns")), int96=True)
    write(tmp_path, "log/f.parquet", customer=[1, 1], at=pa.array([-1, 0], pa.int64()).view(pa.timestamp("ms", "UTC")))
    source = Source(name="s", path="log", timestamp_field="at")
    view = windowed([aggregation("count", "*", 10 * SECOND, SECOND, name="n")], KEY, source)
    request = definitions(view).resolve(["view:n"])
    assert on_spark(request, ask(-1, 0, 2, 3), tmp_path)["n"].to_pylist() == [1, 6, 7, 12]


def test_times_in_lists_are_whole_microseconds(tmp_path: Path) -> None:
    nanos = pa.array([-1_500, 2_999], pa.int64()).view(pa.timestamp("ns"))
    write(tmp_path, "log.parquet", customer=[1], seen=pa.ListArray.from_arrays([0, 2], nanos), at=times([5]))
    source = Source(name="s", path="log.parquet", timestamp_field="at")
    view = PlainView(name="view", keys=KEY, features=(Field("seen", ValueType.TIMESTAMP_LIST),), source=source)
    found = on_spark(definitions(view).resolve(["view:seen"]), ask(10), tmp_path)["seen"].combine_chunks()
    assert found.type == ValueType.TIMESTAMP_LIST.arrow
    assert found.flatten().cast(pa.int64()).to_pylist() == [-2, 2]


@pytest.mark.parametrize(
    ("file", "column", "wanted", "error"),
    [
        ("_log.parquet", pa.array([1]), ValueType.INT64, "names that begin with _ or . or hold a colon"),
        ("log:1.parquet", pa.array([1]), ValueType.INT64, "names that begin with _ or . or hold a colon"),
        ("log.parquet", pa.array(np.array([1], np.float16)), ValueType.FLOAT32, "halffloat, which Spark does not read"),
        ("log.parquet", pa.array([1.5]), ValueType.INT64, "is double, but is declared as Int64"),
        ("log.parquet", pa.array([2**40]), ValueType.INT32, "retrieval of view on Spark: .*CAST_OVERFLOW"),
        ("log.parquet", pa.array([1e300]), ValueType.FLOAT32, "retrieval of view on Spark: .*CAST_OVERFLOW"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    file: str, column: pa.Array, wanted: ValueType, error: str, tmp_path: Path
) -> None:
    write(tmp_path, file, customer=[1], x=column, at=times([5]))
    source = Source(name="s", path=file, timestamp_field="at")
    view = PlainView(name="view", keys=KEY, features=(Field("x", wanted),), source=source)
    with pytest.raises(SourceError, match=error):
        on_spark(definitions(view).resolve(["view:x"]), ask(10), tmp_path)


# -- spines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> tuple[Request, Path]:
    """A plain view and two windowed ones, one over another key, over some rows."""
    at = times([HOUR, 2 * HOUR, 3 * HOUR, 3 * HOUR])
    write(tmp_path, "shop/log.parquet", customer=[1, 1, 2, 2], city=["a", "b", None, "b"], n=[1, 2, 3, 4], at=at)
    source = Source(name="shop", path="shop", timestamp_field="at")
    newest = PlainView(name="newest", keys=KEY, features=(Field("n", ValueType.INT64),), source=source, ttl=DAY)
    sums = windowed([aggregation("sum", "n", DAY, HOUR, ValueType.INT64, "total")], KEY, source, "sums")
    cities = windowed(
        [aggregation("last_2", "n", column_type=ValueType.INT64, name="last")],
        (Field("city", ValueType.STRING),),
        source,
        "cities",
    )
    request = definitions(newest, sums, cities).resolve(["newest:n", "sums:total", "cities:last"])
    return request, tmp_path


#: Columns that Spark has no type for, and some it has; none of them takes part in anything.
PASSED = {
    "fine": pa.array([10**18 + 1, None, -1], pa.int64()).view(pa.timestamp("ns", "Asia/Tokyo")),
    "coarse": pa.array([1, None, -1], pa.int64()).view(pa.timestamp("s")),
    "exact": pa.array([Decimal("12345678901234567890.123456789"), None, Decimal(0)], pa.decimal128(38, 9)),
    "wide": pa.array([Decimal("1e50"), None, Decimal(1)], pa.decimal256(76, 2)),
    "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "half": pa.array(np.array([1.5, -0.0, np.inf], np.float16)),
    "real": pa.array([-0.0, float("nan"), None], pa.float64(), from_pandas=False),
    "coded": pa.array(["x", None, "x"]).dictionary_encode(),
    "large": pa.array(["x", None, ""], pa.large_string()),
    "view": pa.array([b"x", None, b""], pa.binary_view()),
    "four": pa.array([b"four", None, b"\0\0\0\0"], pa.binary(4)),
    "time": pa.array([1, None, 3], pa.int64()).view(pa.time64("ns")),
    "took": pa.array([1, None, 3], pa.int64()).view(pa.duration("ns")),
    "day": pa.array([1, None, -3], pa.int32()).view(pa.date32()),
    "none": pa.nulls(3),
    "nested": pa.array(
        [{"a": [1, None], "b": {"c": "x"}}, None, {"a": None, "b": None}],
        pa.struct([("a", pa.list_(pa.timestamp("ns"))), ("b", pa.struct([("c", pa.large_string())]))]),
    ),
    "pairs": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.uint8())),
    "three": pa.array([[1, 2, 3], None, [4, 5, None]], pa.list_(pa.int32(), 3)),
    "newest__n": pa.array(["like a working column", None, "x"]),
}


def asking(**more: Any) -> pa.Table:
    at = pa.array([5 * HOUR * 1_000 + 999, 30 * HOUR * 1_000, 4 * HOUR * 1_000], pa.int64()).view(pa.timestamp("ns"))
    city, customer = pa.array(["b", None, "b"]).dictionary_encode(), pa.array([1.0, 2.0, None], pa.float64())
    return pa.table({"event_timestamp": at, **more, "city": city, "customer": customer})


def test_columns_of_a_spine_pass_untouched_by_every_way(shop: tuple[Request, Path]) -> None:
    request, root = shop
    spine = asking(**PASSED)
    expected = on_duckdb(request, spine, root)
    assert expected["total"].to_pylist() == [3, None, None]
    pq.write_table(spine, root / "spine.parquet", row_group_size=2)
    of_file = pq.read_table(root / "spine.parquet")
    with contextlib.closing(SparkEngine(root, sizes=SMALL)) as engine:
        found = retrieve_distributed(request, spine, engine)
        for table in (found.to_arrow(), pa.Table.from_batches(found.batches())):
            assert table.schema.equals(expected.schema)
            assert bits(table) == bits(expected)
        written = pq.read_table(found.to_parquet(root / "of table"))
        from_file = retrieve_distributed(request, str(root / "spine.parquet"), engine)
        again = from_file.to_arrow()
    for result, own in ((written, spine), (again, of_file)):
        assert result.column_names == expected.column_names
        for name in expected.column_names:
            if name in own.column_names and result is again:
                assert result[name].type == own[name].type, name
            assert repr(result[name].to_pylist()) == repr(expected[name].to_pylist()), name


def test_to_parquet_keeps_the_order_over_many_files_and_leaves_nothing_else(shop: tuple[Request, Path]) -> None:
    request, root = shop
    count = 95
    rng = random.Random(3)
    spine = pa.table(
        {
            "event_timestamp": times([rng.randrange(5 * HOUR) for _ in range(count)]),
            "customer": [rng.choice([1, 2, 3, None]) for _ in range(count)],
            "city": [rng.choice(["a", "b", None]) for _ in range(count)],
            "place": range(count),
        }
    )
    expected = on_duckdb(request, spine, root)
    target = root / "results" / "here"
    with contextlib.closing(SparkEngine(root, sizes=SMALL)) as engine:
        retrieved = retrieve_distributed(request, spine, engine)
        for _ in range(2):  # the second takes the place of the first
            assert retrieved.to_parquet(target) == target
            files = sorted(target.iterdir())
            assert [f.name for f in files] == [f"part-{i:05d}.parquet" for i in range(len(files))]
            assert len(files) >= 10
            assert pa.concat_tables(map(pq.read_table, files)).equals(expected)
            assert [f.name for f in target.parent.iterdir()] == ["here"]
        with pytest.raises(RequestError, match=r"holds other things than an earlier result: .*log.parquet"):
            retrieved.to_parquet(root / "shop")
        nobody = retrieve_distributed(request, spine.slice(0, 0), engine)
        assert nobody.to_arrow().equals(on_duckdb(request, spine.slice(0, 0), root))
        assert pq.read_table(nobody.to_parquet(root / "nobody")).schema.equals(expected.schema)


def test_frames_queries_and_ranges_ask_as_tables_do(shop: tuple[Request, Path]) -> None:
    request, root = shop
    sql = (
        "SELECT TIMESTAMP_MICROS(t) AS event_timestamp, c AS customer, s AS city, 2.50BD AS price, i AS start, i AS end"
        f" FROM VALUES ({5 * HOUR}, 1, 'b', 3L), ({4 * HOUR}, NULL, 'a', 2L), ({HOUR}, 2L, NULL, 1L) AS v(t, c, s, i) "
        "ORDER BY t"
    )
    spine = pa.table(
        {
            "event_timestamp": times([HOUR, 4 * HOUR, 5 * HOUR]),
            "customer": [2, None, 1],
            "city": [None, "a", "b"],
            "price": pa.array([Decimal("2.50")] * 3, pa.decimal128(3, 2)),
            **{name: pa.array([1, 2, 3]) for name in ("start", "end")},
        }
    )
    expected = on_duckdb(request, spine, root)
    with engines(root) as (spark, duckdb):
        for given_as in (sql, spine.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get), pl.from_arrow(spine)):
            found = retrieve_distributed(request, given_as, spark).to_arrow()
            assert found.column_names == expected.column_names
            assert bits(found.select(request.columns)) == bits(expected.select(request.columns))
        assert retrieve_distributed(request, sql, spark).to_arrow().equals(expected)
        named = request.definitions.resolve(["newest:customer", "newest:n"], full_names=True)
        found = retrieve_distributed(named, spine, spark).to_arrow()
        assert found.equals(retrieve(named, spine, duckdb))
        assert found["newest__customer"].to_pylist() == [2, None, 1]
        for between in (TimeRange(HOUR, 3 * HOUR), TimeRange(2 * HOUR, 2 * HOUR), TimeRange(0, 1)):
            found = HistoricalFeatures(request, between, spark).to_arrow()
            assert found.equals(HistoricalFeatures(request, between, duckdb).to_arrow())


def test_a_spine_is_refused_as_duckdb_refuses_it(shop: tuple[Request, Path]) -> None:
    request, root = shop
    good = asking()
    wrong = [
        good.drop_columns(["customer"]),
        good.drop_columns(["event_timestamp"]),
        good.set_column(0, "event_timestamp", pa.array(["2020-01-01"] * 3)),
        good.append_column("n", pa.array([1, 2, 3])),
        good.append_column("city", pa.array(["x"] * 3)),
        good.set_column(0, "event_timestamp", pa.array([None, 1, None], pa.int64()).view(pa.timestamp("us"))),
        good.set_column(2, "customer", pa.array([1.5, 2.0, 3.0])),
        good.set_column(2, "customer", pa.array([2.0**53, 2.0, 3.0])),
        good.set_column(2, "customer", pa.array(["1", "2", "3"])),
    ]
    with engines(root) as (spark, duckdb):
        for i, spine in enumerate(wrong):
            with pytest.raises((SpineError, ColumnError)) as expected:
                retrieve(request, spine, duckdb)
            forms: list[Any] = [spine]
            if len(set(spine.column_names)) == spine.num_columns:
                pq.write_table(spine, root / f"{i}.parquet")
                forms.append(str(root / f"{i}.parquet"))
            for form in forms:
                with pytest.raises(type(expected.value)) as found:
                    retrieve_distributed(request, form, spark).to_parquet(root / "out")
                assert str(found.value) == str(expected.value)
                assert not (root / "out").exists()
        for text, error in (
            ("SELECT 1 FROM nowhere", "the spine's SQL failed: .*TABLE_OR_VIEW_NOT_FOUND"),
            (
                "SELECT INT('x') AS customer, now() AS event_timestamp, 'b' AS city",
                "SQL failed: .*CAST_INVALID",
            ),
            (str(root / "nowhere.parquet"), "nowhere.parquet is no file"),
        ):
            with pytest.raises(SpineError, match=error):
                retrieve_distributed(request, text, spark).to_arrow()
        with pytest.raises(SpineError, match="a spine cannot be a dict"):
            retrieve_distributed(request, {}, spark).to_arrow()


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_what_is_read_is_told_without_spark_and_pruned(tmp_path: Path) -> None:
    for day in range(4):
        at = times([day * DAY + i for i in range(3)])
        write(tmp_path, f"log/{day}.parquet", customer=[1] * 3, x=[1.0] * 3, at=at)
    source = Source(name="s", path="log", timestamp_field="at")
    view = windowed([aggregation("sum", "x", DAY, HOUR, ValueType.FLOAT64, "sum")], KEY, source)
    (stage,) = plan_historical(definitions(view).resolve(["view:sum"])).joins
    engine = SparkEngine(tmp_path)
    reading = engine.reading(stage, 2 * DAY, 2 * DAY + HOUR)
    assert [Path(f).name for f in reading.files] == ["1.parquet", "2.parquet"]
    assert (reading.files_in_all, reading.rows, set(reading.columns)) == (4, 6, {"customer", "at", "x"})
    assert "SELECT CAST(" in reading.sql
    assert engine.reading(stage, None, None).rows == 12
    explained = HistoricalFeatures(definitions(view).resolve(["view:sum"]), ask(1), engine).explain()
    assert "reads 4 of 4 files, about 12 rows" in explained


@pytest.mark.parametrize("first", [-7, 3], ids=["before 1970", "after"])
def test_a_table_reads_the_files_that_its_times_can_see(first: int, tmp_path: Path) -> None:
    for day in range(5):
        at = times([(first + day) * DAY + hour * HOUR for hour in range(24)])
        write(tmp_path, f"log/{day}.parquet", customer=[1] * 24, x=[1.0] * 24, at=at)
    for day in (0, 3, 4):
        spoil_values(tmp_path / f"log/{day}.parquet")
    source = Source(name="s", path="log", timestamp_field="at")
    newest = PlainView(name="newest", keys=KEY, features=(Field("x", ValueType.FLOAT64),), source=source, ttl=12 * HOUR)
    sums = windowed([aggregation("sum", "x", DAY, HOUR, ValueType.FLOAT64, "sum")], KEY, source, "sums")
    request = definitions(newest, sums).resolve(["newest:x", "sums:sum"])
    found = on_spark(request, ask(first * DAY + 60 * HOUR, first * DAY + 66 * HOUR), tmp_path)
    assert found.select(["x", "sum"]).to_pydict() == {"x": [1.0, 1.0], "sum": [24.0, 24.0]}


def test_spark_says_what_is_missing_or_contrary(monkeypatch: pytest.MonkeyPatch, spark: SparkEngine) -> None:
    with pytest.raises(ConfigError, match=r"sets spark.sql.session.timeZone to Asia/Tokyo, but values depend on UTC"):
        SparkEngine(Path("/"), conf={"spark.sql.session.timeZone": "Asia/Tokyo"})
    with pytest.raises(ConfigError, match=r"already runs in this process on local\[2\], not on spark://there:7077"):
        SparkEngine(Path("/"), "spark://there:7077")._session.get()
    with pytest.raises(ConfigError, match=r"sets spark.executor.memory to 9g, which a running Spark does not take"):
        SparkEngine(Path("/"), conf={"spark.executor.memory": "9g"})._session.get()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"needs Java 17 or later, .* apt-get install default-jre-headless"):
        session._check_java()


def test_an_error_of_ours_arrives_as_itself(shop: tuple[Request, Path]) -> None:
    request, root = shop

    def refuse(_: pa.Table) -> pa.Table:
        raise RequestError("city", "is no place")

    plan = plan_historical(request)
    with contextlib.closing(SparkEngine(root)) as engine:
        retrieved = engine.retrieve(plan, asking(), refuse)
        for run in (retrieved.to_arrow, lambda: retrieved.to_parquet(root / "out"), lambda: list(retrieved.batches())):
            with pytest.raises(RequestError, match="'city' is no place") as raised:
                run()
            assert (raised.value.field, raised.value.problem) == ("city", "is no place")
        assert not list(root.glob("*out*"))
        with pytest.raises(IsochronError, match=r"retrieval of cities, newest, sums on Spark: Spark says: .*division"):
            engine.retrieve(plan, asking(), lambda _: 1 // 0).to_arrow()
