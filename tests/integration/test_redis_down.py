"""Redis killed, restarted and paused under readers and writers: what is answered is right, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from feature_store.errors import StoreError, StoreUnavailable
from feature_store.stores.online.appending import Position
from feature_store.stores.online.backend import Backend, Write
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.redis.backend import RedisBackend
from feature_store.stores.online.redis.blocking import BlockingConnection
from feature_store.timestamps import SECOND
from infra.redis import servers
from infra.redis.groups import SingleServer
from infra.redis.waiting import comes_true
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

#: Seconds that a request may take, and within which it must have ended on a machine that has other things to do.
TIMEOUT, AT_LAST = 1.0, 20.0
#: The former for requests that must fail.
HASTY = 0.5

CUSTOMERS = (1, 2, 111)
LATER = NOON + 3_600 * SECOND


@pytest.fixture(scope="module")
def durable() -> Iterator[SingleServer]:
    """One that answers a write when it is on disk."""
    with servers.single(appendonly=True, directives=["appendfsync always"]) as server:
        yield server


@pytest.fixture
def backend(durable: SingleServer) -> Iterator[RedisBackend]:
    made = RedisBackend(config_of(durable, TIMEOUT))
    yield made
    made.close()


@pytest.fixture
def patient(durable: SingleServer) -> Iterator[RedisBackend]:
    """For what must succeed, however busy this machine is."""
    made = RedisBackend(config_of(durable, AT_LAST))
    yield made
    made.close()


def keys(count: int) -> list[bytes]:
    return [b"{%02x}key%d" % (i % 256, i) for i in range(count)]


def fill(backend: Backend, count: int) -> dict[bytes, bytes]:
    """Keys that each hold something of their own."""
    values = {key: b"value of " + key for key in keys(count)}
    backend.apply([Write([], [("S", key, value)]) for key, value in values.items()])
    return values


@contextmanager
def paused(server: SingleServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def timely(do: Callable[..., Any], *arguments: Any) -> Any:
    """What comes of it, a StoreError as a value; it must come in time."""
    begun = time.monotonic()
    try:
        found = do(*arguments)
    except StoreError as error:
        found = error
    assert time.monotonic() - begun < AT_LAST
    return found


# -- killed -----------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Threads that read and write all the time, and check what they read against what was acknowledged.

    Of customer `c` of the windowed view, and of each row of the plain one, `offered` counts what was sent, `known`
    what was acknowledged: whatever is read lies between.
    """

    stream: Stream
    plain: PlainOnline
    backend: RedisBackend
    offered: int = 0
    known: int = 0
    written: int = 0
    stored: int = 0
    wrong: list[Any] = field(default_factory=list)
    errors: int = 0
    reads: int = 0
    end: threading.Event = field(default_factory=threading.Event)

    def append(self) -> None:
        """The same events at the same position again until they are acknowledged."""
        while not self.end.is_set() or self.offered > self.known:
            rows = [at(NOON + self.known, customer) for customer in CUSTOMERS]
            self.offered = self.known + 1
            if self._tried(self.stream.offer, rows, Position(0, self.known * len(rows))):
                self.known = self.offered

    def write(self) -> None:
        while not self.end.is_set() or self.written > self.stored:
            self.written = self.stored + 1
            row = (1, NOON + self.written, None, {"whole": self.written})
            if self._tried(self.plain.write, plain_table(self.plain.view, [row]), LATER):
                self.stored = self.written

    def read(self) -> None:
        while not self.end.is_set():
            low = self.known
            asked = [((customer,), LATER) for customer in CUSTOMERS]
            if found := self._tried(self.stream.read, asked):
                self._check(low, found.values["all"].to_pylist(), self.offered)

    def read_plainly(self) -> None:
        while not self.end.is_set():
            low = self.stored
            if found := self._tried(read_plain, self.plain, [(1, LATER)]):
                self._check(low, [value or 0 for value in found.values["whole"].to_pylist()], self.written)

    def read_asynchronously(self) -> None:
        asyncio.run(self._read_asynchronously(fill(self.backend, 50)))

    async def _read_asynchronously(self, values: dict[bytes, bytes]) -> None:
        async def one(key: bytes) -> None:
            while not self.end.is_set():
                try:
                    found = await self.backend.get_async([key, b"{00}none"])
                except StoreError:
                    self.errors += 1
                else:
                    self.reads += 1
                    if found != [values[key], None]:
                        self.wrong.append((key, found))

        await asyncio.gather(*[one(key) for key in [*values][:8]])

    def _tried(self, do: Callable[..., Any], *arguments: Any) -> Any:
        found = timely(do, *arguments)
        if isinstance(found, StoreError):
            self.errors += 1
            return None
        return found

    def _check(self, low: int, found: list[int], high: int) -> None:
        self.reads += 1
        if not all(low <= value <= high for value in found):
            self.wrong.append((low, found, high))

    def go_on(self, threads: list[threading.Thread]) -> None:
        """Returns when some more were acknowledged; a thread that ended would have everybody wait for ever."""
        enough = self.known + 5, self.stored + 5
        assert comes_true(lambda: self.known >= enough[0] and self.stored >= enough[1], AT_LAST)
        assert all(thread.is_alive() for thread in threads)


