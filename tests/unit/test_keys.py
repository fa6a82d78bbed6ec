"""The key codec: no two things share a key, no prefix covers another's keys, and the bytes are these."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import ConfigError
from feature_store.stores.online.keys import (
    BUCKETS,
    KINDS,
    LONGEST_KEY,
    TAG_LENGTH,
    Keyspace,
    bucket_of,
    entity_key,
    entity_values,
    generation_key,
    integer_keys,
    project_tails,
    views_key,
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


@SETTINGS
@given(tuples)
def test_a_key_gives_its_values_back(key: tuple) -> None:
    assert list(map(kind_of, entity_values(entity_key(key)) or ())) == list(map(kind_of, key))


def test_a_key_that_is_only_a_hash_gives_none() -> None:
    space, long = Keyspace("p", "v", 1), entity_key(("x" * 600, 1))
    key = space.entity(b"H", long)
    assert entity_values(space.entity_in(key)) is None
    assert space.entity_in(space.entity(b"H", entity_key((1,)))) == entity_key((1,))


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
        theirs = other.entity(kind, b"x")[TAG_LENGTH:]
        if one != other:
            assert not theirs.startswith(one.tail(kind))
        if (p1, v1) != (p2, v2):
            assert not theirs.startswith(tuple(one.every_generation()))
            assert generation_key(p1, v1) != generation_key(p2, v2)
        if p1 != p2:
            assert not any(theirs.startswith(tail) for tail in project_tails(p1))
    if p1 != p2:
        assert not any(generation_key(p2, v2)[TAG_LENGTH:].startswith(tail) for tail in project_tails(p1))


@SETTINGS
@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_keys_of_many_integers_are_those_of_each(numbers: list[int]) -> None:
    assert integer_keys(np.array(numbers, np.int64)) == [entity_key([n]) for n in numbers]


@SETTINGS
@given(tuples, st.sampled_from(KINDS))
def test_keys_of_many_entities_are_those_of_each(key: tuple, kind: bytes) -> None:
    space, entities = Keyspace("p", "v", 1), [entity_key(key), b"x" * 600, b""]
    buckets = [bucket_of(entity) for entity in entities]
    assert space.entities(kind, entities, buckets) == [space.entity(kind, entity) for entity in entities]
    assert space.entities(kind, entities[:1], buckets[:1]) == [space.entity(kind, entities[0])]
    assert space.number_in(space.entity(kind, entities[0])) == 1


def test_all_keys_of_a_bucket_carry_its_tag() -> None:
    """What Redis Cluster hashes is what stands between the first braces: no name can bring others."""
    space = Keyspace("}{", "{7b}", 0x7B7D7B7D)
    for entity in (b"{", b"}", b"{}", entity_key(["{x}"])):
        for kind in (b"S", b"H", b"P"):
            key = space.entity(kind, entity)
            assert key[:TAG_LENGTH] == space.bucket(bucket_of(entity))[:TAG_LENGTH]
            assert key[: key.index(b"}") + 1] == b"{%02x}" % bucket_of(entity)


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
    assert keys[0].startswith(b"{%02x}" % bucket_of(long[0]) + space.tail(b"S"))
    longest = LONGEST_KEY - len(space.entity(b"S", b""))
    assert space.entity(b"S", b"x" * longest).endswith(b"x" * longest)
    assert not space.entity(b"S", b"x" * (longest + 1)).endswith(b"x")


def test_a_name_too_long_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"'é{61}' is longer than the 120 bytes"):
        generation_key("é" * 61, "v")
    assert generation_key("é" * 60, "v")


def test_the_bytes_of_version_2() -> None:
    space = Keyspace("fraud", "card", 258)
    assert entity_key([]).hex() == ""
    assert entity_key([1]).hex() == "698000000000000001"
    assert entity_key([-1]).hex() == "697fffffffffffffff"
    assert entity_key(["1", "11"]).hex() == "7300000001317300000002" + "3131"
    assert entity_key([b"\xff", "é"]).hex() == "6200000001ff7300000002c3a9"
    assert generation_key("fraud", "card") == b"{20}\x02G\x05fraud\x04card"
    assert space.bucket(171) == b"{ab}\x02B\x05fraud\x04card\x00\x00\x01\x02"
    assert space.entity(b"S", entity_key([7])) == (
        b"{%02x}\x02S\x05fraud\x04card\x00\x00\x01\x02i\x80\x00\x00\x00\x00\x00\x00\x07" % bucket_of(entity_key([7]))
    )
    assert views_key("fraud") == b"{%02x}\x02V\x05fraud" % bucket_of(b"\x05fraud")
    assert space.tail(b"P") == b"\x02P\x05fraud\x04card\x00\x00\x01\x02"


def test_the_buckets_of_version_1() -> None:
    assert BUCKETS == 256
    keys = [[1], [2], [-1], ["1", "11"], ["11", "1"], [b"\xff", "é"], []]
    assert [bucket_of(entity_key(k)) for k in keys] == [29, 167, 254, 56, 95, 43, 0]
