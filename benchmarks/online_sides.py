"""Who takes part in the online bench, and what each side has to offer: one class, opened in a fresh process each time.

A side is named as "module:Class". It is opened with a `Place` in a process that is pinned to a core and has imported
that class's module and little else; one process fills the store, others read and write, so that all state is in Redis
and in the place's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from benchmarks.online_data import EventLog, Rows, Values, View

HOST = "127.0.0.1"
#: Reads the rows of those keys: key column and features as lists of Python values, in the order of the keys.
Read = Callable[[list[int]], Values]


@dataclass(frozen=True)
class Place:
    """Where a side keeps what it needs: Redis at `port` of this machine, which it shares with the other sides, and a
    folder of its own. `data` holds each view's rows as `<view>.parquet` and each log's history as `<log>.parquet`.
    """

    port: int
    folder: Path
    data: Path


@dataclass(frozen=True)
class Command:
    """How to start a server: the command, in its folder, with more environment. `path` is what requests go to."""

    arguments: Sequence[str]
    folder: Path
    path: str = "/get-online-features"
    environment: Mapping[str, str] = field(default_factory=dict)


class Writer(Protocol):
    """Writes rows so that of one entity the newest event time stays, whatever order they come in."""

    def prepare(self, rows: Rows) -> Any:
        """The rows as the side's public interface takes them. This is not in the time."""

    def write(self, prepared: Any) -> None:
        """Stores them; they can be read when it returns."""


class PlainSide(Protocol):
    """What Feast, the code by hand and Isochron do for plain views."""

    def __init__(self, place: Place) -> None: ...

    def fill(self, view: View) -> None:
        """Makes what the place lacks (a repository, say) and stores `view.rows()`."""

    def reader(self, view: View) -> Read:
        """The way of reading that is measured."""

    def writer(self, view: View) -> Writer: ...

    def server(self, view: View, port: int) -> Command:
        """A server at that port, with one worker, that answers requests in Feast's JSON."""


class WindowedSide(Protocol):
    """What Isochron and raw events in one packed string do for windows over a log."""

    def fill_windows(self, log: EventLog) -> None:
        """Stores the history, `<log.name>.parquet`, then the recent events (`log.table(recent=True)`) as they come."""

    def window_reader(self, log: EventLog, compiled: bool) -> Callable[[list[int]], Any]:
        """Reads the features `WINDOWED` of those keys as of `log.until`: as a dict of lists, or as anything with a
        `to_dict` that gives one (which is not in the time). `compiled` asks for the path that is not numpy.
        """


class IsochronSide(PlainSide, WindowedSide, Protocol):
    """Isochron's side in full. `reader` is the one without Feast's SDK."""

    def sdk_reader(self, view: View) -> Read:
        """Reads through Feast's own, unmodified `FeatureStore.get_online_features(...).to_dict()`."""

    def window_keys(self, log: EventLog, keys: list[int]) -> list[bytes]:
        """The keys in Redis that a windowed read of these entities fetches, all that it fetches: they are what the
        bare MGET asks for.
        """


def open_side(name: str, place: Place) -> Any:
    """The side of that name, opened at a place."""
    module, side = name.split(":")
    return getattr(import_module(module), side)(place)


def difference(ours: Values, right: Values, tolerance: float = 0.0) -> str | None:
    """Where two answers disagree, in words; None where they are equal. Floats may differ by `tolerance` of the larger
    one, in columns that hold sums or means.
    """
    if sorted(ours) != sorted(right):
        return f"columns {sorted(ours)} against {sorted(right)}"
    for name, column in right.items():
        if len(ours[name]) != len(column):
            return f"{name}: {len(ours[name])} rows against {len(column)}"
        allowed = tolerance if name.startswith(("sum_", "mean_")) else 0.0
        for row, (one, other) in enumerate(zip(ours[name], column, strict=True)):
            if not _equal(one, other, allowed):
                return f"{name}, row {row}: {one!r} against {other!r}"
    return None


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if one is None or other is None or not tolerance:
        return type(one) is type(other) and one == other
    return abs(one - other) <= tolerance * max(abs(one), abs(other))
