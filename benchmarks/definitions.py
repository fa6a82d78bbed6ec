"""What the benchmarks ask for: plain Feast objects, the same for Isochron and for Feast's own stores.

This file is copied into throw-away repositories beside the folders of generated data.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, FileSource, PushSource, StreamFeatureView, ValueType
from feast.types import Float64, Int64

from feature_store.adapters.feast import aggregate, windowed_view

DATA = Path(__file__).resolve().parents[1]
HOUR, DAY, WEEK, MONTH = timedelta(hours=1), timedelta(days=1), timedelta(days=7), timedelta(days=30)

entity = Entity(name="entity", join_keys=["entity_id"], value_type=ValueType.INT64)


def rows_of(name: str) -> FileSource:
    return FileSource(name=f"{name}_rows", path=str(DATA / name / "rows.parquet"), timestamp_field="event_time")


def plain(name: str, rows: FileSource, ttl: timedelta | None = None) -> FeatureView:
    """Ten stored features."""
    features = [Field(name=f"f{number}", dtype=Float64) for number in range(10)]
    schema = [Field(name="entity_id", dtype=Int64), *features]
    return FeatureView(name=name, entities=[entity], source=rows, ttl=ttl or timedelta(0), schema=schema)


def windowed(name: str) -> StreamFeatureView:
    """Four windows, four functions, one column of an event log."""
    windows = [HOUR, DAY, WEEK, MONTH]
    return windowed_view(
        name=name,
        entities=[entity],
        source=PushSource(name=f"{name}_events", batch_source=rows_of(name)),
        features=[
            *aggregate("count", "amount", Int64, windows=windows),
            *(feature for kind in ("sum", "mean", "max") for feature in aggregate(kind, "amount", Float64, windows)),
        ],
        online=False,
    )


join_rows = rows_of("join")
join = plain("join", join_rows)
join_ttl = plain("join_ttl", join_rows, ttl=timedelta(days=10))
join_unordered = plain("join_unordered", rows_of("join_unordered"))
join_hot = plain("join_hot", rows_of("join_hot"))
join_large = plain("join_large", rows_of("join_large"))
join_tiny = plain("join_tiny", rows_of("join_tiny"))

backfill = windowed("backfill")
backfill_hot = windowed("backfill_hot")
backfill_large = windowed("backfill_large")
backfill_tiny = windowed("backfill_tiny")
