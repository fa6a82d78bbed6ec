"""The online store against the slow obvious truth: reads interleaved with bootstraps, appends and compactions."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import tzset
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from feature_store.aggregations.events import Events
from feature_store.aggregations.reference import Event
from feature_store.config import OnlineConfig
from feature_store.definitions.erasure import NO_ERASURES, Erasure, Erasures, LoadErasures, key_text, no_erasures
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.engine import EventLog
from feature_store.engines.stream.admission import admit
from feature_store.errors import NotErasedOnline, NotExactOnline, PositionGap, StoreNotReady, StoreUnavailable
from feature_store.retrieval.historical import retrieve
from feature_store.retrieval.online import Prepared
from feature_store.stores.online import appending as appending_module
from feature_store.stores.online import compiled as compiled_module
from feature_store.stores.online import embedded as embedded_module
from feature_store.stores.online import filling as filling_module
from feature_store.stores.online.appending import Appended, Batch, Position, append
from feature_store.stores.online.backend import Backend, Write
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.erasing import erase
from feature_store.stores.online.filling import bootstrap
from feature_store.stores.online.head import Rows
from feature_store.stores.online.keys import Keyspace, bucket_of, entity_key
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.rows import Row
from feature_store.stores.online.status import Status
from feature_store.stores.online.store import OnlineStore
from feature_store.stores.online.values import from_arrow
from feature_store.stores.online.view import ViewRead
from feature_store.stores.online.windowed import WindowedOnline
from feature_store.testing import Mismatch, assert_features_equal, mismatches
from feature_store.testing.event_logs import (
    ANCHORS,
    KEY_VALUES,
    Layout,
    Log,
    LogRow,
    random_value,
    values_array,
    values_of,
)
from feature_store.testing.views import (
    COLUMNS,
    KEYS,
    aggregation,
    aggregation_sets,
    definitions,
    every_aggregation,
    expected_table,
    hops,
    inside,
    newest_row,
    windowed,
)
from feature_store.timestamps import BEGINNING, DAY, END, HOUR, MINUTE, SECOND
from tests.redis_fixtures import config_of

#: How many times as many examples to try. At 1 every run tries the same ones; above it they are drawn anew.
MORE = int(os.environ.get("ISOCHRON_EXAMPLES", "1"))


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    slow.append(HealthCheck.function_scoped_fixture)
    return settings(max_examples=count * MORE, derandomize=MORE == 1, deadline=None, suppress_health_check=slow)


NOON = ANCHORS[0] + 12 * HOUR
KEY = (Field("customer", ValueType.INT64),)
TEXT_KEYS = (Field("a", ValueType.STRING), Field("b", ValueType.STRING))

_projects = itertools.count()


@pytest.fixture(autouse=True, scope="module")
def far_from_greenwich() -> Iterator[None]:
    """The machine's own time zone is not UTC: nothing may depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        tzset()
        yield
    tzset()


@pytest.fixture(autouse=True, scope="module")
def compiled_folds() -> None:
    """Reads take the compiled way where they can."""
    compiled_module.load()


