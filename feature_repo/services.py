"""What models ask for, in the order they get it."""

from feast import FeatureService
from fraud import customer_profile, customer_recent, customer_spend, terminal_risk, transaction_context
from fraud_book import book_context, book_customer, book_terminal

fraud_v1 = FeatureService(
    name="fraud_v1",
    features=[
        customer_spend,
        terminal_risk,
        customer_recent,
        customer_profile[["mean_amount", "std_amount", "mean_nb_tx_per_day"]],
        transaction_context,
    ],
    description="Everything the online fraud score reads.",
)

fraud_book = FeatureService(
    name="fraud_book",
    features=[
        book_context,
        book_customer,
        book_terminal[[f"TERMINAL_ID_NB_TX_{days}DAY_WINDOW" for days in (1, 7, 30)]],
    ],
    description="The inputs of the published study; with the request's TX_AMOUNT they are fifteen.",
)
