"""Functions of the set of values in a window, against the reference, also where distinct values are many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.aggregations import reference, sketches
from feature_store.aggregations.distinct import Distinct, estimates
from feature_store.aggregations.events import Column, ColumnFold, Events
from feature_store.aggregations.quantiles import buckets, middles
from feature_store.aggregations.sketches import SKETCHED, evaluate_sets
from feature_store.definitions.aggregation import Function
from feature_store.definitions.types import ValueType
from feature_store.testing.event_logs import values_array, values_of
from feature_store.testing.views import COLUMNS, aggregation
from feature_store.timestamps import arrow_micros

SETTINGS = settings(max_examples=150, derandomize=True, deadline=None)

FUNCTIONS = (
    *("count_distinct", "approx_count_distinct", "last_distinct_1", "last_distinct_4"),
    *("approx_quantile_1", "approx_quantile_50", "approx_quantile_99", "approx_quantile_100"),
)

Ranges = Sequence[tuple[int, int]]


def evaluated(values: pa.Array, value_type: ValueType, ranges: Ranges, functions: Sequence[str]) -> dict[str, list]:
    """What each function says of ranges of a column's non-null values; times in microseconds."""
    column = Column.of(values, value_type)
    count = len(values)
    events = Events(np.array([0, count]), np.arange(count), np.zeros(count, np.int64), {"it": column})
    bounds = np.array(ranges, np.int64).reshape(-1, 2)
    wanted = [aggregation(f, "it", column_type=value_type, name=f) for f in functions]
    found = evaluate_sets(ColumnFold.of(events, "it"), wanted, bounds[:, 0], bounds[:, 1])
    for a in wanted:
        assert found[a.name].type == a.output.arrow
        if pa.types.is_list(found[a.name].type) and value_type is ValueType.TIMESTAMP:
            found[a.name] = pa.ListArray.from_arrays(found[a.name].offsets, arrow_micros(found[a.name].flatten()))
    return {name: array.to_pylist() for name, array in found.items()}


def expected(values: Sequence[Any], ranges: Ranges, function: str) -> list[Any]:
    return [reference.fold(values[i:j], Function.parse(function)) for i, j in ranges]


@st.composite
def columns(draw: st.DrawFn) -> tuple[ValueType, list[Any], list[tuple[int, int]]]:
    """A column of any type, few of its values or many, and ranges of the non-null values of some entities."""
    value_type = draw(st.sampled_from(list(COLUMNS.values())))
    some = draw(st.lists(values_of(value_type), min_size=1, max_size=12))
    values = draw(st.lists(st.sampled_from(some), min_size=draw(st.sampled_from([0, 15, 30])), max_size=40))
    present = sum(reference._clean(v) is not None for v in values)
    cuts = draw(st.lists(st.integers(0, present), max_size=5))
    entities = list(pairwise(sorted([0, present, *cuts])))
    ranges = []
    for _ in range(draw(st.sampled_from([1, 6, 12]))):
        low, high = draw(st.sampled_from(entities))
        first, last = draw(st.tuples(st.integers(low, high), st.integers(low, high)))
        ranges += draw(
            st.sampled_from([[(first, last)], [(last, first)], [(low, last)], [(first, high)], [(low, high)]])
        )
    return value_type, values, ranges