@pytest.fixture(scope="module", params=["embedded", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """One store for all examples; each takes a project of its own."""
    if request.param == "embedded":
        opened = open_backend(OnlineConfig(path=tmp_path_factory.mktemp("online")))
    else:
        opened = open_backend(config_of(request.getfixturevalue("redis_single")))
    yield opened
    opened.close()


def project() -> str:
    return f"project_{next(_projects)}"


@contextlib.contextmanager
def log_on_disk(log: Log, erasures: LoadErasures = no_erasures) -> Iterator[DuckDBEngine]:
    with tempfile.TemporaryDirectory() as root:
        log.write(Path(root) / "log")
        with contextlib.closing(DuckDBEngine(Path(root), erasures=erasures)) as engine:
            yield engine


def event_log(view: WindowedView, log: Log, start: int | None, erasures: LoadErasures = no_erasures) -> EventLog:
    """What a bootstrap reads: the log's files through the engine."""
    with log_on_disk(log, erasures) as engine:
        return engine.event_log(view, start, END)


def encoded(view: WindowedView | PlainView, entity: tuple[Any, ...] | None) -> bytes | None:
    """An entity's key as retrieval makes it; None where a key value is null."""
    if entity is None or None in entity:
        return None
    arrays = [values_array([value], key.type) for value, key in zip(entity, view.keys, strict=True)]
    return entity_key([from_arrow(a, k.type)[0] for a, k in zip(arrays, view.keys, strict=True)])


class Stream:
    """A store under test and, beside it, the records it was given: what every read is judged by.

    `clock` is the writer's. `judge` compares every value of a read at any time with the reference over `folded`, but
    for rows that the store itself says it cannot answer exactly; `ceiling` is how far it may say so (`early`: up to the
    clock, for heads are let grow no longer than that).
    """

    def __init__(
        self,
        backend: Backend,
        view: WindowedView,
        log: Log,
        *,
        clock: int = NOON,
        settle: int = MINUTE,
        flags: bool = True,
        early: bool = False,
    ) -> None:
        self.erasures = NO_ERASURES
        self.online = WindowedOnline(backend, project(), view, settle, self.erased_now)
        self.view, self.log, self.clock, self.settle, self.flags = view, log, clock, settle, flags
        self.lag = 0 if early else settle
        self.folded: list[LogRow] = []
        self.appended: list[LogRow] = []
        self.next = 0
        self.ceiling = BEGINNING
        self.found: list[Mismatch] = []
        self.judged = self.flagged = 0

    # -- writing

    def bootstrap(self, rows: Sequence[LogRow]) -> None:
        log = self.log.subset(rows)
        start = self.view.reach(self.clock - self.settle)
        bootstrap(self.online, event_log(self.view, log, start, self.erased_now), self.clock, END)
        self.folded, self.appended = self.remaining(rows), []
        self.ceiling = self.clock - self.lag

    def refill(self, before: Sequence[LogRow], during: Callable[[], None]) -> None:
        """Fills the view again from what the archive held when the filling began: rows appended `before` the archive
        is read, and whatever `during` the filling appends and reads, is in the store alone.
        """
        begun, archived, now = self.online.generations.begin(), self.log.subset(self.folded), self.clock
        self.append(before)
        log = event_log(self.view, archived, self.view.reach(now - self.settle), self.erased_now)
        bootstrap(self.online, log, now, END, lambda done, of: during(), begun)
        self.ceiling = now - self.lag

    def append(self, rows: Sequence[LogRow], repeat: int = 0) -> Appended:
        """Appends rows, the last `repeat` of those appended before once more in front of them."""
        again = self.appended[len(self.appended) - repeat :] if repeat else []
        done = self.offer([*again, *rows], Position(0, self.next - len(again)))
        self.next += len(rows)
        self.appended += rows
        counted = self.remaining(rows)
        self.folded += counted
        self.ceiling = max(self.ceiling, self.clock - self.lag)
        assert done == Appended(len(counted), len(again), self.next, len(rows) - len(counted))
        return done

    def erase(self, values: Mapping[str, Any]) -> int:
        """Erases an entity as of the clock; of how many entities there was something."""
        taken = erase(self.online, self.write_down(values))
        self.folded = self.remaining(self.folded)
        return taken

    def write_down(self, values: Mapping[str, Any]) -> Erasure:
        """The first half of an erasure, before the online store hears of it."""
        keys = {name: key_text(name, value) for name, value in values.items()}
        erasure = Erasure(self.online.project, keys, self.clock)
        self.erasures = Erasures((*self.erasures.log, erasure))
        return erasure

    def erased_now(self) -> Erasures:
        return self.erasures

    def remaining(self, rows: Sequence[LogRow]) -> list[LogRow]:
        """The rows that are not at or below an erasure."""
        return list(self.log.subset(rows).without(self.erasures).rows)

    def offer(self, rows: Sequence[LogRow], position: Position) -> Appended:
        """Appends rows at a position of the log."""
        admitted = admit(self.view, self.log.table(rows=rows), self.clock)
        return append([Batch(self.online, admitted.keys, admitted.events)], self.clock, position)[0]

    # -- reading

    def read(self, asked: Sequence[tuple[tuple[Any, ...] | None, int]], names: Sequence[str] = ()) -> ViewRead:
        entities = [encoded(self.view, entity) for entity, _ in asked]
        return self.online.read(names or self.names, entities, np.array([t for _, t in asked], np.int64))

    @property
    def names(self) -> list[str]:
        return [a.name for a in self.view.aggregations]

    def events(self, entity: tuple[Any, ...] | None) -> list[Event]:
        return [] if entity is None or None in entity else self.log.subset(self.folded).events(entity)

    def judge(self, asked: Sequence[tuple[tuple[Any, ...] | None, int]]) -> None:
        """Reads and compares; differences gather in `found`."""
        if not asked:
            return
        read = self.read(asked)
        self._check_beside(asked, read)
        self._check_alike(asked, read)
        exact = [i for i, (_, t) in enumerate(asked) if t >= read.exact_from[i] or not self.flags]
        self.judged, self.flagged = self.judged + len(exact), self.flagged + len(asked) - len(exact)
        events = [self.events(asked[i][0]) for i in exact]
        times = [asked[i][1] for i in exact]
        self.found += mismatches(
            pa.table({name: array.take(pa.array(exact, pa.int64())) for name, array in read.values.items()}),
            expected_table(self.view, self.names, events, times),
            aggregations=self.view.aggregations,
            folded=lambda name, row: inside(events[row], self.view.aggregation(name), times[row]),
        )

    def _check_alike(self, asked: Sequence[tuple], read: ViewRead) -> None:
        """Compiled code, numpy, and a row by itself say the same, to the bit."""
        values = bits(read)
        alone = [{name: column[i : i + 1] for name, column in values.items()} for i in range(len(asked))]
        assert [bits(self.read([one])) for one in asked] == alone
        with mock.patch.object(compiled_module, "_compiled", None):
            assert bits(self.read(asked)) == values
            assert [bits(self.read([one])) for one in asked] == alone

    def _check_beside(self, asked: Sequence[tuple], read: ViewRead) -> None:
        """No time is refused that must be exact; entities never seen are unknown; positions are those appended."""
        assert not self.flags or read.exact_from.max(initial=BEGINNING) <= self.ceiling
        seen = {row.keys for row in self.folded}
        touched = {bucket_of(encoded(self.view, row.keys) or b"") for row in self.appended}
        for i, (entity, _) in enumerate(asked):
            assert not read.known[i] or entity in seen
            key = encoded(self.view, entity)
            if key is not None and bucket_of(key) in touched:
                assert 0 < read.positions[i][0][1] <= self.next

    def check(self) -> None:
        listed = "\n".join(map(str, self.found[:10]))
        assert not self.found, f"{len(self.found)} of {self.judged} reads differ:\n{listed}"


def bits(read: ViewRead) -> dict[str, list[str]]:
    """A read's values so that equal texts are equal bits, with what stands beside them."""
    assert read.exact_from is not None
    beside = {"known": read.known, "exact_from": read.exact_from}
    columns = {name: array.to_pylist() for name, array in read.values.items()}
    return {name: list(map(repr, c)) for name, c in columns.items()} | {n: b.tolist() for n, b in beside.items()}


class Play:
    """A random play over a stream: what comes, when, and who asks for what. One seed, one play."""

    def __init__(self, rng: random.Random, stream: Stream, entities: int = 3) -> None:
        self.rng, self.stream, self.erasing = rng, stream, False
        self.dated = stream.view.source.created_field is not None
        self.keys = [tuple(rng.choice(KEY_VALUES[k.type]) for k in stream.view.keys) for _ in range(entities)]
        self.steps = hops(stream.view.aggregations) or [SECOND]

    def row(self, clock: int | None = None) -> LogRow:
        """An event that happened just now, long ago, or will within the hour; on a hop's edge or beside it."""
        clock = self.stream.clock if clock is None else clock
        step = self.rng.choice(self.steps)
        time = clock + self.rng.choice(
            [0, -1, 1, -self.stream.settle, -self.rng.randrange(2 * MINUTE), -step, -3 * step]
        )
        time = self.rng.choice([time, time, clock + self.rng.randrange(HOUR + 1), time // step * step, self._known()])
        created = self.rng.choice([None, time, clock]) if self.dated else None
        values = {name: random_value(self.rng, t) for name, t in self.stream.log.columns.items()}
        return LogRow(self.rng.choice(self.keys), min(time, clock + HOUR), created, values)

    def rows(self, most: int) -> list[LogRow]:
        return [self.row() for _ in range(self.rng.randrange(most + 1))]

    def _known(self) -> int:
        """The time of an event that is there already, or now."""
        return (self.rng.choice(self.stream.folded).time if self.stream.folded else None) or self.stream.clock

    def tick(self) -> None:
        self.stream.clock += self.rng.choice([0, 0, 1, SECOND, 61 * SECOND, *self.steps])

    def questions(self, count: int) -> list[tuple[tuple[Any, ...] | None, int]]:
        """Reads at an event's own microsecond, where it leaves a window, around the clock, where exactness begins."""
        asked: list[tuple[tuple[Any, ...] | None, int]] = []
        for _ in range(count):
            now, settle = self.stream.clock, self.stream.settle
            near = [self._known(), self._known() + self.rng.choice(self.steps), now, now, now - settle, now + HOUR]
            time = self.rng.choice(near) + self.rng.choice([0, 0, 1, -1])
            step = self.rng.choice(self.steps)
            time = self.rng.choice([time, time, time // step * step, now + self.rng.randrange(2 * step)])
            entity = self.rng.choice([*self.keys, *self.keys, *self.keys, None])
            unseen = tuple(self.rng.choice(KEY_VALUES[k.type]) for k in self.stream.view.keys)
            asked.append((self.rng.choice([entity, entity, entity, unseen]), time))
        return asked

    def meanwhile(self) -> None:
        """What happens while a view is filled."""
        self.tick()
        self.stream.append(self.rows(3))
        self.maybe_erase()
        self.stream.judge(self.questions(2))

    def maybe_erase(self) -> None:
        """Where erasing is on, sometimes an entity goes, by all of its keys or some."""
        keys = self.stream.view.keys
        if self.erasing and keys and self.rng.random() < 0.5:
            entity = dict(zip((key.name for key in keys), self.rng.choice(self.keys), strict=True))
            named = self.rng.sample(sorted(entity), self.rng.randrange(len(keys)) + 1)
            self.stream.erase({name: entity[name] for name in named})

    def run(self, rounds: int, batch: int, reads: int) -> Stream:
        """Bootstraps from some rows, then lets rounds of appends and reads follow, sometimes another bootstrap."""
        self.stream.bootstrap(self.rows(3 * batch))
        self.stream.judge(self.questions(reads))
        for _ in range(rounds):
            self.tick()
            repeat = self.rng.choice([0, 0, 1, 2])
            self.stream.append(self.rows(batch), min(repeat, len(self.stream.appended)))
            self.maybe_erase()
            if self.rng.random() < 0.1:
                self.stream.refill(self.rows(3), self.meanwhile)
            self.stream.judge(self.questions(reads))
        self.stream.clock += self.rng.choice([0, MINUTE, *self.steps])
        self.stream.judge(self.questions(reads))
        return self.stream


@contextlib.contextmanager
def compacting(rows: int, longest: int = 1_024) -> Iterator[None]:
    """Heads are compacted beyond so many rows, and settle early beyond `longest` past ones."""
    with (
        mock.patch.object(appending_module, "COMPACT_ROWS", rows),
        mock.patch.object(appending_module, "LONGEST_HEAD", longest),
    ):
        yield


def stream_over(
    backend: Backend, aggregations: Sequence[Any], keys: Sequence[Field], dated: bool = True, **how: Any
) -> Stream:
    columns = {a.column: COLUMNS[a.column] for a in aggregations if a.column != "*"}
    log = Log(tuple(keys), columns, ())
    return Stream(backend, windowed(aggregations, keys, Layout(created=dated).source(log)), log, **how)


# -- reads between writes ---------------------------------------------------------------------------------------------


@examples(50)
@given(
    aggregations=aggregation_sets(most=6),
    keys=st.sampled_from(KEYS),
    rng=st.randoms(use_true_random=False),
    compact=st.integers(0, 5),
    settle=st.sampled_from([MINUTE, SECOND, 0]),
)
def test_every_read_between_writes_equals_the_reference_or_is_flagged(
    backend: Backend, aggregations: tuple, keys: tuple, rng: random.Random, compact: int, settle: int
) -> None:
    stream = stream_over(backend, aggregations, keys, settle=settle)
    with compacting(compact):
        Play(rng, stream).run(rounds=4, batch=4, reads=5)
    note(f"folded: {stream.folded}")
    stream.check()


WINDOWS = ((0, 0), (6 * SECOND, 2 * SECOND), (10 * SECOND, 5 * SECOND), (HOUR, 5 * MINUTE), (21 * MINUTE, 7 * MINUTE))
LONG_WINDOWS = ((HOUR, 5 * MINUTE), (DAY, HOUR), (3 * DAY, 12 * HOUR), (30 * DAY, DAY))


@pytest.mark.parametrize("seed", range(8))
def test_reads_over_many_compactions_equal_the_reference(backend: Backend, seed: int) -> None:
    """Enough events an entity for dozens of compactions; windows whose hops coarsen with age, and one without end."""
    rng = random.Random(seed)
    windows = rng.sample(WINDOWS if seed % 2 else LONG_WINDOWS, 3)
    picked = [a for a in every_aggregation(windows, COLUMNS) if rng.random() < 0.12]
    early = seed % 3 == 0
    stream = stream_over(backend, picked, KEYS[seed % len(KEYS)], early=early)
    with compacting(3, longest=4 if early else 1_024):
        Play(rng, stream, entities=2).run(rounds=30, batch=8, reads=3)
    assert stream.judged > 40
    stream.check()


def test_a_long_head_settles_up_to_the_clock_and_never_beyond(backend: Backend) -> None:
    stream = stream_over(backend, [aggregation("count", "*", 10 * SECOND, SECOND, name="n")], KEY)
    with compacting(3, longest=3):
        stream.bootstrap([])
        stream.append([LogRow((1,), NOON - 10 + i, None, {}) for i in range(8)] + [LogRow((1,), NOON + 5, None, {})])
    read = stream.read([((1,), NOON), ((1,), NOON + 5), ((1,), NOON + 6), ((2,), NOON - 1)])
    assert read.exact_from.tolist() == [NOON, NOON, NOON, NOON - MINUTE]
    assert read.values["n"].to_pylist() == [8, 8, 9, 0]


#   hop      |.........|.........|
#   event              . e
#   tiles              [--------------  all times of a hop look alike: e counts for a reader before it
#   raw head             [------------  e counts from one microsecond after itself
def test_reads_within_a_hop_of_an_event_do_not_see_the_future(backend: Backend) -> None:
    stream = stream_over(backend, [aggregation("count", "*", HOUR, 5 * MINUTE, name="n")], KEY)
    stream.bootstrap([LogRow((1,), NOON - 30 * SECOND, None, {})])
    stream.append([LogRow((1,), NOON + shift, None, {}) for shift in (-1, 0, 1, HOUR)])
    asked = [-30 * SECOND, -30 * SECOND + 1, -1, 0, 1, 2, HOUR, HOUR + 1]
    read = stream.read([((1,), NOON + shift) for shift in asked])
    assert read.values["n"].to_pylist() == [0, 1, 1, 2, 3, 4, 2, 3]
    stream.judge([((1,), NOON + shift) for shift in asked])
    stream.check()


@contextlib.contextmanager
def settling_at_once() -> Iterator[None]:
    """A store without a raw head: every event goes into the staircase at once, whatever its time. It must be caught."""

    def split(events: Events, cut: int) -> tuple[Events, Events]:
        return filling_module._only(events, np.ones(len(events.times), bool)), filling_module._only(
            events, np.zeros(len(events.times), bool)
        )

    def compaction(online: WindowedOnline, now: int, head: bytes, stairs: bytes, rows: bytes, *held: Any) -> Write:
        base = online.codec.decode(held[0]) if held[0] else None
        merged = online.builder.merge(base, online.head.events([rows]), base.exact_from if base else now - MINUTE)
        return Write([], [("S", stairs, online.codec.encode(merged)), ("D", head, b"")])

    with (
        mock.patch.object(filling_module, "_split", split),
        mock.patch.object(appending_module, "_compaction", compaction),
        compacting(1),
    ):
        yield


@pytest.mark.parametrize("seed", range(4))
def test_a_store_without_a_raw_head_is_caught(backend: Backend, seed: int) -> None:
    def play(flags: bool) -> Stream:
        aggregations = every_aggregation([(HOUR, 5 * MINUTE)], {"real": ValueType.FLOAT64})
        stream = stream_over(backend, aggregations, KEY, flags=flags)
        return Play(random.Random(seed), stream).run(rounds=8, batch=4, reads=6)

    play(flags=True).check()
    with settling_at_once():
        assert len(play(flags=False).found) > 0


# -- bootstrap --------------------------------------------------------------------------------------------------------


@examples(30)
@given(
    aggregations=aggregation_sets(most=6),
    keys=st.sampled_from(KEYS),
    rng=st.randoms(use_true_random=False),
    compact=st.integers(0, 5),
)
def test_bootstrap_to_a_cut_and_the_rest_appended_equals_bootstrap_of_all(
    backend: Backend, aggregations: tuple, keys: tuple, rng: random.Random, compact: int
) -> None:
    parts, whole = (stream_over(backend, aggregations, keys) for _ in range(2))
    play = Play(rng, parts)
    rows = [play.row() for _ in range(rng.randrange(20))]
    cut = rng.randrange(len(rows) + 1)
    with compacting(compact):
        parts.bootstrap(rows[:cut])
        while cut < len(rows):
            size = rng.randrange(1, 6)
            parts.append(rows[cut : cut + size])
            cut += size
    whole.bootstrap(rows)
    asked = [(e, max(t, parts.clock - parts.settle)) for e, t in play.questions(12)]
    one, other = (pa.table(s.read(asked).values) for s in (parts, whole))
    events = [parts.events(entity) for entity, _ in asked]
    assert_features_equal(
        one,
        other,
        aggregations=aggregations,
        folded=lambda name, row: inside(events[row], parts.view.aggregation(name), asked[row][1]),
    )


@examples(15)
@given(aggregations=aggregation_sets(most=4), rng=st.randoms(use_true_random=False))
def test_a_time_before_what_the_store_holds_is_answered_from_history_or_refused(
    backend: Backend, aggregations: tuple, rng: random.Random
) -> None:
    stream = stream_over(backend, aggregations, KEY)
    play = Play(rng, stream)
    rows = [play.row() for _ in range(12)]
    stream.bootstrap(rows)
    asked = [(e or (1,), t - rng.choice([0, HOUR, DAY])) for e, t in play.questions(8)]
    entities, as_of = {"customer": [e[0] for e, _ in asked]}, [t for _, t in asked]
    request = definitions(stream.view).resolve([f"view:{name}" for name in stream.names])
    store = OnlineStore(backend, stream.online.project)
    with log_on_disk(stream.log.subset(rows)) as engine:
        answer = Prepared(request, store, engine).read(entities, as_of)
    expected = expected_table(stream.view, stream.names, [stream.events(e) for e, _ in asked], as_of)
    events = [stream.events(e) for e, _ in asked]
    assert_features_equal(
        pa.table(answer.columns),
        expected,
        aggregations=aggregations,
        folded=lambda name, row: inside(events[row], stream.view.aggregation(name), as_of[row]),
    )
    for name, statuses in answer.statuses.items():
        assert statuses == [
            Status.NULL_VALUE if v is None else Status.PRESENT for v in answer.columns[name].to_pylist()
        ]
    if min(as_of) < NOON - MINUTE:
        with pytest.raises(NotExactOnline, match=r"view 'view' cannot be read online as of .*the store is exact from"):
            Prepared(request, store).read(entities, as_of)
    else:
        assert Prepared(request, store).read(entities, as_of).to_dict() == answer.to_dict()


def counting(backend: Backend, **how: Any) -> Stream:
    """A stream that counts and remembers, over one window and all of history."""
    aggregations = [
        aggregation("count", "*", name="all"),
        aggregation("count", "*", HOUR, 5 * MINUTE, name="hour"),
        aggregation("last_3", "whole", HOUR, 5 * MINUTE, name="last"),
    ]
    return stream_over(backend, aggregations, KEY, **how)


def at(time: int, customer: int = 1, whole: int = 0) -> LogRow:
    return LogRow((customer,), time, None, {"whole": whole})


def contents(backend: Backend) -> dict[bytes, bytes | None]:
    keys = sorted(set(backend.scan(b"")))
    return dict(zip(keys, backend.get(keys), strict=True))


def test_a_position_applied_twice_changes_nothing(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR)])
    stream.append([at(NOON - 3), at(NOON - 2, 2), at(NOON - 1, 111)])
    before = contents(backend)
    for repeat in (3, 2, 1):
        assert stream.append([], repeat) == Appended(0, repeat, 3)
        assert contents(backend) == before
    assert stream.append([at(NOON, 1)], repeat=2) == Appended(1, 2, 4)
    stream.judge([((c,), NOON + 1) for c in (1, 2, 111)])
    stream.check()


def test_a_gap_is_refused_and_leaves_the_state_unchanged(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    stream.append([at(NOON - 2), at(NOON - 1)])
    before = contents(backend)
    with pytest.raises(PositionGap, match=r"view 'view', partition 0: offset 3 was offered but 2 is next"):
        stream.offer([at(NOON)], Position(0, 3))
    with pytest.raises(PositionGap):
        stream.offer([at(NOON)], Position(0, 2, epoch=1))
    assert contents(backend) == before


def test_partitions_have_positions_of_their_own(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    rows = [at(NOON - 2), at(NOON - 1)]
    done = [stream.offer(rows, Position(p, o)) for p, o in ((0, 0), (7, 40), (7, 40), (7, None))]
    assert done == [Appended(2, 0, 2), Appended(2, 0, 42), Appended(0, 2, 42), Appended(2, 0, 44)]
    read = stream.read([((1,), NOON)])
    assert read.values["all"].to_pylist() == [6]
    assert read.positions == [{0: (0, 2), 7: (0, 44)}]


def test_an_embedded_batch_that_fails_half_way_leaves_the_state_unchanged(tmp_path: Path) -> None:
    backend = EmbeddedBackend(tmp_path)
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR)])
    before = contents(backend)
    done: list[Any] = []

    def fail(transaction: Any, change: Any) -> int:
        done.append(change)
        return 1 // (3 - len(done))

    with mock.patch.object(embedded_module, "_change", fail), pytest.raises(ZeroDivisionError):
        stream.append([at(NOON - 2), at(NOON - 1, 2)])
    assert contents(backend) == before
    backend.close()


@pytest.mark.parametrize("written", range(4))
def test_a_batch_that_fails_half_way_is_finished_by_offering_it_again(backend: Backend, written: int) -> None:
    """On Redis buckets are written one by one: those that are done know it, whatever was written of the others."""
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR)])
    apply, left = type(backend).apply, [written]

    def fail(self: Backend, writes: Sequence[Write], once: bool = False) -> Any:
        if self.together or len(writes) <= left[0]:
            left[0] -= 1 if self.together else len(writes)
            if left[0] >= 0:
                return apply(self, writes, once)  # type: ignore[arg-type]
        else:
            apply(self, writes[: left[0]], once)  # type: ignore[arg-type]
        raise StoreUnavailable("here", "went away", "wait for it")

    rows = [at(NOON - 2), at(NOON - 1, 2), at(NOON - 1, 111)]
    with mock.patch.object(type(backend), "apply", fail), contextlib.suppress(StoreUnavailable):
        stream.offer(rows, Position(0, 0))
    assert stream.offer(rows, Position(0, 0)).next == 3
    assert stream.offer(rows, Position(0, 0)) == Appended(0, 3, 3)
    stream.folded += rows
    stream.judge([((c,), NOON + later) for c in (1, 2, 111) for later in (0, HOUR)])
    stream.check()


