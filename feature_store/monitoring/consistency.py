"""Measured equality: are two tables of the same features the same values?

What the contract calls exact must be equal: plain features, integers, text, times, lists, minima, maxima, nulls. Sums
and means of floats must agree within 1e-9 of themselves, variances (and standard deviations, by their squares) within
1e-6: stricter than the contract where values of both signs cancel, for it cannot see them here. On-demand features are
functions of those: within 1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions.repository import Request
from feature_store.definitions.view import FeatureRef, PlainView, WindowedView
from feature_store.errors import ValuesDiffer

#: Relative tolerance of a float fold, and of one with squares in it.
FOLDED, SQUARED = 1e-9, 1e-6
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
    if isinstance(view, PlainView) or not request.type_of(ref).is_float:
        return 0.0
    if isinstance(view, WindowedView) and ref.feature in {a.name for a in view.aggregations}:
        kind = view.aggregation(ref.feature).function.kind
        # A square is off by twice what its root is.
        return {"var": SQUARED, "std": SQUARED / 2, "sum": FOLDED, "mean": FOLDED}.get(kind, 0.0)
    return FOLDED


def differing(a: pa.Array, b: pa.Array, tolerance: float) -> np.ndarray:
    """For each row whether two values differ. Null equals null only; NaN equals NaN."""
    if pa.types.is_list(a.type):
        return np.array([x != y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)], bool)
    null_a, null_b = np.asarray(a.is_null()), np.asarray(b.is_null())
    if not pa.types.is_floating(a.type):
        equal = np.asarray(pc.fill_null(pc.equal(a, b.cast(a.type)), False))
    else:
        x, y = (np.asarray(side.cast(pa.float64()).fill_null(0.0)) for side in (a, b))
        close = np.isclose(x, y, rtol=tolerance, atol=0.0) if tolerance else x == y
        equal = close | (np.isnan(x) & np.isnan(y))
    return np.where(null_a | null_b, null_a != null_b, ~equal)
