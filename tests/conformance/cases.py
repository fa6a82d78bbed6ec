"""What the conformance tests of engines share: views over logs, rows that ask, and the judgement of what comes back."""

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
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from feature_store.definitions.erasure import NO_ERASURES, Erasure, Erasures, key_text
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.engine import Engine
from feature_store.retrieval.historical import retrieve
from feature_store.testing import assert_features_equal
from feature_store.testing.event_logs import (
    ANCHORS,
    KEY_VALUES,
    Layout,
    Log,
    event_logs,
    layouts,
    values_array,
    values_of,
)
from feature_store.testing.views import (
    COLUMNS,
    HISTORY_FUNCTIONS,
    KEYS,
    aggregation_sets,
    definitions,
    expected_table,
    hops,
    inside,
    newest_row,
    windowed,
)
from feature_store.timestamps import DAY, HOUR, SECOND

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


@st.composite
def erasures(draw: st.DrawFn, log: Log) -> Erasures:
    """Erasures of entities seen and unseen, by all of their keys or some, at the times at which records were known and
    beside; the same entity several times. None where a log has no keys.
    """
    moments = sorted({t for row in log.admitted for t in (row.time, row.created) if t is not None}) or [ANCHORS[0]]
    made = []
    for _ in range(draw(st.integers(0, 4)) if log.keys else 0):
        unseen = tuple(draw(st.sampled_from(KEY_VALUES[key.type])) for key in log.keys)
        entity = draw(st.sampled_from([*log.entities, *log.entities, unseen]))
        named = draw(st.sets(st.sampled_from(range(len(log.keys))), min_size=1))
        keys = {log.keys[i].name: key_text("", entity[i]) for i in sorted(named)}
        time = draw(st.sampled_from(moments)) + draw(st.sampled_from([0, 0, 1, -1, DAY]))
        made.append(Erasure("project", keys, time))
    return Erasures(tuple(made))


@contextlib.contextmanager
def engine_over(
    log: Log, layout: Layout, threads: int | None = None, erased: Erasures = NO_ERASURES
) -> Iterator[DuckDBEngine]:
    """An engine whose root holds the log's files in a folder `log`."""
    with tempfile.TemporaryDirectory() as root:
        log.write(Path(root) / "log", layout)
        engine = DuckDBEngine(Path(root), erasures=lambda: erased)
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

    def retrieve(self, engine: Engine, asked: Asked | None = None) -> pa.Table:
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
    aggregations = draw(aggregation_sets(functions=HISTORY_FUNCTIONS))
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


def times(values: Sequence[int]) -> pa.Array:
    return values_array(values, ValueType.TIMESTAMP)


def spoil_values(file: Path) -> None:
    """Overwrites the values of a Parquet file and leaves the footer: whoever reads a value there, fails."""
    content = bytearray(file.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xff" * (len(content) - footer - 4)
    file.write_bytes(bytes(content))


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

    def retrieve(self, engine: Engine) -> pa.Table:
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
