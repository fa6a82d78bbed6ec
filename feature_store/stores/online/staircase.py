"""The suffix staircase: the settled past of one entity, ready to answer any window with one look-up.

Every window ends at the reader's `t`. So a base keeps, for ascending starts, the state of *all* its events from that
start on: a window from `tail` is answered by the first entry whose start is not before `tail`. No subtraction takes
place, so minima and floats are as exact as a fold. Starts are as fine as the finest hop whose window can still reach
back to them, and coarser with age: a start of age a is a multiple of the greatest common divisor of those hops.

`first` is kept per entry with its order key; `last` and `last_n` are one list of the newest values with theirs.

Which bytes hold a staircase says steps.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from feature_store.aggregations.events import Column, ColumnFold, Events
from feature_store.aggregations.measures import State, combine, identity, measure_of, take
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import WindowedView
from feature_store.stores.online.values import from_arrow
from feature_store.timestamps import BEGINNING


@dataclass(frozen=True)
class Ordered:
    """Values with their order keys (event time, created time), for functions that look an event up."""

    times: list[int]
    created: list[int]
    values: list[Any]

    def __len__(self) -> int:
        return len(self.times)

    def keys(self) -> list[tuple[int, int, Any]]:
        """Order keys with the value last, as the contract breaks ties; text compares by its bytes."""
        values = [v.encode() if isinstance(v, str) else v for v in self.values]
        return list(zip(self.times, self.created, values, strict=True))

    def at(self, index: list[int]) -> Ordered:
        return Ordered(*([column[i] for i in index] for column in (self.times, self.created, self.values)))


@dataclass(frozen=True)
class Base:
    """One entity's staircase. Every event in it is before `exact_from`.

    `states` maps a column (`*` for events) to its suffix states, one element a start; `firsts` and `lasts` map columns
    to their first value per start, and to their newest values, newest first.
    """

    exact_from: int
    starts: np.ndarray
    states: dict[str, State]
    firsts: dict[str, Ordered] = field(default_factory=dict)
    lasts: dict[str, Ordered] = field(default_factory=dict)

    def entry(self, tail: int | None) -> int:
        """The entry that answers a window from `tail` (None: from the beginning); how many there are if none does."""
        return 0 if tail is None else int(np.searchsorted(self.starts, tail))


@dataclass(frozen=True)
class ColumnPlan:
    """What is kept of one column: its type, the measures of its states, whether first values, how many last ones."""

    type: ValueType
    measures: tuple[str, ...]
    first: bool
    last: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64) if self.type.is_float else np.dtype(np.int64)


def column_plans(view: WindowedView) -> dict[str, ColumnPlan]:
    """What is kept of each aggregated column of a view, by name."""
    return {name: _plan(view, name, t) for name, t in view.column_types().items()}


def _plan(view: WindowedView, name: str, value_type: ValueType) -> ColumnPlan:
    functions = [a.function for a in view.aggregations if a.column == name]
    return ColumnPlan(
        value_type,
        tuple(sorted({m for f in functions if (m := measure_of(f, value_type))})),
        any(f.kind == "first" for f in functions),
        max(f.n if f.kind == "last_n" else int(f.kind == "last") for f in functions),
    )


@dataclass(frozen=True)
class StaircaseBuilder:
    """Builds and merges the staircases of one view."""

    view: WindowedView

    @cached_property
    def columns(self) -> dict[str, ColumnPlan]:
        return column_plans(self.view)

    def starts(self, times: np.ndarray, exact_from: int) -> np.ndarray:
        """The start that covers each event time, when readers ask from `exact_from` on. BEGINNING where no window
        reaches that far back; the caller drops those, or keeps them as one where a window has no beginning.
        """
        starts = np.full(len(times), BEGINNING, np.int64)
        windows = [(a.tail(exact_from), a.hop) for a in self.view.aggregations if a.window]
        reached = sorted((tail, hop) for tail, hop in windows if tail is not None)
        for i, (tail, _) in enumerate(reached):
            grain = math.gcd(*(hop for _, hop in reached[: i + 1]))
            starts = np.where(times >= tail, times // grain * grain, starts)
        return starts

    @property
    def _unbounded(self) -> bool:
        return any(not a.window for a in self.view.aggregations)

    def build(self, events: Events, exact_from: int) -> list[Base]:
        """The staircase of each entity. Every event must be before `exact_from`."""
        covering = self.starts(events.times, exact_from)
        entity = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets))
        kept = np.ones(len(covering), bool) if self._unbounded else covering != BEGINNING
        new = np.ones(len(covering), bool)
        new[1:] = (covering[1:] != covering[:-1]) | (entity[1:] != entity[:-1])
        entry = np.flatnonzero(new & kept)
        end = events.offsets[entity[entry] + 1]
        states, firsts = self._suffixes(events, entry, end)
        bounds = np.searchsorted(entity[entry], np.arange(len(events.offsets)))
        lasts = {n: self._lasts(events, n, p) for n, p in self.columns.items() if p.last}
        return [
            Base(
                exact_from,
                covering[entry[low:high]],
                {name: take(state, slice(low, high)) for name, state in states.items()},
                {name: ordered.at(list(range(low, high))) for name, ordered in firsts.items()},
                {name: per_entity[i] for name, per_entity in lasts.items()},
            )
            for i, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        ]

    def _suffixes(
        self, events: Events, low: np.ndarray, high: np.ndarray
    ) -> tuple[dict[str, State], dict[str, Ordered]]:
        """The state of event rows low to high, and the first value in them, for every column."""
        states: dict[str, State] = {"*": {"n": high - low}}
        firsts: dict[str, Ordered] = {}
        for name, plan in self.columns.items():
            fold = ColumnFold.of(events, name)
            first, last = fold.narrow(low, high)
            states[name] = fold.fold(first, last, plan.measures)
            if plan.first:
                firsts[name] = _first_values(events, fold, first, last)
        return states, firsts

    def _lasts(self, events: Events, name: str, plan: ColumnPlan) -> list[Ordered]:
        fold = ColumnFold.of(events, name)
        low, high = fold.narrow(events.offsets[:-1], events.offsets[1:])
        return [
            _ordered(events, fold, fold.rows[max(a, b - plan.last) : b][::-1])
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]

    def merge(self, base: Base | None, events: Events, exact_from: int) -> Base:
        """The staircase of an older one and of further events of the same entity, in any order of time."""
        if base is None:
            return self.build(events, exact_from)[0]
        starts = self._merged_starts(base, events, exact_from)
        here = np.searchsorted(base.starts, starts)
        count = len(events.times)
        low = np.searchsorted(events.times, starts)
        added, added_firsts = self._suffixes(events, low, np.full(len(starts), count))
        states = {
            name: combine(
                _taken(base.states[name], here, self._measures(name), self._dtype(name)), state, self._measures(name)
            )
            for name, state in added.items()
        }
        firsts = {n: _earlier(base.firsts[n], here, ordered) for n, ordered in added_firsts.items()}
        lasts = {
            n: newest(base.lasts[n], self._lasts(events, n, p)[0], p.last) for n, p in self.columns.items() if p.last
        }
        return Base(exact_from, starts, states, firsts, lasts)

    def _merged_starts(self, base: Base, events: Events, exact_from: int) -> np.ndarray:
        """Union of both sides' starts, coarsened to what `exact_from` needs; those out of reach dropped or made one."""
        originals = np.concatenate([base.starts, events.times])
        covering = self.starts(originals, exact_from)
        if not self._unbounded:
            return np.unique(covering[covering != BEGINNING])
        return np.unique(covering)

    def _measures(self, name: str) -> tuple[str, ...]:
        return self.columns[name].measures if name != "*" else ()

    def _dtype(self, name: str) -> np.dtype:
        return self.columns[name].dtype if name != "*" else np.dtype(np.int64)

    def state_at(self, name: str, base: Base | None, entry: int) -> State:
        """A column's suffix state at an entry, one element; that of no event beyond the last."""
        measures, dtype = self._measures(name), self._dtype(name)
        if base is None or entry >= len(base.starts):
            return identity(measures, dtype, 1)
        return take(base.states[name], slice(entry, entry + 1))