def test_a_missing_bucket_is_not_ready_and_never_zeros(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1, 1), at(NOON - 1, 2)])
    space = Keyspace(stream.online.project, "view", 1)
    key = encoded(stream.view, (1,)) or b""
    backend.delete(iter([space.bucket(bucket_of(key))]))
    with pytest.raises(StoreNotReady, match=rf"view 'view': bucket {bucket_of(key)} is missing"):
        stream.read([((1,), NOON)])
    with pytest.raises(StoreNotReady, match="is missing"):
        stream.append([at(NOON)])
    assert stream.read([((2,), NOON)]).values["all"].to_pylist() == [1]


def test_a_flushed_store_is_not_ready_and_never_zeros(backend: Backend) -> None:
    """Also for a reader and a writer that knew the view: what they remember of it is not what is there."""
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1)])
    plain = PlainOnline(backend, stream.online.project, plain_view(["whole"]))
    plain.write(plain_table(plain.view, [(1, NOON, None, {"whole": 5})]), NOON)
    stream.read([((1,), NOON)])
    read_plain(plain, [(1, NOON)])
    backend.delete(iter(list(backend.scan(b""))))
    with pytest.raises(StoreNotReady, match="never filled"):
        stream.read([((1,), NOON)])
    with pytest.raises(StoreNotReady, match="never filled"):
        stream.append([at(NOON)])
    with pytest.raises(StoreNotReady, match="never filled"):
        read_plain(plain, [(1, NOON)])
    with pytest.raises(StoreNotReady, match=r"bucket .* is missing|never filled"):
        plain.write(plain_table(plain.view, [(1, NOON, None, {"whole": 5})]), NOON)


