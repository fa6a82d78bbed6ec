"""From measures to feature values: the last step of the algebra, the same in training and in serving."""

from __future__ import annotations

import numpy as np

from feature_store.aggregations.measures import State
from feature_store.definitions.aggregation import Function
from feature_store.definitions.types import ValueType

Values = tuple[np.ndarray, np.ndarray]
"""Values and, beside each, whether it is one (False is null). A null's value is 0."""


def finalize(function: Function, column: ValueType, state: State) -> Values:
    """The function's values on states of its column, as SEMANTICS' table says: empty, overflowing, non-finite is null.

    Values are int64 (count, integer sums, integer and time extremes) or float64.
    """
    n = state["n"]
    match function.kind:
        case "count":
            return n, np.ones(len(n), bool)
        case "sum" if column.is_integer:
            return _integer_sum(state)
        case "sum":
            return _finite(state["sum"], n > 0)
        case "mean":
            return _finite(_total(state) / np.maximum(n, 1), n > 0)
        case "min" | "max":
            return np.where(n > 0, state[function.kind], 0), n > 0
        case "var" | "std":
            variance = state["m2"] / np.maximum(n - 1, 1)
            return _finite(np.sqrt(variance) if function.kind == "std" else variance, n > 1)
    raise AssertionError(f"{function.kind} is looked up, not folded")


def _integer_sum(state: State) -> Values:
    high, low = state["sum_high"], state["sum_low"]
    fits = (high >= -(1 << 31)) & (high < (1 << 31))
    return np.where(fits, (high << 32) | low, 0), fits & (state["n"] > 0)


def _total(state: State) -> np.ndarray:
    if "sum" in state:
        return state["sum"]
    return state["sum_high"].astype(np.float64) * 2.0**32 + state["sum_low"]


def _finite(values: np.ndarray, valid: np.ndarray) -> Values:
    valid = valid & np.isfinite(values)
    return np.where(valid, values, 0.0), valid
