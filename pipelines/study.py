"""The published study through the layer: its features, its split, its models, its figures."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import pandas as pd
import pyarrow as pa

from feature_store import FeatureLayer
from models.study import BOOK_INPUTS, BOOK_SPLIT, Scores, StudySplit, fit_and_score, split
from pipelines.train import features_of

MODELS = ("logistic_regression", "random_forest")

#: The study counts the current transaction in its windows; asked one second later, a window that ends before does.
AFTER = timedelta(seconds=1)


def study_features(layer: FeatureLayer, transactions: pa.Table, days: StudySplit = BOOK_SPLIT) -> pd.DataFrame:
    """The study's 15 inputs for its train and test days, with keys, times and labels, in TRANSACTION_ID order."""
    frame = features_of(layer, "fraud_book", transactions, days, AFTER)
    return frame.sort_values("TRANSACTION_ID", kind="stable").reset_index(drop=True)


def run_study(frame: pd.DataFrame, days: StudySplit = BOOK_SPLIT, models: Iterable[str] = MODELS) -> dict[str, Scores]:
    """The scores of each model on the study's split of these features."""
    training, testing = split(frame, days)
    return {name: fit_and_score(name, training, testing, BOOK_INPUTS) for name in models}
