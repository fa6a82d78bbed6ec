"""The key codec: no two things share a key, no prefix covers another's keys, and the bytes are these."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import ConfigError
from feature_store.stores.online.keys import (
    BUCKETS,
    KINDS,
    LONGEST_KEY,
    Keyspace,
    bucket_of,
    entity_key,
    generation_key,
    project_prefixes,
)

SETTINGS = settings(max_examples=200, derandomize=True, deadline=None)

values = st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4) | st.binary(max_size=4)
tuples = st.lists(values, max_size=3).map(tuple)
names = st.text("ab", min_size=1, max_size=4)


def kind_of(value: object) -> tuple[type, object]:
    return type(value), value


@SETTINGS
@given(tuples, tuples)
def test_different_keys_have_different_bytes(one: tuple, other: tuple) -> None:
    same = list(map(kind_of, one)) == list(map(kind_of, other))
    assert (entity_key(one) == entity_key(other)) == same


def test_look_alike_keys_differ() -> None:
    alike = [("1", "11"), ("11", "1"), ("111", ""), ("", "111"), ("111",), (b"1", b"11"), (1, 11), (11, 1), (111,), ()]
    assert len({entity_key(values) for values in alike}) == len(alike)


def test_integers_scan_in_their_order() -> None:
    numbers = [-(2**63), -256, -1, 0, 1, 255, 256, 2**63 - 1]
    assert sorted(entity_key([n]) for n in numbers) == [entity_key([n]) for n in numbers]


@SETTINGS
@given(names, names, names, names, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_space_covers_the_keys_of_another(p1: str, v1: str, p2: str, v2: str, g1: int, g2: int) -> None:
    one, other = Keyspace(p1, v1, g1), Keyspace(p2, v2, g2)
    for kind in KINDS:
        if one != other:
            assert not other.entity(kind, b"x").startswith(one.prefix(kind))
        if (p1, v1) != (p2, v2):
            assert not other.entity(kind, b"x").startswith(one.every_generation(kind))
            assert generation_key(p1, v1) != generation_key(p2, v2)
        if p1 != p2:
            assert not any(other.entity(kind, b"x").startswith(prefix) for prefix in project_prefixes(p1))
    if p1 != p2:
        assert not any(generation_key(p2, v2).startswith(prefix) for prefix in project_prefixes(p1))


@SETTINGS
@given(tuples)
def test_kinds_do_not_meet(key: tuple) -> None:
    space = Keyspace("p", "v", 1)
    made = [space.entity(kind, entity_key(key)) for kind in KINDS if kind != b"B"]
    made += [space.bucket(bucket) for bucket in range(BUCKETS)] + [generation_key("p", "v")]
    assert len(set(made)) == len(made)


def test_a_long_key_is_hashed_and_stays_apart() -> None:
    space = Keyspace("p", "v", 1)
    long = [entity_key(["x" * 600]), entity_key(["x" * 599 + "y"])]
    keys = [space.entity(b"S", entity) for entity in long]
    assert len(set(keys)) == 2
    assert all(len(key) <= LONGEST_KEY for key in keys)
    assert keys[0].endswith(b"\xff" + hashlib.blake2b(long[0], digest_size=32).digest())
    assert keys[0].startswith(space.prefix(b"S") + bytes([bucket_of(long[0])]))
    longest = LONGEST_KEY - len(space.entity(b"S", b""))
    assert space.entity(b"S", b"x" * longest).endswith(b"x" * longest)
    assert not space.entity(b"S", b"x" * (longest + 1)).endswith(b"x")


def test_a_name_too_long_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"'é{61}' is longer than the 120 bytes"):
        generation_key("é" * 61, "v")
    assert generation_key("é" * 60, "v")


def test_the_bytes_of_version_1() -> None:
    space = Keyspace("fraud", "card", 258)
    assert entity_key([]).hex() == ""
    assert entity_key([1]).hex() == "698000000000000001"
    assert entity_key([-1]).hex() == "697fffffffffffffff"
    assert entity_key(["1", "11"]).hex() == "7300000001317300000002" + "3131"
    assert entity_key([b"\xff", "é"]).hex() == "6200000001ff7300000002c3a9"
    assert generation_key("fraud", "card").hex() == "0147056672617564" + "0463617264"
    assert space.bucket(171).hex() == "0142056672617564" + "0463617264" + "00000102" + "ab"
    assert space.entity(b"S", entity_key([7])).hex() == (
        "0153056672617564" + "0463617264" + "00000102" + f"{bucket_of(entity_key([7])):02x}" + "698000000000000007"
    )
    assert space.prefix(b"P").hex() == "0150056672617564" + "0463617264" + "00000102"


def test_the_buckets_of_version_1() -> None:
    assert BUCKETS == 256
    keys = [[1], [2], [-1], ["1", "11"], ["11", "1"], [b"\xff", "é"], []]
    assert [bucket_of(entity_key(k)) for k in keys] == [29, 167, 254, 56, 95, 43, 0]
