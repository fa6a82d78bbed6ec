"""Historical retrieval: a spine in, the same rows with their features out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.repository import Request
from feature_store.definitions.view import FeatureRef, OnDemandView
from feature_store.engines.engine import DistributedEngine, Engine, Retrieved
from feature_store.engines.spine import EVENT_TIMESTAMP, TimeRange, check_spine
from feature_store.errors import OutputError, SpineError
from feature_store.files import replacing
from feature_store.plan.historical import AsOfStage, HistoricalPlan, plan_historical, working_name
from feature_store.retrieval import on_demand
from feature_store.retrieval.explain import explain
from feature_store.retrieval.spine import read_spine, spine_of
from feature_store.timestamps import arrow_timestamps


@dataclass(frozen=True)
class HistoricalFeatures:
    """A retrieval that runs when it is asked for its values, once.

    `entity_df` is the spine, or a TimeRange that asks for every row of the views in it. With `knowledge_time` a row
    sees only what was known (created) at its time. With `inputs`, the stored features that only on-demand views asked
    for follow the requested ones, as Feast's callers expect.
    """

    request: Request
    entity_df: Any
    engine: Engine | DistributedEngine
    knowledge_time: bool = False
    inputs: bool = False

    @cached_property
    def _table(self) -> pa.Table:
        if isinstance(self._result, pa.Table):
            return self._result
        return self._result.to_arrow()

    @cached_property
    def _result(self) -> pa.Table | Retrieved:
        if isinstance(self.entity_df, TimeRange) and (fields := list(self.request.request_fields)):
            raise SpineError(
                f"'{fields[0]}' comes with a request, so these features need a spine that has it beside "
                f"{EVENT_TIMESTAMP}: a range of times cannot ask for them."
            )
        if isinstance(self.engine, DistributedEngine):
            return retrieve_distributed(self.request, self.entity_df, self.engine, self.inputs, self.knowledge_time)
        return retrieve(self.request, self._spine, self.engine, self.inputs, self.knowledge_time)

    @cached_property
    def _spine(self) -> pa.Table:
        if isinstance(self.entity_df, TimeRange):
            assert not isinstance(self.engine, DistributedEngine)
            return rows_between(self.request, self.entity_df, self.engine)
        return read_spine(self.entity_df)

    def to_arrow(self) -> pa.Table:
        """The spine's rows in their order, its columns untouched, then the features in the request's order."""
        return self._table

    def to_df(self) -> Any:
        """The same as a pandas frame."""
        return self._table.to_pandas()

    def to_polars(self) -> Any:
        """The same as a Polars frame (extra `polars`)."""
        import polars

        return polars.from_arrow(self._table)

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Writes the rows as Parquet, whole or not at all, and returns the path: one file, or on a distributed engine
        a folder of files that its executors write.
        """
        if not isinstance(self.engine, DistributedEngine) and Path(path).is_dir():
            raise OutputError(f"{path} is a folder; name the Parquet file to write.")
        if isinstance(self._result, pa.Table):
            return write_parquet(self._result, Path(path))
        return self._result.to_parquet(Path(path))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows a part at a time (one part at least, if an empty one): a distributed result need not fit in here."""
        if not isinstance(self._result, pa.Table):
            yield from self._result.batches()
            return
        yield from self._table.to_batches() or [pa.RecordBatch.from_pylist([], self._table.schema)]

    def explain(self) -> str:
        """The plan as text: its stages, the SQL of each, the files, columns and estimated rows it reads."""
        asked = self.entity_df
        if not isinstance(asked, TimeRange):
            asked = None if isinstance(self.engine, DistributedEngine) else self._spine
        return explain(plan_historical(self.request, self.knowledge_time), self.engine, asked)


def write_parquet(table: pa.Table, path: Path) -> Path:
    """Writes a Parquet file beside its final name and moves it there: a reader never sees half a file."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def retrieve(
    request: Request, table: pa.Table, engine: Engine, inputs: bool = False, knowledge_time: bool = False
) -> pa.Table:
    """The features of each spine row, as of its event_timestamp.

    Rows keep their order and number, duplicates included. Raises SpineError where the spine lacks a column or already
    has one of a feature's name.
    """
    check_spine(table.schema, request, inputs)
    spine = spine_of(table, request.keys)
    plan = plan_historical(request, knowledge_time)
    working: dict[str, pa.Array] = {}
    for stage in plan.joins:
        values = engine.as_of(stage, spine) if isinstance(stage, AsOfStage) else engine.windows(stage, spine)
        keys = {key: spine.keys[column] for key, column in stage.key_columns.items()}
        working |= {name: values[feature] if feature in values else keys[feature] for feature, name in stage.outputs}
    return _assemble(request, table, working, inputs)


