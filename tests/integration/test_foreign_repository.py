"""A Feast repository that is not ours: apply, historical, bootstrap and online work there, equal to the reference."""

from __future__ import annotations

import datetime as dt
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store import FeatureLayer
from feature_store.aggregations.reference import Event, value
from feature_store.definitions.view import WindowedView
from feature_store.timestamps import HOUR, MINUTE, SECOND, micros, moment
from tests.processes import output_of

START = micros(dt.datetime(2023, 6, 1, tzinfo=dt.UTC))
#: Composite keys that run together when they are joined as text.
KEYS = [("1", "11"), ("11", "1"), ("a", ""), ("north", "m-1")]


def _readings(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(600):
        grid, meter = rng.choice(KEYS)
        measured = START + rng.randrange(0, 10 * HOUR, 30 * SECOND)
        rows.append(
            {
                "g": grid,
                "m": meter,
                "measured": measured,
                "arrived": measured + rng.randrange(0, 600 * SECOND, 60 * SECOND),
                "kwh": rng.choice([None, float("nan"), 0.0, -0.0, 1.5, 2.25, 1e6]),
                "code": rng.choice([None, "ok", "Ok", "é", ""]),
            }
        )
    return rows


def _tariffs(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "g": rng.choice([k[0] for k in KEYS]),
            "valid_from": START + rng.randrange(0, 10) * HOUR,
            "entered": START + rng.randrange(0, 3) * HOUR,
            "price": rng.choice([None, 0.1, 0.2, 0.3]),
            "label": rng.choice(["day", "night"]),
        }
        for _ in range(40)
    ]


def _table(rows: list[dict[str, Any]], times: dict[str, pa.DataType]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    micros_of = {n: pa.array(columns[n], pa.int64()).cast(pa.timestamp("us")) for n in times}
    arrays = {n: micros_of[n].cast(times[n]) if n in times else pa.array(v) for n, v in columns.items()}
    return pa.table(arrays)


@pytest.fixture(scope="module")
def logs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = random.Random(7)
    return _readings(rng), _tariffs(rng)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, logs: tuple) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "meters"
    shutil.copytree(Path(__file__).parent / "meter_repo", folder)
    readings, tariffs = logs
    zoned, naive = pa.timestamp("us", "UTC"), pa.timestamp("us")
    for i in range(3):
        part = _table(readings[i::3], {"measured": zoned, "arrived": naive})
        (folder / "readings" / f"part={i}").mkdir(parents=True)
        pq.write_table(part, folder / "readings" / f"part={i}" / "rows.parquet", row_group_size=50)
    pq.write_table(_table(tariffs, {"valid_from": naive, "entered": naive}), folder / "tariffs.parquet")
    output_of(folder, "feast", "apply")
    return folder


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, str, int]]:
    rng = random.Random(11)
    times = [START + rng.randrange(0, 11 * HOUR, 30 * SECOND) for _ in range(80)]
    return [(*rng.choice([*KEYS, ("never", "seen")]), t) for t in times]


def _expected(view: WindowedView, readings: list[dict[str, Any]], grid: str, meter: str, t: int) -> dict[str, Any]:
    events = [
        Event(r["measured"], {"energy": r["kwh"], "status": r["code"]}, r["arrived"])
        for r in readings
        if (r["g"], r["m"]) == (grid, meter)
    ]
    return {a.name: value(events, a, t) for a in view.aggregations}


def _tariff(tariffs: list[dict[str, Any]], grid: str, t: int) -> dict[str, Any]:
    """The newest row at or before `t`, ties by created time, then by values (price after label), not older than ttl."""

    def rank(row: dict[str, Any]) -> tuple:
        return row["valid_from"], row["entered"], row["label"], row["price"] is not None, row["price"] or 0

    rows = [r for r in tariffs if r["g"] == grid and r["valid_from"] <= t]
    best = max(rows, key=rank, default=None)
    if best is None or best["valid_from"] < t - 3 * HOUR:
        return {"price": None, "label": None}
    return {"price": best["price"], "label": best["label"]}


