"""Knowledge-time joins against the slow obvious truth: only what was created at or before the asked time counts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.aggregations import events
from feature_store.aggregations.known import Runs, fold_known, last_known
from feature_store.aggregations.reference import Event
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.retrieval.historical import retrieve
from feature_store.testing import assert_features_equal
from feature_store.testing.event_logs import KEY_VALUES, Layout, Log, event_logs, layouts, random_log, values_array
from feature_store.testing.views import (
    COLUMNS,
    HISTORY_FUNCTIONS,
    KEYS,
    aggregation_sets,
    definitions,
    every_aggregation,
    expected_table,
    hops,
    inside,
    newest_row,
    windowed,
)
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND

SETTINGS = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
KEY = (Field("customer", ValueType.INT64),)
PLAIN = {"real": ValueType.FLOAT64, "whole": ValueType.INT64, "text": ValueType.STRING}


def known_at(log: Log, keys: tuple[Any, ...], layout: Layout, time: int) -> list[Event]:
    """An entity's events whose created time, or else event time, is not after a time."""
    events = log.events(keys, layout.delay) if None not in keys else []
    return [e for e in events if (e.time if e.created is None else e.created) <= time]


@st.composite
def lagging(draw: st.DrawFn, log: Log, steps: list[int], layout: Layout) -> Log:
    """A log whose rows became known before, at, or long after their event time, or at some load time for all."""
    lag = st.sampled_from([None, 0, 1, -1, *steps, DAY])
    load = draw(st.none() | st.sampled_from([row.time for row in log.rows if row.time is not None] or [0]))
    rows = [
        replace(row, created=draw(st.sampled_from([load, load, None])))
        if load is not None
        else replace(row, created=None if row.time is None or (d := draw(lag)) is None else row.time + d)
        for row in log.rows
    ]
    return log.subset(rows).floored(layout.unit)


@st.composite
def asked(draw: st.DrawFn, log: Log, steps: list[int], delay: int) -> list[tuple[tuple[Any, ...], int]]:
    moments = [t + delay for row in log.admitted for t in (row.time, row.created) if t is not None] or [0]
    seen = log.entities or [tuple(KEY_VALUES[k.type][0] for k in log.keys)]
    time = st.builds(sum, st.tuples(st.sampled_from(moments), st.sampled_from([0, 0, 1, -1, *steps])))
    return draw(st.lists(st.tuples(st.sampled_from(seen), time), min_size=1, max_size=20))


def spine_of(keys: tuple[Field, ...], rows: list[tuple[tuple[Any, ...], int]]) -> pa.Table:
    columns = {key.name: values_array([k[i] for k, _ in rows], key.type) for i, key in enumerate(keys)}
    return pa.table({**columns, "event_timestamp": values_array([t for _, t in rows], ValueType.TIMESTAMP)})


@contextlib.contextmanager
def engine_over(log: Log, layout: Layout) -> Iterator[DuckDBEngine]:
    with tempfile.TemporaryDirectory() as root:
        log.write(Path(root) / "log", layout)
        with contextlib.closing(DuckDBEngine(Path(root))) as engine:
            yield engine


def check_windows(log: Log, layout: Layout, aggregations: Any, keys: Any, rows: Any) -> None:
    view = windowed(aggregations, keys, layout.source(log))
    request = definitions(view).resolve([f"view:{a.name}" for a in aggregations])
    with engine_over(log, layout) as engine:
        result = retrieve(request, spine_of(keys, rows), engine, knowledge_time=True)
    visible = [known_at(log, k, layout, t) for k, t in rows]
    names = [a.name for a in aggregations]
    expected = expected_table(view, names, visible, [t for _, t in rows])

    def folded(name: str, row: int) -> list[Any]:
        return inside(visible[row], view.aggregation(name), rows[row][1])

    assert_features_equal(result.select(names), expected, aggregations=aggregations, folded=folded)


@pytest.mark.parametrize("runs", [events.RUNS_AT_ONCE, 1], ids=["runs", "tree"])
@SETTINGS
@given(st.data())
def test_windows_count_only_what_was_known(runs: int, data: st.DataObject) -> None:
    aggregations = data.draw(aggregation_sets(functions=HISTORY_FUNCTIONS))
    keys = data.draw(st.sampled_from(KEYS))
    layout = replace(data.draw(layouts()), created=True)
    used = {a.column: COLUMNS[a.column] for a in aggregations if a.column != "*"}
    steps = hops(aggregations) or [SECOND]
    log = data.draw(lagging(data.draw(event_logs(keys, used, steps)), steps, layout))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "RUNS_AT_ONCE", runs)
        check_windows(log, layout, aggregations, keys, data.draw(asked(log, steps, layout.delay)))


