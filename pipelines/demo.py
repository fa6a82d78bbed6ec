"""The demo: from raw transactions to a served fraud score, and proof that what was served is what was trained on.

Generates (or takes) transactions, applies the feature repository, trains, fills the online store, then replays the
last days over HTTP: requests for scores in time order, while the events of the next minutes are already stored. Every
value that a decision logged is compared with its historical value at the same time.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.fraud_generator import FraudProcess, generate
from datasets.fraud_published import load_customers, load_published
from feature_store import FeatureLayer
from feature_store.adapters.feast.apply import apply
from feature_store.clock import ManualClock
from feature_store.errors import ConfigError, SourceError
from feature_store.layer import Progress
from feature_store.monitoring.consistency import Comparison, compare
from feature_store.retrieval.historical import write_parquet
from feature_store.timestamps import DAY, MINUTE, arrow_micros, micros, moment
from models.study import StudySplit
from pipelines.train import Trained, save, spine_of, train_model
from serving.app import create_app
from serving.decision_log import DecisionLog, read_decisions
from serving.server import running

SERVICE = "fraud_v1"
REPLAY_DAYS = 2

#: How far the log runs ahead of the requests: events of the future are stored when a score is asked for.
LOOK_AHEAD = 5 * MINUTE
_LABEL_DELAY = 7 * DAY

#: Where what the demo leaves can be looked at.
ADDRESS = "http://127.0.0.1:8000/ (after `isochron serve`)"


@dataclass
class DemoReport:
    """What the demo did, as it is written to the report file. Times in seconds, latencies in milliseconds."""

    transactions: int = 0
    first_day: str = ""
    last_day: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    model_version: str = ""
    fingerprint: str = ""
    train_rows: int = 0
    test_rows: int = 0
    auc_roc: float = 0.0
    average_precision: float = 0.0
    card_precision_100: float = 0.0
    decisions: int = 0
    events_pushed: int = 0
    decision_p50_ms: float = 0.0
    decision_p99_ms: float = 0.0
    values_compared: int = 0
    mismatches: int = 0
    mismatches_by_feature: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    address: str = ""
    machine: str = ""

    def as_json(self) -> dict[str, Any]:
        """The report as what a JSON file holds."""
        return asdict(self)

    def rows(self) -> list[tuple[str, Any]]:
        """The report as a short table for people."""
        return [
            ("transactions", f"{self.transactions:,} from {self.first_day} to {self.last_day}"),
            *((f"seconds: {step}", f"{seconds:.1f}") for step, seconds in self.seconds.items()),
            ("seconds in all", f"{sum(self.seconds.values()):.1f}"),
            ("AUC ROC", f"{self.auc_roc:.4f}"),
            ("average precision", f"{self.average_precision:.4f}"),
            ("card precision@100", f"{self.card_precision_100:.4f}"),
            ("decisions over HTTP", f"{self.decisions:,}, while {self.events_pushed:,} events went in"),
            ("decision p50, p99", f"{self.decision_p50_ms:.2f} ms, {self.decision_p99_ms:.2f} ms"),
            ("values compared", f"{self.values_compared:,}"),
            ("mismatches", f"{self.mismatches:,}"),
            ("open", self.address),
        ]


@dataclass(frozen=True)
class DemoSettings:
    """What to run: `repo` the Feast repository, `folder` for models, logs and the report, `transactions` a published
    file (else `process` is generated), `decisions` how many transactions of the replayed days are scored.
    """

    repo: Path
    folder: Path
    transactions: Path | None = None
    process: FraudProcess = field(default_factory=FraudProcess)
    decisions: int = 8_000
    seed: int = 0


def run_demo(settings: DemoSettings, progress: Progress) -> DemoReport:
    """Runs all steps and returns the report; the caller decides what a mismatch means.

    Raises SourceError for a file that cannot be used or too few days, and whatever a step raises.
    """
    report = DemoReport(address=ADDRESS, machine=f"{platform.machine()}, {os.cpu_count()} cores")
    with _timed(report, "data"):
        transactions, sources = _data(settings, progress)
    days = _days(transactions)
    report.transactions = transactions.num_rows
    report.first_day, report.last_day = str(days.first), str(days.last)
    with _timed(report, "apply"):
        progress("apply", 0, 1)
        apply(settings.repo)
        progress("apply", 1, 1)
    clock = ManualClock(days.replay_start)
    with FeatureLayer(settings.repo, sources=sources, clock=clock) as layer:
        trained = _train(settings, layer, transactions, days, report, progress)
        with _timed(report, "bootstrap"):
            layer.bootstrap(until=days.replay_start, progress=lambda view, done, of: progress("bootstrap", done, of))
        log = settings.folder / "decisions.jsonl"
        log.unlink(missing_ok=True)
        with _timed(report, "replay"):
            _replay(settings, layer, clock, trained, transactions, days, log, report, progress)
        with _timed(report, "compare"):
            progress("compare", 0, 1)
            _record(report, compare_decisions(layer, log))
            progress("compare", 1, 1)
    return report


@contextmanager
def _timed(report: DemoReport, step: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    report.seconds[step] = round(time.perf_counter() - began, 2)


# -- data -------------------------------------------------------------------------------------------------------


def _data(settings: DemoSettings, progress: Progress) -> tuple[pa.Table, dict[str, str]]:
    """The transactions, and where the layer reads them if not from the repository's own data folder."""
    if not (settings.repo / "feature_store.yaml").is_file():
        raise ConfigError(f"{settings.repo} is no Feast repository; run the demo in a clone, or give --repo.")
    data = settings.repo / "data"
    if settings.transactions is None:
        made = generate(settings.process, on_day=lambda day: progress("data", day + 1, settings.process.days))
        write_parquet(made.transactions, data / "transactions.parquet")
        write_parquet(made.customers, data / "customers.parquet")
        return made.transactions, {}
    progress("data", 0, 1)
    file = settings.transactions
    if file.is_dir():
        file = file / "transactions.parquet"
    transactions = load_published(file).sort_by([("TX_DATETIME", "ascending"), ("TRANSACTION_ID", "ascending")])
    first = pc.min(transactions["TX_DATETIME"]).as_py()
    customers = load_customers(file.parent, first)
    if customers is None:
        raise SourceError(f"there is no customers.parquet beside {file}; the customers' profiles are read from it.")
    write_parquet(customers, settings.folder / "customers.parquet")
    progress("data", 1, 1)
    return transactions, {"transactions": str(file), "customers": str(settings.folder / "customers.parquet")}


