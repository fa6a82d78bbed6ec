"""Encoded answers, read back, against the answers themselves: every type, nulls, rows that are missing or too old."""

from __future__ import annotations

import base64
import datetime as dt
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import FeatureRef, Field, PlainView, Service
from feature_store.retrieval.online import OnlineFeatures, Prepared
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.plain import CREATED, TIME
from feature_store.stores.online.store import OnlineStore
from feature_store.timestamps import BEGINNING, DAY, HOUR, SECOND, micros, parse_time
from serving.encodings import ARROW, COMPACT, FEAST, Layout, Rows, arrow_stream, chosen, compact_json, feast_json

NOW = parse_time("2024-05-01T12:00:00Z")
TYPES = tuple(t for t in ValueType if t is not ValueType.TIMESTAMP_LIST)
SOURCE = Source(name="rows", path="rows", timestamp_field="at")
KEYS = (Field("id", ValueType.INT64), Field("name", ValueType.STRING), Field("code", ValueType.BYTES))
EVERY = PlainView(
    name="every",
    keys=KEYS,
    features=tuple(sorted((Field(f"f_{t.name.lower()}", t) for t in TYPES), key=lambda f: f.name)),
    source=SOURCE,
    ttl=DAY,
)
#: As most views are: numbers only.
NUMBERS = PlainView(
    name="numbers",
    keys=(Field("id", ValueType.INT64),),
    features=tuple(Field(f"n{i}", (ValueType.FLOAT64, ValueType.INT64, ValueType.FLOAT32)[i % 3]) for i in range(7)),
    source=SOURCE,
)
FLAG = PlainView(name="flag", keys=(), features=(Field("up", ValueType.BOOL),), source=SOURCE)


def refs(view: PlainView) -> list[FeatureRef]:
    return [FeatureRef(view=view.name, feature=f.name, shown_as=view.name) for f in view.features]


# Features of views in turn, so that columns of one view lie apart, and a join key among them.
MIXED = Service(
    "mixed",
    (
        *refs(EVERY)[:3],
        *refs(NUMBERS)[:2],
        *refs(FLAG),
        *refs(EVERY)[3:],
        *refs(NUMBERS)[2:],
        FeatureRef(view="every", feature="name", shown_as="every"),
    ),
)
DEFINITIONS = Definitions(
    project="p", stamp="s", views={v.name: v for v in (EVERY, NUMBERS, FLAG)}, services={"mixed": MIXED}
)

#: Every example has entities of its own.
ENTITIES = itertools.count(0, 10)

_SCALARS: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.BOOL: st.booleans(),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.FLOAT32: st.floats(width=32),
    ValueType.FLOAT64: st.floats(),
    ValueType.STRING: st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["],[", '"', ",", "null"]),
    ValueType.BYTES: st.binary(max_size=8),
    ValueType.TIMESTAMP: st.integers(parse_time("0001-01-02"), parse_time("9999-12-30")).map(
        lambda time: dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=time)
    ),
}


def values_of(value_type: ValueType) -> st.SearchStrategy[Any]:
    scalar = _SCALARS[value_type.element]
    return st.none() | (st.lists(scalar, max_size=3) if value_type.is_list else scalar)


def rows_of(view: PlainView) -> st.SearchStrategy[dict[str, Any]]:
    times = st.sampled_from(
        [NOW - HOUR, NOW - 2 * DAY, NOW - 123_456, NOW - 7_000, parse_time("1969-12-31T23:59:59.5")]
    )
    return st.fixed_dictionaries({TIME: times, **{f.name: values_of(f.type) for f in view.features}})


@pytest.fixture(scope="module")
def store() -> Iterator[OnlineStore]:
    # In memory where there is such a folder: every example fills three views.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        opened = OnlineStore(EmbeddedBackend(Path(folder) / "online"), "p")
        yield opened
        opened.backend.close()


def write(store: OnlineStore, view: PlainView, rows: list[dict[str, Any]], keys: list[tuple]) -> None:
    columns = {f.name: pa.array([k[i] for k in keys[: len(rows)]], f.type.arrow) for i, f in enumerate(view.keys)}
    columns[TIME] = pa.array([row[TIME] for row in rows], pa.int64())
    columns[CREATED] = pa.nulls(len(rows), pa.int64())
    for feature in view.features:
        columns[feature.name] = pa.array([row[feature.name] for row in rows], feature.type.arrow)
    # Into a view that is there already: a filling of its own touches every bucket.
    store.plain(view).write(pa.table(columns), NOW)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(data=st.data())
