"""Functions as views declare them: their names, the types they give, and what their columns are read as."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource, PushSource
from feast import ValueType as FeastType
from feast.types import Array, Float64, Int64, String, UnixTimestamp

from feature_store.adapters.feast import aggregate, windowed_view
from feature_store.adapters.feast.compile import compile_view, without_feasts_warnings
from feature_store.definitions.aggregation import HISTORY_ONLY, KINDS, Function
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.engines.stream.admission import admit
from feature_store.errors import DefinitionError, RequestError
from feature_store.testing.views import HISTORY_FUNCTIONS, aggregation, windowed
from feature_store.timestamps import arrow_timestamps

SOURCE = Source(name="s", path="log", timestamp_field="ts")
ENTITY = Entity(name="customer", join_keys=["customer"], value_type=FeastType.INT64)


def compiled(function: str, dtype: Any, column: str = "amount", online: bool = False) -> WindowedView:
    """A view of one aggregation over an hour, as apply compiles it."""
    batch = FileSource(name="log", path="log.parquet", timestamp_field="ts")
    with without_feasts_warnings():
        view = windowed_view(
            name="view",
            entities=[ENTITY],
            source=PushSource(name="pushed", batch_source=batch),
            features=aggregate(function, column, dtype, windows=[timedelta(hours=1)], name="it"),
            online=online,
        )
        made = compile_view(view)
    assert isinstance(made, WindowedView)
    return made


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("avg", Function("mean")),
        ("last_20", Function("last_n", 20)),
        ("last_distinct_1000", Function("last_distinct_n", 1_000)),
        ("approx_quantile_1", Function("approx_quantile_p", 1)),
        ("approx_quantile_100", Function("approx_quantile_p", 100)),
        ("count_distinct", Function("count_distinct")),
        ("approx_count_distinct", Function("approx_count_distinct")),
    ],
)
def test_functions_are_named_by_their_texts(text: str, function: Function) -> None:
    assert Function.parse(text) == function


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("last_n", "unknown function 'last_n'"),
        ("last_0", "unknown function 'last_0'"),
        ("last_distinct_n", "unknown function 'last_distinct_n'"),
        ("last_distinct", "unknown function 'last_distinct'"),
        ("last_distinct_0", "unknown function"),
        ("last_1001", "keeps more than 1000 values"),
        ("last_distinct_1001", "keeps more than 1000 values"),
        ("approx_quantile_p", "unknown function"),
        ("approx_quantile_0", "unknown function"),
        ("approx_quantile_05", "unknown function"),
        ("approx_quantile_99.9", "unknown function"),
        ("approx_quantile_101", "asks for more than 100 percent"),
        ("count_distinct_5", "unknown function"),
    ],
)
def test_other_texts_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Function.parse(text)


def test_an_unknown_function_is_answered_with_all_there_are() -> None:
    with pytest.raises(DefinitionError, match=r"last_<n>, last_distinct_<n>, count_distinct, .*approx_quantile_<p>"):
        compiled("median", Float64)
    assert len(Function.names()) == len(KINDS)
    assert {Function.parse(text).kind for text in HISTORY_FUNCTIONS} == set(KINDS)


@pytest.mark.parametrize(
    ("function", "dtype", "output"),
    [
        ("count_distinct", Int64, ValueType.INT64),
        ("approx_count_distinct", Int64, ValueType.INT64),
        ("approx_quantile_95", Float64, ValueType.FLOAT64),
        ("last_distinct_5", Array(String), ValueType.STRING_LIST),
        ("last_distinct_5", Array(UnixTimestamp), ValueType.TIMESTAMP_LIST),
    ],
)
def test_functions_of_sets_are_declared_with_the_type_they_give(function: str, dtype: Any, output: ValueType) -> None:
    view = compiled(function, dtype)
    assert view.aggregation("it").output is output
    assert view.aggregation("it").function == Function.parse(function)


@pytest.mark.parametrize(
    ("function", "dtype", "reason"),
    [
        ("count_distinct", Float64, "count_distinct does not give Float64. Fix: declare it as Int64"),
        ("approx_count_distinct", String, "approx_count_distinct does not give String. Fix: declare it as Int64"),
        ("approx_quantile_95", Int64, "approx_quantile_p does not give Int64. Fix: declare it as Float64"),
        ("last_distinct_5", String, "last_distinct_n does not give String. Fix: declare it as Array"),
        ("max", String, "max does not give String. Fix: declare it as the column's own type"),
        ("sum", String, "sum does not give String. Fix: declare it as Int64 or Float64"),
    ],
)
def test_another_type_is_refused_with_the_right_one(function: str, dtype: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=re.escape(reason)):
        compiled(function, dtype)


@pytest.mark.parametrize("function", ["count_distinct", "approx_count_distinct", "last_distinct_3"])
def test_functions_of_sets_need_a_column(function: str) -> None:
    with pytest.raises(DefinitionError, match="needs a column"):
        compiled(function, Array(String) if function == "last_distinct_3" else Int64, column="*")


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        ("count_distinct", Int64),
        ("approx_count_distinct", Int64),
        ("approx_quantile_95", Float64),
        ("last_distinct_5", Array(String)),
    ],
)
def test_a_function_that_the_online_store_does_not_keep_is_refused_online(function: str, dtype: Any) -> None:
    assert Function.parse(function).kind in HISTORY_ONLY
    assert not compiled(function, dtype).online
    with pytest.raises(DefinitionError, match=f"'{function}' is not kept by the online store yet.*online=False"):
        compiled(function, dtype, online=True)


# -- what columns are read as -----------------------------------------------------------------------------------------


def read_as(*functions: str, column_type: ValueType) -> ValueType | None:
    """What a column is read as over which these functions are declared, on a column of that type."""
    made = [aggregation(f, "it", name=f, column_type=column_type) for f in functions]
    view = windowed(made, (), SOURCE)
    assert view.columns == ("it",)
    return view.column_types().get("it")


@pytest.mark.parametrize("counting", ["count_distinct", "approx_count_distinct"])
def test_a_column_that_is_counted_distinct_is_read_as_it_is_unless_a_function_tells_its_type(counting: str) -> None:
    for others in ((), ("count",), ("mean", "std"), ("approx_quantile_50",)):
        assert read_as(counting, *others, column_type=ValueType.FLOAT64) is None
    assert read_as(counting, "last", column_type=ValueType.STRING) is ValueType.STRING
    assert read_as(counting, "last_distinct_3", column_type=ValueType.INT32) is ValueType.INT64
    assert read_as(counting, "sum", "mean", column_type=ValueType.INT64) is ValueType.INT64
    assert read_as(counting, "min", column_type=ValueType.FLOAT32) is ValueType.FLOAT64


def test_a_quantile_is_of_doubles_where_nothing_else_tells() -> None:
    assert read_as("approx_quantile_50", "count", column_type=ValueType.INT64) is ValueType.FLOAT64
    assert read_as("approx_quantile_50", "sum", column_type=ValueType.INT64) is ValueType.INT64


def test_the_first_aggregation_that_a_type_does_not_fit_is_named() -> None:
    made = [aggregation(f, "it", name=f, column_type=ValueType.FLOAT64) for f in ("count_distinct", "count", "mean")]
    view = windowed(made, (), SOURCE)
    assert view.unfit("it", ValueType.INT32) is None
    assert view.unfit("it", ValueType.STRING) == view.aggregation("mean")
    assert view.unfit("it", ValueType.STRING_LIST) == view.aggregation("count_distinct")
    assert view.unfit("other", ValueType.STRING) is None


@pytest.mark.parametrize(
    ("values", "column_type"),
    [
        (pa.array([2**53 + 1, None], pa.int64()), ValueType.INT64),
        (pa.array([1, None], pa.int16()), ValueType.INT64),
        (pa.array(["a", None]), ValueType.STRING),
        (pa.array([None, None]), ValueType.BOOL),
    ],
)
def test_pushed_rows_are_counted_distinct_in_the_type_they_have(values: pa.Array, column_type: ValueType) -> None:
    view = windowed([aggregation("count_distinct", "it", name="n")], (), SOURCE)
    column = admit(view, pa.table({"it": values, "ts": arrow_timestamps([0, 1])}), 2).events.columns["it"]
    assert column.type is column_type
    assert column.valid.tolist() == values.is_valid().to_pylist()


def test_pushed_rows_of_a_type_that_a_function_does_not_take_are_refused() -> None:
    view = windowed([aggregation(f, "it", name=f) for f in ("count_distinct", "mean")], (), SOURCE)
    for values, reason in ((pa.array(["a"]), "is string, on which mean is not defined"), (pa.array([[1]]), "is list")):
        with pytest.raises(RequestError, match=reason):
            admit(view, pa.table({"it": values, "ts": arrow_timestamps([0])}), 2)


def test_a_plain_view_over_a_push_source_is_pushed_to_by_its_name() -> None:
    source = PushSource(name="profiles", batch_source=FileSource(name="s", path="log", timestamp_field="ts"))
    with without_feasts_warnings():
        view = FeatureView(name="profile", entities=[ENTITY], schema=[Field(name="x", dtype=Float64)], source=source)
    assert compile_view(view).source.push_source == "profiles"
