"""Servers that together are one Redis to a client: a single one, a Cluster, a master with a replica and Sentinels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.sentinel import Sentinel

from infra.redis.node import PATIENCE, Node, ServerNotStarted
from infra.redis.ports import HOST
from infra.redis.waiting import comes_true

MASTER_NAME = "isochron"
_SLOTS = 16_384


class RedisServers:
    """Running servers that together are one Redis to a client.

    `nodes` are their processes: to kill, pause or restart one of several, do it to that node. `redis_type` and
    `sentinel_master` are what Feast's configuration calls so; `sentinel_master` is None where there is no Sentinel.
    """

    redis_type = "redis"
    sentinel_master: str | None = None

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)

    @property
    def ports(self) -> tuple[int, ...]:
        """Those that a client is told."""
        return tuple(node.port for node in self.nodes)

    @property
    def port(self) -> int:
        """The first of them."""
        return self.ports[0]

    @property
    def connection_string(self) -> str:
        """Addresses and options as Feast's configuration writes them."""
        return ",".join(f"{HOST}:{port}" for port in self.ports)

    def client(self, **options: Any) -> Any:
        """A redis-py client as a user has it, with redis-py's own retries; `options` go to redis-py. Close it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Deletes all keys."""
        for node in self._masters():
            node.command("FLUSHALL")

    def kill(self) -> None:
        """Ends all processes at once, as a crash would (SIGKILL)."""
        for node in self.nodes:
            node.kill()

    def restart(self) -> None:
        """Ends all in good order and starts them at their ports, with the data they keep. Raises ServerNotStarted."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """All processes stand still (SIGSTOP): their ports take connections, nothing answers."""
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        """All processes go on (SIGCONT)."""
        for node in self.nodes:
            node.resume()

    def start(self) -> None:
        """Starts those that do not run, with their data; returns when all are one, as a client needs them.

        Raises ServerNotStarted, and leaves none behind then.
        """
        try:
            self._bring_up()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ends all in good order."""
        for node in self.nodes:
            node.ask_to_end()
        for node in self.nodes:
            node.stop()

    def _masters(self) -> Sequence[Node]:
        return self.nodes

    def _bring_up(self) -> None:
        _start_together(self.nodes)


class SingleServer(RedisServers):
    """One server. `options` are what a client needs beside the address, by redis-py's names."""

    def __init__(self, node: Node, options: Mapping[str, Any] | None = None) -> None:
        super().__init__([node])
        self.options = dict(options or {})

    @property
    def connection_string(self) -> str:
        written = (f"{name}={'true' if value is True else value}" for name, value in self.options.items())
        return ",".join((super().connection_string, *written))

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(HOST, self.port, **{**self.options, **options})


class Cluster(RedisServers):
    """Three masters that share all slots; no replicas."""

    redis_type = "redis_cluster"

    def __init__(self, nodes: Sequence[Node], bus_ports: Sequence[int]) -> None:
        super().__init__(nodes)
        self._bus_ports = tuple(bus_ports)

    def client(self, **options: Any) -> RedisCluster:
        return RedisCluster(startup_nodes=[ClusterNode(HOST, port) for port in self.ports], **options)

    def _bring_up(self) -> None:
        super()._bring_up()
        if all("cluster_slots_assigned:0" in _cluster_info(node) for node in self.nodes):
            self._share_slots()
        # Also when they have met before: with the same data they may have other ports now. Each with each: by hearsay
        # alone it takes seconds.
        for node in self.nodes:
            for port, bus_port in zip(self.ports, self._bus_ports, strict=True):
                if port != node.port:
                    node.command("CLUSTER", "MEET", HOST, port, bus_port)
        _wait(lambda: all(map(self._sees_all, self.nodes)), "Redis Cluster", self.nodes)

    def _share_slots(self) -> None:
        for place, node in enumerate(self.nodes):
            # Different epochs from the start: nodes that meet with the same one first settle who changes it.
            node.command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
            first, end = (_SLOTS * number // len(self.nodes) for number in (place, place + 1))
            node.command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)

    def _sees_all(self, node: Node) -> bool:
        """Whether it has links to all others at their ports of today, and every slot has an owner that is up."""
        seen = str(node.command("CLUSTER", "NODES"))
        linked = "disconnected" not in seen and all(f"{HOST}:{port}@" in seen for port in self.ports)
        return linked and "cluster_state:ok" in _cluster_info(node)


class SentinelServers(RedisServers):
    """A master and a replica (`data`), watched by `sentinels`; clients are told the Sentinels' ports only."""

    redis_type = "redis_sentinel"
    sentinel_master = MASTER_NAME

    def __init__(self, data: Sequence[Node], sentinels: Sequence[Node]) -> None:
        super().__init__([*sentinels, *data])
        self.data, self.sentinels = tuple(data), tuple(sentinels)

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(node.port for node in self.sentinels)

    @property
    def master(self) -> Node:
        """The one that the first Sentinel tells clients is the master. Raises redis.RedisError if that one is down."""
        port = self._state(self.sentinels[0])["port"]
        return next(node for node in self.data if node.port == port)

    @property
    def replica(self) -> Node:
        """The other one."""
        master = self.master
        return next(node for node in self.data if node is not master)

    def client(self, **options: Any) -> redis.Redis:
        """A client of whichever server is the master."""
        return Sentinel([(HOST, port) for port in self.ports], **options).master_for(MASTER_NAME)

    def _masters(self) -> Sequence[Node]:
        return [self.master]

    def _bring_up(self) -> None:
        _start_together(self.data)
        # A Sentinel asks for replicas when it starts, and then only every ten seconds: have them up before.
        _wait(lambda: all(map(_is_in_step, self.data)), "Redis with a replica", self.data)
        _start_together(self.sentinels)
        _wait(self._is_whole, "Redis Sentinel", self.nodes)

    def _is_whole(self) -> bool:
        """Whether every Sentinel knows all others, and the one that is not the master follows it."""
        replica = self.replica
        return all(map(self._knows_all, self.sentinels)) and replica.info()["role"] == "slave" and _is_in_step(replica)

    def _knows_all(self, sentinel: Node) -> bool:
        state = self._state(sentinel)
        return state["num-slaves"] == 1 and state["num-other-sentinels"] == len(self.sentinels) - 1

    def _state(self, sentinel: Node) -> Mapping[str, Any]:
        with closing(sentinel.connect()) as client:
            return client.sentinel_master(MASTER_NAME)


def _start_together(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.launch()
    for node in nodes:
        node.wait_ready()


def _cluster_info(node: Node) -> str:
    return str(node.command("CLUSTER", "INFO"))


def _is_in_step(node: Node) -> bool:
    """Whether it follows no one, or has all that its master has."""
    return node.info().get("master_link_status", "up") == "up"


def _wait(is_whole: Callable[[], bool], servers: str, nodes: Sequence[Node]) -> None:
    if not comes_true(is_whole, PATIENCE):
        logs = "\n".join(f"{node}:\n{node.log()}" for node in nodes)
        raise ServerNotStarted(servers, f"was not whole within {PATIENCE:g} s", logs)
