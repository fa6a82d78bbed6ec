"""The server behind a store changes: failovers, a node of a Cluster that dies, slots that move, processes that fork."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
import uvloop

from feature_store.config import OnlineConfig
from feature_store.errors import StoreError, StoreUnavailable
from feature_store.stores.online.backend import Write
from feature_store.stores.online.redis.backend import RedisBackend
from infra.redis import servers
from infra.redis.groups import Cluster, RedisServers, SentinelServers, SingleServer
from infra.redis.node import Node
from infra.redis.waiting import comes_true
from tests.fake_redis import array, bulk, fake_redis
from tests.redis_fixtures import config_of

#: Seconds that a request may take, and within which something that is waited for must have come about.
TIMEOUT, AT_LAST = 1.0, 60.0
#: The former for requests that must fail.
HASTY = 0.5


def value_of(key: bytes) -> bytes:
    return b"value of " + key


def keys(count: int = 256) -> list[bytes]:
    return [b"{%02x}key%d" % (i % 256, i) for i in range(count)]


def fill(backend: RedisBackend, some: list[bytes]) -> None:
    backend.apply([Write([], [("S", key, value_of(key))]) for key in some])


def get(backend: RedisBackend, some: list[bytes]) -> list[bytes | None]:
    return backend.get(some)


def get_async(backend: RedisBackend, some: list[bytes]) -> list[bytes | None]:
    return asyncio.run(backend.get_async(some))


@contextmanager
def store(nodes: RedisServers, timeout: float = TIMEOUT) -> Iterator[RedisBackend]:
    backend = RedisBackend(config_of(nodes, timeout))
    yield backend
    backend.close()


class Counter:
    """Threads that raise a number and read it, both ways, all the time: none goes back, none is ahead of its writer.

    A number is written if the one before is still there: a write that was lost, or made twice, is noticed.
    """

    def __init__(self, backend: RedisBackend, key: bytes) -> None:
        self.backend, self.key = backend, key
        self.acknowledged = self.errors = self.seen = self.seen_async = 0
        self.wrong: list[Any] = []
        self.end = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._write, self._read, self._read_async)]

    def __enter__(self) -> Counter:
        self.backend.apply([Write([], [("S", self.key, b"0")])])
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        for thread in self._threads:
            thread.join(AT_LAST)
        assert self.wrong == []

    def goes_on(self) -> None:
        """All three get somewhere from now on."""
        before = self.acknowledged, self.seen, self.seen_async
        assert comes_true(
            lambda: all(a > b for a, b in zip((self.acknowledged, self.seen, self.seen_async), before, strict=True)),
            AT_LAST,
        )

    def _write(self) -> None:
        while not self.end.is_set():
            following = self.acknowledged + 1
            held, wanted = b"%d" % self.acknowledged, b"%d" % following
            try:
                done = self.backend.apply([Write([(self.key, held)], [("S", self.key, wanted)])])
                if done == [None] and self.backend.get([self.key]) != [wanted]:
                    # An earlier try was made although its answer was lost, or it is wrong.
                    self.wrong.append((held, self.backend.get([self.key])))
                    return
                self.acknowledged = following
            except StoreError:
                self.errors += 1

    def _read(self) -> None:
        while not self.end.is_set():
            low = self.acknowledged
            try:
                (found,) = self.backend.get([self.key])
            except StoreError:
                self.errors += 1
                continue
            self.seen = self._checked(low, found)

    def _read_async(self) -> None:
        asyncio.run(self._reading())

    async def _reading(self) -> None:
        while not self.end.is_set():
            low = self.acknowledged
            try:
                (found,) = await self.backend.get_async([self.key])
            except StoreError:
                self.errors += 1
                continue
            self.seen_async = self._checked(low, found)

    def _checked(self, low: int, found: bytes | None) -> int:
        if found is None or not low <= int(found) <= self.acknowledged + 1:
            self.wrong.append((low, found, self.acknowledged))
        return int(found or 0)


# -- Sentinel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched() -> Iterator[SentinelServers]:
    with servers.sentinel(down_after=1.0) as nodes:
        yield nodes


def in_step(nodes: SentinelServers) -> None:
    """Returns when the replica has all that was acknowledged."""
    assert nodes.master.command("WAIT", 1, 10_000) == 1


def test_a_killed_master_is_followed_by_its_replica(watched: SentinelServers) -> None:
    with store(watched) as backend:
        some = keys()
        fill(backend, some)
        in_step(watched)
        killed, heir = watched.master, watched.replica
        killed.kill()
        found: list[Any] = []

        def answered(ask: Callable[..., list[bytes | None]]) -> bool:
            try:
                found.append(ask(backend, some))
            except StoreUnavailable:
                return False
            return True

        assert comes_true(lambda: answered(get_async) and answered(get), AT_LAST)
        assert found == [[value_of(key) for key in some]] * len(found)
        assert comes_true(lambda: watched.master is heir, AT_LAST)
        assert backend.apply([Write([(some[0], value_of(some[0]))], [("S", some[0], b"new")])]) == [[0]]
        assert get(backend, some[:1]) == get_async(backend, some[:1]) == [b"new"]


def test_a_master_that_is_replaced_while_it_hangs_is_left(watched: SentinelServers) -> None:
    """Its connections stay open and silent. When it wakes up, it takes itself for the master for some seconds more."""
    with store(watched) as backend:
        fill(backend, keys(3))
        assert get_async(backend, keys(3)) == get(backend, keys(3))
        in_step(watched)
        hanging, heir = watched.master, watched.replica
        hanging.pause()
        try:
            assert comes_true(lambda: watched.master is heir, AT_LAST)
            for read in (get, get_async):
                assert comes_true(lambda read=read: is_read(backend, read, keys(3)), AT_LAST)
            assert comes_true(lambda: is_written(backend, keys(1)[0], b"new"), AT_LAST)
        finally:
            hanging.resume()
        assert comes_true(lambda: hanging.info()["role"] == "master", AT_LAST)
        for _ in range(20):
            assert get(backend, keys(1)) == get_async(backend, keys(1)) == [b"new"]


def is_read(backend: RedisBackend, read: Callable[..., list[bytes | None]], some: list[bytes]) -> bool:
    try:
        found = read(backend, some)
    except StoreUnavailable:
        return False
    assert found == [value_of(key) for key in some]
    return True


def test_a_failover_that_was_ordered_is_followed(watched: SentinelServers) -> None:
    """The former master lives on as a replica that answers reads: it must not be read."""
    heir = watched.replica
    with store(watched) as backend:
        fill(backend, keys(3))
        assert get_async(backend, keys(3)) == get(backend, keys(3))
        in_step(watched)
        assert comes_true(lambda: is_ordered(watched), AT_LAST)
        while watched.master is not heir:
            for read in (get, get_async):
                is_read(backend, read, keys(3))
        assert comes_true(lambda: is_written(backend, keys(1)[0], b"new"), AT_LAST)
        for _ in range(20):
            assert get(backend, keys(1)) == get_async(backend, keys(1)) == [b"new"]


def is_ordered(nodes: SentinelServers) -> bool:
    try:
        nodes.sentinels[0].command("SENTINEL", "FAILOVER", nodes.sentinel_master)
    except redis.ResponseError as error:
        return "INPROG" in str(error)  # else: it has not heard of the replica lately
    return True


def is_written(backend: RedisBackend, key: bytes, value: bytes) -> bool:
    try:
        backend.apply([Write([], [("S", key, value)])])
    except StoreUnavailable:
        return False
    return True


def test_a_sentinel_that_is_silent_is_left_for_the_next() -> None:
    with servers.sentinel(sentinels=3) as nodes:
        first = nodes.sentinels[0]
        first.pause()
        try:
            with store(nodes, timeout=3.0) as backend:
                fill(backend, keys(2))
                assert get(backend, keys(2)) == get_async(backend, keys(2)) == [value_of(key) for key in keys(2)]
        finally:
            first.resume()


def test_a_replica_that_a_sentinel_takes_for_the_master_is_not_read() -> None:
    """One that has not heard of a failover yet: what the former master holds may be old."""
    named: Iterator[int]
    old, new = [b"old"], [b"new"]
    with servers.single() as former, servers.single() as master:
        for server, value in ((former, *old), (master, *new)):
            server.nodes[0].command("SET", keys(1)[0].decode(), value.decode())
        former.nodes[0].command("REPLICAOF", "127.0.0.1", 1)

        def sentinel(command: list[bytes]) -> bytes:
            port = next(named)
            return array(bulk(b"127.0.0.1"), bulk(b"%d" % port))

        for read in (get, get_async):
            named = itertools.chain([former.port] * 3, itertools.repeat(master.port))
            with fake_redis(sentinel) as fake:
                config = OnlineConfig(
                    "redis",
                    redis_type="redis_sentinel",
                    connection_string=f"127.0.0.1:{fake.port}",
                    timeout=AT_LAST,
                )
                backend = RedisBackend(config)
                assert read(backend, keys(1)) == new
                backend.close()


# -- Cluster ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """One that is broken by these tests; a node of it keeps its data."""
    with servers.cluster(appendonly=True, directives=["appendfsync always"]) as started:
        yield started


@pytest.fixture
def backend(nodes: Cluster) -> Iterator[RedisBackend]:
    nodes.flush()
    with store(nodes) as made:
        fill(made, keys())
        yield made


def owners(nodes: Cluster, some: list[bytes]) -> list[Node]:
    """The node that has each key."""
    by_port = {node.port: node for node in nodes.nodes}
    with nodes.client() as client:
        return [by_port[client.get_node_from_key(key).port] for key in some]


def test_a_killed_node_fails_its_own_keys_only_and_comes_back(nodes: Cluster, backend: RedisBackend) -> None:
    have = dict(zip(keys(), owners(nodes, keys()), strict=True))
    lost = have[keys()[0]]
    here, elsewhere = ([key for key, node in have.items() if (node is lost) is its] for its in (True, False))
    assert get_async(backend, keys()) == get(backend, keys())
    lost.kill()
    try:
        for read in (get, get_async):
            assert read(backend, elsewhere) == [value_of(key) for key in elsewhere]
        with store(nodes, HASTY) as hasty:
            for ask in (
                lambda: get(hasty, here),
                lambda: get_async(hasty, here),
                lambda: hasty.apply([Write([], [("S", here[0], b"new")])]),
                lambda: list(hasty.scan(b"")),
            ):
                with pytest.raises(StoreUnavailable, match="cannot be reached"):
                    ask()
    finally:
        nodes.start()
    for read in (get, get_async):
        assert comes_true(lambda read=read: is_read(backend, read, keys()), AT_LAST)
    assert set(backend.scan(b"key")) == set(keys())


def test_a_paused_node_fails_its_own_keys_in_time(nodes: Cluster, backend: RedisBackend) -> None:
    silent, *others = owners(nodes, keys())
    elsewhere = [key for key, node in zip(keys()[1:], others, strict=True) if node is not silent]
    get_async(backend, keys())
    silent.pause()
    try:
        with store(nodes, HASTY) as hasty:
            for ask in (
                lambda: get(hasty, keys()),
                lambda: get_async(hasty, keys()),
                lambda: fill(hasty, keys()),
            ):
                begun = time.monotonic()
                with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
                    ask()
                assert time.monotonic() - begun < 15
        for read in (get, get_async):
            assert read(backend, elsewhere) == [value_of(key) for key in elsewhere]
    finally:
        silent.resume()
    for read in (get, get_async):
        assert comes_true(lambda read=read: is_read(backend, read, keys()), AT_LAST)


def test_a_write_made_once_is_not_sent_again_by_a_cluster(nodes: Cluster, backend: RedisBackend) -> None:
    """The node wakes up after the answer was given up, and finds in its socket what was sent: once."""
    counters = [b"{%02x}once" % i for i in range(256)]
    (silent,) = owners(nodes, counters[:1])
    backend.get(counters)
    silent.pause()
    try:
        with pytest.raises(StoreUnavailable):
            backend.apply([Write([], [("A", key, b"x")]) for key in counters], once=True)
    finally:
        silent.resume()
    silent.command("PING")
    assert comes_true(lambda: backend.get(counters) == [b"x"] * 256, AT_LAST)


def slot_of(nodes: Cluster, key: bytes) -> int:
    return nodes.nodes[0].command("CLUSTER", "KEYSLOT", key.decode())


@contextmanager
def moving(nodes: Cluster, slot: int, source: Node, target: Node) -> Iterator[None]:
    """The slot is on its way, and has arrived afterwards."""
    source_id, target_id = (node.command("CLUSTER", "MYID") for node in (source, target))
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    try:
        yield
    finally:
        while some := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            migrate(source, target, *some)
        for node in (target, source, *nodes.nodes):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)


def migrate(source: Node, target: Node, *some: str) -> None:
    source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *some)


def test_keys_of_a_slot_that_moves_are_found_before_between_and_after(nodes: Cluster, backend: RedisBackend) -> None:
    one, two = b"{00}key0", b"{00}other"
    fill(backend, [two])
    slot, (source,) = slot_of(nodes, one), owners(nodes, [one])
    target = next(node for node in nodes.nodes if node is not source)
    number = b"{00}number"
    get_async(backend, keys())
    with moving(nodes, slot, source, target):
        for read in (get, get_async):
            assert read(backend, [one, two]) == [value_of(one), value_of(two)]
            assert read(backend, [b"{00}nowhere"]) == [None]  # ASK: the other node would have it
        assert backend.apply([Write([(number, None)], [("S", number, b"1")])]) == [[0]]
        migrate(source, target, one.decode())
        for read in (get, get_async):
            assert read(backend, [one]) == [value_of(one)]
            assert read(backend, [two]) == [value_of(two)]
            with pytest.raises(StoreUnavailable, match="TRYAGAIN"):
                read(backend, [one, two])
        finishing = threading.Timer(0.3, lambda: migrate(source, target, two.decode()))
        finishing.start()
        assert get(backend, [one, two]) == [value_of(one), value_of(two)]
        finishing.join()
    for _ in range(2):
        assert get_async(backend, [one, two, number]) == [value_of(one), value_of(two), b"1"]
        assert backend.apply([Write([(number, b"1")], [("S", number, b"1")])]) == [[0]]
        assert get(backend, keys()) == [value_of(key) for key in keys()]
    assert set(backend.scan(b"")) == {*keys(), two, number}
    with moving(nodes, slot, target, source):
        pass
    assert get_async(backend, [one, two, number]) == [value_of(one), value_of(two), b"1"]


def test_slots_move_under_readers_and_writers(nodes: Cluster) -> None:
    key = b"{00}number"
    nodes.flush()
    slot, (source,) = slot_of(nodes, key), owners(nodes, [key])
    target = next(node for node in nodes.nodes if node is not source)
    with store(nodes, timeout=AT_LAST) as backend:
        with Counter(backend, key) as counter:
            for way in ((source, target), (target, source)) * 2:
                with moving(nodes, slot, *way):
                    counter.goes_on()
                counter.goes_on()
        assert backend.get([key]) == [b"%d" % counter.acknowledged]
    assert counter.errors == 0


# -- processes, threads and loops -------------------------------------------------------------------------------------


@contextmanager
def in_a_fork(do: Callable[[], None]) -> Iterator[None]:
    """Does it in a forked process meanwhile, which must end well, and soon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads and forks do not go together
        child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    status: list[int] = []

    def ended() -> bool:
        done, found = os.waitpid(child, os.WNOHANG)
        status.extend([found] if done else [])
        return bool(done)

    try:
        yield
    finally:
        if not comes_true(ended, AT_LAST):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == [0]