def test_feasts_json_reads_back_as_the_answer(store: OnlineStore, data: st.DataObject) -> None:
    answer = data.draw(answers(store))
    layout = Layout.of(answer)
    for rows in (Rows.all_of(answer), *slices(data, answer)):
        told = orjson.loads(feast_json(layout, rows))
        assert list(told) == ["results", "metadata"]
        assert told["metadata"] == {"feature_names": list(answer.to_dict())}
        for name, result in zip(told["metadata"]["feature_names"], told["results"], strict=True):
            assert list(result) == ["values", "statuses", "event_timestamps"]
            wanted = answer.to_dict()[name][rows.low : rows.high]
            assert [same(v) for v in result["values"]] == [same(feasts(v)) for v in wanted], name
            statuses = answer.statuses.get(name, ["PRESENT"] * len(answer.as_of))
            assert result["statuses"] == statuses[rows.low : rows.high], name
            times = answer.event_times.get(name, [BEGINNING] * len(answer.as_of))[rows.low : rows.high]
            assert [micros(dt.datetime.fromisoformat(t)) for t in result["event_timestamps"]] == [
                0 if time == BEGINNING else time for time in times
            ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_compact_json_and_arrow_say_the_same(store: OnlineStore, data: st.DataObject) -> None:
    answer = data.draw(answers(store))
    layout = Layout.of(answer)
    for rows in (Rows.all_of(answer), *slices(data, answer)):
        told = orjson.loads(compact_json(layout, rows))
        table = pa.ipc.open_stream(arrow_stream(rows)).read_all()
        wanted = {name: values[rows.low : rows.high] for name, values in answer.to_dict().items()}
        assert list(told["columns"]) == list(wanted)
        for name, values in wanted.items():
            assert [same(v) for v in told["columns"][name]] == [same(compact(v)) for v in values], name
            assert [same(v) for v in table[name].to_pylist()] == [same(v) for v in values], name
        assert set(told["statuses"]) == set(told["event_timestamps"]) == set(answer.parts)
        for view, part in answer.parts.items():
            whole = (part.statuses or [None] * len(answer.as_of))[rows.low : rows.high]
            assert told["statuses"][view] == [status or "PRESENT" for status in whole]
            assert table[f"{view}@status"].to_pylist() == told["statuses"][view]
            times = [None if t == BEGINNING else t for t in part.event_times[rows.low : rows.high].tolist()]
            texts = told["event_timestamps"][view]
            assert [t and micros(dt.datetime.fromisoformat(t)) for t in texts] == times
            assert [t and micros(t) for t in table[f"{view}@event_timestamp"].to_pylist()] == times
        assert table.num_rows == rows.count


@st.composite
def answers(draw: st.DrawFn, store: OnlineStore) -> OnlineFeatures:
    """What the store answers for some of the rows it was just given, and for keys it knows nothing of."""
    first = next(ENTITIES)
    known = [(k, f"k{k}", b"%d" % k) for k in range(first, first + 4)]
    full = draw(st.booleans())
    for view in (EVERY, NUMBERS, FLAG):
        rows = draw(st.lists(rows_of(view), min_size=1, max_size=1 if view is FLAG else 4))
        if full and view is NUMBERS:
            rows = [{**row, **{f.name: 1.5 if f.type.is_float else 7 for f in view.features}} for row in rows]
        write(store, view, rows, known)
    asked = draw(st.lists(st.sampled_from([*known, (-9, "none", b"\xff"), (None, None, None)]), min_size=1, max_size=6))
    entities = {key.name: [k[i] for k in asked] for i, key in enumerate(KEYS)}
    wanted = draw(st.sampled_from(["mixed", [f"numbers:{f.name}" for f in NUMBERS.features], ["every:f_string"]]))
    return Prepared(DEFINITIONS.resolve(wanted), store).read(entities, NOW)


def slices(data: st.DataObject, answer: OnlineFeatures) -> list[Rows]:
    """Neighbouring rows, as of requests that were read together."""
    count = len(answer.as_of)
    cut = data.draw(st.integers(0, count))
    shared: dict[int, list[list[Any]]] = {}
    return [Rows(answer, low, high, shared) for low, high in ((0, cut), (cut, count)) if low < high]


def feasts(value: Any) -> Any:
    """A value as Feast's server writes it."""
    if isinstance(value, list):
        return [feasts(v) for v in value]
    if isinstance(value, dt.datetime):
        time = micros(value)
        return abs(time) // SECOND * (1 if time >= 0 else -1)
    return plain(value)


def compact(value: Any) -> Any:
    if isinstance(value, list):
        return [compact(v) for v in value]
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, dt.datetime) else plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value