def test_killed_and_restarted_under_readers_and_writers_nothing_is_wrong_or_lost(
    durable: SingleServer, backend: RedisBackend
) -> None:
    stream = counting(backend)
    stream.clock = LATER
    plain = PlainOnline(backend, stream.online.project, plain_view(["whole"]))
    stream.bootstrap([])
    plain.write(plain_table(plain.view, []), NOON)
    traffic = Traffic(stream, plain, backend)
    jobs = [traffic.append, traffic.write, traffic.read, traffic.read_plainly, traffic.read_asynchronously]
    threads = [threading.Thread(target=job) for job in jobs]
    with compacting(10):
        for thread in threads:
            thread.start()
        try:
            for down in (0.0, 0.4, TIMEOUT + 0.3):
                traffic.go_on(threads)
                durable.kill()
                time.sleep(down)
                durable.start()
            traffic.go_on(threads)
        finally:
            durable.start()
            traffic.end.set()
            for thread in threads:
                thread.join(AT_LAST)
    assert traffic.wrong == []
    assert min(traffic.reads, traffic.known, traffic.stored) > 10
    assert traffic.errors > 0
    read = stream.read([((customer,), LATER) for customer in CUSTOMERS])
    assert read.values["all"].to_pylist() == [traffic.known] * len(CUSTOMERS)
    assert [positions[0][1] for positions in read.positions] == [traffic.known * len(CUSTOMERS)] * len(CUSTOMERS)
    assert read_plain(plain, [(1, LATER)]).values["whole"].to_pylist() == [traffic.stored]


def test_a_restart_between_two_requests_is_not_felt(durable: SingleServer, patient: RedisBackend) -> None:
    """Also by one that is never sent twice: that the idle connection is gone is seen before it is used."""
    values = fill(patient, 5)
    assert asyncio.run(patient.get_async([*values])) == [*values.values()]
    durable.restart()
    assert patient.apply([Write([], [("A", b"{00}once", b"x")])], once=True) == [[1]]
    assert patient.get([*values]) == [*values.values()]
    assert asyncio.run(patient.get_async([*values])) == [*values.values()]


def test_a_scan_during_which_redis_is_restarted_misses_nothing(durable: SingleServer, patient: RedisBackend) -> None:
    """A cursor of before would: keys lie in another order after a restart."""
    durable.flush()
    values = fill(patient, 4_000)
    found = patient.scan(b"key")
    seen = {next(found) for _ in range(10)}
    durable.restart()
    assert seen | set(found) == values.keys()


def test_while_it_is_down_requests_fail_by_their_deadline_and_say_so(
    durable: SingleServer, patient: RedisBackend
) -> None:
    values = fill(patient, 3)
    hasty = RedisBackend(config_of(durable, HASTY))
    durable.kill()
    try:
        for ask in (
            lambda: hasty.get([*values]),
            lambda: asyncio.run(hasty.get_async([*values])),
            lambda: hasty.apply([Write([], [("S", b"{00}new", b"x")])]),
            lambda: list(hasty.scan(b"")),
        ):
            error = timely(ask)
            assert isinstance(error, StoreUnavailable)
            assert error.retryable
            assert f"cannot be reached (127.0.0.1:{durable.port}: Connection refused)" in str(error)
    finally:
        durable.start()
    assert patient.get([*values, b"{00}new"]) == [*values.values(), None]


