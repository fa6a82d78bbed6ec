"""Event logs that go where mistakes hide: Hypothesis strategies, and seeded logs for volume.

Times tie, lie exactly on hop edges, at midnight and one microsecond beside, before 1970; rows come twice; columns hold
nulls, NaN, infinities, -0.0 and integers at the ends of int64; key values lie so that joining their texts would
confuse them; keys and times are missing. A log can be written as Parquet files in any order, unit and zone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from feature_store.aggregations.reference import Event
from feature_store.definitions.erasure import Erasure, Erasures, key_text
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, micros, moment

TIMESTAMP_FIELD, CREATED_FIELD = "happened_at", "created_at"

#: Midnight before an ordinary day, the epoch, a day before it, and the microsecond before the epoch.
ANCHORS = (micros(moment(1_533_081_600 * SECOND)), 0, -DAY, -1)

_LARGEST = 2**63 - 1

#: Values of each type that have caused trouble somewhere. Floats stay below 1e100: their squares are finite.
AWKWARD: dict[ValueType, tuple[Any, ...]] = {
    ValueType.BOOL: (None, True, False),
    ValueType.INT32: (None, 0, 1, -1, 7, 2**31 - 1, -(2**31)),
    ValueType.INT64: (None, 0, 1, -1, 7, 2**53 + 1, _LARGEST, _LARGEST - 1, -_LARGEST - 1, -_LARGEST),
    ValueType.FLOAT32: (None, 0.0, -0.0, math.nan, math.inf, -math.inf, 1.5, float(np.float32(0.1)), 2.0**100),
    ValueType.FLOAT64: (
        *(None, 0.0, -0.0, math.nan, math.inf, -math.inf, 0.1, 1 / 3, -2.5, 123456789.123, 5e-324),
        *(1e15 + 0.3, 1e100, -1e100),
    ),
    ValueType.STRING: (None, "", "a", "A", "ab", "b", "é", "\U0001f600", "1", "11", "\x00"),
    ValueType.BYTES: (None, b"", b"a", b"\x00", b"\xff", b"a\x00"),
    ValueType.TIMESTAMP: (None, 0, -1, 1, ANCHORS[0], ANCHORS[0] + 1, -DAY),
}

#: Key values of each type; as texts side by side, ("1", "11") and ("11", "1") look alike.
KEY_VALUES: dict[ValueType, tuple[Any, ...]] = {
    ValueType.BOOL: (True, False),
    ValueType.INT32: (1, 11, -1, 111),
    ValueType.INT64: (1, 11, -1, 111, _LARGEST, -_LARGEST - 1),
    ValueType.STRING: ("1", "11", "111", "", "a,b", "é"),
    ValueType.BYTES: (b"1", b"11", b"", b"\xff"),
    ValueType.TIMESTAMP: (0, -1, ANCHORS[0]),
}


@dataclass(frozen=True)
class LogRow:
    """One row of a log: key values in key order, times in microseconds (None is missing), values by column."""

    keys: tuple[Any, ...]
    time: int | None
    created: int | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Log:
    """Rows in arrival order, with the types of their keys and columns."""

    keys: tuple[Field, ...]
    columns: Mapping[str, ValueType]
    rows: tuple[LogRow, ...]

    @property
    def admitted(self) -> tuple[LogRow, ...]:
        """The rows with all keys and a time."""
        return tuple(row for row in self.rows if row.time is not None and None not in row.keys)

    def events(self, entity: tuple[Any, ...], delay: int = 0) -> list[Event]:
        """One entity's events, as the reference takes them; `delay` is the source's."""
        rows = (row for row in self.admitted if row.keys == entity)
        return [Event((row.time or 0) + delay, dict(row.values), row.created) for row in rows]

    @property
    def entities(self) -> list[tuple[Any, ...]]:
        """The distinct keys of admitted rows, in order of arrival."""
        return list(dict.fromkeys(row.keys for row in self.admitted))

    def floored(self, unit: str) -> Log:
        """The log as a file of this time unit can hold it: whole milliseconds for `ms`."""
        if unit != "ms":
            return self
        rows = (replace(row, time=_floor_ms(row.time), created=_floor_ms(row.created)) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def without(self, erasures: Erasures, layout: Layout | None = None) -> Log:
        """The log without the records at or below an erasure, the slow obvious way; in a layout without created times
        every row was known when it happened.
        """
        layout = layout or Layout()
        return self.subset([row for row in self.rows if not any(self._erased(row, e, layout) for e in erasures.log)])

    def _erased(self, row: LogRow, erasure: Erasure, layout: Layout) -> bool:
        if row.time is None or None in row.keys:
            return False
        held = {key.name: key_text(key.name, value) for key, value in zip(self.keys, row.keys, strict=True)}
        known = row.created if layout.created and row.created is not None else row.time
        return erasure.keys.items() <= held.items() and known <= erasure.erased_at

    def subset(self, rows: Sequence[LogRow]) -> Log:
        return replace(self, rows=tuple(rows))

    def table(self, layout: Layout | None = None, rows: Sequence[LogRow] | None = None) -> pa.Table:
        """The rows (all of them, if not told) as a file of this layout would hold them."""
        layout = layout or Layout()
        chosen = self.rows if rows is None else rows
        columns: dict[str, pa.Array] = {}
        for i, key in enumerate(self.keys):
            columns[layout.physical(key.name)] = values_array([row.keys[i] for row in chosen], key.type)
        for name, value_type in self.columns.items():
            columns[layout.physical(name)] = values_array([row.values[name] for row in chosen], value_type)
        columns[layout.physical(TIMESTAMP_FIELD)] = layout.times([row.time for row in chosen])
        if layout.created:
            columns[layout.physical(CREATED_FIELD)] = layout.times([row.created for row in chosen])
        return pa.table(columns)

    def write(self, folder: Path, layout: Layout | None = None) -> Path:
        """Writes the log as the Parquet files of a layout and returns the folder."""
        layout = layout or Layout()
        folder.mkdir(parents=True, exist_ok=True)
        order = list(range(len(self.rows)))
        if layout.shuffle is not None:
            random.Random(layout.shuffle).shuffle(order)
        size = -(-len(order) // layout.files) if order else 0
        for number in range(layout.files):
            rows = [self.rows[i] for i in order[number * size : (number + 1) * size]]
            table = self.table(layout, rows)
            table = table.select(table.column_names[:: -1 if number % 2 else 1])
            pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=layout.row_group or None)
        return folder


@dataclass(frozen=True)
class Layout:
    """How a log lies in files: time unit and zone, a created column or none, mapped names, files and row groups.

    `shuffle` is the seed of the rows' order, None for that of arrival. Nanosecond files hold times inside their
    microsecond, never before it. Every second file has its columns in the reverse order.
    """

    unit: str = "us"
    zone: str | None = "UTC"
    created: bool = True
    mapped: bool = False
    files: int = 1
    row_group: int = 0
    shuffle: int | None = None
    delay: int = 0

    def physical(self, name: str) -> str:
        return f"raw {name}" if self.mapped else name

    def times(self, values: Sequence[int | None]) -> pa.Array:
        """Microseconds as a column of this unit and zone."""
        scaled = [None if v is None else self._scaled(v, i) for i, v in enumerate(values)]
        return pa.array(scaled, pa.int64()).view(pa.timestamp(self.unit, self.zone))

    def _scaled(self, time: int, row: int) -> int:
        return time // 1_000 if self.unit == "ms" else time * 1_000 + row * 397 % 1_000 if self.unit == "ns" else time

    def source(self, log: Log, name: str = "log", path: str = "log") -> Source:
        """The source that reads files of this layout."""
        names = [*(key.name for key in log.keys), *log.columns]
        return Source(
            name=name,
            path=path,
            timestamp_field=self.physical(TIMESTAMP_FIELD),
            created_field=self.physical(CREATED_FIELD) if self.created else None,
            field_mapping={self.physical(n): n for n in names} if self.mapped else {},
            delay=self.delay,
        )


def values_array(values: Sequence[Any], value_type: ValueType) -> pa.Array:
    """Python values (times in microseconds) as an Arrow array of a type; NaN stays NaN."""
    if value_type is ValueType.TIMESTAMP:
        return pa.array(values, pa.int64()).view(value_type.arrow)
    if value_type is ValueType.TIMESTAMP_LIST:
        return pa.array([None if v is None else list(v) for v in values], pa.list_(pa.int64())).cast(value_type.arrow)
    return pa.array(values, value_type.arrow)


def _floor_ms(time: int | None) -> int | None:
    return None if time is None else time // 1_000 * 1_000


# -- strategies -------------------------------------------------------------------------------------------------------


def values_of(value_type: ValueType) -> st.SearchStrategy[Any]:
    """Values of a type: the awkward ones, and any others."""
    awkward = st.sampled_from(AWKWARD[value_type])
    ordinary: dict[ValueType, st.SearchStrategy[Any]] = {
        ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
        ValueType.INT64: st.integers(-1_000, 1_000),
        ValueType.FLOAT32: st.floats(-(2.0**90), 2.0**90, width=32),
        ValueType.FLOAT64: st.floats(-1e9, 1e9),
        ValueType.STRING: st.text("ab1é\U0001f600", max_size=3),
        ValueType.BYTES: st.binary(max_size=3),
    }
    return awkward | ordinary[value_type] if value_type in ordinary else awkward


def times_near(anchors: Sequence[int], steps: Sequence[int], farthest: int = 12) -> st.SearchStrategy[int]:
    """Times a few whole steps from an anchor (on a hop's edge, if a step is a hop), or one microsecond beside it."""
    return st.builds(
        lambda anchor, step, count, beside: anchor + step * count + beside,
        st.sampled_from(list(anchors)),
        st.sampled_from(list(steps) or [SECOND]),
        st.integers(-farthest, farthest),
        st.sampled_from([0, 0, 0, -1, 1, 137]),
    )


def key_tuples(keys: Sequence[Field]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Key values that look alike."""
    return st.tuples(*(st.sampled_from(KEY_VALUES[key.type]) for key in keys))


@st.composite
def event_logs(
    draw: st.DrawFn,
    keys: Sequence[Field],
    columns: Mapping[str, ValueType],
    steps: Sequence[int] = (SECOND, MINUTE, HOUR, DAY),
    max_rows: int = 40,
    nulls: bool = True,
) -> Log:
    """Logs of few entities whose events lie around one anchor, on the edges of `steps` and beside them.

    With `nulls` some rows lack a key or their time. Some rows come twice, some share their time and created time.
    """
    anchor = draw(st.sampled_from(ANCHORS))
    entities = draw(st.lists(key_tuples(keys), min_size=1, max_size=4))
    times: st.SearchStrategy[int | None] = times_near([anchor], steps, draw(st.sampled_from([1, 3, 12])))
    row = st.builds(
        LogRow,
        keys=st.sampled_from(entities),
        time=times,
        created=st.none() | st.sampled_from([anchor, anchor + 1, anchor + HOUR]),
        values=st.fixed_dictionaries({name: values_of(t) for name, t in columns.items()}),
    )
    rows = draw(st.lists(row, max_size=max_rows))
    for index, change in draw(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(_CHANGES)), max_size=6)):
        if rows:
            rows.insert(index % len(rows), change(rows[index % len(rows)], rows[(index * 7 + 1) % len(rows)]))
    log = Log(tuple(keys), dict(columns), tuple(rows))
    return _with_nulls(log, draw(st.lists(st.integers(0, 99), max_size=3))) if nulls else log


def _twice(row: LogRow, _: LogRow) -> LogRow:
    return row


def _tied_time(row: LogRow, other: LogRow) -> LogRow:
    return replace(other, keys=row.keys, time=row.time)


def _tied_key(row: LogRow, other: LogRow) -> LogRow:
    return replace(other, keys=row.keys, time=row.time, created=row.created)


_CHANGES = (_twice, _tied_time, _tied_key)


def _with_nulls(log: Log, places: Sequence[int]) -> Log:
    """The log and, for each place, a copy of that row without a key or without its time."""
    rows = list(log.rows)
    for place in places if rows else ():
        row = rows[place % len(rows)]
        without = place % (len(row.keys) + 1)
        missing = (
            replace(row, keys=tuple(None if i == without else k for i, k in enumerate(row.keys)))
            if without < len(row.keys)
            else replace(row, time=None)
        )
        rows.insert(place % len(rows), missing)
    return log.subset(rows)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Every way a log can lie in files."""
    return Layout(
        unit=draw(st.sampled_from(["us", "ns", "ms"])),
        zone=draw(st.sampled_from([None, "UTC", "America/New_York"])),
        created=draw(st.booleans()),
        mapped=draw(st.booleans()),
        files=draw(st.integers(1, 3)),
        row_group=draw(st.sampled_from([0, 1, 3])),
        shuffle=draw(st.none() | st.integers(0, 5)),
        delay=draw(st.sampled_from([0, 0, HOUR, 7 * DAY + 1])),
    )


# -- volume -----------------------------------------------------------------------------------------------------------


def random_log(
    seed: int,
    rows: int,
    keys: Sequence[Field],
    columns: Mapping[str, ValueType],
    start: int = ANCHORS[0],
    span: int = DAY,
    entities: int = 3,
) -> Log:
    """A seeded log for volume: times on seconds and between them, awkward values among ordinary ones."""
    rng = random.Random(seed)
    known = [tuple(rng.choice(KEY_VALUES[key.type]) for key in keys) for _ in range(entities)]
    made: list[LogRow] = []
    for _ in range(rows):
        time = start + rng.randrange(span)
        time = time // SECOND * SECOND if rng.random() < 0.3 else time
        if made and rng.random() < 0.15:
            time = made[-1].time or time
        created = rng.choice([None, time, time + rng.randrange(HOUR)])
        made.append(LogRow(rng.choice(known), time, created, {n: random_value(rng, t) for n, t in columns.items()}))
    return Log(tuple(keys), dict(columns), tuple(made))


def random_value(rng: random.Random, value_type: ValueType) -> Any:
    """A value of a type: awkward once in five."""
    if rng.random() < 0.2 or value_type in (ValueType.BOOL, ValueType.TIMESTAMP, ValueType.BYTES):
        return rng.choice(AWKWARD[value_type])
    if value_type.is_integer:
        return rng.randrange(-1_000, 1_000)
    if value_type is ValueType.FLOAT32:
        return float(np.float32(rng.uniform(-300, 300)))
    return rng.uniform(-300, 300) if value_type.is_float else rng.choice("abcdefgh")