def retrieve_distributed(
    request: Request, entity_df: Any, engine: DistributedEngine, inputs: bool = False, knowledge_time: bool = False
) -> Retrieved:
    """The same on many machines: the engine adds the working columns, and each part of the rows is finished there."""
    plan = plan_historical(request, knowledge_time)
    return engine.retrieve(plan, entity_df, partial(finish, request, plan, inputs))


def finish(request: Request, plan: HistoricalPlan, inputs: bool, rows: pa.Table) -> pa.Table:
    """Result rows from rows that hold the spine's columns and, after them, the plan's working columns."""
    made = [name for stage in plan.joins for _, name in stage.outputs]
    working = {name: rows[name].combine_chunks() for name in made}
    return _assemble(request, rows.drop_columns(made), working, inputs)


def _assemble(request: Request, table: pa.Table, working: dict[str, pa.Array], inputs: bool) -> pa.Table:
    """Runs the on-demand views and puts the requested columns after the spine's, in the request's order."""
    for view in request.on_demand:
        features = on_demand.run(view, _inputs(view, working, table), len(table))
        working |= {f"{view.name}__{name}": array for name, array in features.items()}
    for ref, name in request.output_columns(inputs):
        table = table.append_column(name, working[_source(request, ref)])
    return table


def rows_between(request: Request, between: TimeRange, engine: Engine) -> pa.Table:
    """The spine of a request without one: the distinct keys and event times of all rows of its views in a time range,
    in the order of time and keys. A key that a view does not have is null there.
    """
    tables = []
    for view, refs in request.by_view():
        found = engine.moments(view, between.start, between.end)
        columns = {refs[0].key_column(key.name): found[key.name] for key in view.keys}
        missing = {name: pa.nulls(len(found), t.arrow) for name, t in request.keys.items() if name not in columns}
        keys = {name: (columns | missing)[name] for name in request.keys}
        tables.append(pa.table({**keys, EVENT_TIMESTAMP: found["__time"]}))
    names = [*request.keys, EVENT_TIMESTAMP]
    rows = pa.concat_tables(tables).group_by(names).aggregate([]).select(names)
    order = pc.sort_indices(rows, sort_keys=[(name, "ascending") for name in (EVENT_TIMESTAMP, *request.keys)])
    rows = rows.take(order)
    times = arrow_timestamps(np.asarray(rows[EVENT_TIMESTAMP].combine_chunks()))
    return rows.set_column(rows.column_names.index(EVENT_TIMESTAMP), EVENT_TIMESTAMP, times)


def _source(request: Request, ref: FeatureRef) -> str:
    """Where the working table holds a feature; an on-demand view's outputs stand under its own name, not its alias."""
    if isinstance(request.definitions.view(ref.view), OnDemandView):
        return f"{ref.view}__{ref.feature}"
    return working_name(ref)


def _inputs(view: OnDemandView, working: dict[str, pa.Array], table: pa.Table) -> dict[str, pa.Array]:
    """An on-demand view's inputs by the names its function knows: features by both Feast names, request values."""
    inputs = {ref.feature: working[working_name(ref)] for ref in view.inputs}
    inputs |= {ref.column(full_names=True): working[working_name(ref)] for ref in view.inputs}
    for field in view.request:
        if field.name not in table.column_names:
            raise SpineError(
                f"the spine has no column '{field.name}', which on-demand view '{view.name}' reads from the request; "
                f"add it beside {EVENT_TIMESTAMP}."
            )
        inputs[field.name] = typed(table[field.name], field.type, f"column '{field.name}' of the spine")
    return inputs