@pytest.mark.parametrize("runs", [events.RUNS_AT_ONCE, 10], ids=["runs", "tree"])
def test_every_function_counts_only_what_was_known_on_volume(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RUNS_AT_ONCE", runs)
    aggregations = every_aggregation([(0, 0), (21 * MINUTE, 7 * MINUTE)], COLUMNS, HISTORY_FUNCTIONS)
    log = random_log(5, 400, KEY, COLUMNS, span=2 * HOUR)
    rows = [(k, (r.time or 0) + d) for r in log.rows[::25] for k in log.entities for d in (0, 1, 20 * MINUTE)]
    check_windows(log, Layout(files=2), aggregations, KEY, rows)


@SETTINGS
@given(st.data())
def test_the_newest_row_is_the_newest_known(data: st.DataObject) -> None:
    keys = data.draw(st.sampled_from(KEYS))
    layout = replace(data.draw(layouts()), created=True)
    log = data.draw(lagging(data.draw(event_logs(keys, PLAIN)), [HOUR, DAY], layout))
    rows = data.draw(asked(log, [HOUR, DAY], layout.delay))
    fields = tuple(Field(name, t) for name, t in PLAIN.items())
    ttl = data.draw(st.sampled_from([0, 0, HOUR]))
    view = PlainView(name="view", keys=keys, features=fields, source=layout.source(log), ttl=ttl)
    with engine_over(log, layout) as engine:
        request = definitions(view).resolve([f"view:{name}" for name in PLAIN])
        result = retrieve(request, spine_of(keys, rows), engine, knowledge_time=True)
    found = [newest_row([(e.time, e.created, e.values) for e in known_at(log, k, layout, t)], view, t) for k, t in rows]
    expected = pa.table({f.name: values_array([r and r[f.name] for r in found], f.type) for f in fields})
    assert_features_equal(result.select(list(PLAIN)), expected)


def test_scattered_late_events_are_no_cliff() -> None:
    """A tree folds what a plain filter finds, for an entity whose events each become known at a random moment."""
    rng = np.random.default_rng(3)
    count = 5_000
    known = np.arange(count) + rng.integers(0, 700, count)
    values = rng.integers(-9, 9, count).astype(np.float64)
    low = rng.integers(0, count, 400)
    high = np.minimum(low + rng.integers(0, 3_000, 400), count)
    state = fold_known(values, known, low, high, high, ["max", "moments", "sum"])
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        inside_ = values[a:b][known[a:b] <= b]
        assert (state["n"][i], state["sum"][i]) == (len(inside_), inside_.sum())
        assert not len(inside_) or state["max"][i] == inside_.max()
        assert state["m2"][i] == pytest.approx(((inside_ - inside_.mean()) ** 2).sum() if len(inside_) else 0.0)


@SETTINGS
@given(st.lists(st.integers(0, 6), max_size=40), st.data())
def test_runs_are_the_known_places(known: list[int], data: st.DataObject) -> None:
    count = len(known)
    ranges = data.draw(
        st.lists(st.tuples(st.integers(0, count), st.integers(0, count), st.integers(-1, 7)), max_size=9)
    )
    low, high, time = (np.array([r[i] for r in ranges], np.int64) for i in range(3))
    runs = Runs.known_at(np.array(known, np.int64), low, high, time)
    places, offsets = runs.places()
    expected = [[i for i in range(a, b) if known[i] <= t] for a, b, t in ranges]
    assert [places[a:b].tolist() for a, b in pairwise(offsets)] == expected
    found = last_known(np.array(known, np.int64), high, time) if count else high - 1
    assert found.tolist() == [max((i for i in range(b) if known[i] <= t), default=-1) for _, b, t in ranges]
    for most in (1, 3, 100):
        parts = list(runs.parts(most))
        assert sum(part.windows for part in parts) == len(ranges)
        assert np.concatenate([part.places()[0] for part in parts] or [places]).tolist() == places.tolist()
