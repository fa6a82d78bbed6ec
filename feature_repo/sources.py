"""Where the rows come from: one file of card transactions, read twice, and the customers' profiles.

The columns are those of the Fraud Detection Handbook's published files; `field_mapping` gives them our names.
"""

from feast import Field, FileSource, PushSource, RequestSource
from feast.types import Float64, UnixTimestamp

_COLUMNS = {
    "CUSTOMER_ID": "customer_id",
    "TERMINAL_ID": "terminal_id",
    "TX_AMOUNT": "amount",
    "TX_FRAUD": "fraud",
}

transactions_file = FileSource(
    name="transactions",
    path="data/transactions.parquet",
    timestamp_field="TX_DATETIME",
    field_mapping=_COLUMNS,
    description="Card transactions, an event each.",
)
transactions = PushSource(name="transaction_events", batch_source=transactions_file)

# Whether a transaction was fraud is known a week later: that is when the label becomes an event.
labels_file = FileSource(
    name="labels",
    path="data/transactions.parquet",
    timestamp_field="TX_DATETIME",
    field_mapping=_COLUMNS,
    tags={"isochron.reads": "transactions", "isochron.delay": "7d"},
    description="Fraud labels, an event each, seven days after the transaction.",
)
labels = PushSource(name="label_events", batch_source=labels_file)

customers = FileSource(
    name="customers",
    path="data/customers.parquet",
    timestamp_field="PROFILE_TIME",
    field_mapping={"CUSTOMER_ID": "customer_id"},
    description="Customer profiles, a row each time one changes.",
)

# What only the transaction that is being scored can tell.
current_transaction = RequestSource(
    name="current_transaction",
    schema=[Field(name="TX_AMOUNT", dtype=Float64), Field(name="TX_DATETIME", dtype=UnixTimestamp)],
)
