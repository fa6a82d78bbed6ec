"""A shop: a folder of orders read by three views, a file of prices, an on-demand view, services that log."""

from datetime import timedelta
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

from feature_store.adapters.feast import aggregate, windowed_view

customer = Entity(name="customer", join_keys=["customer"], value_type=ValueType.INT64)
branch = Entity(name="branch", join_keys=["branch"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item"], value_type=ValueType.STRING)

orders = PushSource(
    name="orders_pushed",
    batch_source=FileSource(
        name="orders",
        path="orders",
        timestamp_field="at",
        created_timestamp_column="seen",
        field_mapping={"cust": "customer", "shop": "branch", "paid": "amount"},
    ),
)

spend = windowed_view(
    name="spend",
    entities=[customer],
    source=orders,
    features=[
        *aggregate("sum", "amount", Float64, windows=[timedelta(hours=2)], slide=timedelta(minutes=10), name="sum_2h"),
        *aggregate("count", "*", Int64, name="orders"),
    ],
)

traffic = windowed_view(
    name="traffic",
    entities=[branch],
    source=orders,
    features=aggregate("count", "*", Int64, windows=[timedelta(hours=1)], slide=timedelta(minutes=1), name="in_1h"),
)

last_order = FeatureView(
    name="last_order",
    entities=[customer, branch],
    source=orders,
    schema=[Field(name="amount", dtype=Float64), Field(name="note", dtype=String)],
)

price = FeatureView(
    name="price",
    entities=[item],
    ttl=timedelta(hours=3),
    source=FileSource(
        name="prices",
        path="prices.parquet",
        timestamp_field="valid_from",
        created_timestamp_column="entered",
        field_mapping={"eur": "euros"},
    ),
    schema=[Field(name="euros", dtype=Float64)],
)


@on_demand_feature_view(name="average", sources=[spend], schema=[Field(name="mean_2h", dtype=Float64)], mode="python")
def average(inputs: dict[str, Any]) -> dict[str, Any]:
    """What an order of all time is of the last two hours' sum."""
    rows = zip(inputs["sum_2h"], inputs["orders"], strict=True)
    return {"mean_2h": [total / count if total is not None and count else None for total, count in rows]}


def _logging(path: str, *partitions: str) -> LoggingConfig:
    return LoggingConfig(destination=FileLoggingDestination(path=path, partition_by=list(partitions)))


served = FeatureService(name="served", features=[spend, price, average], logging_config=_logging("logs/served"))
by_day = FeatureService(name="by_day", features=[spend, price], logging_config=_logging("logs/by_day", "__log_date"))
