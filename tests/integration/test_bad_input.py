"""Bad input from the command line, a FeatureLayer and Feast's SDK: one clear typed error, and no file half written."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from typer.testing import CliRunner

from datasets.fraud_generator import FraudData
from feature_store import FeatureLayer
from feature_store.cli import app
from feature_store.errors import (
    ColumnError,
    IsochronError,
    OutputError,
    RequestError,
    SourceError,
    SpineError,
    StoreNotReady,
    UnknownName,
)
from feature_store.timestamps import DAY
from tests.processes import output_of, run

ROOT = Path(__file__).resolve().parents[2]


def _spine(**columns: object) -> pa.Table:
    t = pa.array([1_525_132_800_000_000], pa.timestamp("us"))
    whole = {
        "customer_id": pa.array([1]),
        "terminal_id": pa.array([1]),
        "TX_AMOUNT": pa.array([9.5]),
        "TX_DATETIME": t,
        "event_timestamp": t,
    }
    return pa.table({n: c for n, c in {**whole, **columns}.items() if c is not None})


SPINES = {
    "no time": (_spine(event_timestamp=None), "no column 'event_timestamp'"),
    "a time that is text": (_spine(event_timestamp=pa.array(["2018-05-01"])), "is string, not a timestamp"),
    "a null time": (_spine(event_timestamp=pa.nulls(1, pa.timestamp("us"))), "is null in 1 rows"),
    "no key": (_spine(customer_id=None), "no column 'customer_id'"),
    "a key that is text": (_spine(customer_id=pa.array(["one"])), "key 'customer_id' of the spine is string"),
    "a key that is no whole number": (_spine(customer_id=pa.array([1.5])), "holds a value that is no Int64"),
    "no request value": (_spine(TX_AMOUNT=None), "no column 'TX_AMOUNT', which on-demand view"),
    "a column named like a feature": (_spine(amount=pa.array([1.0])), "already has a column 'amount'"),
}


@pytest.mark.parametrize("case", SPINES)
def test_a_spine_that_cannot_be_used(case: str, fraud_repo: Path, tmp_path: Path) -> None:
    table, reason = SPINES[case]
    pq.write_table(table, tmp_path / "spine.parquet")
    out = tmp_path / "out.parquet"
    arguments = ["historical", "fraud_v1", "--spine", str(tmp_path / "spine.parquet"), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--repo", str(fraud_repo)])
    assert isinstance(result.exception, IsochronError)
    assert reason in str(result.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spine.parquet"]


def test_an_empty_spine_gives_the_columns_and_no_rows(fraud_repo: Path) -> None:
    with FeatureLayer(fraud_repo) as layer:
        table = layer.get_historical_features(_spine().slice(1), "fraud_v1").to_arrow()
        assert table.num_rows == 0
        assert table.column_names[5:] == layer.prepare("fraud_v1").feature_names


def _by_layer(repo: Path, spine: pa.Table, out: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.get_historical_features(spine, "fraud_v1").to_parquet(out)


def _by_sdk(repo: Path, spine: pa.Table, out: Path) -> None:
    store = FeatureStore(str(repo))
    job = store.get_historical_features(spine.to_pandas(), store.get_feature_service("fraud_v1"))
    job.persist(SavedDatasetFileStorage(str(out)))


WAYS = pytest.mark.parametrize("write", [_by_layer, _by_sdk])
# Feast itself warns of what our plug-ins replace, and checks request values before it comes to us.
FEAST = pytest.mark.filterwarnings("ignore")


@FEAST
@WAYS
@pytest.mark.parametrize("case", [case for case in SPINES if case != "no request value"])
def test_a_spine_that_cannot_be_used_in_python(case: str, write: Callable, fraud_repo: Path, tmp_path: Path) -> None:
    spine, reason = SPINES[case]
    with pytest.raises((SpineError, ColumnError)) as refused:
        write(fraud_repo, spine, tmp_path / "out.parquet")
    assert reason in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@FEAST
@WAYS
def test_an_empty_spine_gives_columns_of_the_right_types(write: Callable, fraud_repo: Path, tmp_path: Path) -> None:
    for name, spine in (("one", _spine()), ("none", _spine().slice(1))):
        write(fraud_repo, spine, tmp_path / f"{name}.parquet")
    one, none = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "none"))
    assert none.schema.equals(one.schema)
    assert (len(one), len(none)) == (1, 0)


def _as_text(column: str) -> Callable[[pa.Table], pa.Table]:
    def write(table: pa.Table) -> pa.Table:
        texts = pa.array([str(value) for value in table[column].to_pylist()])
        return table.set_column(table.column_names.index(column), column, texts)

    return write


SOURCES = {
    "a missing column": (lambda table: table.drop_columns(["TX_AMOUNT"]), "has no column 'TX_AMOUNT'; it has:"),
    "a key that is text": (_as_text("CUSTOMER_ID"), "is string, but is declared as Int64"),
    "a time that is text": (_as_text("TX_DATETIME"), "'TX_DATETIME' of source 'transactions'"),
    "no file": (None, "no Parquet file at"),
}


@FEAST
@WAYS
@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_cannot_be_used(case: str, write: Callable, repo: Path, tmp_path: Path) -> None:
    change, reason = SOURCES[case]
    file = repo / "data" / "transactions.parquet"
    if change:
        pq.write_table(change(pq.read_table(file)), file)
    else:
        file.unlink()
    with pytest.raises(SourceError, match=reason) as refused:
        write(repo, _spine(), tmp_path / "out" / "out.parquet")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*out*.parquet*"))


def test_a_transactions_file_without_a_column(fraud_repo: Path, fraud_data: FraudData, tmp_path: Path) -> None:
    pq.write_table(fraud_data.transactions.drop_columns(["TX_AMOUNT"]), tmp_path / "transactions.parquet")
    with FeatureLayer(fraud_repo, sources={"transactions": str(tmp_path / "transactions.parquet")}) as layer:
        with pytest.raises(SourceError, match="has no column 'TX_AMOUNT'; it has: TRANSACTION_ID"):
            layer.get_historical_features(_spine(), "fraud_v1").to_arrow()
        with pytest.raises(SourceError, match="has no column 'TX_AMOUNT'"):
            layer.bootstrap(["customer_spend"])
        with pytest.raises(StoreNotReady, match="it was never filled"):
            layer.get_online_features(["customer_spend:count_amount_3600s"], {"customer_id": [1]})


def test_a_source_of_the_wrong_kind(fraud_repo: Path, fraud_data: FraudData, tmp_path: Path) -> None:
    file = tmp_path / "transactions.parquet"
    amounts = pa.array([str(a) for a in fraud_data.transactions["TX_AMOUNT"].to_pylist()])
    at = fraud_data.transactions.column_names.index("TX_AMOUNT")
    pq.write_table(fraud_data.transactions.set_column(at, "TX_AMOUNT", amounts), file)
    with FeatureLayer(fraud_repo, sources={"transactions": str(file)}) as layer:
        with pytest.raises(SourceError, match=r"column 'TX_AMOUNT' of source .* is string, but is declared"):
            layer.get_historical_features(_spine(), "fraud_v1").to_arrow()
        file.write_bytes(b"not parquet")
        with pytest.raises(SourceError, match="is not a readable Parquet file"):
            layer.get_historical_features(_spine(), "fraud_v1").to_arrow()
        file.unlink()
        with pytest.raises(SourceError, match="no Parquet file at"):
            layer.get_historical_features(_spine(), "fraud_v1").to_arrow()


def test_names_that_are_not_there(fraud_repo: Path) -> None:
    with FeatureLayer(fraud_repo) as layer:
        with pytest.raises(UnknownName, match="is named 'fraud_v2'; there are: fraud_book, fraud_v1"):
            layer.prepare("fraud_v2")
        with pytest.raises(UnknownName, match="no feature view is named 'nothing'"):
            layer.prepare(["nothing:at_all"])
        with pytest.raises(UnknownName, match="no feature of view 'customer_spend' is named 'median'"):
            layer.prepare(["customer_spend:median"])
        with pytest.raises(UnknownName, match="no push source with windowed views is named 'payments'"):
            layer.append_events("payments", pa.table({"a": [1]}))
        with pytest.raises(RequestError, match="are a int; give an Arrow table, or a pandas or Polars frame"):
            layer.append_events("transaction_events", 5)
        with pytest.raises(RequestError, match="'customer_id' is a int; give a list of values, one a row"):
            layer.get_online_features(["customer_profile:mean_amount"], {"customer_id": 1})
    with pytest.raises(UnknownName, match="no file source is named 'payments'; there are: customers, labels, transact"):
        FeatureLayer(fraud_repo, sources={"payments": "x.parquet"})


def test_positions_and_times_that_cannot_be(fraud_repo: Path, fraud_data: FraudData, tmp_path: Path) -> None:
    repo = shutil.copytree(fraud_repo, tmp_path / "feature_repo")
    row = fraud_data.transactions.slice(0, 1)
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
        for position in ({"partition": -1}, {"partition": 2**32}, {"offset": -5}, {"offset": 2**64}):
            with pytest.raises(RequestError, match=r"is .*, not a number from 0"):
                layer.append_events("transaction_events", row, **position)
        beyond = pa.array([2**63 - 1 - DAY], pa.int64()).view(pa.timestamp("us", "UTC"))
        at = row.column_names.index("TX_DATETIME")
        with pytest.raises(RequestError, match="holds a time beyond the calendar"):
            layer.append_events("label_events", row.set_column(at, "TX_DATETIME", beyond))
        with pytest.raises(RequestError, match="is given twice, also as 'amount'"):
            layer.append_events("transaction_events", row.append_column("amount", row["TX_AMOUNT"]))


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback])
def test_every_command_has_help_with_an_example_and_is_in_the_readme(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: isochron {command}" in result.output
    documents = "".join(p.read_text() for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    assert f"isochron {command}" in documents


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bootstrap", "--repo", str(tmp_path)])
    assert "give the folder of a Feast repository" in str(result.exception)
    (tmp_path / "feature_store.yaml").write_text("project: new\nregistry: data/registry.db\n")
    result = CliRunner().invoke(app, ["bootstrap", "--repo", str(tmp_path)])
    assert "run `feast apply` (or `isochron apply`) first" in str(result.exception)
    assert not (tmp_path / "data").exists()


def test_a_key_row_that_cannot_be_read(fraud_repo: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"customer_id": ["one"]}), tmp_path / "keys.parquet")
    arguments = ["online", "fraud_v1", "--keys", str(tmp_path / "keys.parquet"), "--out", str(tmp_path / "out.parquet")]
    result = CliRunner().invoke(app, [*arguments, "--repo", str(fraud_repo)])
    assert isinstance(result.exception, RequestError)
    assert str(result.exception).startswith("'customer_id' does not read as Int64")
    assert not (tmp_path / "out.parquet").exists()


def test_history_says_what_it_lacks_before_it_runs(fraud_repo: Path, tmp_path: Path) -> None:
    refs = ["customer_recent:last_amounts"]
    asked = pa.table({"customer_id": [1], "event_timestamp": pa.array([0], pa.timestamp("us"))})
    with FeatureLayer(fraud_repo) as layer:
        with pytest.raises(OutputError, match="is a folder; name the Parquet file"):
            layer.get_historical_features(asked, refs).to_parquet(tmp_path)
        with pytest.raises(SpineError, match="comes with a request, so these features need a spine"):
            layer.get_historical_features(None, "fraud_v1", start_date="2018-05-01").to_arrow()
        with pytest.raises(SpineError, match="'May' is no time; write it like"):
            layer.get_historical_features(None, refs, start_date="May")
        with pytest.raises(SpineError, match=r"nope.parquet is no file"):
            layer.get_historical_features(tmp_path / "nope.parquet", refs).to_arrow()
        with pytest.raises(SpineError, match="neither a file nor SQL that begins with SELECT"):
            layer.get_historical_features("SELEC 1 FROM x", refs).to_arrow()
        by_text = layer.get_historical_features(None, refs, start_date="2018-05-01", end_date="2018-05-02").to_arrow()
        day = dt.date(2018, 5, 1)
        by_day = layer.get_historical_features(None, refs, start_date=day, end_date=day + dt.timedelta(1)).to_arrow()
        assert len(by_text) > 20
        assert by_day.equals(by_text)
        lazy = pl.LazyFrame({"customer_id": [1], "event_timestamp": [dt.datetime(2018, 5, 1, tzinfo=dt.UTC)]})
        assert len(layer.get_historical_features(lazy, refs).to_arrow()) == 1


def test_the_command_asks_for_a_spine_or_a_range_and_an_output(fraud_repo: Path, tmp_path: Path) -> None:
    asked = ["historical", "customer_recent:last_amounts", "--repo", str(fraud_repo)]
    for more in ([], ["--out", "x.parquet"], ["--start", "2018-05-01"]):
        assert run(tmp_path, "isochron", *asked, *more).returncode == 2, more
    text = output_of(tmp_path, "isochron", *asked, "--start", "2018-05-01", "--end", "2018-05-02", "--explain")
    assert "from 2018-05-01T00:00:00Z to 2018-05-02T00:00:00Z" in text
    output_of(tmp_path, "isochron", *asked, "--start", "2018-05-01", "--end", "2018-05-02", "--out", "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet").column_names == ["customer_id", "event_timestamp", "last_amounts"]