# -- paused -----------------------------------------------------------------------------------------------------------


def test_paused_for_five_seconds_it_fails_in_time_and_goes_on_by_itself(
    durable: SingleServer, backend: RedisBackend
) -> None:
    values = fill(backend, 100)
    some = [*values]
    pairs = list(zip(some, some[::-1], strict=True))

    async def late(key: bytes) -> str:
        try:
            return str(await backend.get_async([key]))
        except StoreUnavailable as error:
            return str(error)

    async def play() -> tuple[list[str], list[Any]]:
        """On one loop, so that answers to what was given up meet the questions that follow."""
        await backend.get_async(some)
        durable.pause()
        until = time.monotonic() + 5.0
        said = []
        while time.monotonic() < until:
            said += await asyncio.gather(*[late(key) for key in some[:20]], asyncio.to_thread(blocked))
        durable.resume()
        return said, await asyncio.gather(*[backend.get_async([*pair]) for pair in pairs])

    def blocked() -> str:
        return str(timely(backend.get, some[:1]))

    try:
        said, found = asyncio.run(play())
    finally:
        durable.resume()
    assert len(said) > 60
    assert {text.partition(" did ")[2] for text in said} == {
        "not answer within 1 s; see whether Redis is up and not paused."
    }
    expected = [[values[key], values[other]] for key, other in pairs]
    assert found == expected
    assert [backend.get([*pair]) for pair in pairs] == expected


def test_while_it_is_paused_writes_and_scans_fail_in_time(durable: SingleServer, patient: RedisBackend) -> None:
    fill(patient, 2)
    hasty = RedisBackend(config_of(durable, HASTY))
    with paused(durable):
        for ask in (
            lambda: hasty.apply([Write([], [("S", b"{00}late", b"x")])], once=True),
            lambda: hasty.delete(iter(keys(1))),
            lambda: list(hasty.scan(b"")),
        ):
            assert "did not answer within 0.5 s" in str(timely(ask))


def test_late_answers_are_nobody_elses(durable: SingleServer, patient: RedisBackend) -> None:
    """A pause shorter than the timeout: what waits is answered, what was cancelled leaves no gap in the row."""
    values = fill(patient, 60)
    some = [*values]

    async def play() -> tuple[list[Any], list[Any]]:
        await patient.get_async(some)
        durable.pause()
        tasks = [asyncio.create_task(patient.get_async([key])) for key in some]
        await asyncio.sleep(0.1)
        for task in tasks[::2]:
            task.cancel()
        others = [asyncio.create_task(patient.get_async([key])) for key in some[::-1]]
        await asyncio.sleep(0.1)
        durable.resume()
        return (
            await asyncio.gather(*tasks, return_exceptions=True),
            await asyncio.gather(*others, return_exceptions=True),
        )

    try:
        found, others = asyncio.run(play())
    finally:
        durable.resume()
    assert [type(one) for one in found[::2]] == [asyncio.CancelledError] * 30
    assert found[1::2] == [[values[key]] for key in some[1::2]]
    assert others == [[values[key]] for key in some[::-1]]
    with_threads = in_threads([lambda key=key: patient.get([key]) for key in some])
    assert with_threads == [[values[key]] for key in some]


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(jobs)

    def run(place: int) -> None:
        found[place] = timely(jobs[place])

    threads = [threading.Thread(target=run, args=[place]) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(AT_LAST)
    return found


def test_a_request_that_was_interrupted_leaves_its_answer_to_nobody(
    patient: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while an answer is awaited: the next request on that thread must not get it."""
    values = fill(patient, 2)
    one, other = values
    receive = BlockingConnection.receive

    def interrupted(connection: BlockingConnection, answers: list[Any], deadline: float) -> None:
        monkeypatch.setattr(BlockingConnection, "receive", receive)
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockingConnection, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patient.get([one])
    assert patient.get([other]) == [values[other]]
