"""The benchmarks run from end to end, judge by value, and count against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import kernels
from benchmarks.data import Recipe
from benchmarks.history import QUANTITIES, cases
from benchmarks.measure import Call, CallFailed, measure
from benchmarks.report import Goal, Row, judge, write
from benchmarks.values import differences, digest

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_history_bench_leaves_a_row_for_every_case_and_quantity(tmp_path: Path) -> None:
    results = tmp_path / "history.json"
    tiny = ["--scale", "0.0002", "--rounds", "1", "--no-peer", "--no-fresh"]
    places = ["--data", str(tmp_path), "--results", str(results)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.history", *tiny, *places],
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())
    ordinary = [case.name for case in cases(1.0) if not case.large]
    assert [row["name"] for row in rows] == [f"{name} {quantity}" for name in ordinary for quantity in QUANTITIES]
    for row in rows:
        assert list(row) == [field.name for field in fields(Row)]
        assert row["isochron"] > 0
        assert row["limit"] > 0
        assert row["to_limit"] == pytest.approx(row["isochron"] / row["limit"], rel=1e-3)
        assert row["peer"] is row["to_peer"] is None
        assert row["rounds"] == 1
        assert (row["met"] is None) == (row["goal"] is None)
        assert {"python", "duckdb", "polars", "pyarrow", "numpy", "feast", "isochron"} <= row["versions"].keys()
        assert row["machine"].keys() == {"cpu", "cores", "memory_gb", "os"}
        assert ("Feast has no engine" in row["note"]) == row["name"].startswith("backfill")


# -- the judge ------------------------------------------------------------------------------------------------------


def features(**columns: list[float | None]) -> dict[str, object]:
    return digest(pa.table({"entity_id": [1, 2, 3], **columns}))


def test_equal_values_show_no_difference_and_float_sums_may_differ_in_the_last_bits() -> None:
    ours = features(f0=[0.1, None, 3.0], sum_amount_3600s=[0.3, 1.0, None])
    assert differences(ours, features(f0=[0.1, None, 3.0], sum_amount_3600s=[0.3 + 1e-13, 1.0, None]), 1e-9) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([0.1, None, 3.0000000001], "f0: sum 3.1 against 3.1000000001"),
        ([0.1, 3.0, None], "f0: weighted sum"),
        ([0.1, 0.0, 3.0], "f0: 1 nulls against 0"),
    ],
    ids=["one bit", "another order", "a value for a null"],
)
def test_a_wrong_value_is_a_difference(theirs: list[float | None], said: str) -> None:
    (line,) = differences(features(f0=[0.1, None, 3.0]), features(f0=theirs), 1e-9)
    assert line.startswith(said)


def test_a_missing_row_or_column_is_a_difference() -> None:
    ours = features(f0=[1.0, 2.0, 3.0])
    assert differences(ours, digest(pa.table({"entity_id": [1], "f0": [1.0]})), 0.0) == ["3 rows against 1"]
    assert differences(ours, features(f1=[1.0, 2.0, 3.0]), 0.0) == [
        "columns ['entity_id', 'f0'] against ['entity_id', 'f1']"
    ]


def test_rows_in_any_order_are_equal_where_order_is_not_asked_for() -> None:
    turned = digest(pa.table({"entity_id": [3, 2, 1], "f0": [3.0, None, 0.1]}))
    assert differences(features(f0=[0.1, None, 3.0]), turned, 1e-9, in_order=False) == []


# -- the goals ------------------------------------------------------------------------------------------------------


def row(name: str, isochron: float, limit: float | None = None) -> Row:
    return Row(name, isochron, None, limit, "s")


def test_goals_are_held_against_the_limit_another_row_and_the_unit() -> None:
    rows = [row("a wall", 1.2, 1.0), row("b wall", 4.9, 1.0), row("c wall", 2.0)]
    both = (Goal(5.0, "limit"), Goal(4.0, "a wall"))
    judge(rows, {"a wall": (Goal(1.2, "limit"),), "b wall": both, "c wall": (Goal(1.9),)})
    assert [(r.goal, r.met) for r in rows] == [
        ("<= 1.2 x limit", True),
        ("<= 5 x limit and <= 4 x a wall", False),
        ("<= 1.9 s", False),
    ]


def test_a_goal_against_what_was_not_measured_is_not_decided() -> None:
    rows = [row("a wall", 1.0)]
    judge(rows, {"a wall": (Goal(1.2, "limit"), Goal(4.0, "b wall"))})
    assert rows[0].met is None


def test_a_results_file_keeps_the_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    write([row("a wall", 1.0), row("b wall", 2.0)], tmp_path / "history.json")
    write([row("b wall", 3.0)], tmp_path / "history.json")
    kept = json.loads((tmp_path / "history.json").read_text())
    assert [(r["name"], r["isochron"]) for r in kept] == [("a wall", 1.0), ("b wall", 3.0)]


# -- the parts ------------------------------------------------------------------------------------------------------


def test_a_fresh_process_measures_a_call_and_says_why_one_fails(tmp_path: Path) -> None:
    Recipe("features", 200, 10, in_time_order=True).write(tmp_path / "rows.parquet")
    Recipe("training", 20, 10).write(tmp_path / "training.parquet")
    arguments = {"rows": str(tmp_path / "rows.parquet"), "spine": str(tmp_path / "training.parquet")}
    options = {"features": ["f0"], "in_time_order": True}
    measured = measure(Call("benchmarks.limits:join_duckdb", arguments | options, arguments | options), tmp_path, 60)
    assert measured.values["rows"] == 20
    assert measured.wall > 0 < measured.cpu
    assert measured.memory > 20_000_000
    wrong = arguments | options | {"features": ["nothing"]}
    with pytest.raises(CallFailed, match="nothing"):
        measure(Call("benchmarks.limits:join_duckdb", wrong, arguments | options), tmp_path, 60)


def test_the_same_recipe_gives_the_same_rows_in_time_order_or_not(tmp_path: Path) -> None:
    ordered = Recipe("features", 500, 10, in_time_order=True)
    ordered.write(tmp_path / "a.parquet")
    ordered.write(tmp_path / "b.parquet")
    times = pq.read_table(tmp_path / "a.parquet")["event_time"].to_numpy()
    assert (np.diff(times) >= np.timedelta64(0)).all()
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))
    written = (tmp_path / "a.parquet").stat().st_mtime_ns
    ordered.write(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_mtime_ns == written
    Recipe("features", 500, 10).write(tmp_path / "a.parquet")
    times = pq.read_table(tmp_path / "a.parquet")["event_time"].to_numpy()
    assert not (np.diff(times) >= np.timedelta64(0)).all()


@pytest.mark.parametrize("asked_rows", [3, 300], ids=["read back", "swept"])
def test_both_ways_of_the_window_scan_equal_the_plain_filter(asked_rows: int) -> None:
    draw = np.random.default_rng(asked_rows)
    times, values = np.sort(draw.integers(0, 100, 200) * 10), draw.normal(size=200)
    asked = np.sort(draw.integers(0, 1_200, asked_rows))
    windows, hops = np.array([60, 700]), np.array([10, 50])
    count = np.empty((asked_rows, 2), np.int64)
    total, top = np.empty(count.shape), np.empty(count.shape)
    questions = (np.array([0, asked_rows]), asked, np.arange(asked_rows)[::-1].copy())
    kernels.scan_windows(0, 1, np.array([0, 200]), times, values, *questions, windows, hops, count, total, top)
    for place, time in enumerate(asked[::-1]):
        for number, (window, hop) in enumerate(zip(windows, hops, strict=True)):
            inside = values[((time - window) // hop * hop <= times) & (times < time)]
            assert count[place, number] == len(inside)
            assert total[place, number] == pytest.approx(inside.sum(), abs=1e-9)
            assert top[place, number] == inside.max(initial=-np.inf)
