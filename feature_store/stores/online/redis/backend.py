"""The online store in Redis: many keys in one round trip, writes by one script, the same errors as every backend."""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence

import hiredis

from feature_store.config import OnlineConfig
from feature_store.stores.online.backend import Write
from feature_store.stores.online.keys import TAG_LENGTH
from feature_store.stores.online.redis.asking import Asking
from feature_store.stores.online.redis.asking_async import AskingAsync
from feature_store.stores.online.redis.calls import Call
from feature_store.stores.online.redis.failures import Failure, Lost, Overdue, failure_of
from feature_store.stores.online.redis.packing import mget, pack
from feature_store.stores.online.redis.patience import Patience
from feature_store.stores.online.redis.script import call_of, results_of, shared
from feature_store.stores.online.redis.settings import Address
from feature_store.stores.online.redis.site import Site

#: Keys that one command asks for at most, where it need not be more; that a scan looks at; that are deleted at once.
_FETCHED, _SCANNED, _DELETED = 2_000, 1_000, 500

#: Bytes of writes that are sent at once. What is sent at once has one deadline.
_SENT = 4 << 20


class RedisBackend:
    """A Redis server, what Sentinels say is the master, or a Cluster. Connects when it is first used.

    Every request ends within `config.timeout`, in an answer or a StoreError: what may pass by itself is tried again
    until then. Of many writes, and of a scan, each part is a request of its own.
    """

    together = False

    def __init__(self, config: OnlineConfig) -> None:
        self._site = Site(config)
        self._begin()
        _backends.add(self)

    def _begin(self) -> None:
        self._asking = Asking(self._site)
        self._asking_async = AskingAsync(self._site, self._asking.learn)

    def begin_anew(self) -> None:
        """To be called in a forked process: connections, and locks that are held, are its parent's."""
        parents, inherited = self._asking, self._asking_async
        self._site.begin()
        self._begin()
        parents.close()  # this side of them only: Redis is not told
        # Loops are not shared so easily: what closes there would be unknown to the parent's selector too.
        _inherited.append(inherited)

    @property
    def one_place(self) -> bool:
        """A script of a Cluster sees one bucket only."""
        return not self._site.clustered

    @property
    def where(self) -> str:
        """The hosts, for messages."""
        return self._site.connection.where

    def exists(self) -> bool:
        return True

    def close(self) -> None:
        """Closes the connections of this process; the next request connects anew."""
        self._asking.close()
        self._asking_async.close()

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys in one round trip; on a Cluster in one a node."""
        if not keys:
            return []
        calls, places = self._reads(keys)
        if not places:
            return self._asking.answer(calls[0])
        self._asking.carry_out(calls)
        return _in_place(len(keys), calls, places)

    async def get_async(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The same on the running loop's own connections."""
        if not keys:
            return []
        calls, places = self._reads(keys)
        if not places:
            return await self._asking_async.answer(calls[0])
        await self._asking_async.carry_out(calls)
        return _in_place(len(keys), calls, places)

    def _reads(self, keys: Sequence[bytes]) -> tuple[list[Call], list[list[int]]]:
        """The calls that read keys: one, or one a bucket, each with the places of its keys then.

        By bucket on a Cluster, which has them in different places, and where they are many: then Redis can serve
        others in between.
        """
        if not self._site.clustered and len(keys) <= _FETCHED:
            return [Call(keys[0][:TAG_LENGTH], mget(keys))], []
        groups = _by_bucket(keys)
        calls = [Call(tag, mget([keys[place] for place in places])) for tag, places in groups.items()]
        return calls, list(groups.values())

    # -- writing ------------------------------------------------------------------------------------------------

    def apply(self, writes: Iterable[Write], once: bool = False) -> list[list[int] | None]:
        """Applies writes, each for itself, with one script. `once` sends nothing again that may have been done.

        They are sent while the next are made.
        """
        if isinstance(writes, list) and len(writes) == 1 and not once:
            return results_of(self._asking.answer(Call(_tag(writes[0]), call_of(writes))))
        results: list[list[int] | None] = []
        calls = self._writes(writes)
        while made := self._asking.carry_out(_portion(calls), once):
            for call in made:
                results += results_of(call.answer)
        return results

    def _writes(self, writes: Iterable[Write]) -> Iterator[Call]:
        for some in shared(writes, alone=self._site.clustered):
            yield Call(_tag(some[0]), call_of(some))

    def delete(self, keys: Iterator[bytes]) -> None:
        """Deletes keys, some hundreds at a time."""
        remaining = iter(keys)
        while some := list(itertools.islice(remaining, _DELETED)):
            groups = _by_bucket(some) if self._site.clustered else {some[0][:TAG_LENGTH]: range(len(some))}
            self._asking.carry_out([Call(tag, pack("UNLINK", *[some[i] for i in at])) for tag, at in groups.items()])

    # -- looking through ----------------------------------------------------------------------------------------

    def scan(self, *tails: bytes) -> Iterator[bytes]:
        """The keys whose tails start with any of these bytes, each at least once. Looks at every key there is, once.

        One that is interrupted begins anew. Keys that a Cluster moves from node to node meanwhile may be missed.
        """
        pattern = b"?" * TAG_LENGTH + _covering(tails) + b"*"
        interrupted: Patience | None = None
        while True:
            try:
                self._asking.learn(self._site.deadline)
                for node in self._site.topology.masters():
                    yield from (key for key in self._scanned(node, pattern) if key.startswith(tails, TAG_LENGTH))
                return
            except Overdue as failure:
                raise self._site.refusal(failure) from failure
            except Failure as failure:
                interrupted = interrupted or Patience(self._site.timeout)
                time.sleep(self._site.pause(interrupted, failure))

    def _scanned(self, node: Address, pattern: bytes) -> Iterator[bytes]:
        cursor, server = b"0", None
        while True:
            command = pack("SCAN", cursor, "MATCH", pattern, "COUNT", _SCANNED)
            answer, run_id = self._asking.ask(node, command, self._site.deadline)
            if isinstance(answer, hiredis.ReplyError):
                raise failure_of(str(answer))
            # A cursor means nothing to another server, nor to the same one after a restart.
            if server not in (None, run_id):
                raise Lost("Redis was restarted while its keys were looked through")
            server, (cursor, keys) = run_id, answer
            yield from keys
            if cursor == b"0":
                return


