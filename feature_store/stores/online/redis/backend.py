"""The online store in Redis: many keys in one round trip, writes by one script, the same errors as every backend."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import hiredis
import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster, key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel

from feature_store.config import OnlineConfig
from feature_store.errors import ConfigError
from feature_store.stores.online.backend import Write
from feature_store.stores.online.keys import TAG_LENGTH
from feature_store.stores.online.redis.failures import FINAL, PASSING, refusal
from feature_store.stores.online.redis.packing import mget
from feature_store.stores.online.redis.pipelined import PipelinedConnection
from feature_store.stores.online.redis.script import SCRIPT, call_of, calls, results_of
from feature_store.stores.online.redis.settings import Connection

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Seconds before the first new try, doubled up to the longest.
_FIRST_DELAY, _LONGEST_DELAY = 0.005, 0.2

#: Keys that a scan asks for at once, and that are deleted at once.
_SCANNED, _DELETED = 1_000, 500

#: The only policy under which Redis does not throw values away by itself.
_POLICY = "noeviction"


class RedisBackend:
    """A Redis server, what Sentinels say is the master, or a Cluster. Connects when it is first used.

    Every request ends within `config.timeout`, in an answer or a StoreError: what may pass by itself is tried again
    until then.
    """

    together = False

    @property
    def one_place(self) -> bool:
        """A script of a Cluster sees one bucket only."""
        return not self._clustered

    def __init__(self, config: OnlineConfig) -> None:
        self._config = config
        self._connection = Connection.parse(config.connection_string)
        self._clustered = config.redis_type == "redis_cluster"
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = os.getpid()
        self._sha = ""
        self._held = threading.local()
        self._slots: dict[bytes, int] = {}
        self._open: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], Any]]
        self._open = weakref.WeakKeyDictionary()

    @property
    def where(self) -> str:
        """The hosts, for messages."""
        return self._connection.where

    def exists(self) -> bool:
        return True

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys in one round trip; on a Cluster in one a node."""
        if not keys:
            return []
        if self._clustered:
            return self._try(lambda client: self._mget_by_bucket(client, keys))
        (answer,) = self._try(lambda client: self._converse(client, [mget(keys)]))
        if isinstance(answer, Exception):
            raise refusal(self.where, answer, self._config.timeout) from answer
        return answer

    def _converse(self, client: redis.Redis, commands: Iterable[bytes]) -> list[Any]:
        """The answers to packed commands, errors among them, on a connection that this thread keeps.

        Each is sent as soon as it is there, so that Redis works on one while the next is put together. redis-py's own
        way takes a connection out of its pool and puts it back, which costs as much as the rest; with Sentinels the
        pool is asked each time, for it notices a new master.
        """
        pool = client.connection_pool
        held = getattr(self._held, "connection", None)
        if held is None or held[0] is not pool:
            held = (pool, pool.get_connection())
        self._held.connection = None
        try:
            sent = 0
            for command in commands:
                held[1].send_packed_command([command])
                sent += 1
            answers = [_answer(held[1]) for _ in range(sent)]
        except BaseException:
            # Its answers may still come: nobody may take them for those of other questions.
            held[1].disconnect()
            pool.release(held[1])
            raise
        if self._config.redis_type == "redis":
            self._held.connection = held
        else:
            pool.release(held[1])
        return answers

    def _mget_by_bucket(self, client: RedisCluster, keys: Sequence[bytes]) -> list[bytes | None]:
        groups = _by_bucket(keys)
        pipe = client.pipeline()
        for places in groups.values():
            pipe.execute_command("MGET", *[keys[place] for place in places])
        found: list[bytes | None] = [None] * len(keys)
        for places, values in zip(groups.values(), pipe.execute(), strict=True):
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    async def get_async(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The same on the loop's own connections; where they meet with anything unusual, in a thread."""
        if not keys:
            return []
        try:
            if self._clustered:
                return await self._ask_nodes(keys)
            connection = await self._connection_to(*self._node(None))
            answer = await connection.send(mget(keys))
            if isinstance(answer, list):
                return answer
        except exceptions.TimeoutError as error:
            # The time is used up: a thread would only wait once more.
            raise refusal(self.where, error, self._config.timeout) from error
        except (*PASSING, redis.RedisError) as error:
            logger.debug("the loop's connection to %s failed (%s); asking in a thread", self.where, error)
        return await asyncio.to_thread(self.get, keys)

    async def _ask_nodes(self, keys: Sequence[bytes]) -> list[bytes | None]:
        groups = _by_bucket(keys)
        asked = []
        for tag, places in groups.items():
            connection = await self._connection_to(*self._node(tag))
            asked.append(connection.send(mget([keys[place] for place in places])))
        found: list[bytes | None] = [None] * len(keys)
        for places, values in zip(groups.values(), await asyncio.gather(*asked), strict=True):
            if not isinstance(values, list):
                raise exceptions.ResponseError(str(values))
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def _node(self, tag: bytes | None) -> tuple[str, int]:
        """Where a bucket's keys lie now, as far as the client knows."""
        client = self._client
        if client is None or self._process != os.getpid():
            raise exceptions.ConnectionError("not connected yet")
        if tag is not None:
            if tag not in self._slots:
                self._slots[tag] = key_slot(tag)
            node = client.nodes_manager.get_node_from_slot(self._slots[tag])
            return node.host, node.port
        if self._config.redis_type == "redis_sentinel":
            address = client.connection_pool.master_address
            if address is None:
                raise exceptions.ConnectionError("no master known yet")
            return address
        return self._connection.hosts[0]

    async def _connection_to(self, host: str, port: int) -> PipelinedConnection:
        loop = asyncio.get_running_loop()
        mine = self._open.setdefault(loop, {})
        found = mine.get((host, port))
        if isinstance(found, PipelinedConnection) and not found.closed:
            return found
        if not isinstance(found, asyncio.Future) or found.done():
            # One task connects; who comes meanwhile waits for it.
            found = mine[host, port] = loop.create_task(
                PipelinedConnection.open(host, port, self._connection, self._config.timeout)
            )
        try:
            made = await asyncio.shield(found)
        except BaseException:
            mine.pop((host, port), None)
            raise
        mine[host, port] = made
        return made

    # -- writing ------------------------------------------------------------------------------------------------

    def apply(self, writes: Sequence[Write], once: bool = False) -> list[list[int] | None]:
        """Applies writes, each for itself, with one script. `once` never sends anything a second time."""
        if not writes:
            return []
        run = self._run_on_cluster if self._clustered else self._run
        return results_of(self._try(lambda client: run(client, writes), again=not once))

    def _run(self, client: redis.Redis, writes: Sequence[Write]) -> list[Any]:
        groups = list(calls(writes, alone=False))
        answers = self._converse(client, (self._call(some) for some in groups))
        for i, answer in enumerate(answers):
            if isinstance(answer, exceptions.NoScriptError):
                keys, arguments = call_of(groups[i])
                answers[i] = client.eval(SCRIPT, len(keys), *keys, *arguments)
            elif isinstance(answer, Exception):
                raise answer
        return answers

    def _call(self, writes: Sequence[Write]) -> bytes:
        keys, arguments = call_of(writes)
        return hiredis.pack_command(("EVALSHA", self._sha, len(keys), *keys, *arguments))  # type: ignore[arg-type]

    def _run_on_cluster(self, client: RedisCluster, writes: Sequence[Write]) -> list[Any]:
        groups = [call_of(some) for some in calls(writes, alone=True)]
        pipe = client.pipeline()
        for keys, arguments in groups:
            pipe.evalsha(self._sha, len(keys), *keys, *arguments)
        answers = pipe.execute(raise_on_error=False)
        for i, answer in enumerate(answers):
            if isinstance(answer, exceptions.NoScriptError):
                keys, arguments = groups[i]
                answers[i] = client.eval(SCRIPT, len(keys), *keys, *arguments)
            elif isinstance(answer, Exception):
                raise answer
        return answers

    def scan(self, tail: bytes) -> Iterator[bytes]:
        """The keys whose tails start with these bytes, each at least once. Looks at every key there is."""
        pattern = b"?" * TAG_LENGTH + _literal(tail) + b"*"
        for node in self._try(self._masters):
            cursor = 0
            while True:
                cursor, keys = self._try(partial(_scan, node, cursor, pattern))
                yield from keys
                if cursor == 0:
                    break

    def _masters(self, client: Any) -> list[Any]:
        if not self._clustered:
            return [client]
        return [client.get_redis_connection(node) for node in client.get_primaries()]

    def delete(self, keys: Iterator[bytes]) -> None:
        """Deletes keys, some hundreds at a time."""
        remaining = iter(keys)
        while some := list(itertools.islice(remaining, _DELETED)):
            self._try(partial(self._unlink, some))

    def _unlink(self, keys: Sequence[bytes], client: Any) -> None:
        if not self._clustered:
            client.unlink(*keys)
            return
        pipe = client.pipeline()
        for places in _by_bucket(keys).values():
            pipe.execute_command("UNLINK", *[keys[place] for place in places])
        pipe.execute()

    def close(self) -> None:
        """Closes the connections of this process; the next request connects anew."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._process == os.getpid():
            client.close()
        for mine in list(self._open.values()):
            for made in list(mine.values()):
                if isinstance(made, PipelinedConnection):
                    made.close()
        self._open.clear()

    # -- connections --------------------------------------------------------------------------------------------

    def _try(self, ask: Callable[[Any], Result], again: bool = True) -> Result:
        """What a client answers, tried again until the deadline where the failure may pass. Raises StoreError."""
        deadline, delay = time.monotonic() + self._config.timeout, _FIRST_DELAY
        while True:
            try:
                return ask(self._connected())
            except FINAL as error:
                raise refusal(self.where, error, self._config.timeout) from error
            except PASSING as error:
                self._forget_topology()
                # A request that was waited for has used its time; what failed at once may work in a moment.
                if not again or time.monotonic() + delay >= deadline:
                    raise refusal(self.where, error, self._config.timeout) from error
                time.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
            except redis.RedisError as error:
                raise refusal(self.where, error, self._config.timeout) from error

    def _forget_topology(self) -> None:
        """Lets go of pooled connections: after a failover they lead to the wrong server."""
        client = self._client
        if client is not None and not self._clustered:
            client.connection_pool.disconnect(inuse_connections=False)

    def _connected(self) -> Any:
        if self._client is not None and self._process == os.getpid():
            return self._client
        with self._lock:
            if self._client is None or self._process != os.getpid():
                client = self._connect()
                self._check_policy(client)
                self._sha = client.script_load(SCRIPT)
                self._client, self._process = client, os.getpid()
                self._open = weakref.WeakKeyDictionary()
            return self._client

    def _connect(self) -> Any:
        options = {
            **self._connection.options,
            "socket_timeout": self._config.timeout,
            "socket_connect_timeout": self._config.timeout,
            "socket_keepalive": True,
            # Trying again is our matter: it must end at the deadline.
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        hosts = self._connection.hosts
        if self._config.redis_type == "redis_sentinel":
            sentinel = Sentinel(list(hosts), sentinel_kwargs=_sentinel_options(options), **options)
            return sentinel.master_for(self._config.sentinel_master)
        if self._clustered:
            options.pop("db", None)
            nodes = [ClusterNode(host, port) for host, port in hosts]
            return RedisCluster(startup_nodes=nodes, require_full_coverage=True, **options)
        host, port = hosts[0]
        return redis.Redis(host=host, port=port, **options)

    def _check_policy(self, client: Any) -> None:
        """Refuses a server that throws values away when it is full: a lost value would be read as none."""
        for node in self._masters(client):
            try:
                policy = node.info("memory").get("maxmemory_policy", _POLICY)
            except exceptions.NoPermissionError:
                logger.warning("the user may not ask Redis at %s for its maxmemory-policy: unchecked", self.where)
                continue
            if policy != _POLICY:
                raise ConfigError(
                    f"Redis at {self.where} has maxmemory-policy {policy} and would throw features away when it is "
                    f"full; set maxmemory-policy {_POLICY}."
                )


def _answer(connection: Any) -> Any:
    """The next answer, an error that Redis gives as a value: others may follow it."""
    try:
        return connection.read_response()
    except exceptions.ResponseError as error:
        return error


def _scan(node: Any, cursor: int, pattern: bytes, _: Any) -> tuple[int, list[bytes]]:
    return node.scan(cursor, match=pattern, count=_SCANNED)


def _sentinel_options(options: dict[str, Any]) -> dict[str, Any]:
    """How Sentinels are spoken to: without the password and the database of the server they watch."""
    return {name: value for name, value in options.items() if name not in ("db", "username", "password")}


def _by_bucket(keys: Sequence[bytes]) -> dict[bytes, list[int]]:
    """The places of keys by their hash tag."""
    groups: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key[:TAG_LENGTH], []).append(place)
    return groups


def _literal(text: bytes) -> bytes:
    """A pattern that matches these bytes and nothing else."""
    special = rb"*?[]\^-"
    return b"".join(b"\\" + bytes([byte]) if byte in special else bytes([byte]) for byte in text)
