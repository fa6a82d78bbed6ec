"""Equality of feature values as the contract defines it: exact, within a tolerance, or by its square.

Null equals null and nothing else; NaN equals NaN (plain views keep it); lists are equal element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from feature_store.aggregations.reference import tolerance
from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.definitions.repository import Request
from feature_store.definitions.view import WindowedView
from feature_store.timestamps import arrow_micros, iso

#: The values that a feature's window holds, by column name and row of the right table.
Folded = Callable[[str, int], Sequence[float]]

#: How many differences a failure lists.
LISTED = 12


@dataclass(frozen=True)
class Mismatch:
    """One value that differs: the feature, its row in the right table, what names that row, and both values."""

    feature: str
    row: int
    where: str
    left: Any
    right: Any
    allowed: float = 0.0

    def __str__(self) -> str:
        text = f"feature '{self.feature}', row {self.row}"
        text += f" ({self.where})" if self.where else ""
        text += f": left {self.left!r}, right {self.right!r}"
        if isinstance(self.left, float) and isinstance(self.right, float):
            text += f", apart by {abs(self.left - self.right):.3g}, allowed {self.allowed:.3g}"
        return text


def assert_features_equal(
    left: Any,
    right: Any,
    *,
    on: Sequence[str] = (),
    aggregations: Iterable[Aggregation] = (),
    request: Request | None = None,
    folded: Folded | None = None,
) -> None:
    """Fails with the feature, the row and both values where two tables of features differ by the contract.

    `left` is judged, `right` is the truth: Arrow tables, pandas or Polars frames, or columns of lists. `on` names the
    columns that identify a row; without it rows are compared by their place, otherwise equal rows are matched in their
    order. `aggregations` (or those behind a `request`) say which columns have a tolerance, by name; the others are
    exact. The tolerance of a sum depends on what was added: `folded` gives the values inside the window of a feature
    and row of `right`; without it the truth's own size stands for them, which is stricter.
    """
    found = mismatches(left, right, on=on, aggregations=aggregations, request=request, folded=folded)
    if found:
        features = len({m.feature for m in found})
        listed = "\n".join(f"  {m}" for m in found[:LISTED])
        more = f"\n  and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise AssertionError(f"{len(found)} values of {features} features differ:\n{listed}{more}")


def mismatches(
    left: Any,
    right: Any,
    *,
    on: Sequence[str] = (),
    aggregations: Iterable[Aggregation] = (),
    request: Request | None = None,
    folded: Folded | None = None,
) -> list[Mismatch]:
    """The values that differ, arguments as for `assert_features_equal`.

    Raises AssertionError where the tables have other columns, another number of rows, or rows without an equal.
    """
    a, b = _columns(left), _columns(right)
    _check_same("columns", sorted(a), sorted(b))
    if missing := [name for name in on if name not in a]:
        raise AssertionError(f"no column '{missing[0]}' to match rows on; there are: {', '.join(a)}")
    rows_a, rows_b = _matched(a, b, on)
    functions = {g.name: g.function for g in (*aggregations, *_requested(request))}
    found: list[Mismatch] = []
    for name in (n for n in b if n not in on):
        function = functions.get(name)
        for i, j in zip(rows_a, rows_b, strict=True):
            one, other = a[name][i], b[name][j]
            allowed = _allowed(function, other, folded and folded(name, j))
            if not _equal(one, other, function, allowed):
                where = ", ".join(f"{key}={_shown(b[key][j])}" for key in on)
                found.append(Mismatch(name, j, where, one, other, allowed))
    return found


def _requested(request: Request | None) -> list[Aggregation]:
    """The aggregations behind a request's columns, each by its column's name."""
    renamed = []
    for ref, column in zip(request.refs, request.columns, strict=True) if request else ():
        view = request.definitions.view(ref.view) if request else None
        if isinstance(view, WindowedView) and ref.feature in {a.name for a in view.aggregations}:
            found = view.aggregation(ref.feature)
            renamed.append(
                Aggregation(**{f: getattr(found, f) for f in found.__struct_fields__ if f != "name"}, name=column)
            )
    return renamed


def _columns(table: Any) -> dict[str, list[Any]]:
    """Columns as Python values; times as microseconds, so that naive and aware ones compare."""
    if isinstance(table, Mapping):
        return {name: list(values) for name, values in table.items()}
    if not isinstance(table, pa.Table):
        table = pa.table(table) if hasattr(table, "__arrow_c_stream__") else pa.Table.from_pandas(table)
    return {name: _python(table[name].combine_chunks()) for name in table.column_names}


def _python(array: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(array.type):
        return arrow_micros(array).to_pylist()
    if pa.types.is_list(array.type) and pa.types.is_timestamp(array.type.value_type):
        return [None if item is None else arrow_micros(item).to_pylist() for item in _items(array)]
    return array.to_pylist()


def _items(array: pa.ListArray) -> list[pa.Array | None]:
    return [scalar.values if scalar.is_valid else None for scalar in array]


def _check_same(what: str, left: Sequence[Any], right: Sequence[Any]) -> None:
    if list(left) != list(right):
        only_left, only_right = [x for x in left if x not in right], [x for x in right if x not in left]
        raise AssertionError(f"{what} differ: only left has {only_left}, only right has {only_right}")


def _matched(
    a: Mapping[str, list[Any]], b: Mapping[str, list[Any]], on: Sequence[str]
) -> tuple[Sequence[int], Sequence[int]]:
    """Which rows of the left table belong to which of the right one."""
    count_a, count_b = (len(next(iter(t.values()), [])) for t in (a, b))
    if count_a != count_b:
        raise AssertionError(f"the left table has {count_a} rows, the right one {count_b}")
    if not on:
        return range(count_a), range(count_b)
    places: dict[tuple, list[int]] = {}
    for i in reversed(range(count_a)):
        places.setdefault(_key(a, on, i), []).append(i)
    rows = []
    for j in range(count_b):
        if not (at := places.get(_key(b, on, j))):
            named = ", ".join(f"{key}={_shown(b[key][j])}" for key in on)
            raise AssertionError(f"row {j} of the right table ({named}) has no equal in the left one")
        rows.append(at.pop())
    return rows, range(count_b)


def _key(table: Mapping[str, list[Any]], on: Sequence[str], row: int) -> tuple:
    return tuple(table[name][row] for name in on)


def _shown(value: Any) -> str:
    return f"{value} = {iso(value)}" if isinstance(value, int) and abs(value) > 10**14 else repr(value)


def _allowed(function: Function | None, truth: Any, values: Sequence[float] | None) -> float:
    """How far apart two values may be (the squares of them, for std)."""
    if function is None or not isinstance(truth, float) or math.isnan(truth):
        return 0.0
    if values is None:
        # |sum| is at most the sum of absolute values, mean and root mean square likewise: the least A there can be.
        values = [truth] if function.kind in ("sum", "mean") else []
    return tolerance(values, function, truth)


def _equal(left: Any, right: Any, function: Function | None, allowed: float) -> bool:
    if left is None or right is None:
        return left is None and right is None
    if isinstance(right, list):
        return (
            isinstance(left, list)
            and len(left) == len(right)
            and all(_equal(x, y, None, 0.0) for x, y in zip(left, right, strict=True))
        )
    if isinstance(left, float) and isinstance(right, float) and not (math.isfinite(left) and math.isfinite(right)):
        return left == right or (math.isnan(left) and math.isnan(right))
    if not allowed:
        return bool(left == right)
    if function is not None and function.kind == "std":
        return abs(left * left - right * right) <= allowed
    return abs(left - right) <= allowed
