"""What a store is for, on every way Redis is run: read the same both ways, nothing made up, no other's touched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from feature_store.errors import StoreNotReady
from feature_store.stores.online.backend import Backend
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.store import OnlineStore
from feature_store.stores.online.windowed import WindowedOnline
from infra.redis.groups import RedisServers
from tests.properties import test_online_equals_reference as suite
from tests.properties.test_online_equals_reference import NOON, at, counting, encoded
from tests.redis_fixtures import config_of


@pytest.fixture
def backend(redis_servers: RedisServers) -> Iterator[Backend]:
    redis_servers.flush()
    opened = open_backend(config_of(redis_servers))
    yield opened
    opened.close()


def test_what_is_read_asynchronously_is_the_same(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - i, customer) for customer in range(40) for i in range(1, 1 + customer % 5)])
    stream.append([at(NOON - 1, customer, customer) for customer in range(0, 60, 3)])
    lookup = stream.online.look_up([encoded(stream.view, (customer,)) for customer in range(70)])
    assert lookup.again(backend.get(lookup.keys)) is not None
    lookup = stream.online.look_up([encoded(stream.view, (customer,)) for customer in range(70)])
    keys = [*lookup.keys, b"{00}not there", *lookup.keys[:3]]
    found = backend.get(keys)

    async def together() -> list[list[bytes | None]]:
        return await asyncio.gather(*[backend.get_async(keys) for _ in range(5)])

    assert asyncio.run(together()) == [found] * 5
    assert asyncio.run(backend.get_async([])) == backend.get([]) == []
    assert found[len(lookup.keys)] is None
    assert sum(value is not None for value in found) > 40


def test_a_store_that_was_flushed_is_not_ready_and_never_zeros(redis_servers: RedisServers, backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1)])
    plain = suite.plain_view(["whole"])
    online = PlainOnline(backend, stream.online.project, plain)
    online.write(suite.plain_table(plain, [(1, NOON, None, {"whole": 5})]), NOON)
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [1]
    redis_servers.flush()
    with pytest.raises(StoreNotReady, match="never filled"):
        stream.read([((1,), NOON)])
    with pytest.raises(StoreNotReady):
        stream.append([at(NOON - 1)])
    with pytest.raises(StoreNotReady, match="never filled"):
        suite.read_plain(online, [(1, NOON)])


def test_deleting_a_view_or_project_touches_no_other_with_an_alike_name(backend: Backend) -> None:
    names = [("fraud", "view"), ("antifraud", "view"), ("fraud*", "view"), ("fraud", "view2"), ("f", "raudview")]
    streams = {}
    for rows, (project, name) in enumerate(names, 1):
        stream = counting(backend)
        stream.view = suite.replaced_name(stream.view, name)
        stream.online = WindowedOnline(backend, project, stream.view)
        stream.bootstrap([at(NOON - i) for i in range(1, rows + 1)])
        streams[project, name] = stream

    def left() -> list[tuple[str, str]]:
        found = []
        for rows, key in enumerate(names, 1):
            try:
                assert streams[key].read([((1,), NOON)]).values["all"].to_pylist() == [rows]
                found.append(key)
            except StoreNotReady:
                continue
        return found

    assert left() == names
    OnlineStore(backend, "fraud").delete_view("view")
    assert left() == names[1:]
    OnlineStore(backend, "fraud*").delete_project()
    assert left() == [names[1], names[3], names[4]]
    OnlineStore(backend, "fraud").delete_project()
    assert left() == [names[1], names[4]]
    assert not [key for key in backend.scan(b"") if b"\x05fraud" in key]


def test_a_few_thousand_keys_are_written_read_found_and_deleted(backend: Backend) -> None:
    view = suite.plain_view(["whole", "text"])
    online = PlainOnline(backend, suite.project(), view)
    rows = [(c, NOON - 1, None, {"whole": c, "text": "x" * (c % 50)}) for c in range(3_000)]
    assert online.write(suite.plain_table(view, rows), NOON) == 3_000
    read = online.read(["whole"], [encoded(view, (c,)) for c in range(3_001)], np.full(3_001, NOON))
    assert read.values["whole"].to_pylist() == [*range(3_000), None]
    space = online.generations.space(1)
    tail = space.tail(b"P")
    assert len(set(backend.scan(tail))) == 3_000
    assert {*backend.scan(tail, space.tail(b"B"), b"none")} == {*backend.scan(tail), *space.buckets}
    backend.delete(backend.scan(tail))
    assert list(backend.scan(tail)) == []
