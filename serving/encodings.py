"""Answers as bytes: Feast's JSON, compact JSON, and Arrow.

An answer of many rows and features is text made of few distinct parts: all features of one view share their statuses
and event times where no value is null. So numbers are written by orjson a column (or, of one row, all features) at a
time, the shared parts once, and the rest is joining bytes. What is the same for every request of one shape is kept in
a `Layout`.

Feast's JSON has no NaN, bytes or times: NaN and the infinities are the texts "NaN", "Infinity" and "-Infinity", bytes
are base64 text, times whole seconds since the epoch. Compact JSON is the same but for times, which are ISO 8601 text.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from feature_store.definitions.types import ValueType
from feature_store.retrieval.online import KeyColumn, OnlineFeatures, Part
from feature_store.stores.online.status import Status
from feature_store.timestamps import BEGINNING, SECOND, arrow_timestamps, iso

FEAST, COMPACT, ARROW = (
    "application/json",
    "application/vnd.isochron.compact+json",
    "application/vnd.apache.arrow.stream",
)

_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_TIMES = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z

#: The times that RFC 3339 can write, in microseconds: the years 1 to 9999.
_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_000_000

#: What a stored value becomes in JSON; a type that is not here is written as it is.
_Converters = Mapping[ValueType, Callable[[Any], Any]]


def _seconds(time: int) -> int:
    # As Feast, which cuts towards zero.
    return time // SECOND if time >= 0 else -(-time // SECOND)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _number(value: float) -> float | str:
    """A float as JSON can hold it, in protobuf's words where it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


_FEASTS: _Converters = {ValueType.TIMESTAMP: _seconds, ValueType.BOOL: bool, ValueType.BYTES: _base64}
_COMPACTS: _Converters = {**_FEASTS, ValueType.TIMESTAMP: iso}

#: Types whose stored values are numbers that orjson writes as they are, so that commas part them.
_BARE = (ValueType.INT32, ValueType.INT64, ValueType.FLOAT32, ValueType.FLOAT64)


@dataclass(frozen=True)
class Run:
    """Consecutive columns of an answer that come from one `part`, with their places in it; of entity columns (then
    `part` is None) `keys` names each one's.
    """

    names: tuple[str, ...]
    types: tuple[ValueType, ...]
    part: str | None
    features: tuple[int, ...]
    keys: tuple[str, ...]

    @cached_property
    def bare(self) -> bool:
        """Whether all values are plain numbers."""
        return all(value_type in _BARE for value_type in self.types)


@dataclass(frozen=True)
class Layout:
    """What every answer to requests of one shape has in common: its columns, and the definitions of its views."""

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    views: Mapping[str, str]

    @classmethod
    def of(cls, answer: OnlineFeatures) -> Layout:
        """The layout of an answer: entity columns first, then the features in the request's order."""
        request = answer.request
        types = {c: request.type_of(ref) for c, ref in zip(request.columns, request.refs, strict=True)}
        keys = {name: (None, 0, name) for name in answer.key_columns}
        columns = [
            (name, types.get(name) or answer.key_columns[name].type, None if key else part, place, key or "")
            for name, (part, place, key) in (keys | dict(answer.layout)).items()
        ]
        runs = []
        for part, some in groupby(columns, key=lambda column: column[2]):
            names, kinds, _, places, key_names = zip(*some, strict=True)
            runs.append(Run(names, kinds, part, places, key_names))
        views = {refs[0].shown_as: view.fingerprint for view, refs in request.by_view()}
        return cls(tuple(name for name, *_ in columns), tuple(runs), views)

    def metadata(self, with_views: bool = False, echoed: tuple[str, ...] = ()) -> bytes:
        """Feast's `metadata` of an answer. `with_views` adds what Feast calls the feature views' version metadata: a
        version is left out, as Feast does of a view without one; the fingerprint of the view's definition is ours.
        """
        if (with_views, echoed) != (False, ()):
            return self._metadata(with_views, echoed)
        return self._bare_metadata

    @cached_property
    def _bare_metadata(self) -> bytes:
        return self._metadata(False, ())

    def _metadata(self, with_views: bool, echoed: tuple[str, ...]) -> bytes:
        told: dict[str, Any] = {"feature_names": (*echoed, *self.names)}
        if with_views:
            told["feature_view_metadata"] = [{"name": n, "fingerprint": f} for n, f in self.views.items()]
        return orjson.dumps(told)


