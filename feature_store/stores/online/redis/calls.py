"""Requests under way: which command goes to which node, and what the answers of a node mean for each.

Nothing here waits for anything: blocking and asynchronous connections share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import hiredis

from feature_store.stores.online.redis.failures import Failure, Redo, casts_doubt, failure_of, worse
from feature_store.stores.online.redis.packing import pack
from feature_store.stores.online.redis.script import SCRIPT
from feature_store.stores.online.redis.settings import Address
from feature_store.stores.online.redis.topology import Topology

#: No answer yet.
_NONE = object()

_LOAD = pack("SCRIPT", "LOAD", SCRIPT)
_ASKING = pack("ASKING")


class Call:
    """One packed command for the node that has the bucket with this tag.

    `sent` says whether a node may have carried it out, or may do so yet. `asking` is the node that was named for this
    once, `loading` whether the script has to be sent ahead.
    """

    __slots__ = ("answer", "asking", "data", "loading", "sent", "tag")

    def __init__(self, tag: bytes, data: bytes) -> None:
        self.tag, self.data = tag, data
        self.answer: Any = _NONE
        self.sent = self.loading = False
        self.asking: Address | None = None

    @property
    def open(self) -> bool:
        return self.answer is _NONE


class Batch:
    """Calls that go to one node, as they come, and what is to be sent of them."""

    __slots__ = ("_loaded", "_parts", "_places", "_sent", "address", "size")

    def __init__(self, address: Address) -> None:
        self.address = address
        #: Bytes that are still to be sent.
        self.size = 0
        self._parts: list[bytes] = []
        self._places: list[Call | None] = []
        self._sent = 0
        self._loaded = False

    def add(self, call: Call) -> None:
        if call.loading and not self._loaded:
            self._put(_LOAD, None)
            self._loaded = True
        if call.asking:
            self._put(_ASKING, None)
        self._put(call.data, call)

    def unsent(self) -> tuple[bytes, int]:
        """What is to be sent now, and how many answers that has; to be called for sending it."""
        parts, count = self._parts, len(self._places) - self._sent
        for call in self._places[self._sent :]:
            if call is not None:
                call.sent, call.asking = True, None
        self._parts, self._sent, self.size = [], len(self._places), 0
        return parts[0] if len(parts) == 1 else b"".join(parts), count

    def _put(self, data: bytes, call: Call | None) -> None:
        self._parts.append(data)
        self._places.append(call)
        self.size += len(data)

    def take(self, answers: Sequence[Any], topology: Topology) -> Failure | None:
        """Notes the answers of the node, or as many as came; the failure that decides among those it gave."""
        worst: Failure | None = None
        for call, answer in zip(self._places, answers, strict=False):
            if isinstance(answer, hiredis.ReplyError):
                failure = failure_of(str(answer))
                worst = worse(worst, failure)
                if call is not None:
                    self._follow(call, failure, topology)
            elif call is not None:
                call.answer = answer
        return worst

    def _follow(self, call: Call, failure: Failure, topology: Topology) -> None:
        """Notes what an error means for the next try: the node has not done it."""
        call.sent = False
        if casts_doubt(failure):
            topology.doubt(self.address)
        elif isinstance(failure, Redo) and failure.code == "NOSCRIPT":
            call.loading = True
        elif isinstance(failure, Redo):
            host, _, port = str(failure).rsplit(" ", 1)[1].rpartition(":")
            # Without a host it means: where you reached me.
            address = (host or self.address[0], int(port))
            if failure.code == "ASK":
                call.asking = address
            else:
                topology.moved(call.tag, address)


def node_of(call: Call, topology: Topology) -> Address:
    """Where a call is to be sent. Raises Failure where no node is known for it."""
    return call.asking or topology.node(call.tag)


def batches(calls: Iterable[Call], topology: Topology) -> list[Batch]:
    """Calls by the node they go to. Raises Failure where no node is known for one."""
    found: dict[Address, Batch] = {}
    for call in calls:
        node = node_of(call, topology)
        if node not in found:
            found[node] = Batch(node)
        found[node].add(call)
    return list(found.values())
