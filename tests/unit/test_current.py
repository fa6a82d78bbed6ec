"""Which definitions a server answers by after an apply, while the store is still filled for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from feature_store.clock import ManualClock
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, Field, OnDemandView, PlainView, Service, StoredView, View
from feature_store.errors import ConfigError
from feature_store.layer import FeatureLayer
from feature_store.monitoring.metrics import FeatureServerMetrics
from serving.current import PATIENCE, CurrentDefinitions, serve
from tests.made_repos import make_repo, write_compiled, write_registry

SOURCE = Source(name="s", path="s", timestamp_field="at")


def plain(name: str, *features: str, ttl: int = 0) -> PlainView:
    fields = tuple(Field(feature, ValueType.INT64) for feature in features)
    return PlainView(name=name, keys=(Field("id", ValueType.INT64),), features=fields, source=SOURCE, ttl=ttl)


def ref(text: str) -> FeatureRef:
    view, _, feature = text.partition(":")
    return FeatureRef(view=view, feature=feature, shown_as=view)


def on_demand(name: str, inputs: Iterable[str], text: str = "") -> OnDemandView:
    return OnDemandView(
        name=name,
        mode="python",
        inputs=tuple(map(ref, inputs)),
        request=(),
        features=(Field("out", ValueType.INT64),),
        body=b"",
        text=text,
        python="3.11",
    )


def service(name: str, *features: str) -> Service:
    return Service(name, tuple(map(ref, features)))


def definitions(*views: View, services: Iterable[Service] = ()) -> Definitions:
    return Definitions(
        project="p",
        stamp="s",
        views={view.name: view for view in views},
        services={one.name: one for one in services},
    )


def filled_for(*views: StoredView) -> Callable[[StoredView], bool]:
    return lambda view: view in views


OLD, NEW = plain("a", "x", "y"), plain("a", "x", "z")
OTHER = plain("b", "x")


def test_a_changed_view_stays_as_it_was_until_the_store_is_filled_for_it() -> None:
    before, after = definitions(OLD, OTHER), definitions(NEW, OTHER, plain("c", "x"))
    served = serve(after, before, filled_for(OLD, OTHER))
    assert served.waiting == {"a"}
    assert served.definitions.views == {"a": OLD, "b": OTHER, "c": plain("c", "x")}
    assert served.applied is after
    done = serve(after, served.definitions, filled_for(NEW, OTHER))
    assert (done.definitions, done.waiting) == (after, frozenset())


def test_a_view_whose_former_values_are_gone_does_not_wait() -> None:
    # Never filled for either, or for a third definition: then it is not ready, by the new one.
    served = serve(definitions(NEW), definitions(OLD), filled_for())
    assert (served.definitions.views["a"], served.waiting) == (NEW, frozenset())


def test_a_second_change_while_the_first_one_waits() -> None:
    first = serve(definitions(NEW), definitions(OLD), filled_for(OLD))
    third = plain("a", "x", ttl=5)
    second = serve(definitions(third), first.definitions, filled_for(OLD))
    assert (second.definitions.views["a"], second.waiting) == (OLD, {"a"})
    assert serve(definitions(third), second.definitions, filled_for(third)).definitions.views["a"] == third


def test_what_changed_without_changing_values_is_taken_at_once() -> None:
    moved = msgspec.structs.replace(OLD, source=msgspec.structs.replace(SOURCE, path="elsewhere"))
    assert serve(definitions(moved), definitions(OLD), filled_for(OLD)).definitions.views["a"] is moved


def test_what_is_no_longer_declared_goes() -> None:
    served = serve(definitions(NEW), definitions(OLD, OTHER, services=[service("t", "b:x")]), filled_for(OLD, OTHER))
    assert set(served.definitions.views) == {"a"}
    assert served.definitions.services == {}


def test_services_of_a_waiting_view_stay_and_others_change() -> None:
    before = definitions(
        OLD,
        OTHER,
        services=[service("reads_a", "a:x", "a:y"), service("reads_b", "b:x"), service("moves", "b:x")],
    )
    after = definitions(
        NEW,
        OTHER,
        services=[
            service("reads_a", "a:z", "b:x"),
            service("reads_b", "b:id", "b:x"),
            service("moves", "a:z"),
            service("new", "a:x"),
        ],
    )
    served = serve(after, before, filled_for(OLD, OTHER)).definitions.services
    assert served == {
        "reads_a": service("reads_a", "a:x", "a:y"),
        "reads_b": service("reads_b", "b:id", "b:x"),
        "moves": service("moves", "b:x"),
        # "new" is for the new definition: not ready.
    }


def test_a_service_that_read_what_is_gone_is_not_kept() -> None:
    before = definitions(OLD, OTHER, services=[service("both", "a:y", "b:x")])
    after = definitions(NEW, services=[service("both", "a:z")])
    assert serve(after, before, filled_for(OLD, OTHER)).definitions.services == {}


def test_on_demand_views_and_what_reads_them_stay_with_their_inputs() -> None:
    before = definitions(
        OLD,
        OTHER,
        on_demand("over_a", ["a:y"]),
        on_demand("over_b", ["b:x"]),
        services=[service("s", "over_a:out"), service("t", "over_b:out")],
    )
    after = definitions(
        NEW,
        OTHER,
        on_demand("over_a", ["a:z"], "new"),
        on_demand("over_b", ["b:x"], "new"),
        on_demand("fresh", ["a:z"]),
        services=[service("s", "over_a:out", "a:z"), service("t", "over_b:out"), service("u", "fresh:out")],
    )
    served = serve(after, before, filled_for(OLD, OTHER)).definitions
    assert served.views["over_a"] == before.views["over_a"]
    assert served.views["over_b"] == after.views["over_b"]
    assert "fresh" not in served.views
    assert served.services == {"s": service("s", "over_a:out"), "t": service("t", "over_b:out")}


# -- the watch over the files ----------------------------------------------------------------------------------------


class Watched:
    """A repository made by hand, and what keeps up with it."""

    def __init__(self, folder: Path) -> None:
        self.repo = make_repo(folder, [OLD])
        self.layer = FeatureLayer(self.repo)
        self.clock = ManualClock()
        self.metrics = FeatureServerMetrics(CollectorRegistry())
        self.compiled: list[Path] = []
        self.fails = False
        self.current = CurrentDefinitions(self.layer, self.clock, self.metrics, self._compile)

    def _compile(self, root: Path) -> None:
        self.compiled.append(root)
        if self.fails:
            raise ConfigError("it cannot be parsed.")
        write_compiled(self.repo, [NEW], [], (self.repo / "data" / "registry.db").read_text())

    def views(self) -> list[View]:
        assert self.layer.definitions is self.current.served.definitions
        return list(self.layer.definitions.views.values())

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("isochron_definitions_reloads_total", {"outcome": outcome}) or 0.0


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "repo")


def test_new_definitions_are_taken_once_they_are_whole(watched: Watched) -> None:
    assert not watched.current.look()
    for state in ("", "sec", "second"):  # as Feast writes: the file is emptied, then written
        write_registry(watched.repo, state)
        assert not watched.current.look()
        assert watched.views() == [OLD]
    write_compiled(watched.repo, [NEW], [], "second")
    assert watched.current.look()
    assert watched.views() == [NEW]
    assert not watched.current.look()
    assert watched.count("taken") == 1
    samples = [sample for metric in watched.metrics.definitions.collect() for sample in metric.samples]
    assert [sample.labels["stamp"] for sample in samples if sample.value == 1] == [watched.layer.definitions.stamp]


def test_a_registry_that_is_gone_or_a_broken_file_changes_nothing(watched: Watched) -> None:
    registry, compiled = (watched.repo / "data" / name for name in ("registry.db", "registry.isochron.json"))
    compiled.write_text("{")
    assert not watched.current.look()
    registry.unlink()
    assert not watched.current.look()
    write_registry(watched.repo, "first")
    assert not watched.current.look()
    assert watched.views() == [OLD]


def test_definitions_that_nobody_compiles_are_compiled_after_a_while(watched: Watched) -> None:
    write_registry(watched.repo, "second")
    watched.current.look()
    watched.clock.advance(PATIENCE - 1)
    watched.current.compile_if_due()
    assert watched.compiled == []
    watched.clock.advance(1)
    watched.current.compile_if_due()
    assert watched.compiled == [watched.repo.resolve()]
    assert watched.current.look()
    assert watched.views() == [NEW]
    watched.clock.advance(10 * PATIENCE)
    watched.current.compile_if_due()
    assert len(watched.compiled) == 1


def test_a_failure_to_compile_is_told_and_tried_again_less_and_less_often(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.fails = True
    write_registry(watched.repo, "second")
    watched.current.look()
    tries = []
    for second in range(40):
        watched.clock.set(second * PATIENCE // 5)
        watched.current.compile_if_due()
        if len(watched.compiled) > len(tries):
            tries.append(second)
    assert tries == [5, 15, 35]
    assert watched.count("failed") == 3
    assert "cannot be compiled: it cannot be parsed" in caplog.text
    assert watched.views() == [OLD]
    watched.fails = False
    watched.clock.advance(100 * PATIENCE)
    watched.current.compile_if_due()
    watched.current.look()
    assert watched.views() == [NEW]


def test_looks_from_many_threads_take_a_change_once(watched: Watched) -> None:
    write_registry(watched.repo, "second")
    write_compiled(watched.repo, [NEW], [], "second")
    threads = [threading.Thread(target=watched.current.look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.count("taken") == 1
    assert watched.views() == [NEW]