@dataclass(frozen=True)
class Rows:
    """Some rows of an answer: those of one request, where several were read together. `lists` are the values of its
    parts, which the requests read together share.
    """

    answer: OnlineFeatures
    low: int
    high: int
    lists: dict[int, list[list[Any]]]

    @classmethod
    def all_of(cls, answer: OnlineFeatures) -> Rows:
        return cls(answer, 0, len(answer.as_of), {})

    @property
    def count(self) -> int:
        return self.high - self.low

    def values(self, part: Part) -> list[list[Any]]:
        """The stored values of a part by feature, of all rows of the answer."""
        if (found := self.lists.get(id(part))) is None:
            found = self.lists[id(part)] = part.block.lists()
        return found


def feast_json(
    layout: Layout, rows: Rows, with_views: bool = False, echoed: Mapping[str, Sequence[Any]] | None = None
) -> bytes:
    """Feast's JSON: a column's values, statuses and event times each, and the columns' names.

    `echoed` are further entity columns, which come first as they were given.
    """
    pieces: list[bytes] = [b'{"results":[']
    if echoed:
        # Nobody looked at these values: orjson refuses some that JSON has, such as long integers.
        _add_columns(pieces, [json.dumps(values).encode() for values in echoed.values()], _key_tail(rows.count))
        pieces.append(b",")
    for run in layout.runs:
        _add_run(pieces, run, rows)
        pieces.append(b",")
    pieces[-1] = b'],"metadata":'
    pieces += (layout.metadata(with_views, tuple(echoed or ())), b"}")
    return b"".join(pieces)


def _add_run(pieces: list[bytes], run: Run, rows: Rows) -> None:
    """Adds the JSON of a run's columns, parted by commas."""
    count = rows.count
    if run.part is None:
        _add_columns(pieces, _key_texts(run, rows), _key_tail(count))
        return
    part = rows.answer.parts[run.part]
    times = _times(part, rows)
    if count == 1:
        _add_row(pieces, run, part, rows, times)
        return
    texts, statuses = _column_texts(run, part, rows, _FEASTS), _statuses(run, part, rows)
    if isinstance(statuses, bytes):
        _add_columns(pieces, texts, _tail(statuses, times))
        return
    for text, mine in zip(texts, statuses, strict=True):
        pieces += (b'{"values":', text, _tail(mine, times), b",")
    pieces.pop()


def _add_columns(pieces: list[bytes], texts: Sequence[bytes], tail: bytes) -> None:
    """Adds columns that have their statuses and event times in common."""
    between = tail + b',{"values":'
    pieces.append(b'{"values":')
    for text in texts:
        pieces += (text, between)
    pieces[-1] = tail


def _tail(statuses: bytes, times: bytes) -> bytes:
    return b',"statuses":%b,"event_timestamps":%b}' % (statuses, times)


@lru_cache(maxsize=1_024)
def _key_tail(count: int) -> bytes:
    return _tail(_present(count), _no_times(count))


def _add_row(pieces: list[bytes], run: Run, part: Part, rows: Rows, times: bytes) -> None:
    """Adds the columns of one row: their values are written at once."""
    lists, row = rows.values(part), rows.low
    values = [lists[feature][row] for feature in run.features]
    texts, nulls = _row_texts(run, values, _FEASTS)
    whole = part.statuses[row] if part.statuses is not None else None
    if whole is None and nulls:
        there, missing = (_tail(text, times) for text in (b'["PRESENT"]', b'["NULL_VALUE"]'))
        for text, value in zip(texts, values, strict=True):
            pieces += (b'{"values":[', text, b"]", missing if value is None else there, b",")
        pieces.pop()
        return
    tail = b']%b},{"values":[' % _tail(b'["%b"]' % (whole or Status.PRESENT).encode(), times)[:-1]
    pieces += (b'{"values":[', tail.join(texts), tail[: -len(b',{"values":[')])


def _row_texts(run: Run, values: list[Any], converters: _Converters) -> tuple[list[bytes], bool]:
    """Each value of a row as JSON, and whether any is null."""
    if run.bare:
        text = orjson.dumps(values)
        texts = text[1:-1].split(b",")
        if b"n" not in text:
            return texts, False
    nulls = None in values
    converted = [_converted(v, t, converters) for v, t in zip(values, run.types, strict=True)]
    return [orjson.dumps(value) for value in converted], nulls


