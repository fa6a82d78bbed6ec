"""What several test modules share: a small repository of the card-fraud example, applied with Feast itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# Before any test imports Feast, which would turn on the multi-process mode of metrics: servers of one process would add
# to each other's counters then.
import prometheus_client  # noqa: F401
import pyarrow.parquet as pq
import pytest

from datasets.fraud_generator import FraudData, FraudProcess, generate

pytest_plugins = ["tests.redis_fixtures"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def fraud_data() -> FraudData:
    """Some 4,000 card transactions of 50 customers at 100 terminals, from 2018-04-01 to 2018-05-10."""
    return generate(FraudProcess(customers=50, terminals=100, days=40, radius=20))


@pytest.fixture(scope="session")
def fraud_repo(tmp_path_factory: pytest.TempPathFactory, fraud_data: FraudData) -> Path:
    """An applied copy of `feature_repo` over that data; its online store is empty. Copy it before writing into it."""
    repo = tmp_path_factory.mktemp("fraud") / "feature_repo"
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("data", "__pycache__"))
    (repo / "data").mkdir()
    pq.write_table(fraud_data.transactions, repo / "data" / "transactions.parquet")
    pq.write_table(fraud_data.customers, repo / "data" / "customers.parquet")
    feast = Path(sys.executable).parent / "feast"
    applied = subprocess.run([str(feast), "apply"], cwd=repo, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stdout + applied.stderr
    return repo
