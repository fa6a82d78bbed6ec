"""The comparison that judges every engine: what it lets pass, what it fails, and what its message says."""

from __future__ import annotations

import datetime as dt

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field
from feature_store.testing import assert_features_equal, mismatches
from feature_store.testing.event_logs import Layout, Log
from feature_store.testing.views import aggregation, definitions, windowed

SUM = aggregation("sum", "real", name="sum")
MEAN = aggregation("mean", "real", name="mean")
VAR = aggregation("var", "real", name="var")
STD = aggregation("std", "real", name="std")


def test_equal_tables_pass_whatever_holds_them() -> None:
    columns = {"k": [1, 2], "x": [1.5, None], "n": [[1, 2], []]}
    tables = (pa.table(columns), pl.DataFrame(columns), columns)
    for left in tables:
        for right in tables:
            assert_features_equal(left, right, on=["k"])
    assert_features_equal(pd.DataFrame({"k": [1, 2]}), {"k": [1, 2]})


def test_the_message_names_feature_row_key_and_both_values() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_features_equal(
            {"k": [7, 8], "x": [1, 2], "y": [0, 0]}, {"k": [7, 8], "x": [1, 3], "y": [0, 0]}, on=["k"]
        )
    assert str(failed.value) == "1 values of 1 features differ:\n  feature 'x', row 1 (k=8): left 2, right 3"


def test_the_message_says_how_far_apart_and_how_far_is_allowed() -> None:
    with pytest.raises(AssertionError, match=r"left 2\.0, right 1\.0, apart by 1, allowed 1e-09"):
        assert_features_equal({"sum": [2.0]}, {"sum": [1.0]}, aggregations=[SUM])


def test_null_equals_null_and_nothing_else() -> None:
    assert_features_equal({"x": [None]}, {"x": [None]})
    for value in (0, 0.0, "", False, [], float("nan")):
        assert len(mismatches({"x": [value]}, {"x": [None]})) == 1
        assert len(mismatches({"x": [None]}, {"x": [value]})) == 1
    assert len(mismatches({"sum": [None]}, {"sum": [0.0]}, aggregations=[SUM])) == 1


def test_nan_equals_nan_and_infinities_their_own_sign() -> None:
    nan, inf = float("nan"), float("inf")
    assert_features_equal({"x": [nan, inf, -inf]}, {"x": [nan, inf, -inf]})
    assert len(mismatches({"x": [nan, inf, 1.0]}, {"x": [1.0, -inf, inf]})) == 3


def test_lists_are_equal_element_by_element_in_their_order() -> None:
    left = {"x": [[1, 2], [1, None], [1], [0.1]]}
    assert not mismatches(left, left)
    assert len(mismatches(left, {"x": [[2, 1], [None, 1], [1, 1], [0.1 + 1e-17 + 1e-16]]})) == 4


def test_times_of_any_unit_and_zone_compare_as_microseconds() -> None:
    moment = dt.datetime(2018, 8, 1, 12, tzinfo=dt.UTC)
    naive = pa.array([moment.replace(tzinfo=None)], pa.timestamp("ms"))
    zoned = pa.array([moment], pa.timestamp("ns", "Europe/Berlin"))
    assert_features_equal(pa.table({"x": naive}), pa.table({"x": zoned}))
    later = pa.array([moment + dt.timedelta(microseconds=1)], pa.timestamp("us"))
    assert len(mismatches(pa.table({"x": naive}), pa.table({"x": later}))) == 1


def test_a_column_without_a_tolerance_is_exact() -> None:
    assert len(mismatches({"x": [0.1]}, {"x": [0.1 + 2e-17]})) == (0.1 != 0.1 + 2e-17)
    assert len(mismatches({"x": [1.0]}, {"x": [1.0 + 2.3e-16]})) == 1
    whole = aggregation("sum", "whole", name="sum")
    assert len(mismatches({"sum": [2**62 + 1]}, {"sum": [2**62]}, aggregations=[whole])) == 1


