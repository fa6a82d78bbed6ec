"""Online retrieval: keys and a time in, one row of features for each out, in one round trip to the store."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, OnDemandView, PlainView, StoredView, WindowedView
from feature_store.engines.engine import ROW_TIME, Engine, Spine
from feature_store.errors import NotExactOnline, RequestError
from feature_store.plan.historical import AsOfStage, plan_historical, working_name
from feature_store.retrieval import on_demand
from feature_store.stores.online.blocks import Block, Columns
from feature_store.stores.online.keys import entity_key, integer_keys
from feature_store.stores.online.records import Generation, Positions
from feature_store.stores.online.status import Status
from feature_store.stores.online.store import OnlineStore
from feature_store.stores.online.view import Lookup, OnlineView, ViewRead
from feature_store.timestamps import BEGINNING, micros, parse_time

AsOf = int | dt.datetime | str | np.datetime64 | Sequence[Any] | np.ndarray

Fetch = Generator[list[bytes], "list[bytes | None]", "OnlineFeatures"]
"""A read under way: yields the keys it needs, is sent their values, and returns the answer."""


@dataclass(frozen=True, eq=False)
class KeyColumn:
    """One entity column of a request: its values, typed, None where null."""

    values: list[Any]
    type: ValueType

    @cached_property
    def arrow(self) -> pa.Array:
        return on_demand.request_column("", self.values, self.type, len(self.values))

    @cached_property
    def stored(self) -> list[Any]:
        """The values as the store holds them."""
        return [None if v is None else int(v) for v in self.values] if self.type is ValueType.BOOL else self.values


@dataclass(frozen=True, eq=False)
class Part:
    """One view's part of an answer; an on-demand view has no `read`."""

    block: Block
    statuses: list[Status | None] | None = None
    event_times: np.ndarray | None = None
    known: np.ndarray | None = None
    read: ViewRead | None = None


@dataclass(frozen=True, eq=False)
class Place:
    """Where a column of an answer comes from: a feature of a part, or an entity column."""

    part: Part | None
    feature: int
    key: KeyColumn | None = None


