"""The stages of a plan as Spark frames: the number of each asking row, and `v0`, `v1`... for what a stage computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.definitions.aggregation import reach
from feature_store.definitions.erasure import Erasures
from feature_store.definitions.types import ValueType
from feature_store.engines.spark.failures import crossing
from feature_store.engines.spark.scan import CREATED, TIME, Scan, scan
from feature_store.engines.spark.slices import SLICE, hot_slices, sliced
from feature_store.engines.spark.spine import Bounds, spark_schema
from feature_store.engines.spark.windows import ROW, WindowFold
from feature_store.plan.historical import AsOfStage, WindowStage

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclass(frozen=True)
class Sizes:
    """How much is done at a time: rows of a chunk of windows, of a part of the result, of a key that is worth cutting
    into slices, and of asking rows whose keys every executor may hold.
    """

    chunk_rows: int = 262_144
    part_rows: int = 500_000
    hot_rows: int = 2_000_000
    broadcast_rows: int = 500_000


@dataclass(frozen=True)
class Values:
    """What a stage computes: `row` and `v0`, `v1`... for its values, and beside them each value of a row that asks for
    no entity, as an SQL literal.
    """

    frame: DataFrame
    names: tuple[str, ...]
    empty: tuple[str, ...]


@dataclass(frozen=True)
class StageRun:
    """Runs stages over asking rows (`asking`: `row`, `t` and the request's keys, named `keys`), on what `erasures`
    leave.
    """

    spark: SparkSession
    root: Path
    erasures: Erasures
    asking: DataFrame
    keys: Sequence[str]
    bounds: Bounds
    sizes: Sizes

    def values(self, stage: AsOfStage | WindowStage) -> Values | None:
        """A stage's values; None where it has none, as one that is only asked for its keys."""
        if isinstance(stage, AsOfStage):
            frame = self._as_of(stage)
            return Values(frame, stage.features, ("NULL",) * len(stage.features)) if stage.features else None
        if not stage.aggregations:
            return None
        frame, empty = self._windows(stage)
        literals = ("NULL" if value is None else "array()" if value == [] else f"{value}L" for value in empty)
        return Values(frame, tuple(a.name for a in stage.aggregations), tuple(literals))

    def _as_of(self, stage: AsOfStage) -> DataFrame:
        """The newest row at or before each time, by a running maximum over rows and asking rows in one order of time.

        Of rows of one time the greatest created time wins, then the greatest values by feature name.
        With knowledge time a row takes its place in the order when it is known.
        """
        from pyspark.sql import Window
        from pyspark.sql import functions as fn

        features = sorted(stage.view.features, key=lambda f: f.name)
        names = [f.name for f in features]
        reading = as_of_scan(stage, self.root, self.bounds.first, self.bounds.last, self.erasures)
        rows, asks, by = self._of_asked_keys(reading, stage)
        created = [CREATED] if reading.created else []
        known = f"greatest({TIME}, coalesce({CREATED}, {TIME}))" if stage.knowledge_time and created else TIME
        ordered = chain.from_iterable(_ordered(f"x{i}", f.type) for i, f in enumerate(features))
        values = ", ".join([TIME, *created, *ordered])
        candidates = rows.selectExpr(*by, f"{known} AS at", "CAST(NULL AS BIGINT) AS row", f"struct({values}) AS best")
        nothing = fn.lit(None).cast(candidates.schema["best"].dataType).alias("best")
        union = candidates.unionAll(asks.select(*by, fn.col("t").alias("at"), ROW, nothing))
        past = Window.partitionBy(*by).orderBy("at", fn.col(ROW).isNotNull())
        best = fn.max("best").over(past.rowsBetween(Window.unboundedPreceding, Window.currentRow))
        found = union.select(ROW, "at", best.alias("best")).where(f"{ROW} IS NOT NULL")
        live = f"best.{TIME} >= at - {stage.view.ttl}L" if stage.view.ttl else "TRUE"
        places = [names.index(feature) for feature in stage.features]
        return found.selectExpr(ROW, *(f"IF({live}, best.x{p}, NULL) AS v{i}" for i, p in enumerate(places)))

    def _windows(self, stage: WindowStage) -> tuple[DataFrame, list[object]]:
        """The aggregations of each asking row, folded in Python over streams sorted by key and time; and their values
        of no event.
        """
        from pyspark.sql import functions as fn

        reading = window_scan(stage, self.root, self.bounds.first, self.bounds.last, self.erasures)
        events, asks, by = self._of_asked_keys(reading, stage)
        asks = asks.select(*by, fn.col("t").alias(TIME), ROW)
        entity = list(by)
        if (cut := self._slices(stage, reading, events, by)) is not None:
            entity.append(SLICE)
            events = sliced(events, cut, by, f"{TIME} >= reach AND {TIME} < end")
            asks = sliced(asks, cut, by, f"{TIME} >= begin AND {TIME} < end")
        union = asks.unionByName(events, allowMissingColumns=True)
        # An asking row comes before the events of its own time, which its windows do not hold.
        created = [CREATED] if reading.created else []
        order: list[Any] = [*entity, TIME, fn.col(ROW).isNull(), *created]
        together = union.repartition(*entity) if entity else union.repartition(1)
        fold = _fold(stage, reading, entity, self.sizes.chunk_rows)
        inputs = [*entity, TIME, *created, ROW, *(f"x{i}" for i in range(len(fold.columns)))]
        sorted_rows = together.sortWithinPartitions(*order).select(*inputs)
        return sorted_rows.mapInArrow(_run(fold), spark_schema(fold.schema())), fold.empty_values()

    def _of_asked_keys(self, reading: Scan, stage: AsOfStage | WindowStage) -> tuple[DataFrame, DataFrame, list[str]]:
        """The source's rows of keys that are asked for, the asking rows whose keys are all there, and the keys'
        columns in both.
        """
        from pyspark.sql import functions as fn

        columns = [stage.key_columns[key.name] for key in stage.view.keys]
        by = [f"k{i}" for i in range(len(columns))]
        found = [fn.col(f"k{self.keys.index(column)}").alias(name) for column, name in zip(columns, by, strict=True)]
        asks = self.asking.select(ROW, "t", *found).na.drop(subset=by) if by else self.asking.select(ROW, "t")
        rows = reading.frame(self.spark)
        if by:
            asked = asks.select(*by).distinct()
            if self.bounds.rows <= self.sizes.broadcast_rows:
                asked = fn.broadcast(asked)
            rows = rows.join(asked, by, "left_semi")
        return rows, asks, by

    def _slices(self, stage: WindowStage, reading: Scan, events: DataFrame, by: list[str]) -> DataFrame | None:
        """Slices of the keys that hold more than half a task's share of the events, where that is worth it."""
        tasks = int(self.spark.conf.get("spark.sql.shuffle.partitions") or 200)
        if reading.rows <= self.sizes.hot_rows:
            return None
        rows = max(self.sizes.hot_rows, reading.rows // (2 * tasks))
        return hot_slices(self.spark, events.select(*by, TIME), by, stage.aggregations, rows)


def as_of_scan(stage: AsOfStage, root: Path, first: int | None, last: int | None, erasures: Erasures) -> Scan:
    """Reads what can matter to times from `first` to `last`: not older than the ttl of the first."""
    types: dict[str, ValueType | None] = {f.name: f.type for f in sorted(stage.view.features, key=lambda f: f.name)}
    start = first - stage.view.ttl if stage.view.ttl and first is not None else None
    return scan(stage.view, types, root, start, last, erasures)


def window_scan(stage: WindowStage, root: Path, first: int | None, last: int | None, erasures: Erasures) -> Scan:
    """Reads from where the oldest window begins to just before the last time asked for."""
    types = stage.view.column_types()
    columns = {a.column: types.get(a.column) for a in stage.aggregations if a.column != "*"}
    start = None if first is None else reach(stage.aggregations, first)
    return scan(stage.view, columns, root, start, None if last is None else last - 1, erasures)


def _fold(stage: WindowStage, reading: Scan, entity: Sequence[str], chunk_rows: int) -> WindowFold:
    """What evaluates a stage over what its scan reads."""
    names = dict.fromkeys(a.column for a in stage.aggregations if a.column != "*")
    columns = tuple(zip(names, reading.types, strict=True))
    return WindowFold(stage.aggregations, columns, tuple(entity), stage.knowledge_time, chunk_rows)


def _ordered(name: str, value_type: ValueType) -> list[str]:
    """A column, and before or after it what orders its values as the contract does: Spark's order has null lowest and
    NaN highest already, but does not tell -0.0 from 0.0.
    """
    if not value_type.element.is_float:
        return [name]
    sign = "NOT ({0} = 0 AND CAST({0} AS STRING) = '-0.0')"
    if value_type.is_list:
        return [f"transform({name}, x -> struct(x, {sign.format('x')})) AS {name}_order", name]
    return [name, f"{sign.format(name)} AS {name}_sign"]


def _run(fold: WindowFold) -> Any:
    def run(batches: Any) -> Any:
        yield from fold(batches)

    return crossing(run)
