"""History with erasures against history of a log from which the erased records were taken out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.definitions.erasure import Erasure, Erasures
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.engine import Engine
from feature_store.engines.spine import TimeRange
from feature_store.retrieval.historical import HistoricalFeatures, retrieve
from feature_store.testing.event_logs import Layout, Log, LogRow
from feature_store.testing.views import COLUMNS, aggregation, definitions, windowed
from feature_store.timestamps import DAY, HOUR, SECOND
from tests.conformance.cases import (
    KEY,
    Asked,
    Case,
    PlainCase,
    bits,
    cases,
    engine_over,
    erasures,
    examples,
    far_from_greenwich,
    plain_cases,
)

__all__ = ["far_from_greenwich"]


@examples(100)
@given(cases(), st.data())
def test_windows_are_those_of_the_log_without_what_is_erased(case: Case, data: st.DataObject) -> None:
    erased = data.draw(erasures(case.log))
    remaining = case.log.without(erased, case.layout)
    with engine_over(case.log, case.layout, erased=erased) as engine:
        replace(case, log=remaining).check(case.retrieve(engine))


@examples(60)
@given(plain_cases(), st.data())
def test_plain_rows_are_those_of_the_log_without_what_is_erased(case: PlainCase, data: st.DataObject) -> None:
    erased = data.draw(erasures(case.log))
    remaining = case.log.without(erased, case.layout)
    with engine_over(case.log, case.layout, erased=erased) as engine:
        replace(case, log=remaining).check(case.retrieve(engine))


@examples(40)
@given(cases(), st.data(), st.integers(0, 2))
def test_whatever_reads_events_reads_none_that_is_erased(case: Case, data: st.DataObject, late: int) -> None:
    """Knowledge time, retrieval without a spine, and what a bootstrap folds: the same as of files without the rows."""
    erased = data.draw(erasures(case.log))
    remaining = case.log.without(erased, case.layout)
    request = definitions(case.view).resolve([f"view:{name}" for name in case.names])
    spine = case.asked.table()
    times = [t for row in case.log.admitted if (t := row.time) is not None] or [0]
    start, end = min(times) - 1, max(times) + case.layout.delay + late * HOUR

    def read(engine: Engine) -> list[Any]:
        log = engine.event_log(case.view, start, end)
        ranged = HistoricalFeatures(request, TimeRange(start, end), engine).to_arrow()
        columns = [
            [v if ok else None for v, ok in zip(c.arrow.to_pylist(), c.valid.tolist(), strict=True)]
            for c in log.events.columns.values()
        ]
        events = (log.events.entity.tolist(), log.events.times.tolist(), log.events.created.tolist(), *columns)
        return [
            bits(retrieve(request, spine, engine, knowledge_time=True)),
            bits(ranged),
            log.keys.to_pylist(),
            sorted(map(repr, zip(*events, strict=True))),  # ties come in any order
            log.skipped,
        ]

    with (
        engine_over(case.log, case.layout, erased=erased) as one,
        engine_over(remaining, case.layout) as other,
    ):
        left, found, expected = one.event_log(case.view, start, end).erasures, read(one), read(other)
    assert left is erased
    assert found == expected


@examples(40)
@given(plain_cases(), st.data())
def test_the_newest_rows_are_those_without_what_is_erased(case: PlainCase, data: st.DataObject) -> None:
    erased = data.draw(erasures(case.log))
    now = data.draw(st.sampled_from([row.time for row in case.log.admitted if row.time is not None] or [0]))
    with (
        engine_over(case.log, case.layout, erased=erased) as one,
        engine_over(case.log.without(erased, case.layout), case.layout) as other,
    ):
        newest = [engine.newest_rows(case.view, None, now + DAY, now) for engine in (one, other)]
    assert bits(newest[0]) == bits(newest[1])


#   known     |---------------E---------   by created time, or else by the time column before any delay
#   e                    o    .            known, happens a day later by the source's delay: left out
#   f                    .    .  o         known later: stays
def test_what_counts_is_when_a_record_was_known_before_any_delay() -> None:
    noon, layout = 12 * HOUR, Layout(delay=DAY)
    rows = [
        LogRow((1,), noon, None, {}),
        LogRow((1,), noon + 1, None, {}),
        LogRow((1,), noon - HOUR, noon + 1, {}),
        LogRow((1,), noon + HOUR, noon, {}),
        LogRow((11,), noon, None, {}),
    ]
    log = Log(KEY, {}, tuple(rows))
    view = windowed([aggregation("count", "*", name="n")], KEY, layout.source(log))
    asked = Asked(KEY, (((1,), noon + 3 * DAY), ((11,), noon + 3 * DAY)))
    erased = Erasures((Erasure("project", {"customer": "1"}, noon),))
    with engine_over(log, layout, erased=erased) as engine:
        assert Case(log, layout, view, asked).retrieve(engine)["n"].to_pylist() == [2, 1]


def test_keys_of_other_views_and_values_of_other_types_touch_nothing(tmp_path: Path) -> None:
    keys = (Field("a", ValueType.STRING), Field("n", ValueType.INT64))
    log = Log(keys, {}, tuple(LogRow((a, n), SECOND, None, {}) for a in ("1", "01", "x") for n in (1, 10)))
    view = windowed([aggregation("count", "*", name="count")], keys, Layout().source(log))
    log.write(tmp_path / "log")
    asked = Asked(keys, tuple((row.keys, DAY) for row in log.rows))
    case = Case(log, Layout(), view, asked)

    def counts(*erased: dict[str, str]) -> list[int]:
        made = Erasures(tuple(Erasure("project", one, DAY) for one in erased))
        engine = DuckDBEngine(tmp_path, erasures=lambda: made)
        return case.retrieve(engine)["count"].to_pylist()

    assert counts({"b": "1"}, {"a": "1", "b": "1"}, {"n": "one"}, {"n": str(2**63)}, {"A": "1"}) == [1] * 6
    assert counts({"a": "1"}) == [0, 0, 1, 1, 1, 1]
    assert counts({"n": "01"}) == [0, 1, 0, 1, 0, 1]
    assert counts({"a": "01", "n": "10"}, {"n": "1"}, {"a": "x"}) == [0, 1, 0, 0, 0, 0]


def test_without_erasures_of_a_view_its_sql_is_as_before_and_with_them_it_prunes_the_same(tmp_path: Path) -> None:
    log = Log(KEY, {"real": COLUMNS["real"]}, tuple(LogRow((1,), d * DAY, None, {"real": 1.0}) for d in range(9)))
    view = windowed([aggregation("sum", "real", DAY, HOUR, name="sum")], KEY, Layout().source(log))
    log.write(tmp_path / "log", Layout(files=9))
    asked = Case(log, Layout(), view, Asked(KEY, (((1,), 7 * DAY),)))
    request = definitions(view).resolve(["view:sum"])

    def plan(*erased: dict[str, str]) -> str:
        made = Erasures(tuple(Erasure("project", one, 6 * DAY - 1) for one in erased))
        engine = DuckDBEngine(tmp_path, erasures=lambda: made)
        return HistoricalFeatures(request, asked.asked.table(), engine).explain()

    nothing, other, touched = plan(), plan({"merchant": "1"}), plan({"customer": "1"})
    assert "ANTI JOIN" not in nothing
    assert other == nothing
    assert "ANTI JOIN __erased_0" in touched
    read = [line for line in nothing.splitlines() if "reads 1 of 9 files" in line]
    assert len(read) == 1
    assert read[0] in touched


@pytest.mark.parametrize("key", ["record", "until", "Gone", "row"])
@pytest.mark.parametrize("column", ["Record_", "__until", "erased_0"])
def test_names_of_columns_meet_none_of_ours(key: str, column: str, tmp_path: Path) -> None:
    keys = (Field(key, ValueType.INT64),)
    log = Log(keys, {column: ValueType.FLOAT64}, tuple(LogRow((c,), SECOND, None, {column: 2.0}) for c in (1, 2)))
    view = windowed([aggregation("sum", column, column_type=ValueType.FLOAT64, name="s")], keys, Layout().source(log))
    log.write(tmp_path / "log")
    erased = Erasures((Erasure("project", {key: "1"}, DAY),))
    engine = DuckDBEngine(tmp_path, erasures=lambda: erased)
    found = Case(log, Layout(), view, Asked(keys, (((1,), DAY), ((2,), DAY)))).retrieve(engine)
    assert found["s"].to_pylist() == [None, 2.0]
