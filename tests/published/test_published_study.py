"""The published fraud study through the layer: its features row by row, its figures, and a leak that is caught.

Needs the published files: ISOCHRON_DATA names a folder with `fraud/transactions.parquet` and
`fraud/features_published.parquet`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from datasets.fraud_published import load_published
from feature_store import FeatureLayer
from models.errors import LeakSuspected
from models.study import PUBLISHED, check_scores
from pipelines.study import run_study, study_features
from tests.processes import output_of

pytestmark = pytest.mark.published

FEATURES = [
    "TX_DURING_WEEKEND",
    "TX_DURING_NIGHT",
    *(f"CUSTOMER_ID_{what}_{d}DAY_WINDOW" for d in (1, 7, 30) for what in ("NB_TX", "AVG_AMOUNT")),
    *(f"TERMINAL_ID_{what}_{d}DAY_WINDOW" for d in (1, 7, 30) for what in ("NB_TX", "RISK")),
]


@pytest.fixture(scope="module")
def published() -> Path:
    folder = os.environ.get("ISOCHRON_DATA")
    if not folder:
        pytest.skip("set ISOCHRON_DATA to the folder that holds fraud/transactions.parquet")
    return Path(folder) / "fraud"


def test_every_published_feature_value_is_recomputed(
    published: Path, fraud_repo: Path, tmp_path: Path, record_testsuite_property: pytest.RecordProperty
) -> None:
    transactions, features = published / "transactions.parquet", published / "features_published.parquet"
    duckdb.sql(f"""
        COPY (SELECT TRANSACTION_ID, CUSTOMER_ID AS customer_id, TERMINAL_ID AS terminal_id, TX_AMOUNT,
                     t.TX_DATETIME, t.TX_DATETIME + INTERVAL 1 SECOND AS event_timestamp
              FROM '{transactions}' t SEMI JOIN '{features}' USING (TRANSACTION_ID))
        TO '{tmp_path}/spine.parquet'""")
    arguments = ["--spine", "spine.parquet", "--out", "out.parquet", "--source", f"transactions={transactions}"]
    output_of(tmp_path, "isochron", "historical", "fraud_book", *arguments, "--repo", str(fraud_repo))
    apart = f"""(SELECT TRANSACTION_ID FROM '{transactions}' QUALIFY
                 count(*) OVER (PARTITION BY CUSTOMER_ID, TX_DATETIME) = 1)"""
    differs = ", ".join(
        f"count(*) FILTER (o.{c} IS NULL OR abs(o.{c} - p.{c}) > 1e-9 * abs(p.{c})) AS {c}" for c in FEATURES
    )
    counted = duckdb.sql(f"""
        SELECT count(*) AS rows, {differs} FROM '{tmp_path}/out.parquet' o
        JOIN '{features}' p USING (TRANSACTION_ID) JOIN {apart} USING (TRANSACTION_ID)""")
    row = dict(zip(counted.columns, counted.fetchall()[0], strict=True))
    rows = row.pop("rows")
    print(f"compared {rows * len(FEATURES):,} published values of {rows:,} rows")
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 585_177
    assert rows > 585_100
    assert row == dict.fromkeys(FEATURES, 0)


def test_the_published_figures_are_reproduced(published: Path, fraud_repo: Path) -> None:
    file = published / "transactions.parquet"
    with FeatureLayer(fraud_repo, sources={"transactions": str(file)}) as layer:
        scores = run_study(study_features(layer, load_published(file)))
    for name, measured in scores.items():
        print(name, measured)
        check_scores(name, measured, PUBLISHED[name])


def test_without_the_label_delay_the_figures_are_too_good_and_that_fails(
    published: Path, fraud_repo: Path, tmp_path: Path
) -> None:
    repo = without_label_delay(fraud_repo, tmp_path / "leaky")
    file = published / "transactions.parquet"
    with FeatureLayer(repo, sources={"transactions": str(file)}) as layer:
        scores = run_study(study_features(layer, load_published(file)), models=["logistic_regression"])
    with pytest.raises(LeakSuspected):
        check_scores("logistic_regression", scores["logistic_regression"], PUBLISHED["logistic_regression"])


def without_label_delay(repo: Path, folder: Path) -> Path:
    """A copy of the repository, applied, in which a label is known as soon as its transaction."""
    shutil.copytree(repo, folder)
    sources = folder / "sources.py"
    text = sources.read_text()
    assert ', "isochron.delay": "7d"' in text
    sources.write_text(text.replace(', "isochron.delay": "7d"', ""))
    output_of(folder, "feast", "apply")
    return folder