def same(value: Any) -> Any:
    """What two equal values have in common: type and text. NaN equals itself, 1 is not True, 0.0 is not -0.0."""
    if isinstance(value, dt.datetime):
        return "time", micros(value)
    return type(value).__name__, [same(v) for v in value] if isinstance(value, list) else repr(value)


def test_an_answer_of_many_rows_is_as_one_of_few(store: OnlineStore) -> None:
    first = 10**6
    keys = [(first + k,) for k in range(300)]
    rows = [
        {TIME: NOW - k * SECOND, **{f.name: k / 7 if f.type is ValueType.FLOAT64 else k for f in NUMBERS.features}}
        for k in range(300)
    ]
    write(store, NUMBERS, rows, keys)
    prepared = Prepared(DEFINITIONS.resolve([f"numbers:{f.name}" for f in NUMBERS.features]), store)
    whole = prepared.read({"id": [key for (key,) in keys]}, NOW)
    told = orjson.loads(feast_json(Layout.of(whole), Rows.all_of(whole)))
    for k in (0, 1, 150, 299):
        one = prepared.read({"id": [first + k]}, NOW)
        alone = orjson.loads(feast_json(Layout.of(one), Rows.all_of(one)))
        assert [[r["values"][k], r["statuses"][k], r["event_timestamps"][k]] for r in told["results"]] == [
            [r["values"][0], r["statuses"][0], r["event_timestamps"][0]] for r in alone["results"]
        ]


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (parse_time("2024-01-01T00:00:00Z"), "2024-01-01T00:00:00Z"),
        (parse_time("2024-01-01T00:00:00.120Z"), "2024-01-01T00:00:00.120Z"),
        (parse_time("2024-01-01T00:00:00.123456Z"), "2024-01-01T00:00:00.123456Z"),
        (parse_time("2024-01-01T00:00:00.000456Z"), "2024-01-01T00:00:00.000456Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        # What RFC 3339 cannot write is written as the nearest it can.
        (parse_time("0001-01-01") - 1, "0001-01-01T00:00:00Z"),
        (-(2**62), "0001-01-01T00:00:00Z"),
    ],
)
def test_event_times_are_written_as_protobuf_does(store: OnlineStore, time: int, text: str) -> None:
    first = next(ENTITIES)
    for keys in ([(first,)], [(first + 1,), (first + 2,)]):
        rows = [{TIME: time, **{f.name: 1 for f in NUMBERS.features}} for _ in keys]
        write(store, NUMBERS, rows, keys)
        answer = Prepared(DEFINITIONS.resolve(["numbers:n0"]), store).read({"id": [k for (k,) in keys]}, NOW)
        told = orjson.loads(feast_json(Layout.of(answer), Rows.all_of(answer)))
        assert told["results"][1]["event_timestamps"] == [text] * len(keys)
        assert told["results"][0]["event_timestamps"] == ["1970-01-01T00:00:00Z"] * len(keys)


def test_the_views_metadata_names_their_definitions(store: OnlineStore) -> None:
    write(store, NUMBERS, [{TIME: NOW, **{f.name: 1 for f in NUMBERS.features}}], [(0,)])
    answer = Prepared(DEFINITIONS.resolve(["numbers:n0"]), store).read({"id": [0]}, NOW)
    told = orjson.loads(feast_json(Layout.of(answer), Rows.all_of(answer), with_views=True))
    assert told["metadata"]["feature_view_metadata"] == [{"name": "numbers", "fingerprint": NUMBERS.fingerprint}]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", FEAST),
        ("*/*", FEAST),
        ("application/json", FEAST),
        ("text/html", FEAST),
        (ARROW, ARROW),
        (f"{ARROW}, */*;q=0.1", ARROW),
        (f"application/json;q=0.5, {COMPACT}", COMPACT),
        (f"application/json, {COMPACT};q=0.5", FEAST),
        (f"{COMPACT};q=x", FEAST),
        (f"{COMPACT};q=0", FEAST),
        (COMPACT.upper(), COMPACT),
    ],
)
def test_the_accept_header_chooses(accept: str, media_type: str) -> None:
    assert chosen(accept.encode()) == media_type
