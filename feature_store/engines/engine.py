"""What an engine must do. A new one implements this and passes the conformance tests; nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import EventLog
from feature_store.definitions.view import PlainView, WindowedView
from feature_store.plan.historical import AsOfStage, WindowStage

#: Beside the features of an as-of join: the event time (microseconds) of the row, null where there is none.
ROW_TIME = "__time"


@dataclass(frozen=True)
class Spine:
    """The rows that ask: `times` (int64 microseconds) and the entity columns, by name, in the declared key types."""

    times: np.ndarray
    keys: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.times)


class Engine(Protocol):
    """Computes values from sources. Every method reads what its definition names and nothing else."""

    def windows(self, stage: WindowStage, spine: Spine) -> dict[str, pa.Array]:
        """The value of each aggregation for each spine row, aligned with it."""

    def as_of(self, stage: AsOfStage, spine: Spine) -> dict[str, pa.Array]:
        """The value of each feature for each spine row, aligned with it, and ROW_TIME (also of a row past its ttl)."""

    def event_log(self, view: WindowedView, start: int | None, end: int) -> EventLog:
        """The events of a view with start <= event time < end; no start means from the beginning."""

    def newest_rows(self, view: PlainView, start: int | None, end: int, now: int) -> pa.Table:
        """Of the rows with start <= event time <= end: per key the newest at or before `now`, and every later one.

        Columns: the keys, `__time` and `__created` (int64 microseconds, created null where missing), the features.
        """

    def close(self) -> None:
        """Frees what the engine holds."""
