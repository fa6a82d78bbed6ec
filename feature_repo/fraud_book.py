"""The 15 inputs of the published study (Fraud Detection Handbook, chapter 3), under their published names.

The study's windows slide by the second and include the current transaction: asked one second after it, a window that
ends strictly before counts it. A hop of one second is too fine to hold online for 30 days, so these views are for
training only.
"""

from datetime import timedelta
from typing import Any

from entities import customer, terminal
from feast import Field
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64
from sources import current_transaction, labels, transactions

from feature_store.adapters.feast import aggregate, windowed_view

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)

book_customer = windowed_view(
    name="book_customer",
    entities=[customer],
    source=transactions,
    online=False,
    features=[
        feature
        for days in (1, 7, 30)
        for feature in (
            *aggregate(
                "count", "amount", Int64, windows=[days * DAY], slide=SECOND, name=f"CUSTOMER_ID_NB_TX_{days}DAY_WINDOW"
            ),
            *aggregate(
                "mean",
                "amount",
                Float64,
                windows=[days * DAY],
                slide=SECOND,
                name=f"CUSTOMER_ID_AVG_AMOUNT_{days}DAY_WINDOW",
            ),
        )
    ],
)

book_terminal = windowed_view(
    name="book_terminal",
    entities=[terminal],
    source=labels,
    online=False,
    features=[
        feature
        for days in (1, 7, 30)
        for feature in (
            *aggregate(
                "count", "fraud", Int64, windows=[days * DAY], slide=SECOND, name=f"TERMINAL_ID_NB_TX_{days}DAY_WINDOW"
            ),
            *aggregate("mean", "fraud", Float64, windows=[days * DAY], slide=SECOND, name=f"fraud_share_{days}d"),
        )
    ],
)


@on_demand_feature_view(
    name="book_context",
    sources=[book_terminal[["fraud_share_1d", "fraud_share_7d", "fraud_share_30d"]], current_transaction],
    schema=[
        Field(name="TX_DURING_WEEKEND", dtype=Int64),
        Field(name="TX_DURING_NIGHT", dtype=Int64),
        Field(name="TERMINAL_ID_RISK_1DAY_WINDOW", dtype=Float64),
        Field(name="TERMINAL_ID_RISK_7DAY_WINDOW", dtype=Float64),
        Field(name="TERMINAL_ID_RISK_30DAY_WINDOW", dtype=Float64),
    ],
    mode="python",
)
def book_context(inputs: dict[str, Any]) -> dict[str, Any]:
    """The study's flags, and its terminal risk, which is 0 where a terminal has no labels yet."""
    risk = {
        f"TERMINAL_ID_RISK_{days}DAY_WINDOW": [share or 0.0 for share in inputs[f"fraud_share_{days}d"]]
        for days in (1, 7, 30)
    }
    return {
        "TX_DURING_WEEKEND": [int(time.weekday() >= 5) for time in inputs["TX_DATETIME"]],
        "TX_DURING_NIGHT": [int(time.hour <= 6) for time in inputs["TX_DATETIME"]],
        **risk,
    }
