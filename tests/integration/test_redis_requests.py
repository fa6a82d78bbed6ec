"""One request to Redis: how long it may take, what is sent again and what never, what an error answer means.

Against a stand-in that answers wrongly at the right moment.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from feature_store.config import OnlineConfig
from feature_store.errors import ConfigError, StoreDenied, StoreError, StoreFull, StoreUnavailable
from feature_store.stores.online.backend import Write
from feature_store.stores.online.redis.backend import RedisBackend
from tests.fake_redis import Answer, FakeRedis, array, bulk, fake_redis

KEY = b"{00}key"
OTHER = b"{01}key"
VALUE = array(bulk(b"value"))
SCRIPT_DONE = array(array(b":0\r\n"))
WRITE = Write([], [("S", KEY, b"v")])

#: Seconds within which everything must have ended that is bounded by a timeout of far less: this machine may be busy.
AT_LAST = 20.0


def backend_of(*fakes: FakeRedis, kind: str = "redis", timeout: float = 0.5) -> RedisBackend:
    hosts = ",".join(f"127.0.0.1:{fake.port}" for fake in fakes)
    return RedisBackend(OnlineConfig("redis", redis_type=kind, connection_string=hosts, timeout=timeout))


def get(backend: RedisBackend, keys: Sequence[bytes] = (KEY,)) -> list[bytes | None]:
    return backend.get(keys)


def get_async(backend: RedisBackend, keys: Sequence[bytes] = (KEY,)) -> list[bytes | None]:
    return asyncio.run(backend.get_async(keys))


def apply(backend: RedisBackend) -> Any:
    return backend.apply([WRITE])


READS = pytest.mark.parametrize("read", [get, get_async])


def in_turn(*replies: bytes | None) -> Answer:
    """Answers each of these once, and the last one from then on."""
    following = itertools.chain(replies, itertools.repeat(replies[-1]))
    return lambda command: next(following)


def dripping(data: bytes) -> Iterator[bytes]:
    """One byte after the other, each in time by itself."""
    for byte in data:
        time.sleep(0.05)
        yield bytes([byte])


def refused(do: Callable[[], Any]) -> StoreError:
    begun = time.monotonic()
    with pytest.raises(StoreError) as raised:
        do()
    assert time.monotonic() - begun < AT_LAST
    return raised.value


# -- the deadline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [get, get_async, apply])
def test_an_answer_that_drips_in_ends_at_the_deadline(ask: Callable[[RedisBackend], Any]) -> None:
    with fake_redis(lambda command: dripping(bulk(b"x" * 2_000))) as fake:
        error = refused(lambda: ask(backend_of(fake)))
    assert isinstance(error, StoreUnavailable)
    assert "did not answer within 0.5 s" in str(error)


@pytest.mark.parametrize("ask", [get, get_async, apply])
def test_a_connection_that_is_lost_again_and_again_ends_at_the_deadline(ask: Callable[[RedisBackend], Any]) -> None:
    with fake_redis(lambda command: None) as fake:
        error = refused(lambda: ask(backend_of(fake, timeout=1.0)))
        assert len(fake.commands) > 1
    assert isinstance(error, StoreUnavailable)
    assert "cannot be reached" in str(error)


def test_many_requests_of_a_loop_wait_side_by_side() -> None:
    """Not one after the other in a few threads."""

    async def many(backend: RedisBackend) -> list[Any]:
        return await asyncio.gather(*[backend.get_async([KEY]) for _ in range(200)], return_exceptions=True)

    begun = time.monotonic()
    with fake_redis(lambda command: iter([])) as fake:
        found = asyncio.run(many(backend_of(fake)))
    assert {type(error) for error in found} == {StoreUnavailable}
    assert time.monotonic() - begun < AT_LAST


@READS
def test_a_cluster_is_asked_at_another_node_where_one_is_silent(read: Callable[..., list[bytes | None]]) -> None:
    def slots(command: list[bytes]) -> bytes:
        if command[0] == b"CLUSTER":
            return array(array(b":0\r\n", b":16383\r\n", array(bulk(b""), b":%d\r\n" % speaking.port)))
        return VALUE

    with fake_redis(lambda command: iter([])) as silent, fake_redis(slots) as speaking:
        backend = backend_of(silent, speaking, kind="redis_cluster", timeout=4.0)
        assert read(backend) == [b"value"]


# -- what is sent again -----------------------------------------------------------------------------------------------


@READS
def test_what_passes_by_itself_is_asked_again(read: Callable[..., list[bytes | None]]) -> None:
    passing = [b"-LOADING wait\r\n", None, b"-BUSY a script runs\r\n", b"-MASTERDOWN no link\r\n", VALUE]
    with fake_redis(in_turn(*passing)) as fake:
        assert read(backend_of(fake, timeout=AT_LAST)) == [b"value"]
        assert fake.names == [b"MGET"] * 5


def test_a_write_whose_answer_was_lost_is_sent_again() -> None:
    with fake_redis(in_turn(None, SCRIPT_DONE)) as fake:
        assert backend_of(fake, timeout=AT_LAST).apply([WRITE]) == [[0]]
        assert fake.names == [b"EVALSHA"] * 2


@pytest.mark.parametrize("kind", ["redis", "redis_cluster"])
def test_a_write_that_must_be_made_once_is_not(kind: str) -> None:
    def answer(command: list[bytes]) -> bytes | None:
        if command[0] == b"CLUSTER":
            return array(array(b":0\r\n", b":16383\r\n", array(b"$-1\r\n", b":%d\r\n" % fake.port)))
        return None

    with fake_redis(answer) as fake:
        error = refused(lambda: backend_of(fake, kind=kind, timeout=60.0).apply([WRITE], once=True))
        assert fake.names.count(b"EVALSHA") == 1
    assert isinstance(error, StoreUnavailable)


def test_a_write_that_must_be_made_once_is_sent_again_where_it_was_not_made() -> None:
    refusals = [b"-LOADING wait\r\n", b"-NOSCRIPT load it\r\n", b"+loaded\r\n", SCRIPT_DONE]
    with fake_redis(in_turn(*refusals)) as fake:
        assert backend_of(fake, timeout=AT_LAST).apply([WRITE], once=True) == [[0]]
        assert fake.names == [b"EVALSHA", b"EVALSHA", b"SCRIPT", b"EVALSHA"]


def test_what_was_answered_is_not_sent_again() -> None:
    """Of many calls only those without an answer: a guard of the others would not hold a second time."""
    writes = [Write([], [("S", b"{%02x}k%d" % (i % 256, i), b"v")] * 200) for i in range(4)]
    done = array(array(*[b":0\r\n"] * 200))
    with fake_redis(in_turn(done, b"-READONLY not now\r\n", done, done, done)) as fake:
        assert backend_of(fake, timeout=AT_LAST).apply(writes) == [[0] * 200] * 4
        sent = [command[3] for command in fake.commands]
        assert [sent.count(write.changes[0][1]) for write in writes] == [1, 2, 1, 1]


def test_what_was_answered_before_the_connection_was_lost_is_not_sent_again() -> None:
    writes = [Write([], [("S", b"{00}k%d" % i, b"v")] * 200) for i in range(3)]
    done = array(array(*[b":0\r\n"] * 200))
    with fake_redis(in_turn(done, None, done, done)) as fake:
        assert backend_of(fake, timeout=AT_LAST).apply(writes) == [[0] * 200] * 3
        sent = [command[3] for command in fake.commands]
        assert [sent.count(write.changes[0][1]) for write in writes] == [1, 2, 1]


@READS
def test_a_cluster_that_sends_us_to_and_fro_ends_at_the_deadline(read: Callable[..., list[bytes | None]]) -> None:
    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"CLUSTER":
            return array(array(b":0\r\n", b":16383\r\n", array(bulk(b"127.0.0.1"), b":%d\r\n" % fake.port)))
        return b"-MOVED 1 :%d\r\n" % fake.port

    with fake_redis(answer) as fake:
        error = refused(lambda: read(backend_of(fake, kind="redis_cluster", timeout=1.0)))
        assert 5 < fake.names.count(b"MGET") < 100
    assert "MOVED" in str(error)


@READS
def test_ask_is_followed_for_one_request_and_moved_from_then_on(read: Callable[..., list[bytes | None]]) -> None:
    def here(command: list[bytes]) -> bytes:
        if command[0] == b"CLUSTER":
            return array(array(b":0\r\n", b":16383\r\n", array(bulk(b"127.0.0.1"), b":%d\r\n" % fake.port)))
        return next(redirects) % other.port

    redirects = iter([b"-ASK 1 127.0.0.1:%d\r\n", b"-MOVED 1 127.0.0.1:%d\r\n"])
    with fake_redis(lambda command: b"+OK\r\n" if command == [b"ASKING"] else VALUE) as other, fake_redis(here) as fake:
        backend = backend_of(fake, kind="redis_cluster", timeout=AT_LAST)
        for _ in range(3):
            assert read(backend) == [b"value"]
        assert other.names == [b"ASKING", b"MGET", b"MGET", b"MGET"]
        assert fake.names == [b"CLUSTER", b"MGET", b"MGET"]


# -- what error answers mean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [get, get_async, apply])
@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"-NOPERM no\r\n", StoreDenied, "denies access (NOPERM no)"),
        (b"-NOAUTH who\r\n", StoreDenied, "denies access (NOAUTH who)"),
        (b"-ERR The user executing the script can't run this\r\n", StoreDenied, "denies access"),
        (b"-OOM no room\r\n", StoreFull, "is full (Redis' maxmemory is reached)"),
        (b"-ERR Error running script (call to f_1): @user_script:23: -OOM no room\r\n", StoreFull, "is full"),
        (b"-ERR ZOOM\r\n", StoreError, "refused a request: ERR ZOOM."),
        (b"-MISCONF no disk\r\n", StoreError, "refused a request: MISCONF no disk."),
        (b"-WRONGTYPE other\r\n", StoreError, "refused a request"),
    ],
)
def test_error_answers_are_told_apart_at_once(
    ask: Callable[[RedisBackend], Any], answer: bytes, kind: type[StoreError], text: str
) -> None:
    with fake_redis(lambda command: answer) as fake:
        error = refused(lambda: ask(backend_of(fake, timeout=60.0)))
    assert type(error) is kind
    assert text in str(error)
    assert f"127.0.0.1:{fake.port}" in str(error)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"-LOADING wait\r\n", "is still loading its data"),
        (b"-READONLY replica\r\n", "is a replica, which takes no writes"),
        (b"-CLUSTERDOWN slots\r\n", "cannot answer now (CLUSTERDOWN slots)"),
        (b"!not Redis\r\n", "answered what is no answer of Redis"),
    ],
)
def test_what_did_not_pass_in_time_is_told(answer: bytes, text: str) -> None:
    with fake_redis(lambda command: answer) as fake, ThreadPoolExecutor() as threads:
        asking = [
            threads.submit(refused, partial(ask, backend_of(fake, timeout=1.5))) for ask in (get, get_async, apply)
        ]
        for error in [one.result() for one in asking]:
            assert isinstance(error, StoreUnavailable)
            assert text in str(error)
            assert f"127.0.0.1:{fake.port}" in str(error)


@pytest.mark.parametrize("ask", [get, get_async, apply])
@pytest.mark.parametrize(
    ("kind", "answer", "text"),
    [
        ("redis", b"-MOVED 1 127.0.0.1:1\r\n", "it is a Cluster; set redis_type: redis_cluster"),
        ("redis_cluster", b"-ERR This instance has cluster support disabled\r\n", "is no Cluster; see redis_type"),
        ("redis_sentinel", b"-ERR unknown command `SENTINEL`, with args\r\n", "is no Sentinel; see redis_type"),
    ],
)
def test_a_server_of_another_kind_is_told_at_once(
    ask: Callable[[RedisBackend], Any], kind: str, answer: bytes, text: str
) -> None:
    with fake_redis(lambda command: answer) as fake, pytest.raises(ConfigError, match=text):
        ask(backend_of(fake, kind=kind, timeout=60.0))


@READS
def test_a_master_that_no_sentinel_knows_is_named(read: Callable[..., list[bytes | None]]) -> None:
    with fake_redis(lambda command: b"*-1\r\n") as fake:
        error = refused(lambda: read(backend_of(fake, kind="redis_sentinel")))
    assert "no Sentinel knows a master 'mymaster'" in str(error)
