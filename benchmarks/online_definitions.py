"""The plain views of the online bench: Feast objects, the same for Isochron and for Feast's own Redis store.

This file is copied into throw-away repositories beside the folder of generated data.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64

DATA = Path(__file__).resolve().parents[1] / "data"

entity = Entity(name="entity", join_keys=["id"], value_type=ValueType.INT64)


def plain(name: str, features: int) -> FeatureView:
    """So many doubles, never too old to be served."""
    source = FileSource(name=f"{name}_rows", path=str(DATA / f"{name}.parquet"), timestamp_field="event_time")
    schema = [Field(name="id", dtype=Int64), *(Field(name=f"f{number}", dtype=Float64) for number in range(features))]
    return FeatureView(name=name, entities=[entity], source=source, ttl=timedelta(0), schema=schema)


plain_view = plain("plain", 50)
written_view = plain("written", 50)
wide_view = plain("wide", 70)
