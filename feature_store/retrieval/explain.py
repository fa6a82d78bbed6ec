"""A plan as text for people: what runs, in which order, and what it reads."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from feature_store.engines.engine import DistributedEngine, Engine, Reading
from feature_store.plan.historical import HistoricalPlan
from feature_store.retrieval.spine import spine_of

#: How many of a stage's files are named.
LISTED = 5


def explain(plan: HistoricalPlan, engine: Engine | DistributedEngine, table: pa.Table | None) -> str:
    """The stages of a plan in order, each with its SQL, files, columns and estimated rows, then the result's columns.

    `table` is the spine, which tells the time range; without it nothing is pruned.
    """
    first = last = None
    if table is not None and len(table):
        times = spine_of(table, {}).times
        first, last = int(np.min(times)), int(np.max(times))
    lines = [] if table is None else [f"spine: {len(table):,} rows"]
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
