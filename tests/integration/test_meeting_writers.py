"""Writers, fillings and erasures that meet at the worst moment: what is acknowledged stays, what is erased does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store.aggregations.events import EventLog, Events
from feature_store.config import OnlineConfig
from feature_store.definitions.erasure import Erasure, Erasures
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.errors import BootstrapSuperseded, NotErasedOnline
from feature_store.stores.online.appending import Appended, Batch, Position, append
from feature_store.stores.online.backend import SET, Backend, Write
from feature_store.stores.online.erasing import erase
from feature_store.stores.online.filling import bootstrap
from feature_store.stores.online.generations import Generations
from feature_store.stores.online.keys import bucket_of, entity_key
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.rows import CREATED, TIME, Row
from feature_store.stores.online.windowed import WindowedOnline
from feature_store.testing.views import aggregation
from feature_store.timestamps import BEGINNING, DAY, HOUR, SECOND
from tests.properties.test_online_equals_reference import project
from tests.redis_fixtures import config_of

NOW = 1_533_124_800 * SECOND
CUSTOMER, TERMINAL = Field("customer", ValueType.INT64), Field("terminal", ValueType.INT64)
SOURCE = Source(name="s", path="p", timestamp_field="ts", created_field="seen")
PLAIN = PlainView(name="plain", keys=(CUSTOMER,), features=(Field("x", ValueType.FLOAT64),), source=SOURCE)
COUNT = aggregation("count", "*", DAY, HOUR)
WINDOWED = WindowedView(name="windowed", keys=(CUSTOMER, TERMINAL), aggregations=(COUNT,), source=SOURCE)


@pytest.fixture(scope="module", params=["embedded", "redis"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    if request.param == "embedded":
        opened = open_backend(OnlineConfig(path=tmp_path_factory.mktemp("online")))
    else:
        opened = open_backend(config_of(request.getfixturevalue("redis_single")))
    yield opened
    opened.close()


def rows(*given: tuple[int, int, float]) -> pa.Table:
    customers, times, values = zip(*given, strict=True)
    return pa.table(
        {"customer": customers, TIME: times, CREATED: pa.nulls(len(given), pa.int64()), "x": pa.array(values)}
    )


def value(online: PlainOnline, customer: int, time: int = NOW) -> float | None:
    return online.read(["x"], [entity_key([customer])], np.array([time])).values["x"].to_pylist()[0]


def events(pairs: Sequence[tuple[int, int]], times: Sequence[int]) -> tuple[pa.Table, Events]:
    count = len(pairs)
    keys = {name: pa.array([pair[i] for pair in pairs], pa.int64()) for i, name in enumerate(("customer", "terminal"))}
    unknown = np.full(count, BEGINNING, np.int64)
    return pa.table(keys), Events(np.arange(count + 1), np.array(times, np.int64), unknown, {})


def counted(online: WindowedOnline, pair: tuple[int, int], time: int) -> int:
    return online.read([COUNT.name], [entity_key(pair)], np.array([time])).values[COUNT.name].to_pylist()[0]


class Held:
    """Holds the thread of this name up where `call` is made, until it is let go."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self._name, self._call = name, call
        self.there, self.go = threading.Event(), threading.Event()

    def method(self, *given: Any) -> Any:
        """The call, as a function that can take the place of a method."""
        answer = self._call(*given)
        if threading.current_thread().name == self._name:
            self.there.set()
            assert self.go.wait(30)
        return answer


def test_a_thread_that_learns_of_a_bucket_shows_no_other_a_guard_without_its_erasures(store: Backend) -> None:
    made = [Erasures()]
    load = Held("slow", lambda: made[0])
    of_project = project()
    same = [c for c in range(2, 5_000) if bucket_of(entity_key([c])) == bucket_of(entity_key([1]))]
    other = next(c for c in range(2, 5_000) if c not in same)
    quick = PlainOnline(store, of_project, PLAIN, lambda: made[0])
    quick.write(rows((1, NOW - 6, 0.5)), NOW)
    shared = PlainOnline(store, of_project, PLAIN, load.method)
    shared.write(rows((other, NOW - 5, 1.0)), NOW)
    erasure = Erasure(of_project, {"customer": "1"}, NOW)
    made[0] = Erasures((erasure,))
    erase(quick, erasure)

    slow = threading.Thread(target=shared.write, args=(rows((same[0], NOW - 5, 9.0)), NOW), name="slow")
    slow.start()
    assert load.there.wait(30)
    shared.write(rows((1, NOW - 5, 666.0)), NOW)
    load.go.set()
    slow.join()
    shared.write(rows((1, NOW - 4, 667.0)), NOW)
    assert (value(quick, 1), value(quick, same[0])) == (None, 9.0)


