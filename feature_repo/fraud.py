"""Features of card fraud: what a customer spent, how risky a terminal was, and how the current transaction compares."""

from datetime import timedelta
from typing import Any

from entities import customer, terminal
from feast import FeatureView, Field
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float64, Int64, UnixTimestamp
from sources import current_transaction, customers, labels, transactions

from feature_store.adapters.feast import aggregate, windowed_view

HOUR, DAY, WEEK, MONTH = timedelta(hours=1), timedelta(days=1), timedelta(days=7), timedelta(days=30)

customer_profile = FeatureView(
    name="customer_profile",
    entities=[customer],
    source=customers,
    schema=[
        Field(name="x_customer_id", dtype=Float64),
        Field(name="y_customer_id", dtype=Float64),
        Field(name="mean_amount", dtype=Float64),
        Field(name="std_amount", dtype=Float64),
        Field(name="mean_nb_tx_per_day", dtype=Float64),
    ],
)

customer_spend = windowed_view(
    name="customer_spend",
    entities=[customer],
    source=transactions,
    features=[
        *aggregate("count", "amount", Int64, windows=[HOUR, DAY, WEEK, MONTH]),
        *aggregate("sum", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH]),
        *aggregate("mean", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH]),
        *aggregate("max", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH]),
        *aggregate("std", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH]),
    ],
)

customer_recent = windowed_view(
    name="customer_recent",
    entities=[customer],
    source=transactions,
    features=[
        *aggregate("last", "TX_DATETIME", UnixTimestamp, name="last_transaction_time"),
        *aggregate("last_5", "amount", Array(Float64), name="last_amounts"),
    ],
)

terminal_risk = windowed_view(
    name="terminal_risk",
    entities=[terminal],
    source=labels,
    features=[
        *aggregate("count", "fraud", Int64, windows=[DAY, WEEK, MONTH]),
        *aggregate("mean", "fraud", Float64, windows=[DAY, WEEK, MONTH]),
    ],
)


@on_demand_feature_view(
    name="transaction_context",
    sources=[
        customer_spend[[f"{part}_amount_{days * 86_400}s" for part in ("sum", "count", "mean") for days in (1, 30)]],
        customer_recent,
        current_transaction,
    ],
    schema=[
        Field(name="amount", dtype=Float64),
        Field(name="weekend", dtype=Int64),
        Field(name="night", dtype=Int64),
        Field(name="seconds_since_last", dtype=Float64),
        Field(name="amount_to_last_amounts", dtype=Float64),
        Field(name="amount_to_mean_1d", dtype=Float64),
        Field(name="amount_to_mean_30d", dtype=Float64),
        Field(name="count_with_current_1d", dtype=Int64),
        Field(name="mean_with_current_1d", dtype=Float64),
        Field(name="mean_with_current_30d", dtype=Float64),
    ],
    mode="python",
)
def transaction_context(inputs: dict[str, Any]) -> dict[str, Any]:
    """The current transaction beside the customer's history, and folded into it. A ratio to nothing is null."""

    def ratio(amount: float, usual: float | None) -> float | None:
        return amount / usual if usual else None

    def mean_with(amount: float, total: float | None, count: int) -> float:
        return ((total or 0.0) + amount) / (count + 1)

    amounts, times = inputs["TX_AMOUNT"], inputs["TX_DATETIME"]
    since_last = zip(times, inputs["last_transaction_time"], strict=True)
    recent = [sum(last) / len(last) if last else None for last in inputs["last_amounts"]]
    day = list(zip(amounts, inputs["sum_amount_86400s"], inputs["count_amount_86400s"], strict=True))
    month = list(zip(amounts, inputs["sum_amount_2592000s"], inputs["count_amount_2592000s"], strict=True))
    return {
        "amount": list(amounts),
        "weekend": [int(time.weekday() >= 5) for time in times],
        "night": [int(time.hour <= 6) for time in times],
        "seconds_since_last": [(time - last).total_seconds() if last else None for time, last in since_last],
        "amount_to_last_amounts": [ratio(a, u) for a, u in zip(amounts, recent, strict=True)],
        "amount_to_mean_1d": [ratio(a, u) for a, u in zip(amounts, inputs["mean_amount_86400s"], strict=True)],
        "amount_to_mean_30d": [ratio(a, u) for a, u in zip(amounts, inputs["mean_amount_2592000s"], strict=True)],
        "count_with_current_1d": [count + 1 for _, _, count in day],
        "mean_with_current_1d": [mean_with(*row) for row in day],
        "mean_with_current_30d": [mean_with(*row) for row in month],
    }
