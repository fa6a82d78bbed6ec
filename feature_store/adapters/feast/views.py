"""A small helper that writes a windowed view's names, types and aggregations once. It gives plain Feast objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from feast import Entity, Field, StreamFeatureView
from feast.aggregation import Aggregation

WindowedFeature = tuple[Aggregation, Field]


def aggregate(
    function: str,
    column: str,
    dtype: Any,
    windows: Iterable[timedelta | None] = (None,),
    slide: timedelta | None = None,
    name: str | None = None,
) -> list[WindowedFeature]:
    """One function over one column, a feature for each window (None is all of history).

    `dtype` is the Feast type of the value; `slide` the hop; without a `name` Feast's own is used
    (`sum_amount_86400s`). One name cannot serve several windows.
    """
    made = []
    for window in windows:
        aggregation = Aggregation(
            column=column, function=function, time_window=window, slide_interval=slide if window else None, name=name
        )
        made.append((aggregation, Field(name=aggregation.resolved_name(window), dtype=dtype)))
    return made


def windowed_view(
    name: str, entities: Sequence[Entity], source: Any, features: Sequence[WindowedFeature], **options: Any
) -> StreamFeatureView:
    """A plain Feast StreamFeatureView over a push source; `options` are Feast's own (online, tags, description)."""
    batch = source.batch_source
    return StreamFeatureView(
        name=name,
        entities=list(entities),
        source=source,
        timestamp_field=batch.timestamp_field,
        # A name given twice stands once in the schema, so that it is our check at apply that names it.
        schema=list({field.name: field for _, field in features}.values()),
        aggregations=[aggregation for aggregation, _ in features],
        **options,
    )
