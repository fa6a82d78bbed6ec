"""A repository that is not ours: smart meters, keyed by two texts, with corrections and late rows."""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, StreamFeatureView, ValueType
from feast.aggregation import Aggregation
from feast.types import Array, Float64, Int64, String

grid = Entity(name="grid", join_keys=["grid_id"], value_type=ValueType.STRING)
meter = Entity(name="meter", join_keys=["meter_id"], value_type=ValueType.STRING)

readings_file = FileSource(
    name="readings",
    path="readings",
    timestamp_field="measured",
    created_timestamp_column="arrived",
    field_mapping={"g": "grid_id", "m": "meter_id", "kwh": "energy", "code": "status"},
)

usage = StreamFeatureView(
    name="usage",
    entities=[grid, meter],
    source=PushSource(name="reading_events", batch_source=readings_file),
    timestamp_field="measured",
    schema=[
        Field(name="sum_energy_900s", dtype=Float64),
        Field(name="peak", dtype=Float64),
        Field(name="events", dtype=Int64),
        Field(name="last_3_status", dtype=Array(String)),
        Field(name="first_status_7200s", dtype=String),
    ],
    aggregations=[
        Aggregation(
            column="energy", function="sum", time_window=timedelta(minutes=15), slide_interval=timedelta(minutes=1)
        ),
        Aggregation(column="energy", function="max", time_window=timedelta(hours=6), name="peak"),
        Aggregation(column="*", function="count", name="events"),
        Aggregation(column="status", function="last_3"),
        Aggregation(column="status", function="first", time_window=timedelta(hours=2)),
    ],
)

tariff = FeatureView(
    name="tariff",
    entities=[grid],
    ttl=timedelta(hours=3),
    source=FileSource(
        name="tariffs",
        path="tariffs.parquet",
        timestamp_field="valid_from",
        created_timestamp_column="entered",
        field_mapping={"g": "grid_id"},
    ),
    schema=[Field(name="price", dtype=Float64), Field(name="label", dtype=String)],
)

billing = FeatureService(name="billing", features=[tariff[["price"]], usage, tariff.with_name("named")[["label"]]])
