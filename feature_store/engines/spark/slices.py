"""Keys with so many events that one task should not have them all: their time is cut into slices, a task each.

A slice answers the rows that ask in it. It reads its own events and those before it that its windows reach, so no
value depends on the cuts; slices are at least as long as the longest window, so an event is read at most twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.definitions.aggregation import Aggregation, reach
from feature_store.engines.spark.scan import TIME
from feature_store.engines.spark.spine import spark_schema
from feature_store.timestamps import BEGINNING, END

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SLICE = "slice"

#: The most slices of one key, and how finely its events' times are sampled for their edges.
MOST_SLICES = 256
ACCURACY = 10_000


def hot_slices(
    spark: SparkSession, events: DataFrame, keys: Sequence[str], aggregations: Sequence[Aggregation], rows: int
) -> DataFrame | None:
    """The slices of every key with more than `rows` events: the keys, `slice` (from 1), where it begins and ends, and
    `reach`, where the windows of its first moment begin. None where no key has so many, or a window has no end.
    """
    from pyspark.sql import functions as fn

    longest = max((a.window + a.hop for a in aggregations), default=0)
    if any(not a.window for a in aggregations):
        return None
    counted = events.groupBy(*keys).agg(fn.count("*").alias("events")).where(fn.col("events") > rows).toArrow()
    if not len(counted):
        return None
    crowded = fn.broadcast(_frame(spark, counted))
    parts = [i / MOST_SLICES for i in range(1, MOST_SLICES)]
    hot = events.join(crowded, list(keys)) if keys else events.crossJoin(crowded)
    sampled = hot.groupBy(*keys).agg(
        fn.max("events").alias("events"), fn.percentile_approx(TIME, fn.array(*map(fn.lit, parts)), fn.lit(ACCURACY))
    )
    table = _slices(sampled.toArrow(), keys, aggregations, rows, longest)
    return _frame(spark, table) if len(table) else None


def _frame(spark: SparkSession, table: pa.Table) -> DataFrame:
    return spark.createDataFrame(table, spark_schema(table.schema))


def _slices(
    sampled: pa.Table, keys: Sequence[str], aggregations: Sequence[Aggregation], rows: int, longest: int
) -> pa.Table:
    """One row a slice, from the sampled times of each key (its columns: the keys, the count of events, the times)."""
    index, found = [], []
    counts, times = sampled.column(len(keys)).to_pylist(), sampled.column(len(keys) + 1).to_pylist()
    for i, (count, sample) in enumerate(zip(counts, times, strict=True)):
        edges = [BEGINNING, *_edges(sample, min(-(-count // rows), MOST_SLICES), longest), END]
        if len(edges) == 2:
            continue
        for number, (begin, end) in enumerate(pairwise(edges), 1):
            index.append(i)
            found.append((number, begin, end, BEGINNING if begin == BEGINNING else reach(aggregations, begin)))
    columns = {name: sampled[name].take(pa.array(index, pa.int64())) for name in keys}
    for place, name in enumerate((SLICE, "begin", "end", "reach")):
        columns[name] = pa.array([row[place] for row in found], pa.int32() if name == SLICE else pa.int64())
    return pa.table(columns)


def _edges(sample: Sequence[int], wanted: int, longest: int) -> list[int]:
    """Times that cut a key's events into about as many even slices as wanted, none shorter than the longest window."""
    edges: list[int] = []
    for number in range(1, wanted):
        edge = sample[number * (len(sample) + 1) // wanted - 1]
        if edge - (edges[-1] if edges else sample[0]) >= longest:
            edges.append(edge)
    return edges


def sliced(rows: DataFrame, slices: DataFrame, keys: Sequence[str], within: str) -> DataFrame:
    """Rows with the `slice` they belong to by a condition on the columns of both (0 for keys that are not cut).

    A row that belongs to several comes once for each.
    """
    from pyspark.sql import functions as fn

    hot = slices.select(*(fn.col(name).alias(f"hot_{name}") for name in keys), SLICE, "begin", "end", "reach")
    condition = fn.expr(within)
    for name in keys:
        condition = (fn.col(name) == fn.col(f"hot_{name}")) & condition
    joined = rows.join(fn.broadcast(hot), condition, "left")
    return joined.select(*rows.columns, fn.coalesce(fn.col(SLICE), fn.lit(0)).alias(SLICE))