@SETTINGS
@given(columns(), st.sampled_from([1, 4, 1_000]), st.integers(2, 6))
def test_every_function_equals_the_reference(
    case: tuple[ValueType, list[Any], list[tuple[int, int]]], batch: int, smallest: int
) -> None:
    value_type, values, ranges = case
    with mock.patch.object(sketches, "_BATCH", batch):
        functions = [f for f in FUNCTIONS if Function.parse(f).accepts(value_type)]
        found = evaluated(values_array(values, value_type), value_type, ranges, functions)
    clean = [v for value in values if (v := reference._clean(value)) is not None]
    for function in functions:
        assert repr(found[function]) == repr(expected(clean, ranges, function)), function
    # The same where estimates begin at a few distinct values.
    bounds = dict.fromkeys(sketches.SMALLEST_HASHES, smallest)
    with mock.patch.object(sketches, "_BATCH", batch), mock.patch.object(sketches, "SMALLEST_HASHES", bounds):
        counted = evaluated(values_array(values, value_type), value_type, ranges, list(bounds))
    for function in bounds:
        for (i, j), number in zip(ranges, counted[function], strict=True):
            hashes = reference._distinct_hashes(clean[i:j])
            exact = len(hashes) < smallest or (function == "count_distinct" and len(hashes) == smallest)
            assert number == (len(hashes) if exact else (smallest - 1) * 2**64 // hashes[smallest - 1])


# -- many distinct values ---------------------------------------------------------------------------------------------

INTEGERS = ValueType.INT64


def judged(values: np.ndarray, ranges: Ranges) -> dict[str, list[int]]:
    """Both counts of ranges of integers, equal to the reference's."""
    counts = ("count_distinct", "approx_count_distinct")
    found = evaluated(pa.array(values), INTEGERS, ranges, counts)
    for function in counts:
        assert found[function] == expected(values.tolist(), ranges, function), function
    return found


@pytest.mark.parametrize("bound", [1_024, 4_096])
def test_counts_on_both_sides_of_the_number_where_estimates_begin(bound: int) -> None:
    once = np.arange(bound + 1)
    values = np.concatenate([once, np.repeat(once, 2)])
    around = [bound - 1, bound, bound + 1]
    found = judged(values, [*((0, n) for n in around), *((len(once), len(once) + 2 * n) for n in around)])
    approximate, exact = found["approx_count_distinct"], found["count_distinct"]
    assert approximate[:3] == approximate[3:]
    assert exact[:3] == exact[3:]
    if bound == 1_024:
        assert exact[:3] == around
        assert approximate[0] == 1_023
        assert approximate[1] != 1_024
    else:
        assert exact[:2] == [4_095, 4_096]
        assert exact[2] != 4_097
    assert all(math.isclose(a, n, rel_tol=0.1) for a, n in zip(approximate[:3] + exact[:3], around * 2, strict=True))


def test_counts_of_texts_beyond_the_bound_equal_the_reference() -> None:
    values = [f"card {i % 5_000}" for i in range(12_000)]
    ranges = [(0, 12_000), (100, 6_000), (3_000, 7_500)]
    counts = ("count_distinct", "approx_count_distinct")
    found = evaluated(pa.array(values), ValueType.STRING, ranges, counts)
    for function in counts:
        assert found[function] == expected(values, ranges, function)


def _uniform(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, 20_000, length)


def _once(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(length)


def _few_heavy(rng: np.random.Generator, length: int) -> np.ndarray:
    return (rng.pareto(0.4, length) * 10).astype(np.int64)


def _in_blocks(rng: np.random.Generator, length: int) -> np.ndarray:
    return np.repeat(rng.integers(-9_000, 9_000, length // 2 + 1), 2)[:length]


@pytest.mark.parametrize("draw", [_uniform, _once, _few_heavy, _in_blocks])
def test_windows_of_one_hot_entity_equal_the_reference(draw: Callable[[np.random.Generator, int], np.ndarray]) -> None:
    rng = np.random.default_rng(5)
    values = draw(rng, 30_000)
    sliding = [(max(0, high - 14_000), high) for high in range(2_000, 30_001, 2_500)]
    scattered = [tuple(sorted(rng.integers(0, 30_000, 2).tolist())) for _ in range(10)]
    judged(values, [*sliding, *scattered, (0, 30_000), (0, 30_000), (7, 7)])


def test_entities_do_not_count_each_others_values() -> None:
    values = np.concatenate([np.arange(6_000), np.arange(6_000), np.arange(3_000, 9_000)])
    found = judged(values, [(0, 6_000), (6_000, 12_000), (12_000, 18_000), (12_001, 17_999)])
    assert found["count_distinct"][0] == found["count_distinct"][1]


def test_a_sketch_of_two_sets_is_the_sketch_of_their_union() -> None:
    """The K smallest hashes of a union are among those of its parts, so a count is a function of the set alone."""
    rng = np.random.default_rng(9)
    values = rng.integers(0, 40_000, 50_000)
    whole = judged(values, [(0, 50_000)])
    for order in (np.sort(values), values[::-1], np.repeat(values, 2), np.concatenate([values[25_000:], values])):
        column = np.ascontiguousarray(order)
        assert judged(column, [(0, len(column))]) == whole


def test_one_query_more_or_less_changes_no_number() -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 9_000, 30_000)
    ranges = [(i * 1_000, i * 1_000 + 15_000) for i in range(15)]
    together = judged(values, ranges)
    for i, alone in enumerate(ranges):
        assert {name: [numbers[i]] for name, numbers in together.items()} == judged(values, [alone])


@SETTINGS
@given(st.lists(st.integers(0, 30) | st.integers(0, 2**64 - 1), min_size=1, max_size=60), st.data())
def test_the_kth_hash_of_a_range_is_the_kth_of_its_sorted_set(hashes: list[int], data: st.DataObject) -> None:
    edges = st.tuples(st.integers(0, len(hashes)), st.integers(0, len(hashes))).map(sorted)
    ranges = data.draw(st.lists(edges.filter(lambda e: e[0] < e[1]), min_size=1, max_size=8))
    sets = [sorted(set(hashes[i:j])) for i, j in ranges]
    k = [data.draw(st.integers(1, len(s))) for s in sets]
    bounds = np.array(ranges, np.int64)
    distinct = Distinct.of(np.array(hashes, np.uint64))
    assert distinct.count(bounds[:, 0], bounds[:, 1]).tolist() == [len(s) for s in sets]
    found = distinct.kth_hash(bounds[:, 0], bounds[:, 1], np.array(k))
    assert found.tolist() == [s[n - 1] for s, n in zip(sets, k, strict=True)]


def test_estimates_are_whole_numbers_and_fit() -> None:
    smallest = np.array([2**64 - 1, 2**63, 3, 2**63, 0], np.uint64)
    assert estimates(smallest, 4).tolist() == [3, 6, 2**63 - 1, 6, 2**63 - 1]


# -- quantiles --------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False).map(lambda v: v + 0.0)


@SETTINGS
@given(st.lists(finite, min_size=2, max_size=40))
def test_buckets_are_in_the_order_of_their_values_and_their_middles_near(values: list[float]) -> None:
    ordered = np.sort(np.array(values))
    numbers = buckets(ordered)
    assert (np.diff(numbers) >= 0).all()
    middle = middles(numbers)
    assert (buckets(middle + 0.0)[middle != 0] == numbers[middle != 0]).all()
    normal = np.abs(ordered) >= 2.0**-1022
    assert (np.abs(middle - ordered)[normal] <= 0.004 * np.abs(ordered)[normal]).all()
    assert (np.abs(middle)[~normal] < 2.0**-1022).all()


@pytest.mark.parametrize("least", [0.0, 5e-324, -5e-324, 2.0**-1030])
def test_the_buckets_at_zero_give_zero(least: float) -> None:
    assert repr(middles(buckets(np.array([least]))).tolist()) == "[0.0]"


@pytest.mark.parametrize("value_type", [ValueType.INT64, ValueType.FLOAT64])
def test_ranks_are_rounded_up(value_type: ValueType) -> None:
    values = pa.array([10, 20, 30, 40, 50], pa.int64()).cast(value_type.arrow)
    asked = {1: 10, 20: 10, 21: 20, 40: 20, 50: 30, 60: 30, 61: 40, 80: 40, 81: 50, 100: 50}
    found = evaluated(values, value_type, [(0, 5), (2, 2)], [f"approx_quantile_{p}" for p in asked])
    for p, truth in asked.items():
        value, empty = found[f"approx_quantile_{p}"]
        assert math.isclose(value, truth, rel_tol=0.004)
        assert empty is None


def test_integers_beyond_doubles_have_the_quantile_of_their_double() -> None:
    values = [2**63 - 1, -(2**63), 2**53 + 1]
    found = evaluated(pa.array(values), INTEGERS, [(0, 3)], ["approx_quantile_100", "approx_quantile_1"])
    assert found["approx_quantile_100"] == [2.0**63 * (1 + 2.0**-8)]
    assert found["approx_quantile_1"] == [-(2.0**63) * (1 + 2.0**-8)]


# -- the newest distinct values ---------------------------------------------------------------------------------------


def test_a_value_lies_where_it_came_last() -> None:
    values = ["a", "b", "a", "c", "b", "b"]
    ranges = [(0, 6), (0, 4), (0, 3), (1, 3), (3, 3), (5, 6)]
    found = evaluated(pa.array(values), ValueType.STRING, ranges, ["last_distinct_2", "last_distinct_9"])
    assert found["last_distinct_9"] == [["b", "c", "a"], ["c", "a", "b"], ["a", "b"], ["a", "b"], [], ["b"]]
    assert found["last_distinct_2"] == [["b", "c"], ["c", "a"], ["a", "b"], ["a", "b"], [], ["b"]]


def test_a_value_forgotten_for_newer_ones_comes_back_when_it_comes_again() -> None:
    values = np.array([1, 2, 3, 4, 1, 1, 5, 2])
    ranges = [(0, high) for high in range(9)]
    found = evaluated(pa.array(values), INTEGERS, ranges, ["last_distinct_2"])
    assert found["last_distinct_2"] == expected(values.tolist(), ranges, "last_distinct_2")


def test_functions_that_fold_are_left_to_others() -> None:
    column = Column.of(pa.array([1, 2]), INTEGERS)
    events = Events(np.array([0, 2]), np.arange(2), np.zeros(2, np.int64), {"it": column})
    wanted = [aggregation(f, "it", column_type=INTEGERS, name=f) for f in ("count", "last_2", *FUNCTIONS)]
    found = evaluate_sets(ColumnFold.of(events, "it"), wanted, np.array([0]), np.array([2]))
    assert sorted(found) == sorted(FUNCTIONS)
    assert {a.function.kind for a in wanted if a.name in found} == set(SKETCHED)
