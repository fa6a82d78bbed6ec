"""The demo end to end, small: what it proves, and that it would notice if it were not so."""

from __future__ import annotations

import datetime as dt
import shutil
import sys
from pathlib import Path

import orjson
import pytest

from datasets.fraud_generator import FraudProcess, generate
from feature_store import FeatureLayer, cli
from feature_store.clock import ManualClock
from feature_store.monitoring.consistency import Comparison
from feature_store.retrieval.historical import write_parquet
from feature_store.stores.online import appending
from feature_store.stores.online.backend import DELETE, SET, Write
from feature_store.stores.online.records import Bucket
from feature_store.stores.online.windowed import WindowedOnline
from feature_store.timestamps import micros
from models.errors import LeakSuspected
from models.study import StudySplit, check_scores
from pipelines.demo import compare_decisions
from pipelines.study import run_study, study_features
from tests.published.test_published_study import without_label_delay

SMALL = ["--days", "38", "--customers", "400", "--terminals", "400", "--decisions", "400"]


def _demo(repo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `isochron demo` in this process; its exit code."""
    report = ["--folder", str(folder), "--report", str(folder / "report.json")]
    monkeypatch.setattr(sys, "argv", ["isochron", "demo", "--repo", str(repo), *report, *SMALL])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def repo(fraud_repo: Path, tmp_path: Path) -> Path:
    """A repository without data: the demo generates its own."""
    ignore = shutil.ignore_patterns("*.parquet", "*.lmdb")
    return Path(shutil.copytree(fraud_repo, tmp_path / "feature_repo", ignore=ignore))


def test_the_demo_overwrites_nobodys_data(
    fraud_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = Path(shutil.copytree(fraud_repo, tmp_path / "theirs"))
    before = (theirs / "data" / "transactions.parquet").read_bytes()
    assert _demo(theirs, tmp_path / "demo", monkeypatch) == 1
    assert "was not made by the demo and is left as it is" in capsys.readouterr().err
    assert (theirs / "data" / "transactions.parquet").read_bytes() == before


def test_the_demo_compares_every_served_value_and_finds_no_mismatch(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _demo(repo, tmp_path / "demo", monkeypatch) == 0
    shown = capsys.readouterr().out
    report = orjson.loads((tmp_path / "demo" / "report.json").read_bytes())
    features = len(FeatureLayer(repo).prepare("fraud_v1").feature_names)
    assert report["decisions"] == 400
    assert report["values_compared"] == 400 * features
    assert report["mismatches"] == 0
    assert set(report["seconds"]) == {"data", "apply", "train", "bootstrap", "replay", "compare"}
    assert 0.5 < report["auc_roc"] <= 1
    for line in ("values compared", "mismatches", "decision p50, p99", "average precision", "http://127.0.0.1"):
        assert line in shown
    assert _tampered(repo, tmp_path / "demo").mismatches["sum_amount_86400s"] == 1


def _tampered(repo: Path, folder: Path) -> Comparison:
    """The comparison after one logged value was moved by one part in a million."""
    log = folder / "decisions.jsonl"
    lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    line = next(i for i, d in enumerate(lines) if d["features"]["sum_amount_86400s"])
    lines[line]["features"]["sum_amount_86400s"] *= 1 + 1e-6
    log.write_bytes(b"".join(orjson.dumps(d) + b"\n" for d in lines))
    clock = ManualClock(micros(dt.datetime(2018, 5, 8, tzinfo=dt.UTC)))
    with FeatureLayer(repo, clock=clock) as layer:
        return compare_decisions(layer, log)


def test_without_the_raw_head_the_same_check_fails(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event is folded into the staircase as it comes: tiles cannot tell times inside a hop apart."""

    def fold_at_once(
        online: WindowedOnline, now: int, head: bytes, stairs: bytes, rows: bytes, stored: bytes | None, record: bytes
    ) -> Write:
        base = online.codec.decode(stored) if stored else None
        floor = base.exact_from if base else Bucket.decode(record).exact_from
        merged = online.builder.merge(base, online.head.events([rows]), floor)
        return Write([], [(SET, stairs, online.codec.encode(merged)), (DELETE, head, b"")])

    monkeypatch.setattr(appending, "COMPACT_ROWS", 0)
    monkeypatch.setattr(appending, "_compaction", fold_at_once)
    assert _demo(repo, tmp_path / "demo", monkeypatch) == cli.DIFFERENT
    report = orjson.loads((tmp_path / "demo" / "report.json").read_bytes())
    assert report["mismatches"] > 400
    assert report["mismatches_by_feature"]["count_amount_3600s"] > 0


def test_a_study_without_the_label_delay_is_caught_as_a_leak(fraud_repo: Path, tmp_path: Path) -> None:
    """On generated data the honest run is the yardstick; the published figures are in tests/published."""
    transactions = generate(FraudProcess(customers=1_000, terminals=2_000, days=60, seed=3)).transactions
    days = StudySplit(dt.date(2018, 5, 9))
    leaky = without_label_delay(fraud_repo, tmp_path / "leaky")
    scores = []
    for repo in (fraud_repo, leaky):
        here = Path(shutil.copytree(repo, tmp_path / f"data-{repo.name}"))
        write_parquet(transactions, here / "data" / "transactions.parquet")
        with FeatureLayer(here) as layer:
            frame = study_features(layer, transactions, days)
        scores.append(run_study(frame, days, ["logistic_regression"])["logistic_regression"])
    honest, too_good = scores
    check_scores("logistic_regression", honest, honest)
    with pytest.raises(LeakSuspected):
        check_scores("logistic_regression", too_good, honest)