def test_a_store_never_filled_or_filled_for_another_definition_is_not_ready(backend: Backend) -> None:
    stream = counting(backend)
    with pytest.raises(StoreNotReady, match="never filled"):
        stream.read([((1,), NOON)])
    stream.bootstrap([at(NOON - 1)])
    other = windowed(stream.view.aggregations[:1], KEY, stream.view.source)
    with pytest.raises(StoreNotReady, match="another definition"):
        WindowedOnline(backend, stream.online.project, other).read(["all"], [b""], np.array([NOON]))


def test_a_reader_keeps_its_snapshot_while_the_view_is_filled_again(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1)])
    stream.append([at(NOON - 2)])
    lookup = stream.online.look_up([encoded(stream.view, (1,))])
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [2]
    lookup = stream.online.look_up([encoded(stream.view, (1,))])
    before = backend.get(lookup.keys)
    stream.bootstrap([at(NOON - i, whole=i) for i in range(1, 6)])
    # What was fetched before is answered; what is fetched now by keys of before is looked up again.
    assert lookup.answer(["all"], before, np.array([NOON])).values["all"].to_pylist() == [2]
    following = lookup.again(backend.get(lookup.keys))
    assert following is not None
    assert following.again(found := backend.get(following.keys)) is None
    assert following.answer(["all"], found, np.array([NOON])).values["all"].to_pylist() == [5]
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [5]
    stream.judge([((1,), NOON), ((1,), NOON + HOUR)])
    stream.check()


def test_a_view_without_keys_can_be_filled_from_an_empty_log(backend: Backend) -> None:
    stream = stream_over(backend, [aggregation("count", "*", name="n")], ())
    stream.bootstrap([])
    assert stream.read([((), NOON)]).values["n"].to_pylist() == [0]
    stream.append([LogRow((), NOON - 1, None, {})])
    assert stream.read([((), NOON)]).values["n"].to_pylist() == [1]


def test_a_read_of_no_entities_is_empty(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    assert stream.read([]).values["all"].to_pylist() == []


def test_events_folded_by_a_bootstrap_are_not_counted_again_from_the_stream(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    rows = [at(NOON - 2), at(NOON - 1)]
    stream.append(rows)
    stream.bootstrap(rows)  # the archive holds what was appended
    stream.offer(rows, Position(0, 0))
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [2]


def test_events_appended_during_a_bootstrap_are_kept(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 3)])
    log = event_log(stream.view, stream.log.subset([at(NOON - 3)]), None)
    bootstrap(stream.online, log, NOON, END, lambda done, of: stream.append([at(NOON - 2)]) and None)
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [2]


def test_an_older_generation_leaves_nothing_behind(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR, c) for c in range(20)] + [at(NOON, c) for c in range(20)])
    kept = len(contents(backend))
    for _ in range(3):
        stream.bootstrap([at(NOON - HOUR, c) for c in range(20)] + [at(NOON, c) for c in range(20)])
        assert len(contents(backend)) == kept


def test_a_bootstrap_that_fails_leaves_what_was_there(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - 1)])

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    log = event_log(stream.view, stream.log.subset([at(NOON - 5), at(NOON - 4)]), None)
    with pytest.raises(KeyboardInterrupt):
        bootstrap(stream.online, log, NOON, END, stop)
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [1]
    stream.bootstrap([at(NOON - 3, 2)])
    assert stream.read([((1,), NOON), ((2,), NOON)]).values["all"].to_pylist() == [0, 1]


def test_a_store_survives_being_closed_and_opened(tmp_path: Path) -> None:
    first = EmbeddedBackend(tmp_path / "store")
    stream = counting(first)
    with compacting(2):
        stream.bootstrap([at(NOON - HOUR + i, whole=i) for i in range(5)])
        stream.append([at(NOON - 30 * MINUTE + i, whole=10 + i) for i in range(5)])
    before = contents(first)
    first.close()
    second = EmbeddedBackend(tmp_path / "store")
    assert contents(second) == before
    stream.online = WindowedOnline(second, stream.online.project, stream.view, stream.settle)
    stream.append([at(NOON - 1)], repeat=2)
    stream.judge([((1,), NOON), ((1,), NOON + HOUR)])
    stream.check()
    second.close()


