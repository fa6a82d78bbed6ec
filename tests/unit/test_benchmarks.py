"""The benchmarks run from end to end, judge by value, and count against themselves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import kernels, online_json
from benchmarks.data import Recipe
from benchmarks.history import QUANTITIES, cases
from benchmarks.http_load import LoadFailed, ask, post, run_load
from benchmarks.measure import Call, CallFailed, measure
from benchmarks.online_data import DAY, KEY, START, WINDOWED, WINDOWS, EventLog, Rows, Truth, Values, View, keys_of
from benchmarks.online_limits import RowCodec, newest
from benchmarks.online_packed_log import EVENT, fold
from benchmarks.online_sides import difference
from benchmarks.report import Goal, Row, judge, write
from benchmarks.values import differences, digest
from benchmarks.workers import Worker, WorkerFailed

ROOT = Path(__file__).resolve().parents[2]
#: This module for processes that start in ROOT.
HERE = "tests.unit.test_benchmarks"


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


@pytest.mark.parametrize(
    ("goal", "figure", "met"),
    [
        (Goal(15.0, "peer", "at least"), 1_500.0, True),
        (Goal(15.0, "peer", "at least"), 1_499.0, False),
        (Goal(10.0, "peer", "faster"), 10.0, True),
        (Goal(10.0, "peer", "faster"), 10.1, False),
        (Goal(1.2, "limit"), 10.1, None),
    ],
)
def test_goals_may_ask_for_more_or_for_a_speed_up(goal: Goal, figure: float, met: bool | None) -> None:
    assert goal.met(Row("a", figure, 100.0, None, "1/s"), {}) is met


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


# -- the online bench -----------------------------------------------------------------------------------------------

ONLINE = ["read_100_nulls", "http_1", "write_1000", "memory", "windows_5_memory", "windows_5_100_numpy"]


def run_online(folder: Path, side: str, *more: str) -> subprocess.CompletedProcess[str]:
    tiny = ["--scale", "0.001", "--rounds", "2", "--seconds", "0.01", "--no-peer"]
    places = ["--data", str(folder), "--results", str(folder / "online.json")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.online",
        "--isochron",
        f"benchmarks.online_stand_in:{side}",
        *tiny,
        *places,
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_online_bench_leaves_rows_with_figures_of_all_who_took_part(tmp_path: Path) -> None:
    done = run_online(tmp_path, "StandIn", *(word for name in ONLINE for word in ("--only", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "online.json").read_text())}
    assert sorted({name.rpartition(" ")[0] for name in rows}) == sorted(ONLINE)
    for name, row in rows.items():
        assert list(row) == [field.name for field in fields(Row)]
        assert row["isochron"] > 0
        compared = row["peer"] if name == "windows_5_memory bytes" else row["limit"]
        assert compared > 0
        assert row["rounds"] == (1 if name.endswith("bytes") else 2)
        assert (row["met"] is None) == (row["goal"] is None or "peer" in row["goal"])
        assert {"python", "redis", "redis-server", "hiredis", "feast", "isochron"} <= row["versions"].keys()
    assert "bare socket" in rows["read_100_nulls p50"]["note"]
    assert "MGET of 100 keys, 2,4" in rows["windows_5_100_numpy p50"]["note"]
    assert rows["memory bytes"]["to_limit"] == pytest.approx(1.0, abs=0.1)


def test_the_online_bench_measures_nobody_who_reads_a_wrong_value(tmp_path: Path) -> None:
    done = run_online(tmp_path, "WrongStandIn", "--only", "read_100_nulls")
    assert done.returncode == 1
    assert "read_100_nulls: values of isochron differ: f0, row" in done.stderr
    assert not json.loads((tmp_path / "online.json").read_text())


def test_an_unknown_case_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = run_online(tmp_path, "StandIn", "--only", "reed_1")
    assert done.returncode == 2
    assert "reed_1" in done.stderr
    assert "read_1" in done.stderr


# -- rows by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [3, 64, 70])
@pytest.mark.parametrize("rows", [1, 40])
def test_packed_rows_give_back_values_nulls_and_unknown_keys(features: int, rows: int) -> None:
    view = View("plain", features, 1_000)
    stored = dict(zip(view.rows().keys.tolist(), RowCodec(view.names).encode(view.rows()), strict=True))
    truth = Truth(view.rows())
    dense, sparse = view.requests(rows)[0], view.sparse_requests(rows + 1)[0]
    for keys in (dense, sparse, sparse[:rows], [7]):
        decoded = RowCodec(view.names).decode(keys, [stored.get(key) for key in keys])
        assert difference(decoded, truth.answer(keys)) is None
    assert None not in truth.answer(dense)["f0"]
    assert any(None in column for column in truth.answer(sparse).values())


def test_packed_rows_lead_with_a_time_that_compares_as_text() -> None:
    times = np.array([START, START + 1, START + 255, START + 256, START + 300 * DAY])
    packed = RowCodec(("f0",)).encode(Rows(np.arange(5), times, np.zeros((5, 1))))
    assert packed == sorted(packed)


def test_of_one_batch_the_newest_row_of_a_key_is_written_of_equal_ones_the_last() -> None:
    rows = Rows(np.array([5, 3, 5, 3]), np.array([20, 10, 10, 10]), np.array([[1.0], [2.0], [3.0], [4.0]]))
    kept = newest(rows)
    assert dict(zip(kept.keys.tolist(), kept.values[:, 0].tolist(), strict=True)) == {3: 4.0, 5: 1.0}


def test_batches_to_write_are_newer_than_all_before_them_and_than_smaller_ones() -> None:
    view = View("written", 2, 1_000)
    one, many = list(islice(view.newer(1), 50)), list(islice(view.newer(100), 3))
    times = [rows.times for rows in (*one, *many)]
    assert all(before.max() < after.min() for before, after in pairwise(times))
    assert times[0].min() - DAY > view.rows().times.max()
    assert len(set(many[0].keys.tolist())) == 100


# -- windows by hand ------------------------------------------------------------------------------------------------


def plain_filter(times: np.ndarray, amounts: np.ndarray, until: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for window, hop in WINDOWS:
        inside = amounts[((until - window) // hop * hop <= times) & (times < until)]
        folds = {"count": len, "sum": np.sum, "mean": np.mean, "max": np.max}
        for kind, fold_of in folds.items():
            value = fold_of(inside) if len(inside) or kind == "count" else None
            found[f"{kind}_amount_{window // 1_000_000}s"] = (
                value if value is None else value.item() if kind != "count" else value
            )
    return found


@pytest.mark.parametrize("entities", [1, 30])
def test_the_fold_of_packed_events_equals_the_plain_filter(entities: int) -> None:
    draw = np.random.default_rng(entities)
    until = START + 40 * DAY + 12_345_678_901
    strings, right = [], []
    # From none to many events, some older than any window, some not before the reader's time.
    for number in draw.permutation(np.linspace(0 if entities > 1 else 500, 500, entities).astype(int)):
        events = np.empty(number, EVENT)
        events["time"] = np.sort(until + DAY - (draw.random(number) ** 3 * 40 * DAY).astype(np.int64))
        events["amount"] = draw.normal(size=number)
        strings.append(events.tobytes() or None)
        right.append(plain_filter(events["time"], events["amount"], until))
    answer = fold(list(range(entities)), strings, until)
    wanted: Values = {KEY: list(range(entities)), **{name: [one[name] for one in right] for name in WINDOWED}}
    assert difference(answer, wanted, 1e-9) is None


def test_a_log_is_cut_into_history_and_a_few_recent_events_of_an_entity() -> None:
    log = EventLog(5, 100)
    history, recent = log.table(recent=False), log.table(recent=True)
    assert len(history) + len(recent) == 5 * 31 * 100
    assert len(recent) / 100 == pytest.approx(16, rel=0.2)
    assert max(history["event_time"].cast(pa.int64()).to_pylist()) < log.cut <= recent["event_time"][0].value
    assert recent["event_time"][-1].value < log.until
    assert set(log.requests(100)[0]) == set(keys_of(np.arange(100)).tolist())


def test_values_differ_by_type_by_null_and_by_more_than_the_last_bits_of_a_sum() -> None:
    right: Values = {"count_amount_1s": [1], "sum_amount_1s": [0.3]}
    assert difference({"count_amount_1s": [1], "sum_amount_1s": [0.1 + 0.2]}, right, 1e-9) is None
    assert difference({"count_amount_1s": [1], "sum_amount_1s": [0.1 + 0.2]}, right)
    for wrong in ([1.0], [None], [2], [1, 1]):
        assert difference({"count_amount_1s": wrong, "sum_amount_1s": [0.3]}, right, 1e-9).startswith("count_amount_1s")


# -- over HTTP ------------------------------------------------------------------------------------------------------


@contextmanager
def answering(answer: Callable[[bytes], list[bytes]]) -> Iterator[tuple[str, int]]:
    """A server on a thread: `answer` says what goes out, piece by piece, for what came in; nothing closes."""

    def serve(plug: socket.socket) -> None:
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with plug:
            while request := plug.recv(1 << 16):
                pieces = answer(request)
                for piece in pieces:
                    plug.sendall(piece)
                if not pieces:
                    return

    def accept() -> None:
        while True:
            try:
                plug, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(plug,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()
        listening.shutdown(socket.SHUT_RDWR)


def test_the_load_generator_counts_every_answer_and_its_bytes() -> None:
    body = b"x" * 700_000
    head = b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: %d\r\n\r\n" % len(body)
    asked: list[bytes] = []

    def answer(request: bytes) -> list[bytes]:
        asked.append(request)
        return [head[:20], head[20:] + body[:1_000], body[1_000:]]

    requests = [post("here", "/path", b"first"), post("here", "/path", b"second")]
    with answering(answer) as address:
        assert ask(address, requests[0]) == body
        asked.clear()
        load = run_load(address, requests, connections=3, seconds=0.2)
    assert load.answers == len(load.durations) > 3
    # What was on its way at the end, at most one a connection, is not counted.
    assert load.answers <= len(asked) <= load.answers + 3
    assert load.size == load.answers * len(body)
    assert load.rate == pytest.approx(load.answers / 0.2, rel=0.1)
    assert 0 < load.percentile(50) <= load.percentile(99) < 0.2
    assert set(asked) == set(requests)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno"], "not a 200 with a length: HTTP/1.1 500 Oh"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], "not a 200 with a length"),
        ([], "connection closed after 0 bytes"),
    ],
    ids=["error", "chunks", "closed"],
)
def test_the_load_generator_counts_nothing_but_whole_answers(pieces: list[bytes], said: str) -> None:
    with answering(lambda _: pieces) as address, pytest.raises(LoadFailed, match=said):
        run_load(address, [post("here", "/", b"")], connections=1, seconds=0.2)


def test_answers_in_json_are_compared_by_feature_in_any_order() -> None:
    view = View("plain", 2, 1_000)
    truth, keys = Truth(view.rows()), view.requests(2)[0]
    right = json.loads(online_json.answer(truth, keys))
    assert right["metadata"]["feature_names"] == [KEY, "f0", "f1"]
    turned = {
        "metadata": {"feature_names": ["f1", KEY, "f0"]},
        "results": [right["results"][place] for place in (2, 0, 1)],
    }
    text = online_json.answer(truth, keys)
    assert online_json.difference(json.dumps(turned).encode(), text) is None
    turned["results"][0]["statuses"] = ["PRESENT", "NOT_FOUND"]
    assert online_json.difference(json.dumps(turned).encode(), text).startswith("f1, statuses")


# -- workers --------------------------------------------------------------------------------------------------------


class Chatty:
    """Prints, answers, and fails when told to."""

    def double(self, number: int) -> int:
        print("not an answer")
        return 2 * number

    def fail(self) -> None:
        raise ValueError("that was asked for")


def test_a_worker_answers_whatever_is_printed_and_says_how_it_failed() -> None:
    with Worker(None, f"{HERE}:Chatty") as worker:
        assert [worker.call("double", number) for number in (1, 2)] == [2, 4]
        with pytest.raises(WorkerFailed, match="that was asked for"):
            worker.call("fail")
        with pytest.raises(WorkerFailed, match="that was asked for"):
            worker.call("double", 3)
