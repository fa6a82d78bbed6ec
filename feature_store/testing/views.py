"""Views over event logs, as Hypothesis draws them and as the reference judges them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from feature_store.aggregations import reference
from feature_store.aggregations.reference import Event
from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, View, WindowedView
from feature_store.testing.event_logs import values_array
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND

#: A column of every type that a windowed view can fold, by name.
COLUMNS: dict[str, ValueType] = {
    "flag": ValueType.BOOL,
    "small": ValueType.INT32,
    "whole": ValueType.INT64,
    "single": ValueType.FLOAT32,
    "real": ValueType.FLOAT64,
    "text": ValueType.STRING,
    "blob": ValueType.BYTES,
    "moment": ValueType.TIMESTAMP,
}

#: The functions that history and the online store carry.
FUNCTIONS = ("count", "sum", "mean", "min", "max", "var", "std", "first", "last", "last_1", "last_3", "last_20")

#: The functions that history carries: what an engine must compute.
HISTORY_FUNCTIONS = (
    *FUNCTIONS,
    *("count_distinct", "approx_count_distinct", "last_distinct_1", "last_distinct_3"),
    *("approx_quantile_1", "approx_quantile_50", "approx_quantile_95", "approx_quantile_100"),
)

#: Windows with their hops: none, the smallest, and pairs whose hops are no multiples of each other.
WINDOWS: tuple[tuple[int, int], ...] = (
    (0, 0),
    (SECOND, SECOND),
    (6 * SECOND, SECOND),
    (6 * SECOND, 2 * SECOND),
    (6 * SECOND, 3 * SECOND),
    (10 * SECOND, 5 * SECOND),
    (7 * SECOND, 7 * SECOND),
    (HOUR, 5 * MINUTE),
    (21 * MINUTE, 7 * MINUTE),
    (DAY, HOUR),
    (3 * DAY, 12 * HOUR),
    (30 * DAY, DAY),
)

#: The keys a view can have: one number, look-alike texts, a mixture, none.
KEYS: tuple[tuple[Field, ...], ...] = (
    (Field("customer", ValueType.INT64),),
    (Field("a", ValueType.STRING), Field("b", ValueType.STRING)),
    (Field("b", ValueType.STRING), Field("n", ValueType.INT32), Field("y", ValueType.BOOL)),
    (Field("blob_key", ValueType.BYTES),),
    (),
)


def aggregation(
    function: str, column: str, window: int = 0, hop: int = 0, column_type: ValueType | None = None, name: str = ""
) -> Aggregation:
    """An aggregation by its parts; `column_type` is that of COLUMNS unless told."""
    parsed = Function.parse(function)
    known = column_type or COLUMNS.get(column, ValueType.INT64)
    text = name or f"{function}_{'all' if column == '*' else column}_{window // SECOND}s_{hop // SECOND}s"
    return Aggregation(name=text, function=parsed, column=column, window=window, hop=hop, output=parsed.output(known))


def every_aggregation(
    windows: Sequence[tuple[int, int]], columns: Mapping[str, ValueType], functions: Sequence[str] = FUNCTIONS
) -> tuple[Aggregation, ...]:
    """Each function on each column it accepts over each window."""
    made = [
        aggregation(function, column, *window, column_type=column_type)
        for window in windows
        for column, column_type in columns.items()
        for function in functions
        if Function.parse(function).accepts(column_type)
    ]
    return tuple(sorted([*made, *(aggregation("count", "*", *w) for w in windows)], key=lambda a: a.name))


@st.composite
def aggregation_sets(
    draw: st.DrawFn,
    columns: Mapping[str, ValueType] = COLUMNS,
    windows: Sequence[tuple[int, int]] = WINDOWS,
    most: int = 8,
    functions: Sequence[str] = FUNCTIONS,
) -> tuple[Aggregation, ...]:
    """Some aggregations over at most three windows, so that hops meet in one view."""
    chosen = draw(st.lists(st.sampled_from(list(windows)), min_size=1, max_size=3, unique=True))
    pairs = [(f, c) for c, t in columns.items() for f in functions if Function.parse(f).accepts(t)]
    picked = draw(
        st.lists(
            st.tuples(st.sampled_from([("count", "*"), *pairs]), st.sampled_from(chosen)),
            min_size=1,
            max_size=most,
            unique=True,
        )
    )
    made = [aggregation(f, c, *window, column_type=columns.get(c, ValueType.INT64)) for (f, c), window in picked]
    return tuple(sorted(made, key=lambda a: a.name))


def hops(aggregations: Sequence[Aggregation]) -> list[int]:
    """The steps on whose multiples edges lie: hops and windows."""
    return sorted({step for a in aggregations for step in (a.hop, a.window) if step})


def windowed(
    aggregations: Sequence[Aggregation], keys: Sequence[Field], source: Source, name: str = "view"
) -> WindowedView:
    return WindowedView(name=name, keys=tuple(keys), aggregations=tuple(aggregations), source=source)


def definitions(*views: View, project: str = "project") -> Definitions:
    """Definitions that hold these views, without a registry."""
    return Definitions(project=project, stamp="", views={v.name: v for v in views}, services={})


def inside(events: Sequence[Event], aggregation: Aggregation, time: int) -> list[Any]:
    """The non-null values that the reference folds for an aggregation as of a time."""
    everything = Aggregation(
        name="",
        function=Function("last_n", max(len(events), 1)),
        column=aggregation.column,
        window=aggregation.window,
        hop=aggregation.hop,
        output=aggregation.output,
    )
    return reference.value(events, everything, time) if aggregation.column != "*" else []


def expected_table(
    view: WindowedView, names: Sequence[str], events: Sequence[Sequence[Event]], times: Sequence[int]
) -> pa.Table:
    """What the reference says of each row: its entity's events, as of its time."""
    return pa.table(
        {
            name: values_array(
                [reference.value(e, view.aggregation(name), t) for e, t in zip(events, times, strict=True)],
                view.aggregation(name).output,
            )
            for name in names
        }
    )


def newest_row(
    rows: Sequence[tuple[int, int | None, Mapping[str, Any]]], view: PlainView, time: int
) -> Mapping[str, Any] | None:
    """The row of a plain view as of a time, the slow obvious way; None where there is none or it is too old.

    Rows are (event time, created time, values). Among equal times the greatest created time (none is lowest), then
    the greatest values by feature name.
    """
    past = [row for row in rows if row[0] <= time]
    if not past:
        return None
    newest = max(past, key=lambda row: (row[0], (row[1] is not None, row[1] or 0), _canonical_row(row[2])))
    if view.ttl and newest[0] < time - view.ttl:
        return None
    return newest[2]


def _canonical_row(values: Mapping[str, Any]) -> tuple:
    return tuple(_canonical(values[name]) for name in sorted(values))


def _canonical(value: Any) -> tuple:
    """Null is lowest, NaN highest; texts compare by their bytes."""
    if value is None:
        return (0,)
    if isinstance(value, float) and math.isnan(value):
        return (2,)
    if isinstance(value, list):
        return (1, tuple(_canonical(item) for item in value))
    return (1, value.encode() if isinstance(value, str) else value)
