"""Answers as they come out of the store: the values of one view's features for all rows, made Python or Arrow values
only when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from feature_store.definitions.types import ValueType
from feature_store.stores.online.values import from_arrow, to_arrow
from feature_store.timestamps import moment


class Block:
    """Some features, `rows` values each. `types` are the features' own."""

    def __init__(self, names: Sequence[str], types: Sequence[ValueType], rows: int) -> None:
        self.names, self.types, self.rows = tuple(names), tuple(types), rows

    @property
    def valid(self) -> np.ndarray | None:
        """Which values there are, (features, rows); None where all are."""
        raise NotImplementedError

    @property
    def arrays(self) -> list[np.ndarray | None]:
        """Per feature a numpy array of its stored values where they lie as one; what stands at a null is no value."""
        raise NotImplementedError

    def lists(self) -> list[list[Any]]:
        """Per feature its stored values: times are microseconds, booleans 0 or 1, None is null."""
        raise NotImplementedError

    def arrow(self, feature: int) -> pa.Array:
        """One feature as an Arrow array."""
        array, value_type = self.arrays[feature], self.types[feature]
        if array is None:
            return to_arrow(self.lists()[feature], value_type)
        mask = None if self.valid is None else ~self.valid[feature]
        if value_type is ValueType.BOOL:
            array = array.astype(bool)
        made = pa.array(np.ascontiguousarray(array), mask=mask, from_pandas=False)
        return (
            made.view(value_type.arrow)
            if value_type is ValueType.TIMESTAMP
            else made.cast(value_type.arrow, safe=False)
        )

    def floats(self, feature: int) -> np.ndarray:
        """One numeric feature as float64, NaN where null."""
        array = self.arrays[feature]
        if array is None:
            return np.array([np.nan if v is None else float(v) for v in self.lists()[feature]], np.float64)
        values = array.astype(np.float64)
        return values if self.valid is None else np.where(self.valid[feature], values, np.nan)

    def python(self) -> list[list[Any]]:
        """Per feature its values as a person writes them: times are aware datetimes, booleans booleans."""
        lists = self.lists()
        for i in _converted(self.types):
            lists[i] = python_values(lists[i], self.types[i])
        return lists


class Lists(Block):
    """An answer of Python values: stored values by feature, None is null."""

    def __init__(self, names: Sequence[str], types: Sequence[ValueType], rows: int, lists: list[list[Any]]) -> None:
        super().__init__(names, types, rows)
        self._lists = lists

    @property
    def valid(self) -> np.ndarray | None:
        if not any(None in values for values in self._lists):
            return None
        return np.array([[v is not None for v in values] for values in self._lists], bool).reshape(
            len(self.names), self.rows
        )

    @property
    def arrays(self) -> list[np.ndarray | None]:
        return [None] * len(self.names)

    def lists(self) -> list[list[Any]]:
        return [values[:] for values in self._lists]


FeatureColumn: TypeAlias = "tuple[np.ndarray, np.ndarray | None] | pa.Array"
"""A feature's values: an Arrow array, or a numpy array with a mask of the values there are (None: all)."""


class Columns(Block):
    """An answer whose features are columns of their own: Arrow arrays, or numpy arrays of int64 or float64."""

    def __init__(
        self,
        names: Sequence[str],
        types: Sequence[ValueType],
        rows: int,
        columns: Sequence[FeatureColumn],
    ) -> None:
        super().__init__(names, types, rows)
        self._columns = columns

    @cached_property
    def valid(self) -> np.ndarray | None:
        masks = [_mask(column) for column in self._columns]
        if all(mask is None for mask in masks):
            return None
        whole = np.ones(self.rows, bool)
        return np.array([whole if mask is None else mask for mask in masks], bool)

    @property
    def arrays(self) -> list[np.ndarray | None]:
        pairs = zip(self._columns, self.types, strict=True)
        return [_narrowed(c[0], t) if isinstance(c, tuple) else None for c, t in pairs]

    def lists(self) -> list[list[Any]]:
        found = []
        for column, array, value_type in zip(self._columns, self.arrays, self.types, strict=True):
            if array is None:
                found.append(from_arrow(column, value_type))
                continue
            values = array.tolist()
            if (mask := _mask(column)) is not None:
                for row in np.flatnonzero(~mask).tolist():
                    values[row] = None
            found.append(values)
        return found

    def arrow(self, feature: int) -> pa.Array:
        column = self._columns[feature]
        return super().arrow(feature) if isinstance(column, tuple) else column


def _mask(column: FeatureColumn) -> np.ndarray | None:
    """Which values a column has; None where it has all."""
    if not isinstance(column, tuple):
        return np.asarray(column.is_valid()) if column.null_count else None
    return None if column[1] is None or column[1].all() else column[1]


def _narrowed(values: np.ndarray, value_type: ValueType) -> np.ndarray:
    """A column folded in the wide type, in the feature's own."""
    if value_type is ValueType.FLOAT32:
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    return values


@lru_cache(maxsize=1_024)
def _converted(types: tuple[ValueType, ...]) -> tuple[int, ...]:
    """Which features are stored otherwise than a person writes them."""
    return tuple(i for i, t in enumerate(types) if t.element in (ValueType.TIMESTAMP, ValueType.BOOL))


def python_values(values: list[Any], value_type: ValueType) -> list[Any]:
    """Stored values as a person writes them: times are aware datetimes, booleans booleans."""
    if value_type.is_list:
        element = value_type.element
        if element not in (ValueType.TIMESTAMP, ValueType.BOOL):
            return values
        return [None if v is None else python_values(v, element) for v in values]
    if value_type is ValueType.TIMESTAMP:
        return [None if v is None else moment(v) for v in values]
    if value_type is ValueType.BOOL:
        return [None if v is None else bool(v) for v in values]
    return values