@dataclass(frozen=True)
class _Days:
    """The days of a run: a study split that ends where the replay starts."""

    first: dt.date
    last: dt.date
    split: StudySplit
    replay_start: int
    replay_end: int


def _days(transactions: pa.Table) -> _Days:
    bounds = pc.min_max(transactions["TX_DATETIME"]).as_py()
    first, last = bounds["min"].date(), bounds["max"].date()
    replay = last - dt.timedelta(days=REPLAY_DAYS - 1)
    split = StudySplit(replay - dt.timedelta(days=21))
    if (split.train_start - first).days < 7:
        raise SourceError(
            f"{first} to {last} are too few days: the demo needs 21 for training and test, {REPLAY_DAYS} to replay, "
            "and at least a week of history before them."
        )
    start = micros(dt.datetime.combine(replay, dt.time(), dt.UTC))
    return _Days(first, last, split, start, start + REPLAY_DAYS * DAY)


def _train(
    settings: DemoSettings,
    layer: FeatureLayer,
    transactions: pa.Table,
    days: _Days,
    report: DemoReport,
    progress: Progress,
) -> Trained:
    with _timed(report, "train"):
        progress("train", 0, 1)
        trained = train_model(layer, transactions, days.split, SERVICE)
        save(trained, settings.folder / "models", moment(days.replay_start))
        progress("train", 1, 1)
    report.model_version, report.fingerprint = trained.model.version, trained.model.fingerprint
    report.train_rows, report.test_rows = trained.train_rows, trained.test_rows
    report.auc_roc = round(trained.scores.auc_roc, 4)
    report.average_precision = round(trained.scores.average_precision, 4)
    report.card_precision_100 = round(trained.scores.card_precision_100, 4)
    return trained


# -- replay -----------------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """One push source's events of the replayed days, in order of event time, and how far they have been pushed."""

    source: str
    rows: pa.Table
    times: np.ndarray
    pushed: int = 0

    def due(self, until: int) -> pa.Table:
        """The events not yet pushed that are dated before a time."""
        end = int(np.searchsorted(self.times, until))
        return self.rows.slice(self.pushed, max(end - self.pushed, 0))


