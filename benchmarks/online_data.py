"""What the online bench stores and asks for: rows of features and logs of events, the same from the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.files import replacing

KEY, TIME = "id", "event_time"
#: 2024-01-01, in microseconds; whatever is stored lies after it.
START = 1_704_067_200_000_000
MINUTE = 60_000_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
#: Window and hop of the windowed reads, in microseconds: the hops are those that a view has unless told.
WINDOWS = ((HOUR, HOUR // 12), (DAY, HOUR), (7 * DAY, HOUR), (30 * DAY, DAY))
#: In the order of the answers: count, sum, mean and max, each over the four windows.
WINDOWED = tuple(
    f"{kind}_amount_{window // 1_000_000}s" for kind in ("count", "sum", "mean", "max") for window, _ in WINDOWS
)
_UTC = pa.timestamp("us", tz="UTC")
#: The last share of the entities has nulls, so that reads of the others meet none.
_SPARSE = 0.1

Values = dict[str, list[Any]]


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """Keys of the entities of those numbers: far apart, as real keys are, so that nobody may use them as positions."""
    return numbers.astype(np.int64) * 7_919 + 10_000_019


def feature_names(features: int) -> tuple[str, ...]:
    return tuple(f"f{number}" for number in range(features))


@dataclass(frozen=True)
class Rows:
    """Rows of one view: int64 `keys`, `times` in microseconds, `values` as doubles, one line a row; NaN is null."""

    keys: np.ndarray
    times: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        return feature_names(self.values.shape[1])

    def table(self) -> pa.Table:
        """Key, event time and features as Arrow columns; null is null."""
        features = {n: pa.array(c, from_pandas=True) for n, c in zip(self.names, self.values.T, strict=True)}
        return pa.table({KEY: self.keys, TIME: pa.array(self.times).cast(_UTC), **features})

    def blocks(self, size: int) -> Iterator[Rows]:
        """The same rows, so many at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Rows(self.keys[part], self.times[part], self.values[part])


@dataclass(frozen=True)
class View:
    """A plain view of the bench: its name, its features, how many entities it holds (the last tenth with nulls)."""

    name: str
    features: int
    entities: int
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return feature_names(self.features)

    @property
    def dense(self) -> int:
        """How many entities have a value for every feature: the first ones."""
        return self.entities - round(self.entities * _SPARSE)

    def rows(self) -> Rows:
        """What is stored of it: a row an entity. A tenth of the sparse entities' values is null."""
        draw = np.random.default_rng([self.seed, self.features, self.entities])
        values = draw.standard_normal((self.entities, self.features))
        sparse = values[self.dense :]
        sparse[draw.random(sparse.shape) < 0.1] = np.nan
        return Rows(keys_of(np.arange(self.entities)), START + draw.integers(0, DAY, self.entities), values)

    def newer(self, rows: int) -> Iterator[Rows]:
        """Endless batches of so many different entities, each with later event times than all before it, and than any
        smaller batch: several sizes are written to one view.
        """
        draw = np.random.default_rng([self.seed, self.features, self.entities, rows])
        time = START + 2 * DAY + rows * MINUTE
        values = [draw.standard_normal((rows, self.features)) for _ in range(8)]
        while True:
            for few in values:
                time += rows
                numbers = draw.choice(self.entities, rows, replace=False)
                yield Rows(keys_of(numbers), time + np.arange(rows), few)

    def requests(self, rows: int, number: int = 200) -> list[list[int]]:
        """Keys of so many different dense entities, a number of times."""
        draw = np.random.default_rng([self.seed, rows])
        return [keys_of(draw.choice(self.dense, rows, replace=False)).tolist() for _ in range(number)]

    def sparse_requests(self, rows: int, number: int = 200) -> list[list[int]]:
        """Keys of which most are of entities with nulls, and one in ten (at least one) of an entity not stored."""
        draw = np.random.default_rng([self.seed, rows, 1])
        unknown = max(1, rows // 10)
        asked = []
        for _ in range(number):
            known = draw.choice(np.arange(self.dense, self.entities), rows - unknown, replace=False)
            keys = keys_of(np.concatenate([known, self.entities + np.arange(unknown)]))
            asked.append(draw.permutation(keys).tolist())
        return asked


class Truth:
    """What a read of plain rows must return, from the rows themselves."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._place = {key: place for place, key in enumerate(rows.keys.tolist())}

    def answer(self, keys: Sequence[int]) -> Values:
        """Key column and features as lists; None for a null, and for all features of an unknown key."""
        columns: Values = {KEY: list(keys), **{name: [] for name in self._rows.names}}
        for key in keys:
            place = self._place.get(key)
            line = [None] * len(self._rows.names) if place is None else self._rows.values[place].tolist()
            for name, value in zip(self._rows.names, line, strict=True):
                columns[name].append(None if value is None or np.isnan(value) else value)
        return columns

    def time_of(self, key: int) -> int:
        """Event time of a stored key's row, in microseconds."""
        return int(self._rows.times[self._place[key]])


@dataclass(frozen=True)
class EventLog:
    """Amounts of `entities` over the 31 days before `until`, `per_day` of an entity on average, in the order of time.

    What happened before `cut` is history, which a store takes in at once; the rest (`RECENT` events an entity) reaches
    it later, an event at a time, so that a store that folds in steps is met between two steps.
    """

    per_day: int
    entities: int
    seed: int = 0

    RECENT = 16
    DAYS = 31

    @property
    def name(self) -> str:
        return f"windows_{self.per_day}"

    @property
    def until(self) -> int:
        """The time as of which all reads are, in microseconds: inside a hop of every window."""
        return START + 60 * DAY + 17 * HOUR + 1_425_678_901

    @property
    def cut(self) -> int:
        return self.until - self.RECENT * DAY // self.per_day

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, times (before `until`) and amounts, in the order of time."""
        return _event_columns(self)

    def table(self, recent: bool) -> pa.Table:
        """Key, event time and amount of the events before the cut, or of the recent ones."""
        keys, times, amounts = self.columns()
        place = int(np.searchsorted(times, self.cut))
        part = slice(place, None) if recent else slice(place)
        return pa.table({KEY: keys[part], TIME: pa.array(times[part]).cast(_UTC), "amount": amounts[part]})

    @property
    def unknown(self) -> int:
        """A key that has no events."""
        return int(keys_of(np.array([self.entities]))[0])

    def requests(self, rows: int, number: int = 50) -> list[list[int]]:
        draw = np.random.default_rng([self.seed, rows])
        return [keys_of(draw.choice(self.entities, rows, replace=False)).tolist() for _ in range(number)]


@lru_cache(maxsize=1)
def _event_columns(log: EventLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng([log.seed, log.per_day, log.entities])
    rows = log.per_day * log.DAYS * log.entities
    times = np.sort(draw.integers(log.until - log.DAYS * DAY, log.until, rows))
    return keys_of(draw.integers(0, log.entities, rows)), times, np.round(draw.gamma(2.0, 25.0, rows), 2)


def write_parquet(table: pa.Table, path: Path) -> None:
    """The file a view's source names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
