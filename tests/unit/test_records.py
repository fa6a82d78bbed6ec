"""Records and stored values of the online store: what is written is what is read, and the bytes are these."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.errors import CorruptState
from feature_store.stores.online.head import HeadCodec, Rows
from feature_store.stores.online.records import Bucket, Generation
from feature_store.stores.online.rows import CREATED, TIME, PackedRows, Row, RowCodec, newer
from feature_store.stores.online.values import decode_values, encode_values, from_arrow, is_variable, to_arrow
from feature_store.testing.event_logs import values_of
from feature_store.timestamps import BEGINNING

SETTINGS = settings(max_examples=80, derandomize=True, deadline=None)

times = st.integers(BEGINNING, 2**63 - 1)
positions = st.dictionaries(
    st.integers(0, 2**32 - 1), st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1)), max_size=4
)
SCALARS = [t for t in ValueType if not t.is_list]


def stored(value_type: ValueType) -> st.SearchStrategy[Any]:
    """Values of a type as the store holds them: times and booleans as integers."""
    scalars = values_of(value_type.element)
    if value_type is ValueType.BOOL:
        return scalars.map(lambda v: None if v is None else int(v))
    return st.none() | st.lists(scalars, max_size=3) if value_type.is_list else scalars


def seen(value: Any) -> Any:
    """A value so that NaN equals NaN and 0.0 does not equal -0.0."""
    return repr(value)


# -- records ----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(times, st.integers(0, 2**32 - 1), positions, st.integers(0, 2**32 - 1))
def test_a_bucket_record_is_read_as_it_was_written(exact_from: int, fence: int, parts: dict, successor: int) -> None:
    bucket = Bucket(exact_from, fence, parts, successor)
    assert Bucket.decode(bucket.encode()) == bucket


@SETTINGS
@given(st.integers(1, 2**32 - 1), st.text(max_size=70), times, positions)
def test_a_generation_record_is_read_as_it_was_written(
    number: int, fingerprint: str, cut: int, partitions: dict
) -> None:
    generation = Generation(number, fingerprint, cut, partitions)
    assert Generation.decode(generation.encode()) == generation


def test_the_bytes_of_a_bucket_record_of_version_2() -> None:
    bucket = Bucket(1_533_124_800_000_000, 3, {7: (1, 2**40), 0: (0, 5)}, 9)
    assert bucket.encode().hex() == (
        "49420200" + "03000000" + "09000000" + "00b0196f5e720500" + "0200"
        "00000000" + "00000000" + "0500000000000000"
        "07000000" + "01000000" + "0000000000010000"
    )


def test_the_bytes_of_a_generation_record() -> None:
    assert Generation(2, "ab", -5, {0: (0, 300)}).encode().hex() == "9402a26162fb8100" + "9200cd012c"


def test_a_bucket_record_of_another_version_is_never_guessed_at() -> None:
    good = Bucket(5).encode()
    for bad in (b"", good[:10], b"XX" + good[2:], good[:2] + b"\x01" + good[3:]):
        with pytest.raises(CorruptState, match="bucket record is of no version that can be read; bootstrap"):
            Bucket.decode(bad)


def test_a_generation_record_that_is_none_is_never_guessed_at() -> None:
    for bad in (b"", b"\xff", b"\x93\x01\x02\x03"):
        with pytest.raises(CorruptState, match=r"generation record cannot be read .*; bootstrap the view again"):
            Generation.decode(bad)


# -- arrays of values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_type", SCALARS)
@SETTINGS
@given(data=st.data())
def test_values_are_read_as_they_were_written(value_type: ValueType, data: st.DataObject) -> None:
    values = data.draw(st.lists(stored(value_type).filter(lambda v: v is not None), max_size=6))
    encoded = b"before" + encode_values(values, value_type) + b"after"
    decoded, at = decode_values(encoded, 6, value_type)
    assert (seen(decoded), encoded[at:]) == (seen(values), b"after")


def test_the_bytes_of_values() -> None:
    assert encode_values([1, -2], ValueType.INT32).hex() == "02000000" + "0100000000000000" + "feffffffffffffff"
    assert encode_values([0.5], ValueType.FLOAT32).hex() == "01000000" + "000000000000e03f"
    assert (
        encode_values(["a", "", "é"], ValueType.STRING).hex()
        == "03000000" + "01000000" + "00000000" + "02000000" + "61c3a9"
    )


@pytest.mark.parametrize("value_type", list(ValueType))
@SETTINGS
@given(data=st.data())
def test_stored_values_are_arrow_values_and_back(value_type: ValueType, data: st.DataObject) -> None:
    values = data.draw(st.lists(stored(value_type), max_size=5))
    array = to_arrow(values, value_type)
    assert array.type == value_type.arrow
    assert seen(from_arrow(array, value_type)) == seen(values)


# -- the raw head -----------------------------------------------------------------------------------------------------

head_columns = st.lists(st.sampled_from(SCALARS), max_size=10).map(
    lambda types: {f"c{i}": t for i, t in enumerate(types)}
)


@SETTINGS
@given(head_columns, st.data())
def test_a_head_is_read_as_it_was_appended(types: dict[str, ValueType], data: st.DataObject) -> None:
    codec = HeadCodec(types)
    count = data.draw(st.integers(0, 6))
    clocks = data.draw(st.lists(st.tuples(times, times), min_size=count, max_size=count))
    columns = {
        name: data.draw(st.lists(stored(t).map(finite), min_size=count, max_size=count)) for name, t in types.items()
    }
    rows = codec.encode(Rows(np.array([t for t, _ in clocks], np.int64), np.array([c for _, c in clocks]), columns))
    head = b"".join(rows)
    assert codec.split(head) == rows
    assert codec.times(head).tolist() == [t for t, _ in clocks]
    events = codec.events([head, None])
    assert events.offsets.tolist() == [0, count, count]
    order = sorted(range(count), key=lambda i: clocks[i])
    assert list(zip(events.times.tolist(), events.created.tolist(), strict=True)) == [clocks[i] for i in order]
    for name, value_type in types.items():
        values = from_arrow(events.columns[name].arrow, value_type)
        valid = events.columns[name].valid.tolist()
        assert seen([v if ok else None for v, ok in zip(values, valid, strict=True)]) == seen(
            [columns[name][i] for i in order]
        )


def finite(value: Any) -> Any:
    """Heads hold clean values: neither NaN nor infinities, nor -0.0."""
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    return value


def test_the_bytes_of_a_head_row_of_version_2() -> None:
    codec = HeadCodec(
        {"flag": ValueType.BOOL, "real": ValueType.FLOAT64, "text": ValueType.STRING, "n": ValueType.INT32}
    )
    rows = Rows(
        np.array([1, -1]),
        np.array([2, BEGINNING]),
        {"flag": [1, None], "real": [0.5, None], "text": ["é", ""], "n": [-2, 3]},
    )
    first, second = codec.encode(rows)
    assert first.hex() == (
        "0100000000000000" + "0200000000000000" + "0000000000000000"
        "0100000000000000" + "000000000000e03f" + "0200000000000000" + "feffffffffffffff" + "c3a9"
    )
    assert second.hex() == (
        "ffffffffffffffff" + "0100000000000080" + "0300000000000000"
        "0000000000000000" + "0000000000000000" + "0000000000000000" + "0300000000000000"
    )


def test_a_head_row_of_a_view_that_only_counts_events_is_two_times() -> None:
    (row,) = HeadCodec({}).encode(Rows(np.array([1]), np.array([2]), {}))
    assert row.hex() == "0100000000000000" + "0200000000000000"


# -- plain rows -------------------------------------------------------------------------------------------------------


def plain(types: list[ValueType]) -> PlainView:
    source = Source(name="s", path="p", timestamp_field="ts")
    fields = tuple(Field(f"f{i}", t) for i, t in enumerate(types))
    return PlainView(name="plain", keys=(Field("k", ValueType.INT64),), features=fields, source=source)


@SETTINGS
@given(st.lists(st.sampled_from(list(ValueType)), max_size=10), st.data())
def test_plain_rows_are_read_as_they_were_written(types: list[ValueType], data: st.DataObject) -> None:
    codec = RowCodec(plain(types))
    row = st.builds(Row, times, times, st.tuples(*(stored(t) for t in types)))
    rows = data.draw(st.lists(row, max_size=3))
    assert seen(codec.decode(codec.encode(rows))) == seen(rows)


@SETTINGS
@given(st.lists(st.sampled_from(list(ValueType)), max_size=10), st.data())
def test_tables_of_plain_rows_are_read_as_they_were_written(types: list[ValueType], data: st.DataObject) -> None:
    """Column by column, as writers and readers do, and row by row: the same bytes, the same values."""
    view = plain(types)
    codec = RowCodec(view)
    rows = data.draw(st.lists(st.builds(Row, times, times, st.tuples(*(stored(t) for t in types))), max_size=4))
    columns = {f.name: to_arrow([row.values[i] for row in rows], f.type) for i, f in enumerate(view.features)}
    table = pa.table(
        {TIME: pa.array([r.time for r in rows], pa.int64()), CREATED: [r.created for r in rows], **columns}
        | ({} if rows else {CREATED: pa.array([], pa.int64())})
    )
    values = codec.encoder(table)(np.arange(len(table)))
    assert values == [codec.encode([row]) for row in rows]
    names = data.draw(st.permutations([f.name for f in view.features]))[: data.draw(st.integers(0, len(types)))]
    chosen = codec.chosen(names)
    words = codec.words(values)
    assert words is not None
    picked = data.draw(st.none() | st.lists(st.integers(-1, len(rows) - 1), max_size=5))
    lines = None if picked is None else np.array(picked, np.int64)
    block = PackedRows(chosen, words, lines, values)
    there = list(range(len(rows))) if picked is None else picked
    expected = [[None if line < 0 else rows[line].values[i] for line in there] for i in chosen.features]
    assert seen(block.lists()) == seen(expected)
    for i, wanted in enumerate(expected):
        assert seen(from_arrow(block.arrow(i), block.types[i])) == seen(wanted)
    for row, value in zip(rows, values, strict=True):
        if single := codec.single(value):
            assert (single[0], seen(list(chosen.pick(single[1])))) == (
                row.time,
                seen([row.values[i] for i in chosen.features]),
            )


@SETTINGS
@given(st.data())
def test_what_is_newer_is_told_by_the_times(data: st.DataObject) -> None:
    codec = RowCodec(plain([ValueType.INT64]))
    near = st.sampled_from([-(2**33), -1, 0, 1, 2**32 - 1, 2**32, 2**62])
    old, new = (data.draw(st.builds(Row, near, near, st.tuples(st.sampled_from([1, 2])))) for _ in range(2))
    decision = newer(codec.encode([old]), codec.encode([new]))
    if (old.time, old.created) == (new.time, new.created):
        assert decision == (0 if old == new else 2)
    else:
        assert decision == int(new.rank > old.rank)
    assert newer(None, codec.encode([new])) == 1
    assert newer(codec.encode([old, new]), codec.encode([new])) == 2
    assert newer(codec.encode([old], now=old.time - 1), codec.encode([new])) == 2


def test_the_bytes_of_a_plain_value_of_version_2() -> None:
    types = [ValueType.INT64, ValueType.STRING, ValueType.FLOAT32_LIST, ValueType.FLOAT64, ValueType.BOOL]
    view = plain([*types, ValueType.FLOAT32, ValueType.INT32, ValueType.TIMESTAMP])
    data = RowCodec(view).encode([Row(1, BEGINNING, (-2, "é", None, 0.5, 1, 0.25, -3, 7))])
    assert data.hex() == (
        "49500200" + "01000000" + PLAIN_FINGERPRINT + "0100000000000000" + "0100000000000080" + "0400000000000000"
        "000000000000e03f" + "feffffffffffffff" + "0700000000000000" + "0000803e" + "fdffffff" + "01" + "00000000000000"
        "02000000" + "00000000" + "c3a9"
    )
    row = Row(1, BEGINNING, (-2, "é", None, 0.5, 1, 0.25, -3, 7))
    for now, flag in ((0, "01"), (1, "00")):
        assert RowCodec(view).encode([row], now)[:4].hex() == "495002" + flag


PLAIN_FINGERPRINT = "1e5f1ac61e65f72b"


def test_a_plain_value_of_another_version_or_definition_is_never_guessed_at() -> None:
    codec, other = RowCodec(plain([ValueType.INT64])), RowCodec(plain([ValueType.FLOAT64]))
    good = codec.encode([Row(1, 1, (5,))])
    for bad in (b"", good[:8], b"XX" + good[2:], good[:2] + b"\x01" + good[3:]):
        with pytest.raises(
            CorruptState, match="view 'plain': a stored row is of no version that can be read; bootstrap"
        ):
            codec.decode(bad)
    with pytest.raises(CorruptState, match="view 'plain': a stored row is of another definition; bootstrap it again"):
        other.decode(good)


@pytest.mark.parametrize("what", ["bucket", "plain row"])
def test_bytes_that_are_cut_off_are_never_guessed_at(what: str) -> None:
    codec = RowCodec(plain([ValueType.INT64, ValueType.STRING]))
    data = Bucket(5, 0, {1: (0, 5), 2: (0, 6)}).encode() if what == "bucket" else codec.encode([Row(1, 1, (5, "abc"))])
    for length in range(len(data)):
        with pytest.raises(CorruptState):
            Bucket.decode(data[:length]) if what == "bucket" else codec.decode(data[:length])


def test_arrow_is_what_a_reader_gets_from_the_store() -> None:
    assert to_arrow([1, None, 0], ValueType.BOOL).equals(pa.array([True, None, False]))
    assert to_arrow([[1], None, []], ValueType.TIMESTAMP_LIST).equals(
        pa.array([[1], None, []], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("us", "UTC")))
    )
    assert is_variable(ValueType.STRING)
    assert not is_variable(ValueType.STRING_LIST)