def ask_often(backend: RedisBackend, some: list[bytes]) -> None:
    for _ in range(10):
        for key in some:
            assert backend.get([key]) == [value_of(key)]


@pytest.mark.parametrize("kind", ["redis_single", "redis_cluster", "redis_sentinel", "redis_tls"])
def test_a_forked_process_has_connections_of_its_own(kind: str, request: pytest.FixtureRequest) -> None:
    """Parent and child ask at once: over one connection each would get the other's answers."""
    with store(request.getfixturevalue(kind), timeout=AT_LAST) as backend:
        some = keys(64)
        fill(backend, some)

        async def ask_often_async() -> None:
            for _ in range(5):
                for key in some:
                    assert await backend.get_async([key]) == [value_of(key)]

        def child() -> None:
            ask_often(backend, some[::-1])
            asyncio.run(ask_often_async())
            backend.apply([Write([], [("S", b"{00}forked", b"x")])])
            backend.close()

        async def parent() -> None:
            await ask_often_async()
            with in_a_fork(child):
                ask_often(backend, some)
                await ask_often_async()
            await ask_often_async()

        asyncio.run(parent())
        assert backend.get([b"{00}forked"]) == [b"x"]


def test_a_fork_while_other_threads_connect_does_not_hang(redis_single: SingleServer) -> None:
    with store(redis_single, timeout=AT_LAST) as backend:
        fill(backend, keys(4))
        end = threading.Event()

        def restless() -> None:
            while not end.is_set():
                backend.get(keys(4))
                backend.close()

        threads = [threading.Thread(target=restless) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                with in_a_fork(lambda: ask_often(backend, keys(4))):
                    pass
        finally:
            end.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("kind", ["redis_single", "redis_cluster", "redis_sentinel", "redis_tls"])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_loops_in_threads_have_connections_of_their_own_and_leave_none(
    kind: str, new_loop: Callable[[], Any], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = request.getfixturevalue(kind)
    with store(nodes, timeout=AT_LAST) as backend:
        some = keys(40)
        fill(backend, some)
        wrong: list[Any] = []

        async def many() -> None:
            for _ in range(3):
                found = await asyncio.gather(*[backend.get_async([key, b"{01}none"]) for key in some])
                wrong.extend(one for one, key in zip(found, some, strict=True) if one != [value_of(key), None])

        def run() -> None:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(many())

        for _ in range(2):
            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(AT_LAST)
        assert wrong == []
        assert backend._asking_async._lines == {}
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert comes_true(lambda: connections(nodes) == 0, AT_LAST)


def connections(nodes: RedisServers) -> int:
    """Of clients, beside the one that asks; replicas and Sentinels have theirs."""
    clients = [node.command("CLIENT", "LIST", "TYPE", "NORMAL") for node in nodes._masters()]
    lines = [line for found in clients for line in str(found).splitlines()]
    return sum("cmd=client" not in line and "name= " in line for line in lines)  # Sentinels give theirs names


def test_a_store_that_is_closed_or_dropped_inside_a_loop_leaves_nothing_behind(
    redis_single: SingleServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(close: bool) -> None:
        backend = RedisBackend(config_of(redis_single, AT_LAST))
        assert await backend.get_async([b"{00}none"]) == [None]
        waiting = asyncio.create_task(backend.get_async([b"{00}none"]))
        await asyncio.sleep(0)
        if close:
            backend.close()
            assert await backend.get_async([b"{00}none"]) == [None]
            backend.close()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    for close in (True, False):
        asyncio.run(use(close))
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_requests_that_are_cancelled_while_connecting_leave_nothing_behind(
    redis_single: SingleServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(backend: RedisBackend) -> None:
        redis_single.pause()
        tasks = [asyncio.create_task(backend.get_async([key])) for key in keys(10)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in found} == {asyncio.CancelledError}
        await asyncio.sleep(TIMEOUT + 0.2)  # the connection that nobody waits for any more is given up meanwhile
        redis_single.resume()
        assert await backend.get_async(keys(2)) == [value_of(key) for key in keys(2)]

    with store(redis_single, timeout=AT_LAST) as backend:
        fill(backend, keys(2))
    try:
        with store(redis_single) as backend:
            asyncio.run(use(backend))
    finally:
        redis_single.resume()
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_threads_with_one_connection_a_node_do_not_wait_for_each_other_in_a_circle(redis_cluster: Cluster) -> None:
    config = config_of(redis_cluster, AT_LAST)
    text = f"{config.connection_string},max_connections=1"
    backend = RedisBackend(replace(config, connection_string=text))
    fill(backend, keys())
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            asked = rng.sample(keys(), len(keys()))
            if backend.get(asked) != [value_of(key) for key in asked]:
                wrong.append("values")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read, seed) for seed in range(4)]:
            done.result()
    assert wrong == []
    backend.close()


def test_no_more_connections_than_allowed(redis_single: SingleServer) -> None:
    config = config_of(redis_single, AT_LAST)
    text = f"{config.connection_string},max_connections=2"
    backend = RedisBackend(type(config)("redis", connection_string=text, timeout=AT_LAST))
    fill(backend, keys(2_000))
    most: list[int] = []
    threads = [threading.Thread(target=lambda: [backend.get(keys(3)) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most.append(connections(redis_single))
    assert 0 < max(most) <= 2
    # Looking through keys takes none away from who deletes them meanwhile.
    backend.delete(backend.scan(b"key"))
    assert backend.get(keys(3)) == [None] * 3
    backend.close()
