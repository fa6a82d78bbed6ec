"""The value types a feature or a key can have, without Feast's classes: a server starts from these alone."""

from __future__ import annotations

import enum

import pyarrow as pa


class ValueType(enum.StrEnum):
    """One scalar or list type; the text is what the compiled definitions hold."""

    BOOL = "bool"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    STRING = "string"
    BYTES = "bytes"
    TIMESTAMP = "timestamp"
    BOOL_LIST = "list<bool>"
    INT32_LIST = "list<int32>"
    INT64_LIST = "list<int64>"
    FLOAT32_LIST = "list<float32>"
    FLOAT64_LIST = "list<float64>"
    STRING_LIST = "list<string>"
    BYTES_LIST = "list<bytes>"
    TIMESTAMP_LIST = "list<timestamp>"

    @property
    def is_list(self) -> bool:
        return self.value.startswith("list<")

    @property
    def element(self) -> ValueType:
        """The type of a list's elements; a scalar type is its own element."""
        return ValueType(self.value[5:-1]) if self.is_list else self

    @property
    def list_of(self) -> ValueType:
        """The list type over this scalar type."""
        return ValueType(f"list<{self.value}>")

    @property
    def is_integer(self) -> bool:
        return self in (ValueType.INT32, ValueType.INT64)

    @property
    def is_float(self) -> bool:
        return self in (ValueType.FLOAT32, ValueType.FLOAT64)

    @property
    def widened(self) -> ValueType:
        """The 64-bit type of a 32-bit number; any other type is itself."""
        return {ValueType.INT32: ValueType.INT64, ValueType.FLOAT32: ValueType.FLOAT64}.get(self, self)

    @property
    def is_numeric(self) -> bool:
        return self.is_integer or self.is_float

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow type of a column of such values."""
        if self.is_list:
            return pa.list_(self.element.arrow)
        return _ARROW[self]

    @property
    def feast_name(self) -> str:
        """How Feast writes this type in a schema, for error texts."""
        return f"Array({self.element.feast_name})" if self.is_list else _FEAST[self]


_ARROW = {
    ValueType.BOOL: pa.bool_(),
    ValueType.INT32: pa.int32(),
    ValueType.INT64: pa.int64(),
    ValueType.FLOAT32: pa.float32(),
    ValueType.FLOAT64: pa.float64(),
    ValueType.STRING: pa.string(),
    ValueType.BYTES: pa.binary(),
    ValueType.TIMESTAMP: pa.timestamp("us", "UTC"),
}
_FEAST = {
    ValueType.BOOL: "Bool",
    ValueType.INT32: "Int32",
    ValueType.INT64: "Int64",
    ValueType.FLOAT32: "Float32",
    ValueType.FLOAT64: "Float64",
    ValueType.STRING: "String",
    ValueType.BYTES: "Bytes",
    ValueType.TIMESTAMP: "UnixTimestamp",
}

#: What an entity's join key may be. Floats and times have no equality that two systems agree on.
KEY_TYPES = (ValueType.BOOL, ValueType.INT32, ValueType.INT64, ValueType.STRING, ValueType.BYTES)


def of_arrow(arrow_type: pa.DataType) -> ValueType | None:
    """The value type that a physical column is read as, or None where there is none.

    Unsigned and narrow integers widen to int64 (uint64 has values that do not fit and is refused),
    half floats to float32, dates and all timestamp units to timestamp.
    """
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        element = of_arrow(arrow_type.value_type)
        return element.list_of if element and not element.is_list else None
    if pa.types.is_dictionary(arrow_type):
        return of_arrow(arrow_type.value_type)
    for test, value_type in _PHYSICAL:
        if test(arrow_type):
            return value_type
    return None


_PHYSICAL = (
    (pa.types.is_boolean, ValueType.BOOL),
    (pa.types.is_int32, ValueType.INT32),
    (lambda t: pa.types.is_integer(t) and t != pa.uint64(), ValueType.INT64),
    (pa.types.is_float64, ValueType.FLOAT64),
    (lambda t: pa.types.is_float32(t) or pa.types.is_float16(t), ValueType.FLOAT32),
    (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t), ValueType.STRING),
    (lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t), ValueType.BYTES),
    (lambda t: pa.types.is_timestamp(t) or pa.types.is_date(t), ValueType.TIMESTAMP),
)
