"""Which node has the keys of a bucket: the one server, what Sentinels say is the master, or a Cluster's map of slots.

What is known is used until a request fails; whoever asks next learns it anew.
"""

from __future__ import annotations

import binascii
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import hiredis

from feature_store.errors import ConfigError
from feature_store.stores.online.redis.failures import Failure, NotNow, Overdue, Refused, Unreached, failure_of
from feature_store.stores.online.redis.packing import pack
from feature_store.stores.online.redis.settings import Address

_SLOTS = 16_384

#: How a node is asked one command: its address, the command, the deadline. Raises Failure; error answers are values.
Ask = Callable[[Address, bytes, float], Any]


class Topology(ABC):
    """The nodes of a store. `known` says whether what was learned can be relied on."""

    #: Whether there is nothing to learn.
    fixed = False

    def __init__(self) -> None:
        self.known = self.fixed
        self._learning = threading.Lock()
        self._doubted: Address | None = None

    @abstractmethod
    def node(self, tag: bytes) -> Address:
        """The node that has a bucket's keys, by its tag. Raises Failure where none is known to."""

    @abstractmethod
    def masters(self) -> list[Address]:
        """All nodes that have keys."""

    def learn(self, ask: Ask, deadline: float) -> None:
        """Learns the nodes anew, unless another thread has meanwhile. Raises Failure, ConfigError."""
        if not self._learning.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise Overdue("another thread was waited for")
        try:
            if not self.known:
                self._learn(ask, deadline)
                self.known = True
        finally:
            self._learning.release()

    def doubt(self, address: Address) -> None:
        """Notes that a node failed: another may have its place by now. Whoever asks next learns it."""
        self._doubted, self.known = address, self.fixed

    def moved(self, tag: bytes, address: Address) -> None:
        """Takes a node's word for it that another one has a bucket's keys."""
        raise ConfigError(
            f"Redis sends us to {address[0]}:{address[1]}: it is a Cluster; set redis_type: redis_cluster under "
            "online_store."
        )

    @abstractmethod
    def _learn(self, ask: Ask, deadline: float) -> None: ...


class Single(Topology):
    """One server, at the first of the addresses."""

    fixed = True

    def __init__(self, hosts: Sequence[Address]) -> None:
        super().__init__()
        self._host = hosts[0]

    def node(self, tag: bytes) -> Address:
        return self._host

    def masters(self) -> list[Address]:
        return [self._host]

    def _learn(self, ask: Ask, deadline: float) -> None:
        return


class Sentinels(Topology):
    """The master of a name that Sentinels watch."""

    def __init__(self, hosts: Sequence[Address], name: str) -> None:
        super().__init__()
        self._hosts, self._name = list(hosts), name
        self._master: Address | None = None

    def node(self, tag: bytes) -> Address:
        if self._master is None:
            raise Unreached("no Sentinel has named a master yet")
        return self._master

    def masters(self) -> list[Address]:
        return [self.node(b"")]

    def _learn(self, ask: Ask, deadline: float) -> None:
        # One that has just come up may not know the name, another one may.
        command = pack("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
        sentinel, answer = _first_answer(self._hosts, command, ask, deadline, lambda answer: answer is not None)
        if answer is None:
            raise NotNow(f"NOMASTER no Sentinel knows a master '{self._name}'; see sentinel_master under online_store")
        host, port = answer
        self._master = (host.decode(), int(port))
        # The one that answered is asked first from now on: those before it may be gone for good.
        self._hosts.remove(sentinel)
        self._hosts.insert(0, sentinel)


class Cluster(Topology):
    """The masters of a Cluster, each with its slots."""

    def __init__(self, hosts: Sequence[Address]) -> None:
        super().__init__()
        self._hosts = list(hosts)
        self._owners: dict[int, Address] = {}

    def node(self, tag: bytes) -> Address:
        try:
            return self._owners[_slot(tag)]
        except KeyError:
            raise NotNow(f"CLUSTERDOWN no node is known to serve slot {_slot(tag)}") from None

    def masters(self) -> list[Address]:
        return list(dict.fromkeys(self._owners.values()))

    def moved(self, tag: bytes, address: Address) -> None:
        self._owners[_slot(tag)] = address

    def _learn(self, ask: Ask, deadline: float) -> None:
        known = dict.fromkeys([*self.masters(), *self._hosts])
        seeds = sorted(known, key=lambda address: address == self._doubted)
        # A node that lost its others serves no slot: another one may know better.
        asked, ranges = _first_answer(seeds, pack("CLUSTER", "SLOTS"), ask, deadline, bool)
        owners: dict[int, Address] = {}
        for first, end, master, *_ in ranges:
            # Without a host a node means: where you reached me.
            address = ((master[0] or b"").decode() or asked[0], int(master[1]))
            owners |= dict.fromkeys(range(first, end + 1), address)
        self._owners = owners


@cache
def _slot(tag: bytes) -> int:
    """The slot of a bucket: CRC-16 of what stands between the braces of its tag."""
    return binascii.crc_hqx(tag[1:-1], 0) % _SLOTS


def _first_answer(
    addresses: Sequence[Address], command: bytes, ask: Ask, deadline: float, tells: Callable[[Any], bool]
) -> tuple[Address, Any]:
    """The first answer that tells something, with who gave it, else any. Raises the last failure where there is none.

    Each has its share of the time: one that does not answer must not keep us from the others.
    """
    failure: Failure = Unreached("there is nobody to ask")
    told: tuple[Address, Any] | None = None
    for place, address in enumerate(addresses):
        now = time.monotonic()
        try:
            answer = ask(address, command, now + max(deadline - now, 0) / (len(addresses) - place))
            if isinstance(answer, hiredis.ReplyError):
                raise _misplaced(address, str(answer))
        except Failure as failed:
            failure = failed
            continue
        told = address, answer
        if tells(answer):
            break
    if told is None:
        raise failure
    return told


def _misplaced(address: Address, text: str) -> Exception:
    """The failure that an error answer is, or ConfigError where the server is of another kind than was said."""
    failure = failure_of(text)
    if isinstance(failure, Refused) and ("cluster support disabled" in text or "unknown command" in text.lower()):
        kind = "no Sentinel" if "SENTINEL" in text.upper() else "no Cluster"
        return ConfigError(f"Redis at {address[0]}:{address[1]} is {kind}; see redis_type under online_store.")
    return failure
