"""Training: features of a time split, a LightGBM model, its scores on the days it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from feature_store import FeatureLayer
from feature_store.definitions.types import ValueType
from feature_store.errors import SourceError
from models.booster import FraudModel, feature_matrix, train
from models.metrics import auc_roc, average_precision, card_precision_at_k
from models.study import Scores, StudySplit, split

#: What a transactions file calls things, and what the layer does.
RENAMED = {"CUSTOMER_ID": "customer_id", "TERMINAL_ID": "terminal_id"}
KEPT = ("TRANSACTION_ID", "customer_id", "terminal_id", "TX_AMOUNT", "TX_DATETIME", "TX_FRAUD")


@dataclass(frozen=True)
class Trained:
    """A model, its scores on the test days, and how many rows it saw and was tested on."""

    model: FraudModel
    scores: Scores
    train_rows: int
    test_rows: int


def spine_of(transactions: pa.Table, start: date, end: date, after: timedelta = timedelta(0)) -> pa.Table:
    """Transactions of the days from `start` up to `end` (not included) as a spine, asked `after` their own time."""
    times = transactions["TX_DATETIME"].cast(pa.timestamp("us"))
    inside = pc.and_(
        pc.greater_equal(times, pa.scalar(datetime.combine(start, datetime.min.time()), pa.timestamp("us"))),
        pc.less(times, pa.scalar(datetime.combine(end, datetime.min.time()), pa.timestamp("us"))),
    )
    table = transactions.rename_columns([RENAMED.get(c, c) for c in transactions.column_names]).select(KEPT)
    table = table.set_column(table.column_names.index("TX_DATETIME"), "TX_DATETIME", times).filter(inside)
    if not table.num_rows:
        raise SourceError(f"there are no transactions from {start} up to {end}; choose other days, or more of them.")
    asked = pc.add(table["TX_DATETIME"], pa.scalar(after, pa.duration("us")))
    return table.append_column("event_timestamp", asked)


def features_of(
    layer: FeatureLayer, service: str, transactions: pa.Table, days: StudySplit, after: timedelta
) -> pd.DataFrame:
    """The service's features for the train and test days, as of `after` each transaction's time, in file order."""
    spine = spine_of(transactions, days.train_start, days.test_end, after)
    return layer.get_historical_features(spine, service).to_df()


def numeric_features(layer: FeatureLayer, service: str) -> list[str]:
    """The features of a service that a model can take: numbers, in the service's order."""
    request = layer.prepare(service).request
    numbers = [ref for ref in request.refs if request.type_of(ref).is_numeric or request.type_of(ref) is ValueType.BOOL]
    return [ref.column(False) for ref in numbers]


def train_model(layer: FeatureLayer, transactions: pa.Table, days: StudySplit, service: str = "fraud_v1") -> Trained:
    """Trains on the split's train days and scores its test days, with the published study's exclusions and metrics."""
    frame = features_of(layer, service, transactions, days, timedelta(0))
    training, testing = split(frame, days)
    names = numeric_features(layer, service)
    model = train(
        training,
        training["TX_FRAUD"].to_numpy(),
        names,
        fingerprint=layer.prepare(service).fingerprint,
        num_threads=2,
    )
    score = model.predict(feature_matrix(testing, names))
    label = testing["TX_FRAUD"].to_numpy()
    day = (testing["TX_DATETIME"].dt.normalize() - pd.Timestamp(days.test_start)).dt.days.to_numpy()
    scores = Scores(
        auc_roc(score, label),
        average_precision(score, label),
        card_precision_at_k(day, testing["customer_id"].to_numpy(), score, label),
    )
    return Trained(model, scores, len(training), len(testing))


def save(trained: Trained, folder: Path, trained_at: datetime) -> Path:
    """Writes the model into a folder of its own under `folder`, named by its version, and returns it."""
    target = folder / trained.model.version
    metrics = {
        "auc_roc": trained.scores.auc_roc,
        "average_precision": trained.scores.average_precision,
        "card_precision_100": trained.scores.card_precision_100,
    }
    trained.model.save(target, metrics, trained_at)
    return target