def _logs(transactions: pa.Table, days: _Days) -> list[_Log]:
    times = np.asarray(arrow_micros(transactions["TX_DATETIME"]))
    logs = []
    for source, delay in (("transaction_events", 0), ("label_events", _LABEL_DELAY)):
        rows = np.flatnonzero((times + delay >= days.replay_start) & (times + delay < days.replay_end))
        rows = rows[np.argsort(times[rows], kind="stable")]
        logs.append(_Log(source, transactions.take(pa.array(rows)), times[rows] + delay))
    return logs


def _replay(
    settings: DemoSettings,
    layer: FeatureLayer,
    clock: ManualClock,
    trained: Trained,
    transactions: pa.Table,
    days: _Days,
    log: Path,
    report: DemoReport,
    progress: Progress,
) -> None:
    """Asks for scores in time order while events go in, each stored before the request that it belongs to."""
    scored = _sample(spine_of(transactions, moment(days.replay_start).date(), moment(days.replay_end).date()), settings)
    logs = _logs(transactions, days)
    latencies: list[float] = []
    app = create_app(layer, trained.model, DecisionLog(log), clock)
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        stored_until = days.replay_start
        for i, row in enumerate(scored.to_pylist()):
            t = micros(row["TX_DATETIME"])
            clock.set(t)
            if t >= stored_until:
                stored_until = t + LOOK_AHEAD
                for source in logs:
                    report.events_pushed += _push(client, source, stored_until)
            latencies.append(_score(client, row))
            if i % 100 == 0:
                progress("replay", i, scored.num_rows)
    progress("replay", scored.num_rows, scored.num_rows)
    report.decisions = len(latencies)
    report.decision_p50_ms, report.decision_p99_ms = (round(float(q), 3) for q in np.percentile(latencies, [50, 99]))


def _sample(spine: pa.Table, settings: DemoSettings) -> pa.Table:
    chosen = np.random.default_rng(settings.seed).permutation(spine.num_rows)[: settings.decisions]
    return spine.take(pa.array(np.sort(chosen))).sort_by(
        [("TX_DATETIME", "ascending"), ("TRANSACTION_ID", "ascending")]
    )


def _push(client: httpx.Client, log: _Log, until: int) -> int:
    rows = log.due(until)
    if not rows.num_rows:
        return 0
    columns = {name: rows[name].to_pylist() for name in rows.column_names}
    columns["TX_DATETIME"] = [t.isoformat() for t in columns["TX_DATETIME"]]
    body = {"push_source_name": log.source, "df": columns, "to": "online", "partition": 0, "offset": log.pushed}
    client.post("/push", json=body).raise_for_status()
    log.pushed += rows.num_rows
    return rows.num_rows


def _score(client: httpx.Client, row: dict[str, Any]) -> float:
    """Asks for one score and returns how long the answer took, in milliseconds."""
    body = {
        "transaction_id": row["TRANSACTION_ID"],
        "customer_id": row["customer_id"],
        "terminal_id": row["terminal_id"],
        "amount": row["TX_AMOUNT"],
        "event_time": row["TX_DATETIME"].isoformat(),
    }
    began = time.perf_counter()
    client.post("/fraud/score", json=body).raise_for_status()
    return (time.perf_counter() - began) * 1_000


# -- comparison -------------------------------------------------------------------------------------------------


def compare_decisions(layer: FeatureLayer, log: Path) -> Comparison:
    """Compares every feature value that decisions logged with the value history gives for the same time."""
    request = layer.prepare(SERVICE).request
    decisions = list(read_decisions(log))
    times = pa.array([d.as_of for d in decisions], pa.timestamp("us", "UTC"))
    spine = pa.table(
        {
            "customer_id": pa.array([d.request["customer_id"] for d in decisions], pa.int64()),
            "terminal_id": pa.array([d.request["terminal_id"] for d in decisions], pa.int64()),
            "TX_AMOUNT": pa.array([d.request["amount"] for d in decisions], pa.float64()),
            "TX_DATETIME": times,
            "event_timestamp": times,
        }
    )
    history = layer.get_historical_features(spine, SERVICE).to_arrow()
    logged = pa.table(
        {
            column: pa.array([d.features[column] for d in decisions], request.type_of(ref).arrow)
            for ref, column in zip(request.refs, request.columns, strict=True)
        }
    )
    return compare(request, logged, history)


def _record(report: DemoReport, comparison: Comparison) -> None:
    report.values_compared, report.mismatches = comparison.compared, comparison.mismatched
    report.mismatches_by_feature = {c: n for c, n in comparison.mismatches.items() if n}
    report.examples = [str(m) for m in comparison.examples]
