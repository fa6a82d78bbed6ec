"""Measured equality: are two tables of the same features the same values, by the contract's tolerances?

Integers, text, times, lists of them, minima, maxima and nulls must be equal; sums and means of floats within 1e-9,
standard deviations and variances within 1e-6 (relative, or absolute near zero). On-demand features are functions of
those: within 1e-9 too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions.repository import Request
from feature_store.definitions.view import FeatureRef, WindowedView
from feature_store.errors import ValuesDiffer

#: Relative tolerance of a float fold, and of one with squares in it.
FOLDED, SQUARED = 1e-9, 1e-6
_EXACT = ("min", "max", "first", "last", "last_n", "count")
_EXAMPLES = 5


@dataclass(frozen=True)
class Mismatch:
    """One value that differs: the column, the row, and what each side says."""

    column: str
    row: int
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.column}, row {self.row}: {self.left!r} is not {self.right!r}"


@dataclass(frozen=True)
class Comparison:
    """How many values were compared, how many differ, by column, and the first few that do."""

    compared: int
    mismatches: dict[str, int]
    examples: list[Mismatch] = field(default_factory=list)

    @property
    def mismatched(self) -> int:
        return sum(self.mismatches.values())

    def raise_if_different(self, left: str, right: str) -> None:
        """Raises ValuesDiffer that names the columns and the first differing values."""
        if self.mismatched:
            columns = ", ".join(f"{c} ({n})" for c, n in self.mismatches.items() if n)
            examples = "; ".join(map(str, self.examples))
            raise ValuesDiffer(
                f"{self.mismatched:,} of {self.compared:,} values differ between {left} and {right}: {columns}. "
                f"First: {examples}."
            )


def compare(request: Request, left: pa.Table, right: pa.Table) -> Comparison:
    """Compares every feature of a request in two tables of the same rows in the same order.

    Raises ValueError when the tables differ in length: rows that are missing are no equal values.
    """
    if left.num_rows != right.num_rows:
        raise ValueError(f"{left.num_rows:,} rows cannot be compared with {right.num_rows:,}")
    mismatches, examples = {}, []
    for ref, column in zip(request.refs, request.columns, strict=True):
        a, b = left[column].combine_chunks(), right[column].combine_chunks()
        rows = np.flatnonzero(differing(a, b, tolerance_of(request, ref)))
        mismatches[column] = len(rows)
        examples += [Mismatch(column, int(r), a[r].as_py(), b[r].as_py()) for r in rows[:_EXAMPLES].tolist()]
    return Comparison(left.num_rows * len(request.refs), mismatches, examples[:_EXAMPLES])


def tolerance_of(request: Request, ref: FeatureRef) -> float:
    """The relative tolerance of one feature; 0 is exact."""
    view = request.definitions.view(ref.view)
    if not isinstance(view, WindowedView):
        return FOLDED if ref in request.refs and request.type_of(ref).is_float else 0.0
    if any(key.name == ref.feature for key in view.keys):
        return 0.0
    kind = view.aggregation(ref.feature).function.kind
    if kind in ("var", "std"):
        return SQUARED
    return 0.0 if kind in _EXACT or not request.type_of(ref).is_float else FOLDED


def differing(a: pa.Array, b: pa.Array, tolerance: float) -> np.ndarray:
    """For each row whether two values differ. Null equals null only; NaN equals NaN."""
    if pa.types.is_list(a.type):
        return np.array([x != y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)], bool)
    null_a, null_b = np.asarray(a.is_null()), np.asarray(b.is_null())
    if not pa.types.is_floating(a.type):
        equal = np.asarray(pc.fill_null(pc.equal(a, b.cast(a.type)), False))
    else:
        x, y = (np.asarray(side.cast(pa.float64()).fill_null(0.0)) for side in (a, b))
        close = np.isclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True) if tolerance else x == y
        equal = close | (np.isnan(x) & np.isnan(y))
    return np.where(null_a | null_b, null_a != null_b, ~equal)