def test_projects_and_views_with_alike_names_do_not_touch_each_other(tmp_path: Path) -> None:
    backend = EmbeddedBackend(tmp_path / "store")
    names = [("fraud", "view"), ("antifraud", "view"), ("fraud2", "view"), ("fraud", "view2"), ("f", "raudview")]
    streams = {}
    for rows, (in_project, name) in enumerate(names, 1):
        stream = counting(backend)
        stream.view = replaced_name(stream.view, name)
        stream.online = WindowedOnline(backend, in_project, stream.view)
        stream.bootstrap([at(NOON - i) for i in range(1, rows + 1)])
        streams[in_project, name] = stream
    plain = plain_view(["whole"])
    for in_project in ("fraud", "antifraud"):
        OnlineStore(backend, in_project).plain(plain).write(plain_table(plain, [(1, 5, None, {"whole": 1})]), NOON)

    OnlineStore(backend, "fraud").delete_view("view")
    with pytest.raises(StoreNotReady):
        streams["fraud", "view"].read([((1,), NOON)])
    assert streams["fraud", "view2"].read([((1,), NOON)]).values["all"].to_pylist() == [4]
    OnlineStore(backend, "fraud").delete_project()
    for (in_project, name), stream in streams.items():
        if in_project == "fraud":
            with pytest.raises(StoreNotReady):
                stream.read([((1,), NOON)])
        else:
            rows = names.index((in_project, name)) + 1
            assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [rows]
    assert not [key for key in backend.scan(b"") if b"\x05fraud" in key]
    read = OnlineStore(backend, "antifraud").plain(plain).read(["whole"], [encoded(plain, (1,))], np.array([9]))
    assert read.values["whole"].to_pylist() == [1]
    backend.close()


def replaced_name(view: WindowedView, name: str) -> WindowedView:
    return windowed(view.aggregations, view.keys, view.source, name)


# -- erasing ----------------------------------------------------------------------------------------------------------


@examples(50)
@given(
    aggregations=aggregation_sets(most=6),
    keys=st.sampled_from([keys for keys in KEYS if keys]),
    rng=st.randoms(use_true_random=False),
    compact=st.integers(0, 5),
    settle=st.sampled_from([MINUTE, SECOND, 0]),
    dated=st.booleans(),
)
def test_reads_between_writes_and_erasures_equal_the_reference_without_what_is_erased(
    backend: Backend, aggregations: tuple, keys: tuple, rng: random.Random, compact: int, settle: int, dated: bool
) -> None:
    stream = stream_over(backend, aggregations, keys, dated, settle=settle)
    play = Play(rng, stream)
    play.erasing = True
    with compacting(compact):
        play.run(rounds=4, batch=5, reads=5)
    note(f"folded: {stream.folded}, erased: {stream.erasures}")
    stream.check()


def test_an_erased_entity_reads_as_never_seen_and_what_comes_later_is_a_new_ones(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR + i, c, i) for i in range(9) for c in (1, 2)])
    stream.append([at(NOON - 1, 1), at(NOON - 1, 2), at(NOON, 1), at(NOON + 1, 1), at(NOON + 1, 11)])
    asked = [((c,), NOON + t) for c in (1, 2, 11, 111) for t in (0, 1, 2, HOUR)]
    assert stream.erase({"customer": 1}) == 1
    read = stream.read([((1,), NOON + 1), ((111,), NOON + 1), ((2,), NOON + 1)])
    assert read.values["all"].to_pylist() == [0, 0, 10]
    assert read.known.tolist() == [True, False, True], "an event of the future came before the erasure: it is to come"
    stream.judge(asked)
    stream.clock = NOON + 2
    assert stream.erase({"customer": 1}) == 1
    assert stream.read([((1,), NOON + 2)]).known.tolist() == [False]
    assert stream.erase({"customer": 1}) == 0
    before = contents(backend)
    late = [at(NOON - MINUTE, 1), at(NOON + 2, 1), at(NOON - 1, 2), at(NOON + 3, 1, 5)]
    assert stream.append(late) == Appended(2, 0, 9, 2)
    assert stream.append([], repeat=4) == Appended(0, 4, 9)
    assert contents(backend).keys() - before.keys() == {
        stream.online.generations.space(1).entity(b"H", encoded(stream.view, (1,)) or b"")
    }
    stream.judge([*asked, ((1,), NOON + 3), ((1,), NOON + 4)])
    stream.bootstrap([*stream.appended, at(NOON + 2, 1)])
    stream.judge([*asked, ((1,), NOON + 4)])
    assert stream.read([((1,), NOON + 4)]).values["last"].to_pylist() == [[5]]
    stream.check()


def test_a_batch_of_which_all_is_erased_is_taken_and_positions_go_on(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    stream.erase({"customer": 1})
    assert stream.append([at(NOON), at(NOON - 1)]) == Appended(0, 0, 2, 2)
    assert [record.message for record in caplog.records] == ["view 'view': 2 events of erased entities were left out"]
    assert stream.append([at(NOON + 1)]) == Appended(1, 0, 3)
    assert stream.offer([at(NOON)], Position(0, None)) == Appended(0, 0, 4, 1)


def test_erasing_by_some_keys_takes_every_entity_that_has_them(backend: Backend) -> None:
    keys = (Field("a", ValueType.STRING), Field("n", ValueType.INT32), Field("y", ValueType.BOOL))
    stream = stream_over(backend, [aggregation("count", "*", name="n_all")], keys)
    entities = [(a, n, y) for a in ("1", "11", "") for n in (1, 11) for y in (True, False)]
    stream.bootstrap([LogRow(e, NOON - HOUR, None, {}) for e in entities[::2]])
    stream.append([LogRow(e, NOON - 1, None, {}) for e in entities])
    assert stream.erase({"n": 11, "y": True}) == 3
    assert stream.erase({"a": "11"}) == 3
    assert stream.erase({"a": "1", "n": 1, "y": False}) == 1
    stream.judge([(e, NOON) for e in entities])
    stream.check()
    assert erase(stream.online, Erasure("project", {"customer": "1"}, NOON)) == 0


def test_keys_that_cannot_be_read_back_are_an_error_that_names_the_view(backend: Backend) -> None:
    stream = stream_over(backend, [aggregation("count", "*", name="n")], TEXT_KEYS)
    stream.bootstrap([LogRow(keys, NOON - 1, None, {}) for keys in (("x" * 600, "1"), ("y", "1"), ("y", "2"))])
    erasure = stream.write_down({"b": "1"})
    with pytest.raises(NotErasedOnline, match=r"view 'view': 1 of its keys cannot be read back .* bootstrap view"):
        erase(stream.online, erasure)
    read = stream.read([((a, b), NOON) for a, b in (("y", "1"), ("y", "2"))])
    assert read.values["n"].to_pylist() == [0, 1], "all that can be read back is gone"
    assert stream.erase({"a": "x" * 600, "b": "1"}) == 1
    stream.judge([(("x" * 600, "1"), NOON), (("y", "1"), NOON), (("y", "2"), NOON)])
    stream.check()


class Between:
    """A backend on which something happens once, before the n-th request to it; requests that this makes are free."""

    def __init__(self, backend: Backend, place: int, happens: Callable[[], Any]) -> None:
        self._backend, self._place, self._happens = backend, place, happens
        self.happened = False

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._backend, name)
        if name not in ("get", "apply"):
            return asked

        def ask(*arguments: Any, **options: Any) -> Any:
            self._place -= 1
            if self._place < 0 and not self.happened:
                self.happened = True
                self._happens()
            return asked(*arguments, **options)

        return ask


def beside(stream: Stream, place: int, happens: Callable[[], Any]) -> tuple[WindowedOnline, Between]:
    """The stream's view as a second process has it, on whose store something happens in the middle."""
    between = Between(stream.online.backend, place, happens)
    return WindowedOnline(
        between,  # type: ignore[arg-type]
        stream.online.project,
        stream.view,
        stream.settle,
        stream.erased_now,
    ), between


@pytest.mark.parametrize("erased", [1, 3])
@pytest.mark.parametrize("filling", [False, True])
@pytest.mark.parametrize("fields", [KEY, (*KEY, Field("shop", ValueType.INT64))], ids=["one key", "one of two"])
def test_an_append_with_an_erasure_in_its_middle_brings_nothing_back(
    backend: Backend, fields: tuple[Field, ...], filling: bool, erased: int
) -> None:
    """Wherever in an append (and the compaction that follows) an erasure comes, also of an entity that is not there
    yet (3): what was known by then is gone, in what readers use and in what is being filled; the rest is there once.
    """
    entities = [(customer, *(5,) * (len(fields) - 1)) for customer in (1, 2, 3)]
    past = [LogRow(entity, NOON - HOUR, None, {}) for entity in entities[:2]]
    rows = [LogRow(entity, NOON + t, None, {}) for entity in entities for t in (-HOUR, -2, 0, 1)]
    asked = [(entity, NOON + t) for entity in entities for t in (0, 1, 2, HOUR)]

    for place in itertools.count():
        stream = stream_over(backend, [aggregation("count", "*", name="all")], fields)
        stream.bootstrap(past)
        begun = stream.online.generations.begin() if filling else None
        archived = event_log(stream.view, stream.log.subset(past), None, stream.erased_now)
        other, between = beside(stream, place, lambda s=stream: s.erase({"customer": erased}))
        admitted = admit(stream.view, stream.log.table(rows=rows), stream.clock)
        with compacting(1):
            append([Batch(other, admitted.keys, admitted.events)], stream.clock, Position(0, 0))
        if not between.happened:
            assert place > 3
            break
        stream.folded = stream.remaining([*past, *rows])
        stream.judge(asked)
        if begun is not None:
            bootstrap(stream.online, archived, NOON, END, None, begun)
            stream.judge(asked)
        stream.check()


