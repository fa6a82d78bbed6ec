"""A plan as text for people: what runs, in which order, and what it reads."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from feature_store.engines.engine import DistributedEngine, Engine, Reading
from feature_store.engines.spine import TimeRange
from feature_store.plan.historical import HistoricalPlan
from feature_store.retrieval.spine import spine_of
from feature_store.timestamps import iso

#: How many of a stage's files are named.
LISTED = 5


def explain(plan: HistoricalPlan, engine: Engine | DistributedEngine, asked: pa.Table | TimeRange | None) -> str:
    """The stages of a plan in order, each with its SQL, files, columns and estimated rows, then the result's columns.

    `asked` is the spine, or the range of times whose rows ask: it says what is pruned. Without it nothing is.
    """
    first = last = None
    lines = []
    if isinstance(asked, TimeRange):
        first, last = asked.start, asked.end
        lines = [f"asking: every key and time of the views' rows from {iso(first)} to {iso(last)}"]
    elif asked is not None:
        lines = [f"spine: {len(asked):,} rows"]
        if len(asked):
            times = spine_of(asked, {}).times
            first, last = int(np.min(times)), int(np.max(times))
    for number, stage in enumerate(plan.joins, 1):
        lines += [f"{number}. {stage}", *_reading(engine.reading(stage, first, last))]
    lines += [f"{number}. {stage}" for number, stage in enumerate(plan.on_demand, len(plan.joins) + 1)]
    return "\n".join([*lines, f"columns: {', '.join(plan.request.columns)}"])


def _reading(reading: Reading) -> list[str]:
    named = ", ".join(reading.files[:LISTED]) + (", ..." if len(reading.files) > LISTED else "")
    return [
        f"   reads {len(reading.files)} of {reading.files_in_all} files, about {reading.rows:,} rows: {named}",
        f"   columns: {', '.join(reading.columns)}",
        *(f"   | {line.strip()}" for line in reading.sql.strip().splitlines()),
    ]
