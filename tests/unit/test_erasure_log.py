"""The erasure log and what it holds: whole lines on the disk, one writer at a time, keys as text."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.definitions.erasure import (
    NO_ERASURES,
    Erased,
    Erasure,
    Erasures,
    key_text,
    key_value,
    left_out,
    values_in,
    when_known,
)
from feature_store.definitions.types import KEY_TYPES, ValueType
from feature_store.definitions.view import Field
from feature_store.errors import ErasureLogError, RequestError
from feature_store.stores.erasure_log import ErasureLog
from feature_store.timestamps import BEGINNING

SETTINGS = settings(max_examples=200, derandomize=True, deadline=None)
VALUES = {
    ValueType.BOOL: st.booleans(),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.STRING: st.text(),
    ValueType.BYTES: st.binary(),
}


def erasure(customer: int, at: int = 5, project: str = "p") -> Erasure:
    return Erasure(project, {"customer": str(customer)}, at, {"view": {0: (0, 7), 2**32 - 1: (1, 2**60)}})


def test_what_is_added_is_there_for_everybody_and_the_same_object_until_more_comes(tmp_path: Path) -> None:
    path = tmp_path / "data" / "registry.erasures.jsonl"
    one, other = ErasureLog(path, "p"), ErasureLog(path, "p")
    assert one.load() is NO_ERASURES
    one.append(erasure(1))
    first = other.load()
    assert first == one.load() == Erasures((erasure(1),))
    assert other.load() is first
    other.append(erasure(2, 4))
    one.append(erasure(3, project="pp"))
    assert one.load().log == (erasure(1), erasure(2, 4))
    assert one.load().since(first) == [erasure(2, 4)]
    assert one.load().since(one.load()) == []
    assert ErasureLog(path, "pp").load().log == (erasure(3, project="pp"),)
    assert len(path.read_bytes().splitlines()) == 3


def test_a_line_that_was_cut_off_is_no_erasure_and_the_next_one_is_whole(tmp_path: Path) -> None:
    log = ErasureLog(tmp_path / "log", "p")
    log.append(erasure(1))
    with log.path.open("ab") as file:
        file.write(b'{"project":"p","keys":{"cust')
    assert log.load().log == (erasure(1),)
    log.append(erasure(2))
    assert log.load().log == (erasure(1), erasure(2))
    assert log.path.read_bytes().count(b"cust") == 2


@pytest.mark.parametrize("line", [b"", b"{}", b'{"project":"p","keys":{"a":1},"erased_at":1}', b"\xff"])
def test_a_whole_line_that_is_no_erasure_is_an_error_that_names_it(line: bytes, tmp_path: Path) -> None:
    log = ErasureLog(tmp_path / "log", "p")
    log.append(erasure(1))
    with log.path.open("ab") as file:
        file.write(line + b"\n")
    for _ in range(2):
        with pytest.raises(ErasureLogError, match=r"log: line 2 is no erasure .*restore it"):
            log.load()


def _append(path: Path, first: int) -> None:
    for customer in range(first, first + 50):
        ErasureLog(path, "p").append(erasure(customer))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(tmp_path / "log", first)) for first in (0, 50, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    customers = [int(one.keys["customer"]) for one in ErasureLog(tmp_path / "log", "p").load().log]
    assert sorted(customers) == list(range(150))
    assert [c for c in customers if c < 50] == list(range(50))


@SETTINGS
@given(st.data(), st.sampled_from(KEY_TYPES))
def test_a_key_value_comes_back_from_its_text(data: st.DataObject, key_type: ValueType) -> None:
    value = data.draw(VALUES[key_type])
    read = key_value(key_text("key", value), key_type)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((text, ValueType.INT64) for text in ("", " 1", "1.0", "1e3", "1_0", "+1", "١", str(2**63), "true")),
        (str(2**31), ValueType.INT32),
        *((text, ValueType.BOOL) for text in ("1", "True", "")),
        *((text, ValueType.BYTES) for text in ("f", "0x00", "zz", "00 11")),
        ("1", ValueType.FLOAT64),
    ],
)
def test_texts_that_stand_for_no_value(text: str, wanted: ValueType) -> None:
    assert key_value(text, wanted) is None


@pytest.mark.parametrize("value", [None, 1.0, np.float64(1), [1], {"a": 1}])
def test_what_is_no_keys_value_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"'customer' is a .*, which no join key is"):
        key_text("customer", value)


def test_values_are_those_of_the_views_own_types() -> None:
    keys = (Field("a", ValueType.STRING), Field("n", ValueType.INT64))
    assert values_in({"n": "01"}, keys) == {"n": 1}
    assert values_in({"n": "01", "a": "01"}, keys) == {"n": 1, "a": "01"}
    assert values_in({"n": "x", "a": "x"}, keys) is None
    assert values_in({"n": "1", "m": "1"}, keys) is None
    assert values_in({}, keys) is None
    assert values_in({"n": "1"}, ()) is None


def test_the_last_erasure_of_an_entity_counts_and_each_set_of_keys_stands_for_itself() -> None:
    keys = (Field("a", ValueType.STRING), Field("n", ValueType.INT64))
    log = [({"n": "1"}, 5), ({"n": "1", "a": "x"}, 9), ({"n": "1"}, 3), ({"a": "x", "n": "2"}, 1), ({"b": "1"}, 99)]
    erasures = Erasures(tuple(Erasure("p", texts, at) for texts, at in log))
    assert erasures.of(keys) == (
        Erased(keys[1:], {(1,): 5}),
        Erased(keys, {("x", 1): 9, ("x", 2): 1}),
    )
    assert erasures.of(keys) is erasures.of(list(keys))
    rows = pa.table({"n": [1, 1, 1, 2, 2, 3], "a": ["x", "y", "y", "x", "x", "x"]})
    known = np.array([9, 5, 6, 1, 2, 0])
    assert left_out(erasures.of(keys), rows, known).tolist() == [True, True, False, True, False, False]
    assert not left_out((), rows, known).any()


def test_known_is_the_created_time_or_else_the_time_before_the_delay() -> None:
    times, created = np.array([10, 10, 10]), np.array([BEGINNING, 4, 99])
    assert when_known(times, created, 3).tolist() == [7, 4, 99]