def _converted(value: Any, value_type: ValueType, converters: _Converters) -> Any:
    """A stored value as orjson is to write it."""
    if value is None:
        return None
    element = value_type.element
    convert = _number if element.is_float else converters.get(element)
    if convert is None:
        return value
    if value_type.is_list:
        return [None if v is None else convert(v) for v in value]
    return convert(value)


def _column_texts(run: Run, part: Part, rows: Rows, converters: _Converters) -> list[bytes]:
    """Each column's values as a JSON array."""
    arrays, valid = part.block.arrays, part.block.valid
    mine = [array for feature in run.features if (array := arrays[feature]) is not None]
    if run.bare and valid is None and len(mine) == len(run.features):
        texts = [_numbers(array, rows) for array in mine]
        if not any(b"n" in text for text in texts):
            return texts
    return [
        _column_text(feature, value_type, part, rows, converters)
        for feature, value_type in zip(run.features, run.types, strict=True)
    ]


def _column_text(feature: int, value_type: ValueType, part: Part, rows: Rows, converters: _Converters) -> bytes:
    array, valid = part.block.arrays[feature], part.block.valid
    if array is not None and value_type in _BARE and (valid is None or valid[feature, rows.low : rows.high].all()):
        text = _numbers(array, rows)
        if b"n" not in text:
            return text
    values = rows.values(part)[feature][rows.low : rows.high]
    if not value_type.is_integer:
        values = [_converted(v, value_type, converters) for v in values]
    return orjson.dumps(values)


def _numbers(array: np.ndarray, rows: Rows) -> bytes:
    """Numbers as a JSON array; what is not finite becomes null, which alone has the letter n.

    32-bit floats are written as the doubles they are.
    """
    some = array[rows.low : rows.high]
    if some.dtype == _FLOAT32:
        some = some.astype(np.float64)
    return orjson.dumps(np.ascontiguousarray(some), None, _NUMPY)


_FLOAT32 = np.dtype(np.float32)


def _key_texts(run: Run, rows: Rows) -> list[bytes]:
    return [_key_text(rows.answer.key_columns[name], rows) for name in run.keys]


def _key_text(column: KeyColumn, rows: Rows) -> bytes:
    values = column.values[rows.low : rows.high]
    if column.type is ValueType.BYTES:
        values = [None if v is None else _base64(v) for v in values]
    return orjson.dumps(values)


def _statuses(run: Run, part: Part, rows: Rows) -> bytes | list[bytes]:
    """The columns' statuses as JSON arrays; one for all where they are the same."""
    low, high = rows.low, rows.high
    whole = part.statuses[low:high] if part.statuses is not None else None
    if whole is not None and not any(whole):
        whole = None
    shared = _present(high - low) if whole is None else _written([status or Status.PRESENT for status in whole])
    valid = part.block.valid
    if valid is None:
        return shared
    there = valid[list(run.features), low:high]
    if whole is not None:
        # A row that has a status as a whole has no values, and says so by that status.
        there = there | np.array([status is not None for status in whole], bool)
    if there.all():
        return shared
    return [shared if mine.all() else _written(_each(mine.tolist(), whole)) for mine in there]


def _each(there: list[bool], whole: Sequence[Status | None] | None) -> list[Status]:
    mine = [Status.PRESENT if has else Status.NULL_VALUE for has in there]
    return mine if whole is None else [status or one for status, one in zip(whole, mine, strict=True)]


def _written(statuses: Sequence[Status]) -> bytes:
    return b'["' + '","'.join(statuses).encode() + b'"]'


@lru_cache(maxsize=1_024)
def _present(count: int) -> bytes:
    return _written([Status.PRESENT] * count) if count else b"[]"


@lru_cache(maxsize=1_024)
def _no_times(count: int) -> bytes:
    return orjson.dumps(["1970-01-01T00:00:00Z"] * count)


def _times(part: Part, rows: Rows) -> bytes:
    """The event times of rows as a JSON array of RFC 3339 texts, as protobuf writes them; the epoch where none is."""
    if part.event_times is None:
        return _no_times(rows.count)
    times = np.ascontiguousarray(part.event_times[rows.low : rows.high])
    try:
        text = _rfc3339(times)
    except TypeError:  # a time beyond the calendar, or none
        text = b""
    if not text or b'"0000-' in text:
        text = _rfc3339(np.clip(np.where(times == BEGINNING, 0, times), _FIRST, _LAST))
    return text