_backends: weakref.WeakSet[RedisBackend] = weakref.WeakSet()
_inherited: list[AskingAsync] = []


def _begin_anew() -> None:
    for backend in list(_backends):
        backend.begin_anew()


os.register_at_fork(after_in_child=_begin_anew)


def _by_bucket(keys: Sequence[bytes]) -> dict[bytes, list[int]]:
    """The places of keys by their hash tag."""
    groups: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key[:TAG_LENGTH], []).append(place)
    return groups


def _in_place(count: int, calls: Sequence[Call], places: Sequence[Sequence[int]]) -> list[bytes | None]:
    """The values that calls brought, each at its place; those of one call lie as they were asked for."""
    if not places:
        return calls[0].answer
    found: list[bytes | None] = [None] * count
    for call, here in zip(calls, places, strict=True):
        for place, value in zip(here, call.answer, strict=True):
            found[place] = value
    return found


def _tag(write: Write) -> bytes:
    """The tag of the bucket that a write is of."""
    keys = itertools.chain((key for _, key, _ in write.changes), (key for key, _ in (*write.equal, *write.prefix)))
    return next(keys)[:TAG_LENGTH]


def _portion(calls: Iterator[Call]) -> Iterator[Call]:
    """The next calls up to some size: they have one deadline, and are held in memory."""
    size = 0
    for call in calls:
        yield call
        size += len(call.data)
        if size > _SENT:
            return


def _covering(tails: Sequence[bytes]) -> bytes:
    """A pattern that matches what starts with any of these tails, and wherever they differ more than that."""
    return b"".join(_literal(bytes(here[:1])) if len(set(here)) == 1 else b"?" for here in zip(*tails, strict=False))


def _literal(text: bytes) -> bytes:
    """A pattern that matches these bytes and nothing else."""
    special = rb"*?[]\^-"
    return b"".join(b"\\" + bytes([byte]) if byte in special else bytes([byte]) for byte in text)
