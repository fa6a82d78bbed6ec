"""Arrow columns in types that Spark holds exactly, and back.

Spark has fewer types than Arrow: no nanoseconds, no unsigned numbers, no dictionaries. A column of such a type travels
as its *carrier* (the whole numbers behind a time, say) and gets its type back where it leaves Spark. Times travel as
numbers whatever their unit, so that no calendar or zone of Spark's touches them.
"""

from __future__ import annotations

import pyarrow as pa

from feature_store.errors import SpineError

_CARRIERS = (
    (pa.types.is_timestamp, pa.int64()),
    (pa.types.is_date32, pa.int32()),
    (pa.types.is_date64, pa.int64()),
    (pa.types.is_time32, pa.int32()),
    (pa.types.is_time64, pa.int64()),
    (pa.types.is_duration, pa.int64()),
    (pa.types.is_uint8, pa.int16()),
    (pa.types.is_uint16, pa.int32()),
    (pa.types.is_uint32, pa.int64()),
    (pa.types.is_uint64, pa.decimal128(20, 0)),
    (pa.types.is_float16, pa.float32()),
    (lambda t: pa.types.is_large_string(t) or pa.types.is_string_view(t), pa.string()),
    (
        lambda t: pa.types.is_large_binary(t) or pa.types.is_binary_view(t) or pa.types.is_fixed_size_binary(t),
        pa.binary(),
    ),
)


def carrier(arrow_type: pa.DataType) -> pa.DataType:
    """The type in which a column of this type travels through Spark; itself where Spark has it."""
    if pa.types.is_null(arrow_type):
        return pa.bool_()
    if pa.types.is_decimal(arrow_type):
        return arrow_type if pa.types.is_decimal128(arrow_type) else pa.string()
    if pa.types.is_dictionary(arrow_type):
        return carrier(arrow_type.value_type)
    if pa.types.is_map(arrow_type):
        return pa.map_(carrier(arrow_type.key_type), carrier(arrow_type.item_type))
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
        return pa.list_(carrier(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([pa.field(field.name, carrier(field.type)) for field in arrow_type])
    return next((carried for test, carried in _CARRIERS if test(arrow_type)), arrow_type)


def check_carried(name: str, arrow_type: pa.DataType) -> None:
    """Raises SpineError where Spark cannot carry a column of the spine without changing its values."""
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import from_arrow_type

    try:
        carried = carrier(arrow_type)
        from_arrow_type(carried)
        decode(pa.array([], carried), arrow_type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, PySparkException) as error:
        raise SpineError(
            f"the spine's column '{name}' is {arrow_type}, which Spark cannot carry; convert it, or leave it out."
        ) from error


def encode(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column as its carrier."""
    return column if column.type == carrier(column.type) else column.cast(carrier(column.type))


def decode(column: pa.Array | pa.ChunkedArray, arrow_type: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """A column as the type it had before it was carried."""
    if column.type == arrow_type:
        return column
    if pa.types.is_null(arrow_type):
        return pa.nulls(len(column))
    return column.cast(arrow_type)
