"""A windowed view online, as readers see it: staircases and raw heads, merged as of the time of the read.

How it is filled says filling.py, how events come in appending.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import ColumnFold, Events
from feature_store.aggregations.finalize import Values, finalize
from feature_store.aggregations.folding import fold_short
from feature_store.aggregations.measures import State, combine, measure_of
from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.definitions.erasure import LoadErasures, no_erasures
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.errors import CorruptState, NotErasedOnline
from feature_store.stores.online.backend import Backend
from feature_store.stores.online.blocks import Columns, FeatureColumn, Lists
from feature_store.stores.online.compiled import CompiledFold
from feature_store.stores.online.head import HeadCodec, RawRows
from feature_store.stores.online.records import Bucket
from feature_store.stores.online.single import SingleFold
from feature_store.stores.online.staircase import Base, Ordered, StaircaseBuilder, newest, present_first
from feature_store.stores.online.steps import StaircaseCodec, Staircases
from feature_store.stores.online.values import from_arrow, to_arrow
from feature_store.stores.online.view import Found, OnlineView, ViewRead
from feature_store.timestamps import BEGINNING, SECOND

#: How far behind its clock a writer settles events: what arrives within it needs no special care.
SETTLE = 60 * SECOND

#: Functions that look an event up, by its order key.
_LOOKED_UP = ("first", "last", "last_n")


class WindowedOnline(OnlineView):
    """One windowed view in an online store. `settle` in microseconds."""

    kinds = (b"S", b"H")

    def __init__(
        self,
        backend: Backend,
        project: str,
        view: WindowedView,
        settle: int = SETTLE,
        erasures: LoadErasures = no_erasures,
    ) -> None:
        super().__init__(backend, project, view, erasures)
        self.view, self.settle = view, settle
        self.builder = StaircaseBuilder(view)
        self.codec = StaircaseCodec(view)
        self.head = HeadCodec.of(view)
        self._wanted = lru_cache(maxsize=64)(self._want)
        self._folds = lru_cache(maxsize=64)(self._fold_alone)
        self._compiled = lru_cache(maxsize=64)(self._fold_compiled)

    @cached_property
    def types(self) -> dict[str, ValueType]:
        """The type of each aggregated column."""
        return self.view.column_types()

    def _fold_alone(self, names: tuple[str, ...]) -> SingleFold:
        return SingleFold(self.codec, self.head, [self.view.aggregation(name) for name in names])

    def _fold_compiled(self, names: tuple[str, ...]) -> CompiledFold:
        return CompiledFold(self.codec, self.head, [self.view.aggregation(name) for name in names])

    def _want(self, names: tuple[str, ...]) -> Wanted:
        return Wanted.of(self.view, names)

    def decode(
        self, names: Sequence[str], stored: Sequence[Sequence[bytes | None]], times: np.ndarray, found: Found
    ) -> ViewRead:
        """The named aggregations of each entity as of its time."""
        bases, heads = stored
        wanted = self._wanted(tuple(names))
        if len(times) == 1 and (read := self._single(wanted, bases[0], heads[0], int(times[0]), found)):
            return read
        columns: Sequence[FeatureColumn]
        if (compiled := self._compiled(wanted.names)).able and (done := compiled.fold(bases, heads, times)):
            columns, exact_from = done
        else:
            stairs = Staircases(self.codec, bases)
            columns, exact_from = Reading(self, wanted, stairs, bases, heads, times).columns(), stairs.exact_from
        known = np.ones(len(times), bool)
        if None in bases:
            known = np.array([b is not None or bool(h) for b, h in zip(bases, heads, strict=True)], bool)
            for row, record in enumerate(found.buckets):
                if bases[row] is None and record is not None:
                    exact_from[row] = Bucket.decode(record).exact_from
        block = Columns(wanted.names, wanted.types, len(times), columns)
        return ViewRead(block, known, found, exact_from)

    def _single(
        self, wanted: Wanted, base: bytes | None, head: bytes | None, time: int, found: Found
    ) -> ViewRead | None:
        """The answer for one entity, where it can be folded by itself."""
        values = self._alone(wanted, base, head, time)
        if values is None:
            return None
        block = Lists(wanted.names, wanted.types, 1, [[value] for value in values])
        record = found.buckets[0]
        exact_from = BEGINNING
        if base:
            exact_from = int.from_bytes(base[8:16], "little", signed=True)
        elif record:
            exact_from = Bucket.decode(record).exact_from
        return ViewRead(block, np.array([bool(base or head)]), found, np.array([exact_from]))

    def _alone(self, wanted: Wanted, base: bytes | None, head: bytes | None, time: int) -> list[Any] | None:
        compiled = self._compiled(wanted.names)
        if compiled.able and (values := compiled.fold_one(base, head, time)) is not None:
            return values
        fold = self._folds(wanted.names)
        return fold.fold(base, head, time) if fold.able else None

    def kept(self, stored: Sequence[bytes | None], until: int) -> Sequence[bytes | None]:
        """Of the head the rows that were known later. A staircase goes whole: what it folds cannot be told apart, and
        was known by then unless it was settled since.
        """
        base, head = stored
        if base and self._settled_until(base) > until:
            raise NotErasedOnline(
                self.view.name, "events that came after the erasure were settled while it was under way", "erase again"
            )
        known = self.head.known(head or b"", self.view.source.delay)
        later = [row for row, time in zip(self.head.split(head or b""), known.tolist(), strict=True) if time > until]
        return None, b"".join(later) or None

    def _settled_until(self, base: bytes) -> int:
        """Before which time the events of a staircase happened: any, of one that nobody can read."""
        with contextlib.suppress(CorruptState):
            return self.codec.decode(base).exact_from
        return BEGINNING


@dataclass(frozen=True)
class Wanted:
    """Some aggregations of a view, resolved once for many reads.

    `windows` are the different ones, (window, hop), and `window` which of them each aggregation has; `folded` by column
    the aggregations that are folded and `measures` what they need, `looked_up` those that look events up, each with its
    place in the answer.
    """

    names: tuple[str, ...]
    types: tuple[ValueType, ...]
    windows: tuple[tuple[int, int], ...]
    window: tuple[int, ...]
    measures: dict[str, list[str]]
    folded: dict[str, list[tuple[int, Aggregation]]]
    looked_up: list[tuple[int, Aggregation]]

    @classmethod
    def of(cls, view: WindowedView, names: tuple[str, ...]) -> Wanted:
        aggregations = [view.aggregation(name) for name in names]
        folded: dict[str, list[tuple[int, Aggregation]]] = {}
        looked_up = []
        for place, a in enumerate(aggregations):
            if a.function.kind in _LOOKED_UP:
                looked_up.append((place, a))
            else:
                folded.setdefault(a.column, []).append((place, a))
        windows = tuple(dict.fromkeys((a.window, a.hop) for a in aggregations))
        column_types = view.column_types()
        measures = {
            column: sorted({m for _, a in here if (m := measure_of(a.function, column_types[column]))})
            for column, here in folded.items()
            if column != "*"
        }
        window = tuple(windows.index((a.window, a.hop)) for a in aggregations)
        return cls(names, tuple(a.output for a in aggregations), windows, window, measures, folded, looked_up)

    @cached_property
    def bounded(self) -> np.ndarray:
        """Which windows have a beginning, (windows, 1)."""
        return np.array([window > 0 for window, _ in self.windows], bool).reshape(-1, 1)

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            # A read of join keys only has no window at all.
            np.array([window for window, _ in self.windows], np.int64).reshape(-1, 1),
            np.array([hop or 1 for _, hop in self.windows], np.int64).reshape(-1, 1),
        )

    def tails(self, times: np.ndarray) -> np.ndarray:
        """Where each window that ends before a time begins, (windows, times); BEGINNING where it has no beginning."""
        window, hop = self._lengths
        return np.where(self.bounded, (times - window) // hop * hop, BEGINNING)


class Reading:
    """One read under way: the staircases and heads of some entities, and the time each is asked for."""

    def __init__(
        self,
        online: WindowedOnline,
        wanted: Wanted,
        stairs: Staircases,
        bases: Sequence[bytes | None],
        heads: Sequence[bytes | None],
        times: np.ndarray,
    ) -> None:
        self._online, self._wanted, self._stairs = online, wanted, stairs
        self._bases, self._heads, self._times = bases, heads, times
        self._tails = wanted.tails(times)

    def columns(self) -> list[FeatureColumn]:
        """Per aggregation its values and which there are (None: all), or an Arrow array."""
        found: list[Any] = [None] * len(self._wanted.names)
        if self._wanted.folded:
            self._fold(found)
        if self._wanted.looked_up:
            self._look_up(found)
        return found

    # -- what is folded

    def _fold(self, found: list[Any]) -> None:
        entries = self._stairs.find(self._tails)
        rows = self._online.head.raw(self._heads) if any(self._heads) else None
        low = high = np.zeros(self._tails.shape, np.int64)
        if rows is not None:
            edges = rows.before(np.vstack([self._tails, self._times]))
            low, high = edges[:-1], np.maximum(edges[-1], edges[:-1])
        for column, here in self._wanted.folded.items():
            if column == "*":
                state = {"n": (self._stairs.events(entries) + (high - low)).ravel()}
            else:
                state = self._state(column, entries, rows, low, high)
            self._finalize(column, here, state, found)

    def _state(
        self,
        column: str,
        entries: np.ndarray,
        rows: RawRows | None,
        low: np.ndarray,
        high: np.ndarray,
    ) -> State:
        """Base and head of one column over every window, combined: flat, window by window."""
        measures = self._wanted.measures[column]
        settled = self._stairs.state(column, entries, measures)
        if rows is None:
            return settled
        values, before = rows.clean(column)
        low, high = low.ravel(), high.ravel()
        if before is not None:
            low, high = before[low], before[high]
        return combine(settled, fold_short(values, low, high, measures), measures)

    def _finalize(self, column: str, here: list[tuple[int, Aggregation]], state: State, found: list[Any]) -> None:
        column_type = self._online.codec.columns[column].type if column != "*" else ValueType.INT64
        size = len(self._times)
        made: dict[Function, Values] = {}
        for place, a in here:
            if a.function not in made:
                made[a.function] = finalize(a.function, column_type, state)
            values, valid = made[a.function]
            low = self._wanted.window[place] * size
            found[place] = (values[low : low + size], valid[low : low + size])

    # -- what is looked up

    @cached_property
    def _events(self) -> Events:
        return self._online.head.events(self._heads)

    def _look_up(self, found: list[Any]) -> None:
        events, slots = self._events, np.arange(len(self._times))
        codec = self._online.codec
        bases = [codec.decode(data) if data else None for data in self._bases]
        end = events.rank(slots, self._times)
        folds: dict[str, ColumnFold] = {}
        for place, a in self._wanted.looked_up:
            fold = folds.setdefault(a.column, ColumnFold.of(events, a.column))
            tails = self._tails[self._wanted.window[place]]
            first, last = fold.narrow(events.rank(slots, tails), end)
            values: list[Any] = []
            for base, tail, f, n in zip(bases, tails.tolist(), first.tolist(), last.tolist(), strict=True):
                raw = _raw_values(events, fold, fold.rows[f:n])
                pick = _first if a.function.kind == "first" else _last
                values.append(pick(a, base, tail, raw))
            if a.function.kind != "last_n":
                values = [some[0] if some else None for some in values]
            found[place] = to_arrow(values, a.output)


def _first(a: Aggregation, base: Base | None, tail: int, raw: Ordered) -> list[Any]:
    entry = base.entry(tail) if base else 0
    candidates = raw.at([0]) if len(raw) else raw
    if base and entry < len(base.starts) and present_first(base.firsts[a.column].times[entry]):
        settled = base.firsts[a.column].at([entry])
        if not len(candidates) or settled.keys()[0] <= candidates.keys()[0]:
            candidates = settled
    return candidates.values


def _last(a: Aggregation, base: Base | None, tail: int, raw: Ordered) -> list[Any]:
    settled = base.lasts[a.column] if base else Ordered([], [], [])
    inside = [i for i, time in enumerate(settled.times) if time >= tail]
    return newest(settled.at(inside), raw, a.function.n or 1).values


def _raw_values(events: Events, fold: ColumnFold, rows: np.ndarray) -> Ordered:
    values = from_arrow(fold.column.arrow.take(pa.array(rows)), fold.column.type)
    return Ordered(events.times[rows].tolist(), events.created[rows].tolist(), values)