def _assert_rows(table: pa.Table, view: WindowedView, logs: tuple, asked: list[tuple[str, str, int]]) -> None:
    for row, (grid, meter, t) in zip(table.to_pylist(), asked, strict=True):
        expected = {**_expected(view, logs[0], grid, meter, t), **_tariff(logs[1], grid, t)}
        for name, truth in expected.items():
            exact = pytest.approx(truth, rel=1e-9) if isinstance(truth, float) else truth
            assert row[name] == exact, (name, grid, meter, moment(t))


def _spine(asked: list[tuple[str, str, int]]) -> pa.Table:
    return pa.table(
        {
            "meter_id": [m for _, m, _ in asked],
            "note": list(range(len(asked))),
            "grid_id": [g for g, _, _ in asked],
            "event_timestamp": pa.array([t for *_, t in asked], pa.int64()).cast(pa.timestamp("us")),
        }
    )


def test_historical_from_the_command_equals_the_reference(repo: Path, logs: tuple, asked: list, tmp_path: Path) -> None:
    pq.write_table(_spine(asked), tmp_path / "spine.parquet")
    out = tmp_path / "out.parquet"
    arguments = ["--spine", str(tmp_path / "spine.parquet"), "--out", str(out), "--repo", str(repo)]
    output_of(tmp_path, "isochron", "historical", "billing", *arguments)
    table = pq.read_table(out)
    view = FeatureLayer(repo).definitions.view("usage")
    assert isinstance(view, WindowedView)
    assert table.column_names[:4] == ["meter_id", "note", "grid_id", "event_timestamp"]
    assert table["note"].to_pylist() == list(range(len(asked)))
    _assert_rows(table, view, logs, asked)


def test_online_from_the_command_equals_the_reference(repo: Path, logs: tuple, asked: list, tmp_path: Path) -> None:
    until = START + 5 * HOUR
    output_of(tmp_path, "isochron", "bootstrap", "--until", moment(until).isoformat(), "--repo", str(repo))
    known = tuple(
        [r for r in rows if r[name] < until] for rows, name in zip(logs, ("measured", "valid_from"), strict=True)
    )
    view = FeatureLayer(repo).definitions.view("usage")
    assert isinstance(view, WindowedView)
    for t in (until, until + 90 * SECOND, until + 7 * MINUTE, until + 6 * HOUR):
        rows = [(g, m, t) for g, m, _ in asked[:10]]
        pq.write_table(_spine(rows).select(["meter_id", "grid_id"]), tmp_path / "keys.parquet")
        arguments = ["--keys", "keys.parquet", "--out", "out.parquet", "--as-of", moment(t).isoformat()]
        output_of(tmp_path, "isochron", "online", "billing", *arguments, "--repo", str(repo))
        _assert_rows(pq.read_table(tmp_path / "out.parquet"), view, known, rows)


def test_online_before_what_the_store_holds_is_answered_from_history(repo: Path, logs: tuple, asked: list) -> None:
    with FeatureLayer(repo) as layer:
        layer.bootstrap()
        view = layer.definitions.view("usage")
        assert isinstance(view, WindowedView)
        answer = layer.get_online_features(
            "billing", {"grid_id": [g for g, *_ in asked], "meter_id": [m for _, m, _ in asked]}, [t for *_, t in asked]
        )
        _assert_rows(answer.to_arrow(), view, logs, asked)


def test_another_source_path_is_read_in_its_place(repo: Path, logs: tuple, asked: list, tmp_path: Path) -> None:
    half = [r for r in logs[0] if r["g"] == "1"]
    times = {"measured": pa.timestamp("ns"), "arrived": pa.timestamp("us")}
    pq.write_table(_table(half, times), tmp_path / "elsewhere.parquet")
    with FeatureLayer(repo, sources={"readings": str(tmp_path / "elsewhere.parquet")}) as layer:
        view = layer.definitions.view("usage")
        assert isinstance(view, WindowedView)
        table = layer.get_historical_features(_spine(asked), "billing").to_arrow()
        _assert_rows(table, view, (half, logs[1]), asked)
