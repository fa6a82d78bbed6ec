"""Redis that is full, evicts, or does not let us in: said at once, nothing half written, and mended without us."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from feature_store.config import OnlineConfig
from feature_store.errors import ConfigError, IsochronError, StoreDenied, StoreFull, StoreUnavailable
from feature_store.stores.online.appending import Position
from feature_store.stores.online.backend import Write
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.redis.backend import RedisBackend
from infra.redis import servers
from infra.redis.groups import SingleServer
from infra.redis.ports import HOST
from tests.properties.test_online_equals_reference import (
    NOON,
    Stream,
    at,
    compacting,
    counting,
    plain_table,
    plain_view,
    read_plain,
)
from tests.redis_fixtures import config_of

#: What fails at once must not take as long as what is waited for: the timeout of these requests, and "at once".
LONG, AT_ONCE = 60.0, 15.0
PASSWORD = "correct-horse"
KEY = b"{00}key"


def get(backend: RedisBackend) -> Any:
    return backend.get([KEY])


def get_async(backend: RedisBackend) -> Any:
    return asyncio.run(backend.get_async([KEY]))


def apply(backend: RedisBackend) -> Any:
    return backend.apply([Write([], [("S", KEY, b"v")])])


def scan(backend: RedisBackend) -> Any:
    return list(backend.scan(b""))


ASKED = pytest.mark.parametrize("ask", [get, get_async, apply, scan])


def refused(kind: type[IsochronError], ask: Callable[[], Any]) -> IsochronError:
    begun = time.monotonic()
    with pytest.raises(kind) as raised:
        ask()
    assert time.monotonic() - begun < AT_ONCE
    return raised.value


@pytest.fixture(scope="module")
def own() -> Iterator[SingleServer]:
    """One whose settings these tests change."""
    with servers.single() as server:
        yield server


@pytest.fixture
def server(own: SingleServer) -> Iterator[SingleServer]:
    """The same with its settings as they were at first, and nothing in it."""
    own.flush()
    yield own
    for name, value in (("maxmemory", 0), ("maxmemory-policy", "noeviction")):
        own.nodes[0].command("CONFIG", "SET", name, value)
    own.nodes[0].command("REPLICAOF", "NO", "ONE")


@pytest.fixture
def backend(server: SingleServer) -> Iterator[RedisBackend]:
    made = RedisBackend(config_of(server, LONG))
    yield made
    made.close()


# -- full -------------------------------------------------------------------------------------------------------------


def make_full(server: SingleServer) -> None:
    """Whatever is in it now is all that goes into it."""
    used = server.nodes[0].info()["used_memory"]
    server.nodes[0].command("CONFIG", "SET", "maxmemory", max(used // 2, 1_000_000))


def make_room(server: SingleServer) -> None:
    server.nodes[0].command("CONFIG", "SET", "maxmemory", 0)


def test_a_full_redis_is_told_and_goes_on_being_read(server: SingleServer, backend: RedisBackend) -> None:
    view = plain_view(["text"])
    online = PlainOnline(backend, "project", view)
    online.write(plain_table(view, [(1, NOON, None, {"text": "x"})]), NOON)
    make_full(server)
    row = (1, NOON + 1, None, {"text": "y" * 1_000})
    error = refused(StoreFull, lambda: online.write(plain_table(view, [row]), NOON + 1))
    assert "is full (Redis' maxmemory is reached)" in str(error)
    assert error.retryable
    assert read_plain(online, [(1, NOON + 1)]).values["text"].to_pylist() == ["x"]
    # Also one that has yet to connect, and to learn that Redis does not know the script.
    server.nodes[0].command("SCRIPT", "FLUSH")
    fresh = RedisBackend(config_of(server, LONG))
    assert read_plain(PlainOnline(fresh, "project", view), [(1, NOON + 1)]).values["text"].to_pylist() == ["x"]
    refused(StoreFull, lambda: apply(fresh))
    backend.delete(iter([KEY]))
    make_room(server)
    online.write(plain_table(view, [row]), NOON + 1)
    assert read_plain(online, [(1, NOON + 1)]).values["text"].to_pylist() == ["y" * 1_000]
    fresh.close()


def test_events_that_did_not_fit_are_not_half_there(server: SingleServer, backend: RedisBackend) -> None:
    """Redis gets full while events come in: of each customer the rows and the position they cover agree at any time."""
    customers = range(200)  # more than one call of the script can take
    stream = counting(backend)
    stream.bootstrap([])
    used = server.nodes[0].info()["used_memory"]
    server.nodes[0].command("CONFIG", "SET", "maxmemory", used + 150_000)
    acknowledged = refusals = 0
    with compacting(5):
        while refusals < 3:
            rows = [at(NOON - 1 + acknowledged, customer, customer) for customer in customers]
            try:
                stream.offer(rows, Position(0, acknowledged * len(rows)))
                acknowledged += 1
            except StoreFull:
                refusals += 1
                agree(stream, customers, acknowledged)
            if refusals == 2:
                make_room(server)
                stream.offer(rows, Position(0, acknowledged * len(rows)))
                acknowledged += 1
                agree(stream, customers, acknowledged)
                break
    assert acknowledged > 1
    assert {count for count, _ in state(stream, customers)} == {acknowledged}


def state(stream: Stream, customers: range) -> list[tuple[int, int]]:
    """Per customer how many events are counted, and how many its bucket says it has folded of the log."""
    read = stream.read([((customer,), NOON + 3_600_000_000) for customer in customers])
    folded = [positions.get(0, (0, 0))[1] for positions in read.positions]
    return list(zip(read.values["all"].to_pylist(), folded, strict=True))


def agree(stream: Stream, customers: range, acknowledged: int) -> None:
    """Every customer has one event in each batch: those of the batches that its bucket says it has folded."""
    for counted, folded in state(stream, customers):
        assert folded % len(customers) == 0
        assert counted == folded // len(customers)
        assert counted in (acknowledged, acknowledged + 1)


def test_a_bootstrap_that_does_not_fit_leaves_what_was_there(server: SingleServer, backend: RedisBackend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1)])
    make_full(server)
    refused(StoreFull, lambda: stream.bootstrap([at(NOON - i) for i in range(1, 6)]))
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [1]
    make_room(server)
    stream.bootstrap([at(NOON - i) for i in range(1, 6)])
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [5]


@ASKED
def test_a_policy_that_throws_values_away_is_refused_at_first_use(
    server: SingleServer, ask: Callable[[RedisBackend], Any]
) -> None:
    node = server.nodes[0]
    node.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    backend = RedisBackend(config_of(server, LONG))
    error = refused(ConfigError, lambda: ask(backend))
    assert "maxmemory-policy allkeys-lru and would throw features away" in str(error)
    assert "set maxmemory-policy noeviction" in str(error)
    for policy in ("volatile-lru", "noeviction"):
        node.command("CONFIG", "SET", "maxmemory-policy", policy)
        ask(backend)
    backend.close()


# -- not let in -------------------------------------------------------------------------------------------------------


def as_user(server: SingleServer, password: str, user: str = "app") -> RedisBackend:
    text = f"{HOST}:{server.port},username={user},password={password}"
    return RedisBackend(OnlineConfig("redis", connection_string=text, timeout=LONG))


def allow(server: SingleServer, *rights: str) -> None:
    server.nodes[0].command("ACL", "SETUSER", "app", "reset", "on", f">{PASSWORD}", *rights)


@ASKED
def test_a_wrong_password_is_told_at_once_and_shown_nowhere(
    server: SingleServer, ask: Callable[[RedisBackend], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    allow(server, "~*", "+@all")
    backend = as_user(server, "wrong-battery")
    error = refused(StoreDenied, lambda: ask(backend))
    assert "WRONGPASS" in str(error)
    assert "check username and password in connection_string" in str(error)
    assert not error.retryable
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(backend) + caplog.text
    assert "wrong-battery" not in shown
    # Whoever looks after Redis mends it: no new store is needed.
    server.nodes[0].command("ACL", "SETUSER", "app", ">wrong-battery")
    ask(backend)
    backend.close()


@ASKED
def test_rights_that_are_missing_are_told_at_once(server: SingleServer, ask: Callable[[RedisBackend], Any]) -> None:
    allow(server, "~*", "+auth", "+info")
    backend = as_user(server, PASSWORD)
    error = refused(StoreDenied, lambda: ask(backend))
    assert "NOPERM" in str(error)
    assert PASSWORD not in str(error)
    server.nodes[0].command("ACL", "SETUSER", "app", "+@all")
    ask(backend)
    backend.close()


def test_a_user_who_may_not_run_what_the_script_runs_is_denied(server: SingleServer) -> None:
    allow(server, "~*", "+@all", "-set")
    backend = as_user(server, PASSWORD)
    refused(StoreDenied, lambda: apply(backend))
    assert get(backend) == [None]
    backend.close()


def test_keys_that_a_user_may_not_read_are_denied_and_not_taken_for_missing(server: SingleServer) -> None:
    allow(server, "~{01}*", "+@all")
    backend = as_user(server, PASSWORD)
    for ask in (get, get_async):
        refused(StoreDenied, lambda ask=ask: ask(backend))
    assert backend.get([b"{01}key"]) == [None]
    backend.close()


def test_a_user_who_may_not_ask_for_info_is_let_in_and_told_once(
    server: SingleServer, caplog: pytest.LogCaptureFixture
) -> None:
    allow(server, "~*", "+@all", "-info")
    backend = as_user(server, PASSWORD)
    assert get(backend) == get_async(backend) == [None]
    assert list(backend.scan(b"")) == []
    assert caplog.text.count("maxmemory-policy is unchecked") == 1
    backend.close()


def test_rights_that_are_taken_away_while_connected_are_missed_at_once(server: SingleServer) -> None:
    allow(server, "~*", "+@all")
    backend = as_user(server, PASSWORD)
    apply(backend)
    server.nodes[0].command("ACL", "DELUSER", "app")
    refused(StoreDenied, lambda: get(backend))
    allow(server, "~*", "+@all")
    assert get(backend) == get_async(backend) == [b"v"]
    backend.close()


# -- TLS --------------------------------------------------------------------------------------------------------------


@ASKED
@pytest.mark.parametrize(
    ("replaced", "by", "text"),
    [
        ("ssl_ca_certs", None, "self-signed certificate|unable to get local issuer certificate"),
        ("ssl", "false", "cannot be reached"),
    ],
)
def test_a_server_that_cannot_be_trusted_or_is_spoken_to_wrongly(
    redis_tls: SingleServer, ask: Callable[[RedisBackend], Any], replaced: str, by: str | None, text: str
) -> None:
    parts = [part for part in redis_tls.connection_string.split(",") if not part.startswith(f"{replaced}=")]
    config = OnlineConfig(
        "redis", connection_string=",".join([*parts, *([f"{replaced}={by}"] if by else [])]), timeout=1.0
    )
    error = refused(StoreUnavailable, lambda: ask(RedisBackend(config)))
    assert any(piece in str(error) for piece in text.split("|")), error
    assert redis_tls.options["password"] not in str(error)


@ASKED
def test_tls_spoken_to_a_server_that_does_not(server: SingleServer, ask: Callable[[RedisBackend], Any]) -> None:
    config = OnlineConfig("redis", connection_string=f"{HOST}:{server.port},ssl=true", timeout=1.0)
    refused(StoreUnavailable, lambda: ask(RedisBackend(config)))


# -- a replica --------------------------------------------------------------------------------------------------------


def test_a_replica_is_read_and_refuses_writes_until_it_is_a_master_again(server: SingleServer) -> None:
    backend = RedisBackend(config_of(server, 0.5))
    apply(backend)
    node = server.nodes[0]
    node.command("REPLICAOF", HOST, 1)  # nobody is there: it keeps what it has
    error = refused(StoreUnavailable, lambda: backend.apply([Write([], [("S", KEY, b"new")])]))
    assert "is a replica, which takes no writes" in str(error)
    assert get(backend) == get_async(backend) == [b"v"]
    node.command("REPLICAOF", "NO", "ONE")
    backend.apply([Write([], [("S", KEY, b"new")])])
    assert get(backend) == get_async(backend) == [b"new"]
    backend.close()
