"""Arrays of values as bytes: eight bytes each, or offsets and bytes for text.

Inside the online store a value is a Python int (integers, times in microseconds, booleans as 0 or 1), float, str or
bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.definitions.types import ValueType

Value = int | float | str | bytes


def is_variable(value_type: ValueType) -> bool:
    """Whether values of this type differ in size."""
    return value_type in (ValueType.STRING, ValueType.BYTES)


def fixed_dtype(value_type: ValueType) -> np.dtype:
    """How a fixed-width value is stored: every integer, time and boolean as int64, every float as float64."""
    return np.dtype("<f8") if value_type.is_float else np.dtype("<i8")


def encode_values(values: Sequence[Any], value_type: ValueType) -> bytes:
    """u32 count, then eight bytes a value; for text u32 lengths, then the bytes."""
    count = struct.pack("<I", len(values))
    if not is_variable(value_type):
        return count + np.array(values, fixed_dtype(value_type)).tobytes()
    data = [v.encode() if isinstance(v, str) else v for v in values]
    return count + np.array([len(d) for d in data], "<u4").tobytes() + b"".join(data)


def decode_values(data: bytes, at: int, value_type: ValueType) -> tuple[list[Value], int]:
    """The values encoded at an offset, and the offset behind them."""
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    if not is_variable(value_type):
        return np.frombuffer(data, fixed_dtype(value_type), count, at).tolist(), at + 8 * count
    lengths = np.frombuffer(data, "<u4", count, at).tolist()
    at += 4 * count
    values: list[Value] = []
    for length in lengths:
        part = bytes(data[at : at + length])
        values.append(part.decode() if value_type is ValueType.STRING else part)
        at += length
    return values, at


def to_arrow(values: Sequence[Any], value_type: ValueType) -> pa.Array:
    """Stored values (None is null) as an Arrow array of a feature's type; for list types each value is a list."""
    if value_type.is_list:
        counts = [0 if v is None else len(v) for v in values]
        flat = to_arrow([x for v in values if v is not None for x in v], value_type.element)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        mask = pa.array([v is None for v in values])
        return pa.ListArray.from_arrays(offsets, flat, mask=mask if any(v is None for v in values) else None)
    if value_type is ValueType.TIMESTAMP:
        return pa.array(values, pa.int64()).view(value_type.arrow)
    if value_type is ValueType.BOOL:
        return pa.array([None if v is None else bool(v) for v in values], pa.bool_())
    return pa.array(values, value_type.arrow)


def from_arrow(array: pa.Array, value_type: ValueType) -> list[Any]:
    """An Arrow array of a feature's type as stored values, None where null."""
    if value_type.is_list:
        element = value_type.element
        if element is ValueType.TIMESTAMP:
            array = array.cast(pa.list_(pa.int64()))
        return array.to_pylist()
    if value_type is ValueType.TIMESTAMP:
        return array.cast(pa.int64()).to_pylist() if pa.types.is_timestamp(array.type) else array.to_pylist()
    if value_type is ValueType.BOOL:
        return array.cast(pa.uint8()).to_pylist()
    return array.to_pylist()
