"""Random rows of random views: every type's corners, rows out of order, corrected, expired, ancient and to come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.types import ValueType
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, moment
from tests.integration.twins.definitions import View

Key = tuple[Any, ...]

#: How long ago rows are of; the limits of ttls are an hour and a day.
_AGES = (20 * MINUTE, 5 * HOUR, 3 * DAY, 400 * DAY)
_AHEAD = 30 * DAY
_ANCIENT = -3_000 * DAY
#: Earlier than any row.
LONG_AGO = -10_000 * DAY

_KEYS: dict[ValueType, Sequence[Any]] = {
    ValueType.INT64: (0, 1, -1, 7, 11, 111, 2**63 - 1, -(2**63)),
    ValueType.INT32: (0, 1, -5, 11, 111, 2**31 - 1, -(2**31)),
    ValueType.STRING: ("", "a", "1", "11", "111", "é😀", "a,b", "x" * 600),
    ValueType.BYTES: (b"a", b"\x00", b"1", b"11", b"\xff\x00"),
}
_VALUES: dict[ValueType, Sequence[Any]] = {
    ValueType.BOOL: (True, False),
    ValueType.INT32: (0, 1, -7, 2**31 - 1, -(2**31)),
    # Beside a null Feast's converter makes doubles of integers: beyond int64 it fails.
    ValueType.INT64: (0, 1, -7, 2**53 + 1, 1 - 2**62),
    ValueType.FLOAT32: (0.0, -0.0, 1.5, -2.25, float("inf"), float("-inf"), float("nan"), 2.0**-149, 2.0**127),
    ValueType.FLOAT64: (0.0, -0.0, 0.1, -1e300, float("inf"), float("-inf"), float("nan"), 5e-324),
    ValueType.STRING: ("", "a", "null", "é😀", "x\x00y", "long " * 100),
    ValueType.BYTES: (b"", b"a", b"\x00\xff", bytes(range(256))),
    # Whole seconds and not, before 1970 and far away.
    ValueType.TIMESTAMP: (0, -1, 1_700_000_000_123_456, -3_000_000_000 * SECOND, 9_000_000_000 * SECOND + 1),
}


@dataclass(frozen=True)
class Row:
    """One row of a view: times in microseconds, values as Python has them (times too are microseconds)."""

    key: Key
    time: int
    created: int | None
    values: dict[str, Any]


def random_keys(rng: random.Random, view: View, count: int) -> list[Key]:
    """Some keys, each once; fewer where the types have no more."""
    found = {tuple(rng.choice(_KEYS[k.type]) for k in view.keys) for _ in range(3 * count)}
    return rng.sample(sorted(found, key=repr), min(count, len(found)))


def random_rows(rng: random.Random, view: View, keys: Sequence[Key], now: int) -> list[Row]:
    """Rows of these keys in no order. What is to be materialized is never of the time to come."""
    rows = []
    for key in keys:
        base = _ANCIENT if rng.random() < 0.2 else now - rng.choice(_AGES)
        times = [base - n * HOUR - rng.randrange(SECOND) for n in range(rng.choice([1, 2, 3]))]
        if rng.random() < 0.3:
            times.append(times[0])
        if view.filling != "materialize" and rng.random() < 0.15:
            times.append(now + _AHEAD)
        made = rng.sample(range(1_000), len(times))
        for time, order in zip(times, made, strict=True):
            created = min(time, now) + order * SECOND if view.created else None
            rows.append(Row(key, time, created, {f.name: _value(rng, f.type) for f in view.features}))
    rng.shuffle(rows)
    return rows


def _value(rng: random.Random, value_type: ValueType) -> Any:
    if rng.random() < 0.15:
        return None
    if not value_type.is_list:
        return rng.choice(_VALUES[value_type])
    # Feast's converter fails on nulls in lists of anything but text and floats.
    nulls = [None] if value_type.element in (ValueType.STRING, ValueType.FLOAT64) else []
    return rng.choices([*_VALUES[value_type.element], *nulls], k=rng.choice([0, 1, 3]))


def table_of(view: View, rows: Sequence[Row]) -> pa.Table:
    """Rows as the view's source has them."""
    keys = {c.name: _array([row.key[i] for row in rows], c.type) for i, c in enumerate(view.keys)}
    features = {f.name: _array([row.values[f.name] for row in rows], f.type) for f in view.features}
    times = {"event_timestamp": _array([row.time for row in rows], ValueType.TIMESTAMP)}
    if view.created:
        times["created"] = _array([row.created for row in rows], ValueType.TIMESTAMP)
    return pa.table({**keys, **features, **times})


def _array(values: Sequence[Any], value_type: ValueType) -> pa.Array:
    if value_type is ValueType.TIMESTAMP:
        return pa.array(values, pa.int64()).cast(value_type.arrow)
    return pa.array(values, value_type.arrow)


def frame_of(view: View, rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as someone writes them who has pandas."""
    return table_of(view, rows).to_pandas()


def write_file(view: View, rows: Sequence[Row], data: Path) -> None:
    """The view's source."""
    pq.write_table(table_of(view, rows), data / f"{view.name}.parquet")


def python_value(value: Any, value_type: ValueType) -> Any:
    """A value as a read gives it: times are aware datetimes."""
    return moment(value) if value_type is ValueType.TIMESTAMP and value is not None else value