#   what was added   1e9, -1e9, 1        sum 1, A = 2e9 + 1, so 2 may be lost to rounding, 3 may not
def test_a_sum_may_be_off_by_its_absolute_values_and_no_further() -> None:
    def differ(found: float, folded: bool = True) -> int:
        return len(mismatches({"sum": [found]}, {"sum": [1.0]}, aggregations=[SUM], folded=values if folded else None))

    def values(name: str, row: int) -> list[float]:
        assert (name, row) == ("sum", 0)
        return [1e9, -1e9, 1.0]

    assert differ(3.0) == 0
    assert differ(3.1) == 1
    assert differ(1.1, folded=False) == 1
    assert differ(1.0 + 0.9e-9, folded=False) == 0


def test_mean_var_and_the_square_of_std_have_their_own_tolerances() -> None:
    def differ(a: object, found: float, truth: float) -> int:
        return len(
            mismatches({a.name: [found]}, {a.name: [truth]}, aggregations=[a], folded=lambda *_: [3.0, 4.0])  # type: ignore[attr-defined]
        )

    # A / n = 3.5; sum of squares / n = 12.5
    assert (differ(MEAN, 3.5 + 3.4e-9, 3.5), differ(MEAN, 3.5 + 3.6e-9, 3.5)) == (0, 1)
    assert (differ(VAR, 0.5 + 5.1e-7, 0.5), differ(VAR, 0.5 + 5.2e-7, 0.5)) == (0, 1)
    root = 0.5**0.5
    allowed = 5.125e-7 / (2 * root)
    assert (differ(STD, root + 0.99 * allowed, root), differ(STD, root + 1.01 * allowed, root)) == (0, 1)
    # Judged by its square, a tiny std may be off by far more than a millionth of itself.
    assert differ(STD, 1e-4, 0.0) == 0


def test_rows_are_matched_by_key_and_equal_keys_in_their_order() -> None:
    left = {"k": [2, 1, 1, None], "x": ["c", "a", "b", "d"]}
    right = {"k": [1, None, 1, 2], "x": ["a", "d", "b", "c"]}
    assert_features_equal(left, right, on=["k"])
    assert [m.row for m in mismatches(left, {**right, "x": ["b", "d", "a", "c"]}, on=["k"])] == [0, 2]
    assert len(mismatches(left, right)) == 6


def test_other_rows_and_columns_are_differences_too() -> None:
    for left, right, on, message in (
        ({"x": [1]}, {"y": [1]}, [], r"columns differ: only left has \['x'\], only right has \['y'\]"),
        ({"x": [1]}, {"x": [1, 1]}, [], "the left table has 1 rows, the right one 2"),
        ({"x": [1]}, {"x": [1]}, ["k"], "no column 'k' to match rows on"),
        ({"k": [1, 1]}, {"k": [1, 2]}, ["k"], r"row 1 of the right table \(k=2\) has no equal in the left one"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_features_equal(left, right, on=on)


@pytest.mark.parametrize("full_names", [False, True])
def test_a_request_says_which_columns_have_a_tolerance(full_names: bool) -> None:
    view = windowed([SUM, MEAN], [Field("k", ValueType.INT64)], Layout().source(Log((), {}, ())))
    request = definitions(view).resolve(["view:sum", "view:mean"], full_names)
    name = "view__sum" if full_names else "sum"
    assert not mismatches({name: [1.0 + 1e-12]}, {name: [1.0]}, request=request)
    assert mismatches({name: [1.0 + 1e-12]}, {name: [1.0]})


def test_only_the_first_differences_are_listed() -> None:
    with pytest.raises(AssertionError, match="30 values of 1 features differ") as failed:
        assert_features_equal({"x": [0] * 30}, {"x": [1] * 30})
    assert str(failed.value).endswith("and 18 more")