def _ordered(events: Events, fold: ColumnFold, rows: np.ndarray) -> Ordered:
    values = _stored(fold.column, rows)
    return Ordered(events.times[rows].tolist(), events.created[rows].tolist(), values)


def _stored(column: Column, rows: np.ndarray) -> list[Any]:
    return from_arrow(column.arrow.take(rows), column.type)


#: Stands at entries that hold no value of a column: later than every real order key.
_NONE_YET = 2**63 - 1


def _first_values(events: Events, fold: ColumnFold, low: np.ndarray, high: np.ndarray) -> Ordered:
    present = low < high
    rows = fold.rows[low[present]]
    found = _ordered(events, fold, rows)
    filler = "" if fold.column.type is ValueType.STRING else b"" if fold.column.type is ValueType.BYTES else 0
    result = Ordered([_NONE_YET] * len(low), [_NONE_YET] * len(low), [filler] * len(low))
    for i, at in enumerate(np.flatnonzero(present).tolist()):
        result.times[at], result.created[at], result.values[at] = found.times[i], found.created[i], found.values[i]
    return result


def _earlier(base: Ordered, here: np.ndarray, added: Ordered) -> Ordered:
    """Per start the earlier of what the base held from there on and of what was added."""
    both = []
    kept, fresh = base.keys(), added.keys()
    for i, at in enumerate(here.tolist()):
        from_base = at < len(kept) and kept[at] <= fresh[i]
        both.append((base, at) if from_base else (added, i))
    return Ordered(*([getattr(side, part)[i] for side, i in both] for part in ("times", "created", "values")))


def newest(a: Ordered, b: Ordered, n: int) -> Ordered:
    """The n newest values of two newest-first lists, newest first."""
    merged = Ordered(a.times + b.times, a.created + b.created, a.values + b.values)
    keys = merged.keys()
    return merged.at(sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:n])


def _taken(state: State, index: np.ndarray, measures: tuple[str, ...], dtype: np.dtype) -> State:
    """Suffix states at these entries; that of no event beyond the last."""
    none = identity(measures, dtype, 1)
    return {part: np.concatenate([values, none[part].astype(values.dtype)])[index] for part, values in state.items()}


def present_first(times: int) -> bool:
    """Whether an entry of firsts holds a value."""
    return times != _NONE_YET
