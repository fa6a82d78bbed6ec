"""A repository whose history Spark computes: three lines of feature_store.yaml, the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.fraud_generator import FraudData
from feature_store import FeatureLayer
from feature_store.errors import ConfigError, IsochronError, SourceError, SpineError

CONF = "{spark.sql.shuffle.partitions: 3, spark.driver.extraJavaOptions: -XX:TieredStopAtLevel=1}"


@pytest.fixture
def spark_repo(repo: Path) -> Path:
    """The example's repository with `engine: spark`."""
    settings = repo / "feature_store.yaml"
    own = "  type: feature_store.adapters.feast.IsochronOfflineStore\n"
    assert own in settings.read_text()
    told = f"{own}  engine: spark\n  spark_master: local[2]\n  spark_conf: {CONF}\n"
    settings.write_text(settings.read_text().replace(own, told))
    return repo


@pytest.fixture
def layer(spark_repo: Path) -> Iterator[FeatureLayer]:
    with FeatureLayer(spark_repo) as opened:
        try:
            opened._history._session.get()  # type: ignore[union-attr]
        except ConfigError as error:
            pytest.fail(f"{error} (`make install` brings it where it may)")
        yield opened


def transactions(data: FraudData, rows: int = 400) -> pa.Table:
    """Every so many transactions, as they ask for their features; one asks for nobody's."""
    table = data.transactions.select(["TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT"])
    chosen = table.take(pa.array(range(0, len(table), len(table) // rows)))
    chosen = chosen.rename_columns(["TRANSACTION_ID", "TX_DATETIME", "customer_id", "terminal_id", "TX_AMOUNT"])
    customers = [None if i == 3 else c for i, c in enumerate(chosen["customer_id"].to_pylist())]
    chosen = chosen.set_column(2, "customer_id", pa.array(customers, pa.int64()))
    return chosen.append_column("event_timestamp", chosen["TX_DATETIME"])


def test_a_repository_on_spark_gives_the_rows_that_duckdb_gives(
    layer: FeatureLayer, fraud_repo: Path, fraud_data: FraudData, tmp_path: Path
) -> None:
    spine = transactions(fraud_data)
    pq.write_table(spine, tmp_path / "spine.parquet")
    with FeatureLayer(fraud_repo) as duckdb:
        expected = duckdb.get_historical_features(spine, "fraud_v1").to_arrow()
        asked = layer.get_historical_features(spine, "fraud_v1")
        found = asked.to_arrow()
        assert found.schema.equals(expected.schema)
        assert repr(found.to_pydict()) == repr(expected.to_pydict())
        for given_as in (asked, layer.get_historical_features(str(tmp_path / "spine.parquet"), "fraud_v1")):
            folder = given_as.to_parquet(tmp_path / "training")
            written = pa.concat_tables(map(pq.read_table, sorted(folder.iterdir())))
            assert written.schema.equals(expected.schema)
            assert repr(written.to_pydict()) == repr(expected.to_pydict())
        assert "reads 1 of 1 files" in asked.explain()


def test_a_spine_is_what_it_is_on_duckdb(
    layer: FeatureLayer, fraud_repo: Path, fraud_data: FraudData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = ["customer_recent:last_amounts"]
    spine = transactions(fraud_data, 20)
    monkeypatch.chdir(tmp_path)
    for file in ("selected.parquet", "with_labels.parquet", "select 1"):
        pq.write_table(spine, file)
    files: list[Any] = ["selected.parquet", "with_labels.parquet", Path("selected.parquet"), Path("select 1")]
    twice = pd.concat([spine.to_pandas(), spine.to_pandas()[["TX_AMOUNT"]]], axis="columns")
    with FeatureLayer(fraud_repo) as duckdb:
        expected = duckdb.get_historical_features(spine, refs).to_arrow()
        for given in (*files, pl.from_arrow(spine).lazy()):
            found = layer.get_historical_features(given, refs).to_arrow()
            assert found["last_amounts"].equals(expected["last_amounts"]), given
        for wrong, text in (
            (twice, "the spine's columns must each have a name of their own and hold one type: Duplicate column names"),
            (tmp_path / "nope.parquet", "nope.parquet is no file"),
            ("SELEC 1 FROM x", "neither a file nor SQL that begins with SELECT"),
            ({"customer_id": [1]}, "a spine cannot be a dict"),
        ):
            for asked in (duckdb, layer):
                with pytest.raises(SpineError, match=text):
                    asked.get_historical_features(wrong, refs).to_arrow()


def test_errors_name_their_cause_and_leave_no_output(
    layer: FeatureLayer, spark_repo: Path, fraud_data: FraudData, tmp_path: Path
) -> None:
    spine = transactions(fraud_data, 20)
    transaction_file = spark_repo / "data" / "transactions.parquet"
    rows = pq.read_table(transaction_file)
    feature = layer.definitions.service("fraud_v1").features[0].feature

    def fails(kind: type[IsochronError], match: str, asking: pa.Table | str) -> None:
        with pytest.raises(kind, match=match):
            layer.get_historical_features(asking, "fraud_v1").to_parquet(tmp_path / "out" / "rows")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    fails(SpineError, "the name of a requested feature", spine.append_column(feature, pa.array([1] * len(spine))))
    text = spine.set_column(
        spine.schema.get_field_index("event_timestamp"), "event_timestamp", pa.array(["2018-05-01"] * len(spine))
    )
    fails(SpineError, "event_timestamp is string, not a timestamp", text)
    pq.write_table(text, tmp_path / "text.parquet")
    fails(SpineError, "event_timestamp is string, not a timestamp", str(tmp_path / "text.parquet"))
    fails(SpineError, "has no column 'event_timestamp'", spine.drop_columns(["event_timestamp"]))
    pq.write_table(rows.drop_columns(["TX_AMOUNT"]), transaction_file)
    fails(SourceError, "has no column 'TX_AMOUNT'", spine)
    transaction_file.unlink()
    fails(SourceError, "no Parquet file at", spine)
    # A file that is broken behind its footer is found by an executor only, while the result is being written.
    pq.write_table(rows, transaction_file)
    content = bytearray(transaction_file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    transaction_file.write_bytes(content)
    fails(SourceError, "on Spark: Spark says: ", spine)
