"""Training sets: written whole with a manifest, and made again from it, byte for byte, by another process."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store import FeatureLayer
from feature_store.errors import SpineError, TrainingSetError, UnknownName
from feature_store.retrieval import training_set
from tests.processes import output_of, run


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def spine(repo: Path) -> pa.Table:
    """The transactions of some days as rows that ask, with columns that are no business of ours."""
    rows = pq.read_table(repo / "data" / "transactions.parquet").slice(2_000, 700)
    renamed = {"CUSTOMER_ID": "customer_id", "TERMINAL_ID": "terminal_id", "TX_DATETIME": "event_timestamp"}
    rows = rows.rename_columns([renamed.get(name, name) for name in rows.column_names])
    return rows.append_column("TX_DATETIME", rows["event_timestamp"])


def test_a_second_process_makes_the_same_bytes_from_the_manifest(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    with FeatureLayer(repo) as layer:
        made = layer.training_set(spine, "fraud_v1", tmp_path / "set")
        values = layer.get_historical_features(spine, "fraud_v1").to_arrow()
    assert made.to_arrow().equals(values)
    said = output_of(
        tmp_path, "isochron", "rebuild", "set/manifest.json", "--out", str(tmp_path / "again"), "--repo", str(repo)
    )
    assert sha256(tmp_path / "again" / "data.parquet") == sha256(made.data) == made.manifest.data
    assert made.manifest.data in said
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["rows"] == len(spine)
    assert manifest["columns"] == values.column_names
    files = {f["path"]: f["sha256"] for source in manifest["sources"].values() for f in source}
    assert files["data/transactions.parquet"] == sha256(repo / "data" / "transactions.parquet")


def test_a_set_made_by_the_command_is_the_one_the_library_makes(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    pq.write_table(spine, tmp_path / "rows.parquet")
    arguments = ["--spine", "rows.parquet", "--out", "set", "--repo", str(repo), "--knowledge-time"]
    output_of(tmp_path, "isochron", "training-set", "fraud_v1", *arguments)
    with FeatureLayer(repo) as layer:
        made = layer.training_set(tmp_path / "rows.parquet", "fraud_v1", tmp_path / "other", knowledge_time=True)
    assert sha256(tmp_path / "set" / "data.parquet") == made.manifest.data
    assert made.manifest.knowledge_time


@pytest.mark.parametrize("kind", ["pandas", "polars", "sql"])
def test_a_spine_of_any_kind_is_rebuilt(kind: str, repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    pq.write_table(spine, tmp_path / "rows.parquet")
    given = {
        "pandas": spine.to_pandas,
        "polars": lambda: pl.from_arrow(spine),
        "sql": lambda: f"SELECT * FROM '{tmp_path}/rows.parquet'",
    }[kind]()
    with FeatureLayer(repo) as layer:
        made = layer.training_set(given, "fraud_v1", tmp_path / "set")
        again = layer.rebuild_training_set(tmp_path / "set" / "manifest.json", tmp_path / "again")
    assert again.manifest.data == made.manifest.data
    assert again.to_arrow().equals(made.to_arrow())


def test_changed_files_definitions_and_spines_are_named(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    with FeatureLayer(repo) as layer:
        layer.training_set(spine, "fraud_v1", tmp_path / "set")
    manifest, again = tmp_path / "set" / "manifest.json", tmp_path / "again"
    transactions = repo / "data" / "transactions.parquet"
    before = transactions.read_bytes()

    pq.write_table(pq.read_table(transactions).slice(1), transactions)
    with (
        FeatureLayer(repo) as layer,
        pytest.raises(TrainingSetError, match=r"data/transactions.parquet has other cont"),
    ):
        layer.rebuild_training_set(manifest, again)
    transactions.write_bytes(before)

    views = repo / "fraud.py"
    views.write_text(views.read_text().replace("timedelta(days=7)", "timedelta(days=6)"))
    output_of(repo, "feast", "apply")
    with FeatureLayer(repo) as layer, pytest.raises(TrainingSetError, match="the definitions behind fraud_v1 changed"):
        layer.rebuild_training_set(manifest, again)

    (tmp_path / "set" / "spine.parquet").unlink()
    with FeatureLayer(repo) as layer, pytest.raises(TrainingSetError, match="is not the one the manifest names"):
        layer.rebuild_training_set(manifest, again)
    manifest.write_text("{}")
    with FeatureLayer(repo) as layer, pytest.raises(TrainingSetError, match="is no manifest"):
        layer.rebuild_training_set(manifest, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["feature_repo", "set"]


def test_nothing_is_left_of_a_set_that_failed(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    with FeatureLayer(repo) as layer:
        with pytest.raises(SpineError, match="no column 'customer_id'"):
            layer.training_set(spine.drop_columns(["customer_id"]), "fraud_v1", tmp_path / "set")
        with pytest.raises(UnknownName, match="no feature service"):
            layer.training_set(spine, "fraud_v0", tmp_path / "set")
        assert [p.name for p in tmp_path.iterdir()] == ["feature_repo"]
        (tmp_path / "set").mkdir()
        with pytest.raises(TrainingSetError, match="exists already"):
            layer.training_set(spine, "fraud_v1", tmp_path / "set")


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("data", "0" * 64, "the rebuilt rows are not the manifest's bytes; what made them then: numpy 0.1 .now "),
        ("plan", "0" * 64, "the rebuilt rows are not the manifest's bytes"),
        ("rows", 99, "the rebuilt rows are not the manifest's bytes"),
        ("definitions", "0" * 64, "the definitions behind fraud_v1 changed since"),
    ],
)
def test_a_rebuild_holds_itself_to_every_entry(
    entry: str, value: object, reason: str, repo: Path, spine: pa.Table, tmp_path: Path
) -> None:
    with FeatureLayer(repo) as layer:
        layer.training_set(spine, "fraud_v1", tmp_path / "set")
        manifest = tmp_path / "set" / "manifest.json"
        content = json.loads(manifest.read_text())
        content["versions"]["numpy"] = "0.1"
        manifest.write_text(json.dumps(content | {entry: value}))
        with pytest.raises(TrainingSetError, match=reason):
            layer.rebuild_training_set(manifest, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["feature_repo", "set"]


def test_a_source_that_changes_while_it_is_read_fails_the_run(
    repo: Path, spine: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    customers = repo / "data" / "customers.parquet"
    write = training_set._write_rows

    def changed_after(*arguments: Any) -> Any:
        written = write(*arguments)
        pq.write_table(pq.read_table(customers).slice(1), customers)
        return written

    monkeypatch.setattr(training_set, "_write_rows", changed_after)
    with FeatureLayer(repo) as layer, pytest.raises(TrainingSetError, match="source 'customers' changed while"):
        layer.training_set(spine, "fraud_v1", tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["feature_repo"]


def test_row_groups_are_of_one_size_however_rows_come(
    repo: Path, spine: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_set, "_GROUP_ROWS", 100)
    spine = spine.slice(0, 650)
    with FeatureLayer(repo) as layer:
        made = layer.training_set(spine, "fraud_v1", tmp_path / "set")
        parts = pa.concat_tables([spine.slice(0, 30), spine.slice(30, 333), spine.slice(363)])
        other = layer.training_set(parts, "fraud_v1", tmp_path / "parts")
    footer = pq.read_metadata(made.data)
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [100] * 6 + [50]
    assert other.manifest.data == made.manifest.data


def test_of_writers_to_one_folder_one_wins_and_the_others_are_told(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    with FeatureLayer(repo) as layer:

        def write(_: int) -> str:
            try:
                return layer.training_set(spine, "fraud_v1", tmp_path / "set").manifest.data
            except TrainingSetError as error:
                return type(error).__name__

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(write, range(4)))
    assert outcomes.count("TrainingSetError") == 3
    assert sha256(tmp_path / "set" / "data.parquet") in outcomes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["feature_repo", "set"]


@pytest.mark.parametrize("name", ["with_labels.parquet", "selected.parquet", "from here.parquet"])
def test_a_file_whose_name_begins_like_sql_is_a_file(name: str, repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    pq.write_table(spine, tmp_path / name)
    queries = [f"-- a comment\nSELECT * FROM '{tmp_path / name}'", f"FROM '{tmp_path / name}' LIMIT 700"]
    with FeatureLayer(repo) as layer, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for asked in (name, Path(name), *queries):
            assert len(layer.get_historical_features(asked, "fraud_v1").to_arrow()) == len(spine)


def test_a_folder_under_git_gives_its_commit(repo: Path, spine: pa.Table, tmp_path: Path) -> None:
    copied = tmp_path / "repo"
    shutil.copytree(repo, copied)
    if run(copied, "/usr/bin/env", "git", "init", "--quiet").returncode:
        pytest.fail("git is not installed; the manifest's commit cannot be tested (install git)")
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    output_of(copied, "/usr/bin/env", "git", "add", "fraud.py")
    output_of(copied, "/usr/bin/env", "git", *identity, "commit", "--quiet", "-m", "views")
    commit = output_of(copied, "/usr/bin/env", "git", "rev-parse", "HEAD").strip()
    with FeatureLayer(copied) as layer:
        made = layer.training_set(spine, "fraud_v1", copied / "set")
        assert (made.manifest.commit, made.manifest.uncommitted) == (commit, False)
        (copied / "fraud.py").write_text("# changed\n" + (copied / "fraud.py").read_text())
        made = layer.training_set(spine, "fraud_v1", copied / "other")
        assert (made.manifest.commit, made.manifest.uncommitted) == (commit, True)


def test_no_spine_asks_for_every_row_of_a_range(repo: Path) -> None:
    transactions = pq.read_table(repo / "data" / "transactions.parquet")
    times = transactions["TX_DATETIME"].cast(pa.timestamp("us"))
    start, end = pd.Timestamp("2018-04-20"), pd.Timestamp("2018-04-21 12:00")
    inside = transactions.filter(pc.and_(pc.greater_equal(times, start), pc.less_equal(times, end)))
    with FeatureLayer(repo) as layer:
        view = layer.definitions.stored_view("customer_spend")
        features = [f"customer_spend:{view.aggregations[0].name}"]
        found = layer.get_historical_features(None, features, start_date=start, end_date=end).to_arrow()
        asked = found.select(["customer_id", "event_timestamp"])
        assert found.equals(layer.get_historical_features(asked, features).to_arrow())
        with pytest.raises(SpineError, match="without an entity_df"):
            layer.get_historical_features(asked, features, start_date=start)
        with pytest.raises(SpineError, match="is after end_date"):
            layer.get_historical_features(None, features, start_date=end, end_date=start)
    pairs = set(zip(inside["CUSTOMER_ID"].to_pylist(), inside["TX_DATETIME"].to_pylist(), strict=True))
    assert len(pairs) > 100
    keys = asked["customer_id"].to_pylist()
    assert list(
        zip(keys, [t.replace(tzinfo=None) for t in asked["event_timestamp"].to_pylist()], strict=True)
    ) == sorted(((k, t.replace(tzinfo=None)) for k, t in pairs), key=lambda pair: (pair[1], pair[0]))
