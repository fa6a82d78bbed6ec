"""The values a call returned, short enough to keep and enough to tell a wrong answer: nobody measures one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

#: Rows whose values a digest keeps as they are.
_SAMPLE = 500
#: Row weights repeat after this many rows, a prime: two rows that changed places change the weighted sum.
_WEIGHTS = 1_009


def digest(table: pa.Table) -> dict[str, Any]:
    """Of each column: nulls, sums plain and weighted by the row's place, and the values of a sample of rows."""
    sample = np.linspace(0, max(len(table) - 1, 0), min(_SAMPLE, len(table))).astype(np.int64)
    weights = np.arange(len(table)) % _WEIGHTS + 1.0
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
        numbers = np.ascontiguousarray(column.fill_null(0).to_numpy(zero_copy_only=False), np.float64)
        columns[name] = {
            "nulls": column.null_count,
            "sum": float(numbers.sum()),
            "absolute": float(np.abs(numbers).sum()),
            "weighted": float((numbers * weights).sum()),
            "sample": column.take(pa.array(sample)).to_pylist(),
        }
    return {"rows": len(table), "columns": columns}


def differences(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, in_order: bool = True) -> list[str]:
    """What two digests disagree about, a line each; empty when the values are equal.

    Sums of floats (`sum_...` and `mean_...`) may differ by `tolerance` of their absolute values, all else by nothing.
    Without `in_order` rows may lie in any order, so that only sums are compared, and all of them with the tolerance.
    """
    if ours["rows"] != theirs["rows"]:
        return [f"{ours['rows']:,} rows against {theirs['rows']:,}"]
    if sorted(ours["columns"]) != sorted(theirs["columns"]):
        return [f"columns {sorted(ours['columns'])} against {sorted(theirs['columns'])}"]
    pairs = {name: (column, theirs["columns"][name]) for name, column in ours["columns"].items()}
    return [
        f"{name}: {reason}"
        for name, (one, other) in pairs.items()
        if (reason := _difference(one, other, tolerance if _folded(name) or not in_order else 0.0, in_order))
    ]


def _folded(name: str) -> bool:
    return name.startswith(("sum_", "mean_"))


def _difference(one: dict[str, Any], other: dict[str, Any], tolerance: float, in_order: bool) -> str | None:
    if one["nulls"] != other["nulls"]:
        return f"{one['nulls']:,} nulls against {other['nulls']:,}"
    if abs(one["sum"] - other["sum"]) > tolerance * one["absolute"]:
        return f"sum {one['sum']!r} against {other['sum']!r}"
    if not in_order:
        return None
    if abs(one["weighted"] - other["weighted"]) > tolerance * one["absolute"] * _WEIGHTS:
        return f"weighted sum {one['weighted']!r} against {other['weighted']!r}"
    for a, b in zip(one["sample"], other["sample"], strict=True):
        if a != b and (a is None or b is None or abs(a - b) > tolerance * abs(a)):
            return f"a value of {a!r} against {b!r}"
    return None