def _rfc3339(times: np.ndarray) -> bytes:
    text = orjson.dumps(times.view("M8[us]"), option=_TIMES)
    # Protobuf leaves out the microseconds of whole milliseconds.
    return text.replace(b"000Z", b"Z") if b"000Z" in text else text


def compact_json(layout: Layout, rows: Rows) -> bytes:
    """Values by column; statuses and event times by view, for they are a row's, and only of the views that have them.

    {"columns": {name: [...]}, "statuses": {view: [...]}, "event_timestamps": {view: [...]}}
    """
    texts: list[tuple[str, bytes]] = []
    for run in layout.runs:
        part = rows.answer.parts[run.part] if run.part is not None else None
        texts += zip(run.names, _key_texts(run, rows) if part is None else _compact_texts(run, part, rows), strict=True)
    columns = b",".join([orjson.dumps(name) + b":" + text for name, text in texts])
    statuses, times = [], []
    for name, part in _with_rows(rows.answer):
        whole = (part.statuses or [None] * len(rows.answer.as_of))[rows.low : rows.high]
        text = _written([status or Status.PRESENT for status in whole]) if whole else b"[]"
        statuses.append(orjson.dumps(name) + b":" + text)
        times.append(orjson.dumps(name) + b":" + _nullable_times(part, rows))
    return b"".join(
        (
            b'{"columns":{',
            columns,
            b'},"statuses":{',
            b",".join(statuses),
            b'},"event_timestamps":{',
            b",".join(times),
            b"}}",
        )
    )


def _compact_texts(run: Run, part: Part, rows: Rows) -> list[bytes]:
    if rows.count != 1:
        return _column_texts(run, part, rows, _COMPACTS)
    lists = rows.values(part)
    texts, _ = _row_texts(run, [lists[feature][rows.low] for feature in run.features], _COMPACTS)
    return [b"[" + text + b"]" for text in texts]


def _with_rows(answer: OnlineFeatures) -> list[tuple[str, Part]]:
    """The parts whose values come from a stored row, which has a status and an event time."""
    return [(name, part) for name, part in answer.parts.items() if part.event_times is not None]


def _nullable_times(part: Part, rows: Rows) -> bytes:
    assert part.event_times is not None
    times = part.event_times[rows.low : rows.high]
    if not (times == BEGINNING).any():
        return _times(part, rows)
    return orjson.dumps([None if time == BEGINNING else iso(time) for time in times.tolist()])


def arrow_stream(rows: Rows) -> bytes:
    """An Arrow IPC stream: entity columns, features, and of each view whose values come from a stored row the columns
    `<view>@status` (a dictionary of texts) and `<view>@event_timestamp` (null where there is no row).
    """
    low, count = rows.low, rows.count
    columns = {**rows.answer.keys, **rows.answer.columns}
    taken = {name: array.slice(low, count) for name, array in columns.items()}
    for name, part in _with_rows(rows.answer):
        assert part.event_times is not None
        times = part.event_times[low : rows.high]
        taken[f"{name}@status"] = _dictionary((part.statuses or [None] * len(rows.answer.as_of))[low : rows.high])
        mask = times == BEGINNING
        taken[f"{name}@event_timestamp"] = arrow_timestamps(pa.array(times, pa.int64(), mask=mask))
    table = pa.table(taken) if taken else pa.table({})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


_NAMES = tuple(Status)


def _dictionary(statuses: Sequence[Status | None]) -> pa.Array:
    places = [_NAMES.index(status or Status.PRESENT) for status in statuses]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int8()), pa.array([s.value for s in _NAMES]))


@lru_cache(maxsize=256)
def chosen(accept: bytes) -> str:
    """The media type to answer an `Accept` header with: of ours the one with the highest quality, else Feast's JSON."""
    best, quality = FEAST, 0.0
    for part in accept.decode("latin-1").split(","):
        name, *parameters = (text.strip().lower() for text in part.split(";"))
        if name in (FEAST, COMPACT, ARROW) and (mine := _quality(parameters)) > quality:
            best, quality = name, mine
    return best


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0


def encode(
    media_type: str,
    layout: Layout,
    rows: Rows,
    with_views: bool = False,
    echoed: Mapping[str, Sequence[Any]] | None = None,
) -> bytes:
    """Rows of an answer as one of our media types; the other arguments are for Feast's JSON."""
    if media_type == ARROW:
        return arrow_stream(rows)
    if media_type == COMPACT:
        return compact_json(layout, rows)
    return feast_json(layout, rows, with_views, echoed)