@pytest.mark.parametrize("few", [True, False])
def test_of_two_first_writers_neither_loses_what_it_was_told_is_written(
    store: Backend, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_project = project()
    one, other = (PlainOnline(store, of_project, PLAIN) for _ in range(2))
    exists = Held("late", Generations.exists)
    held = exists.method
    monkeypatch.setattr(Generations, "exists", lambda *given: held(*given))  # noqa: PLW0108 (binds itself)

    def write(online: PlainOnline, customer: int) -> None:
        if few:
            online.write_rows([entity_key([customer])], [Row(NOW - 5, BEGINNING, (1.0,))], NOW)
        else:
            online.write(rows((customer, NOW - 5, 1.0)), NOW)

    late = threading.Thread(target=write, args=(one, 1), name="late")
    late.start()
    assert exists.there.wait(30)
    write(other, 2)
    exists.go.set()
    late.join()
    assert [value(PlainOnline(store, of_project, PLAIN), customer) for customer in (1, 2)] == [1.0, 1.0]


def test_a_filling_that_ends_leaves_a_later_one_alone(store: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    of_project = project()
    early, late = (PlainOnline(store, of_project, PLAIN) for _ in range(2))
    early.write(rows(*((c, NOW - 5, 1.0) for c in range(300))), NOW)
    delete, ended = Generations.delete, []

    def meanwhile(generations: Generations, which: Callable[[int], bool]) -> None:
        if not ended:
            ended.append(0)
            ended[0] = late.replace(rows(*((c, NOW - 4, 2.0) for c in range(300))), NOW)
        delete(generations, which)

    monkeypatch.setattr(Generations, "delete", meanwhile)
    early.replace(rows(*((c, NOW - 5, 1.5) for c in range(300))), NOW)
    fresh = PlainOnline(store, of_project, PLAIN)
    assert ({value(fresh, c) for c in range(300)}, ended) == ({2.0}, [300])


def test_an_overtaken_filling_takes_no_link_from_the_one_that_overtook_it(
    store: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_project = project()
    online, slow, quick = (WindowedOnline(store, of_project, WINDOWED) for _ in range(3))
    past = EventLog(*events([(1, 1)], [NOW - 2 * HOUR]))
    bootstrap(online, past, NOW, NOW)
    before = Held("slow", Generations._before)
    held = before.method
    monkeypatch.setattr(Generations, "_before", lambda *given: held(*given))  # noqa: PLW0108 (binds itself)
    refused: list[str] = []

    def begin() -> None:
        try:
            slow.generations.begin()
        except BootstrapSuperseded as error:
            refused.append(str(error))

    late = threading.Thread(target=begin, name="slow")
    late.start()
    assert before.there.wait(30)
    space = quick.generations.begin()
    before.go.set()
    late.join()
    batch = Batch(online, *events([(1, 1), (2, 1)], [NOW - 100 * SECOND] * 2))
    assert append([batch], NOW, Position(0, 0)) == [Appended(2, 0, 2)]
    bootstrap(quick, past, NOW, NOW, space=space)
    fresh = WindowedOnline(store, of_project, WINDOWED)
    assert [counted(fresh, pair, NOW) for pair in ((1, 1), (2, 1))] == [2, 1]
    assert len(refused) == 1


@pytest.mark.parametrize(
    "late", [((1, NOW + 5, 2.0),), ((1, NOW - 3, 3.0), (1, NOW - 4, 3.0)), ((5, NOW - 3, 3.0),)], ids=str
)
def test_a_writer_goes_on_where_another_process_filled_the_view_anew(
    store: Backend, late: tuple[tuple[int, int, float], ...]
) -> None:
    of_project = project()
    writer, filler = (PlainOnline(store, of_project, PLAIN) for _ in range(2))
    for _ in range(2):
        writer.write(rows((1, NOW - 5, 1.0)), NOW)
    filler.replace(rows((1, NOW - 5, 1.0)), NOW)
    writer.write(rows(*late), NOW)
    assert value(filler, late[0][0], NOW + 5) == late[0][2]
    filler.replace(rows((1, NOW - 5, 1.0)), NOW)
    writer.write_rows([entity_key([c]) for c, _, _ in late], [Row(t, BEGINNING, (x,)) for _, t, x in late], NOW)
    assert value(filler, late[0][0], NOW + 5) == late[0][2]


def test_an_entity_that_cannot_be_erased_now_keeps_no_other_from_it(store: Backend) -> None:
    of_project = project()
    online = WindowedOnline(store, of_project, WINDOWED)
    bootstrap(online, EventLog(*events([], [])), NOW, NOW)
    pairs = [(1, terminal) for terminal in range(2, 50)]
    append([Batch(online, *events(pairs, [NOW - 100 * SECOND] * 48))], NOW, Position(0, 0))
    # Under way since NOW, while one entity gets so many events that they are settled at once.
    busy = events([(1, 1)] * 1_100, [NOW + 10 + i for i in range(1_100)])
    append([Batch(online, *busy)], NOW + SECOND, Position(0, 48))
    with pytest.raises(NotErasedOnline, match="erase again"):
        erase(online, Erasure(of_project, {"customer": "1"}, NOW))
    assert {counted(online, pair, NOW + SECOND) for pair in pairs} == {0}
    assert counted(online, (1, 1), NOW + SECOND) == 1_100


def test_a_write_may_have_thousands_of_guards(store: Backend) -> None:
    tail = project().encode()
    keys = [b"{00}" + tail + b"%d" % i for i in range(9_000)]
    guards = [(key, b"v") for key in keys]
    assert store.apply([Write(guards, [(SET, keys[0], b"w")])]) == [None]
    assert store.apply([Write([], [(SET, key, b"v") for key in keys])]) == [[0] * 9_000]
    assert store.apply([Write(guards, [(SET, keys[0], b"w")])]) == [[0]]
    assert store.apply([Write(guards, [(SET, keys[0], b"x")])]) == [None]
