"""Columns as their declared types: what converts without losing anything does, the rest is refused."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions.types import ValueType, of_arrow
from feature_store.errors import ColumnError
from feature_store.timestamps import arrow_micros

#: From here on not every integer is a double.
LARGEST_EXACT = 2**53


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, as it lies where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def typed(column: pa.ChunkedArray, wanted: ValueType, what: str) -> pa.Array:
    """A column as its declared type. Integers widen and narrow if every value fits; an all-null column is any type.

    Text is not parsed into numbers, nor numbers written as text: raises ColumnError.
    """
    array = whole(column)
    if array.type == wanted.arrow and wanted is not ValueType.TIMESTAMP:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), wanted.arrow)
    found = of_arrow(array.type)
    whole_floats = found is not None and found.is_float and wanted.is_integer
    numbers = found is not None and found.is_numeric and wanted.is_numeric
    if found is not wanted and not numbers and not (found and found.is_list and wanted.is_list):
        raise ColumnError(f"{what} is {array.type}, but is declared as {wanted.feast_name}; convert it first.")
    if wanted is ValueType.TIMESTAMP and pa.types.is_timestamp(array.type):
        return pa.array(arrow_micros(array)).view(wanted.arrow)
    if whole_floats and len(array) and (pc.max(pc.abs(array)).as_py() or 0) >= LARGEST_EXACT:
        raise ColumnError(f"{what} holds whole numbers as floats beyond 2^53, where floats skip some; use integers.")
    try:
        # pandas turns integers with nulls into floats: a key column that came that way still holds whole numbers.
        return array.cast(wanted.arrow, safe=not (numbers and wanted.is_float) or whole_floats)
    except pa.ArrowInvalid as error:
        raise ColumnError(f"{what} holds a value that is no {wanted.feast_name}: {error}") from error
