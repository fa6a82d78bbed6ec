"""Pushed rows: from JSON columns to the views that a push source feeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from feature_store.definitions.repository import Definitions
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.errors import RequestError, UnknownName
from feature_store.layer import FeatureLayer
from feature_store.stores.online.appending import Appended
from feature_store.timestamps import arrow_timestamps
from serving.json_columns import check_lengths, micros_of_text, table_of_view
from serving.schemas import PushRequest


@dataclass(frozen=True)
class Pushed:
    """What became of `rows` pushed rows: by windowed view what was appended, by plain view how many entities they
    were of.
    """

    rows: int
    windowed: dict[str, Appended]
    plain: dict[str, int]


def push(layer: FeatureLayer, request: PushRequest) -> Pushed:
    """Gives a request's rows to every online view on its source: raw events to the windowed ones, all or none, and
    rows to the plain ones, where the newer event time wins.

    Raises RequestError for what cannot be taken (another store than the online one, columns of unequal length or of
    mixed types, a time that is no time, and all that FeatureLayer.append_events refuses); UnknownName; PositionGap;
    StoreNotReady.
    """
    if request.to != "online":
        raise RequestError("to", "must be 'online': only the online store is carried yet, the archive is filled apart")
    rows = check_lengths(request.df)
    views = views_on(layer.definitions, request.push_source_name)
    # All is read before anything is written, so that a bad row is refused by every view.
    tables = {view.name: table_of_view(view, request.df) for view in views if isinstance(view, PlainView)}
    windowed: dict[str, Appended] = {}
    if len(tables) < len(views):
        events = table_of(request.df, time_columns(layer.definitions, request.push_source_name))
        windowed = layer.append_events(request.push_source_name, events, request.partition, request.offset)
    plain = {name: layer.write_to_online_store(name, table) for name, table in tables.items()}
    return Pushed(rows, windowed, plain)


def views_on(definitions: Definitions, push_source: str) -> Sequence[StoredView]:
    """The online views on a push source. Raises UnknownName where there is none."""
    found = [v for v in definitions.stored_views() if v.online and v.source.push_source == push_source]
    if not found:
        known = {v.source.push_source for v in definitions.stored_views() if v.online}
        raise UnknownName("push source with online views", push_source, sorted(name for name in known if name))
    return found


def time_columns(definitions: Definitions, push_source: str) -> set[str]:
    """The columns that the windowed views on a push source read as times, by every name that a row may give them."""
    views = [v for v in definitions.stored_views() if isinstance(v, WindowedView)]
    return {name for v in views if v.source.push_source == push_source for name in _time_columns(v)}


def _time_columns(view: WindowedView) -> set[str]:
    source = view.source
    types = {key.name: key.type for key in view.keys} | view.column_types()
    named = {name for name, value_type in types.items() if value_type is ValueType.TIMESTAMP}
    physical = {source.physical(name) for name in named} | {source.timestamp_field}
    if source.created_field:
        physical.add(source.created_field)
    return physical | {source.field_mapping.get(name, name) for name in physical}


def table_of(columns: dict[str, list[Any]], times: set[str]) -> pa.Table:
    """JSON columns as an Arrow table; those named in `times` hold ISO 8601 text or null and become timestamps, the
    others are of the type that their values have. Raises RequestError that names the column.
    """
    check_lengths(columns)
    return pa.table({name: _timestamps(name, v) if name in times else _plain(name, v) for name, v in columns.items()})


def _timestamps(name: str, values: list[Any]) -> pa.Array:
    return arrow_timestamps(
        pa.array([micros_of_text(name, row, value) for row, value in enumerate(values)], pa.int64())
    )


def _plain(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as cause:
        raise RequestError(name, "holds values of different types, or an integer beyond 64 bits") from cause
