"""What an engine must do. A new one implements one of these and passes the conformance tests; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import EventLog
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.plan.historical import AsOfStage, HistoricalPlan, WindowStage

#: Beside the features of an as-of join: the event time (microseconds) of the row, null where there is none.
ROW_TIME = "__time"


@dataclass(frozen=True)
class Spine:
    """The rows that ask: `times` (int64 microseconds) and the entity columns, by name, in the declared key types."""

    times: np.ndarray
    keys: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class Reading:
    """What an engine reads for one stage: its SQL, the files left after pruning of all there are, the columns, and an
    estimate (from the files' own statistics) of the rows.
    """

    sql: str
    files: tuple[str, ...]
    files_in_all: int
    columns: tuple[str, ...]
    rows: int


class Engine(Protocol):
    """Computes values from sources in this process. Every method reads what its definition names and nothing else."""

    def windows(self, stage: WindowStage, spine: Spine) -> dict[str, pa.Array]:
        """The value of each aggregation for each spine row, aligned with it."""

    def as_of(self, stage: AsOfStage, spine: Spine) -> dict[str, pa.Array]:
        """The value of each feature for each spine row, aligned with it, and ROW_TIME (of a row past its ttl
        only where the stage asks for expired rows).
        """

    def event_log(self, view: WindowedView, start: int | None, end: int) -> EventLog:
        """The events of a view with start <= event time < end; no start means from the beginning."""

    def newest_rows(self, view: PlainView, start: int | None, end: int, now: int) -> pa.Table:
        """Of the rows with start <= event time <= end: per key the newest at or before `now`, and every later one.

        Columns: the keys, `__time` and `__created` (int64 microseconds, created null where missing), the features.
        """

    def moments(self, view: StoredView, start: int, end: int) -> pa.Table:
        """The distinct keys and event times (`__time`, int64 microseconds) of rows with start <= event time <= end,
        in the order of time and keys: the rows that ask where nobody gave a spine.
        """

    def reading(self, stage: AsOfStage | WindowStage, first: int | None, last: int | None) -> Reading:
        """What `as_of` or `windows` would read for times from `first` to `last` (None: not known yet)."""

    def close(self) -> None:
        """Frees what the engine holds."""


#: Turns rows (the spine's columns, then the plan's working columns) into rows of the result; picklable.
Finish = Callable[[pa.Table], pa.Table]


class Retrieved(Protocol):
    """The rows of a retrieval on many machines; nothing runs before it is asked for."""

    def to_arrow(self) -> pa.Table:
        """All rows, in the spine's order, in this process."""

    def to_parquet(self, path: Path) -> Path:
        """A folder of Parquet files written by the executors, complete or not there at all; its path."""

    def batches(self) -> Iterable[pa.RecordBatch]:
        """The rows in the spine's order, a part at a time."""


@runtime_checkable
class DistributedEngine(Protocol):
    """Computes values on many machines: rows stay there, from the spine to the written result."""

    def retrieve(self, plan: HistoricalPlan, spine: Any, finish: Finish) -> Retrieved:
        """The plan over a spine: a frame or table, the path or SQL of rows that the executors read themselves, or a
        TimeRange.

        Every row gets the outputs of each stage as working columns; then `finish` makes result rows out of them.
        """

    def reading(self, stage: AsOfStage | WindowStage, first: int | None, last: int | None) -> Reading:
        """As Engine.reading, in this engine's dialect."""

    def close(self) -> None:
        """Frees what the engine holds."""
