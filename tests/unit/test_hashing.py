"""Hashes of canonical values: against the xxhash package, and which values are one."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.aggregations.events import Column
from feature_store.aggregations.hashing import hash_numbers, hashes_of
from feature_store.definitions.types import ValueType
from feature_store.testing.event_logs import values_array

SETTINGS = settings(max_examples=200, derandomize=True, deadline=None)

int64s = st.integers(-(2**63), 2**63 - 1)


def hashes(values: list, value_type: ValueType) -> list[int]:
    """The hash of each non-null value of a column."""
    column = Column.of(values_array(values, value_type), value_type)
    return hashes_of(column, np.flatnonzero(column.valid)).tolist()


@SETTINGS
@given(st.lists(int64s, max_size=30))
def test_integers_hash_as_their_eight_bytes(values: list[int]) -> None:
    expected = [xxhash.xxh64_intdigest(v.to_bytes(8, "little", signed=True)) for v in values]
    assert hash_numbers(np.array(values, np.int64)).tolist() == expected


@SETTINGS
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False).map(lambda v: v + 0.0), max_size=30))
def test_floats_hash_as_the_whole_number_they_are_or_as_their_eight_bytes(values: list[float]) -> None:
    def canonical(v: float) -> bytes:
        whole = v.is_integer() and -(2**63) <= v < 2**63
        return int(v).to_bytes(8, "little", signed=True) if whole else struct.pack("<d", v)

    expected = [xxhash.xxh64_intdigest(canonical(v)) for v in values]
    assert hash_numbers(np.array(values, np.float64)).tolist() == expected


def test_more_values_than_are_hashed_at_a_time_have_the_same_hashes() -> None:
    values = np.arange(-40_000, 40_000)
    assert hash_numbers(values).tolist() == [
        xxhash.xxh64_intdigest(v.to_bytes(8, "little", signed=True)) for v in values.tolist()
    ]


@SETTINGS
@given(
    st.lists(st.text(max_size=4) | st.none(), max_size=20), st.lists(st.binary(max_size=40) | st.none(), max_size=20)
)
def test_text_and_bytes_hash_as_their_bytes(texts: list[str | None], blobs: list[bytes | None]) -> None:
    assert hashes(texts, ValueType.STRING) == [xxhash.xxh64_intdigest(t.encode()) for t in texts if t is not None]
    assert hashes(blobs, ValueType.BYTES) == [xxhash.xxh64_intdigest(b) for b in blobs if b is not None]


def test_a_whole_number_is_one_value_in_every_type_that_can_hold_it() -> None:
    for number in (0, 1, -1, 5, -(2**31), 2**24):
        (expected,) = hashes([number], ValueType.INT64)
        for value_type in (ValueType.INT32, ValueType.FLOAT32, ValueType.FLOAT64, ValueType.TIMESTAMP):
            assert hashes([float(number) if value_type.is_float else number], value_type) == [expected]
    assert hashes([True, False], ValueType.BOOL) == hashes([1, 0], ValueType.INT64)
    assert hashes([-0.0], ValueType.FLOAT64) == hashes([0.0], ValueType.FLOAT64)
    assert hashes([float(np.float32(0.1))], ValueType.FLOAT32) == hashes([float(np.float32(0.1))], ValueType.FLOAT64)


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63)])
def test_neighbours_of_large_integers_stay_apart(number: int) -> None:
    assert len(set(hashes([number, number - 1 if number > 0 else number + 1], ValueType.INT64))) == 2


def test_a_double_beyond_int64_is_no_integer() -> None:
    beyond, lowest = 2.0**63, -(2.0**63)
    assert hashes([beyond], ValueType.FLOAT64) == [xxhash.xxh64_intdigest(struct.pack("<d", beyond))]
    assert hashes([lowest], ValueType.FLOAT64) == hashes([-(2**63)], ValueType.INT64)


def test_known_hashes_never_change() -> None:
    """What other engines and stored sketches must agree on."""
    assert hashes([0, 1, -1], ValueType.INT64) == [0x34C96ACDCADB1BBB, 0x9F29CB17A2A49995, 0x85D136ADB773C6C9]
    assert hashes([0.1], ValueType.FLOAT64) == [0x30402B1BA8BA63D2]
    assert hashes(["", "a", "é"], ValueType.STRING) == [0xEF46DB3751D8E999, 0xD24EC4F1A98C6E5B, 0x17D757DFB8B46F78]


def test_only_some_rows_are_hashed_and_in_their_order() -> None:
    array = pa.array(["b", None, "a", "b", "c"])
    column = Column.of(array, ValueType.STRING)
    chosen = hashes_of(column, np.array([3, 2]))
    assert chosen.tolist() == [xxhash.xxh64_intdigest(b"b"), xxhash.xxh64_intdigest(b"a")]
    assert hashes_of(column, np.array([], np.int64)).tolist() == []