def test_an_erasure_takes_nothing_that_a_filling_writes_in_its_middle(backend: Backend) -> None:
    """A filling's own writes are not guarded: an event that was not known by the erasure may come at any moment."""
    for place in itertools.count():
        stream = counting(backend)
        stream.bootstrap([at(NOON - 1)])
        begun = stream.online.generations.begin()
        stream.append([at(NOON - 1)])
        row = stream.online.head.encode(Rows(np.array([NOON + 1]), np.array([BEGINNING]), {"whole": [1]}))[0]
        head = begun.entity(b"H", encoded(stream.view, (1,)) or b"")
        other, between = beside(stream, place, lambda h=head, r=row: backend.apply([Write([], [("A", h, r)])]))
        erase(other, stream.write_down({"customer": 1}))
        if not between.happened:
            assert place > 2
            break
        assert backend.get([head]) == [row]


def test_an_erasure_with_an_append_in_its_middle_takes_nothing_that_is_new(backend: Backend) -> None:
    for place in itertools.count():
        stream = counting(backend)
        stream.bootstrap([at(NOON - HOUR), at(NOON - HOUR, 2)])
        stream.append([at(NOON - 1), at(NOON - 1, 2)])

        def append_more(s: Stream = stream) -> None:
            with compacting(1):
                s.append([at(NOON - 2), at(NOON + 1), at(NOON - 2, 2)])

        other, between = beside(stream, place, append_more)
        erase(other, stream.write_down({"customer": 1}))
        stream.folded = stream.remaining(stream.folded)
        if not between.happened:
            assert place > 2
            break
        stream.judge([((c,), NOON + t) for c in (1, 2) for t in (0, 1, 2, HOUR)])
        stream.check()


