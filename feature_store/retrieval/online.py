"""Online retrieval: keys and a time in, one row of features for each out, read in one snapshot of the store."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.definitions.repository import Request
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, OnDemandView, StoredView, WindowedView
from feature_store.engines.engine import ROW_TIME, Engine, Spine
from feature_store.errors import NotExactOnline, RequestError
from feature_store.plan.historical import AsOfStage, plan_historical, working_name
from feature_store.retrieval import on_demand
from feature_store.stores.online.keys import entity_key
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.records import Generation
from feature_store.stores.online.status import Status
from feature_store.stores.online.store import OnlineStore
from feature_store.stores.online.values import from_arrow
from feature_store.stores.online.windowed import WindowedOnline
from feature_store.timestamps import BEGINNING, micros, parse_time

AsOf = int | dt.datetime | str | np.datetime64 | Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class OnlineFeatures:
    """The answer to an online request: a row for each entity row, columns in the request's order.

    `statuses` by column and row; `as_of` the time of each row; `event_times` by column the event time of the stored
    row behind each value (BEGINNING where there is none, as for windows); `unknown` by view and row whether the store
    holds nothing of the entity. What the values cover (the contract's R): `positions` by view and row the log
    positions, `generations` by view the generation, whose cut says how far its bootstrap had read.
    """

    request: Request
    keys: dict[str, pa.Array]
    columns: dict[str, pa.Array]
    statuses: dict[str, list[Status]]
    as_of: np.ndarray
    event_times: dict[str, list[int]] = field(default_factory=dict)
    unknown: dict[str, list[bool]] = field(default_factory=dict)
    positions: dict[str, list[dict[int, tuple[int, int]]]] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)

    def to_arrow(self) -> pa.Table:
        """Keys, then features, as an Arrow table."""
        return pa.table({**self.keys, **self.columns})

    def to_dict(self) -> dict[str, list[Any]]:
        """Keys, then features, as lists of Python values (None is null; times are aware datetimes)."""
        return {name: array.to_pylist() for name, array in (self.keys | self.columns).items()}

    def to_numpy(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """The named numeric columns (all of them, if not told) as float64, shape (rows, columns); null is NaN."""
        arrays = [self.columns[c] for c in columns or self.columns]
        return np.column_stack([_floats(a) for a in arrays]) if arrays else np.zeros((len(self.as_of), 0))


def _floats(array: pa.Array) -> np.ndarray:
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Prepared:
    """A request with all its resolution done: a handle for hot paths.

    `history` answers rows whose time the store can no longer answer exactly; without one they are refused.
    """

    request: Request
    store: OnlineStore
    history: Engine | None = None

    @cached_property
    def _groups(self) -> list[tuple[WindowedOnline | PlainOnline, list[FeatureRef]]]:
        return [(self._online(view), refs) for view, refs in self.request.by_view()]

    def _online(self, view: StoredView) -> WindowedOnline | PlainOnline:
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

    def read(self, entities: Mapping[str, Sequence[Any]], as_of: AsOf) -> OnlineFeatures:
        """The features of each row of `entities` (keys and request-time values, as columns) as of a time, or one each.

        Raises RequestError for columns that are missing, of unequal length or of the wrong type; StoreNotReady;
        NotExactOnline where only history could answer and none was given.
        """
        rows = _row_count(entities, as_of)
        times = as_of_times(as_of, rows)
        keys = {name: _key_column(name, entities, key_type, rows) for name, key_type in self.keys.items()}
        given = {name: _request_column(name, entities, t, rows) for name, t in self.request_fields.items()}
        answer = _Answer(self, times, keys)
        with self.store.backend.reading() as txn:
            for stored, refs in self._groups:
                answer.fetch(txn, stored, refs)
        for on_demand_view in self.request.on_demand:
            answer.compute(on_demand_view, given, rows)
        return answer.result()


class _Answer:
    """An answer being put together: working columns by full name, with what goes beside them."""

    def __init__(self, prepared: Prepared, times: np.ndarray, keys: dict[str, pa.Array]) -> None:
        self._prepared, self._times, self._keys = prepared, times, keys
        self._columns: dict[str, pa.Array] = {}
        self._statuses: dict[str, list[Status | None]] = {}
        self._event_times: dict[str, list[int]] = {}
        self._unknown: dict[str, list[bool]] = {}
        self._positions: dict[str, list[dict[int, tuple[int, int]]]] = {}
        self._generations: dict[str, Generation] = {}

    def fetch(self, txn: Any, stored: WindowedOnline | PlainOnline, refs: list[FeatureRef]) -> None:
        """Reads one view's features for all rows."""
        view = stored.view
        key_names = [key.name for key in view.keys]
        entities = self._entities(view, refs[0])
        wanted = [ref.feature for ref in refs if ref.feature not in key_names]
        if isinstance(stored, WindowedOnline):
            read = stored.read(txn, wanted, entities, self._times)
            statuses: list[Status | None] = [None] * len(entities)
            event_times = [BEGINNING] * len(entities)
            self._unknown[refs[0].shown_as] = (~read.known).tolist()
            self._positions[refs[0].shown_as] = read.positions
            self._generations[refs[0].shown_as] = read.generation
            values, exact_from = read.values, read.exact_from
        else:
            plain = stored.read(txn, wanted, entities, self._times)
            statuses, event_times, values, exact_from = (
                plain.statuses,
                plain.event_times,
                plain.values,
                plain.exact_from,
            )
            self._unknown[refs[0].shown_as] = [s is Status.NOT_FOUND for s in statuses]
        missed = np.flatnonzero(self._times < exact_from)
        if missed.size:
            past = self._past(view, refs, missed, exact_from)
            values = {name: _replaced(values[name], missed, past[name]) for name in values}
            for row, time in zip(missed.tolist(), _row_times(past, len(missed)), strict=True):
                statuses[row], event_times[row] = self._past_status(view, row, time)
                self._unknown[refs[0].shown_as][row] = statuses[row] is Status.NOT_FOUND
        for ref in refs:
            name = working_name(ref)
            key = ref.feature if ref.feature in key_names else None
            self._columns[name] = self._keys[ref.key_column(key)] if key else values[ref.feature]
            self._statuses[name] = [Status.PRESENT] * len(entities) if key else statuses
            self._event_times[name] = event_times

    def _entities(self, view: StoredView, ref: FeatureRef) -> list[bytes | None]:
        if not view.keys:
            return [b""] * len(self._times)
        columns = [from_arrow(self._keys[ref.key_column(k.name)], k.type) for k in view.keys]
        return [None if None in values else entity_key(values) for values in zip(*columns, strict=True)]

    def _past(
        self, view: StoredView, refs: list[FeatureRef], missed: np.ndarray, exact_from: np.ndarray
    ) -> dict[str, pa.Array]:
        """From the event log, the values of those rows whose time the store no longer holds."""
        history = self._prepared.history
        if history is None:
            row = int(missed[0])
            raise NotExactOnline(view.name, int(self._times[row]), int(exact_from[row]))
        (stage,) = plan_historical(self._prepared.request.definitions.request(refs, full_names=True)).joins
        spine = Spine(self._times[missed], {n: a.take(pa.array(missed)) for n, a in self._keys.items()})
        if isinstance(stage, AsOfStage):
            return history.as_of(replace(stage, expired=True), spine)
        return history.windows(stage, spine)

    def _past_status(self, view: StoredView, row: int, time: int | None) -> tuple[Status | None, int]:
        """Status and event time of a row answered from history; `time` is that of the plain view's row behind it."""
        if isinstance(view, WindowedView):
            return None, BEGINNING
        if time is None:
            return Status.NOT_FOUND, BEGINNING
        expired = bool(view.ttl) and time < int(self._times[row]) - view.ttl
        return (Status.OUTSIDE_MAX_AGE, BEGINNING) if expired else (None, time)

    def compute(self, view: OnDemandView, given: Mapping[str, pa.Array], rows: int) -> None:
        """Runs one on-demand view on what was read and what the request carries."""
        inputs = {ref.feature: self._columns[working_name(ref)] for ref in view.inputs}
        inputs |= {ref.column(full_names=True): self._columns[working_name(ref)] for ref in view.inputs}
        inputs |= {f.name: given[f.name] for f in view.request}
        for name, array in on_demand.run(view, inputs, rows).items():
            self._columns[f"{view.name}__{name}"] = array
            self._statuses[f"{view.name}__{name}"] = [None] * rows
            self._event_times[f"{view.name}__{name}"] = [BEGINNING] * rows

    def result(self) -> OnlineFeatures:
        request = self._prepared.request
        columns, statuses, event_times = {}, {}, {}
        for ref, column in zip(request.refs, request.columns, strict=True):
            on_demand_view = isinstance(request.definitions.view(ref.view), OnDemandView)
            name = f"{ref.view}__{ref.feature}" if on_demand_view else working_name(ref)
            columns[column] = self._columns[name]
            valid = self._columns[name].is_valid().to_pylist()
            statuses[column] = [
                s or (Status.PRESENT if v else Status.NULL_VALUE)
                for s, v in zip(self._statuses[name], valid, strict=True)
            ]
            event_times[column] = self._event_times[name]
        return OnlineFeatures(
            request,
            self._keys,
            columns,
            statuses,
            self._times,
            event_times,
            self._unknown,
            self._positions,
            self._generations,
        )


def _row_times(past: Mapping[str, pa.Array], rows: int) -> list[int | None]:
    return past[ROW_TIME].to_pylist() if ROW_TIME in past else [None] * rows


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


def _key_column(name: str, entities: Mapping[str, Sequence[Any]], wanted: ValueType, rows: int) -> pa.Array:
    if name not in entities:
        raise RequestError(name, f"is missing; the request needs a key column {name} of type {wanted.feast_name}")
    return _typed(name, entities[name], wanted, rows)


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
    if wanted.is_integer and isinstance(value, str):
        return int(value)
    if wanted.is_integer and isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if wanted.is_integer and isinstance(value, bool):
        raise TypeError("a boolean is no integer")
    if wanted.is_float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hasattr(value, "to_pydatetime"):
        return value.to_pydatetime()
    return value
