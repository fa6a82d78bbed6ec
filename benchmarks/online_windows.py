"""The windowed views of the online bench, for Isochron's repository: Feast itself has no windows online.

This file is copied into throw-away repositories, beside online_definitions.py.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from feast import Entity, FileSource, PushSource, StreamFeatureView, ValueType
from feast.types import Float64, Int64

from feature_store.adapters.feast import aggregate, windowed_view

DATA = Path(__file__).resolve().parents[1] / "data"

entity = Entity(name="entity", join_keys=["id"], value_type=ValueType.INT64)


def windowed(name: str) -> StreamFeatureView:
    """Four windows, four functions, one column of an event log."""
    windows = [timedelta(hours=1), timedelta(days=1), timedelta(days=7), timedelta(days=30)]
    history = FileSource(name=f"{name}_rows", path=str(DATA / f"{name}.parquet"), timestamp_field="event_time")
    return windowed_view(
        name=name,
        entities=[entity],
        source=PushSource(name=f"{name}_events", batch_source=history),
        features=[
            *aggregate("count", "amount", Int64, windows=windows),
            *(feature for kind in ("sum", "mean", "max") for feature in aggregate(kind, "amount", Float64, windows)),
        ],
        online=True,
    )


windows_5 = windowed("windows_5")
windows_200 = windowed("windows_200")
