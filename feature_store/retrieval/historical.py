"""Historical retrieval: a spine in, the same rows with their features out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.columns import typed
from feature_store.definitions.repository import Request
from feature_store.definitions.view import FeatureRef, OnDemandView
from feature_store.engines.engine import Engine, Spine
from feature_store.errors import SpineError
from feature_store.files import replacing
from feature_store.plan.historical import AsOfStage, plan_historical, working_name
from feature_store.retrieval import on_demand
from feature_store.retrieval.spine import EVENT_TIMESTAMP, read_spine, spine_of


@dataclass(frozen=True)
class HistoricalFeatures:
    """A retrieval that runs when it is asked for its values, once."""

    request: Request
    entity_df: Any
    engine: Engine

    @cached_property
    def _table(self) -> pa.Table:
        return retrieve(self.request, read_spine(self.entity_df), self.engine)

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
        """Writes the table to one Parquet file, whole or not at all, and returns its path."""
        return write_parquet(self._table, Path(path))

    def explain(self) -> str:
        """The stages of the plan as text; nothing is read."""
        return plan_historical(self.request).explain()


def write_parquet(table: pa.Table, path: Path) -> Path:
    """Writes a Parquet file beside its final name and moves it there: a reader never sees half a file."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def retrieve(request: Request, table: pa.Table, engine: Engine, inputs: bool = False) -> pa.Table:
    """The features of each spine row, as of its event_timestamp.

    Rows keep their order and number, duplicates included. With `inputs`, the stored features that only on-demand
    views asked for follow the requested ones, as Feast's callers expect. Raises SpineError where the spine lacks a
    column or already has one of a feature's name.
    """
    spine = spine_of(table, request.keys)
    columns = _columns(request, inputs)
    if taken := [name for _, name in columns if name in table.column_names]:
        raise SpineError(f"the spine already has a column '{taken[0]}', the name of a requested feature; rename it.")
    plan = plan_historical(request)
    working: dict[str, pa.Array] = {}
    for stage in plan.joins:
        values = engine.as_of(stage, spine) if isinstance(stage, AsOfStage) else engine.windows(stage, spine)
        keys = {key: spine.keys[column] for key, column in stage.key_columns.items()}
        working |= {name: values[feature] if feature in values else keys[feature] for feature, name in stage.outputs}
    for view in request.on_demand:
        features = on_demand.run(view, _inputs(view, working, table, spine), len(spine))
        working |= {f"{view.name}__{name}": array for name, array in features.items()}
    for ref, name in columns:
        table = table.append_column(name, working[_source(request, ref)])
    return table


def _columns(request: Request, inputs: bool) -> list[tuple[FeatureRef, str]]:
    columns = list(zip(request.refs, request.columns, strict=True))
    if inputs:
        asked = set(request.refs)
        columns += [(ref, ref.column(request.full_names)) for ref in request.stored if ref not in asked]
    return columns


def _source(request: Request, ref: FeatureRef) -> str:
    """Where the working table holds a feature; an on-demand view's outputs stand under its own name, not its alias."""
    if isinstance(request.definitions.view(ref.view), OnDemandView):
        return f"{ref.view}__{ref.feature}"
    return working_name(ref)


def _inputs(view: OnDemandView, working: dict[str, pa.Array], table: pa.Table, spine: Spine) -> dict[str, pa.Array]:
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
