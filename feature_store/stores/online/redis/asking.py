"""Requests that wait for their answers: sent to the nodes that have the keys, and again while that may help."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import hiredis

from feature_store.stores.online.redis.blocking import BlockingConnection, Pool
from feature_store.stores.online.redis.calls import Batch, Call, node_of
from feature_store.stores.online.redis.failures import Failure, worse
from feature_store.stores.online.redis.patience import Patience
from feature_store.stores.online.redis.settings import Address
from feature_store.stores.online.redis.site import Site
from feature_store.stores.online.redis.topology import Topology

#: Bytes that are gathered for a node before they are sent: fewer would cost more, more would keep Redis waiting.
_GATHERED = 1 << 16


class _Exchange:
    """What goes on with one node in one round: it ends with the first failure of the node."""

    __slots__ = ("batch", "connection", "failure", "pool")

    def __init__(self, node: Address, pool: Pool) -> None:
        self.batch, self.pool = Batch(node), pool
        self.connection: BlockingConnection | None = None
        self.failure: Failure | None = None

    def send(self, deadline: float) -> None:
        """Sends what was gathered."""
        if self.failure is None and self.batch.size:
            try:
                if self.connection is None:
                    self.connection = self.pool.take(deadline)
                data, count = self.batch.unsent()
                self.connection.send(data, count, deadline)
            except Failure as failure:
                self.failure = failure

    def receive(self, topology: Topology, deadline: float) -> None:
        """Waits for all answers. Those before a failure count: what they answer is not asked again."""
        if self.failure is None and self.connection is not None:
            answers: list[Any] = []
            try:
                self.connection.receive(answers, deadline)
            except Failure as failure:
                self.failure = failure
            self.failure = worse(self.failure, self.batch.take(answers, topology))

    def end(self) -> None:
        if self.connection is not None:
            self.pool.give(self.connection)


class Asking:
    """The requests of all threads to one store."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._limited = "max_connections" in site.connection.options
        self._lock = threading.Lock()
        self._pools: dict[Address, Pool] = {}

    def carry_out(self, calls: Iterable[Call], once: bool = False) -> list[Call]:
        """Has every call answered, tried again until the deadline where a failure may pass. Raises StoreError.

        Calls are sent while the next are made. One is sent again only if it has no answer; with `once` only if no node
        can have done it.
        """
        patience = Patience(self._site.timeout)
        made: list[Call] = []
        failure = self._round(_noted(calls, made), patience.deadline)
        while failure is not None:
            if once and any(call.open and call.sent for call in made):
                raise self._site.refusal(failure) from failure
            failure = self._again(made, failure, patience)
        return made

    def answer(self, call: Call) -> Any:
        """The answer to one call, and the same otherwise: most reads are one, and what several need would be felt."""
        patience = Patience(self._site.timeout)
        failure = self._alone(call, patience.deadline)
        while failure is not None:
            failure = self._again([call], failure, patience)
        return call.answer

    def learn(self, deadline: float) -> None:
        """Learns which node has what, unless it is known. Raises Failure, ConfigError."""
        if not self._site.topology.known:
            ask = self._ask_sentinel if self._site.watched else self._ask_node
            self._site.topology.learn(ask, deadline)
            self._leave(self._pools.keys() - set(self._site.topology.masters()))

    def ask(self, node: Address, command: bytes, deadline: float) -> tuple[Any, str]:
        """A node's answer to one command, and the run id of its server. Raises Failure, ConfigError."""
        pool = self._pool(node)
        try:
            connection = pool.take(deadline)
            try:
                (answer,) = connection.ask(command, 1, deadline)
            finally:
                pool.give(connection)
        except Failure as failure:
            self._site.doubted(node, failure)
            raise
        return answer, connection.run_id

    def close(self) -> None:
        """Closes all connections; those in use when they are given back."""
        self._leave(list(self._pools))

    def _leave(self, nodes: Iterable[Address]) -> None:
        with self._lock:
            left = [self._pools.pop(node) for node in nodes if node in self._pools]
        for pool in left:
            pool.close()

    def _again(self, calls: Sequence[Call], failure: Failure, patience: Patience) -> Failure | None:
        time.sleep(self._site.pause(patience, failure))
        return self._round([call for call in calls if call.open], patience.deadline)

    def _alone(self, call: Call, deadline: float) -> Failure | None:
        topology = self._site.topology
        if not topology.known:
            return self._round([call], deadline)
        try:
            answer, _ = self.ask(topology.node(call.tag), call.data, deadline)
        except Failure as failure:
            return failure
        if isinstance(answer, hiredis.ReplyError):
            return self._round([call], deadline)  # which knows what to do about it
        call.answer = answer
        return None

    def _round(self, calls: Iterable[Call], deadline: float) -> Failure | None:
        """Sends calls to their nodes, all of them before it waits; the failure that decides where one has no answer."""
        under_way: dict[Address, _Exchange] = {}
        try:
            failure = self._send(calls, under_way, deadline)
            for exchange in under_way.values():
                exchange.receive(self._site.topology, deadline)
        finally:
            for exchange in under_way.values():
                exchange.end()
        for node, exchange in under_way.items():
            if exchange.failure is not None:
                failure = worse(failure, self._site.doubted(node, exchange.failure))
        return failure

    def _send(self, calls: Iterable[Call], under_way: dict[Address, _Exchange], deadline: float) -> Failure | None:
        """The failure that keeps a call from being sent anywhere; it keeps those after it too."""
        failure: Failure | None = None
        for call in calls:
            if failure is None:
                try:
                    exchange = self._exchange(call, under_way, deadline)
                except Failure as failed:
                    failure = failed
                else:
                    exchange.batch.add(call)
                    if exchange.batch.size > _GATHERED and not self._limited:
                        exchange.send(deadline)
        # In one order for all: where connections are limited, threads that hold some wait for others.
        for node in sorted(under_way):
            under_way[node].send(deadline)
        return failure

    def _exchange(self, call: Call, under_way: dict[Address, _Exchange], deadline: float) -> _Exchange:
        self.learn(deadline)
        node = node_of(call, self._site.topology)
        if node not in under_way:
            under_way[node] = _Exchange(node, self._pool(node))
        return under_way[node]

    def _ask_node(self, node: Address, command: bytes, deadline: float) -> Any:
        return self.ask(node, command, deadline)[0]

    def _ask_sentinel(self, sentinel: Address, command: bytes, deadline: float) -> Any:
        """Asks a Sentinel, which is not told the password of what it watches."""
        connection = BlockingConnection(sentinel, self._site.connection, deadline)
        try:
            return connection.ask(command, 1, deadline)[0]
        finally:
            connection.close()

    def _pool(self, node: Address) -> Pool:
        found = self._pools.get(node)
        if found is None:
            with self._lock:
                found = self._pools.setdefault(node, self._new_pool(node))
        return found

    def _new_pool(self, node: Address) -> Pool:
        site = self._site
        return Pool(
            lambda deadline: BlockingConnection.greeted(node, site.greeting, deadline),
            site.connection.options.get("max_connections"),
        )


def _noted(calls: Iterable[Call], made: list[Call]) -> Iterator[Call]:
    """Calls, each noted when it is made."""
    for call in calls:
        made.append(call)
        yield call