def test_a_filling_with_an_erasure_in_its_middle_brings_nothing_back(backend: Backend) -> None:
    """Wherever in a bootstrap an erasure comes, also before its log is read and after its readers changed over."""
    for place in itertools.count():
        stream = counting(backend)
        rows = [at(NOON - HOUR), at(NOON - 1), at(NOON + 1), at(NOON - HOUR, 2), at(NOON - 1, 2)]
        if place % 2:
            stream.bootstrap(rows[:1])
        other, between = beside(stream, place // 2, lambda s=stream: s.erase({"customer": 1}))
        log = event_log(stream.view, stream.log.subset(rows), None, stream.erased_now)
        bootstrap(other, log, NOON, END)
        stream.folded, stream.ceiling = stream.remaining(rows), NOON - MINUTE
        stream.judge([((c,), NOON + t) for c in (1, 2) for t in (0, 1, 2, HOUR)])
        stream.check()
        if not between.happened:
            assert place > 10
            break


def test_erasing_a_view_that_was_never_filled_or_for_another_definition(backend: Backend) -> None:
    stream = counting(backend)
    before = contents(backend)
    assert stream.erase({"customer": 1}) == 0
    assert contents(backend) == before
    stream.bootstrap([at(NOON + 1), at(NOON + 1, 2)])
    other = windowed(stream.view.aggregations[:1], KEY, stream.view.source)
    changed = WindowedOnline(backend, stream.online.project, other, erasures=stream.erased_now)
    assert erase(changed, stream.write_down({"customer": 1})) == 1
    assert stream.read([((1,), NOON + 2), ((2,), NOON + 2)]).values["all"].to_pylist() == [0, 1]


def test_settled_events_of_after_an_erasure_are_not_taken_with_those_of_before(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([at(NOON - HOUR)])
    erasure = stream.write_down({"customer": 1})
    stream.clock = NOON + HOUR
    with compacting(1):
        stream.append([at(NOON + 1)])
    with pytest.raises(NotErasedOnline, match="settled while it was under way; erase again"):
        erase(stream.online, erasure)
    assert stream.erase({"customer": 1}) == 1
    stream.judge([((1,), NOON + HOUR)])
    stream.check()


def test_alike_projects_and_views_keep_what_one_of_them_erases(backend: Backend) -> None:
    names = [("fraud", "view"), ("antifraud", "view"), ("fraud2", "view"), ("fraud", "view2"), ("f", "raudview")]
    unique = project()
    streams = {}
    for in_project, name in names:
        stream = counting(backend)
        stream.view = replaced_name(stream.view, name)
        stream.online = WindowedOnline(backend, unique + in_project, stream.view, erasures=stream.erased_now)
        stream.bootstrap([at(NOON - 1)])
        streams[in_project, name] = stream
    streams["fraud", "view"].erase({"customer": 1})
    for stream in streams.values():
        stream.judge([((1,), NOON)])
        stream.check()
    counts = [s.read([((1,), NOON)]).values["all"].to_pylist() for s in streams.values()]
    assert counts == [[0], [1], [1], [1], [1]]


# -- plain views ------------------------------------------------------------------------------------------------------

PLAIN = {
    "flag": ValueType.BOOL,
    "many": ValueType.FLOAT64_LIST,
    "moment": ValueType.TIMESTAMP,
    "moments": ValueType.TIMESTAMP_LIST,
    "blob": ValueType.BYTES,
    "blobs": ValueType.BYTES_LIST,
    "real": ValueType.FLOAT64,
    "single": ValueType.FLOAT32,
    "text": ValueType.STRING,
    "flags": ValueType.BOOL_LIST,
    "whole": ValueType.INT64,
    "words": ValueType.STRING_LIST,
}

#: A row as the tests hold it: customer, event time, created time, values.
PlainRow = tuple[int, int, int | None, dict[str, Any]]


def plain_view(names: Sequence[str], ttl: int = 0) -> PlainView:
    fields = tuple(Field(name, PLAIN[name]) for name in sorted(names))
    return PlainView(name="plain", keys=KEY, features=fields, source=Layout().source(Log(KEY, {}, ())), ttl=ttl)


def plain_table(view: PlainView, rows: Sequence[PlainRow]) -> pa.Table:
    """Rows as writers hand them over."""
    return pa.table(
        {
            "customer": pa.array([r[0] for r in rows], pa.int64()),
            "__time": pa.array([r[1] for r in rows], pa.int64()),
            "__created": pa.array([r[2] for r in rows], pa.int64()),
            **{f.name: values_array([r[3][f.name] for r in rows], f.type) for f in view.features},
        }
    )


def plain_values(value_type: ValueType) -> st.SearchStrategy[Any]:
    """Values without -0.0 (see the tie of zeros in the conformance tests), lists without nulls (see below)."""
    scalar = values_of(value_type.element).map(lambda v: v + 0.0 if isinstance(v, float) else v)
    if not value_type.is_list:
        return scalar
    return st.none() | st.lists(scalar.filter(lambda v: v is not None), max_size=3)


@st.composite
def plain_rows(draw: st.DrawFn, view: PlainView, most: int = 16) -> list[PlainRow]:
    """Rows around noon and up to an hour later, with ties in time and in created time."""
    time = st.sampled_from([NOON - HOUR, NOON - 1, NOON, NOON + 1, NOON + SECOND, NOON + HOUR])
    created = st.sampled_from([None, NOON - HOUR, NOON])
    values = st.fixed_dictionaries({f.name: plain_values(f.type) for f in view.features})
    return draw(st.lists(st.tuples(st.sampled_from([1, 2]), time, created, values), max_size=most))


def read_plain(online: PlainOnline, asked: Sequence[tuple[int | None, int]]) -> Any:
    names = [f.name for f in online.view.features]
    entities = [encoded(online.view, None if c is None else (c,)) for c, _ in asked]
    return online.read(names, entities, np.array([t for _, t in asked], np.int64))


plain_names = st.lists(st.sampled_from(sorted(PLAIN)), min_size=1, max_size=4, unique=True)
ttls = st.sampled_from([0, 0, SECOND, HOUR])


@examples(70)
@given(names=plain_names, ttl=ttls, data=st.data())
def test_plain_reads_between_writes_equal_the_as_of_join_by_hand_or_are_flagged(
    backend: Backend, names: list[str], ttl: int, data: st.DataObject
) -> None:
    view = plain_view(names, ttl)
    online = PlainOnline(backend, project(), view)
    rows = data.draw(plain_rows(view))
    online.write(plain_table(view, []), NOON)
    clock, written = NOON - 2, 0
    while written < len(rows):
        size = data.draw(st.integers(1, 5))
        online.write(plain_table(view, rows[written : written + size]), clock)
        written += size
        times = [NOON - HOUR - 1, NOON - 1, NOON, NOON + 1, NOON + SECOND + 1, NOON + HOUR, NOON + 2 * HOUR, NOON + DAY]
        asked = [(customer, t) for customer in (1, 2, 3, None) for t in times]
        read = read_plain(online, asked)
        past = [(c, t) for c, t, _, _ in rows[:written] if t <= clock]
        from_when = [BEGINNING] * len(asked) if read.exact_from is None else read.exact_from.tolist()
        exact = [i for i, (_, t) in enumerate(asked) if t >= from_when[i]]
        for i, (customer, t) in enumerate(asked):
            if i not in exact:
                assert t < max((time for c, time in past if c == customer), default=END), "flagged though it is known"
        found = [plain_truth(view, rows[:written], *asked[i]) for i in exact]
        expected = pa.table({f.name: values_array([v and v[f.name] for v, _ in found], f.type) for f in view.features})
        taken = pa.table({n: a.take(pa.array(exact, pa.int64())) for n, a in read.values.items()})
        assert_features_equal(taken, expected)
        assert [read.statuses[i] if read.statuses else None for i in exact] == [status for _, status in found]
        clock += data.draw(st.sampled_from([0, 1, 2, SECOND, HOUR]))


def plain_truth(
    view: PlainView, rows: Sequence[PlainRow], customer: int | None, time: int
) -> tuple[Any, Status | None]:
    """The row's values and, where there are none, why."""
    mine = [(t, created, values) for c, t, created, values in rows if c == customer]
    values = newest_row(mine, view, time)
    if values is not None:
        return values, None
    return None, Status.OUTSIDE_MAX_AGE if any(t <= time for t, _, _ in mine) else Status.NOT_FOUND


@examples(40)
@given(names=plain_names, ttl=ttls, data=st.data(), seed=st.integers(0, 99))
def test_order_and_batches_of_writes_do_not_matter_and_history_says_the_same(
    backend: Backend, names: list[str], ttl: int, data: st.DataObject, seed: int
) -> None:
    view = plain_view(names, ttl)
    rows = data.draw(plain_rows(view))
    shuffled = random.Random(seed).sample(rows, len(rows))
    one, other = (PlainOnline(backend, project(), view) for _ in range(2))
    one.write(plain_table(view, rows), NOON)
    other.write(plain_table(view, []), NOON)
    for row in shuffled:
        other.write(plain_table(view, [row]), NOON)
    asked = [(customer, NOON + later) for customer in (1, 2, 3) for later in (0, 1, SECOND, HOUR - 1, HOUR, DAY)]
    reads = [read_plain(online, asked) for online in (one, other)]
    assert reads[0].statuses == reads[1].statuses
    assert reads[0].event_times.tolist() == reads[1].event_times.tolist()
    first, second = (pa.table(read.values) for read in reads)
    assert_features_equal(first, second)
    log = Log(KEY, plain_types(view), tuple(LogRow((c,), t, created, v) for c, t, created, v in rows))
    with log_on_disk(log) as engine:
        spine = pa.table(
            {
                "customer": [c for c, _ in asked],
                "event_timestamp": values_array([t for _, t in asked], ValueType.TIMESTAMP),
            }
        )
        past = retrieve(definitions(view).resolve([f"plain:{n.name}" for n in view.features]), spine, engine)
        filled = PlainOnline(backend, project(), view)
        filled.replace(engine.newest_rows(view, None, END, NOON), NOON)
    assert_features_equal(first, past.select(first.column_names))
    assert_features_equal(pa.table(read_plain(filled, asked).values), past.select(first.column_names))


def plain_types(view: PlainView) -> dict[str, ValueType]:
    return {f.name: f.type for f in view.features}


def test_plain_statuses_say_present_null_not_found_and_too_old(backend: Backend) -> None:
    view = plain_view(["whole"], ttl=HOUR)
    store = OnlineStore(backend, project())
    store.plain(view).write(plain_table(view, [(1, NOON, None, {"whole": 5}), (2, NOON, None, {"whole": None})]), NOON)
    request = definitions(view).resolve(["plain:whole"])
    answer = Prepared(request, store).read({"customer": [1, 2, 3, None]}, NOON + HOUR)
    assert answer.statuses["whole"] == [Status.PRESENT, Status.NULL_VALUE, Status.NOT_FOUND, Status.NOT_FOUND]
    assert answer.event_times["whole"] == [NOON, NOON, BEGINNING, BEGINNING]
    late = Prepared(request, store).read({"customer": [1]}, NOON + HOUR + 1)
    assert (late.statuses["whole"], late.columns["whole"].to_pylist()) == ([Status.OUTSIDE_MAX_AGE], [None])
    with pytest.raises(NotExactOnline):
        Prepared(request, store).read({"customer": [1]}, NOON - 1)


def test_a_view_asked_for_by_two_entity_columns_under_one_name_is_read_by_each(backend: Backend) -> None:
    view = plain_view(["whole", "real"])
    store = OnlineStore(backend, project())
    rows = [(1, NOON, None, {"whole": 1, "real": 0.5}), (2, NOON, None, {"whole": 2, "real": 1.5})]
    store.plain(view).write(plain_table(view, rows), NOON)
    refs = [
        FeatureRef(view="plain", feature=feature, shown_as="plain", join_key_map=(("customer", column),))
        for feature, column in (("whole", "payer"), ("real", "payee"))
    ]
    answer = Prepared(definitions(view).request(refs), store).read({"payer": [1], "payee": [2]}, NOON)
    assert answer.to_dict() == {"payer": [1], "payee": [2], "whole": [1], "real": [1.5]}


def test_a_missing_bucket_of_a_plain_view_is_not_ready(backend: Backend) -> None:
    view = plain_view(["whole"])
    online = PlainOnline(backend, project(), view)
    online.write(plain_table(view, [(1, NOON, None, {"whole": 5})]), NOON)
    backend.delete(iter([Keyspace(online.project, "plain", 1).bucket(bucket_of(encoded(view, (1,)) or b""))]))
    with pytest.raises(StoreNotReady, match="is missing"):
        read_plain(online, [(1, NOON)])


# -- erasing plain rows -----------------------------------------------------------------------------------------------


class Erased:
    """Erasures of customers in a project, as the layer keeps them."""

    def __init__(self) -> None:
        self.erasures = NO_ERASURES

    def load(self) -> Erasures:
        return self.erasures

    def add(self, customer: int, now: int) -> Erasure:
        self.erasures = Erasures((*self.erasures.log, made := Erasure("project", {"customer": str(customer)}, now)))
        return made

    def remaining(self, rows: Sequence[PlainRow]) -> list[PlainRow]:
        return [
            (c, t, created, values)
            for c, t, created, values in rows
            if not any(e.keys == {"customer": str(c)} and (created or t) <= e.erased_at for e in self.erasures.log)
        ]


def check_plain(view: PlainView, online: PlainOnline, rows: Sequence[PlainRow]) -> None:
    """Reads of every time that the store does not refuse are those of these rows, found by hand."""
    times = [NOON - HOUR - 1, NOON - 1, NOON, NOON + 1, NOON + SECOND + 1, NOON + HOUR, NOON + DAY]
    asked = [(customer, t) for customer in (1, 2, 3) for t in times]
    read = read_plain(online, asked)
    exact = [i for i, (_, t) in enumerate(asked) if read.exact_from is None or t >= read.exact_from[i]]
    found = [plain_truth(view, rows, *asked[i]) for i in exact]
    expected = pa.table({f.name: values_array([v and v[f.name] for v, _ in found], f.type) for f in view.features})
    assert_features_equal(pa.table({n: a.take(pa.array(exact)) for n, a in read.values.items()}), expected)
    assert [read.statuses[i] if read.statuses else None for i in exact] == [status for _, status in found]


@examples(50)
@given(names=plain_names, ttl=ttls, data=st.data())
def test_plain_reads_between_writes_and_erasures_are_those_of_the_rows_that_remain(
    backend: Backend, names: list[str], ttl: int, data: st.DataObject
) -> None:
    view, erased = plain_view(names, ttl), Erased()
    online = PlainOnline(backend, project(), view, erased.load)
    online.write(plain_table(view, []), NOON)
    clock, dated = NOON, data.draw(st.booleans())
    written: list[PlainRow] = []
    for _ in range(data.draw(st.integers(1, 4))):
        # A row is created before it is written. With created times all have one: of rows of one future time the store
        # keeps the one that was created last, and forgets one without, which only its event time erases.
        rows = data.draw(plain_rows(view, 5))
        rows = [(c, t, min(created or clock, clock) if dated else None, v) for c, t, created, v in rows]
        write_plain(online, rows, clock, few=data.draw(st.booleans()))
        written = [*written, *erased.remaining(rows)]
        if data.draw(st.booleans()):
            erase(online, erased.add(data.draw(st.sampled_from([1, 2, 3])), clock))
            written = erased.remaining(written)
        check_plain(view, online, written)
        clock += data.draw(st.sampled_from([0, 1, SECOND, HOUR]))
        if data.draw(st.integers(0, 4)) == 0:
            online.replace(plain_table(view, written), clock)
            check_plain(view, online, written)


def write_plain(online: PlainOnline, rows: Sequence[PlainRow], now: int, few: bool) -> None:
    """Writes rows as a table, or as a few."""
    if not few:
        online.write(plain_table(online.view, rows), now)
        return
    names = [f.name for f in online.view.features]
    made = [Row(t, BEGINNING if made is None else made, tuple(v[n] for n in names)) for _, t, made, v in rows]
    online.write_rows([encoded(online.view, (c,)) or b"" for c, *_ in rows], made, now)


@pytest.mark.parametrize("waiting", [False, True], ids=["offered", "merged"])
@pytest.mark.parametrize("filling", [None, "few", "beside", "few beside", "replaced"])
def test_a_plain_write_with_an_erasure_in_its_middle_brings_nothing_back(
    backend: Backend, waiting: bool, filling: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    view = plain_view(["whole"])
    for place in itertools.count():
        erased, in_project = Erased(), project()
        online = PlainOnline(backend, in_project, view, erased.load)
        past = [(c, NOON - HOUR, None, {"whole": 0}) for c in (1, 2)]
        online.write(plain_table(view, past), NOON)
        if filling and "beside" in filling:
            online.generations.begin()
        between = Between(backend, place, lambda o=online, e=erased: erase(o, e.add(1, NOON)))
        other = PlainOnline(between, in_project, view, erased.load)  # type: ignore[arg-type]
        rows = [(c, NOON - 1, None, {"whole": 1}) for c in (1, 2)]
        rows += [(1, NOON + 1, None, {"whole": 2})] if waiting else []
        if filling == "replaced":
            other.replace(plain_table(view, [*past, *rows]), NOON)
        else:
            write_plain(other, rows, NOON, few=bool(filling and "few" in filling))
        check_plain(view, online, erased.remaining([*past, *rows]))
        if filling and "beside" in filling:
            successor = online.generations.space(online.generations.claimed())
            online.generations.publish(successor, BEGINNING, BEGINNING)
            check_plain(view, online, erased.remaining(rows))
        if not between.happened:
            assert place > 3
            break
    assert {record.message for record in caplog.records} <= {
        f"view 'plain': {n} rows of erased entities were left out" for n in (1, 2)
    }
    assert caplog.records


def test_one_erasure_by_one_of_two_keys_takes_plain_rows_of_all_that_have_it(backend: Backend) -> None:
    view = PlainView(
        name="plain",
        keys=TEXT_KEYS,
        features=(Field("whole", ValueType.INT64),),
        source=Layout(delay=DAY).source(Log(TEXT_KEYS, {}, ())),
    )
    erased = Erased()
    online = PlainOnline(backend, project(), view, erased.load)
    entities = [("1", "11"), ("11", "1"), ("1", "1")]
    rows = {"a": [a for a, _ in entities], "b": [b for _, b in entities], "__time": [NOON + 1] * 3}
    table = pa.table({**rows, "__created": pa.nulls(3, pa.int64()), "whole": [1, 2, 3]})
    online.write(table, NOON)
    erased.erasures = Erasures((Erasure("project", {"a": "1"}, NOON + 1 - DAY),))
    assert erase(online, erased.erasures.log[0]) == 2
    online.write(table, NOON + 2)
    read = online.read(["whole"], [encoded(view, entity) for entity in entities], np.array([NOON + 2] * 3))
    assert read.values["whole"].to_pylist() == [None, 2, None]


# -- known wrong, until it is mended ----------------------------------------------------------------------------------


def wrong(reason: str, raises: type[Exception] = AssertionError) -> pytest.MarkDecorator:
    """A test that shows a wrong value; it fails as soon as the value is right."""
    return pytest.mark.xfail(reason=reason, strict=True, raises=raises)


@pytest.mark.parametrize("values", [([None], [1.0]), ([1.0, None], [1.0, 2.0])])
def test_a_tie_of_lists_with_nulls_has_one_winner(backend: Backend, values: tuple) -> None:
    view = plain_view(["many"])
    rows = [(1, NOON, None, {"many": v}) for v in values]
    online = PlainOnline(backend, project(), view)
    online.write(plain_table(view, rows), NOON)
    log = Log(KEY, plain_types(view), tuple(LogRow((1,), NOON, None, v) for *_, v in rows))
    with log_on_disk(log) as engine:
        spine = pa.table({"customer": [1], "event_timestamp": values_array([NOON], ValueType.TIMESTAMP)})
        past = retrieve(definitions(view).resolve(["plain:many"]), spine, engine)
    assert read_plain(online, [(1, NOON)]).values["many"].to_pylist() == past["many"].to_pylist()


@wrong("ties compare values in the order of declaration online, in that of names in history")
def test_the_order_in_which_features_are_declared_decides_nothing(backend: Backend) -> None:
    rows = [(1, NOON, None, {"b": 9, "a": 1}), (1, NOON, None, {"b": 3, "a": 2})]
    found = []
    for names in ("ab", "ba"):
        fields = tuple(Field(n, ValueType.INT64) for n in names)
        view = PlainView(name="plain", keys=KEY, features=fields, source=Layout().source(Log(KEY, {}, ())))
        online = PlainOnline(backend, project(), view)
        online.write(plain_table(view, rows), NOON)
        found.append(read_plain(online, [(1, NOON)]).values["a"].to_pylist())
    assert found == [[2], [2]]


#   written by a clock at 150          120  -> 105 is forgotten, for 120 replaced it
#   written by a clock at  90     100       -> waits, and answers times from 100 to 120 that 105 should answer
@wrong("a writer whose clock is behind leaves a waiting row before one that replaced others: reads between are guessed")
def test_a_writer_whose_clock_is_behind_makes_no_read_wrong(backend: Backend) -> None:
    view = plain_view(["whole"])
    online = PlainOnline(backend, project(), view)
    online.write(plain_table(view, [(1, NOON + s, None, {"whole": s}) for s in (105, 120)]), NOON + 150)
    online.write(plain_table(view, [(1, NOON + 100, None, {"whole": 100})]), NOON + 90)
    read = read_plain(online, [(1, NOON + 110)])
    refused = read.exact_from is not None and read.exact_from[0] > NOON + 110
    assert refused or read.values["whole"].to_pylist() == [105]


#   the writer of the archive and the store:   begin ... append to store, append to archive ... read archive
@wrong("what is appended after a filling began, and archived before the archive is read, is counted twice")
def test_events_archived_while_a_bootstrap_begins_are_counted_once(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    begun = stream.online.generations.begin()
    stream.append([at(NOON - 2)])
    log = event_log(stream.view, stream.log.subset([at(NOON - 2)]), None)
    bootstrap(stream.online, log, NOON, END, None, begun)
    assert stream.read([((1,), NOON)]).values["all"].to_pylist() == [1]


#   the archive lags:   append position 0, fill from an archive without it, offer position 0 again
@wrong("positions carry over to a state that does not hold their events: offered again, they are taken for repeated")
def test_a_position_is_covered_only_by_a_state_that_holds_its_event(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    stream.append([at(NOON - 2)])
    stream.bootstrap([])
    read = stream.read([((1,), NOON)])
    assert read.values["all"].to_pylist() == [min(read.positions[0].get(0, (0, 0))[1], 1)]


@wrong("appends go on into a generation that was begun and never finished; nothing compacts its heads")
def test_a_bootstrap_that_died_costs_later_appends_nothing(backend: Backend) -> None:
    stream = counting(backend)
    stream.bootstrap([])
    stream.online.generations.begin()
    for i in range(300):
        stream.clock = NOON + i * SECOND
        stream.append([at(stream.clock)])
    heads = backend.get(list(backend.scan(*(Keyspace(stream.online.project, "view", n).tail(b"H") for n in (1, 2)))))
    assert sum(map(len, heads)) < 200 * 32