class OnlineFeatures:
    """The answer to an online request: a row for each entity row, columns in the request's order.

    `as_of` is the time of each row. What the values cover (the contract's R): `positions` by view and row the log
    positions, `generations` by view the generation, whose cut says how far its bootstrap had read. Values are made
    when they are asked for.
    """

    def __init__(
        self,
        request: Request,
        as_of: np.ndarray,
        keys: Mapping[str, KeyColumn],
        parts: Mapping[str, Part],
        layout: Mapping[str, tuple[str, int, str | None]],
    ) -> None:
        self.request, self.as_of = request, as_of
        self.key_columns, self.parts, self.layout = keys, parts, layout

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each column comes from, in the request's order."""
        return {
            name: Place(self.parts[part], feature) if key is None else Place(None, 0, self.key_columns[key])
            for name, (part, feature, key) in self.layout.items()
        }

    @cached_property
    def keys(self) -> dict[str, pa.Array]:
        """The entity columns, as they were given."""
        return {name: column.arrow for name, column in self.key_columns.items()}

    @cached_property
    def columns(self) -> dict[str, pa.Array]:
        """The features as Arrow arrays."""
        return {
            name: p.part.block.arrow(p.feature) if p.part else p.key.arrow  # type: ignore[union-attr]
            for name, p in self.places.items()
        }

    @cached_property
    def statuses(self) -> dict[str, list[Status]]:
        """By column, what is to be said of each row's value."""
        return {name: _statuses(place, len(self.as_of)) for name, place in self.places.items()}

    @cached_property
    def event_times(self) -> dict[str, list[int]]:
        """By column the event time of the row behind each value; BEGINNING where there is none, as for windows."""
        none = [BEGINNING] * len(self.as_of)
        times = {name: p.part.event_times if p.part else None for name, p in self.places.items()}
        return {name: none if some is None else some.tolist() for name, some in times.items()}

    @cached_property
    def unknown(self) -> dict[str, list[bool]]:
        """By view and row whether the store holds nothing of the entity."""
        return {name: (~part.known).tolist() for name, part in self.parts.items() if part.known is not None}

    @cached_property
    def positions(self) -> dict[str, list[Positions]]:
        return {name: read.positions for name, read in self._windowed()}

    @cached_property
    def generations(self) -> dict[str, Generation]:
        return {name: read.generation for name, read in self._windowed()}

    def _windowed(self) -> list[tuple[str, ViewRead]]:
        """The windowed views' reads: a plain view's rows cover no positions."""
        views = {refs[0].shown_as: view for view, refs in self.request.by_view()}
        return [
            (name, part.read)
            for name, part in self.parts.items()
            if part.read is not None and isinstance(views.get(name), WindowedView)
        ]

    def to_arrow(self) -> pa.Table:
        """Keys, then features, as an Arrow table."""
        return pa.table({**self.keys, **self.columns})

    def to_dict(self) -> dict[str, list[Any]]:
        """Keys, then features, as lists of Python values (None is null; times are aware datetimes)."""
        answer = {name: column.values[:] for name, column in self.key_columns.items()}
        lists = {name: part.block.python() for name, part in self.parts.items()}
        for name, (part, feature, key) in self.layout.items():
            answer[name] = lists[part][feature] if key is None else self.key_columns[key].values[:]
        return answer

    def to_numpy(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """The named numeric columns (all of them, if not told) as float64, shape (rows, columns); null is NaN."""
        places = [self.places[c] for c in columns or self.places]
        return np.column_stack([_floats(p) for p in places]) if places else np.zeros((len(self.as_of), 0))


def _floats(place: Place) -> np.ndarray:
    if place.part is not None:
        return place.part.block.floats(place.feature)
    assert place.key is not None
    return place.key.arrow.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _statuses(place: Place, rows: int) -> list[Status]:
    if place.part is None:
        return [Status.PRESENT] * rows
    valid = place.part.block.valid
    mine = [Status.PRESENT] * rows
    if valid is not None and not valid[place.feature].all():
        mine = [Status.PRESENT if there else Status.NULL_VALUE for there in valid[place.feature].tolist()]
    if place.part.statuses is not None:
        mine = [whole or one for whole, one in zip(place.part.statuses, mine, strict=True)]
    return mine


@dataclass(frozen=True)
class Prepared:
    """A request with all its resolution done: a handle for hot paths.

    `history` answers rows whose time the store can no longer answer exactly; without one they are refused.
    """

    request: Request
    store: OnlineStore
    history: Engine | None = None

    @cached_property
    def _groups(self) -> list[_Group]:
        groups = [_Group.of(self._online(view), view, refs) for view, refs in self.request.by_view()]
        shown = Counter(group.name for group in groups)
        # A view may be asked for by several entity columns under one name: its parts are apart all the same.
        return [g if shown[g.name] == 1 else replace(g, name=f"{g.name}@{','.join(g.keys)}") for g in groups]

    def _online(self, view: StoredView) -> OnlineView:
        if isinstance(view, WindowedView) and not view.online:
            raise RequestError(
                view.name, "is declared with online=False: it is never filled; ask history (get_historical_features)"
            )
        return self.store.view(view)

    @cached_property
    def keys(self) -> dict[str, ValueType]:
        """The entity columns a read must carry, with their types."""
        return self.request.keys

    @cached_property
    def request_fields(self) -> dict[str, ValueType]:
        """The request-time values a read must carry, with their types."""
        return self.request.request_fields

    @cached_property
    def feature_names(self) -> list[str]:
        """The columns of the answer, in order."""
        return self.request.columns

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the definitions behind the answer."""
        return self.request.fingerprint

    @cached_property
    def _on_demand(self) -> tuple[OnDemandView, ...]:
        return self.request.on_demand

    def read(self, entities: Mapping[str, Sequence[Any]], as_of: AsOf) -> OnlineFeatures:
        """The features of each row of `entities` (keys and request-time values, as columns) as of a time, or one each.

        Raises RequestError for columns that are missing, of unequal length or of the wrong type; StoreNotReady;
        NotExactOnline where only history could answer and none was given; StoreError where the store does not answer.
        """
        fetch = self._fetch(entities, as_of)
        try:
            keys = next(fetch)
            while True:
                keys = fetch.send(self.store.backend.get(keys) if keys else [])
        except StopIteration as end:
            return end.value

    async def read_async(self, entities: Mapping[str, Sequence[Any]], as_of: AsOf) -> OnlineFeatures:
        """The same without holding up an event loop."""
        fetch = self._fetch(entities, as_of)
        try:
            keys = next(fetch)
            while True:
                keys = fetch.send(await self.store.backend.get_async(keys) if keys else [])
        except StopIteration as end:
            return end.value

    def _fetch(self, entities: Mapping[str, Sequence[Any]], as_of: AsOf) -> Fetch:
        """All of a read but the line to the store."""
        rows = _row_count(entities, as_of)
        times = as_of_times(as_of, rows)
        keys = {name: _key_column(name, entities, key_type, rows) for name, key_type in self.keys.items()}
        given = {name: _request_column(name, entities, t, rows) for name, t in self.request_fields.items()}
        lookups: list[Lookup] = [group.look_up(keys, rows) for group in self._groups]
        while True:
            values = yield [key for lookup in lookups for key in lookup.keys]
            shares = _shares(lookups, values)
            following = [lookup.again(share) for lookup, share in zip(lookups, shares, strict=True)]
            if not any(following):
                break
            lookups = [after or lookup for after, lookup in zip(following, lookups, strict=True)]
        parts = [
            self._exact(group, lookup.answer(group.wanted, share, times), times, keys)
            for group, lookup, share in zip(self._groups, lookups, shares, strict=True)
        ]
        return self._put_together(parts, keys, given, times)

    def _exact(self, group: _Group, read: ViewRead, times: np.ndarray, keys: Mapping[str, KeyColumn]) -> Part:
        """One view's part, with the rows that the store cannot answer exactly answered from history."""
        if read.exact_from is None or not (missed := np.flatnonzero(times < read.exact_from)).size:
            return Part(read.block, read.statuses, read.event_times, read.known, read)
        past = self._past(group, missed, times, read.exact_from, keys)
        columns = [
            _replaced(read.block.arrow(i), missed, past[name]) if name in past else read.block.arrow(i)
            for i, name in enumerate(read.block.names)
        ]
        block = Columns(read.block.names, read.block.types, read.block.rows, columns)
        if isinstance(group.view, WindowedView):
            return Part(block, None, None, read.known, read)
        statuses = list(read.statuses or [None] * read.block.rows)
        event_times = np.array(read.event_times if read.event_times is not None else [BEGINNING] * len(times))
        for row, time in zip(missed.tolist(), past[ROW_TIME].to_pylist(), strict=True):
            statuses[row], event_times[row] = _past_status(group.view, int(times[row]), time)
        known = np.array([status is not Status.NOT_FOUND for status in statuses], bool)
        return Part(block, statuses, event_times, known, read)

    def _past(
        self,
        group: _Group,
        missed: np.ndarray,
        times: np.ndarray,
        exact_from: np.ndarray,
        keys: Mapping[str, KeyColumn],
    ) -> dict[str, pa.Array]:
        """From the event log, the values of those rows whose time the store no longer holds."""
        if self.history is None:
            row = int(missed[0])
            raise NotExactOnline(group.view.name, int(times[row]), int(exact_from[row]))
        (stage,) = plan_historical(self.request.definitions.request(group.refs, full_names=True)).joins
        spine = Spine(times[missed], {n: c.arrow.take(pa.array(missed)) for n, c in keys.items()})
        if isinstance(stage, AsOfStage):
            return self.history.as_of(replace(stage, expired=True), spine)
        return self.history.windows(stage, spine)

    def _put_together(
        self, read: list[Part], keys: Mapping[str, KeyColumn], given: Mapping[str, pa.Array], times: np.ndarray
    ) -> OnlineFeatures:
        parts = {group.name: part for group, part in zip(self._groups, read, strict=True)}
        for view in self._on_demand:
            parts[_computed(view.name)] = self._compute(view, keys, given, len(times), parts)
        return OnlineFeatures(self.request, times, keys, parts, self._layout)

    @cached_property
    def _stored(self) -> dict[str, tuple[str, int, str | None]]:
        """By working name of a stored feature the part it comes from and its place there, or the entity column."""
        return {name: (g.name, place, key) for g in self._groups for name, place, key in g.columns}

    @cached_property
    def _layout(self) -> dict[str, tuple[str, int, str | None]]:
        """The same for each column of the answer, in order."""
        outputs = {view.name: [f.name for f in view.features] for view in self._on_demand}
        made: dict[str, tuple[str, int, str | None]] = {}
        for ref, column in zip(self.request.refs, self.request.columns, strict=True):
            if ref.view in outputs:
                made[column] = (_computed(ref.view), outputs[ref.view].index(ref.feature), None)
            else:
                made[column] = self._stored[working_name(ref)]
        return made

    def _compute(
        self,
        view: OnDemandView,
        keys: Mapping[str, KeyColumn],
        given: Mapping[str, pa.Array],
        rows: int,
        parts: Mapping[str, Part],
    ) -> Part:
        """Runs one on-demand view on what was read and what the request carries."""
        arrays = {}
        for ref in view.inputs:
            part, feature, key = self._stored[working_name(ref)]
            arrays[ref] = parts[part].block.arrow(feature) if key is None else keys[key].arrow
        inputs = {ref.feature: array for ref, array in arrays.items()}
        inputs |= {ref.column(full_names=True): array for ref, array in arrays.items()}
        inputs |= {f.name: given[f.name] for f in view.request}
        outputs = on_demand.run(view, inputs, rows)
        types = [field.type for field in view.features]
        return Part(Columns(list(outputs), types, rows, list(outputs.values())))


@dataclass(frozen=True, eq=False)
class _Group:
    """One view of a request, by the name it is shown as.

    `wanted` are its features, `columns` what is shown of it: a working name with the place among those wanted, or with
    the entity column of a reference to a join key; `keys` the entity columns of its join keys, in their order.
    """

    name: str
    online: OnlineView
    view: StoredView
    refs: list[FeatureRef]
    wanted: tuple[str, ...]
    columns: list[tuple[str, int, str | None]]
    keys: list[str]

    @classmethod
    def of(cls, online: OnlineView, view: StoredView, refs: list[FeatureRef]) -> _Group:
        key_names = [key.name for key in view.keys]
        wanted = tuple(dict.fromkeys(ref.feature for ref in refs if ref.feature not in key_names))
        columns: list[tuple[str, int, str | None]] = []
        for ref in refs:
            key = ref.key_column(ref.feature) if ref.feature in key_names else None
            columns.append((working_name(ref), 0 if key else wanted.index(ref.feature), key))
        keys = [refs[0].key_column(name) for name in key_names]
        return cls(refs[0].shown_as, online, view, refs, wanted, columns, keys)

    def look_up(self, keys: Mapping[str, KeyColumn], rows: int) -> Lookup:
        return self.online.look_up(self._entities([keys[name] for name in self.keys], rows))

    def _entities(self, columns: list[KeyColumn], rows: int) -> Sequence[bytes | None]:
        if not columns:
            return [b""] * rows
        if len(columns) == 1 and columns[0].type.is_integer and None not in columns[0].values:
            return integer_keys(np.array(columns[0].values, np.int64))
        stored = zip(*(column.stored for column in columns), strict=True)
        return [None if None in values else entity_key(values) for values in stored]


def _computed(view: str) -> str:
    """The name of an on-demand view's part: no view is shown by such a one."""
    return f"{view}()"


def _shares(lookups: Sequence[Lookup], values: Sequence[bytes | None]) -> list[Sequence[bytes | None]]:
    """The values of each look-up's keys."""
    if len(lookups) == 1:
        return [values]
    shares, at = [], 0
    for lookup in lookups:
        shares.append(values[at : at + len(lookup.keys)])
        at += len(lookup.keys)
    return shares


def _past_status(view: PlainView, asked: int, time: int | None) -> tuple[Status | None, int]:
    """Status and event time of a row answered from history; `time` is that of the plain view's row behind it."""
    if time is None:
        return Status.NOT_FOUND, BEGINNING
    expired = bool(view.ttl) and time < asked - view.ttl
    return (Status.OUTSIDE_MAX_AGE, BEGINNING) if expired else (None, time)


def _replaced(array: pa.Array, rows: np.ndarray, values: pa.Array) -> pa.Array:
    index = np.arange(len(array))
    index[rows] = len(array) + np.arange(len(rows))
    return pa.concat_arrays([array, values.cast(array.type)]).take(pa.array(index))


def _row_count(entities: Mapping[str, Sequence[Any]], as_of: AsOf) -> int:
    """How many rows are asked for; views without keys may come with no column at all: then one row a time."""
    lengths = {name: len(values) for name, values in entities.items()}
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise RequestError(next(iter(lengths)), f"and the other columns must have one length each, not {text}")
    alone = len(as_of) if hasattr(as_of, "__len__") and not isinstance(as_of, str) else 1
    return next(iter(lengths.values()), alone)


def as_of_times(as_of: AsOf, rows: int) -> np.ndarray:
    """One time a row, in microseconds, from one time or a sequence: integers in microseconds, datetimes, ISO texts, or
    numpy times of any unit. Raises RequestError for anything else.
    """
    if isinstance(as_of, int | dt.datetime | str | np.integer | np.datetime64):
        return np.full(rows, _time(as_of), np.int64)
    if not hasattr(as_of, "__len__"):
        raise RequestError("as_of", f"is a {type(as_of).__name__}, not a time or a sequence of times")
    times = np.array([_time(t) for t in as_of], np.int64)
    if len(times) != rows:
        raise RequestError("as_of", f"has {len(times)} times for {rows} rows")
    return times


def _time(value: Any) -> int:
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            raise RequestError("as_of", "is no time: NaT")
        return int(np.floor_divide(value.astype("datetime64[ns]").astype(np.int64), 1_000))
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    try:
        if isinstance(value, dt.datetime):
            return micros(value)
        if isinstance(value, str):
            return parse_time(value)
    except ValueError as error:
        raise RequestError("as_of", f"is no time: {error}") from error
    raise RequestError("as_of", f"is a {type(value).__name__}, not a time")


def _key_column(name: str, entities: Mapping[str, Sequence[Any]], wanted: ValueType, rows: int) -> KeyColumn:
    if name not in entities:
        raise RequestError(name, f"is missing; the request needs a key column {name} of type {wanted.feast_name}")
    values = entities[name]
    if isinstance(values, list) and _as_they_are(values, wanted):
        return KeyColumn(values, wanted)
    return KeyColumn(_typed(name, values, wanted, rows).to_pylist(), wanted)


def _as_they_are(values: list[Any], wanted: ValueType) -> bool:
    """Whether all values are of the Python type that a key's type has, and in its range: most requests' are."""
    kinds = set(map(type, values))
    if wanted.is_integer and kinds == {int}:
        bits = 31 if wanted is ValueType.INT32 else 63
        return -(1 << bits) <= min(values) and max(values) < 1 << bits
    return wanted is ValueType.STRING and kinds == {str} and all(map(str.isascii, values))


def _request_column(name: str, entities: Mapping[str, Sequence[Any]], wanted: ValueType, rows: int) -> pa.Array:
    if name not in entities:
        raise RequestError(name, f"is missing; an on-demand view reads it from the request as {wanted.feast_name}")
    return _typed(name, entities[name], wanted, rows)


def _typed(name: str, values: Any, wanted: ValueType, rows: int) -> pa.Array:
    try:
        return on_demand.request_column(name, [_coerced(v, wanted) for v in values], wanted, rows)
    except (ValueError, TypeError, OverflowError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RequestError(name, f"does not read as {wanted.feast_name}: {error}") from error


def _coerced(value: Any, wanted: ValueType) -> Any:
    """A value as its declared type where that loses nothing: commands and JSON carry keys as text.

    An integer key given as text is that integer; other text is refused by the type's own conversion.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if wanted.is_list and isinstance(value, list):
        return [_coerced(one, wanted.element) for one in value]
    if wanted.is_numeric and isinstance(value, bool):
        raise TypeError("a boolean is no number")
    if wanted.is_integer and isinstance(value, str):
        return int(value)
    if wanted.is_integer and isinstance(value, float) and not math.isnan(value):
        if not value.is_integer():
            raise TypeError("a fraction is no integer")
        return int(value)
    if wanted.is_float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hasattr(value, "to_pydatetime"):
        return value.to_pydatetime()
    return value
