"""The algebra of windowed aggregations: what is kept of a set of events, and how two sets' keepings become one.

A *measure* is a small group of numbers over one column's non-null values: a sum, a minimum, the moments. Lift turns
events into measures of one value each, combine makes one out of two, finalize (finalize.py) turns measures into
feature values. All three work on columns of numbers at once: one element per window, tile or event. Training,
bootstrap and online reads go through these same functions.

A *state* is the dictionary of all fields of one column: `n` (how many values) and the fields of its measures. Every
field is a numpy array of one length. Combine is associative and has an identity; it is not commutative, for floats
are folded in the order of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from feature_store.definitions.aggregation import Function
from feature_store.definitions.types import ValueType

State = dict[str, np.ndarray]
MeasureName = Literal["sum", "integer_sum", "min", "max", "moments"]

_LIMB = 32
_LIMB_MASK = (1 << _LIMB) - 1
_LOWEST = {np.dtype(np.int64): np.iinfo(np.int64).min, np.dtype(np.float64): -np.inf}
_HIGHEST = {np.dtype(np.int64): np.iinfo(np.int64).max, np.dtype(np.float64): np.inf}


@dataclass(frozen=True)
class Measure:
    """One kind of keeping: `fields` its parts, `lift` from values, `combine` of two states, `identity` of no event.

    `dtype` is the type of the parts, None where it is the column's own.
    """

    fields: tuple[str, ...]
    lift: Callable[[np.ndarray], State]
    combine: Callable[[State, State], State]
    identity: Callable[[np.dtype], dict[str, float]]
    dtype: np.dtype | None = None


def _lift_integer_sum(values: np.ndarray) -> State:
    return {"sum_high": values >> _LIMB, "sum_low": values & _LIMB_MASK}


def _combine_integer_sum(a: State, b: State) -> State:
    low = a["sum_low"] + b["sum_low"]
    return {"sum_high": a["sum_high"] + b["sum_high"] + (low >> _LIMB), "sum_low": low & _LIMB_MASK}


def _combine_moments(a: State, b: State) -> State:
    """Chan, Golub and LeVeque (1979), pairwise update of mean and sum of squared deviations; never sums of squares."""
    n = a["n"] + b["n"]
    divisor = np.maximum(n, 1)
    delta = b["mean"] - a["mean"]
    return {
        "mean": np.where(a["n"] == 0, b["mean"], a["mean"] + delta * (b["n"] / divisor)),
        "m2": a["m2"] + b["m2"] + delta * delta * (a["n"] * (b["n"] / divisor)),
    }


MEASURES: dict[str, Measure] = {
    "sum": Measure(
        ("sum",),
        lambda values: {"sum": values.astype(np.float64)},
        lambda a, b: {"sum": a["sum"] + b["sum"]},
        lambda _: {"sum": 0.0},
        np.dtype(np.float64),
    ),
    # 128 bits in two limbs of 64: sums of 64-bit integers stay exact, and overflow of the result can be seen.
    "integer_sum": Measure(
        ("sum_high", "sum_low"),
        _lift_integer_sum,
        _combine_integer_sum,
        lambda _: {"sum_high": 0, "sum_low": 0},
        np.dtype(np.int64),
    ),
    "min": Measure(
        ("min",),
        lambda values: {"min": values},
        lambda a, b: {"min": np.minimum(a["min"], b["min"])},
        lambda dtype: {"min": _HIGHEST[dtype]},
    ),
    "max": Measure(
        ("max",),
        lambda values: {"max": values},
        lambda a, b: {"max": np.maximum(a["max"], b["max"])},
        lambda dtype: {"max": _LOWEST[dtype]},
    ),
    "moments": Measure(
        ("mean", "m2"),
        lambda values: {"mean": values.astype(np.float64), "m2": np.zeros(len(values))},
        _combine_moments,
        lambda _: {"mean": 0.0, "m2": 0.0},
        np.dtype(np.float64),
    ),
}


def measure_of(function: Function, column: ValueType) -> str | None:
    """The measure that a function needs on a column of this type, or None where the count of values is enough."""
    if function.kind in ("sum", "mean"):
        return "integer_sum" if column.is_integer else "sum"
    if function.kind in ("var", "std"):
        return "moments"
    return function.kind if function.kind in ("min", "max") else None


def field_types(measures: Iterable[str], column: np.dtype) -> dict[str, np.dtype]:
    """The fields that states of these measures have, in a fixed order, with their types; `n` is the first."""
    types = {"n": np.dtype(np.int64)}
    for name in sorted(measures):
        types.update(dict.fromkeys(MEASURES[name].fields, MEASURES[name].dtype or column))
    return types


def lift(values: np.ndarray, measures: Iterable[str]) -> State:
    """The state of each value by itself: one element an event. `values` holds no nulls (int64 or float64)."""
    state: State = {"n": np.ones(len(values), np.int64)}
    for name in measures:
        state.update(MEASURES[name].lift(values))
    return state


def identity(measures: Iterable[str], column: np.dtype, length: int) -> State:
    """`length` states of no event at all."""
    state: State = {"n": np.zeros(length, np.int64)}
    for name in measures:
        for field, value in MEASURES[name].identity(column).items():
            state[field] = np.full(length, value, MEASURES[name].dtype or column)
    return state


def combine(a: State, b: State, measures: Iterable[str]) -> State:
    """The states of two sets of events made one, element by element; the events of `a` come before those of `b`."""
    combined: State = {"n": a["n"] + b["n"]}
    with np.errstate(over="ignore", invalid="ignore"):
        for name in measures:
            combined.update(MEASURES[name].combine(a, b))
    return combined


def take(state: State, index: np.ndarray | slice) -> State:
    """Some elements of a state."""
    return {field: values[index] for field, values in state.items()}


def put(state: State, index: np.ndarray, part: State) -> None:
    """Sets some elements of a state, in place."""
    for field, values in part.items():
        state[field][index] = values
