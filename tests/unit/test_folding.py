"""The algebra: folds over ranges against a plain left fold, and combine's laws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.aggregations.events import fold_ranges
from feature_store.aggregations.finalize import finalize
from feature_store.aggregations.measures import MEASURES, State, combine, identity, lift, take
from feature_store.aggregations.reference import fold, tolerance
from feature_store.definitions.aggregation import Function
from feature_store.definitions.types import ValueType

SETTINGS = settings(max_examples=80, derandomize=True, deadline=None)

NAMES = {
    np.dtype(np.int64): ("integer_sum", "max", "min", "moments"),
    np.dtype(np.float64): ("max", "min", "moments", "sum"),
}

integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-100, 100)
floats = st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1e100, -1e100, 5e-324, 1e15 + 0.3])
columns = st.lists(integers, max_size=40).map(lambda v: np.array(v, np.int64)) | st.lists(floats, max_size=40).map(
    lambda v: np.array(v, np.float64)
)


@st.composite
def ranged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column and ranges of it, some empty."""
    values = draw(columns)
    pairs = draw(st.lists(st.tuples(*[st.integers(0, len(values))] * 2), min_size=1, max_size=8))
    bounds = np.array([sorted(p) for p in pairs], np.int64)
    return values, bounds[:, 0], bounds[:, 1]


def left_fold(values: np.ndarray) -> State:
    """One value after the other, from none."""
    names = NAMES[values.dtype]
    state = identity(names, values.dtype, 1)
    for i in range(len(values)):
        state = combine(state, lift(values[i : i + 1], names), names)
    return state


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[f].dtype == b[f].dtype and a[f].tobytes() == b[f].tobytes() for f in a)


@SETTINGS
@given(ranged())
def test_fold_ranges_equals_a_plain_left_fold(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    values, low, high = case
    folded = fold_ranges(values, low, high, NAMES[values.dtype])
    column = ValueType.INT64 if values.dtype == np.int64 else ValueType.FLOAT64
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        one, plain = take(folded, slice(i, i + 1)), left_fold(values[a:b])
        for field in ("n", "min", "max", "sum_high", "sum_low"):
            assert field not in plain or one[field].tobytes() == plain[field].tobytes(), (field, a, b)
        inside = values[a:b].tolist()
        for kind in ("sum", "mean", "min", "max", "var"):
            function = Function(kind)  # type: ignore[arg-type]
            truth = fold(inside, function)
            for state in (one, plain):
                found, valid = finalize(function, column, state)
                assert valid[0] == (truth is not None), (kind, inside)
                if truth is not None:
                    allowed = tolerance(inside, function, truth) if isinstance(truth, float) else 0
                    assert abs(Fraction(found.tolist()[0]) - Fraction(truth)) <= allowed, (kind, inside)


@SETTINGS
@given(ranged(), st.integers(0, 9), st.integers(0, 9))
def test_equal_windows_have_equal_bits_wherever_they_lie(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], before: int, after: int
) -> None:
    values, low, high = case
    names = NAMES[values.dtype]
    around = np.concatenate([values[:before][::-1], values, values[:after]])
    shift = min(before, len(values))
    here = fold_ranges(values, low, high, names)
    elsewhere = fold_ranges(around, low + shift, high + shift, names)
    assert same_bits(here, elsewhere)
    for i in range(len(low)):
        assert same_bits(take(here, slice(i, i + 1)), fold_ranges(values, low[i : i + 1], high[i : i + 1], names))


def test_a_fold_over_no_measure_counts() -> None:
    assert fold_ranges(np.array([1, 2]), np.array([0, 2, 1]), np.array([2, 2, 0]), ()) == {
        "n": pytest.approx(np.array([2, 0, 0]))
    }


@SETTINGS
@given(columns, st.integers(0, 40), st.integers(0, 40))
def test_combine_is_associative_and_has_an_identity(values: np.ndarray, first: int, second: int) -> None:
    names = NAMES[values.dtype]
    low, high = sorted((min(first, len(values)), min(second, len(values))))
    a, b, c = (left_fold(part) for part in (values[:low], values[low:high], values[high:]))
    left, right = combine(combine(a, b, names), c, names), combine(a, combine(b, c, names), names)
    for field in left:
        if field in ("sum", "mean", "m2"):
            scale = (
                math.fsum(abs(v) for v in values.tolist())
                if field != "m2"
                else math.fsum(v * v for v in map(float, values))
            )
            assert abs(left[field][0] - right[field][0]) <= 1e-12 * scale
        else:
            assert left[field].tobytes() == right[field].tobytes()
    none = identity(names, values.dtype, 1)
    assert same_bits(combine(none, a, names), a)
    assert same_bits(combine(a, none, names), a)


def test_every_measure_is_folded_here() -> None:
    assert set(MEASURES) == {name for names in NAMES.values() for name in names}


def test_integer_sums_carry_over_both_limbs() -> None:
    largest, least = 2**63 - 1, -(2**63)
    for values in ([largest] * 9, [least] * 9, [largest, least] * 5, [-1, 1], [2**32 - 1, 1], [-(2**32), 2**32 - 1]):
        state = left_fold(np.array(values, np.int64))
        assert int(state["sum_high"][0]) * 2**32 + int(state["sum_low"][0]) == sum(values)
        assert 0 <= state["sum_low"][0] < 2**32
